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
from pathlib import Path
from typing import BinaryIO, Union

from lib import log, nbd
from lib.environment import Disk
from lib.errors import Error, describe

MIB = 1 << 20
BLOCK_BYTES = MIB
GRAIN_BYTES = 64 << 10  # the shortest run of zeroes that becomes a hole
ZERO_STEP_BYTES = 64 << 20  # one call to the kernel, so that a signal is soon heard
ZEROES = bytes(BLOCK_BYTES)

FICLONE = 0x40049409  # linux/fs.h
BLKROGET, BLKZEROOUT = 0x125E, 0x127F
PUNCH_HOLE_KEEP_SIZE = 0x3  # linux/falloc.h
QEMU_LOCK_BYTES = (100, 200)  # first, count: qemu's block/file-posix.c, RAW_LOCK_*_BASE

Block = Union[bytes, int]  # a disk's content in order: data, or the length of a run of zeroes
Blocks = Generator[Block, None, None]


class _Local:
    """An open file or block device."""

    def __init__(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self.descriptor = descriptor
        self.is_device = stat.S_ISBLK(status.st_mode)
        self.is_file = stat.S_ISREG(status.st_mode)
        self.size_bytes = os.lseek(descriptor, 0, os.SEEK_END)

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self.descriptor, length, offset)
        while len(data) < length:
            more = os.pread(self.descriptor, length - len(data), offset + len(data))
            if not more:
                raise Error(f"the disk ends at {offset + len(data)} bytes while it is read")
            data += more
        return data

    def write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self.descriptor, view, offset)
            # starts the write-back now, so that fsync finds little to do (0.40 s become 0.26 s
            # for 540 MiB on ext4), and keeps the node's page cache for its guests
            os.posix_fadvise(self.descriptor, offset, count, os.POSIX_FADV_DONTNEED)
            view, offset = view[count:], offset + count

    def zero(self, offset: int, length: int) -> None:
        end = offset + length
        if self.is_device:
            first, last = -(-offset // 4096) * 4096, end // 4096 * 4096
            for start in range(first, last, ZERO_STEP_BYTES):
                _zero_out(self.descriptor, start, min(ZERO_STEP_BYTES, last - start))
            if first < last:
                self.zero_by_writing(offset, first)
                offset = last
        self.zero_by_writing(offset, end)

    def zero_by_writing(self, offset: int, end: int) -> None:
        for start in range(offset, end, BLOCK_BYTES):
            self.write(start, ZEROES[: end - start])

    def sync(self) -> None:
        os.fsync(self.descriptor)

    def empty(self) -> None:
        """Turn a file into one hole of the same size (NFS knows truncation, but not punching)."""
        try:
            os.ftruncate(self.descriptor, 0)
        finally:
            os.ftruncate(self.descriptor, self.size_bytes)


_Handle = Union[_Local, nbd.Connection]


def _zero_out(descriptor: int, offset: int, length: int) -> None:
    """Make a range of a device read as zeroes: unmapped where the device promises zeroes then."""
    import ctypes  # 2 ms, and Python has no fallocate with a mode

    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_int64
    if libc.fallocate64(descriptor, PUNCH_HOLE_KEEP_SIZE, size(offset), size(length)) != 0:
        fcntl.ioctl(descriptor, BLKZEROOUT, struct.pack("QQ", offset, length))


@dataclass(eq=False)
class Target:
    """A disk that can be reached: a block device, a regular file, or a URI."""

    disk: Disk
    size_bytes: int
    is_device: bool
    touched: bool = field(default=False, init=False)  # a byte of it may have been written

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.disk.label

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on."""
        with self.opened(writable=False) as handle:
            return handle.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`; sync() makes it last."""
        with self.opened(writable=True) as handle:
            handle.write(offset, data)

    @contextmanager
    def opened(self, *, writable: bool) -> Iterator[_Handle]:
        """Open the disk; a URI is flushed on leaving, anything else by sync()."""
        with _opened(self.disk, os.O_RDWR if writable else os.O_RDONLY) as handle:
            self.touched = self.touched or writable
            yield handle


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
        return Error(f"{path}: no such disk", "run gnt-instance activate-disks")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return Error(
            f"{path}: the disk is read-only", "set it writable, or run on the primary node"
        )
    if error.errno == errno.EMEDIUMTYPE:
        return Error(f"{path}: DRBD is secondary on this node", "run on the primary node")
    if error.errno == errno.EBUSY:
        return Error(f"{path}: in use: {_user(path)}", "release it, then run this again")
    return Error(f"{path}: {describe(error)}")


def _user(path: Path) -> str:
    """Name who holds a block device, as far as the kernel tells."""
    number = os.stat(path).st_rdev
    name = f"{os.major(number)}:{os.minor(number)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[2] == name:
                return f"mounted on {fields[4]}"
    try:
        holders = os.listdir(f"/sys/dev/block/{name}/holders")
    except OSError:
        holders = []
    return f"part of {' '.join(holders)}" if holders else "a running instance or another create"


def require(disk: Disk, image_size_bytes: int = 0) -> Target:
    """Return the disk as a target; Error unless it can be reached and holds that many bytes."""
    with _opened(disk, os.O_RDONLY) as handle:
        is_device = isinstance(handle, _Local) and handle.is_device
        if isinstance(handle, _Local) and not (handle.is_device or handle.is_file):
            raise Error(f"{disk.label}: neither a block device nor a regular file")
        target = Target(disk, handle.size_bytes, is_device)
    if target.size_bytes == 0:
        raise Error(f"{disk.label}: the disk has no bytes", "run gnt-instance activate-disks")
    if image_size_bytes > target.size_bytes:
        raise _too_small(target, image_size_bytes)
    return target


def _too_small(target: Target, needed_bytes: int) -> Error:
    gib = -(-needed_bytes // (1 << 30))
    mib = -(-needed_bytes // MIB)
    return Error(
        f"{target.label}: {log.size(needed_bytes)} ({needed_bytes} bytes) do not fit on the disk "
        f"of {log.size(target.size_bytes)} ({target.size_bytes} bytes)",
        f"use --disk {target.disk.index}:size={f'{gib}G' if needed_bytes > 1 << 30 else f'{mib}M'}",
    )


@contextmanager
def claim(target: Target) -> Iterator[None]:
    """Keep others off the disk while it is written; Error that names who has it.

    A device by O_EXCL, as mount, LVM and DRBD take it. A file by a lock on the bytes that qemu
    locks of an image in use, which keeps running instances and other runs of ours apart. A URI
    has no such thing; some of qemu's drivers lock by themselves.
    """
    if target.disk.path is None:
        yield
        return
    with _opened(target.disk, os.O_RDWR | (os.O_EXCL if target.is_device else 0)) as handle:
        assert isinstance(handle, _Local)
        if handle.is_device:
            if any(fcntl.ioctl(handle.descriptor, BLKROGET, bytes(4))):
                raise _unusable(target.disk.path, OSError(errno.EROFS, ""))
        else:
            _lock(target.disk.path, handle.descriptor)
        yield


def _lock(path: Path, descriptor: int) -> None:
    first, count = QEMU_LOCK_BYTES
    # of the open file, not of the process: others of our descriptors come and go meanwhile
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, first, count, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise Error(
                f"{path}: in use: a running instance or another create",
                "release it, then run this again",
            ) from None
        log.debug(f"{path}: no locks here: {describe(error)}")


def blocks(target: Target) -> Blocks:
    """Read the whole disk; what the file system knows to be a hole is not read."""
    with target.opened(writable=False) as handle:
        yield from _blocks(handle)


def _blocks(handle: _Handle) -> Blocks:
    for start, end, is_data in _extents(handle):
        if not is_data:
            yield end - start
            continue
        for offset in range(start, end, BLOCK_BYTES):
            yield handle.read(offset, min(BLOCK_BYTES, end - offset))


def _extents(handle: _Handle) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, is data) over the whole disk; without holes where none are known."""
    size = handle.size_bytes
    if not isinstance(handle, _Local) or handle.is_device:
        yield 0, size, True
        return
    end = 0
    while end < size:
        try:
            start = os.lseek(handle.descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            start = size
        if start > end:
            yield end, start, False
        if start < size:
            end = os.lseek(handle.descriptor, start, os.SEEK_HOLE)
            yield start, end, True
        else:
            end = size


def write(source: BinaryIO, target: Target) -> None:
    """Put the raw image `source`, a regular file, on the disk: a reflink where that is possible."""
    image = _Local(source.fileno())
    if image.size_bytes > target.size_bytes:
        raise _too_small(target, image.size_bytes)
    if target.disk.path is not None and not target.is_device and _reflink(image, target):
        return
    fill(target, _blocks(image))


def _reflink(image: _Local, target: Target) -> bool:
    with target.opened(writable=True) as handle:
        assert isinstance(handle, _Local)
        try:
            os.ftruncate(handle.descriptor, 0)
            fcntl.ioctl(handle.descriptor, FICLONE, image.descriptor)
        except OSError as error:
            log.debug(f"no reflink: {describe(error)}")
            return False
        finally:
            os.ftruncate(handle.descriptor, target.size_bytes)
    return True


def fill(target: Target, content: Blocks) -> int:
    """Write `content` from the disk's start on and return its length in bytes.

    Zeroes are holes in a file and real on anything else. The first MiB is held back until
    `content` has ended without an exception and the rest is on stable storage: what is cut short,
    by a power cut too, does not boot. Stale data goes from the first 1 to 2 MiB behind the
    content's end, where a partition made later would begin (signatures lie in its first MiB), and
    from the last MiB of the disk (second GPT, md 0.90 and 1.0, ZFS).
    """
    head = bytearray()
    end = 0
    with closing(content), target.opened(writable=True) as handle:
        is_blank = isinstance(handle, _Local) and handle.is_file
        if isinstance(handle, _Local) and handle.is_file:
            handle.empty()
        else:
            _wipe_ends(handle)
        for block in content:
            length = block if isinstance(block, int) else len(block)
            if end + length > target.size_bytes:
                raise _too_small(target, end + length + sum(map(_length, content)))
            held = max(0, min(length, MIB - end))
            head += bytes(held) if isinstance(block, int) else block[:held]
            for offset, piece in _pieces(block, held):
                if not isinstance(piece, int):
                    handle.write(end + offset, piece)
                elif not is_blank:
                    handle.zero(end + offset, piece)
            end += length
        if not is_blank:
            # the last MiB was wiped before
            handle.zero(end, min(target.size_bytes, -(-end // MIB) * MIB + MIB) - end)
        handle.sync()
        handle.write(0, bytes(head))
    return end


def _length(block: Block) -> int:
    return block if isinstance(block, int) else len(block)


def _pieces(block: Block, start: int) -> Iterator[tuple[int, Block]]:
    """Yield (offset, piece) for `block` from `start` on, long runs of zeroes as their length."""
    if isinstance(block, int):
        if block > start:
            yield start, block - start
        return
    end = len(block)
    run_start, run_is_zero = start, False
    for offset in range(start, end, GRAIN_BYTES):
        grain = block[offset : offset + GRAIN_BYTES]
        is_zero = grain == ZEROES[: len(grain)]
        if is_zero != run_is_zero:
            if offset > run_start:
                yield run_start, offset - run_start if run_is_zero else block[run_start:offset]
            run_start, run_is_zero = offset, is_zero
    if end > run_start:
        yield run_start, end - run_start if run_is_zero else block[run_start:]


def _wipe_ends(handle: _Handle) -> None:
    length = min(MIB, handle.size_bytes)
    handle.zero(0, length)
    handle.zero(handle.size_bytes - length, length)


def wipe_head(target: Target) -> None:
    """Zero the first MiB, and the last, where firmware would find the second GPT; then sync."""
    with target.opened(writable=True) as handle:
        _wipe_ends(handle)
        handle.sync()


@contextmanager
def unbootable_on_failure(target: Target) -> Iterator[None]:
    """Wipe the disk's ends if the block fails after the first byte; its exception goes on."""
    try:
        yield
    except BaseException:
        if target.touched:
            try:
                wipe_head(target)
            except (Error, OSError) as error:
                log.warning(f"{target.label}: could not be made unbootable: {error}")
        raise


def sync(target: Target) -> None:
    """Return when the disk is on stable storage; what goes to a URI is flushed by each write."""
    if target.disk.path is not None:
        with target.opened(writable=False) as handle:
            handle.sync()
