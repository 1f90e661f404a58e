"""What a partition table says: GPT and MBR read from bytes that nobody vouches for.

The formats: UEFI specification, chapter 5 (GPT); Linux's and libfdisk's readers for what counts as
an MBR. Sizes and positions are sectors of 512 bytes, as everywhere in a guest's virtual disk.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

from lib.errors import Error

Sectors = Callable[[int, int], bytes]  # first sector and count; zeroes behind the end

SECTOR = 512
HEAD_SECTORS = 2048  # the first MiB: no table of a known image reaches further
MBR_LIMIT = 1 << 32  # sectors that an MBR can address
MAX_SLOTS = 1024  # GPT entries; images have 128, rarely fewer
PROTECTIVE = 0xEE

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_MBR_ENTRY = struct.Struct("<B3sB3sII")


class Header(NamedTuple):
    """A GPT header's fields, in the order of the format."""

    signature: bytes
    revision: int
    size: int
    crc: int
    reserved: int
    lba: int
    alternate_lba: int
    first_lba: int
    last_lba: int
    guid: bytes
    array_lba: int
    slots: int
    entry_size: int
    array_crc: int

    @property
    def array_sectors(self) -> int:
        """How many sectors the array of entries takes."""
        return -(-self.slots * self.entry_size // SECTOR)

    @property
    def array_end(self) -> int:
        """The first sector behind the array of entries."""
        return self.array_lba + self.array_sectors

    def is_mirrored(self, disk: Sectors) -> bool:
        """Whether the second copy, right behind what partitions may use, says the same."""
        lba, array_lba, length = self.alternate_lba, self.last_lba + 1, self.slots * self.entry_size
        second = read_header(disk(lba, 1), lba)
        if second is None:
            return False
        arrays = [disk(at, self.array_sectors)[:length] for at in (self.array_lba, array_lba)]
        mirrored = self._replace(lba=lba, alternate_lba=self.lba, array_lba=array_lba)
        return arrays[0] == arrays[1] and second == mirrored._replace(crc=second.crc)


class Partition(NamedTuple):
    """A partition with an entry of its own in the table: no logical ones."""

    number: int
    first: int
    last: int  # inclusive
    name: str  # GPT: its name; MBR: its type in hex
    entry: bytes  # as the table has it


@dataclass(frozen=True)
class Table:
    """A valid table: the partitions do not overlap, but may end behind the disk."""

    partitions: tuple[Partition, ...]
    free: Optional[int]  # the lowest number whose entry is all zeroes: libfdisk's idea of free
    gpt: Optional[Header] = None  # None: an MBR

    def end(self, disk_sectors: int) -> int:
        """Return the first sector behind what partitions may use on a disk of this size."""
        if self.gpt is None:
            return min(disk_sectors, MBR_LIMIT)
        return disk_sectors - 1 - self.gpt.array_sectors

    def __str__(self) -> str:
        label = "MBR" if self.gpt is None else "GPT"
        if not self.partitions:
            return f"{label} without partitions"
        first = min(p.first for p in self.partitions)
        last = max(p.last for p in self.partitions)
        return f"{label}, partitions in sectors {first} to {last}"


def look(sectors: Sectors) -> Optional[Table]:
    """Return the partition table; None if there is none, Error if it is a damaged GPT.

    A file system's boot sector ends in 55AA too, with code where an MBR has its entries: these
    must make sense, as Linux wants it (block/partitions/msdos.c) and a little more.
    """
    mbr = sectors(0, 1)
    if mbr[510:] != b"\x55\xaa":
        return None
    partitions, flags, entries = [], set(), _cut(mbr[446:510], 16)
    for number, entry in enumerate(entries, 1):
        flag, _, kind, _, first, count = _MBR_ENTRY.unpack(entry)
        if kind == PROTECTIVE and first == 1:
            return _look_gpt(sectors)
        flags.add(flag)
        if kind and count:
            partitions.append(Partition(number, first, first + count - 1, f"{kind:02x}", entry))
    if not partitions or not flags <= {0, 0x80} or not _in_order(partitions, 1):
        return None
    return Table(tuple(partitions), _free(entries))


def _look_gpt(sectors: Sectors) -> Table:
    """Return the GPT that a protective MBR announces, from its first copy.

    The second copy does not stand in for a damaged first one: GRUB and Linux would not take it
    either, and what damaged the table has hardly left the rest of an image whole.
    """
    header = read_header(sectors(1, 1), 1)
    if header is None:
        if sectors(8, 1).startswith(b"EFI PART"):
            raise Error("the GPT is for sectors of 4096 bytes", "take the image for sectors of 512")
        raise _damaged("no valid header in sector 1")
    if header.entry_size != _GPT_ENTRY.size or not 1 <= header.slots <= MAX_SLOTS:
        raise _damaged(f"{header.slots} entries of {header.entry_size} bytes")
    if header.array_lba < 2 or header.array_end > min(header.first_lba, HEAD_SECTORS):
        raise _damaged(f"entries in sectors {header.array_lba} to {header.array_end - 1}")
    if header.first_lba > header.last_lba:
        raise _damaged(f"room from sector {header.first_lba} to {header.last_lba}")
    array = sectors(header.array_lba, header.array_sectors)[: header.slots * _GPT_ENTRY.size]
    if zlib.crc32(array) != header.array_crc:
        raise _damaged("wrong checksum of its entries")
    partitions, entries = [], _cut(array, _GPT_ENTRY.size)
    for number, entry in enumerate(entries, 1):
        kind, _, first, last, _, label = _GPT_ENTRY.unpack(entry)
        if kind != bytes(16):
            name = label.decode("utf-16-le", "replace").partition("\0")[0]
            partitions.append(Partition(number, first, last, name, entry))
    if not _in_order(partitions, header.array_end):
        raise _damaged("overlapping partitions")
    return Table(tuple(partitions), _free(entries), header)


def _cut(array: bytes, size: int) -> list[bytes]:
    return [array[at : at + size] for at in range(0, len(array), size)]


def _free(entries: Sequence[bytes]) -> Optional[int]:
    return next((number for number, entry in enumerate(entries, 1) if not any(entry)), None)


def read_header(sector: bytes, lba: int) -> Optional[Header]:
    """Return the GPT header in this sector, `lba`, if it is valid."""
    header = Header(*_HEADER.unpack_from(sector))
    if header.signature != b"EFI PART" or not _HEADER.size <= header.size <= SECTOR:
        return None
    return header if header.lba == lba and header.crc == _checksum(sector) else None


def write_header(sector: bytes, header: Header) -> bytes:
    """Return a header's sector with other fields and the checksum that belongs to them."""
    packed = _HEADER.pack(*header) + sector[_HEADER.size :]
    return _HEADER.pack(*header._replace(crc=_checksum(packed))) + sector[_HEADER.size :]


def protective(mbr: bytes, disk_sectors: int) -> bytes:
    """Return the protective MBR with the size of the disk (UEFI 5.2.3); a hybrid one stays."""
    if mbr[450] != PROTECTIVE or any(mbr[462:510]):
        return mbr
    return mbr[:458] + struct.pack("<I", min(disk_sectors - 1, 0xFFFFFFFF)) + mbr[462:]


def _checksum(sector: bytes) -> int:
    (size,) = struct.unpack_from("<I", sector, 12)
    return zlib.crc32(sector[:16] + bytes(4) + sector[20:size])


def _damaged(what: str) -> Error:
    return Error(f"the GPT is damaged: {what}", "fetch the image again, or repair it with sgdisk")


def _in_order(partitions: Sequence[Partition], first: int) -> bool:
    """Whether no partition starts before `first`, ends before its start, or overlaps another."""
    for partition in sorted(partitions, key=lambda p: p.first):
        if not first <= partition.first <= partition.last:
            return False
        first = partition.last + 1
    return True
