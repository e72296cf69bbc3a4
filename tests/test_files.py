"""Files that are there whole or not at all."""

import os

import cv2
import numpy as np
import pytest

from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.files import atomic_write, write_atomically, write_text
from ucdir_plugin.utils.image_writing import write_image


def test_a_file_appears_with_all_its_content(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_write(path) as file:
        file.write(b"one")
        names = os.listdir(path.parent)
        assert len(names) == 1 and names[0].startswith(".a.bin.") and names[0].endswith(".tmp")
    assert path.read_bytes() == b"one"
    write_atomically(b"two", str(path))
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    expected = UserError if error is OSError else error
    with pytest.raises(expected), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_error_names_path_reason_and_free_space(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"^cannot write .*/a.bin: No space left on device \(\d+ MB free\)$"):
        write_atomically(b"x", tmp_path / "a.bin")
    assert os.listdir(tmp_path) == []


def test_pictures_and_texts_are_written_by_it(tmp_path):
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    write_image(image, str(tmp_path / "sub" / "a.png"))
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "sub" / "a.png")), image)
    write_text("ä\r\n", str(tmp_path / "a.csv"))
    assert (tmp_path / "a.csv").read_bytes() == b"\xc3\xa4\r\n"
    (tmp_path / "file").write_text("")
    for write, content in ((write_image, image), (write_text, "x")):
        with pytest.raises(UserError, match=r"cannot write .*file/a: "):
            write(content, str(tmp_path / "file" / "a"))
