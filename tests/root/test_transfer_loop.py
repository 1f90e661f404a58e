"""lib/disk/transfer.py on loop devices: read whole, and restored over old bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from lib import compression, run
from lib.disk import target as disk
from lib.disk import transfer
from lib.environment import Disk
from lib.errors import Error
from tests.conftest import require

pytestmark = pytest.mark.root
MIB = 1 << 20
OLD = b"\xff"
CONTENT = random.Random(1).randbytes(MIB + 4096) + bytes(40 * MIB) + b"end".ljust(512, b"\0")


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    """Make a file of 48 MiB full of old bytes."""
    (tmp_path / "backing").write_bytes(OLD * 48 * MIB)
    return tmp_path / "backing"


@pytest.fixture
def device(backing: Path) -> Iterator[disk.Target]:
    require("losetup", "zstd", "bwrap", "prlimit")
    name = run.run(["losetup", "--find", "--show", str(backing)]).strip()
    try:
        yield disk.open_target(Disk(0, Path(name)))
    finally:
        run.run(["losetup", "--detach", name])


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    with open(path, "rb") as file, compression.decompressed(file, "zst") as raw:
        yield raw


def packed(content: bytes, path: Path) -> Path:
    with open(path, "wb") as output:
        run.run(["zstd", "--stdout"], input=content, stdout=output)
    return path


def test_dump(tmp_path: Path, backing: Path, device: disk.Target) -> None:
    with open(backing, "r+b") as file:
        os.pwrite(file.fileno(), CONTENT, 0)
    os.sync()
    with open(tmp_path / "zst", "wb") as output:
        transfer.dump(device, output, "zstd")
    assert (tmp_path / "zst").stat().st_size < 2 * MIB
    run.run(["zstd", "--decompress", "--quiet", str(tmp_path / "zst"), "-o", str(tmp_path / "raw")])
    assert (tmp_path / "raw").read_bytes() == backing.read_bytes()


def test_load(tmp_path: Path, backing: Path, device: disk.Target) -> None:
    with disk.claim(device):
        assert transfer.load(opened(packed(CONTENT, tmp_path / "zst")), device) == len(CONTENT)
    disk.sync(device)
    content = backing.read_bytes()
    end = len(CONTENT)
    assert content[:end] == CONTENT
    assert not any(content[end : 43 * MIB])
    assert content[43 * MIB : 47 * MIB] == OLD * 4 * MIB
    assert not any(content[47 * MIB :])
    assert backing.stat().st_blocks * 512 < 8 * MIB


@pytest.mark.parametrize("damage", ["cut", "too long"])
def test_failure_leaves_nothing_to_boot(
    tmp_path: Path, backing: Path, device: disk.Target, damage: str
) -> None:
    dump = packed(CONTENT if damage == "cut" else CONTENT + OLD * 8 * MIB, tmp_path / "zst")
    if damage == "cut":
        os.truncate(dump, dump.stat().st_size - 10)
    with pytest.raises(Error), disk.unbootable_on_failure(device), disk.claim(device):
        transfer.load(opened(dump), device)
    content = backing.read_bytes()
    assert not any(content[:MIB]) and not any(content[-MIB:])
