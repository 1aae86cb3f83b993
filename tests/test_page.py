"""The chat page in a real browser, against a scripted server."""

import re
import shutil
import time

import pytest

pytest.importorskip("playwright")

from playwright.sync_api import expect, sync_playwright

from chatglm.building import load_for_inference

from .scripted_server import (
    BREAKS,
    BUSY,
    CUT_BY_LENGTH,
    DEFAULT,
    ENDLESS,
    HOSTILE,
    KEY,
    NEEDS_KEY,
    ROUTE,
    ROUTE_ANSWER,
    Record,
    run_scripted_server,
)
from .test_api import running
from .tiny_weights import write_weights

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
EXPECTED = "Failed to load resource: "  # an error of the server, which the test is about
expect.set_options(timeout=20_000)  # of a busy machine
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")

MARKDOWN = {
    "# 一\n## 二 ##": "<h3>一</h3><h4>二</h4>",
    "一行\n又一行": "<p>一行<br>又一行</p>",
    "**粗**，*斜* `<b>` ~~删~~": (
        "<p><strong>粗</strong>，<em>斜</em> <code>&lt;b&gt;</code> <del>删</del></p>"
    ),
    "**见 `**` 与 *斜***": "<p><strong>见 <code>**</code> 与 <em>斜</em></strong></p>",
    "2 * 3 * 4，a_b_c，\\*星\\*": "<p>2 * 3 * 4，a_b_c，*星*</p>",
    "- 甲\n  - 乙\n    - 丙\n- 丁": (
        "<ul><li>甲<ul><li>乙<ul><li>丙</li></ul></li></ul></li><li>丁</li></ul>"
    ),
    "1. 甲\n  - 乙\n\n2. 丙": '<ol start="1"><li>甲<ul><li>乙</li></ul></li><li>丙</li></ol>',
    "3) 甲\n后文": '<ol start="3"><li>甲<br>后文</li></ol>',
    "- 甲\n\n文": "<ul><li>甲</li></ul><p>文</p>",
    "> 引\n> - 甲\n\n---": "<blockquote><p>引</p><ul><li>甲</li></ul></blockquote><hr>",
    "|a|b|\n|:-:|--:|\n|1|": (
        '<div class="table" tabindex="0"><table><thead><tr><th class="center">a</th>'
        '<th class="right">b</th></tr></thead><tbody><tr><td class="center">1</td>'
        '<td class="right"></td></tr></tbody></table></div>'
    ),
    "见https://a.cn/b_(c)?d=1。": (
        '<p>见<a href="https://a.cn/b_(c)?d=1" target="_blank" rel="noopener">'
        "https://a.cn/b_(c)?d=1</a>。</p>"
    ),
    "[信](mailto:a@b.cn)": '<p><a href="mailto:a@b.cn" target="_blank" rel="noopener">信</a></p>',
    "[坏](data:text/html,x) ![图](JavaScript:x)": (
        "<p>[坏](data:text/html,x) ![图](JavaScript:x)</p>"
    ),
}  # fmt: skip
UNFINISHED = {
    "文\n```python\na = 1": "<code>a = 1</code>",
    "**粗": "<p><strong>粗</strong></p>",
    "见 `码": "<p>见 <code>码</code></p>",
    "见 [字](https://a": "<p>见 字</p>",
    "文\n##": "<p>文</p>",
    "文\n|甲|": '<p>文</p><div class="table" tabindex="0">',
}
RENDER = """async ([pieces, isOpen]) => {
    const { Markdown } = await import("/page/markdown.js");
    const markdown = new Markdown(document.createElement("div"));
    for (const piece of pieces) markdown.show(piece, isOpen);
    return markdown.element.innerHTML;
}"""


@pytest.fixture(scope="module")
def server():
    with run_scripted_server() as scripted:
        yield scripted


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@pytest.fixture
def record(server):
    """What the server sees in this test."""
    server.record = Record()
    return server.record


@pytest.fixture(scope="module")
def problems():
    return []


@pytest.fixture(scope="module")
def new_page(server, browser, problems):
    """new_page(**options): an empty page of a new profile, in which nothing goes wrong unseen."""

    def is_own(url):
        return url.startswith((server.address, "data:"))

    def is_bad(message):
        return message.type in ("error", "warning") and not message.text.startswith(EXPECTED)

    def new(**options):
        context = browser.new_context(**{"locale": "zh-CN", **options})
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda request: is_own(request.url) or problems.append(request.url))
        page.on("console", lambda message: is_bad(message) and problems.append(message.text))
        return page

    return new


@pytest.fixture(scope="module")
def usual_page(new_page):
    return new_page()


@pytest.fixture
def page(server, usual_page, record, problems):
    """The chat page as a Chinese browser with empty storage shows it."""
    usual_page.goto(server.address)
    yield usual_page
    usual_page.goto("about:blank")
    devtools = usual_page.context.new_cdp_session(usual_page)
    stored = {"origin": server.address, "storageTypes": "local_storage"}
    devtools.send("Storage.clearDataForOrigin", stored)
    assert not problems


@pytest.fixture
def open_page(server, new_page, record, problems):
    """open_page(**options): the chat page in another browser."""
    opened = []

    def open_one(**options):
        opened.append(new_page(**options))
        opened[-1].goto(server.address)
        return opened[-1]

    yield open_one
    for page in opened:
        page.context.close()
    assert not problems


def ask(page, question):
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")


def ask_and_wait(page, question):
    ask(page, question)
    expect(last_round(page).locator(".copy")).to_be_visible()


def last_round(page):
    return page.locator(".round").last


def messages(body):
    return [(message["role"], message["content"]) for message in body["messages"]]


def wait_until(holds, timeout_seconds=5.0):
    ends_at = time.monotonic() + timeout_seconds
    while not holds():
        assert time.monotonic() < ends_at
        time.sleep(0.02)


def test_the_second_request_carries_the_first_round(page, record):
    ask_and_wait(page, ROUTE)
    ask_and_wait(page, "需要多久？")
    assert messages(record.asked[1]) == [
        ("user", ROUTE),
        ("assistant", ROUTE_ANSWER),
        ("user", "需要多久？"),
    ]
    fields = {name: value for name, value in record.asked[1].items() if name != "messages"}
    assert fields == {
        "model": "chatglm-6b",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.95,
        "top_p": 0.7,
    }


def test_an_answer_is_shown_with_its_format_and_its_speed(page):
    ask_and_wait(page, ROUTE)
    answer = last_round(page).locator(".answer")
    expect(answer.locator("ol > li")).to_have_count(2)
    expect(answer.locator("ol ul > li")).to_have_text(["提前半小时到站", "带好身份证"])
    expect(answer.locator("figcaption span")).to_have_text("python")
    expect(answer.locator("pre code")).to_contain_text('# "<b>" 也只是文字')
    expect(answer.locator("td.right")).to_have_text("1 h 39")
    expect(answer.locator("a")).to_have_attribute("rel", "noopener")
    expect(last_round(page).locator(".usage")).to_contain_text("token/s")


def test_markdown_becomes_the_elements_it_means(page):
    for source, expected in MARKDOWN.items():
        assert page.evaluate(RENDER, [[source], False]) == expected
    for source, expected in UNFINISHED.items():
        assert expected in page.evaluate(RENDER, [[source], True])


def test_an_answer_that_grew_by_characters_equals_the_whole_one(page):
    source = "\n\n".join([ROUTE_ANSWER, *MARKDOWN])
    grown = [source[:end] for end in range(len(source))]
    assert page.evaluate(RENDER, [grown, True]) != ""
    whole = page.evaluate(RENDER, [[source], False])
    assert page.evaluate(RENDER, [[*grown, source], False]) == whole


def test_markers_that_repeat_without_end_do_not_break_the_page(page):
    for marker in ("> ", "- ", "1. ", "**a ", "[", "`", "|", "* "):
        assert page.evaluate(RENDER, [[marker * 3000], True]) is not None


def test_a_growing_code_block_keeps_its_elements(page):
    kept = page.evaluate("""async () => {
        const { Markdown } = await import("/page/markdown.js");
        const markdown = new Markdown(document.createElement("div"));
        markdown.show("```py\\na", true);
        const before = markdown.element.querySelector("code").firstChild;
        markdown.show("```py\\na = 1\\nb = 2\\n```\\n后文", true);
        return before === markdown.element.querySelector("code").firstChild && before.data;
    }""")
    assert kept == "a = 1\nb = 2"


def test_markup_in_an_answer_is_only_text(page):
    ask_and_wait(page, HOSTILE)
    answer = last_round(page).locator(".answer")
    expect(answer).to_contain_text("<script>window.hacked=1</script>")
    expect(answer).to_contain_text('<img src=x onerror="window.hacked=1">')
    expect(answer.locator("strong")).to_have_text('<b onmouseover="window.hacked=1">粗</b>')
    expect(answer.locator("script, img, a, b")).to_have_count(0)
    answer.locator("strong").hover()
    assert page.evaluate("window.hacked") is None


def test_a_stopped_answer_stays_and_the_server_sees_the_client_leave(page, record):
    ask(page, ENDLESS)
    expect(last_round(page).locator(".answer")).to_contain_text("再说一句。")
    page.get_by_role("button", name="停止回答").click()
    expect(last_round(page).locator(".usage")).to_have_text("已停止")
    expect(last_round(page).locator(".answer")).to_contain_text("再说一句。")
    expect(page.get_by_role("button", name="发送")).to_be_visible()
    wait_until(lambda: record.clients_left == 1)


def test_a_reload_shows_the_conversation_again(page):
    ask_and_wait(page, ROUTE)
    ask(page, ENDLESS)
    expect(last_round(page).locator(".answer")).to_contain_text("再说一句。")
    page.reload()
    expect(page.locator(".question")).to_have_text([ROUTE, ENDLESS])
    expect(page.locator(".answer").first.locator("ol")).to_be_visible()
    expect(last_round(page).locator(".answer")).to_contain_text("再说一句。")
    expect(last_round(page).locator(".usage")).to_have_text("已停止")


def test_conversations_can_be_begun_chosen_deleted_and_brought_back(page):
    items = page.locator("#conversations a")
    ask_and_wait(page, "甲")
    page.locator("#new-chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    ask_and_wait(page, "乙")
    expect(items).to_have_text(["乙", "甲"])
    items.nth(1).click()
    expect(page.locator(".question")).to_have_text(["甲"])
    page.go_back()
    expect(page.locator(".question")).to_have_text(["乙"])
    items.nth(0).hover()
    page.get_by_role("button", name="删除对话").first.click()
    expect(items).to_have_text(["甲"])
    page.get_by_role("button", name="撤销").click()
    expect(items).to_have_text(["乙", "甲"])


def test_an_answer_goes_on_while_another_conversation_is_open(page, record):
    ask(page, ENDLESS)
    expect(last_round(page).locator(".answer")).to_contain_text("再说一句。")
    page.locator("#new-chat").click()
    ask_and_wait(page, "乙")
    page.get_by_role("link", name=ENDLESS).click()
    before = last_round(page).locator(".answer").text_content()
    expect(last_round(page).locator(".answer")).to_contain_text(before + "再说一句。")
    page.get_by_role("button", name="停止回答").click()
    wait_until(lambda: record.clients_left == 1)


def test_an_answer_can_be_asked_for_again(page, record):
    ask_and_wait(page, "甲")
    page.locator(".regenerate").click()
    wait_until(lambda: len(record.asked) == 2)
    expect(page.locator(".copy")).to_be_visible()
    assert messages(record.asked[1]) == messages(record.asked[0])
    expect(page.locator(".round")).to_have_count(1)


def test_an_answer_and_its_code_can_be_copied(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask_and_wait(page, ROUTE)
    page.locator(".copy").click()
    expect(page.locator(".copy")).to_have_text("已复制")
    assert page.evaluate("navigator.clipboard.readText()") == ROUTE_ANSWER
    page.locator(".copy-code").click()
    expect(page.locator(".copy-code")).to_have_text("已复制")
    assert page.evaluate("navigator.clipboard.readText()").startswith("def minutes(hours):\n    ")


def test_a_busy_server_says_when_to_try_again_and_the_question_stays(page, record):
    record.busy_times = 1
    ask(page, BUSY)
    expect(page.locator(".error")).to_contain_text("服务器正忙，请在 1 秒后重试。")
    expect(page.locator(".error")).to_contain_text("现在可以重试了")
    page.locator(".retry").click()
    expect(page.locator(".answer")).to_have_text(DEFAULT)
    expect(page.locator(".error")).to_have_count(0)
    expect(page.locator(".question")).to_have_text([BUSY])


def test_a_missing_key_opens_the_settings(page, record):
    ask(page, NEEDS_KEY)
    expect(page.locator("#apiKey")).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Escape")
    expect(page.locator(".error")).to_contain_text("API 密钥")
    page.locator(".retry").click()
    expect(page.locator(".answer")).to_have_text(DEFAULT)
    assert record.keys == [None, f"Bearer {KEY}"]


def test_a_server_that_is_gone_is_said(open_page):
    page = open_page()
    page.route("**/v1/**", lambda route: route.abort())
    page.reload()
    expect(page.locator("#notice")).to_contain_text("连不上服务器")


def test_an_answer_that_breaks_off_keeps_what_came(page):
    ask(page, BREAKS)
    expect(page.locator(".error")).to_contain_text("the engine stopped")
    expect(page.locator(".answer")).to_have_text("好的，一句话")


def test_an_answer_cut_by_its_length_says_so(page):
    ask_and_wait(page, CUT_BY_LENGTH)
    expect(page.locator(".note")).to_contain_text("长度上限")


def test_settings_are_sent_and_kept(page, record):
    page.locator("#open-settings").click()
    page.locator("#model").select_option("adgen-lora")
    page.locator("#temperature").fill("0")
    page.locator("#maxTokens").fill("64")
    page.locator("#seed").fill("7")
    page.locator("#systemMessage").fill("要简短。")
    page.keyboard.press("Escape")
    page.reload()
    expect(page.locator("#model-name")).to_have_text("adgen-lora")
    ask_and_wait(page, "甲")
    sent = record.asked[0]
    assert [sent[name] for name in ("model", "temperature", "max_tokens", "seed")] == [
        "adgen-lora", 0, 64, 7,
    ]  # fmt: skip
    assert messages(sent) == [("system", "要简短。"), ("user", "甲")]


def test_the_enter_of_an_input_method_does_not_send(page, record):
    page.locator("#question").focus()
    devtools = page.context.new_cdp_session(page)
    composed = {"text": "nanjing", "selectionStart": 7, "selectionEnd": 7}
    devtools.send("Input.imeSetComposition", composed)
    page.keyboard.press("Enter")
    devtools.send("Input.insertText", {"text": "南京"})
    page.locator("#question").dispatch_event("keydown", {"key": "Enter", "keyCode": 229})
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("好")
    assert not record.asked
    page.keyboard.press("Enter")
    expect(last_round(page).locator(".copy")).to_be_visible()
    assert messages(record.asked[0])[0][1].endswith("南京\n好")


def test_the_language_follows_the_browser_until_it_is_switched(open_page):
    page = open_page(locale="en-GB")
    expect(page.locator("#welcome p")).to_have_text("What’s on your mind today?")
    ask_and_wait(page, CUT_BY_LENGTH)
    page.get_by_role("button", name="中文").click()
    expect(page.locator(".copy")).to_have_text("复制")
    page.reload()
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.locator(".note")).to_contain_text("长度上限")


def test_both_languages_have_the_same_texts(page):
    names = page.evaluate("""async () => {
        const source = await (await fetch("/page/texts.js")).text();
        return source.split("\\n").flatMap((line) => /^    (\\w+):/.exec(line)?.[1] ?? []);
    }""")
    assert names[: len(names) // 2] == names[len(names) // 2 :]


def test_the_page_follows_the_text_only_while_the_reader_is_at_its_end(open_page):
    page = open_page(viewport={"width": 600, "height": 400})
    ask_and_wait(page, ROUTE)
    distance = """() => {
        const { scrollTop, scrollHeight, clientHeight } = document.getElementById("scroller");
        return scrollHeight - scrollTop - clientHeight;
    }"""
    wait_until(lambda: page.evaluate(distance) < 3)
    ask(page, ENDLESS)
    expect(last_round(page).locator(".answer")).to_contain_text("再说一句。")
    page.locator("#scroller").hover()
    page.mouse.wheel(0, -300)
    expect(page.locator("#to-latest")).to_be_visible()
    top = page.evaluate("document.getElementById('scroller').scrollTop")
    height = last_round(page).bounding_box()["height"]
    wait_until(lambda: last_round(page).bounding_box()["height"] > height + 20)
    assert page.evaluate("document.getElementById('scroller').scrollTop") == top
    page.locator("#to-latest").click()
    wait_until(lambda: page.evaluate(distance) < 3)


def test_a_phone_has_a_drawer_and_nothing_to_scroll_sideways(open_page):
    page = open_page(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    ask_and_wait(page, ROUTE)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.getElementById('scroller').scrollWidth") == 360
    expect(page.locator("nav")).to_be_hidden()
    page.get_by_role("button", name="打开对话记录").tap()
    expect(page.locator("nav")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(page.locator("nav")).to_be_hidden()
    for name in ("question", "apiKey", "seed"):  # below 16 px, phones zoom in on a focused field
        size = page.evaluate("(id) => getComputedStyle(document.getElementById(id)).fontSize", name)
        assert size == "16px"


def test_the_real_server_answers_on_its_page(tmp_path, browser):
    model, tokenizer = load_for_inference(
        str(write_weights(tmp_path, std=0.36)), precision="32", device="cpu"
    )
    with running(model, tokenizer) as (_, address):
        page = browser.new_page()
        page.goto(address)
        page.get_by_role("textbox").first.fill("三上下")
        page.keyboard.press("Enter")
        expect(page.get_by_text(re.compile(r"\d+ tokens"))).to_be_visible()
        page.close()
