"""The headers of tar archives and OVAs, walked and checked by hand: nothing is ever extracted."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Optional
from urllib.parse import unquote
from xml.etree import ElementTree

from lib import log
from lib.errors import Error

SIDE_BYTES = 1 << 20  # what is larger is no side file, no extension header, no padding
_BLOCK_BYTES = 512
BESIDE_BYTES = 8 << 30  # of all that lies beside the disk, large files too
_MAX_HEADERS = 100  # and as many side files in memory at most
_MAX_EXTENSION_BYTES = 4 << 20  # of all extension headers together
_MAX_SEGMENTS = 1 << 18
_MANIFEST_LINES = 1000
_PIXZ_INDEX = 0xDBAE14D62E324CA6.to_bytes(8, "little")  # pixz.h: its index of files, behind the tar
# what lies beside the one disk, however large
_SIDE_SUFFIXES = (
    *(".asc", ".cert", ".iso", ".json", ".log", ".md", ".mf", ".nvram", ".ovf", ".sig", ".txt"),
    *(".html", ".pdf", ".xml", "readme", "license", "copying", "changelog"),
)
_DISK_SUFFIXES = (".img", ".qcow2", ".raw", ".vdi", ".vhd", ".vhdx", ".vmdk")
_PAX_RECORD = re.compile(rb"([0-9]{1,7}) ([^=\n]{1,200})=")
# openssl's, with openssl 3 SHA2-256(name)= HEX
_MANIFEST_LINE = re.compile(rb"SHA(?:2-)?(1|256|512) ?\((.+)\) ?= ?([0-9a-fA-F]+)")


@dataclass(frozen=True)
class Member:
    """A regular file of an archive; the segments, offset and size, are what is stored of it."""

    name: str
    size_bytes: int
    segments: Sequence[tuple[int, int]]

    @property
    def is_disk(self) -> bool:
        """Whether its name says so, or else its size: small files lie beside the disk.

        macOS puts a member "._NAME" of attributes beside each NAME.
        """
        name = self.name.lower()
        if name.endswith(_SIDE_SUFFIXES) or name.rpartition("/")[2].startswith("._"):
            return False
        return self.size_bytes > SIDE_BYTES or name.endswith(_DISK_SUFFIXES)


def cut() -> Error:
    """Return the Error for an archive that ends where more must follow."""
    return Error("the archive ends too early: it is truncated")


def _damaged(what: str) -> Error:
    return Error(f"the archive is damaged: {what}")


def _read(stream: BinaryIO, size_bytes: int) -> bytes:
    data = stream.read(size_bytes)
    if len(data) < size_bytes:
        raise cut()
    return data


def members(stream: BinaryIO, block: bytes) -> Iterator[Member]:
    """Yield the regular files of a tar archive, the stream at the first stored byte of each.

    The caller reads what the segments name before it asks for the next. `block` is the first
    header, read before. Formats: POSIX pax(1), GNU tar's manual, "Tar Internals".
    """
    said: dict[str, str] = {}  # by extension headers, of the next member
    extension_bytes = 0
    for _ in range(_MAX_HEADERS):
        if not block.strip(b"\0"):
            rest = stream.read(SIDE_BYTES + 1).strip(b"\0")
            if rest and not (rest.startswith(_PIXZ_INDEX) and len(rest) < SIDE_BYTES):
                raise Error("there is data behind the end of the archive")
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise _damaged(str(error)) from error
        stored = _decimal(str(header.size))
        if header.type in (b"x", b"g", b"L"):
            extension_bytes += stored
            said.update(_extension(stream, header.type, stored))
            if extension_bytes > _MAX_EXTENSION_BYTES:
                size = log.size(_MAX_EXTENSION_BYTES)
                raise _damaged(f"it has more than {size} of extension headers")
        else:
            stored = _decimal(said.get("size", str(stored)))
            name = said.get("GNU.sparse.name", said.get("path", header.name))
            if header.type in tarfile.REGULAR_TYPES:
                size_bytes, segments = _layout(stream, block, header.type, stored, said)
                yield Member(name.removeprefix("./"), size_bytes, segments)
            elif header.type != tarfile.DIRTYPE or stored:
                raise Error(f"{name!r} in the archive is no regular file", "repack it without")
            said = {}
        _read(stream, -stored % _BLOCK_BYTES)
        block = _read(stream, _BLOCK_BYTES)
    raise _damaged(f"it has more than {_MAX_HEADERS} headers")


def _extension(stream: BinaryIO, kind: bytes, size_bytes: int) -> Mapping[str, str]:
    """Return what an extension header says: GNU's long name, or pax records."""
    if size_bytes > SIDE_BYTES:
        raise _damaged(f"an extension header of {log.size(size_bytes)}")
    data = _read(stream, size_bytes)
    if kind == b"L":
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    records, position = {}, 0
    while position < size_bytes:
        match = _PAX_RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or end <= match.end() or data[end - 1 : end] != b"\n":
            raise _damaged("an extension header that is none")
        key = match[2].decode("utf-8", "surrogateescape")
        records[key] = data[match.end() : end - 1].decode("utf-8", "surrogateescape")
        position = end
    if kind == b"g" and any(key in ("path", "size") or key[:4] == "GNU." for key in records):
        raise _damaged("a name or a size for all members")
    return records


def _layout(
    stream: BinaryIO, block: bytes, kind: bytes, stored: int, said: Mapping[str, str]
) -> tuple[int, Sequence[tuple[int, int]]]:
    """Return the size of a member and the segments that are stored of it.

    Sparse members: GNU tar's own format (GCE's images come in it) and pax 1.0 (bsdtar's).
    """
    if kind == tarfile.GNUTYPE_SPARSE:
        size_bytes = _number(block[483:495])
        segments = _gnu_segments(stream, block)
    elif any(key.startswith("GNU.sparse.") for key in said):
        if (said.get("GNU.sparse.major"), said.get("GNU.sparse.minor")) != ("1", "0"):
            raise Error("the archive is of an old sparse format", "repack it with tar --sparse")
        size_bytes = _decimal(said.get("GNU.sparse.realsize", ""))
        segments, used = _pax_segments(stream)
        stored -= used
    else:
        return stored, [(0, stored)]
    end = 0
    for offset, length in segments:
        if offset < end:
            raise _damaged("a sparse map out of order")
        end = offset + length
    if end > size_bytes or sum(length for _, length in segments) != stored:
        raise _damaged("a sparse map that does not fit the size")
    return size_bytes, segments


def _gnu_segments(stream: BinaryIO, block: bytes) -> list[tuple[int, int]]:
    """Read the sparse map in a header, 4 entries, and in the blocks behind it, 21 each."""
    fields, more, segments = block[386:482], block[482], []
    for _ in range(_MAX_SEGMENTS // 21):
        for start in range(0, len(fields), 24):
            if fields[start]:
                entry = fields[start : start + 24]
                segments.append((_number(entry[:12]), _number(entry[12:])))
        if not more:
            return segments
        block = _read(stream, _BLOCK_BYTES)
        fields, more = block[:504], block[504]
    raise _damaged(f"a sparse map of more than {_MAX_SEGMENTS} entries")


def _pax_segments(stream: BinaryIO) -> tuple[list[tuple[int, int]], int]:
    """Read the sparse map before a member's data, decimal lines; return it and its stored size."""
    numbers: list[int] = []
    rest, used = b"", 0
    while not numbers or len(numbers) < 1 + 2 * numbers[0]:
        if len(numbers) > 2 * _MAX_SEGMENTS or len(rest) > _BLOCK_BYTES:
            raise _damaged(f"a sparse map of more than {_MAX_SEGMENTS} entries")
        *lines, rest = (rest + _read(stream, _BLOCK_BYTES)).split(b"\n")
        used += _BLOCK_BYTES
        numbers += [_decimal(line.decode("ascii", "replace")) for line in lines]
    count = numbers[0]
    return list(zip(numbers[1 : 1 + count * 2 : 2], numbers[2 : 1 + count * 2 : 2])), used


def _decimal(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise _damaged(f"{text[:20]!r} is no size")
    return int(text)


def _number(field: bytes) -> int:
    """Return a number of a tar header: octal digits, or 0x80 and the bytes of a large one."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    if not re.fullmatch(rb"[0-7]+", digits):
        raise _damaged(f"{digits!r} is no size")
    return int(digits, 8)


def check_ova(side: Mapping[str, Optional[bytes]], disk: str, output: BinaryIO) -> None:
    """Raise an Error unless an OVA's descriptor and manifest (DMTF DSP0243) speak for the disk.

    side: the archive's other files. Without a descriptor it is a plain archive.
    """
    descriptors = [name for name in side if name.lower().endswith(".ovf")]
    if not descriptors:
        return
    if len(descriptors) > 1:
        names = f"{descriptors[0]!r} and {descriptors[1]!r}"
        raise Error(f"the archive holds two descriptors, {names}", "repack it with one")
    reference = _disk_reference(side[descriptors[0]] or b"")
    if disk not in (reference, unquote(reference)):  # a URL by DSP0243; not all who write encode
        raise Error(f"the OVA's descriptor is about {reference!r}, the disk in it is {disk!r}")
    for name in side:
        if name.lower().endswith(".mf"):
            for listed in {*descriptors, disk} - set(_check_manifest(side, name, disk, output)):
                raise Error(f"the OVA's manifest has no digest of {listed!r}")


def _disk_reference(descriptor: bytes) -> str:
    """Return the file name of the one disk that an OVF descriptor is about."""
    try:
        text = descriptor.decode("utf-8")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise Error("the OVA's descriptor has a DOCTYPE", "repack it without")
        root = ElementTree.fromstring(text)
    except (UnicodeDecodeError, ElementTree.ParseError) as error:
        raise Error(f"the OVA's descriptor is no XML in UTF-8: {error}") from error

    def values(tag: str, key: str) -> list[dict[str, str]]:
        """Return the attributes, bare of name spaces, of these elements that have the key."""
        found = (
            {name.rpartition("}")[2]: value for name, value in element.items()}
            for element in root.iterfind(f".//{{*}}{tag}")
        )
        return [attributes for attributes in found if key in attributes]

    disks = [attributes["fileRef"] for attributes in values("Disk", "fileRef")]
    files = {attributes["id"]: attributes.get("href", "") for attributes in values("File", "id")}
    if len(disks) != 1:
        raise Error(f"the OVA's descriptor is about {len(disks)} disks with a file, not one")
    return files.get(disks[0], "")


def _check_manifest(
    side: Mapping[str, Optional[bytes]], manifest: str, disk: str, output: BinaryIO
) -> Iterator[str]:
    """Yield the names of the files whose digests in the manifest are right."""
    lines = [line.strip() for line in (side[manifest] or b"").splitlines() if line.strip()]
    if len(lines) > _MANIFEST_LINES:
        raise Error(f"the OVA's manifest has more than {_MANIFEST_LINES} lines")
    digests: dict[tuple[str, str], str] = {}  # each file is hashed once
    for line in lines:
        match = _MANIFEST_LINE.fullmatch(line)
        if match is None:
            raise Error(f"the OVA's manifest has a line that is no digest: {line[:80]!r}")
        name = match[2].decode("utf-8", "backslashreplace")
        if name != disk and name not in side:
            raise Error(f"the OVA's manifest has a digest of {name!r}, which is not in it")
        content = side.get(name)
        if name != disk and content is None:
            continue  # too large to be kept: nothing is read of it
        file = output if content is None else io.BytesIO(content)
        key = (f"sha{match[1].decode()}", name)
        if key not in digests:
            digests[key] = _digest(key[0], file)
        if digests[key] != match[3].decode().lower():
            raise Error(f"the OVA's manifest has another digest of {name!r}", "download it again")
        yield name


def _digest(algorithm: str, file: BinaryIO) -> str:
    state = hashlib.new(algorithm, usedforsecurity=False)  # SHA-1 is what older ones have
    file.seek(0)
    while block := file.read(SIDE_BYTES):
        state.update(block)
    return state.hexdigest()
