"""Image files: which format they have, whether that format is safe to decode, and the decoding.

Root only looks at headers (lib/formats.py); qemu-img, which parses the rest, runs in the sandbox.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import IO, Any, BinaryIO

from lib import errors, formats, log, run
from lib.errors import Error

FORMATS = ("raw", *formats.PARSERS)
_ALLOWED = ", ".join(FORMATS)


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
    read, size = _reader(file), os.fstat(file.fileno()).st_size
    if size < formats.SECTOR:
        raise Error(f"the image is too short: {log.size(size)}", "fetch it again")
    look = formats.look(read, size)
    found = _one_format(look)
    if declared not in ("auto", found):
        raise Error(
            f"format={declared}, but the image is {found}", f"set format={found} or format=auto"
        )
    if found == "raw":
        _check_raw(look, size, declared)
        virtual = size
    else:
        virtual = formats.PARSERS[found](read, size)
    if virtual == 0 or virtual % formats.SECTOR:
        raise Error(
            f"the {found} image is not a whole number of 512-byte sectors ({virtual} bytes)",
            "fetch it again; it may be cut short",
        )
    if virtual > max_virtual_size_bytes:
        raise Error(
            f"the image is a disk of {log.size(virtual)}, and max_virtual_size is"
            f" {log.size(max_virtual_size_bytes)}",
            "raise max_virtual_size in section [image] of cloudimage.conf",
        )
    return Image(found, virtual)


def _reader(file: BinaryIO) -> formats.Read:
    descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size

    def read(offset: int, length: int) -> bytes:
        return os.pread(descriptor, length, offset) if offset < size else b""

    return read


def _one_format(look: formats.Look) -> str:
    """Return the format, unless another program could take the file for something else."""
    names = look.names
    if look.starts_as_container or len(names) > 1:
        names += look.disks
    if len(names) > 1:
        raise Error(
            f"the image is several things at once: {', '.join(names)}",
            "do not use it: a file like this is made to be read in two ways",
        )
    if look.foreign:
        name, hint = look.foreign[0]
        raise Error(f"the image is {name}, and the formats are {_ALLOWED}", hint)
    return names[0] if names else "raw"


def _check_raw(look: formats.Look, size: int, declared: str) -> None:
    """Require evidence that a file without a format's header is a disk.

    An administrator who declares it raw has said so; without that, a partition table or a file
    system is wanted (Alpine's BIOS images, and those for kernel_path=, are one file system without
    a table). An ISO image alone is an installer; with an MBR or a GPT (hybrid) it boots as a disk.
    """
    if declared == "raw":
        return
    if look.disks == ("an ISO 9660 file system",):
        raise Error(
            "the image is an ISO 9660 file system, which does not boot as a disk",
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
    if qemu-img sees another image than inspect() did, or finds it damaged. Both are files that
    have a name: the sandbox binds them by their descriptors.
    """
    virtual = image.virtual_size_bytes
    with errors.context(f"decoding the {image.format} image"):
        os.ftruncate(output.fileno(), 0)
        os.ftruncate(output.fileno(), virtual)
        source = run.Sandbox(read={"/input": file.fileno()}, limits=_limits(virtual))
        target = replace(source, write={"/output": output.fileno()})
        _agree(image, run.run(_info(image), sandbox=source, silent=True))
        # the checks read the image while it is decoded: nobody uses the output before all are done
        with run.reader(_convert(image), sandbox=target, silent=True) as nothing:
            run.run(_check(image), sandbox=source, accept=_CHECKED)
            with run.reader(_map(image), sandbox=source, silent=True) as extents:
                _check_extents(extents, os.fstat(file.fileno()).st_size)
            nothing.read()
        if os.fstat(output.fileno()).st_size != virtual:
            raise Error(f"qemu-img did not write a disk of {log.size(virtual)}")
        hidden = formats.look(_reader(output), virtual).names
        if hidden:
            raise Error(
                f"the disk inside is {' and '.join(hidden)} again",
                "give an image that is decoded once",
            )


# exit statuses of qemu-img check: good, clusters that nobody uses, no check for this format (vpc)
_CHECKED = (0, 3, 63)


def _source(image: Image) -> list[str]:
    """Name format and file, so that qemu-img guesses nothing.

    A vpc image's size is its footer's word: by default qemu takes the CHS geometry instead for
    some creators (VirtualBox), and cuts the disk's end off.
    """
    if image.format == "vpc":
        size = "force_size_calc=current_size"
        return ["--image-opts", f"driver=vpc,{size},file.driver=file,file.filename=/input"]
    return ["-f", image.format, "/input"]


def _info(image: Image) -> list[str]:
    return ["qemu-img", "info", "--output=json", *_source(image)]


def _check(image: Image) -> list[str]:
    return ["qemu-img", "check", "-q", *_source(image)]


def _map(image: Image) -> list[str]:
    return ["qemu-img", "map", "--output=json", *_source(image)]


def _convert(image: Image) -> list[str]:
    # out of order with 16 requests: 1.7 s instead of 2.3 for a Debian image of 190 MiB;
    # --target-is-zero (qemu 5.0) holds because the file was just made by truncate
    speed = ["-W", "-m", "16", "-n", "--target-is-zero"]
    return ["qemu-img", "convert", *speed, "-O", "raw", *_source(image), "/output"]


def _limits(virtual_size_bytes: int) -> run.Limits:
    """Bound qemu-img by the work there is.

    Address space: a hostile block map asks for 2 GiB. CPU: zlib, the slowest, decodes 250 MiB/s. Wall clock: for a slow disk.
    """
    return run.Limits(
        address_space_bytes=1 << 30,
        cpu_s=60 + virtual_size_bytes // (32 << 20),
        file_size_bytes=virtual_size_bytes,
        wall_s=120 + virtual_size_bytes / (8 << 20),
    )


def _agree(image: Image, text: str) -> None:
    """Compare qemu-img's look with ours: one parser alone was fooled more than once."""
    info: dict[str, Any] = json.loads(text)
    details = info.get("format-specific", {}).get("data", {})
    if info.get("format") != image.format:
        raise Error("qemu-img sees another format")
    if info.get("virtual-size") != image.virtual_size_bytes:
        raise Error(f"qemu-img sees another size: {info.get('virtual-size')} bytes")
    if details.get("create-type", formats.VMDK_TYPES[0]) not in formats.VMDK_TYPES:
        raise Error("qemu-img sees another vmdk type")
    for found in (info, details):
        for key in (
            "backing-filename",
            "full-backing-filename",
            "data-file",
            "encrypted",
            "encrypt",
            "corrupt",
        ):
            if found.get(key):
                raise Error(f"qemu-img sees what must not be there: {key}")


def _check_extents(lines: IO[bytes], size: int) -> None:
    """Read the map, an extent a line, and see that each lies inside the file.

    Line by line, as a disk scattered by years of use has millions of extents: 100 GiB in clusters
    of 64 KiB can be 250 MB of JSON.
    """
    for line in iter(lambda: lines.readline(4096), b""):
        text = line.strip(b"[],\n")
        extent = json.loads(text) if text else {}
        if extent.get("offset", 0) + extent.get("length", 0) > size and "offset" in extent:
            raise Error("it is cut short: data lies outside the file", "fetch it again")
