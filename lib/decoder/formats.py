"""What the headers of disk images say: our own look, before any other program parses the file.

Every parser takes a bounded `read` and the file's size, and returns the size of the virtual disk
in bytes. It raises an Error for whatever refers to another file, lies outside this one, or is not
known; the message is what follows "the qcow2 image". Names and texts in a header are an
attacker's, so none is ever printed.
Sources: qemu's docs/interop/qcow2.txt and block/{vmdk,vdi,vpc,vhdx}.c, VMware's Virtual Disk
Format 5.0, Microsoft's Virtual Hard Disk Image Format 1.0 and [MS-VHDX].
"""

from __future__ import annotations

import re
import struct
import sys
import uuid
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

from lib.decoder.magic import CONVERT, DECRYPT, SECTOR, Read
from lib.errors import Error

_TABLE_BYTES = 64 << 20  # qemu's own limit on an L1 table is half of it
_DAMAGED = "fetch it again; its source may be damaged"


def _read(read: Read, offset: int, length: int) -> bytes:
    data = read(offset, length)
    if len(data) < length:
        raise Error("ends within its header", _DAMAGED)
    return data


def _fields(read: Read, offset: int, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, _read(read, offset, struct.calcsize(layout)))


def _inside(what: str, offset: int, length: int, size: int) -> None:
    if offset + length > size:
        raise Error(f"is cut short: its {what} lies outside the file", _DAMAGED)


def _impossible() -> Error:
    return Error("has an impossible header", _DAMAGED)


def _table(read: Read, offset: int, entries: int, code: str, byteorder: str) -> array[int]:
    table = array(code)
    if entries * table.itemsize > _TABLE_BYTES:
        raise Error(f"has a table of more than {_TABLE_BYTES >> 20} MiB", "use larger clusters")
    table.frombytes(_read(read, offset, entries * table.itemsize))
    if byteorder != sys.byteorder:
        table.byteswap()
    return table


# -- qcow2 ------------------------------------------------------------------------------------

_QCOW2_KNOWN = 1 << 0 | 1 << 3 | 1 << 4  # dirty, compression type, extended L2 entries
_QCOW2_OFFSET = 0x00FFFFFFFFFFFE00
_QCOW2_COMPRESSED = 1 << 62
_QCOW2_SNAPSHOTS = 64  # 65536 of them cost qemu-img 350 MiB and 8 s
_QCOW2_L1_BYTES, _QCOW2_REFCOUNT_BYTES = 32 << 20, 8 << 20  # qemu's own limits
_QCOW2_L2_BYTES = 1 << 30  # 8 TiB in clusters of 64 KiB


def qcow2(read: Read, size: int) -> int:
    """Check a qcow2 image of version 2 or 3."""
    header = qcow2_header(read, size)
    l1 = _table(read, header.l1, header.l1_entries, "Q", "big")
    _qcow2_clusters(read, size, l1, header.bits, header.entry_bytes)
    return header.virtual_bytes


class Qcow2(NamedTuple):
    """What the header of a qcow2 image says; l1_entries: those that are needed."""

    virtual_bytes: int
    bits: int
    entry_bytes: int
    l1: int
    l1_entries: int

    @property
    def span_bytes(self) -> int:
        """How much of the disk one L2 table is about."""
        return (1 << self.bits) * ((1 << self.bits) // self.entry_bytes)


def qcow2_header(read: Read, size: int) -> Qcow2:
    """Check what a qcow2 image says before its first cluster."""
    version, backing, bits, virtual, crypt = _fields(read, 4, ">IQ4xIQI")
    l1_entries, l1, refcounts, clusters, snapshots, table = _fields(read, 36, ">IQQIIQ")
    features = header_bytes = 0
    if version == 3:
        features, autoclear, order, header_bytes = _fields(read, 72, ">Q8xQII")
        if features & 1 << 2 or autoclear & 1 << 1:
            raise Error("keeps its data in another file", CONVERT)
        if features & 1 << 1:
            raise Error("is marked as corrupt", _DAMAGED)
        if features & ~_QCOW2_KNOWN:
            raise Error(f"needs unknown features ({features & ~_QCOW2_KNOWN:#x})", CONVERT)
        if order > 6 or header_bytes < 104 or header_bytes % 8:
            raise _impossible()
    if backing:
        raise Error("has a backing file", CONVERT)
    if crypt:
        raise Error("is encrypted", DECRYPT)
    if not 9 <= bits <= 21:
        raise Error(f"has clusters of 2^{bits} bytes", _DAMAGED)
    cluster = 1 << bits
    _qcow2_extensions(read, header_bytes or 72, cluster)
    entry_bytes = 16 if features & 1 << 4 else 8
    needed = -(-virtual // (cluster * (cluster // entry_bytes)))
    if not needed <= l1_entries <= _QCOW2_L1_BYTES // 8:
        raise Error(f"has an L1 table of {l1_entries} entries and needs {needed}", _DAMAGED)
    if not 0 < clusters <= _QCOW2_REFCOUNT_BYTES // cluster or refcounts % cluster or l1 % cluster:
        raise _impossible()
    if snapshots > _QCOW2_SNAPSHOTS:
        raise Error(f"has {snapshots} snapshots, at most {_QCOW2_SNAPSHOTS} pass", CONVERT)
    _inside("L1 table", l1, l1_entries * 8, size)
    _inside("refcount table", refcounts, clusters * cluster, size)
    _inside("snapshot table", table, snapshots * 40, size)
    return Qcow2(virtual, bits, entry_bytes, l1, needed)


def _qcow2_extensions(read: Read, position: int, cluster: int) -> None:
    for _ in range(64):
        if position + 8 > cluster:
            return
        code, length = _fields(read, position, ">II")
        if code == 0:
            return
        if code == 0x44415441:
            raise Error("names an external data file", CONVERT)
        position += 8 + -(-length // 8) * 8
    raise Error("has more than 64 header extensions", _DAMAGED)


def _qcow2_clusters(read: Read, size: int, l1: array[int], bits: int, entry_bytes: int) -> None:
    """See that L2 tables and compressed clusters lie inside the file.

    `qemu-img map` tells the places of plain clusters only, and `qemu-img check` lets pass whatever
    is cut off by less than a cluster: without this, the last 512 bytes of a compressed image can be
    missing, and the guest's disk is silently wrong.
    """
    cluster = 1 << bits
    tables = {entry & _QCOW2_OFFSET for entry in l1} - {0}
    if tables:
        _inside("last L2 table", max(tables), cluster, size)
    if len(tables) * cluster > _QCOW2_L2_BYTES:
        raise Error("has more than 1 GiB of L2 tables", "use larger clusters")
    shift = 62 - (bits - 8)
    place, count = (1 << shift) - 1, (1 << 62 - shift) - 1
    for offset in tables:
        entries = _table(read, offset, cluster // 8, "Q", "big")[:: entry_bytes // 8]
        # a compressed cluster ends with the sector that begins `count` sectors after its first
        last = max(
            (
                (e & place) // SECTOR + (e >> shift & count) + 1
                for e in entries
                if e & _QCOW2_COMPRESSED
            ),
            default=0,
        )
        _inside("last compressed cluster", 0, last * SECTOR, -(-size // SECTOR) * SECTOR)


# -- vmdk -------------------------------------------------------------------------------------

_VMDK_DESCRIPTOR = (SECTOR, 20 * SECTOR)  # where qemu reads it, whatever the header says
_VMDK_GD_AT_END = (1 << 64) - 1
_VMDK_LINE = re.compile(r'([A-Za-z][A-Za-z0-9._-]*)\s*=\s*("[^"]*"|[^\s"]*)\s*')
_VMDK_EXTENT = re.compile(r'(RW|RDONLY)\s+[0-9]{1,18}\s+SPARSE\s+"[^"]*"\s*')
VMDK_TYPES = ("monolithicSparse", "streamOptimized")


def vmdk(read: Read, size: int) -> int:
    """Check a vmdk image in one file: monolithicSparse or streamOptimized."""
    layout = "<4sIIQQQQIQQQ"
    header = _fields(read, 0, layout)
    if header[9] == _VMDK_GD_AT_END:
        # the last sectors: footer marker, footer, end-of-stream marker
        footer = _fields(read, max(0, size - 2 * SECTOR), layout)
        if footer[0] != b"KDMV" or footer[9] == _VMDK_GD_AT_END or size % SECTOR:
            raise Error("is cut short: it has no footer", _DAMAGED)
        if footer[1:6] != header[1:6]:
            raise Error("has a footer that contradicts its header", _DAMAGED)
        header = footer
    _magic, version, _flags, capacity, grain, place, length, grains, _rgd, gd, overhead = header
    if not 1 <= version <= 3:
        raise Error(f"has version {version}", CONVERT)
    if capacity == 0:
        raise Error("has no data of its own (capacity 0)", CONVERT)
    if capacity > 1 << 54:
        raise Error("has an impossible capacity", _DAMAGED)
    if place != 1 or length == 0:
        raise Error("has no descriptor of its own", CONVERT)
    if not 0 < grains <= 512 or not 0 < grain <= 1 << 21 or grain & grain - 1:
        raise _impossible()
    _vmdk_descriptor(read(*_VMDK_DESCRIPTOR))
    entries = -(-capacity // (grain * grains))
    _inside("grain directory", gd * SECTOR, entries * 4, size)
    _inside("first grain", overhead * SECTOR, 0, size)
    last = max(_table(read, gd * SECTOR, entries, "I", "little"))
    if last:
        _inside("last grain table", last * SECTOR, grains * 4, size)
    return int(capacity) * SECTOR


def _vmdk_descriptor(data: bytes) -> None:
    """Let pass one extent of type SPARSE and no parent; no key twice, in whatever case."""
    text = data.split(b"\0")[0].decode("latin-1")
    keys: dict[str, str] = {}
    extents = 0
    for line in re.split(r"\r?\n", text):
        pair = _VMDK_LINE.fullmatch(line)
        if pair is not None:
            key = pair[1].lower()
            if key in keys:
                raise Error("has a key twice in its descriptor", CONVERT)
            keys[key] = pair[2].strip('"')
        elif _VMDK_EXTENT.fullmatch(line):
            extents += 1
        elif line.strip() and not line.startswith("#"):
            raise Error("has an extent or a line in its descriptor that is not accepted", CONVERT)
    if not text.strip():
        raise Error("is an extent without its descriptor", CONVERT)
    if "parentfilenamehint" in text.lower() or keys.get("parentcid", "").lower() != "ffffffff":
        raise Error("has a parent", CONVERT)
    if extents != 1:
        raise Error(f"has {extents} extents", CONVERT)
    if keys.get("createtype") not in VMDK_TYPES:
        raise Error(f"is not of type {' or '.join(VMDK_TYPES)}", CONVERT)


# -- vdi --------------------------------------------------------------------------------------


def vdi(read: Read, size: int) -> int:
    """Check a VirtualBox disk, dynamic or fixed."""
    version, _header_bytes, image_type = _fields(read, 68, "<III")
    block_map, _data, sector, virtual, block, _extra, blocks, allocated = _fields(
        read, 340, "<II12xI4xQIIII"
    )
    link, parent = _fields(read, 424, "<16s16s")
    if version != 0x00010001:
        raise Error(f"has version {version:#x}", CONVERT)
    if image_type not in (1, 2) or any(link) or any(parent):
        raise Error("has a parent", CONVERT)
    if sector != SECTOR or block != 1 << 20 or virtual > blocks * block or allocated > blocks:
        raise _impossible()
    _inside("block map", block_map, blocks * 4, size)
    # VBoxManage convertfromraw writes odd sizes; qemu rounds them up
    return -(-int(virtual) // SECTOR) * SECTOR


# -- vpc (VHD) --------------------------------------------------------------------------------


def vpc(read: Read, size: int) -> int:
    """Check a VHD, dynamic or fixed. The footer is at the end; a dynamic one begins with a copy."""
    footer = read(max(0, size - SECTOR), SECTOR)
    if not footer.startswith(b"conectix"):
        raise Error("is cut short: it has no footer", _DAMAGED)
    table, virtual, disk_type, checksum = struct.unpack(">16xQ24xQ4xII", footer[:68])
    if checksum != ~(sum(footer) - sum(footer[64:68])) & 0xFFFFFFFF:
        raise Error("has a footer with a wrong checksum", _DAMAGED)
    if disk_type == 4:
        raise Error("has a parent", CONVERT)
    if disk_type not in (2, 3):
        raise Error(f"has type {disk_type}", CONVERT)
    # qemu believes a copy at the start, be it a fixed disk or not
    copy = read(0, SECTOR)
    if copy != footer and (disk_type == 3 or copy.startswith(b"conectix")):
        raise Error("has a footer that contradicts its copy", _DAMAGED)
    if disk_type == 2:
        if virtual != size - SECTOR:
            raise Error("has another size than its footer says", _DAMAGED)
        return int(virtual)
    cookie, block_map, blocks, block = _fields(read, table, ">8s8xQ4xII")
    if cookie != b"cxsparse" or block < SECTOR or block & block - 1 or virtual > blocks * block:
        raise _impossible()
    _inside("block map", block_map, blocks * 4, size)
    return int(virtual)


# -- vhdx -------------------------------------------------------------------------------------

_VHDX_BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
_VHDX_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_VHDX_FILE = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_VHDX_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
_VHDX_SECTOR = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
_VHDX_PARENT = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le


def vhdx(read: Read, size: int) -> int:
    """Check a VHDX image; that its blocks lie inside the file is seen by qemu when it opens it."""
    if size % SECTOR:
        raise Error("is cut short: it ends within a sector", _DAMAGED)
    headers = [_fields(read, offset, "<4s4xQ32x16s") for offset in (64 << 10, 128 << 10)]
    current = max((h for h in headers if h[0] == b"head"), key=lambda h: int(h[1]), default=None)
    if current is None:
        raise Error("has no header", _DAMAGED)
    if any(current[2]):
        raise Error("was not closed: its log is pending", "open and close it on its host")
    regions = _vhdx_table(read, 192 << 10, 8, b"regi", 0, "<16sQI4x", size)
    if _VHDX_BAT not in regions or _VHDX_METADATA not in regions:
        raise _impossible()
    for offset, length in regions.values():
        _inside("region", offset, length, size)
    start = regions[_VHDX_METADATA][0]
    items = _vhdx_table(read, start, 10, b"metadata", start, "<16sII8x", size)
    if not {_VHDX_FILE, _VHDX_SIZE, _VHDX_SECTOR} <= set(items):
        raise _impossible()
    block, flags = _fields(read, items[_VHDX_FILE][0], "<II")
    (virtual,) = _fields(read, items[_VHDX_SIZE][0], "<Q")
    (sector,) = _fields(read, items[_VHDX_SECTOR][0], "<I")
    if flags & 2 or _VHDX_PARENT in items:
        raise Error("has a parent", CONVERT)
    if sector not in (512, 4096) or block & block - 1 or not 1 << 20 <= block <= 256 << 20:
        raise _impossible()
    ratio = (1 << 23) * sector // block
    entries = -(-virtual // block)
    _inside("block map", 0, (entries + (entries - 1) // ratio) * 8, regions[_VHDX_BAT][1])
    return int(virtual)


def _vhdx_table(
    read: Read, offset: int, count_at: int, magic: bytes, base: int, layout: str, size: int
) -> dict[bytes, tuple[int, int]]:
    """Return GUID -> (offset in the file, length) of a region or metadata table."""
    head = _fields(read, offset, "<32s")[0]
    (count,) = struct.unpack_from("<H", head, count_at)
    step = struct.calcsize(layout)
    first = offset + (16 if magic == b"regi" else 32)
    _inside("header", first, count * step, size)
    rows = list(struct.iter_unpack(layout, read(first, count * step)))
    table = {guid: (base + at, length) for guid, at, length in rows}
    if not head.startswith(magic) or len(table) != len(rows) or count > 2047:
        raise _impossible()
    return table


PARSERS: dict[str, Callable[[Read, int], int]] = {
    "qcow2": qcow2,
    "vmdk": vmdk,
    "vdi": vdi,
    "vpc": vpc,
    "vhdx": vhdx,
}
