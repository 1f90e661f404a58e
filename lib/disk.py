"""The target: an instance's disk, claimed, filled, read, wiped and synced."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Optional, Union

from lib import log, nbd
from lib.environment import Disk
from lib.errors import Error, describe

MIB, GIB = 1 << 20, 1 << 30
BLOCK_BYTES = MIB
GRAIN_BYTES = 64 << 10  # the shortest run of zeroes that becomes a hole
SECTOR_BYTES = 4096  # the largest logical sector
ZERO_STEP_BYTES = 64 * MIB  # one call to the kernel, so that a signal is soon heard
ZEROES = bytes(BLOCK_BYTES)

FICLONE, BLKROGET, BLKZEROOUT = 0x40049409, 0x125E, 0x127F  # linux/fs.h
PUNCH_HOLE_KEEP_SIZE = 0x3  # linux/falloc.h
QEMU_LOCK_FIRST, QEMU_LOCK_COUNT = 100, 200  # qemu's block/file-posix.c, RAW_LOCK_PERM_BASE

Block = Union[bytes, int]  # a disk's content in order: data, or the length of a run of zeroes
Blocks = Generator[Block, None, None]


class _Local:
    """An open file or block device."""

    def __init__(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self.descriptor = descriptor
        self.is_device = stat.S_ISBLK(status.st_mode)
        self.is_file = stat.S_ISREG(status.st_mode)
        self.is_empty = False
        self.size_bytes = status.st_size
        if self.is_device:
            self.size_bytes = os.lseek(descriptor, 0, os.SEEK_END)

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self.descriptor, length, offset)
        while len(data) < length:
            more = os.pread(self.descriptor, length - len(data), offset + len(data))
            if not more:
                raise Error(f"nothing to read at {offset + len(data)}: the end is before that")
            data += more
        return data

    def write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self.descriptor, view, offset)
            # starts the write-back now, so that fsync finds little to do (540 MiB on ext4: 0.26 s
            # instead of 0.40 s), and leaves the node's page cache to others
            os.posix_fadvise(self.descriptor, offset, count, os.POSIX_FADV_DONTNEED)
            view, offset = view[count:], offset + count

    def zero(self, offset: int, length: int) -> None:
        end = offset + length
        if self.is_empty:
            return
        if self.is_device:
            first = -(-offset // SECTOR_BYTES) * SECTOR_BYTES
            last = end // SECTOR_BYTES * SECTOR_BYTES
            if first < last:
                self._write_zeroes(offset, first)
                for start in range(first, last, ZERO_STEP_BYTES):
                    _zero_out(self.descriptor, start, min(ZERO_STEP_BYTES, last - start))
                offset = last
        self._write_zeroes(offset, end)

    def _write_zeroes(self, start: int, end: int) -> None:
        for offset in range(start, end, BLOCK_BYTES):
            self.write(offset, ZEROES[: end - offset])

    def empty(self) -> None:
        """Make a file one hole of the same size: NFS has truncation, but no punching."""
        try:
            os.ftruncate(self.descriptor, 0)
        finally:
            os.ftruncate(self.descriptor, self.size_bytes)
        self.is_empty = True

    def sync(self) -> None:
        os.fsync(self.descriptor)


_Handle = Union[_Local, nbd.Connection]


def _zero_out(descriptor: int, offset: int, length: int) -> None:
    """Make a range of a device read as zeroes; unmapped if the device then promises zeroes."""
    import ctypes  # 2 ms, and Python's fallocate knows no modes

    libc = ctypes.CDLL(None)
    start, count = ctypes.c_int64(offset), ctypes.c_int64(length)
    if libc.fallocate64(descriptor, PUNCH_HOLE_KEEP_SIZE, start, count) != 0:
        fcntl.ioctl(descriptor, BLKZEROOUT, struct.pack("QQ", offset, length))


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
    def opened(self, *, writable: bool) -> Iterator[_Handle]:
        """Open the disk; on leaving, what went to a URI is flushed, all else waits for sync()."""
        with _opened(self.disk, os.O_RDWR if writable else os.O_RDONLY) as handle:
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
        """Return how much of the disk may hold data; less than all for sparse files only."""
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
        cut short, by a power cut too, does not boot. Stale data is wiped from the MiB behind the
        content's end, counted from where the next partition would begin (all signatures lie in a
        partition's first MiB), and from the disk's last MiB (second GPT, md 0.90 and 1.0, ZFS).
        """
        progress = log.Progress(f"writing {self.label}", total_bytes)
        head, end = bytearray(), 0
        with closing(content):
            first = next(content, b"")  # what fails at once leaves the disk as it was
            with self.opened(writable=True) as handle:
                _clear(handle)
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
def _opened(disk: Disk, flags: int) -> Iterator[_Handle]:
    if disk.path is None:
        assert disk.uri is not None  # environment refuses a disk with neither
        with nbd.connect(disk.uri, writable=flags != os.O_RDONLY) as connection:
            yield connection
        return
    try:
        descriptor = os.open(disk.path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _unusable(disk.path, error) from error
    try:
        yield _Local(descriptor)
    finally:
        os.close(descriptor)


def _unusable(path: Path, error: OSError) -> Error:
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return Error(f"{path}: no such disk", "activate it with gnt-instance activate-disks")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return Error(f"{path}: the disk is read-only", "make it writable on this node")
    if error.errno == errno.EMEDIUMTYPE:
        return Error(f"{path}: DRBD is secondary here", "run this on the primary node")
    if error.errno in (errno.EBUSY, errno.EAGAIN):
        return Error(f"{path}: in use: {_user(path)}", "release it and run this again")
    return Error(f"{path}: {describe(error)}")


def _user(path: Path) -> str:
    """Name who holds a disk, as far as the kernel tells."""
    number = os.stat(path).st_rdev
    name = f"{os.major(number)}:{os.minor(number)}"
    with open("/proc/self/mountinfo", encoding="ascii", errors="backslashreplace") as mounts:
        for fields in map(str.split, mounts):
            if fields[2] == name:
                return f"mounted on {fields[4]}"
    holders = Path(f"/sys/dev/block/{name}/holders")
    names = sorted(holder.name for holder in holders.glob("*"))
    return f"part of {' '.join(names)}" if names else "by a running instance or another create"


def open_target(disk: Disk) -> Target:
    """Return the disk as a target; Error unless it can be reached and has a size."""
    with _opened(disk, os.O_RDONLY) as handle:
        is_device = isinstance(handle, _Local) and handle.is_device
        if isinstance(handle, _Local) and not (handle.is_device or handle.is_file):
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

    A device by O_EXCL, as mount, LVM, MD and DRBD take it. A file by the lock that qemu sets on
    an image in use: it keeps running instances and other runs of ours apart. A URI has nothing
    of the kind; some of qemu's drivers lock by themselves.
    """
    if target.disk.path is None:
        yield
        return
    with _opened(target.disk, os.O_RDWR | (os.O_EXCL if target.is_device else 0)) as handle:
        assert isinstance(handle, _Local)
        if not handle.is_device:
            _lock(target.disk.path, handle.descriptor)
        elif any(fcntl.ioctl(handle.descriptor, BLKROGET, bytes(4))):
            raise _unusable(target.disk.path, OSError(errno.EROFS, ""))
        yield


def _lock(path: Path, descriptor: int) -> None:
    # a lock of the open file, not of the process: other descriptors come and go meanwhile
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, QEMU_LOCK_FIRST, QEMU_LOCK_COUNT, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _unusable(path, OSError(errno.EAGAIN, "")) from error
        log.debug(f"{path}: no locks on this file system: {describe(error)}")


def _clear(handle: _Handle) -> None:
    """Empty a file; of anything else, zero the first MiB, and the last with GPT's second copy."""
    if isinstance(handle, _Local) and handle.is_file:
        handle.empty()
        return
    length = min(MIB, handle.size_bytes)
    handle.zero(0, length)
    handle.zero(handle.size_bytes - length, length)


def _extents(handle: _Handle) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, is data) from start to end; data only, where holes are not known."""
    size = handle.size_bytes
    if not isinstance(handle, _Local) or not handle.is_file:
        yield 0, size, True
        return
    end = 0
    while end < size:
        try:
            start = os.lseek(handle.descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            start = size  # no data any more
        if start > end:
            yield end, start, False
        end = size if start == size else os.lseek(handle.descriptor, start, os.SEEK_HOLE)
        if end > start:
            yield start, end, True


def _blocks(handle: _Handle) -> Blocks:
    for start, end, is_data in _extents(handle):
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
    if isinstance(block, int):
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


def write(source: BinaryIO, target: Target) -> None:
    """Put the raw image `source`, a regular file, on the disk: a reflink where that is possible."""
    image = _Local(source.fileno())
    if image.size_bytes > target.size_bytes:
        raise _too_small(target, image.size_bytes)
    if not _reflink(image, target):
        target.fill(_blocks(image), image.size_bytes)


def _reflink(image: _Local, target: Target) -> bool:
    """Let the file share the image's blocks; False where it cannot."""
    if target.disk.path is None or target.is_device:
        return False
    with target.opened(writable=True) as handle:
        assert isinstance(handle, _Local)
        os.ftruncate(handle.descriptor, 0)
        try:
            fcntl.ioctl(handle.descriptor, FICLONE, image.descriptor)
        except OSError as error:
            log.debug(f"{target.label}: no reflink: {describe(error)}")
            return False
        finally:
            os.ftruncate(handle.descriptor, target.size_bytes)
    return True


def wipe_head(target: Target) -> None:
    """Make the disk unbootable: no first MiB, no second GPT in the last one; synced."""
    with target.opened(writable=True) as handle:
        _clear(handle)
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
                log.warning(f"{target.label}: its head could not be wiped, it may boot: {error}")
        raise


def sync(target: Target) -> None:
    """Return when the disk is on stable storage; writes to a URI were flushed one by one."""
    if target.disk.path is not None:
        with target.opened(writable=False) as handle:
            handle.sync()
