"""lib/disk/transfer.py: dumps read back by zstd itself, and dumps of other tools loaded."""

from __future__ import annotations

import io
import os
import random
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from lib import compression
from lib.disk import target as disk
from lib.disk import transfer
from lib.environment import Disk
from lib.errors import Error
from tests.conftest import require

MIB = 1 << 20
OLD = b"\xff"


def noise(size_bytes: int) -> bytes:
    return random.Random(size_bytes).randbytes(size_bytes)


def sparse(path: Path, size_bytes: int, pieces: dict[int, bytes]) -> disk.Target:
    with open(path, "wb") as file:
        file.truncate(size_bytes)
        for offset, data in pieces.items():
            os.pwrite(file.fileno(), data, offset)
    return disk.open_target(Disk(0, path))


def dump(source: disk.Target, path: Path, compression: str = "zstd") -> bytes:
    with open(path, "wb") as output:
        transfer.dump(source, output, compression)
    return path.read_bytes()


DISKS: dict[str, tuple[int, dict[int, bytes]]] = {
    "data, holes short and long": (40 * MIB, {0: noise(MIB + 1), 3 * MIB: b"a", 35 * MIB: b"b"}),
    "a long hole first": (30 * MIB, {20 * MIB: noise(100)}),
    "nothing but a hole": (17 * MIB, {}),
    "no hole": (3 * MIB, {0: noise(3 * MIB)}),
    "zeroes that are data": (20 * MIB, {0: b"a" + bytes(20 * MIB - 2) + b"b"}),
    "an odd size": (MIB + 512, {MIB: noise(512)}),
}


@pytest.mark.parametrize("name", DISKS)
@pytest.mark.parametrize("kind", ["file", "uri"])
def test_dump(tmp_path: Path, name: str, kind: str) -> None:
    require("zstd", "qemu-nbd")
    source = sparse(tmp_path / "disk", *DISKS[name])
    if kind == "uri":
        source = disk.open_target(Disk(0, uri=f"file:{tmp_path}/disk"))
    content = (tmp_path / "disk").read_bytes()
    assert dump(source, tmp_path / "raw", "none") == content
    assert len(dump(source, tmp_path / "zst")) < 4 * MIB
    unpacked = subprocess.run(["zstd", "-dc", tmp_path / "zst"], check=True, capture_output=True)
    assert unpacked.stdout == content
    listed = subprocess.run(
        ["zstd", "-lv", tmp_path / "zst"], check=True, capture_output=True, text=True
    )
    assert "Check: XXH64" in listed.stdout


def test_damage_to_a_hole_is_found(tmp_path: Path) -> None:
    require("zstd")
    packed = bytearray(dump(sparse(tmp_path / "disk", 16 * MIB, {}), tmp_path / "zst"))
    packed[-6] ^= 1
    done = subprocess.run(["zstd", "-dc"], input=bytes(packed), capture_output=True)
    assert done.returncode == 1


def test_holes_are_not_read(tmp_path: Path) -> None:
    """Reading and compressing 200 GiB of zeroes would take minutes."""
    require("zstd")
    source = sparse(tmp_path / "disk", 200 << 30, {150 << 30: b"x"})
    assert len(dump(source, tmp_path / "zst")) < 16 * MIB


@pytest.mark.parametrize(
    ("compression", "estimate"), [("none", 64 * MIB), ("zstd", 4 * MIB * 35 // 100)]
)
def test_size_estimate(tmp_path: Path, compression: str, estimate: int) -> None:
    require("zstd")
    source = sparse(tmp_path / "disk", 64 * MIB, {MIB: noise(4 * MIB)})
    reader, writer = os.pipe()
    with open(reader, "rb") as told, open(tmp_path / "out", "wb") as output:
        transfer.dump(source, output, compression, writer)
        os.close(writer)
        assert told.read() == b"%d\n" % estimate


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("name", ["no hole", "nothing but a hole"])
def test_reader_that_goes_away(tmp_path: Path, compression: str, name: str) -> None:
    require("zstd")
    source = sparse(tmp_path / "disk", *DISKS[name])
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb", buffering=0) as output, pytest.raises(BrokenPipeError):
        transfer.dump(source, cast(BinaryIO, output), compression)


def test_full_output(tmp_path: Path) -> None:
    require("zstd")
    source = sparse(tmp_path / "disk", *DISKS["no hole"])
    with open("/dev/full", "wb") as output, pytest.raises(Error) as caught:
        transfer.dump(source, output, "zstd")
    assert caught.value.message.startswith("zstd failed with status ")
    assert "No space left on device" in caught.value.message


@pytest.mark.parametrize("status", [11, 0])
def test_zstd_that_fails(tmp_path: Path, tool: Callable[[str, str], Path], status: int) -> None:
    tool("zstd", f"echo no memory >&2; exit {status}")
    source = sparse(tmp_path / "disk", *DISKS["no hole"])
    with open(tmp_path / "out", "wb") as output, pytest.raises(Error) as caught:
        transfer.dump(source, output, "zstd")
    assert str(caught.value) == f"zstd failed with status {status}: no memory"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a dump as the import door does."""
    require("bwrap", "prlimit")
    with open(path, "rb") as file:
        kind = compression.detect(file.read(512))
        with compression.decompressed(file, kind) as raw:
            yield raw


def packed_with(command: list[str], content: bytes, path: Path) -> Path:
    require(command[0])
    with open(path, "wb") as output:
        subprocess.run(command, input=content, stdout=output, check=True)
    return path


PACKERS = {
    "raw": ["cat"],
    "gz": ["gzip"],
    "xz": ["xz", "-0"],
    "bz2": ["bzip2"],
    "zst": ["zstd"],
    "two zstd frames": ["sh", "-c", "head -c 1000001 | zstd; zstd"],
}
CONTENT = noise(MIB + 17) + bytes(2 * MIB) + noise(300_000)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", ["file", "uri"])
def test_load(tmp_path: Path, packer: str, kind: str) -> None:
    require("qemu-nbd")
    dumped = packed_with(PACKERS[packer], CONTENT, tmp_path / "dump")
    file = tmp_path / "disk"
    file.write_bytes(OLD * 8 * MIB)
    disks = {"file": Disk(0, file), "uri": Disk(0, uri=f"file:{file}")}
    target = disk.open_target(disks[kind])
    assert transfer.load(opened(dumped), target) == len(CONTENT)
    disk.sync(target)
    content = file.read_bytes()
    assert content[: len(CONTENT)] == CONTENT
    assert not any(content[len(CONTENT) : 5 * MIB]) and not any(content[7 * MIB :])
    assert file.stat().st_blocks * 512 < (3 if kind == "file" else 6) * MIB


def test_round_trip(tmp_path: Path) -> None:
    require("zstd")
    source = sparse(tmp_path / "disk", *DISKS["data, holes short and long"])
    copy = sparse(tmp_path / "copy", 40 * MIB, {})
    dump(source, tmp_path / "zst")
    transfer.load(opened(tmp_path / "zst"), copy)
    disk.sync(copy)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "disk").read_bytes()
    assert copy.used_bytes() <= source.used_bytes() + 4 * disk.GRAIN_BYTES


def cut(data: bytes) -> bytes:
    return data[:-1000]


def flipped(data: bytes) -> bytes:
    return data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:]


@pytest.mark.parametrize("damage", [cut, flipped], ids=["cut", "flipped"])
@pytest.mark.parametrize("packer", ["gz", "xz", "bz2", "zst"])
def test_damaged_dump(tmp_path: Path, packer: str, damage: Callable[[bytes], bytes]) -> None:
    (tmp_path / "disk").write_bytes(OLD * 4 * MIB)
    target = disk.open_target(Disk(0, tmp_path / "disk"))
    packed = packed_with(PACKERS[packer], CONTENT, tmp_path / "dump")
    packed.write_bytes(damage(packed.read_bytes()))
    with pytest.raises(Error), disk.unbootable_on_failure(target):
        transfer.load(opened(packed), target)
    assert not any((tmp_path / "disk").read_bytes()[:MIB])


def test_status_is_known_before_the_head_is_written(tmp_path: Path) -> None:
    target = sparse(tmp_path / "disk", 4 * MIB, {})

    @contextmanager
    def damaged() -> Iterator[BinaryIO]:
        yield io.BytesIO(b"x" * 2 * MIB)
        raise Error("zstd failed with status 1")

    with pytest.raises(Error, match="zstd failed"):
        transfer.load(damaged(), target)
    content = (tmp_path / "disk").read_bytes()
    assert content[:MIB] == bytes(MIB)
    assert content[MIB : 2 * MIB] == b"x" * MIB


def test_empty_dump(tmp_path: Path) -> None:
    target = sparse(tmp_path / "disk", 2 * MIB, {0: OLD * 2 * MIB})
    with pytest.raises(Error) as caught, disk.unbootable_on_failure(target):
        transfer.load(opened(Path("/dev/null")), target)
    assert str(caught.value) == "the dump is empty; look for why the export wrote nothing"
    assert (tmp_path / "disk").read_bytes() == OLD * 2 * MIB


def test_dump_longer_than_the_disk(tmp_path: Path) -> None:
    target = sparse(tmp_path / "disk", 3 * MIB, {0: OLD * 3 * MIB})
    content = noise(2 * MIB) + bytes(8 * MIB)
    with pytest.raises(Error) as caught, disk.unbootable_on_failure(target):
        transfer.load(opened(packed_with(["zstd"], content, tmp_path / "dump")), target)
    assert str(caught.value) == (
        f"{tmp_path}/disk: the dump's bytes do not fit on a disk of 3 MiB "
        "(3145728 bytes); use --disk 0:size= with the size of the dumped disk"
    )
    assert not any((tmp_path / "disk").read_bytes()[:MIB])


def test_memory_is_constant(tmp_path: Path) -> None:
    target = sparse(tmp_path / "disk", 512 * MIB, {})

    @contextmanager
    def endless() -> Iterator[BinaryIO]:
        with open("/dev/zero", "rb") as zeroes, open("/dev/urandom", "rb") as data:
            yield cast(BinaryIO, Joined([data] * 32 + [zeroes] * 480))

    tracemalloc.start()
    try:
        transfer.load(endless(), target)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


class Joined(io.RawIOBase):
    """One block of each source, in order."""

    def __init__(self, sources: list[io.BufferedReader]) -> None:
        self.sources = iter(sources)

    def read(self, size: int = -1) -> bytes:
        source = next(self.sources, None)
        return b"" if source is None else source.read(size)
