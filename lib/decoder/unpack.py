"""Compression and archives: known by their first bytes, decompressed in the sandbox, streamed."""

from __future__ import annotations

import fcntl
import io
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, BinaryIO, Optional, cast

from lib import log, run
from lib.decoder import archive
from lib.errors import Error

_HEAD_BYTES = 512
_SIGNATURES = {
    "gz": rb"\x1f\x8b\x08",
    "bz2": rb"BZh[1-9]1AY&SY",
    "xz": rb"\xfd7zXZ\x00",
    "zst": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # pzstd's begin with a skippable frame
    "lz4": rb"\x04\x22\x4d\x18",
    "tar": rb".{257}ustar",
}
_TOOLS = {
    "gz": ("gzip",),
    "bz2": ("bzip2",),
    # as many threads as find room below the limit, which is half of the sandbox's address space;
    # one a core would pass that with nothing but stacks. xz before 5.4 uses one
    "xz": ("xz", "--format=xz", "--threads=4", "--memlimit-decompress=512MiB"),
    "zst": ("zstd", "--quiet", "--memory=128MiB"),
    "lz4": ("lz4", "--quiet"),
}
# What bounds a tool is the count of the bytes that come out; a slow import may take its time
_LIMITS = run.Limits(address_space_bytes=1 << 30, cpu_s=24 * 3600, wall_s=24 * 3600)

_F_SETPIPE_SZ = 1031  # TODO: fcntl.F_SETPIPE_SZ, with Python 3.10
_BUFFER_BYTES = 1 << 20
_BLOCK_BYTES = 64 << 10  # zeroes that long and aligned become a hole
_ZEROES = bytes(_BLOCK_BYTES)


def detect(head: bytes) -> Optional[str]:
    """Return what a file with these first 512 bytes is packed with: "gz", "bz2", "xz", "zst",
    "lz4", "tar"; None for any other file."""
    for kind, signature in _SIGNATURES.items():
        if re.match(signature, head, re.DOTALL):
            return kind
    return None


def unpack(source: BinaryIO, output: BinaryIO, limit_bytes: int) -> None:
    """Write the one image in `source`, an open file, to `output`, a fresh one; zeroes are holes.

    One level of compression, and an archive in it or alone, are taken off. An archive (tar, OVA)
    is not extracted: its headers are walked and the bytes of one regular file are copied. That is
    the one whose name ends as a disk image's (.raw, .img, .vmdk, ...) or that is larger than
    1 MiB; what is neither lies beside it (descriptor, manifest, README). Two of them, links,
    devices, a name twice, more than `limit_bytes`, or anything packed in what comes out are errors.
    """
    kind = detect(os.pread(source.fileno(), _HEAD_BYTES, 0))
    with decompressed(source, None if kind == "tar" else kind) as stream:
        head = stream.read(_HEAD_BYTES)
        if detect(head) == "tar":
            size_bytes = _unpack_archive(stream, head, output, limit_bytes)
        else:
            size_bytes = _copy(stream, output, limit_bytes, head)
            if size_bytes > limit_bytes or stream.read(1):
                raise _too_large(limit_bytes)
    output.truncate(size_bytes)
    output.seek(0)
    inner = detect(output.read(_HEAD_BYTES))
    if inner is not None:
        raise Error(f"the image is packed twice: there is {inner} in it", "unpack it once")
    output.seek(0)


@contextmanager
def decompressed(source: BinaryIO, kind: Optional[str], head: bytes = b"") -> Iterator[BinaryIO]:
    """Hand out what `source` holds, decompressed in the sandbox; kind None: as it is.

    source is an open file, read from offset 0, or a pipe of which `head` was read before. The
    block must read to the end: what it leaves is an Error, and so is a tool that failed or
    complained, as they do about a cut input or bytes behind the end.
    """
    if kind == "tar":
        raise Error("this is an archive, not a disk", "take the disk out of it")
    with _joined(source, head, kind is None) as packed:
        if kind is None:
            yield packed
            _require_end(packed)
            return
        command = [*_TOOLS[kind], "--decompress", "--stdout"]
        sandbox = run.Sandbox(limits=_LIMITS)
        with run.reader(command, stdin=packed, sandbox=sandbox, silent=True) as stream:
            with suppress(OSError):  # a fourth of the work saved; refused to some who are not root
                fcntl.fcntl(stream.fileno(), _F_SETPIPE_SZ, _BUFFER_BYTES)
            yield cast(BinaryIO, stream)
            _require_end(stream)
        if packed is not source:
            _require_end(packed)


@contextmanager
def _joined(source: BinaryIO, head: bytes, for_python: bool) -> Iterator[BinaryIO]:
    """Hand out a stream of the whole source, for Python or for a child to read.

    A pipe's head comes first again by cat: a thread in its place could neither be interrupted in
    a read nor be left alone, for it holds the lock on stdin when the interpreter ends.
    """
    if source.seekable():
        if for_python:
            source.seek(0)
        else:
            os.lseek(source.fileno(), 0, os.SEEK_SET)
        yield source
        return
    if isinstance(source, io.BufferedReader):
        head += source.peek()  # Python's own read-ahead, which a child cannot see
    with tempfile.TemporaryFile(buffering=0) as kept:
        kept.write(head)
        command = ["cat", f"/dev/fd/{kept.fileno()}", "-"]
        with run.reader(command, stdin=source, descriptors=[kept.fileno()]) as stream:
            yield cast(BinaryIO, stream)


def _require_end(stream: IO[bytes]) -> None:
    if stream.read(1):
        raise Error("there is data behind the end of the image")


def _too_large(limit_bytes: int) -> Error:
    return Error(
        f"unpacked, the image is larger than the limit of {log.size(limit_bytes)}",
        "if it is what you want, raise max_virtual_size in cloudimage.conf",
    )


def _copy(stream: BinaryIO, output: BinaryIO, size_bytes: int, head: bytes = b"") -> int:
    """Copy `head` and the stream, `size_bytes` at most, to where output stands; return the size.

    Blocks of zeroes are seeked over: the caller sets the length of the file in the end.
    """
    start = output.tell()
    buffer = bytearray(max(len(head), min(size_bytes, _BUFFER_BYTES)))
    view = memoryview(buffer)
    done, filled = 0, len(head)
    buffer[:filled] = head
    while True:
        wanted = min(len(buffer), size_bytes - done)
        while filled < wanted:
            count: int = stream.readinto(view[filled:wanted])  # type: ignore[attr-defined]
            if not count:
                break
            filled += count
        _write_data(output, start + done, buffer, filled)
        done += filled
        if filled < wanted or done >= size_bytes:
            return done
        filled = 0


def _write_data(output: BinaryIO, offset: int, buffer: bytearray, size_bytes: int) -> None:
    """Write the buffer's first bytes at `offset`, without the blocks of zeroes."""

    def write(start: int, end: int) -> None:
        if start < end:
            output.seek(offset + start)
            output.write(view[start:end])

    view = memoryview(buffer)
    start = 0
    for block in range(0, size_bytes, _BLOCK_BYTES):
        end = min(block + _BLOCK_BYTES, size_bytes)
        if buffer.startswith(_ZEROES[: end - block], block, end):
            write(start, block)
            start = end
    write(start, size_bytes)


def _unpack_archive(stream: BinaryIO, head: bytes, output: BinaryIO, limit_bytes: int) -> int:
    """Copy the one disk of a tar archive to output; return its size."""
    disk: Optional[archive.Member] = None
    side: dict[str, bytes] = {}
    for member in archive.members(stream, head):
        if member.name in side or (disk is not None and member.name == disk.name):
            raise Error(f"the archive holds {member.name!r} twice", "repack it")
        if not member.is_disk:
            content = io.BytesIO()
            _copy_member(stream, member, content)
            side[member.name] = content.getvalue().ljust(member.size_bytes, b"\0")
        elif disk is not None:
            names = f"{disk.name!r} and {member.name!r}"
            raise Error(f"the archive holds two disks, {names}", "repack it with one")
        elif member.size_bytes > limit_bytes:
            raise _too_large(limit_bytes)
        else:
            disk = member
            _copy_member(stream, disk, output)
    if disk is None:
        raise Error("the archive holds no disk", "name it as one, disk.raw say")
    output.truncate(disk.size_bytes)
    archive.check_ova(side, disk.name, output)
    return disk.size_bytes


def _copy_member(stream: BinaryIO, member: archive.Member, output: BinaryIO) -> None:
    for offset, size_bytes in member.segments:
        output.seek(offset)
        if _copy(stream, output, size_bytes) < size_bytes:
            raise archive.cut()
