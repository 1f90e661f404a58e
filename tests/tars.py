"""Hand-made tar archives and OVAs: members that no writer would make."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from typing import Optional, Union


def member(
    name: str,
    data: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    size: Optional[int] = None,
    patch: Optional[Mapping[int, bytes]] = None,
) -> bytes:
    """Return the header and the data of a member; the patched header gets a right checksum."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for offset, field in (patch or {}).items():
        block[offset : offset + len(field)] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % 512)


END = bytes(1024)


def pax(records: Mapping[str, Union[str, int]], kind: bytes = b"x") -> bytes:
    lines = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + len(str(len(rest) + 3))
        lines += str(length).encode() + rest
    return member("PaxHeader", lines, kind=kind)


def gnu_sparse(
    stored: bytes, real_size: int, *entries: tuple[int, int], more: bool = False
) -> bytes:
    """Return a member in GNU tar's sparse format with these entries, at most four, in its map."""
    pairs = b"".join(b"%011o\0%011o\0" % entry for entry in entries)
    fields = {386: pairs, 482: b"\1" if more else b"\0", 483: b"%011o\0" % real_size}
    return member("disk.raw", stored, kind=tarfile.GNUTYPE_SPARSE, patch=fields)


def ovf(disks: str = '<Disk ovf:fileRef="f1"/>', href: str = "a.vmdk", head: str = "") -> bytes:
    return (
        f'<?xml version="1.0"?>{head}<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" '
        'xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><References>'
        f'<File ovf:href="{href}" ovf:id="f1"/></References>'
        f"<DiskSection><Info>x</Info>{disks}</DiskSection></Envelope>"
    ).encode()
