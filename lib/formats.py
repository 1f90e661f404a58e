"""What the headers of disk images say: our own look, before any other program parses the file.

Every parser takes a bounded `read` and the file's size, and returns the size of the virtual disk
in bytes; it raises an Error for whatever refers to another file, lies outside this one, or is not
known. All names, texts and sizes in a header are an attacker's: none is ever printed as it is.
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
from dataclasses import dataclass
from typing import Any, Optional

from lib.errors import Error

Read = Callable[[int, int], bytes]  # (offset_bytes, length_bytes) -> fewer only at the file's end

SECTOR = 512
HEAD_BYTES = 68 << 10  # covers every magic below
_DAMAGED = "fetch it again; its source may be damaged"
_FLATTEN = "make it one self-contained file, where you trust it, with qemu-img convert -O qcow2"
_CONVERT = "convert it, where you trust it, with qemu-img convert -O qcow2"
_UNPACK = "give the image itself, with at most one compression and one archive around it"
_ADDRESS = "see whether its address is that of the image itself"

# (name, offset, magic); a negative offset counts from the file's end
_CONTAINERS = (
    ("qcow2", 0, b"QFI\xfb\0\0\0\2"),
    ("qcow2", 0, b"QFI\xfb\0\0\0\3"),
    ("vmdk", 0, b"KDMV"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("vpc", 0, b"conectix"),
    ("vpc", -512, b"conectix"),
    ("vhdx", 0, b"vhdxfile"),
)
_DISKS = (
    ("an MBR", 510, b"\x55\xaa"),
    ("a GPT", 512, b"EFI PART"),
    ("a GPT", 4096, b"EFI PART"),
    ("an ISO 9660 file system", 32769, b"CD001"),
    ("an ext2/3/4 file system", 1080, b"\x53\xef"),
    ("an XFS file system", 0, b"XFSB"),
    ("a btrfs file system", 65600, b"_BHRfS_M"),
    ("a UFS2 file system", 66908, b"\x19\x01\x54\x19"),
)
_FOREIGN = (
    ("a QED disk", 0, b"QED\0", _CONVERT),
    ("a LUKS volume", 0, b"LUKS\xba\xbe", "give an image that is not encrypted"),
    ("a Parallels disk", 0, b"WithoutFreeSpace", _CONVERT),
    ("a Parallels disk", 0, b"WithouFreSpacExt", _CONVERT),
    ("a cloop disk", 0, b"#!/bin/sh\n#V2.0 Format", _CONVERT),
    ("a Bochs disk", 0, b"Bochs Virtual HD Image", _CONVERT),
    ("a DMG disk", -512, b"koly", _CONVERT),
    ("a VMware ESX sparse disk (COWD)", 0, b"COWD", _CONVERT),
    ("an Android sparse image", 0, b"\x3a\xff\x26\xed", "convert it with simg2img"),
    ("a gzip file", 0, b"\x1f\x8b", _UNPACK),
    ("an xz file", 0, b"\xfd7zXZ\0", _UNPACK),
    ("a zstd file", 0, b"\x28\xb5\x2f\xfd", _UNPACK),
    ("a bzip2 file", 0, b"BZh", _UNPACK),
    ("an lz4 file", 0, b"\x04\x22\x4d\x18", _UNPACK),
    ("a tar archive", 257, b"ustar", _UNPACK),
    ("a zip archive", 0, b"PK\x03\x04", _UNPACK),
    ("a 7-Zip archive", 0, b"7z\xbc\xaf\x27\x1c", _UNPACK),
    ("a WIM archive", 0, b"MSWIM\0\0\0", _UNPACK),
    ("a squashfs file system", 0, b"hsqs", "give a disk image, not the file system of a live CD"),
    ("an ELF program", 0, b"\x7fELF", _ADDRESS),
)
_TEXTS = (
    ("an HTML page", rb"\s*<(!doctype html|html)"),
    ("an XML document", rb"\s*<"),
    ("a JSON document", rb"\s*[\[{]"),
    ("a git-LFS pointer", rb"version https://git-lfs"),
    ("text", rb""),
)
_TEXT = re.compile(rb"(\xef\xbb\xbf)?([\t\n\f\r\x1b -~\x80-\xff]+)")


@dataclass(frozen=True)
class Look:
    """What a file looks like, by every magic at once."""

    containers: tuple[str, ...]
    foreign: tuple[tuple[str, str], ...]  # (name, hint)
    disks: tuple[str, ...]
    starts_as_container: bool

    @property
    def names(self) -> list[str]:
        """All that this file would be to one program or another, a plain disk excepted."""
        return [*self.containers, *(name for name, _ in self.foreign)]


def look(read: Read, size: int) -> Look:
    """Match the file against every magic that is known here."""
    head, tail = read(0, HEAD_BYTES), read(max(0, size - SECTOR), SECTOR).rjust(SECTOR, b"\0")

    def has(offset: int, magic: bytes) -> bool:
        return tail.startswith(magic) if offset < 0 else head.startswith(magic, offset)

    containers = dict.fromkeys(name for name, offset, magic in _CONTAINERS if has(offset, magic))
    foreign = [(name, hint) for name, offset, magic, hint in _FOREIGN if has(offset, magic)]
    if head.startswith(b"QFI\xfb") and "qcow2" not in containers:
        foreign.append(("a qcow disk of a version other than 2 and 3", _CONVERT))
    foreign += _text(head)
    return Look(
        tuple(containers),
        tuple(dict.fromkeys(foreign)),
        tuple(dict.fromkeys(name for name, offset, magic in _DISKS if has(offset, magic))),
        any(has(offset, magic) for _name, offset, magic in _CONTAINERS if offset >= 0),
    )


def _text(head: bytes) -> list[tuple[str, str]]:
    """Recognise text: a descriptor that names other files, or a page in place of the image."""
    start = head[:4096].split(b"\0")[0].lower()
    if _TEXT.fullmatch(start) and re.search(rb"disk descriptorfile|createtype|^\s*version=", start):
        return [("a VMware descriptor of a disk in several files", _FLATTEN)]
    text = _TEXT.fullmatch(head[:1024])
    if text is None:
        return []
    kind = next(kind for kind, pattern in _TEXTS if re.match(pattern, text[2], re.IGNORECASE))
    return [(kind, _ADDRESS)]


def _refused(kind: str, problem: str, hint: Optional[str] = _DAMAGED) -> Error:
    return Error(f"the {kind} image {problem}", hint)


def _fields(kind: str, read: Read, offset: int, layout: str) -> tuple[Any, ...]:
    data = read(offset, struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise _refused(kind, "ends within its header")
    return struct.unpack(layout, data)


def _inside(kind: str, what: str, offset: int, length: int, size: int) -> None:
    if offset + length > size:
        raise _refused(kind, f"is cut short: its {what} lies outside the file")


def _table(read: Read, offset: int, entries: int, code: str, byteorder: str) -> array[int]:
    table = array(code)
    data = read(offset, entries * table.itemsize)
    if len(data) < entries * table.itemsize:
        raise Error("the image became shorter while it was read")
    table.frombytes(data)
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
    kind = "qcow2"
    (
        version,
        backing,
        bits,
        virtual,
        crypt,
        l1_entries,
        l1,
        refcounts,
        clusters,
        snapshots,
        table,
    ) = _fields(kind, read, 4, ">IQ4xIQIIQQIIQ")
    features = header_bytes = 0
    if version == 3:
        features, autoclear, order, header_bytes = _fields(kind, read, 72, ">Q8xQII")
        if features & 1 << 2 or autoclear & 1 << 1:
            raise _refused(kind, "keeps its data in another file", _FLATTEN)
        if features & 1 << 1:
            raise _refused(kind, "is marked as corrupt")
        if features & ~_QCOW2_KNOWN:
            raise _refused(
                kind, f"needs unknown features ({features & ~_QCOW2_KNOWN:#x})", _CONVERT
            )
        if order > 6 or header_bytes < 104 or header_bytes % 8:
            raise _refused(kind, "has an impossible header")
    if backing:
        raise _refused(kind, "has a backing file", _FLATTEN)
    if crypt:
        raise _refused(kind, "is encrypted", "give an image that is not encrypted")
    if not 9 <= bits <= 21:
        raise _refused(kind, f"has clusters of 2^{bits} bytes")
    cluster = 1 << bits
    _qcow2_extensions(read, header_bytes or 72, cluster)
    entry_bytes = 16 if features & 1 << 4 else 8
    needed = -(-virtual // (cluster * (cluster // entry_bytes)))
    if not needed <= l1_entries <= _QCOW2_L1_BYTES // 8:
        raise _refused(kind, f"has an L1 table of {l1_entries} entries and needs {needed}")
    if not 0 < clusters <= _QCOW2_REFCOUNT_BYTES // cluster or refcounts % cluster or l1 % cluster:
        raise _refused(kind, "has an impossible header")
    if snapshots > _QCOW2_SNAPSHOTS:
        raise _refused(
            kind, f"has {snapshots} snapshots, at most {_QCOW2_SNAPSHOTS} pass", _FLATTEN
        )
    _inside(kind, "L1 table", l1, l1_entries * 8, size)
    _inside(kind, "refcount table", refcounts, clusters * cluster, size)
    _inside(kind, "snapshot table", table, snapshots * 40, size)
    _qcow2_clusters(read, size, _table(read, l1, needed, "Q", "big"), bits, entry_bytes)
    return int(virtual)


def _qcow2_extensions(read: Read, position: int, cluster: int) -> None:
    for _ in range(64):
        if position + 8 > cluster:
            return
        code, length = _fields("qcow2", read, position, ">II")
        if code == 0:
            return
        if code == 0x44415441:
            raise _refused("qcow2", "names an external data file", _FLATTEN)
        position += 8 + -(-length // 8) * 8
    raise _refused("qcow2", "has more than 64 header extensions")


def _qcow2_clusters(read: Read, size: int, l1: array[int], bits: int, entry_bytes: int) -> None:
    """See that L2 tables and compressed clusters lie inside the file.

    `qemu-img map` tells the places of plain clusters only, and `qemu-img check` lets pass whatever
    is cut off by less than a cluster: without this, the last 512 bytes of a compressed image can be
    missing, and the guest's disk is silently wrong.
    """
    cluster = 1 << bits
    tables = {entry & _QCOW2_OFFSET for entry in l1} - {0}
    _inside("qcow2", "last L2 table", max(tables, default=0), cluster if tables else 0, size)
    if len(tables) * cluster > _QCOW2_L2_BYTES:
        raise _refused("qcow2", "has more than 1 GiB of L2 tables", "use larger clusters")
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
        _inside("qcow2", "last compressed cluster", 0, last * SECTOR, -(-size // SECTOR) * SECTOR)


# -- vmdk -------------------------------------------------------------------------------------

_VMDK_DESCRIPTOR = (SECTOR, 20 * SECTOR)  # where qemu reads it, whatever the header says
_VMDK_GD_AT_END = (1 << 64) - 1
_VMDK_LINE = re.compile(r'([A-Za-z][A-Za-z0-9._-]*)\s*=\s*("[^"]*"|[^\s"]*)\s*')
_VMDK_EXTENT = re.compile(r'(RW|RDONLY)\s+[0-9]{1,18}\s+SPARSE\s+"[^"]*"\s*')
VMDK_TYPES = ("monolithicSparse", "streamOptimized")


def vmdk(read: Read, size: int) -> int:
    """Check a vmdk image in one file: monolithicSparse or streamOptimized."""
    kind = "vmdk"
    layout = "<4sIIQQQQIQQQ"
    header = _fields(kind, read, 0, layout)
    if header[9] == _VMDK_GD_AT_END:
        # footer marker, footer, end-of-stream marker; a sector each
        footer = _fields(kind, read, max(0, size - 2 * SECTOR), layout)
        if footer[0] != b"KDMV" or footer[9] == _VMDK_GD_AT_END:
            raise _refused(kind, "is cut short: it has no footer")
        if footer[1:6] != header[1:6]:
            raise _refused(kind, "has a footer that contradicts its header")
        header = footer
    _magic, version, flags, capacity, grain, place, length, grains, rgd, gd, overhead = header
    if not 1 <= version <= 3:
        raise _refused(kind, f"has version {version}", _CONVERT)
    if capacity == 0:
        raise _refused(kind, "has no data of its own (capacity 0)", _FLATTEN)
    if capacity > 1 << 54:
        raise _refused(kind, "has an impossible capacity")
    if place != 1 or length == 0:
        raise _refused(kind, "has no descriptor of its own", _FLATTEN)
    if not 0 < grains <= 512 or not 0 < grain <= 1 << 21 or grain & grain - 1:
        raise _refused(kind, "has an impossible header")
    _vmdk_descriptor(read(*_VMDK_DESCRIPTOR))
    entries = -(-capacity // (grain * grains))
    for what, directory in (("grain directory", gd), *([("second one", rgd)] if flags & 2 else ())):
        _inside(kind, what, directory * SECTOR, entries * 4, size)
    _inside(kind, "first grain", overhead * SECTOR, 0, size)
    last = max(_table(read, gd * SECTOR, entries, "I", "little"))
    _inside(kind, "last grain table", last * SECTOR, grains * 4 if last else 0, size)
    return int(capacity) * SECTOR


def _vmdk_descriptor(data: bytes) -> None:
    """Let pass one extent of type SPARSE and no parent; no key twice, in whatever case."""
    kind = "vmdk"
    text = data.split(b"\0")[0].decode("latin-1")
    keys: dict[str, str] = {}
    extents = 0
    for line in re.split(r"\r?\n", text):
        pair = _VMDK_LINE.fullmatch(line)
        if pair is not None:
            key = pair[1].lower()
            if key in keys:
                raise _refused(kind, "has a key twice in its descriptor", _FLATTEN)
            keys[key] = pair[2].strip('"')
        elif _VMDK_EXTENT.fullmatch(line):
            extents += 1
        elif line.strip() and not line.startswith("#"):
            raise _refused(
                kind, "has an extent or a line in its descriptor that is not accepted", _FLATTEN
            )
    if "parentfilenamehint" in text.lower() or keys.get("parentcid", "").lower() != "ffffffff":
        raise _refused(kind, "has a parent", _FLATTEN)
    if extents != 1:
        raise _refused(kind, f"has {extents} extents", _FLATTEN)
    if keys.get("createtype") not in VMDK_TYPES:
        raise _refused(kind, f"is not of type {' or '.join(VMDK_TYPES)}", _FLATTEN)


# -- vdi --------------------------------------------------------------------------------------


def vdi(read: Read, size: int) -> int:
    """Check a VirtualBox disk, dynamic or fixed."""
    kind = "vdi"
    version, _header_bytes, image_type = _fields(kind, read, 68, "<III")
    block_map, _data, sector, virtual, block, _extra, blocks, allocated = _fields(
        kind, read, 340, "<II12xI4xQIIII"
    )
    link, parent = _fields(kind, read, 424, "<16s16s")
    if version != 0x00010001:
        raise _refused(kind, f"has version {version:#x}", _CONVERT)
    if image_type not in (1, 2) or any(link) or any(parent):
        raise _refused(kind, "has a parent", _FLATTEN)
    if sector != SECTOR or block != 1 << 20 or virtual > blocks * block or allocated > blocks:
        raise _refused(kind, "has an impossible header")
    _inside(kind, "block map", block_map, blocks * 4, size)
    # VBoxManage convertfromraw writes odd sizes; qemu rounds them up
    return -(-int(virtual) // SECTOR) * SECTOR


# -- vpc (VHD) --------------------------------------------------------------------------------


def vpc(read: Read, size: int) -> int:
    """Check a VHD, dynamic or fixed. The footer is at the end; a dynamic one begins with a copy."""
    kind = "vpc"
    footer = read(max(0, size - SECTOR), SECTOR)
    if not footer.startswith(b"conectix"):
        raise _refused(kind, "is cut short: it has no footer")
    table, virtual, disk_type, checksum = struct.unpack(">16xQ24xQ4xII", footer[:68])
    if checksum != ~(sum(footer) - sum(footer[64:68])) & 0xFFFFFFFF:
        raise _refused(kind, "has a footer with a wrong checksum")
    if disk_type == 4:
        raise _refused(kind, "has a parent", _FLATTEN)
    if disk_type not in (2, 3):
        raise _refused(kind, f"has type {disk_type}", _CONVERT)
    if disk_type == 2:
        if virtual != size - SECTOR:
            raise _refused(kind, "has another size than its footer says")
        return int(virtual)
    if read(0, SECTOR) != footer:
        raise _refused(kind, "has a footer that contradicts its copy")
    cookie, block_map, blocks, block = _fields(kind, read, table, ">8s8xQ4xII")
    if cookie != b"cxsparse" or block < SECTOR or block & block - 1 or virtual > blocks * block:
        raise _refused(kind, "has an impossible header")
    _inside(kind, "block map", block_map, blocks * 4, size)
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
    kind = "vhdx"
    headers = [_fields(kind, read, offset, "<4s4xQ32x16s") for offset in (64 << 10, 128 << 10)]
    current = max((h for h in headers if h[0] == b"head"), key=lambda h: int(h[1]), default=None)
    if current is None:
        raise _refused(kind, "has no header")
    if any(current[2]):
        raise _refused(kind, "was not closed: its log is pending", "open and close it on its host")
    regions = _vhdx_table(read, 192 << 10, 8, b"regi", 0, "<16sQI4x", size)
    if _VHDX_BAT not in regions or _VHDX_METADATA not in regions:
        raise _refused(kind, "has an impossible header")
    for offset, length in regions.values():
        _inside(kind, "region", offset, length, size)
    start = regions[_VHDX_METADATA][0]
    items = _vhdx_table(read, start, 10, b"metadata", start, "<16sII8x", size)
    if not {_VHDX_FILE, _VHDX_SIZE, _VHDX_SECTOR} <= set(items):
        raise _refused(kind, "has an impossible header")
    block, flags = _fields(kind, read, items[_VHDX_FILE][0], "<II")
    (virtual,) = _fields(kind, read, items[_VHDX_SIZE][0], "<Q")
    (sector,) = _fields(kind, read, items[_VHDX_SECTOR][0], "<I")
    if flags & 2 or _VHDX_PARENT in items:
        raise _refused(kind, "has a parent", _FLATTEN)
    if sector not in (512, 4096) or block & block - 1 or not 1 << 20 <= block <= 256 << 20:
        raise _refused(kind, "has an impossible header")
    ratio = (1 << 23) * sector // block
    entries = -(-virtual // block)
    _inside(kind, "block map", 0, (entries + (entries - 1) // ratio) * 8, regions[_VHDX_BAT][1])
    return int(virtual)


def _vhdx_table(
    read: Read, offset: int, count_at: int, magic: bytes, base: int, layout: str, size: int
) -> dict[bytes, tuple[int, int]]:
    """Return GUID -> (offset in the file, length) of a region or metadata table."""
    head = _fields("vhdx", read, offset, "<32s")[0]
    (count,) = struct.unpack_from("<H", head, count_at)
    step = struct.calcsize(layout)
    first = offset + (16 if magic == b"regi" else 32)
    _inside("vhdx", "header", first, count * step, size)
    rows = list(struct.iter_unpack(layout, read(first, count * step)))
    table = {guid: (base + at, length) for guid, at, length in rows}
    if not head.startswith(magic) or len(table) != len(rows) or count > 2047:
        raise _refused("vhdx", "has an impossible header")
    return table


PARSERS: dict[str, Callable[[Read, int], int]] = {
    "qcow2": qcow2,
    "vmdk": vmdk,
    "vdi": vdi,
    "vpc": vpc,
    "vhdx": vhdx,
}
