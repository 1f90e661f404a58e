"""The partition table: spread to the disk's end, and a place for the seed found or added.

Everything is planned before the disk is touched: sfdisk edits a stand-in, a sparse file of the
disk's size that holds only the table, and what it changed becomes a list of writes. The formats:
UEFI specification, chapter 5 (GPT); libfdisk's and Linux's readers for what an MBR is.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional, Union

from lib import log, run
from lib.errors import Error, context

Read = Callable[[int, int], bytes]  # offset and length in bytes
Sectors = Callable[[int, int], bytes]  # first sector and count; zeroes behind the end

SECTOR = 512
HEAD_SECTORS = 2048  # the first MiB
MIN_SEED_SECTORS = 512
TAIL_SECTORS = 8192  # 4 MiB
GPT_GAP_FIRST = 64
MBR_GAP_FIRST = 1024  # GRUB's core image lies below
MBR_LIMIT = 1 << 32  # sectors that an MBR can address
MAX_SLOTS = 1024  # GPT entries; images have 128, rarely fewer
SEED_NAME, DRIVE_NAME = "cidata", "config-drive"
BASIC_DATA = uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")
FAT16, PROTECTIVE = 0x06, 0xEE  # types in an MBR
WAY_OUT = "add a second disk, --disk 1:size=4m,name=cidata, or set seed=none"


@dataclass(frozen=True)
class Extent:
    """A place for a seed on the disk."""

    offset_bytes: int
    size_bytes: int
    kind: str  # gap, tail, config-drive, cidata (one that was there: a partition or a whole disk)


@dataclass(frozen=True)
class Plan:
    """What to write to the disk after the image, and where the seed goes."""

    writes: tuple[tuple[int, bytes], ...]
    seed: Optional[Extent]


class _Header(NamedTuple):
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
        return -(-self.slots * self.entry_size // SECTOR)

    @property
    def array_end(self) -> int:
        return self.array_lba + self.array_sectors


_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_MBR_ENTRY = struct.Struct("<B3sB3sII")


class _Partition(NamedTuple):
    number: int
    first: int  # sectors, both inclusive
    last: int
    name: str  # of a GPT partition; of an MBR one its type in hex
    entry: bytes  # as the table has it


@dataclass(frozen=True)
class _Table:
    partitions: tuple[_Partition, ...]
    slots: int  # how many entries it has room for
    gpt: Optional[_Header] = None  # None: an MBR

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
        return f"{label} with {len(self.partitions)} partitions from sector {first} to {last}"


def plan(read: Read, image_size_bytes: int, disk_size_bytes: int, seed: str) -> Plan:
    """Return the writes that fit the image's table to the disk and make room for a seed.

    seed: auto, gap, tail or none. read() gives the image's bytes. A seed partition that the image
    has already (named cidata) is used again whatever `seed` asks for: two would be ambiguous.
    Error: a damaged table, one that reaches behind the disk's end, no room for the seed.
    """
    image = _sectors(read, image_size_bytes)
    disk_sectors = disk_size_bytes // SECTOR
    table = _look(image)
    if table is None and seed != "none":
        sizes = f"image {log.size(image_size_bytes)}, disk {log.size(disk_size_bytes)}"
        raise Error(f"no room for a seed: the image has no partition table ({sizes})", WAY_OUT)
    if table is None:
        return Plan((), None)
    for p in table.partitions:
        if p.last >= table.end(disk_sectors):
            raise Error(
                f"partition {p.number} of the image ends at sector {p.last}, "
                f"the disk has room up to {table.end(disk_sectors) - 1}",
                "make the disk larger (--disk 0:size=...)",
            )
    place = None
    if seed != "none":
        place = _place(table, image, image_size_bytes, disk_size_bytes, seed)
    added = place if place is not None and place.kind in ("gap", "tail") else None
    if table.gpt is None and added is None:
        return Plan((), place)
    with context("fitting the partition table to the disk"):
        ranges = _ranges(table, image, disk_sectors)
        edited = _edit(table, image(0, HEAD_SECTORS), disk_sectors, added, ranges)
    inside = image_size_bytes // SECTOR
    return Plan(
        tuple(
            (first * SECTOR, data)
            for (first, count), data in zip(ranges, edited)
            if first + count > inside or data != image(first, count)
        ),
        place,
    )


def find_seed(read: Read, size_bytes: int) -> Optional[Extent]:
    """Return where a disk has its seed, or None. The disk is the guest's: nothing is trusted.

    Only a FAT volume labelled cidata counts, on the whole disk or in a partition made for it.
    """
    disk = _sectors(read, size_bytes)
    end = size_bytes // SECTOR
    if _is_seed(disk(0, 1)):
        return _extent(0, end, SEED_NAME)
    try:
        table = _look(disk)
    except Error as error:
        log.warning(f"looking for the seed: {error.message}")
        return None
    places = [] if table is None else _seed_partitions(table, end)
    return next((each for each in places[:4] if _is_seed(_boot_sector(disk, each))), None)


def _sectors(read: Read, size_bytes: int) -> Sectors:
    def sectors(first: int, count: int) -> bytes:
        inside = max(0, min(count * SECTOR, size_bytes - first * SECTOR))
        return (read(first * SECTOR, inside) if inside else b"").ljust(count * SECTOR, b"\0")

    return sectors


# What a table says


def _look(sectors: Sectors) -> Optional[_Table]:
    """Return the partition table; None if there is none, Error if it is a damaged GPT.

    A file system's boot sector ends in 55AA too, with code where an MBR has its entries: these
    must make sense, as Linux wants it (block/partitions/msdos.c) and a little more.
    """
    mbr = sectors(0, 1)
    partitions, flags = [], set()
    for number in range(1, 5):
        entry = mbr[430 + 16 * number :][:16]
        flag, _, kind, _, first, count = _MBR_ENTRY.unpack(entry)
        if kind == PROTECTIVE and first == 1 and mbr[510:] == b"\x55\xaa":
            return _look_gpt(sectors)
        flags.add(flag)
        if kind and count:
            partitions.append(_Partition(number, first, first + count - 1, f"{kind:02x}", entry))
    if mbr[510:] != b"\x55\xaa" or not partitions or not flags <= {0, 0x80}:
        return None
    return _Table(tuple(partitions), 4) if _in_order(partitions, 1) else None


def _look_gpt(sectors: Sectors) -> _Table:
    """Return the GPT that a protective MBR announces, from its first copy.

    The second copy does not stand in for a damaged first one: GRUB and Linux would not take it
    either, and what damaged the table has hardly left the rest of an image whole.
    """
    header = _header(sectors(1, 1), 1)
    if header is None:
        if sectors(8, 1).startswith(b"EFI PART"):
            raise Error("the GPT is made for sectors of 4096 bytes", "take an image for 512")
        raise _damaged("no valid header in sector 1")
    if header.entry_size != _GPT_ENTRY.size or not 1 <= header.slots <= MAX_SLOTS:
        raise _damaged(f"{header.slots} entries of {header.entry_size} bytes")
    if header.array_lba < 2 or header.array_end > min(header.first_lba, HEAD_SECTORS):
        raise _damaged(f"entries in sectors {header.array_lba} to {header.array_end - 1}")
    array = sectors(header.array_lba, header.array_sectors)[: header.slots * _GPT_ENTRY.size]
    if zlib.crc32(array) != header.array_crc:
        raise _damaged("wrong checksum of its entries")
    partitions = []
    for number, fields in enumerate(_GPT_ENTRY.iter_unpack(array), 1):
        kind, _, first, last, _, label = fields
        if kind != bytes(16):
            name = label.decode("utf-16-le", "replace").partition("\0")[0]
            partitions.append(_Partition(number, first, last, name, _GPT_ENTRY.pack(*fields)))
    if not _in_order(partitions, header.array_end):
        raise _damaged("overlapping partitions")
    return _Table(tuple(partitions), header.slots, header)


def _header(sector: bytes, lba: int) -> Optional[_Header]:
    """Return the GPT header in this sector if it is valid."""
    header = _Header(*_HEADER.unpack_from(sector))
    if header.signature != b"EFI PART" or not _HEADER.size <= header.size <= SECTOR:
        return None
    return header if header.lba == lba and header.crc == _checksum(sector) else None


def _checksum(sector: Union[bytes, bytearray]) -> int:
    (size,) = struct.unpack_from("<I", sector, 12)
    return zlib.crc32(sector[:16] + bytes(4) + sector[20:size])


def _damaged(what: str) -> Error:
    return Error(f"the GPT is damaged: {what}", "fetch the image again, or repair it with sgdisk")


def _in_order(partitions: Sequence[_Partition], first: int) -> bool:
    """Whether no partition starts before `first`, ends before its start, or overlaps another."""
    for partition in sorted(partitions, key=lambda p: p.first):
        if not first <= partition.first <= partition.last:
            return False
        first = partition.last + 1
    return True


# The seed's place


def _extent(first: int, end: int, kind: str) -> Extent:
    return Extent(first * SECTOR, (end - first) * SECTOR, kind)


def _seed_partitions(table: _Table, end: int) -> list[Extent]:
    """Return the partitions before sector `end` that are named (MBR: typed) for a seed."""
    kinds = {SEED_NAME: SEED_NAME, DRIVE_NAME: DRIVE_NAME}
    if table.gpt is None:
        kinds = {f"{FAT16:02x}": SEED_NAME}
    return [
        _extent(p.first, p.last + 1, kinds[p.name])
        for p in table.partitions
        if p.name in kinds and p.last < end and p.last - p.first + 1 >= MIN_SEED_SECTORS
    ]


def _boot_sector(sectors: Sectors, extent: Extent) -> bytes:
    return sectors(extent.offset_bytes // SECTOR, 1)


def _is_seed(sector: bytes) -> bool:
    """Whether a FAT volume labelled cidata starts here (label and type, FAT12/16 and FAT32)."""
    return sector[510:] == b"\x55\xaa" and any(
        sector[at : at + 11].rstrip().lower() == SEED_NAME.encode()
        and sector[at + 11 :][:3] == b"FAT"
        for at in (43, 71)
    )


def _place(table: _Table, image: Sectors, image_size: int, disk_size: int, seed: str) -> Extent:
    """Return the first place that the image and `seed` allow."""
    for extent in _seed_partitions(table, disk_size // SECTOR):
        if extent.kind == DRIVE_NAME:
            usable = seed == "auto"
        else:
            usable = table.gpt is not None or _is_seed(_boot_sector(image, extent))
        if usable:
            return extent
    reasons = []
    for kind in ("gap", "tail") if seed == "auto" else (seed,):
        try:
            if len(table.partitions) == table.slots:
                raise Error(f"all {table.slots} entries are taken")
            return _gap(table, image) if kind == "gap" else _tail(table, image_size, disk_size)
        except Error as error:
            reasons.append(f"{kind}: {error.message}")
    raise Error(
        f"no room for a seed: {'; '.join(reasons)} "
        f"({table}; image {log.size(image_size)}, disk {log.size(disk_size)})",
        WAY_OUT,
    )


def _gap(table: _Table, image: Sectors) -> Extent:
    """Return the unused sectors before the first partition: root stays the last one and grows."""
    first = MBR_GAP_FIRST
    if table.gpt is not None:
        first = max(GPT_GAP_FIRST, -(-table.gpt.array_end // 8) * 8)
    end = min([HEAD_SECTORS, *(p.first for p in table.partitions)])
    if end - first < MIN_SEED_SECTORS:
        raise Error(f"the first partition starts at sector {end}")
    if image(first, end - first).strip(b"\0"):
        raise Error(f"sectors {first} to {end - 1} are not empty")
    return _extent(first, end, "gap")


def _tail(table: _Table, image_size: int, disk_size: int) -> Extent:
    """Return the last 4 MiB of the disk, aligned to 1 MiB, if the image ends before them."""
    first = (table.end(disk_size // SECTOR) - TAIL_SECTORS) // HEAD_SECTORS * HEAD_SECTORS
    used = max([-(-image_size // SECTOR), *(p.last + 1 for p in table.partitions)])
    if first < used:
        raise Error(f"less than 4 MiB behind the image (aligned, up to sector {first})")
    return _extent(first, first + TAIL_SECTORS, "tail")


# The stand-in


def _ranges(table: _Table, image: Sectors, disk_sectors: int) -> list[tuple[int, int]]:
    """Return the (first sector, count) pairs that hold the table, before and after the edit."""
    gpt = table.gpt
    if gpt is None:
        return [(0, 1)]
    end = table.end(disk_sectors)
    ranges = [(1, 1), (gpt.array_lba, gpt.array_sectors), (end, disk_sectors - end)]
    # the image's second copy would lie about in what becomes the root file system
    second = _header(image(gpt.alternate_lba, 1), gpt.alternate_lba)
    first = gpt.alternate_lba - gpt.array_sectors
    if second is None:
        log.warning("the second copy of the image's GPT is missing or damaged; made from the first")
    elif second.array_lba == first >= HEAD_SECTORS:
        count = min(gpt.alternate_lba + 1, end) - first
        if count > 0 and all(p.last < first or p.first >= first + count for p in table.partitions):
            ranges.append((first, count))
    return ranges


def _edit(
    table: _Table,
    head: bytes,
    disk_sectors: int,
    added: Optional[Extent],
    ranges: Sequence[tuple[int, int]],
) -> list[bytes]:
    """Let sfdisk spread the table and add a partition; return what is then in `ranges`.

    It edits in place (-N): a dump and restore would write every entry anew from text and lose
    attribute bits 3 to 47 and malformed names. It sees the head only: the GPT's second copy is
    made from the first, and the logical partitions of an MBR are none of our business.
    """
    number = min(set(range(1, table.slots + 2)) - {p.number for p in table.partitions})
    want = _wanted(table, disk_sectors, number, added)
    with _stand_in(head, want, disk_sectors) as stand_in:
        if added is None:
            _sfdisk(stand_in, "--no-tell-kernel", "--relocate", "gpt-bak-std")
        else:
            kind, name = (BASIC_DATA, f", name={SEED_NAME}") if table.gpt else (f"{FAT16:02x}", "")
            first, count = added.offset_bytes // SECTOR, added.size_bytes // SECTOR
            _sfdisk(
                stand_in,
                *("--no-reread", "--no-tell-kernel", "--wipe=never", "--wipe-partitions=never"),
                *("-N", str(number)),
                entry=f"start={first}, size={count}, type={kind}{name}\n",
            )

        def disk(first: int, count: int) -> bytes:
            return os.pread(stand_in, count * SECTOR, first * SECTOR)

        if not (
            _matches(want, number, head, disk, disk_sectors)
            and _listed(stand_in, table.slots)
            == {p.number: (p.first, p.last - p.first + 1) for p in want.partitions}
        ):
            raise Error("sfdisk did something else than it was asked to", "report this as a bug")
        return [disk(first, count) for first, count in ranges]


def _wanted(table: _Table, disk_sectors: int, number: int, added: Optional[Extent]) -> _Table:
    """Return the table as it must be after the edit, but for checksums and the new entry."""
    partitions, gpt = list(table.partitions), table.gpt
    if added is not None:
        first, count = added.offset_bytes // SECTOR, added.size_bytes // SECTOR
        name = SEED_NAME if gpt else f"{FAT16:02x}"
        partitions.append(_Partition(number, first, first + count - 1, name, b""))
    if gpt is not None:
        first_lba = gpt.first_lba
        if added is not None and added.kind == "gap":
            first_lba = min(first_lba, max(34, gpt.array_end))
        gpt = gpt._replace(
            crc=0,
            array_crc=0,
            first_lba=first_lba,
            last_lba=table.end(disk_sectors) - 1,
            alternate_lba=disk_sectors - 1,
        )
    return _Table(tuple(sorted(partitions)), table.slots, gpt)


@contextmanager
def _stand_in(head: bytes, want: _Table, disk_sectors: int) -> Iterator[int]:
    """Open a sparse file of the disk's size with this head, FirstUsableLBA already lowered.

    sfdisk adds nothing before FirstUsableLBA, and left as it is, a partition before it makes
    growpart and systemd-repart fail in the guest.
    """
    edited = bytearray(head)
    if want.gpt is not None:
        struct.pack_into("<Q", edited, SECTOR + 40, want.gpt.first_lba)
        struct.pack_into("<I", edited, SECTOR + 16, _checksum(edited[SECTOR : 2 * SECTOR]))
    # a file with a name: bubblewrap cannot bind one without
    with tempfile.TemporaryDirectory(prefix="cloudimage-") as directory:
        descriptor = os.open(Path(directory, "disk"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(descriptor, edited, 0)
            # a MiB more for an MBR: it says nothing of the size, and sfdisk wants a free sector
            spare = 0 if want.gpt else HEAD_SECTORS
            os.truncate(descriptor, (disk_sectors + spare) * SECTOR)
            yield descriptor
        finally:
            os.close(descriptor)


def _sfdisk(stand_in: int, *options: str, entry: str = "") -> str:
    return run.run(
        ["sfdisk", *options, "/disk"],
        input=entry.encode(),
        sandbox=run.Sandbox(
            write={"/disk": stand_in},
            limits=run.Limits(file_size_bytes=os.fstat(stand_in).st_size, cpu_s=10, wall_s=30),
        ),
    )


def _listed(stand_in: int, slots: int) -> dict[int, tuple[int, int]]:
    """Return first sector and size of the partitions that have an entry, by number, from sfdisk."""
    table = json.loads(_sfdisk(stand_in, "--json"))["partitiontable"]
    listed = {
        int(each["node"][len("/disk") :]): (int(each["start"]), int(each["size"]))
        for each in table.get("partitions", [])
    }
    return {number: extent for number, extent in listed.items() if number <= slots}


def _matches(want: _Table, number: int, head: bytes, disk: Sectors, disk_sectors: int) -> bool:
    """Whether the disk has the wanted table, and every entry but `number` as it was."""
    found = _look(disk)
    if found is None or _comparable(found, number) != want:
        return False
    if want.gpt is None:
        at = 430 + 16 * number
        mbr = disk(0, 1)
        return mbr[:at] + mbr[at + 16 :] == head[:at] + head[at + 16 : SECTOR]
    last, end = disk_sectors - 1, want.end(disk_sectors)
    second = _header(disk(last, 1), last)
    mirrored = want.gpt._replace(lba=last, alternate_lba=1, array_lba=end)
    return (
        second is not None
        and second._replace(crc=0, array_crc=0) == mirrored
        and disk(end, last - end) == disk(want.gpt.array_lba, last - end)
    )


def _comparable(table: _Table, number: int) -> _Table:
    """Return the table as _wanted() makes it."""
    partitions = [p._replace(entry=b"") if p.number == number else p for p in table.partitions]
    gpt = table.gpt and table.gpt._replace(crc=0, array_crc=0)
    return _Table(tuple(partitions), table.slots, gpt)
