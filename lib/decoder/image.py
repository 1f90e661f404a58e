"""Image files: which format they have, whether that format is safe to decode, and the decoding."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, BinaryIO

from lib import errors, log, run
from lib.decoder import formats, magic
from lib.errors import Error

FORMATS = ("raw", *formats.PARSERS)
# 16 requests out of order: a Debian image of 190 MiB takes 1.7 s instead of 2.3;
# --target-is-zero (qemu 5.0) is true of a file that was just made by truncate
_CONVERT = ("convert", "-W", "-m", "16", "-n", "--target-is-zero", "-O", "raw")
# exit statuses of qemu-img check: good, clusters that nobody uses, no check for this format (vpc)
_CHECKED = (0, 3, 63)
WRITE_BEHIND_S = 0.2


@dataclass(frozen=True)
class Image:
    """What inspect() found: the format, and the size of the disk that it decodes to."""

    format: str
    virtual_size_bytes: int


def inspect(file: BinaryIO, declared: str, max_virtual_size_bytes: int) -> Image:
    """Return the one format that `file` has by its content, after a look at its whole header.

    declared is "auto" or the format that it must be. Error if it is none or several of FORMATS,
    refers to other files, is damaged, or would be larger than `max_virtual_size_bytes`.
    """
    read, size = _reader(file)
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
            _require_disk(look)
    else:
        try:
            virtual = formats.PARSERS[found](read, size)
        except Error as error:
            raise Error(f"the {found} image {error.message}", error.hint) from error
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
    return Image(found, virtual)


def _reader(file: BinaryIO) -> tuple[magic.Read, int]:
    descriptor = file.fileno()
    size = os.fstat(descriptor).st_size

    def read(offset: int, length: int) -> bytes:
        # an offset from a header may be more than the kernel takes
        return os.pread(descriptor, length, offset) if offset < size else b""

    return read, size


def _one_format(look: magic.Look) -> str:
    """Return the format, unless another program could take the file for something else."""
    names = look.names
    if look.begins_as_container or len(names) > 1:
        names += [name for name in look.disks if name in magic.TABLES]
    if len(names) > 1:
        raise Error(
            f"the image is several things at once: {', '.join(names)}",
            "do not use it: a file like this is made to be read in two ways",
        )
    if look.foreign:
        name, hint = look.foreign[0]
        raise Error(f"the image is {name}, none of {', '.join(FORMATS)}", hint)
    return names[0] if names else "raw"


def _require_disk(look: magic.Look) -> None:
    """Require evidence that a file without a format's header is a disk; format=raw goes without.

    A partition table or a file system is that: Alpine's BIOS images, and those for kernel_path=,
    are one file system without a table. An ISO image alone boots from a CD drive only; with an MBR
    or a GPT (a hybrid) it is a disk.
    """
    if look.disks == (magic.ISO,):
        raise Error(
            f"the image is {magic.ISO}, which does not boot as a disk",
            "give a cloud image, or set format=raw to write it as it is",
        )
    if not look.disks:
        raise Error(
            "the image has neither a partition table nor a known file system nor a known format",
            "see whether it is a disk image, and set format=raw to write it as it is",
        )


def decode(file: BinaryIO, image: Image, output: BinaryIO) -> None:
    """Decode `file`, which inspect() found to be `image` and not raw, into the file `output`.

    output becomes a sparse raw file of exactly the virtual size; whatever it held is gone. Error
    if qemu-img sees another image than inspect() did, or finds it damaged. qemu-img opens both
    by their names.
    """
    virtual = image.virtual_size_bytes
    with errors.context(f"decoding the {image.format} image"):
        os.ftruncate(output.fileno(), 0)
        os.ftruncate(output.fileno(), virtual)
        name = str(file.name)
        _agree(image, run.run(_qemu_img(image, name, "info", "--output=json"), silent=True))
        # the checks read the image while it is decoded: nobody uses the output before all are done
        convert = [*_qemu_img(image, name, *_CONVERT), str(output.name)]
        converting = run.reader(convert, silent=True)
        mapping = run.reader(_qemu_img(image, name, "map", "--output=json"), silent=True)
        with converting as nothing, mapping as lines:
            run.run(_qemu_img(image, name, "check", "-q"), accept=_CHECKED)
            _check_extents(lines, os.fstat(file.fileno()).st_size)
            # write behind: decompression is the limit, so the disk has time, and whoever makes the
            # file last finds little left to do
            while not select.select([nothing], [], [], WRITE_BEHIND_S)[0] or nothing.read(4096):
                os.fdatasync(output.fileno())
        read, size = _reader(output)
        if size != virtual:
            raise Error(f"qemu-img wrote {size} bytes instead of {virtual}", "try again")
        look = magic.look(read, size)
        if look.names:
            raise Error(
                f"the disk inside is {' and '.join(look.names)} again",
                "give an image that is complete after one decoding",
            )


def _qemu_img(image: Image, name: str, *command: str) -> list[str]:
    """Return the argv that reads the input; format and file are named, so that nothing is guessed.

    A vpc image is as large as its footer says: left alone, qemu goes by the CHS geometry if the
    creator is not known to it (VirtualBox), and the disk's end is lost.
    """
    if image.format == "vpc":
        options = "driver=vpc,force_size_calc=current_size,file.driver=file"
        name = name.replace(",", ",,")  # qemu's own escape
        return ["qemu-img", *command, "--image-opts", f"{options},file.filename={name}"]
    return ["qemu-img", *command, "-f", image.format, name]


@contextmanager
def _answer() -> Iterator[None]:
    """Take a qemu-img that prints no JSON, or not of this shape, for a failed one."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise Error("qemu-img gave no answer that could be read") from error


def _agree(image: Image, text: str) -> None:
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
