"""What a file is by the bytes at its start and its end: disk image, something else, or several."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Read = Callable[[int, int], bytes]  # (offset_bytes, length_bytes) -> fewer only at the file's end

SECTOR = 512
HEAD_BYTES = 68 << 10  # covers every offset below

QCOW2 = (b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3")
# offsets from the start; -512 is the last sector
_CONTAINERS = (
    *(("qcow2", 0, each) for each in QCOW2),
    ("vmdk", 0, b"KDMV"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("vpc", 0, b"conectix"),
    ("vpc", -SECTOR, b"conectix"),
    ("vhdx", 0, b"vhdxfile"),
)
ISO = "an ISO 9660 file system"
# what no container has at this place: data of the guest does not lie this near to its start
TABLES = ("an MBR", "a GPT", ISO)
_DISKS = (
    ("an MBR", 510, b"\x55\xaa"),
    ("a GPT", 512, b"EFI PART"),
    ("a GPT for sectors of 4 KiB", 4096, b"EFI PART"),
    (ISO, 32769, b"CD001"),
    ("an ext2/3/4 file system", 1080, b"\x53\xef"),
    ("an XFS file system", 0, b"XFSB"),
    ("a btrfs file system", 65600, b"_BHRfS_M"),
    ("a UFS2 file system", 66908, b"\x19\x01\x54\x19"),
)

CONVERT = "make it one plain file, where you trust it, with qemu-img convert -O qcow2"
DECRYPT = "give an image that is not encrypted"
_UNPACK = "give the image itself, with at most one compression and one archive around it"
_ADDRESS = "see whether its address is that of the image itself"
_FOREIGN = (
    ("a qcow disk of a version other than 2 and 3", 0, b"QFI\xfb", CONVERT),
    ("a QED disk", 0, b"QED\0", CONVERT),
    ("a LUKS volume", 0, b"LUKS\xba\xbe", DECRYPT),
    ("a Parallels disk", 0, b"WithoutFreeSpace", CONVERT),
    ("a Parallels disk", 0, b"WithouFreSpacExt", CONVERT),
    ("a cloop disk", 0, b"#!/bin/sh\n#V2.0 Format", CONVERT),
    ("a Bochs disk", 0, b"Bochs Virtual HD Image", CONVERT),
    ("a DMG disk", -SECTOR, b"koly", CONVERT),
    ("a VMware ESX sparse disk (COWD)", 0, b"COWD", CONVERT),
    ("a VMware seSparse disk", 0, b"\xbe\xba\xfe\xca\0\0\0\0", CONVERT),
    ("a Proxmox VMA archive", 0, b"VMA\0", "extract the disk with vma"),
    ("an Android sparse image", 0, b"\x3a\xff\x26\xed", "convert it with simg2img"),
    ("a gzip file", 0, b"\x1f\x8b", _UNPACK),
    ("an xz file", 0, b"\xfd7zXZ\0", _UNPACK),
    ("a zstd file", 0, b"\x28\xb5\x2f\xfd", _UNPACK),
    ("a bzip2 file", 0, b"BZh", _UNPACK),
    ("an lz4 file", 0, b"\x04\x22\x4d\x18", _UNPACK),
    ("an lz4 file of the legacy format", 0, b"\x02\x21\x4c\x18", "pack it again with lz4 -9"),
    ("an lzma file of the old format", 0, b"\x5d\0\0", "pack it again with xz"),
    ("an lzip file", 0, b"LZIP", "pack it again with xz"),
    ("a tar archive", 257, b"ustar", _UNPACK),
    ("a zip archive", 0, b"PK\x03\x04", _UNPACK),
    ("a 7-Zip archive", 0, b"7z\xbc\xaf\x27\x1c", _UNPACK),
    ("a cpio archive", 0, b"07070", _UNPACK),
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
_TEXT = re.compile(rb"(?:\xef\xbb\xbf)?([\t\n\f\r\x1b -~\x80-\xff]+)")
_DESCRIPTOR = re.compile(rb"disk descriptorfile|createtype|^\s*version=", re.IGNORECASE | re.M)


@dataclass(frozen=True)
class Look:
    """All that a file would be to one program or another, by every magic at once."""

    names: list[str]  # what it is beside a plain disk
    foreign: dict[str, str]  # those of the names that are not accepted, and the way out
    disks: list[str]  # signs of a plain disk
    begins_as_container: bool  # then it is no plain disk; a fixed VHD is one with a footer


def look(read: Read, size: int) -> Look:
    """Match the file against every magic that is known here."""
    head, tail = read(0, HEAD_BYTES), read(max(0, size - SECTOR), SECTOR)

    def has(offset: int, magic: bytes) -> bool:
        return tail.startswith(magic) if offset < 0 else head.startswith(magic, offset)

    containers = [(name, offset) for name, offset, magic in _CONTAINERS if has(offset, magic)]
    names = dict.fromkeys(name for name, _offset in containers)
    foreign = {name: hint for name, offset, magic, hint in _FOREIGN if has(offset, magic)}
    if "qcow2" in names:
        del foreign[_FOREIGN[0][0]]
    foreign.update(_text(head))
    if _is_old_tar(head[:SECTOR]):
        foreign["a tar archive of the v7 format"] = "pack it again with tar --format=gnu"
    return Look(
        [*names, *foreign],
        foreign,
        [name for name, offset, magic in _DISKS if has(offset, magic)],
        any(offset >= 0 for _name, offset in containers),
    )


def _is_old_tar(block: bytes) -> bool:
    """Know the format without a magic by its checksum, 6 octal digits over the whole header."""
    digits = block[148:156].strip(b"\0 ")
    if len(block) < SECTOR or not re.fullmatch(b"[0-7]{4,6}", digits) or block[257:262] == b"ustar":
        return False
    return int(digits, 8) == sum(block) - sum(block[148:156]) + 8 * 32


def _text(head: bytes) -> dict[str, str]:
    """Know text: a descriptor that names other files, or a page in place of the image."""
    start = head[:4096].split(b"\0")[0]
    if _TEXT.fullmatch(start) and _DESCRIPTOR.search(start):
        return {"a VMware descriptor of a disk in several files": CONVERT}
    text = _TEXT.fullmatch(head[:1024])
    if text is None:
        return {}
    kind = next(kind for kind, pattern in _TEXTS if re.match(pattern, text[1], re.IGNORECASE))
    return {kind: _ADDRESS}
