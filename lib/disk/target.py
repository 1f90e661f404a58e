"""The target: an instance's disk, claimed, filled, read, wiped and synced."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import BinaryIO, Optional, Union

from lib import log
from lib.disk import local, nbd
from lib.disk.local import BLOCK_BYTES, ZEROES, Local
from lib.environment import Disk
from lib.errors import Error, describe

MIB, GIB = 1 << 20, 1 << 30
FIRST_BYTES = 4096  # boot sector and GPT header, whatever the sectors are: nothing boots without
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
    touched: bool = field(default=False, init=False)  # something was written
    held: Optional[Handle] = field(default=None, init=False)  # by hold()
    # the first MiB, withheld from the disk while it is filled: fill() to sync()
    head: bytearray = field(default_factory=bytearray, init=False)

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.disk.label

    def opened(self, *, writable: bool) -> AbstractContextManager[Handle]:
        """Open the disk; on leaving, what went to a URI is flushed, all else waits for sync()."""
        self.touched = self.touched or writable
        return nullcontext(self.held) if self.held else _opened(self.disk, writable=writable)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on."""
        with self.opened(writable=False) as handle:
            data = handle.read(offset, length)
        withheld = bytes(self.head[offset : offset + length])
        return withheld + data[len(withheld) :]

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`; between fill() and sync() the head only takes note of it."""
        held = self._withhold(offset, data)
        if held < len(data):
            with self.opened(writable=True) as handle:
                handle.write(offset + held, data[held:])

    def _withhold(self, offset: int, block: Block) -> int:
        """Take note of what of the block belongs to the withheld head; return its length."""
        held = max(0, min(length_of(block), len(self.head) - offset))
        if not isinstance(block, int):
            self.head[offset : offset + held] = block[:held]
        return held

    def used_bytes(self) -> int:
        """Return how much of the disk may hold data: all, but for sparse files."""
        if self.disk.path is None or self.is_device:
            return self.size_bytes
        return min(self.size_bytes, os.stat(self.disk.path).st_blocks * 512)

    def blocks(self) -> Blocks:
        """Read the whole disk; what the file system knows to be a hole is not read."""
        with self.opened(writable=False) as handle:
            yield from _blocks(handle)

    def fill(self, content: Blocks, total_bytes: Optional[int] = None, start: int = 0) -> int:
        """Write `content` from `start` on, behind what is there; return where it ends, in bytes.

        Zeroes become holes of a file and real zeroes of anything else. The first MiB is withheld
        until sync(): what is cut short, by a power cut too, does not boot. Stale data is wiped
        from the disk's last MiB (second GPT, md 0.90 and 1.0, ZFS) and, behind the content, from
        the first MiB of where a next partition would begin: there lie all signatures that could
        revive an old one.
        """
        progress = log.Progress(f"writing {self.label}", total_bytes)
        end, zeroes = start, 0  # zeroes: how many before the end are not written yet
        with closing(content):
            first = next(content, b"")  # what fails at once leaves the disk as it was
            with self.opened(writable=True) as handle:
                if not self.head:  # share() may have begun
                    self._begin(handle)
                for block in chain((first,), content):
                    following = end + length_of(block)
                    if following > self.size_bytes:
                        raise Error(
                            f"{self.label}: the dump's bytes do not fit on a disk of"
                            f" {log.size(self.size_bytes)} ({self.size_bytes} bytes)",
                            f"use --disk {self.disk.index}:size= with the size of the dumped disk",
                        )
                    for offset, piece in _pieces(block, self._withhold(end, block)):
                        if isinstance(piece, int):
                            zeroes += piece  # in one: Ceph gives back whole objects only
                            continue
                        handle.zero(end + offset - zeroes, zeroes)
                        zeroes = 0
                        handle.write(end + offset, piece)
                    end = following
                    progress.update(end)
                behind = min(self.size_bytes, max(MIB, -(-end // MIB) * MIB + MIB))
                handle.zero(end - zeroes, behind - end + zeroes)
                handle.is_empty = False
        progress.end()
        return end

    def _begin(self, handle: Handle) -> None:
        if isinstance(handle, Local):
            handle.empty()
        if not handle.is_empty:
            _wipe_ends(handle)
        handle.sync()
        self.head = bytearray(min(MIB, self.size_bytes))

    def share(self, image: Local) -> int:
        """Let a file share the image's blocks behind the first MiB; return where that ends, or 0.

        What follows is for fill(), and so is all of it where nothing can be shared.
        """
        with self.opened(writable=True) as handle:
            if not isinstance(handle, Local) or not handle.is_file or image.size_bytes <= MIB:
                return 0
            self._begin(handle)
            end = handle.clone(image, MIB)
        if end:
            self.head[:] = image.read(0, MIB)
        return end


@contextmanager
def hold(target: Target) -> Iterator[None]:
    """Open the disk once for all of a door and keep other runs of ours off it."""
    with _opened(target.disk, writable=True) as handle:
        if isinstance(handle, Local):
            handle.lock(local.DOOR_LOCK, 1)
        if handle.size_bytes != target.size_bytes:
            raise Error(f"{target.label}: its size has changed meanwhile", "run this again")
        target.held = handle
        try:
            yield
        finally:
            target.held = None


def _opened(disk: Disk, *, writable: bool) -> AbstractContextManager[Handle]:
    if disk.path is not None:
        return local.opened(disk.path, os.O_RDWR if writable else os.O_RDONLY)
    if disk.uri is not None:
        return nbd.connect(disk.uri, writable=writable)
    raise Error(f"{disk.label}: neither a path nor a URI is known")


def _wipe_ends(handle: Handle) -> None:
    length = min(MIB, handle.size_bytes)
    handle.zero(0, length)
    handle.zero(handle.size_bytes - length, length)


def _blocks(handle: Handle, first: int = 0) -> Blocks:
    for start, end in handle.data(first):
        if first < start:
            yield start - first
        for offset in range(start, end, BLOCK_BYTES):
            yield handle.read(offset, min(BLOCK_BYTES, end - offset))
        first = end
    if first < handle.size_bytes:
        yield handle.size_bytes - first


def length_of(block: Block) -> int:
    """Return how many bytes of a disk the block stands for."""
    return block if isinstance(block, int) else len(block)


def _pieces(block: Block, start: int) -> Iterator[tuple[int, Block]]:
    """Yield (offset, piece) for the block from `start` on; runs of zeroes as their length."""
    end = length_of(block)
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
        if isinstance(handle, Local) and not (handle.is_device or handle.is_file):
            raise Error(f"{disk.label}: neither a block device nor a regular file")
        if handle.size_bytes == 0:
            raise Error(
                f"{disk.label}: the disk has no bytes",
                "activate it with gnt-instance activate-disks",
            )
        return Target(disk, handle.size_bytes, handle.is_device)


def require(target: Target, image_size_bytes: int) -> None:
    """Raise an Error with both sizes unless the image fits."""
    if image_size_bytes > target.size_bytes:
        mib, gib = -(-image_size_bytes // MIB), -(-image_size_bytes // GIB)
        size = f"{mib}M" if image_size_bytes < GIB else f"{gib}G"
        raise Error(
            f"{target.label}: {log.size(image_size_bytes)} ({image_size_bytes} bytes) do not fit"
            f" on a disk of {log.size(target.size_bytes)} ({target.size_bytes} bytes)",
            f"use --disk {target.disk.index}:size={size}",
        )


def claim(target: Target) -> AbstractContextManager[None]:
    """Keep others off the disk while it is written; Error that names who has it.

    A device is taken with O_EXCL, as mount, LVM, MD and DRBD take it; a file with the lock that
    qemu sets on an image in use: that keeps running instances and other runs of ours apart. A URI
    has nothing of the kind; some of qemu's drivers lock by themselves.
    """
    if target.disk.path is None:
        return nullcontext()
    return local.claimed(target.disk.path, target.is_device)


def write(source: BinaryIO, target: Target) -> None:
    """Put the raw image `source`, a regular file, on the disk: a reflink where that is possible.

    The disk's first MiB is withheld until sync().
    """
    image = Local(source.fileno(), str(source.name))
    require(target, image.size_bytes)
    start = target.share(image)
    target.fill(_blocks(image, start), image.size_bytes, start)


def wipe_head(target: Target) -> None:
    """Make the disk unbootable: no first MiB, no second GPT in the last one; synced."""
    target.head.clear()
    if isinstance(target.held, nbd.Connection) and target.held.failure is not None:
        target.held = None  # what was begun there was not ended: another connection is needed
    with target.opened(writable=True) as handle:
        handle.is_empty = False
        _wipe_ends(handle)
        handle.sync()


@contextmanager
def unbootable_on_failure(target: Target) -> Iterator[None]:
    """Wipe the disk's head if the block fails after the first byte; its exception goes on."""
    try:
        yield
    except BaseException as failure:
        if target.touched:
            words = describe(failure) if isinstance(failure, OSError) else str(failure)
            log.step(f"failed: {words or type(failure).__name__}")
            try:
                wipe_head(target)
            except (Error, OSError) as error:
                words = describe(error) if isinstance(error, OSError) else str(error)
                log.warning(f"{target.label}: its head could not be wiped, it may boot: {words}")
            else:
                log.step(f"{target.label}: made unbootable, its first and last MiB are zeroes")
        raise


def sync(target: Target) -> None:
    """Return when the disk is on stable storage.

    What fill() withheld is written when all else is there, the first sectors last of all.
    """
    if target.head:
        head = bytes(target.head)
        target.head.clear()
        with target.opened(writable=True) as handle:
            for start, end in ((FIRST_BYTES, len(head)), (0, FIRST_BYTES)):
                handle.sync()
                handle.write(start, head[start:end])
            handle.sync()
    elif target.disk.path is not None or target.held is not None:
        # else it is a URI, whose writes were flushed as it was closed
        with target.opened(writable=False) as handle:
            handle.sync()
