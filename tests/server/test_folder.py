import pytest

from fedvision.errors import RunError
from fedvision.files import is_temporary, write_atomically
from server.folder import RunFolder


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "new" / "file"
    write_atomically(file, lambda path: path.write_text("one"))
    write_atomically(file, lambda path: path.write_text("two"))
    assert file.read_text() == "two"
    assert list(file.parent.iterdir()) == [file]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "file"
    file.write_text("one")

    def torn(path):
        path.write_text("tw")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"file: cannot be written \(.*No space left on device.*free space .* go on with --resume"):
        write_atomically(file, torn)
    assert file.read_text() == "one"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "within", lambda path: path.write_text("x"))


def test_what_a_killed_write_leaves_is_known_as_temporary(tmp_path):
    class Killed(BaseException):
        pass

    def killed(path):
        path.write_text("half")
        raise Killed

    with pytest.raises(Killed):
        write_atomically(tmp_path / "file", killed)
    [left] = tmp_path.iterdir()
    assert is_temporary(left)
    assert not is_temporary(tmp_path / "file") and not is_temporary(tmp_path / "notes.part") and not is_temporary(tmp_path / ".hidden")


def test_a_run_has_started_once_it_has_a_manifest_and_finished_when_that_says_so(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert not folder.started and not folder.finished
    folder.write_manifest({"status": "running"})
    assert folder.started and not folder.finished
    folder.write_manifest({"status": "finished"})
    assert folder.finished


@pytest.mark.parametrize("text", ["", "{", "\x00\x00"])
def test_a_damaged_manifest_is_an_error_of_ours(tmp_path, text):
    folder = RunFolder(tmp_path)
    folder.manifest.write_text(text)
    with pytest.raises(RunError, match=r"manifest.json: cannot be read .*choose another folder with --out"):
        folder.read_manifest()


@pytest.mark.parametrize("data", [b"\xff\xfe\xff", b"[1, 2]", b'"text"'])
def test_a_manifest_of_something_else_is_an_error_of_ours(tmp_path, data):
    folder = RunFolder(tmp_path)
    folder.manifest.write_bytes(data)
    with pytest.raises(RunError, match=r"manifest.json: cannot be read"):
        folder.read_manifest()
