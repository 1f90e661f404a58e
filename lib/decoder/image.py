"""Image files: which format they have, whether that format is safe to decode, and the decoding."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from lib import errors, log, run
from lib.decoder import formats, magic
from lib.decoder.source import Source, served
from lib.errors import Error

FORMATS = ("raw", *formats.PARSERS)
# 16 requests out of order: a Debian image of 190 MiB takes 1.7 s instead of 2.3;
# --target-is-zero (qemu 5.0) is true of a file that was just made by truncate
_CONVERT = ("convert", "-W", "-m", "16", "-n", "--target-is-zero")
# exit statuses of qemu-img check: good, clusters that nobody uses, no check for this format (vpc)
_CHECKED = (0, 3, 63)
_WRITE_BEHIND_S = 0.2
_MAX_SPANS = 64
Parts = list[tuple[int, int]]  # of a disk: offset and size


@dataclass(frozen=True)
class Image:
    """What inspect() found: the format, and the size of the disk that it decodes to."""

    format: str
    virtual_size_bytes: int


def inspect(source: Source, declared: str, max_virtual_size_bytes: int) -> Image:
    """Return the one format that the source has by its content, after a look at its whole header.

    declared is "auto" or the format that it must be. Error if it is none or several of FORMATS,
    refers to other files, is damaged, or would be larger than `max_virtual_size_bytes`.
    """
    read, size = source.read, source.size_bytes
    if size < magic.SECTOR:
        raise Error(f"the image is too short: {log.size(size)}", "fetch it again")
    look = magic.look(read, size)
    found = _one_format(look)
    if declared not in ("auto", found):
        raise Error(
            f"format={declared}, but the image is {found}", f"set format={found} or format=auto"
        )
    if found == "raw":
        virtual = size
        if declared == "auto":
            _require_disk(look, found)
    else:
        with _about(found):
            virtual = formats.PARSERS[found](read, size)
    return Image(found, _bounded(found, virtual, max_virtual_size_bytes))


@contextmanager
def _about(found: str) -> Iterator[None]:
    """Name what a parser speaks about."""
    try:
        yield
    except Error as error:
        raise Error(f"the {found} image {error.message}", error.hint) from error


def begun(source: Source, declared: str, max_virtual_size_bytes: int) -> Parts:
    """Return the parts, offset and size, in which a qcow2 that is still to come can be decoded.

    Empty for what is no such thing. A part is what one L2 table is about: qemu-img reads all tables
    of what it converts before the first cluster. This is a first look; inspect() has the last word.
    """
    if declared not in ("auto", "qcow2") or source.size_bytes <= magic.HEAD_BYTES:
        return []
    head = source.read(0, magic.HEAD_BYTES)
    if not head.startswith(magic.QCOW2):
        return []
    with _about("qcow2"):
        header = formats.qcow2_header(source.read, source.size_bytes)
    virtual = _bounded("qcow2", header.virtual_bytes, max_virtual_size_bytes)
    step = max(header.span_bytes, -(-virtual // _MAX_SPANS))
    return [(start, min(step, virtual - start)) for start in range(0, virtual, step)]


def _bounded(found: str, virtual: int, max_virtual_size_bytes: int) -> int:
    if virtual == 0 or virtual % magic.SECTOR:
        raise Error(
            f"the {found} image is not a whole number of 512-byte sectors: {virtual} bytes",
            "fetch it again; it may be cut short",
        )
    if virtual > max_virtual_size_bytes:
        raise Error(
            f"the image is a disk of {log.size(virtual)}, and max_virtual_size is"
            f" {log.size(max_virtual_size_bytes)}",
            "raise max_virtual_size in section [image] of cloudimage.conf",
        )
    return virtual


def _one_format(look: magic.Look) -> str:
    """Return the format, unless another program could take the file for something else."""
    names = look.names
    if look.begins_as_container or len(names) > 1:
        names = names + [name for name in look.disks if name in magic.TABLES]
    if len(names) > 1:
        raise Error(
            f"the image is several things at once: {', '.join(names)}",
            "do not use it: a file like this is made to be read in two ways",
        )
    if look.foreign:
        name, hint = next(iter(look.foreign.items()))
        raise Error(f"the image is {name}, none of {', '.join(FORMATS)}", hint)
    return names[0] if names else "raw"


def _require_disk(look: magic.Look, found: str) -> None:
    """Require evidence that what is to be a disk is one; a declared format goes without.

    A partition table or a file system is that: Alpine's BIOS images, and those for kernel_path=,
    are one file system without a table. An ISO image alone boots from a CD drive only; with an MBR
    or a GPT (a hybrid) it is a disk.
    """
    if look.disks == [magic.ISO]:
        raise Error(
            f"the image is {magic.ISO}, which does not boot as a disk",
            f"give a cloud image, or set format={found} to write it as it is",
        )
    if not look.disks:
        raise Error(
            "the image has neither a partition table nor a known file system nor a known format",
            f"see whether it is a disk image, and set format={found} to write it as it is",
        )


def decode(
    source: Source,
    image: Image,
    output: Path,
    parts: Sequence[tuple[int, int]] = (),
) -> None:
    """Decode `source`, which is `image` and not raw, into the file `output`.

    output becomes a sparse raw file of exactly the virtual size; whatever it held is gone. Error
    if qemu-img sees another image, or finds it damaged. parts: in which pieces, one if empty.
    """
    virtual = image.virtual_size_bytes
    with errors.context(f"decoding the {image.format} image"), open(output, "r+b") as file:
        file.truncate(0)
        file.truncate(virtual)
        with _qemu_img(image, source, "info", "--output=json") as lines:
            text = lines.read(1 << 20)
        _agree(image, text)
        # the checks read the image while it is decoded: nobody uses the output before all are done
        mapping = _qemu_img(image, source, "map", "--output=json")
        checking = _qemu_img(image, source, "check", "-q", accept=_CHECKED)
        with mapping as lines, checking as nothing:
            for part in parts or [(0, virtual)]:
                _convert(image, source, output, part, file)
            _check_extents(lines, source.size_bytes)
            nothing.read()
        if os.fstat(file.fileno()).st_size != virtual:
            raise Error(
                f"qemu-img wrote {os.fstat(file.fileno()).st_size} bytes instead of {virtual}",
                "try again",
            )


def _convert(
    image: Image, source: Source, output: Path, part: tuple[int, int], file: BinaryIO
) -> None:
    """Decode one part, and write behind: decompression is the limit, so the disk has time, and
    whoever makes the file last finds little left to do."""
    place = f"driver=raw,offset={part[0]},size={part[1]}"
    target = f"{place},file.driver=file,file.filename={output}"
    command = [*_CONVERT, "--target-image-opts"]
    with _qemu_img(image, source, *command, place=place, last=[target]) as nothing:
        while not select.select([nothing], [], [], _WRITE_BEHIND_S)[0] or nothing.read(4096):
            os.fdatasync(file.fileno())


def look_inside(output: Path, image: Image, declared: str) -> None:
    """See that a decoded disk is one: an Error if it is again something that must be decoded."""
    with open(output, "rb") as file:
        inner = Source(file.fileno(), os.fstat(file.fileno()).st_size)
        if inner.size_bytes != image.virtual_size_bytes:
            raise Error("the image is not what its first bytes said", "fetch it again")
        look = magic.look(inner.read, inner.size_bytes)
    if look.names:
        raise Error(
            f"decoding the {image.format} image: the disk inside is {' and '.join(look.names)}"
            " again",
            "give an image that is complete after one decoding",
        )
    if declared == "auto":
        _require_disk(look, image.format)


@contextmanager
def _qemu_img(
    image: Image,
    source: Source,
    *command: str,
    place: str = "",
    last: Sequence[str] = (),
    accept: Sequence[int] = (0,),
) -> Iterator[IO[bytes]]:
    """Run qemu-img on the source and hand out its output, which must be read to the end.

    Format and connection are named, so that nothing is guessed. A vpc image is as large as its
    footer says: left alone, qemu goes by the CHS geometry if the creator is not known to it
    (VirtualBox), and the disk's end is lost.
    """
    with served(source) as connection:
        server = f"file.driver=nbd,file.server.type=fd,file.server.str={connection}"
        options = f"driver={image.format},{server}"
        if image.format == "vpc":
            options += ",force_size_calc=current_size"
        if place:
            inner = ",".join(f"file.{option}" for option in options.split(","))
            options = f"{place},{inner}"
        argv = ["qemu-img", *command, "--image-opts", options, *last]
        silent = command[0] != "check"  # that of vpc says that there is none
        try:
            with run.reader(argv, descriptors=[connection], silent=silent, accept=accept) as lines:
                yield lines
        except run.Failed as error:
            if error.words.endswith("unknown compression type: 1"):
                way_out = "convert the image elsewhere: qemu-img convert -c -O qcow2"
                raise Error("this node's qemu-img was built without zstd", way_out) from error
            raise Error(
                error.message, "see its words above; fetch it again if it is cut"
            ) from error


@contextmanager
def _answer() -> Iterator[None]:
    """Take a qemu-img that prints no JSON, or not of this shape, for a failed one."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise Error("qemu-img gave no answer that could be read") from error


def _agree(image: Image, text: bytes) -> None:
    """Compare qemu-img's look with ours: a single parser has been fooled more than once."""
    with _answer():
        info = json.loads(text)
        seen = Image(info["format"], info["virtual-size"])
        details = info.get("format-specific", {}).get("data", {})
        vmdk_type = details.get("create-type", formats.VMDK_TYPES[0])
        names = ("backing-filename", "data-file", "encrypted", "encrypt", "corrupt")
        odd = [name for name in names if info.get(name) or details.get(name)]
    if seen != image:
        raise Error(f"qemu-img sees a disk of {seen.virtual_size_bytes} bytes, in {seen.format}")
    if odd or vmdk_type not in formats.VMDK_TYPES:
        raise Error(f"qemu-img sees what must not be there: {odd[0] if odd else 'create-type'}")


def _check_extents(lines: IO[bytes], size: int) -> None:
    """See that each extent that qemu-img map prints, one a line, lies inside the file.

    A line at a time: for 100 GiB that years of use have scattered, it can be 250 MB of JSON.
    """
    for line in iter(lambda: lines.readline(4096), b""):
        with _answer():
            text = line.strip(b"[],\n")
            extent = json.loads(text) if text else {}
            end = extent["offset"] + extent["length"] if "offset" in extent else 0
        if end > size:
            raise Error("it is cut short: data lies outside the file", "fetch it again")
