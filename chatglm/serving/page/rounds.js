/* One round on the page: the question, the answer as it grows, and what can be done with it. */

import { element, icon } from "./elements.js";
import { Markdown } from "./markdown.js";
import { text } from "./texts.js";

const COPIED_MS = 1500;

/** Shows a round; `update` after it changed. Calls `onRetry` and `onSettings`. */
export class RoundView {
  #shownState;
  #countdown;

  constructor(round, { onRetry, onSettings }) {
    Object.assign(this, { round, onRetry, onSettings });
    const answer = element("div", { class: "answer" });
    this.markdown = new Markdown(answer);
    this.footer = element("footer", {});
    this.element = element(
      "article",
      { class: "round" },
      element("h2", { class: "unseen" }, text("you")),
      element("p", { class: "question" }, round.question),
      element("h2", { class: "unseen" }, "ChatGLM"),
      answer,
      this.footer,
    );
    answer.addEventListener("click", copyCode);
    this.update();
  }

  update() {
    const { answer, state } = this.round;
    this.markdown.show(answer, state === "running");
    if (state === this.#shownState) return;
    this.#shownState = state;
    clearInterval(this.#countdown);
    this.element.dataset.state = state;
    this.footer.replaceChildren(...(state === "running" ? [] : this.#endOfRound()));
  }

  /** To be called when the view leaves the page. */
  close() {
    clearInterval(this.#countdown);
  }

  #endOfRound() {
    const { answer, state, error } = this.round;
    const usage = this.#usage();
    const tools = [
      answer && this.#copyButton(),
      !error && button("regenerate", "again", this.onRetry),
      usage && element("span", { class: "usage" }, usage),
    ].filter(Boolean);
    return [
      error && this.#errorLine(error),
      state === "length" && element("p", { class: "note" }, text("cutByLength")),
      tools.length && element("div", { class: "tools" }, ...tools),
    ].filter(Boolean);
  }

  #copyButton() {
    return button("copy", "copy", ({ currentTarget }) =>
      copy(this.round.answer, currentTarget.lastChild),
    );
  }

  #usage() {
    const { state, tokens, speed } = this.round;
    return [
      state === "stopped" && text("stopped"),
      tokens !== undefined && text("tokens", { tokens }),
      speed !== undefined && text("speed", { speed: speed.toFixed(1) }),
    ]
      .filter(Boolean)
      .join(" · ");
  }

  #errorLine(error) {
    const words = element("span", {});
    const retry = button("retry", "again", this.onRetry);
    const line = element("div", { class: "error", role: "alert" }, words, retry);
    if (error.kind === "key") line.append(button("settings", "settings", this.onSettings));
    const show = () => {
      words.textContent = errorText(error);
      retry.disabled = secondsLeft(error) > 0;
      if (!retry.disabled) clearInterval(this.#countdown);
    };
    show();
    // A screen reader hears the line once, not every second of it.
    if (retry.disabled) {
      line.setAttribute("aria-live", "off");
      this.#countdown = setInterval(show, 1000);
    }
    return line;
  }
}

const secondsLeft = ({ retryAt = 0 }) => Math.max(0, Math.ceil((retryAt - Date.now()) / 1000));

/** What happened and what to do, in one line. */
export function errorText(error) {
  const seconds = secondsLeft(error);
  const kind = error.kind === "busy" && seconds === 0 ? "busyOver" : error.kind;
  const name = `error${kind[0].toUpperCase()}${kind.slice(1)}`;
  return text(name, { seconds, message: error.message });
}

function button(name, iconName, onclick) {
  const attributes = { type: "button", class: `tool ${name}`, onclick };
  return element("button", attributes, icon(iconName), element("span", {}, text(name)));
}

function copyCode({ target }) {
  const pressed = target.closest("button.copy-code");
  if (pressed) copy(pressed.closest("figure").querySelector("code").textContent, pressed);
}

/** Copy, and say so for a moment in the element that says "Copy". */
async function copy(content, labelled) {
  await toClipboard(content);
  labelled.textContent = text("copied");
  setTimeout(() => (labelled.textContent = text("copy")), COPIED_MS);
}

/** navigator.clipboard is missing on plain http, where most private servers are. */
async function toClipboard(content) {
  if (navigator.clipboard) return navigator.clipboard.writeText(content);
  const focused = document.activeElement;
  const area = element("textarea", { class: "unseen", readonly: "" });
  area.value = content;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  focused?.focus();
}
