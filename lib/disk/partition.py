"""The partition table fitted to the disk, and a place for the seed found or made.

Everything is planned before the disk is touched: sfdisk edits a stand-in, a sparse file of the
disk's size that holds only the table, and what it changed becomes a list of writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Optional

from lib import log, run, workspace
from lib.disk.partition_table import (
    HEAD_SECTORS,
    MBR_LIMIT,
    SECTOR,
    Header,
    Partition,
    Sectors,
    Table,
    look,
    protective,
    read_header,
    write_header,
)
from lib.errors import Error, context
from lib.sandbox import Limits, Sandbox

Read = Callable[[int, int], bytes]  # offset and length in bytes

MIN_SEED_SECTORS = 512
TAIL_SECTORS = 8192  # 4 MiB
GPT_GAP_FIRST = 64
MBR_GAP_FIRST = 1024  # GRUB's core image lies below
SEED_NAME, DRIVE_NAME = "cidata", "config-drive"
BASIC_DATA, FAT16 = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7", "06"
WAY_OUT = "add a second disk, --disk 1:size=4m,name=cidata, or set seed=none"


@dataclass(frozen=True)
class Extent:
    """A place for a seed on the disk."""

    offset_bytes: int
    size_bytes: int
    kind: str  # gap, tail, config-drive, cidata (one that was there: a partition or a whole disk)

    @property
    def first(self) -> int:
        """Its first sector."""
        return self.offset_bytes // SECTOR


@dataclass(frozen=True)
class Plan:
    """What to write to the disk after the image, and where the seed goes."""

    writes: tuple[tuple[int, bytes], ...]
    seed: Optional[Extent]


def plan(read: Read, image_size_bytes: int, disk_size_bytes: int, seed: str) -> Plan:
    """Return the writes that fit the image's table to the disk and make room for a seed.

    seed: auto, gap, tail or none. read() gives the image's bytes. A seed partition that the image
    has already (cidata) is used again whatever `seed` asks for: two would be ambiguous.
    Error: a damaged table, one that reaches behind the disk's end, no room for the seed.
    """
    image = _sectors(read, image_size_bytes)
    disk_sectors = disk_size_bytes // SECTOR
    table = look(image)
    if table is None and seed == "none":
        return Plan((), None)
    if table is None:
        sizes = f"image {log.size(image_size_bytes)}, disk {log.size(disk_size_bytes)}"
        raise Error(f"no room for a seed: the image has no partition table ({sizes})", WAY_OUT)
    for p in table.partitions:
        if p.last >= table.end(disk_sectors):
            raise Error(
                f"partition {p.number} of the image ends at sector {p.last}, "
                f"on the disk there is room up to {table.end(disk_sectors) - 1}",
                "make the disk larger (--disk 0:size=...)",
            )
    place = None
    if seed != "none":
        place = _place(table, image, image_size_bytes, disk_size_bytes, seed)
    new = None
    if place is not None and place.kind in ("gap", "tail") and table.free is not None:
        name = FAT16 if table.gpt is None else SEED_NAME
        last = place.first + place.size_bytes // SECTOR - 1
        new = Partition(table.free, place.first, last, name, b"")
    if table.gpt is None and new is None:
        return Plan((), place)
    ranges = _ranges(table, image, disk_sectors)
    with context("fitting the partition table to the disk"):
        edited = _edit(table, image(0, HEAD_SECTORS), disk_sectors, new, ranges)
    if table.gpt is not None:
        edited.insert(0, (0, protective(image(0, 1), disk_sectors)))
    writes = (
        (offset, data)
        for offset, data in edited
        if offset + len(data) > image_size_bytes or data != read(offset, len(data))
    )
    return Plan(tuple(writes), place)


def end_bytes(read: Read, size_bytes: int) -> int:
    """Return where the last partition ends that the table of a disk or dump names; 0 for none."""
    try:
        table = look(_sectors(read, size_bytes))
    except Error:
        return 0
    return max((p.last + 1 for p in table.partitions), default=0) * SECTOR if table else 0


def find_seed(read: Read, size_bytes: int) -> Optional[Extent]:
    """Return where a disk has its seed, or None. The disk is the guest's: nothing is trusted.

    Only a FAT volume labelled cidata counts, on the whole disk or in one of the first four
    partitions that are made for it: each costs a look at the disk.
    """
    disk = _sectors(read, size_bytes)
    end = size_bytes // SECTOR
    if _is_seed(disk(0, 1)):
        return _extent(0, end, SEED_NAME)
    try:
        table = look(disk)
    except Error as error:
        log.warning(f"looking for the seed: {error.message}")
        return None
    places = [] if table is None else _seed_partitions(table, end)
    return next((each for each in places[:4] if _is_seed(disk(each.first, 1))), None)


def _sectors(read: Read, size_bytes: int) -> Sectors:
    def sectors(first: int, count: int) -> bytes:
        inside = max(0, min(count * SECTOR, size_bytes - first * SECTOR))
        return (read(first * SECTOR, inside) if inside else b"").ljust(count * SECTOR, b"\0")

    return sectors


# The seed's place


def _extent(first: int, end: int, kind: str) -> Extent:
    return Extent(first * SECTOR, (end - first) * SECTOR, kind)


def _is_seed(sector: bytes) -> bool:
    """Whether a FAT volume labelled cidata starts here (FAT12 and FAT16, FAT32)."""
    return sector[510:] == b"\x55\xaa" and any(
        sector[at:].startswith(b"FAT")
        and sector[at - 11 : at].rstrip().lower() == SEED_NAME.encode()
        for at in (54, 82)
    )


def _seed_partitions(table: Table, end: int) -> list[Extent]:
    """Return the partitions before sector `end` that are named (MBR: typed) for a seed."""
    names = (FAT16,) if table.gpt is None else (SEED_NAME, DRIVE_NAME)
    return [
        _extent(p.first, p.last + 1, SEED_NAME if p.name == FAT16 else p.name)
        for p in table.partitions
        if p.name in names and p.last < end and p.last - p.first + 1 >= MIN_SEED_SECTORS
    ]


def _place(table: Table, image: Sectors, image_size: int, disk_size: int, seed: str) -> Extent:
    """Return the first place that the image and `seed` allow."""
    for each in _seed_partitions(table, disk_size // SECTOR):
        is_wanted = seed == "auto" or each.kind == SEED_NAME
        if is_wanted and (table.gpt is not None or _is_seed(image(each.first, 1))):
            return each
    reasons = []
    for kind in ("gap", "tail") if seed == "auto" else (seed,):
        try:
            if table.free is None:
                raise Error("no entry of the table is free")
            return _gap(table, image) if kind == "gap" else _tail(table, image_size, disk_size)
        except Error as error:
            reasons.append(f"{kind}: {error.message}")
    raise Error(
        f"no room for a seed: {'; '.join(reasons)} "
        f"({table}; image {log.size(image_size)}, disk {log.size(disk_size)})",
        WAY_OUT,
    )


def _gap(table: Table, image: Sectors) -> Extent:
    """Return the unused sectors before the first partition: root stays the last one and grows."""
    first = MBR_GAP_FIRST
    if table.gpt is not None:
        first = max(GPT_GAP_FIRST, -(-table.gpt.array_end // 8) * 8)
    end = min([HEAD_SECTORS, *(p.first for p in table.partitions)])
    if end - first < MIN_SEED_SECTORS:
        size = log.size(MIN_SEED_SECTORS * SECTOR)
        raise Error(f"no {size} between sector {first} and the first partition at {end}")
    if image(first, end - first).strip(b"\0"):
        raise Error(f"sectors {first} to {end - 1} are not empty")
    return _extent(first, end, "gap")


def _tail(table: Table, image_size: int, disk_size: int) -> Extent:
    """Return the last 4 MiB of the disk, aligned to 1 MiB, if the image ends before them."""
    end = table.end(disk_size // SECTOR)
    if table.gpt is None:
        end = min(end, MBR_LIMIT - 1)  # sfdisk gives away no more since 2.41
    first = (end - TAIL_SECTORS) // HEAD_SECTORS * HEAD_SECTORS
    used = max([-(-image_size // SECTOR), *(p.last + 1 for p in table.partitions)])
    if first < used:
        raise Error("the disk is too little larger than the image for 4 MiB, aligned")
    return _extent(first, first + TAIL_SECTORS, "tail")


# The stand-in


def _ranges(table: Table, image: Sectors, disk_sectors: int) -> list[tuple[int, int]]:
    """Return the (first sector, count) pairs that hold the table, before and after the edit."""
    gpt = table.gpt
    if gpt is None:
        return [(0, 1)]
    end = table.end(disk_sectors)
    ranges = [(1, 1), (gpt.array_lba, gpt.array_sectors), (end, disk_sectors - end)]
    # the image's second copy would be left where the root file system grows
    first = gpt.alternate_lba - gpt.array_sectors
    second = read_header(image(gpt.alternate_lba, 1), gpt.alternate_lba)
    if second is None:
        log.warning("the image's GPT has no valid second copy: made anew from the first")
    elif second.array_lba == first >= HEAD_SECTORS:
        count = min(gpt.alternate_lba + 1, end) - first
        if count > 0 and all(p.last < first or p.first >= first + count for p in table.partitions):
            ranges.append((first, count))
    return ranges


def _edit(
    table: Table,
    head: bytes,
    disk_sectors: int,
    new: Optional[Partition],
    ranges: Sequence[tuple[int, int]],
) -> list[tuple[int, bytes]]:
    """Let sfdisk spread the table and add a partition; return what is then in `ranges`, and where.

    It edits in place (-N): a dump and restore would write every entry anew from text and lose
    attribute bits 3 to 47 and malformed names. It sees the head only: the GPT's second copy is
    made from the first, and the logical partitions of an MBR are none of our business.
    """
    gpt = _spread(table, disk_sectors, new)
    # a file with a name, as bubblewrap binds none without one
    with workspace.folder() as work, open(work / "disk", "w+b") as stand_in:

        def disk(first: int, count: int) -> bytes:
            return os.pread(stand_in.fileno(), count * SECTOR, first * SECTOR)

        stand_in.write(head)
        if gpt is not None:
            stand_in.seek(SECTOR)
            stand_in.write(write_header(head[SECTOR : 2 * SECTOR], gpt))
        # a free sector for an MBR on a full disk, which knows no size: sfdisk looks for one first
        stand_in.truncate((disk_sectors + (0 if gpt else HEAD_SECTORS)) * SECTOR)
        if new is None:
            _sfdisk(stand_in, "--no-tell-kernel", "--relocate", "gpt-bak-std")
        else:
            kind = f"{BASIC_DATA}, name={new.name}" if gpt else new.name
            _sfdisk(
                stand_in,
                *("--no-reread", "--no-tell-kernel", "--wipe=never", "--wipe-partitions=never"),
                *("-N", str(new.number)),
                script=f"start={new.first}, size={new.last - new.first + 1}, type={kind}\n",
            )
        after = look(disk)
        if (
            after is None
            or not _only_added(table, after, new)
            or not (_is_spread(gpt, after.gpt, disk) if gpt else _is_kept(head, disk(0, 1), new))
            or not {p[:3] for p in after.partitions} <= _listed(stand_in)
        ):
            raise Error("sfdisk did something else than it was asked to", "report this as a bug")
        return [(first * SECTOR, disk(first, count)) for first, count in ranges]


def _spread(table: Table, disk_sectors: int, new: Optional[Partition]) -> Optional[Header]:
    """Return the GPT's header as the disk must have it, but for the checksums.

    sfdisk would find the second copy's place too, but stays above FirstUsableLBA. It goes down
    for the gap: growpart and systemd-repart fail in a guest over a partition that lies before it.
    """
    if table.gpt is None:
        return None
    first = table.gpt.first_lba
    if new is not None and new.first < HEAD_SECTORS:  # no tail lies there
        first = min(first, max(34, table.gpt.array_end))
    return table.gpt._replace(
        first_lba=first, last_lba=table.end(disk_sectors) - 1, alternate_lba=disk_sectors - 1
    )


def _sfdisk(stand_in: BinaryIO, *options: str, script: str = "") -> str:
    return run.run(
        ["sfdisk", *options, "/disk"],
        input=script.encode(),
        sandbox=Sandbox(
            write={"/disk": stand_in.fileno()},
            limits=Limits(file_size_bytes=stand_in.seek(0, os.SEEK_END), cpu_s=10, wall_s=30),
        ),
    )


def _listed(stand_in: BinaryIO) -> set[tuple[int, int, int]]:
    """Return number, first and last sector of what sfdisk takes for partitions.

    Numbers only: the names are the image's, and one that is no Unicode breaks --json.
    """
    text = _sfdisk(stand_in, "--list", "--output=Device,Start,End")
    rows = re.findall(r"^/disk(\d+) +(\d+) +(\d+)$", text, re.MULTILINE)
    return {(int(number), int(first), int(last)) for number, first, last in rows}


def _only_added(before: Table, after: Table, new: Optional[Partition]) -> bool:
    """Whether all entries are as they were, to the byte, and none but `new` was added."""
    entries = {p if p in before.partitions else p._replace(entry=b"") for p in after.partitions}
    return entries == {*before.partitions, *([] if new is None else [new])}


def _is_kept(before: bytes, after: bytes, new: Optional[Partition]) -> bool:
    """Whether nothing of an MBR's sector changed but the entry of `new`."""
    at = SECTOR if new is None else 430 + 16 * new.number
    return before[:at] + before[at + 16 : SECTOR] == after[:at] + after[at + 16 :]


def _is_spread(gpt: Header, found: Optional[Header], disk: Sectors) -> bool:
    """Whether the GPT that was found has this header, but for the checksums, and twice."""
    return (
        found is not None
        and found._replace(crc=gpt.crc, array_crc=gpt.array_crc) == gpt
        and found.is_mirrored(disk)
    )
