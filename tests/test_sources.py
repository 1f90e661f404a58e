"""lib/source/locations.py: opening files of the node."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lib.errors import Error
from lib.source import locations


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "No such file or directory"),
        ("directory", "is a directory"),
        ("fifo", "is not a regular file"),
        ("socket", "is not a regular file"),
        ("link", "is a symbolic link"),
        ("empty", "is empty"),
    ],
)
def test_open_file_refuses(kind: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    with socket.socket(socket.AF_UNIX) as unix:
        if kind == "directory":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            unix.bind(str(path))
        elif kind == "link":
            path.symlink_to("/etc/passwd")
        elif kind == "empty":
            path.touch()
        with pytest.raises(Error) as caught:
            locations.open_file(path, follow=False)
        assert caught.value.message == f"{path}: {words}"
        if kind != "link":  # a link to any of them is no way round
            (tmp_path / "to it").symlink_to(path)
            with pytest.raises(Error, match=words):
                locations.open_file(tmp_path / "to it")


def test_open_file_refuses_a_device() -> None:
    with pytest.raises(Error, match="/dev/zero: is not a regular file"):
        locations.open_file(Path("/dev/zero"))


def test_open_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"data")
    with locations.open_file(path) as file:
        path.unlink()
        assert file.read() == b"data"
        assert not os.get_inheritable(file.fileno())
