"""The streams of export and import: a disk's content to a dump, and back."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from itertools import groupby
from typing import BinaryIO, Optional

from lib import log, run
from lib.compression import widen
from lib.disk.local import BLOCK_BYTES, ZEROES
from lib.disk.target import Block, Blocks, Target, length_of
from lib.errors import Error

HOLE_BYTES = 16 << 20  # a hole this long becomes a ready-made frame instead of zstd's input
COMPRESSED_PERCENT = 35  # what zstd leaves of a Debian disk's data


def dump(
    source: Target, output: BinaryIO, compression: str, exp_size_fd: Optional[int] = None
) -> None:
    """Write the disk to `output`, as "zstd" (frames with content checksums) or "none" (raw).

    exp_size_fd gets an estimate of the dump's size, in bytes and with a newline as
    ganeti-os-interface(7) wants it; impexpd compares it with what passes its dd.
    """
    output.flush()
    if exp_size_fd is not None:
        estimate = source.size_bytes
        if compression != "none":
            estimate = source.used_bytes() * COMPRESSED_PERCENT // 100
        os.write(exp_size_fd, b"%d\n" % estimate)
    progress = log.Progress(f"reading {source.label}", source.size_bytes)
    with closing(source.blocks()) as blocks:
        runs = _runs(blocks, progress)
        if compression == "none":
            for run_ in runs:
                _feed(output.fileno(), run_)
        else:
            _compress(runs, output.fileno())
    progress.end()


def _runs(blocks: Blocks, progress: log.Progress) -> Iterator[Block]:
    """Yield data as it comes and zeroes as lengths: HOLE_BYTES as often as possible, then less."""
    done = zeroes = 0
    for block in blocks:
        done += length_of(block)
        progress.update(done)
        if isinstance(block, int) or ZEROES.startswith(block):
            zeroes += length_of(block)
        else:
            yield from _holes(zeroes)
            zeroes = 0
            yield block
    yield from _holes(zeroes)


def _holes(zeroes: int) -> Iterator[int]:
    for start in range(0, zeroes, HOLE_BYTES):
        yield min(HOLE_BYTES, zeroes - start)


def _compress(runs: Iterator[Block], output: int) -> None:
    """Write zstd frames: one for each stretch of data, and one ready-made for each HOLE_BYTES.

    A file of several frames is legal (RFC 8878 section 3.1), and zstd makes no more than 0.6 GB/s
    of zeroes: 18 GiB of them took 30 s, as frames they take none.
    """
    frame = b""
    for is_hole, group in groupby(runs, lambda run_: run_ == HOLE_BYTES):
        if not is_hole:
            with _zstd(output) as pipe:
                for run_ in group:
                    _feed(pipe, run_)
            continue
        for _hole in group:
            frame = frame or _frame_of_zeroes()
            _feed(output, frame)


def _frame_of_zeroes() -> bytes:
    with tempfile.TemporaryFile() as file:
        with _zstd(file.fileno()) as pipe:
            _feed(pipe, HOLE_BYTES)
        file.seek(0)
        return file.read()


@contextmanager
def _zstd(output: int) -> Iterator[int]:
    """Yield a pipe to a zstd that writes to `output`; on leaving, Error if it failed."""
    command = ["zstd", "--quiet", "--threads=0", "--check", "--stdout"]
    with run.process(command, stdin=run.PIPE, stdout=output) as child:
        assert child.stdin is not None and child.stderr is not None  # run.process makes pipes
        widen(child.stdin)
        ended_early = False
        try:
            yield child.stdin.fileno()
        except BrokenPipeError:
            ended_early = True
        child.stdin.close()
        words = child.stderr.read().decode("ascii", "backslashreplace").strip()
        status = child.wait()
    if status == -signal.SIGPIPE:
        raise BrokenPipeError(errno.EPIPE, "the reader of the dump went away")
    if status != 0 or ended_early:
        raise Error(f"zstd failed with status {status}: {log.printable(words, 200)}")


def _feed(descriptor: int, block: Block) -> None:
    for start in range(0, length_of(block), BLOCK_BYTES):
        end = start + BLOCK_BYTES
        piece = ZEROES[: block - start] if isinstance(block, int) else block[start:end]
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]


# what somebody may take for a dump: a disk that begins so boots nowhere
IMAGES = {
    b"QFI\xfb": "qcow2",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"# Disk DescriptorFile": "vmdk",
    b"<<< ": "vdi",
    b"conectix": "vpc",
    b"vhdxfile": "vhdx",
    b"VMA\x00": "Proxmox VMA",
}


def load(opened: AbstractContextManager[BinaryIO], target: Target) -> int:
    """Write the raw stream behind `opened` to the disk and return its length in bytes.

    Leaving `opened` is what tells whether the stream was whole (the decompressor's status). It is
    left before the content ends, and fill() writes the first MiB after that: so a damaged dump
    leaves no bootable disk.
    """
    return target.fill(_received(opened))


def _received(opened: AbstractContextManager[BinaryIO]) -> Blocks:
    with opened as stream:
        widen(stream)
        block = first = stream.read(BLOCK_BYTES)
        for signature, name in IMAGES.items():
            if first.startswith(signature):
                raise Error(
                    f"the dump is a {name} image and not the raw bytes of a disk",
                    "gnt-instance add -O image= takes it, or qemu-img convert -O raw first",
                )
        while block:
            yield block
            block = stream.read(BLOCK_BYTES)
    if not first:  # a decompressor that failed has said so by now
        raise Error("the dump is empty", "look for why the export wrote nothing")
