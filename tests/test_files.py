"""A file is whole or not there."""

import pytest

from chatglm.errors import ToolkitError
from chatglm.files import written_aside


def test_a_whole_file_takes_its_place_and_its_folder_is_made(tmp_path):
    with written_aside(str(tmp_path / "new" / "file")) as file:
        file.write("答")
        assert not (tmp_path / "new" / "file").exists()
    assert (tmp_path / "new" / "file").read_text(encoding="utf-8") == "答"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_after_an_error_the_old_file_stands_alone(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), written_aside(str(tmp_path / "file")) as file:
        file.write("half")
        raise ZeroDivisionError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(("path", "reason"), [("", "a folder"), ("file/below", "cannot be writ")])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, path, reason):
    (tmp_path / "file").touch()
    with pytest.raises(ToolkitError, match=reason), written_aside(str(tmp_path / path)):
        pytest.fail("the work began")
