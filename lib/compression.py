"""Compression: known by its first bytes, taken off by the tools that everybody uses, streamed."""

from __future__ import annotations

import fcntl
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, BinaryIO, Optional, Union, cast

from lib import log, run
from lib.errors import Error
from lib.sandbox import Limits, Sandbox

HEAD_BYTES = 512
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
SANDBOX = Sandbox(limits=Limits(address_space_bytes=1 << 30, cpu_s=24 * 3600, wall_s=24 * 3600))
# The tools' words, and what they mean to who has such a file
_REASONS = (
    (
        r"memory usage limit|too much memory|window size larger|use --long",
        "it needs more memory to unpack than is allowed (xz: 512 MiB, zstd: 128 MiB)",
        "pack it again with a smaller dictionary or window",
    ),
    (
        r"unexpected end|premature|ends unexpectedly|unfinished",
        "it is cut short or damaged",
        "fetch it again",
    ),
    (
        # the last is lz4's, which keeps silent about nothing else
        r"trailing|garbage|unknown (frame|header)|unsupported format|^lz4 failed with status 1\n$",
        "there is data behind its end",
        "pack it again",
    ),
    (r"corrupt|crc|checksum|data integrity|invalid|error", "it is damaged", "fetch it again"),
)

_F_SETPIPE_SZ = 1031  # TODO: fcntl.F_SETPIPE_SZ, with Python 3.10
_BUFFER_BYTES = 1 << 20


def detect(head: bytes) -> Optional[str]:
    """Return what a file with these first 512 bytes is packed with: "gz", "bz2", "xz", "zst",
    "lz4", "tar"; None for any other file."""
    for kind, signature in _SIGNATURES.items():
        if re.match(signature, head, re.DOTALL):
            return kind
    return None


@contextmanager
def decompressed(
    source: BinaryIO,
    kind: Optional[str],
    head: bytes = b"",
    sandbox: Optional[Sandbox] = SANDBOX,
) -> Iterator[BinaryIO]:
    """Hand out what `source` holds, decompressed in a sandbox; kind None: as it is.

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
        try:
            with run.reader(command, stdin=packed, sandbox=sandbox, silent=True) as stream:
                widen(stream)  # a fourth of the work saved
                yield cast(BinaryIO, stream)
                _require_end(stream)
        except run.Failed as error:
            raise _explained(kind, error) from error
        if packed is not source:
            _require_end(packed)


def widen(pipe: Union[int, IO[bytes]]) -> None:
    """Let a pipe hold a whole block instead of 64 KiB; refused to some who are not root."""
    with suppress(OSError):
        fcntl.fcntl(pipe, _F_SETPIPE_SZ, _BUFFER_BYTES)


def _explained(kind: str, error: run.Failed) -> Error:
    for pattern, words, hint in _REASONS:
        if re.search(pattern, f"{error.message}\n{error.words}", re.IGNORECASE):
            return Error(f"unpacking {kind}: {words} ({error.message})", hint)
    said = log.printable(error.words.rpartition("\n")[2], 120) or "it gave no reason"
    return Error(f"unpacking {kind}: {error.message}: {said}", "see whether it is damaged")


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
    if isinstance(source, io.FileIO) and source.readable() and not head:  # nothing was read of it
        yield open(source.fileno(), "rb", closefd=False) if for_python else source
        return
    if isinstance(source, io.BufferedReader):
        head += source.peek()  # Python's own read-ahead, which a child cannot see
    read_end, write_end = os.pipe()
    try:
        widen(write_end)
        os.write(write_end, head)  # fits, as _BUFFER_BYTES and a pipe's first 64 KiB are more
    finally:
        os.close(write_end)
    try:
        # a descriptor has no name in a sandbox without /proc, and dash knows no numbers above 9
        command = ["bash", "-c", 'cat <&"$0" && exec cat', str(read_end)]
        with run.reader(command, stdin=source, descriptors=[read_end]) as stream:
            yield cast(BinaryIO, stream)
    finally:
        os.close(read_end)


def _require_end(stream: IO[bytes]) -> None:
    if stream.read(1):
        raise Error("there is data behind the end of the image")
