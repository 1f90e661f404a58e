"""The target: an instance's disk, claimed, filled, read, wiped and synced."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import BinaryIO, Optional, Union

from lib import log
from lib.disk import local, nbd
from lib.disk.local import BLOCK_BYTES, ZEROES, Local
from lib.environment import Disk
from lib.errors import Error, describe

MIB, GIB = 1 << 20, 1 << 30
GRAIN_BYTES = 64 << 10  # the shortest run of zeroes that becomes a hole

Block = Union[bytes, int]  # a disk's content in order: data, or the length of a run of zeroes
Blocks = Generator[Block, None, None]
Handle = Union[Local, nbd.Connection]


@dataclass(eq=False)
class Target:
    """A disk within reach: a block device, a regular file, or what qemu finds under a URI."""

    disk: Disk
    size_bytes: int
    is_device: bool
    touched: bool = field(default=False, init=False)  # it was opened for writing

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.disk.label

    @contextmanager
    def opened(self, *, writable: bool) -> Iterator[Handle]:
        """Open the disk; on leaving, what went to a URI is flushed, all else waits for sync()."""
        with _opened(self.disk, writable=writable) as handle:
            self.touched = self.touched or writable
            yield handle

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on."""
        with self.opened(writable=False) as handle:
            return handle.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`."""
        with self.opened(writable=True) as handle:
            handle.write(offset, data)

    def used_bytes(self) -> int:
        """Return how much of the disk may hold data: all, but for sparse files."""
        if self.disk.path is None or self.is_device:
            return self.size_bytes
        return min(self.size_bytes, os.stat(self.disk.path).st_blocks * 512)

    def blocks(self) -> Blocks:
        """Read the whole disk; what the file system knows to be a hole is not read."""
        with self.opened(writable=False) as handle:
            yield from _blocks(handle)

    def fill(self, content: Blocks, total_bytes: Optional[int] = None) -> int:
        """Write `content` from the disk's start on and return its length in bytes.

        Zeroes become holes of a file and real zeroes of anything else. The first MiB is held back
        until `content` has ended without an exception and the rest is on stable storage: what is
        cut short, by a power cut too, does not boot. Stale data is wiped from the disk's last MiB
        (second GPT, md 0.90 and 1.0, ZFS) and, behind the content, from the first MiB of where a
        next partition would begin: there lie all signatures that could revive an old one.
        """
        progress = log.Progress(f"writing {self.label}", total_bytes)
        head, end = bytearray(), 0
        with closing(content):
            first = next(content, b"")  # what fails at once leaves the disk as it was
            with self.opened(writable=True) as handle:
                if isinstance(handle, Local) and handle.is_file:
                    handle.empty()
                else:
                    _wipe_ends(handle)
                for block in chain((first,), content):
                    following = end + _length(block)
                    if following > self.size_bytes:
                        raise _too_small(self, following + sum(map(_length, content)))
                    held = max(0, min(following, MIB) - end)
                    head += bytes(held) if isinstance(block, int) else block[:held]
                    for offset, piece in _pieces(block, held):
                        if isinstance(piece, int):
                            handle.zero(end + offset, piece)
                        else:
                            handle.write(end + offset, piece)
                    end = following
                    progress.update(end)
                behind = min(self.size_bytes, -(-end // MIB) * MIB + MIB)
                handle.zero(end, behind - end)
                handle.sync()
                handle.write(0, bytes(head))
        progress.end()
        return end


@contextmanager
def _opened(disk: Disk, *, writable: bool) -> Iterator[Handle]:
    if disk.path is not None:
        with local.opened(disk.path, os.O_RDWR if writable else os.O_RDONLY) as opened:
            yield opened
    elif disk.uri is not None:
        with nbd.connect(disk.uri, writable=writable) as connection:
            yield connection
    else:
        raise Error(f"{disk.label}: neither a path nor a URI is known")


def _wipe_ends(handle: Handle) -> None:
    length = min(MIB, handle.size_bytes)
    handle.zero(0, length)
    handle.zero(handle.size_bytes - length, length)


def _blocks(handle: Handle) -> Blocks:
    for start, end, is_data in handle.extents():
        if not is_data:
            yield end - start
            continue
        for offset in range(start, end, BLOCK_BYTES):
            yield handle.read(offset, min(BLOCK_BYTES, end - offset))


def _length(block: Block) -> int:
    return block if isinstance(block, int) else len(block)


def _pieces(block: Block, start: int) -> Iterator[tuple[int, Block]]:
    """Yield (offset, piece) for the block from `start` on; runs of zeroes as their length."""
    end = _length(block)
    if isinstance(block, int) or ZEROES.startswith(block):
        if start < end:
            yield start, end - start
        return
    while start < end:
        is_zero = _is_zero(block, start)
        stop = start + GRAIN_BYTES
        while stop < end and _is_zero(block, stop) == is_zero:
            stop += GRAIN_BYTES
        stop = min(stop, end)
        yield start, stop - start if is_zero else block[start:stop]
        start = stop


def _is_zero(block: bytes, start: int) -> bool:
    return ZEROES.startswith(block[start : start + GRAIN_BYTES])


def open_target(disk: Disk) -> Target:
    """Return the disk as a target; Error unless it can be reached and has a size."""
    with _opened(disk, writable=False) as handle:
        is_device = isinstance(handle, Local) and handle.is_device
        if isinstance(handle, Local) and not (handle.is_device or handle.is_file):
            raise Error(f"{disk.label}: neither a block device nor a regular file")
        if handle.size_bytes == 0:
            raise Error(
                f"{disk.label}: the disk has no bytes",
                "activate it with gnt-instance activate-disks",
            )
        return Target(disk, handle.size_bytes, is_device)


def require(disk: Disk, image_size_bytes: int) -> Target:
    """Return the disk as a target; Error with both sizes unless the image fits."""
    target = open_target(disk)
    if image_size_bytes > target.size_bytes:
        raise _too_small(target, image_size_bytes)
    return target


def _too_small(target: Target, needed_bytes: int) -> Error:
    gib, mib = -(-needed_bytes // GIB), -(-needed_bytes // MIB)
    return Error(
        f"{target.label}: {log.size(needed_bytes)} ({needed_bytes} bytes) do not fit on a disk of "
        f"{log.size(target.size_bytes)} ({target.size_bytes} bytes)",
        f"use --disk {target.disk.index}:size={f'{mib}M' if needed_bytes < GIB else f'{gib}G'}",
    )


@contextmanager
def claim(target: Target) -> Iterator[None]:
    """Keep others off the disk while it is written; Error that names who has it.

    A device is taken with O_EXCL, as mount, LVM, MD and DRBD take it; a file with the lock that
    qemu sets on an image in use: that keeps running instances and other runs of ours apart. A URI
    has nothing of the kind; some of qemu's drivers lock by themselves.
    """
    if target.disk.path is None:
        yield
        return
    with local.claimed(target.disk.path, target.is_device):
        yield


def write(source: BinaryIO, target: Target) -> None:
    """Put the raw image `source`, a regular file, on the disk: a reflink where that is possible."""
    image = Local(source.fileno(), str(source.name))
    if image.size_bytes > target.size_bytes:
        raise _too_small(target, image.size_bytes)
    if target.disk.path is not None and not target.is_device:
        with target.opened(writable=True) as handle:
            if isinstance(handle, Local) and handle.clone(image):
                return
    target.fill(_blocks(image), image.size_bytes)


def wipe_head(target: Target) -> None:
    """Make the disk unbootable: no first MiB, no second GPT in the last one; synced."""
    with target.opened(writable=True) as handle:
        _wipe_ends(handle)
        handle.sync()


@contextmanager
def unbootable_on_failure(target: Target) -> Iterator[None]:
    """Wipe the disk's head if the block fails after the first byte; its exception goes on."""
    try:
        yield
    except BaseException:
        if target.touched:
            try:
                wipe_head(target)
            except (Error, OSError) as error:
                words = describe(error) if isinstance(error, OSError) else str(error)
                log.warning(f"{target.label}: its head could not be wiped, it may boot: {words}")
        raise


def sync(target: Target) -> None:
    """Return when the disk is on stable storage; writes to a URI were flushed one by one."""
    if target.disk.path is not None:
        with target.opened(writable=False) as handle:
            handle.sync()
