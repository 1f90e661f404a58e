"""The cache on a small file system of its own: full, read-only, without inodes, of another user."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest

from lib import run
from lib.errors import Error
from lib.source.cache import Cache, Refresh
from lib.source.stored import Note
from tests.conftest import require

pytestmark = pytest.mark.root
KEY = "https://example.com/image.qcow2"
Made = Optional[tuple[Path, Note]]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """Mount an ext4 of 32 MiB with 32 inodes."""
    require("mkfs.ext4", "mount", "umount")
    image, point = tmp_path / "ext4", tmp_path / "mount"
    image.touch()
    os.truncate(image, 32 << 20)
    point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-N", "32", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


@pytest.fixture
def cache(mount: Path) -> Cache:
    return Cache(mount / "cache", 1 << 30, 3600.0)


def make(size_bytes: int, work: Path) -> Made:
    raw = work / "image"
    raw.write_bytes(b"x" * size_bytes)
    return raw, {"url": KEY, "digests": {}, "fetched": "2026-11-27T00:00:00Z"}


def keep(_old: Optional[Note], _work: Path) -> Made:
    return None


def by_us(_old: Optional[Note], work: Path) -> Made:
    return make(64 << 20, work)


def by_a_program(_old: Optional[Note], work: Path) -> Made:
    with open(work / "image", "wb") as output:
        run.run(["head", "-c", "64M", "/dev/zero"], stdout=output)
    return work / "image", {}


@pytest.mark.parametrize("refresh", [by_us, by_a_program])
def test_full_disk_is_one_error_and_leaves_the_old_entry(
    cache: Cache, capsys: pytest.CaptureFixture[str], refresh: Refresh
) -> None:
    with cache.entry(KEY, lambda _old, work: make(4 << 20, work)):
        pass
    before = sorted(os.listdir(cache.directory))
    with pytest.raises(Error) as caught, cache.entry(KEY, refresh):
        pass
    assert str(caught.value).startswith(f"no space left in {cache.directory} after 2")
    assert str(caught.value).endswith(
        "; run cloudimage prune, or change dir or lower max_size in [cache] of cloudimage.conf"
    )
    assert sorted(os.listdir(cache.directory)) == before
    with cache.entry(KEY, keep) as entry:
        assert entry.file.read() == b"x" * (4 << 20)
    assert "WARNING" not in capsys.readouterr().err


def test_no_inode_left(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    cache.directory.mkdir(0o700)
    with pytest.raises(OSError, match="No space left on device"):
        for number in range(64):
            (cache.directory.parent / str(number)).touch()
    with cache.entry(KEY, lambda _old, work: make(5, work)) as entry:
        assert entry.file.read() == b"xxxxx"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: cache {cache.directory}: No space left on device: ")
    assert os.listdir(cache.directory) == []


def test_read_only(cache: Cache, mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with cache.entry(KEY, lambda _old, work: make(4, work)):
        pass
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    with cache.entry(KEY, lambda _old, work: make(5, work)) as entry:
        assert entry.file.read() == b"xxxxx"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: cache {cache.directory}: Read-only file system: ")
    assert line.endswith("; this image goes to /var/tmp and is not kept")
    assert [stored.note["size"] for stored in cache.entries()] == [4]
    subprocess.run(["mount", "-o", "remount,rw", mount], check=True)


@pytest.mark.parametrize("owned", ["cache", ""])
def test_of_another_user(
    cache: Cache, mount: Path, capsys: pytest.CaptureFixture[str], owned: str
) -> None:
    cache.directory.mkdir(0o700)
    os.chown(mount / owned, 65534, 65534)
    with cache.entry(KEY, lambda _old, work: make(5, work)) as entry:
        assert entry.file.read() == b"xxxxx"
    message = f"cache {cache.directory}: {mount / owned} belongs to user 65534"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: {message}; let nobody but root write there, or ")
    assert line.endswith("; this image goes to /var/tmp and is not kept")
    with pytest.raises(Error, match=message):
        cache.prune(everything=True)
    assert os.listdir(cache.directory) == []


def test_entry_survives_a_remount(cache: Cache, mount: Path, tmp_path: Path) -> None:
    """The raw file's times are as the note says after they were read back from the disk."""
    with cache.entry(KEY, lambda _old, work: make(5, work)):
        pass
    subprocess.run(["umount", mount], check=True)
    subprocess.run(["mount", "-o", "loop", tmp_path / "ext4", mount], check=True)
    with cache.entry(KEY, keep) as entry:
        assert entry.file.read() == b"xxxxx"
