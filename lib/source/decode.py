"""Root's side of the decoder: start it in the sandbox, hold it to limits, believe little."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Optional, Union

from lib import log, run
from lib.errors import Error

LIB = Path(__file__).resolve().parent.parent
VERDICT_BYTES = 4096
_FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")
_SECTOR = 512


@dataclass(frozen=True)
class Decoded:
    """What came of an image: where its raw bytes are, and what it was before."""

    format: str
    size_bytes: int
    path: Optional[Path]  # None: the input itself is the raw image


def decode(source: BinaryIO, declared: str, limit_bytes: int, work: Path) -> Decoded:
    """Let the decoder make one sparse raw file in `work` of the image in `source`.

    source: a file or a pipe, open for reading only. declared is the format
    that it must have, or "auto". Error if it is refused; what is in `work` is then of no use.
    """
    run.require("bwrap", "prlimit", "qemu-img", "setpriv")
    _require_readable()
    files = {name: work / name for name in ("scratch", "output")}
    for path in files.values():
        path.touch(0o600, exist_ok=False)
    read: dict[str, Union[Path, int]] = {"/tmp/lib": LIB}
    if source.seekable():
        read["/input"] = source.fileno()
    sandbox = run.Sandbox(
        read=read,
        write={f"/{name}": path for name, path in files.items()},
        limits=_limits(limit_bytes, source),
    )
    program = "/tmp/lib/decoder/__main__.py"
    argv = ["python3", "-I", "-B", program, declared, str(limit_bytes)]
    name, size_bytes, where = _verdict(run.run(argv, stdin=source, sandbox=sandbox), limit_bytes)
    for kind, path in files.items():
        if kind != where:
            path.unlink()
    if where == "copy":
        return _decode_copy(source, declared, limit_bytes, work)
    if where == "input":
        return Decoded(name, size_bytes, None)
    _check(files[where], size_bytes)
    return Decoded(name, size_bytes, files[where])


def _decode_copy(source: BinaryIO, declared: str, limit_bytes: int, work: Path) -> Decoded:
    """Decode a file that only root may read: qemu-img opens it by name, as another user."""
    path = work / "copy"
    with path.open("xb") as copy:
        copy_file(source, copy)
        path.chmod(0o644)
    with path.open("rb") as readable:
        decoded = decode(readable, declared, limit_bytes, work)
    if decoded.path is None:
        raise Error("the image changed while it was read", "try again")
    path.unlink()
    return decoded


def copy_file(source: BinaryIO, copy: BinaryIO) -> None:
    """Copy a whole file into a fresh one: a reflink where that is possible, holes stay holes."""
    names = [f"/proc/self/fd/{file.fileno()}" for file in (source, copy)]
    descriptors = [source.fileno(), copy.fileno()]
    run.run(["cp", "--reflink=auto", "--sparse=always", *names], descriptors=descriptors)


def _require_readable() -> None:
    if not LIB.stat().st_mode & 0o005 == 0o005:
        raise Error(
            f"{LIB}: the decoder, which runs as a user without rights, cannot read it",
            f"chmod -R a+rX {LIB.parent}",
        )


def _limits(limit_bytes: int, source: BinaryIO) -> run.Limits:
    """Bound the work by what there may be of it.

    Address space of each process: twice what qemu-img was seen to take (455 MiB: a stack for each
    of its threads). CPU: a tenth of the pace of zlib, the slowest (300 MiB/s). Wall clock: a slow
    disk, and for a pipe the network's own limits.
    """
    most = limit_bytes
    if source.seekable():
        most = min(limit_bytes, 1 << 40)
    return run.Limits(
        address_space_bytes=1 << 30,
        cpu_s=60 + most // (32 << 20),
        file_size_bytes=limit_bytes,
        wall_s=120 + most / (8 << 20),
    )


def _verdict(text: str, limit_bytes: int) -> tuple[str, int, str]:
    """Return format, size and place; what was decoded may have taken the writer over."""
    try:
        said = json.loads(text[:VERDICT_BYTES])
        if "error" in said:
            hint = log.printable(str(said["hint"]), 300)
            raise Error(log.printable(str(said["error"]), 300), hint or None)
        name, size, where = said["format"], said["size_bytes"], said["where"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise Error("the decoder gave no answer that could be read") from error
    sound = (
        name in _FORMATS
        and type(size) is int
        and 0 < size <= limit_bytes
        and size % _SECTOR == 0
        and where in ("input", "copy", "scratch", "output")
    )
    if not sound:
        raise Error("the decoder gave an answer that makes no sense")
    return name, size, where


def _check(path: Path, size_bytes: int) -> None:
    """See from outside that the raw file is what the verdict says."""
    found = path.lstat().st_size
    if found != size_bytes:
        raise Error(f"the decoder wrote {found} bytes instead of {size_bytes}", "try again")
    os.chmod(path, 0o600)
