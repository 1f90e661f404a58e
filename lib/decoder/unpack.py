"""One level of compression and one archive, taken off in a stream."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Optional, cast

from lib import log
from lib.compression import HEAD_BYTES, decompressed, detect
from lib.decoder import archive
from lib.decoder.source import Source
from lib.errors import Error

_BUFFER_BYTES = 1 << 20
_BLOCK_BYTES = 64 << 10  # zeroes that long and aligned become a hole
_ZEROES = bytes(_BLOCK_BYTES)


def unpack(source: Source, output: BinaryIO, limit_bytes: int) -> None:
    """Write the one image in `source` to `output`, a fresh file.

    Zeroes become holes.

    One level of compression, and an archive in it or alone, are taken off. An archive (tar, OVA)
    is not extracted: its headers are walked and the bytes of one regular file are copied. That is
    the one whose name ends as a disk image's (.raw, .img, .vmdk, ...) or that is larger than
    1 MiB; what is neither lies beside it (descriptor, manifest, README). Two of them, links,
    devices, a name twice, more than `limit_bytes`, or anything packed in what comes out are errors.
    """
    kind = detect(source.read(0, HEAD_BYTES))
    packing = None if kind == "tar" else kind
    with source.stream() as packed, _plain(packed, packing) as stream:
        head = stream.read(HEAD_BYTES)
        if detect(head) == "tar":
            size_bytes = _unpack_archive(stream, head, output, limit_bytes)
        else:
            size_bytes = _copy(stream, output, limit_bytes, head)
            if size_bytes > limit_bytes or stream.read(1):
                raise _too_large(limit_bytes)
    output.truncate(size_bytes)
    output.seek(0)
    inner = detect(output.read(HEAD_BYTES))
    if inner is not None:
        raise Error(f"the image is packed twice: there is {inner} in it", "unpack it once")
    output.seek(0)


@contextmanager
def _plain(packed: BinaryIO, kind: Optional[str]) -> Iterator[BinaryIO]:
    """Hand out what decompressed() does, here in the sandbox.

    gz by Python's library: zlib takes two thirds of the time of gzip's own code (2 GiB with
    zeroes: 5.7 s instead of 8.1).
    """
    if kind != "gz":
        with decompressed(packed, kind, sandbox=None) as stream:
            yield stream
        return
    if packed.seekable():
        packed.seek(0)
    try:
        # what GzipFile reads may not come in pieces as small as a pipe's
        with gzip.GzipFile(fileobj=io.BufferedReader(cast(io.RawIOBase, packed))) as stream:
            yield cast(BinaryIO, stream)
            if stream.read(1):
                raise Error("there is data behind the end of the image")
    except EOFError as error:
        raise Error("unpacking gz: it is cut short or damaged", "fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        if "Not a gzipped file" in str(error):
            raise Error("unpacking gz: there is data behind its end", "pack it again") from error
        raise Error("unpacking gz: it is damaged", "fetch it again") from error


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
    side: dict[str, Optional[bytes]] = {}
    total = 0
    for member in archive.members(stream, head):
        if member.name in side or (disk is not None and member.name == disk.name):
            raise Error(f"the archive holds {member.name!r} twice", "repack it")
        total += member.size_bytes
        if total > limit_bytes + archive.BESIDE_BYTES:
            raise _too_large(limit_bytes)
        if not member.is_disk:
            side[member.name] = _side_file(stream, member)
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


def _side_file(stream: BinaryIO, member: archive.Member) -> Optional[bytes]:
    """Read what lies beside the disk; of what is large, nothing is of interest."""
    if member.size_bytes > archive.SIDE_BYTES:
        with open(os.devnull, "wb") as nothing:
            _copy_member(stream, member, nothing)
        return None
    content = io.BytesIO()
    _copy_member(stream, member, content)
    return content.getvalue().ljust(member.size_bytes, b"\0")


def _copy_member(stream: BinaryIO, member: archive.Member, output: BinaryIO) -> None:
    for offset, size_bytes in member.segments:
        output.seek(offset)
        if _copy(stream, output, size_bytes) < size_bytes:
            raise archive.cut()
