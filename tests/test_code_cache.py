"""Compiled kernels on disk."""

import pytest

from chatglm.kernels import code_cache, compiler
from chatglm.kernels.code_cache import cached_path


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CHATGLM_KERNEL_CACHE", str(tmp_path / "kernels"))
    code_cache._say_once.cache_clear()
    return tmp_path / "kernels"


def compiled(monkeypatch, code=b"code"):
    """What `_compiled` gives, and how often it had to compile."""
    calls = []
    monkeypatch.setattr(compiler, "compile_source", lambda *given: calls.append(given) or code)
    return [compiler._compiled("sample", 90, ()) for _ in range(2)], len(calls)


def test_a_kernel_is_compiled_once_and_read_from_the_disk_after_that(monkeypatch, folder, capsys):
    assert compiled(monkeypatch) == ([b"code", b"code"], 1)
    assert capsys.readouterr().err.count(f"once: kept in {folder}") == 1
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]


def test_where_nothing_can_be_kept_it_is_said_once(monkeypatch, folder, caplog):
    folder.write_text("a file where the folder should be")
    assert compiled(monkeypatch) == ([b"code", b"code"], 2)
    assert caplog.text.count("compiled kernels can't be kept there") == 1
    assert "CHATGLM_KERNEL_CACHE" in caplog.text


def test_another_source_card_or_define_is_another_file():
    keys = [("a", 90, ()), ("b", 90, ()), ("a", 80, ()), ("a", 90, ("BF16",))]
    assert len({cached_path("sample", ".cubin", key) for key in keys}) == 4
