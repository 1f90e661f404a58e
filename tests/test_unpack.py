"""Tests of lib.unpack: what the real tools packed, and what was made to hurt."""

from __future__ import annotations

import io
import lzma
import os
import subprocess
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, Optional, cast

import pytest

from lib import compression
from lib.decoder import unpack
from lib.decoder.source import Source
from lib.errors import Error
from tests.conftest import require

LIMIT = 64 << 20
TOOLS = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "zstd", "lz4": "lz4"}


@pytest.fixture(autouse=True)
def tools() -> None:
    require("bwrap", *TOOLS.values())


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def pack(data: bytes, *argv: str) -> bytes:
    return subprocess.run(argv, input=data, capture_output=True, check=True).stdout


def whole(source: BinaryIO) -> Source:
    return Source(source.fileno(), os.fstat(source.fileno()).st_size)


def unpacked(tmp_path: Path, packed: bytes, limit_bytes: int = LIMIT) -> bytes:
    (tmp_path / "packed").write_bytes(packed)
    with (tmp_path / "packed").open("rb") as source, (tmp_path / "out").open("w+b") as output:
        unpack.unpack(whole(source), output, limit_bytes)
        assert output.tell() == 0
    return (tmp_path / "out").read_bytes()


def disk() -> bytes:
    """Return a disk with data, and zeroes that begin and end anywhere."""
    parts = [
        b"\xeb\x63",
        bytes(510),
        os.urandom(70_000),
        bytes(3 << 20),
        os.urandom(5),
        bytes(70_001),
    ]
    return b"".join(parts)


DISK = disk()
PACKERS = {
    "gzip": ("gz", ("gzip", "-c")),
    "pigz": ("gz", ("pigz", "-c")),
    "bzip2": ("bz2", ("bzip2", "-c")),
    "xz": ("xz", ("xz", "-c")),
    "xz-threads": ("xz", ("xz", "-c", "-T2", "--block-size=65536")),
    "xz-9": ("xz", ("xz", "-c", "-9")),
    "zstd": ("zst", ("zstd", "-c")),
    "zstd-long": ("zst", ("zstd", "-c", "--long=27")),
    "pzstd": ("zst", ("pzstd", "-c")),
    "lz4": ("lz4", ("lz4", "-c")),
}


@pytest.mark.parametrize(("kind", "argv"), PACKERS.values(), ids=PACKERS.keys())
def test_compressions(tmp_path: Path, kind: str, argv: tuple[str, ...]) -> None:
    require(argv[0])
    packed = pack(DISK, *argv)
    assert compression.detect(packed[:512]) == kind
    assert unpacked(tmp_path, packed) == DISK
    # several members or frames are one file, as pigz, pbzip2 and pzstd write them
    assert unpacked(tmp_path, packed + packed) == DISK + DISK
    assert unpacked(tmp_path, packed, len(DISK)) == DISK


@pytest.mark.parametrize("head", [b"", b"\0" * 512, b"BZh is text", b"QFI\xfb", b"\x1f\x8b"])
def test_detect_nothing(head: bytes) -> None:
    assert compression.detect(head) is None


@pytest.mark.parametrize("data", [DISK, b"x", b""], ids=["disk", "byte", "empty"])
def test_plain_file(tmp_path: Path, data: bytes) -> None:
    assert unpacked(tmp_path, data) == data


def test_zero_padded_gzip(tmp_path: Path) -> None:
    assert unpacked(tmp_path, pack(DISK, "gzip", "-c") + bytes(1024)) == DISK


def test_zeroes_become_holes(tmp_path: Path) -> None:
    data = os.urandom(64 << 10) + bytes(20 << 20) + os.urandom(64 << 10) + bytes(10 << 20)
    assert unpacked(tmp_path, pack(data, "zstd", "-c")) == data
    assert (tmp_path / "out").stat().st_blocks * 512 <= 256 << 10


def test_memory_is_constant(tmp_path: Path) -> None:
    packed = pack(bytes(8 << 20), "gzip", "-c") * 8
    tracemalloc.start()
    try:
        (tmp_path / "packed").write_bytes(packed)
        with (tmp_path / "packed").open("rb") as source, (tmp_path / "out").open("w+b") as output:
            unpack.unpack(whole(source), output, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out").stat().st_size == LIMIT


def large_dictionary() -> bytes:
    """Return a small .xz whose block header asks for a dictionary of 1 GiB."""
    packed = bytearray(lzma.compress(DISK))
    end = 12 + (packed[12] + 1) * 4 - 4
    assert packed[14:16] == b"\x21\x01"  # filter LZMA2, one byte of properties
    packed[16] = 36
    packed[end : end + 4] = zlib.crc32(packed[12:end]).to_bytes(4, "little")
    return bytes(packed)


def large_window() -> bytes:
    """Return a small .zst, made as a stream, whose frame header asks for a window of 2 GiB."""
    packed = bytearray(pack(DISK, "zstd", "-c"))
    assert packed[4] & 0x20 == 0  # no single segment: the window's byte follows
    packed[5] = (31 - 10) << 3
    return bytes(packed)


TOO_LARGE = "unpacked, the image is larger than the limit of 64 MiB; if it is what you want, raise"
BEHIND = {
    "gz": "there is data behind its end; ",
    "lz4": "there is data behind its end (lz4 failed with status 1); ",
}
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    # 10 GiB of zeroes in 10 MB
    "bomb-gz": (lambda: pack(bytes(16 << 20), "gzip", "-c") * 640, TOO_LARGE),
    "bomb-bz2": (lambda: pack(bytes(16 << 20), "bzip2", "-c") * 640, TOO_LARGE),
    "bomb-zst": (lambda: pack(bytes(16 << 20), "zstd", "-c") * 640, TOO_LARGE),
    "dictionary-xz": (
        large_dictionary,
        "unpacking xz: it needs more memory",
    ),
    "window-zst": (large_window, "unpacking zst: it needs more memory"),
    "gz-in-gz": (
        lambda: pack(pack(DISK, "gzip", "-c"), "gzip", "-c"),
        "the image is packed twice: there is gz in it; unpack it once",
    ),
    "xz-in-zst": (
        lambda: pack(pack(DISK, "xz", "-c"), "zstd", "-c"),
        "the image is packed twice: there is xz in it; unpack it once",
    ),
    "byte-behind-zst": (
        lambda: pack(DISK, "zstd", "-c") + b"A",
        "unpacking zst: there is data behind its end",
    ),
    "flipped-gz": (
        lambda: pack(DISK, "gzip", "-c")[:-8] + bytes(8),
        "unpacking gz: it is damaged; fetch it again",
    ),
    **{
        f"truncated-{kind}": (
            lambda tool=tool: pack(DISK, tool, "-c")[:-20],  # type: ignore[misc]
            f"unpacking {kind}: it is cut short or damaged",
        )
        for kind, tool in TOOLS.items()
    },
    **{
        f"garbage-{kind}": (
            lambda tool=tool: pack(DISK, tool, "-c") + b"garbage\n",  # type: ignore[misc]
            f"unpacking {kind}: {BEHIND.get(kind, '')}",
        )
        for kind, tool in TOOLS.items()
    },
}


@pytest.mark.parametrize(("make", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile(tmp_path: Path, make: Callable[[], bytes], message: str) -> None:
    packed = make()
    started = time.monotonic()
    with pytest.raises(Error) as raised:
        unpacked(tmp_path, packed)
    assert str(raised.value).startswith(message)
    assert time.monotonic() - started < 10
    assert (tmp_path / "out").stat().st_blocks * 512 < 16 << 20


def test_limit_is_exact(tmp_path: Path) -> None:
    for packed in (DISK, pack(DISK, "gzip", "-c")):
        for limit_bytes in (len(DISK) - 1, 100):
            with pytest.raises(Error, match="larger than the limit"):
                unpacked(tmp_path, packed, limit_bytes)


def piped(data: bytes, buffering: int = 0) -> BinaryIO:
    """Return the reading end of a pipe into which a thread writes the data."""
    reading, writing = os.pipe()

    def feed() -> None:
        rest = memoryview(data)
        with suppress(BrokenPipeError), open(writing, "wb", buffering=0) as pipe:
            while rest:
                rest = rest[pipe.write(rest) :]

    threading.Thread(target=feed, daemon=True).start()
    return open(reading, "rb", buffering=buffering)


@pytest.mark.parametrize("buffering", [0, 8192], ids=["raw", "read-ahead"])
@pytest.mark.parametrize("head_bytes", [0, 1, 512])
@pytest.mark.parametrize("kind", [None, "gz", "zst"])
def test_pipe(kind: Optional[str], head_bytes: int, buffering: int) -> None:
    packed = DISK if kind is None else pack(DISK, TOOLS[kind], "-c")
    with piped(packed, buffering) as source:
        head = source.read(head_bytes)
        with compression.decompressed(source, kind, head) as stream:
            assert stream.read() == DISK


@pytest.mark.parametrize("kind", [None, *TOOLS])
def test_file(tmp_path: Path, kind: Optional[str]) -> None:
    (tmp_path / "packed").write_bytes(DISK if kind is None else pack(DISK, TOOLS[kind], "-c"))
    with (tmp_path / "packed").open("rb") as source:
        head = source.read(512)
        with compression.decompressed(source, kind, head) as stream:
            assert stream.read() == DISK


@pytest.mark.parametrize("kind", TOOLS)
def test_pipe_that_ends_early(kind: str) -> None:
    packed = pack(DISK, TOOLS[kind], "-c")[:-20]
    with (
        piped(packed) as source,
        pytest.raises(Error, match=f"^unpacking {kind}: it is cut short"),
    ):
        with compression.decompressed(source, kind) as stream:
            stream.read()


def test_pipe_with_garbage_behind() -> None:
    # more than fits into the pipes: a tool that stops reading must not leave cat hanging
    packed = pack(DISK, "gzip", "-c") + b"garbage " * 100_000
    with (
        piped(packed) as source,
        pytest.raises(Error, match=r"^unpacking gz: there is data"),
    ):
        with compression.decompressed(source, "gz") as stream:
            stream.read()


def test_source_that_cannot_be_read() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb", buffering=0) as source:
        with pytest.raises(Error, match=r"^bash failed with status 1"):
            with compression.decompressed(source, None) as stream:
                stream.read()


@pytest.mark.parametrize("kind", [None, "gz", "zst"])
def test_reader_that_stops_early(kind: Optional[str]) -> None:
    endless = ["cat"] if kind is None else [TOOLS[kind], "-c"]
    with ExitStack() as stack:
        random = stack.enter_context(open("/dev/urandom", "rb"))
        child = stack.enter_context(
            subprocess.Popen(endless, stdin=random, stdout=subprocess.PIPE, bufsize=0)
        )
        stack.callback(child.kill)
        source = cast(BinaryIO, child.stdout)
        head = source.read(512)
        started = time.monotonic()
        with pytest.raises(Error, match=r"^there is data behind the end of the image$"):
            with compression.decompressed(source, kind, head) as stream:
                assert len(stream.read(1 << 20)) == 1 << 20
        with pytest.raises(KeyError):
            with compression.decompressed(source, kind, head) as stream:
                raise KeyError
        assert time.monotonic() - started < 5


def test_a_file_read_in_part(tmp_path: Path) -> None:
    (tmp_path / "packed").write_bytes(DISK)
    with (tmp_path / "packed").open("rb") as source:
        with pytest.raises(Error, match=r"^there is data behind the end of the image$"):
            with compression.decompressed(source, None) as stream:
                stream.read(100)


def test_an_archive_is_no_compression() -> None:
    with pytest.raises(Error, match=r"^this is an archive, not a disk; take the disk out of it$"):
        with compression.decompressed(io.BytesIO(), "tar"):
            pass
