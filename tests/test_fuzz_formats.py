"""Random and mutated images: the decoder answers or refuses, and never breaks or hangs.

FUZZ_EXAMPLES=100000 makes it a long run: ten minutes for inspect(), an hour or two for
test_the_door_without_its_sandbox.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import tarfile
import zlib
from functools import cache
from typing import Optional

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.decoder import __main__ as program
from lib.decoder import image
from lib.decoder.source import Source
from lib.errors import Error
from tests import corpus
from tests.conftest import require
from tests.decoding import coming, decoded
from tests.tars import END, gnu_sparse, member, ovf, pax

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1000"))
LIMIT = 1 << 44
DOOR = 1 << 30
DISK = corpus.base()[: corpus.MIB] + b"\x01" * 70_000 + bytes(512 * 5 - 70_000 % 512)


def _compressed_qcow2(disk: bytes) -> bytes:
    """One compressed cluster in place of the first plain one."""
    data = bytearray(corpus.write_qcow2(disk))
    packer = zlib.compressobj(wbits=-12)
    packed = packer.compress(disk[: 1 << 16]) + packer.flush()
    data[5 << 16 : 6 << 16] = packed.ljust(1 << 16, b"\0")
    struct.pack_into(">Q", data, 4 << 16, 1 << 62 | (len(packed) - 1) // 512 << 54 | 5 << 16)
    return bytes(data)


SEEDS = {
    "qcow2-v2": corpus.write_qcow2(DISK, 2),
    "qcow2-v3": corpus.write_qcow2(DISK),
    "qcow2-compressed": _compressed_qcow2(DISK),
    "vmdk": corpus.write_vmdk(DISK),
    "vdi": corpus.write_vdi(DISK),
    "vpc": corpus.write_vhd(DISK),
    "vpc-fixed": corpus.write_vhd_fixed(DISK),
    "vhdx": corpus.write_vhdx(DISK),
    "raw": DISK,
}
# where headers and tables lie, so that most mutations hit one
PLACES = (
    0,
    512,
    1536,
    64 << 10,
    128 << 10,
    192 << 10,
    256 << 10,
    2 << 20,
    3 << 20,
    (3 << 20) + 65536,
)
NUMBERS = (
    0,
    1,
    2,
    255,
    511,
    512,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
)

numbers = st.builds(
    lambda number, layout: struct.pack(layout, number & (1 << 8 * struct.calcsize(layout)) - 1),
    st.sampled_from(NUMBERS) | st.integers(0, (1 << 64) - 1),
    st.sampled_from((">Q", "<Q", ">I", "<I", ">H", "<H", "B")),
)
offsets = st.builds(
    lambda place, shift: place + shift, st.sampled_from(PLACES), st.integers(0, 600)
) | st.integers(-1100, -1)
patches = st.lists(st.tuples(offsets, numbers | st.binary(min_size=1, max_size=24)), max_size=5)


@cache
def seed(name: str) -> int:
    """Return a file in memory that holds the seed."""
    descriptor = os.memfd_create(name)
    os.write(descriptor, SEEDS[name])
    return descriptor


def answer(descriptor: int, declared: str) -> None:
    """Let inspect() answer; whatever it says is a line of printable ASCII."""
    with open(descriptor, "rb", closefd=False) as file:
        try:
            source = Source(file.fileno(), os.fstat(descriptor).st_size)
            found = image.inspect(source, declared, LIMIT)
        except Error as error:
            said = str(error)
            assert said.isascii() and said.isprintable()
        else:
            assert found.format in image.FORMATS
            assert 0 < found.virtual_size_bytes <= LIMIT
            assert found.virtual_size_bytes % 512 == 0


fuzz = settings(
    max_examples=EXAMPLES,
    deadline=2000,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@fuzz
@given(st.sampled_from(sorted(SEEDS)), patches, st.none() | st.integers(0, 1 << 17))
def test_mutated_images(name: str, changes: list[tuple[int, bytes]], missing: int) -> None:
    descriptor, data = seed(name), SEEDS[name]
    touched = []
    for offset, change in changes:
        place = offset % len(data)
        change = change[: len(data) - place]
        os.pwrite(descriptor, change, place)
        touched.append((place, len(change)))
    size = len(data) - min(missing or 0, len(data))
    os.ftruncate(descriptor, size)
    try:
        answer(descriptor, "auto")
    finally:
        os.pwrite(descriptor, data[size:], size)
        for place, length in touched:
            os.pwrite(descriptor, data[place : place + length], place)


@fuzz
@given(
    st.sampled_from(
        (b"", b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3", b"KDMV", b"conectix", b"vhdxfile")
    ),
    st.binary(max_size=2048),
    st.sampled_from(("auto", *image.FORMATS)),
)
def test_random_bytes(start: bytes, rest: bytes, declared: str) -> None:
    descriptor = os.memfd_create("random")
    try:
        os.write(descriptor, start + rest)
        answer(descriptor, declared)
    finally:
        os.close(descriptor)


LINES = (
    "version=1",
    "CID=fffffffe",
    "parentCID=ffffffff",
    'createType="monolithicSparse"',
    'RW 8192 SPARSE "image"',
    'RW 8192 FLAT "secret" 0',
    'parentFileNameHint="secret"',
    "# Disk DescriptorFile",
)


@fuzz
@given(st.lists(st.sampled_from(LINES) | st.text(max_size=40), max_size=12))
def test_descriptors(lines: list[str]) -> None:
    text = "\n".join(lines).encode("utf-8", "surrogatepass")[: 20 * 512]
    data = corpus.vmdk_header(8192, 24, 1) + text.ljust(20 * 512, b"\0")
    data = data.ljust(24 * 512, b"\0") + struct.pack("<I", 25).ljust(64 << 10, b"\0")
    descriptor = os.memfd_create("descriptor")
    try:
        os.write(descriptor, data)
        answer(descriptor, "vmdk")
    finally:
        os.close(descriptor)


def _packed(data: bytes, layer: str) -> bytes:
    if layer == "gz":
        return gzip.compress(data, 1)
    if layer == "tar":
        info = tarfile.TarInfo("disk.raw")
        info.size = len(data)
        return info.tobuf() + data + bytes(-len(data) % 512 + 1024)
    return data


@settings(fuzz, max_examples=max(10, EXAMPLES // 50), deadline=20_000)
@given(
    st.sampled_from(sorted(SEEDS)),
    patches,
    st.sampled_from(("", "gz", "tar")),
    patches,
    st.booleans(),
)
def test_the_whole_door(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    changes: list[tuple[int, bytes]],
    layer: str,
    later: list[tuple[int, bytes]],
    is_coming: bool,
) -> None:
    """Bytes in, verdict out, in the sandbox: the image is changed, and what is around it."""
    data = _packed(_changed(SEEDS[name], changes), layer)
    data = _changed(data, later[:1]) if layer else data
    image = tmp_path_factory.mktemp("door") / "image"
    image.write_bytes(data)
    try:
        path = coming(image, data, limit_bytes=DOOR) if is_coming else decoded(image, "auto", DOOR)
    except Error as error:
        said = str(error)
        assert said.isascii()
        assert said.isprintable()
        assert "no answer" not in said
    else:
        status = (path or image).stat()
        assert 0 < status.st_size <= DOOR
        assert status.st_size % 512 == 0


def _archive(kind: str, data: bytes) -> bytes:
    """What a disk comes in, small enough that mutations hit what is around it."""
    if kind == "gnu-sparse":
        return gnu_sparse(data[:1024], len(data), (0, 512), (8192, 512)) + END
    if kind == "pax":
        return pax({"size": len(data), "path": "disk.raw"}) + member("x", data) + END
    if kind == "ova":
        digest = hashlib.sha256(data).hexdigest()
        manifest = f"SHA256(a.vmdk)= {digest}\n".encode()
        beside = member("a.ovf", ovf()) + member("a.mf", manifest)
        return beside + member("a.vmdk", data) + END
    return _packed(data, kind)


def _summed(data: bytes) -> bytes:
    """Give the first headers of an archive their checksum, which would stop all that follows."""
    made = bytearray(data)
    for start in range(0, min(8192, len(made) - 511), 512):
        if made[start + 257 : start + 262] == b"ustar":
            made[start + 148 : start + 156] = b" " * 8
            made[start + 148 : start + 156] = b"%06o\0 " % sum(made[start : start + 512])
    return bytes(made)


@settings(fuzz, deadline=20_000)
@given(
    st.sampled_from(sorted(SEEDS)),
    patches,
    st.sampled_from(("", "tar", "gnu-sparse", "pax", "ova", "gz", "tar.gz")),
    patches,
    st.none() | st.integers(1, 1 << 12) | st.integers(1, 1 << 20),
    st.sampled_from(("auto", "auto", *image.FORMATS)),
)
def test_the_door_without_its_sandbox(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    changes: list[tuple[int, bytes]],
    layer: str,
    later: list[tuple[int, bytes]],
    kept: Optional[int],
    declared: str,
) -> None:
    """All that the program does, without the start of a sandbox: a hundred times as many."""
    require("qemu-img", "gzip")
    folder = tmp_path_factory.getbasetemp()
    program.SCRATCH, program.OUTPUT = folder / "scratch", folder / "output"
    kind, _dot, compression = layer.partition(".")
    data = _archive(kind, _changed(SEEDS[name], changes))
    data = _summed(_changed(data, later[:2])) if layer else data
    data = _packed(data[:kept], compression)
    for path in (program.SCRATCH, program.OUTPUT):
        path.write_bytes(b"")
    (folder / "input").write_bytes(data)
    with (folder / "input").open("rb") as file:
        try:
            verdict = program.decode(Source(file.fileno(), len(data)), declared, DOOR)
        except Error as error:
            assert str(error)
        else:
            path = folder / verdict["where"]
            assert path.stat().st_size == verdict["size_bytes"] <= DOOR
            assert path.stat().st_blocks * 512 <= DOOR


def _changed(data: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    made = bytearray(data)
    for offset, change in changes:
        place = offset % len(made)
        change = change[: len(made) - place]
        made[place : place + len(change)] = change
    return bytes(made)
