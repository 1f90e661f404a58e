"""Root's side of the decoder: start it in the sandbox, hold it to limits, believe little."""

from __future__ import annotations

import json
import os
import select
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Optional

from lib import log, run
from lib.errors import Error
from lib.sandbox import Limits, Sandbox

LIB = Path(__file__).resolve().parent.parent
PROGRAM = "/tmp/lib/decoder/__main__.py"
VERDICT_BYTES = 4096
_SECTOR = 512
_FILES = ("scratch", "output")


@dataclass(frozen=True)
class Decoded:
    """What came of an image."""

    size_bytes: int
    path: Optional[Path]  # None: the input itself is the raw image


@dataclass(frozen=True)
class Decoder:
    """A decoder at work."""

    child: run.Process[bytes]
    words: BinaryIO
    file: BinaryIO
    work: Path
    limit_bytes: int
    wall_s: float
    teller: BinaryIO

    def complete(self) -> None:
        """Tell it that all of the image is there."""
        with suppress(BrokenPipeError):  # it has made up its mind already
            os.write(self.teller.fileno(), b".")

    def result(self) -> Decoded:
        """Wait for the verdict and check it from outside; Error if the image is refused."""
        text = self._read()
        self.words.seek(0)
        for line in self.words.read(1 << 16).decode("ascii", "backslashreplace").splitlines():
            log.step(log.printable(line, run.REPLAY_WIDTH))
        size_bytes, where = _verdict(text, self.limit_bytes)
        path = None if where == "input" else self.work / where
        if path is None:
            _check(os.fstat(self.file.fileno()), size_bytes)
        else:
            _check(path.lstat(), size_bytes)
            path.chmod(0o600)
        for each in _FILES:
            if each != where:
                (self.work / each).unlink()
        return Decoded(size_bytes, path)

    def _read(self) -> bytes:
        """Return what it prints, within the limits on length and time."""
        assert self.child.stdout is not None
        pipe, text, deadline = self.child.stdout.fileno(), b"", time.monotonic() + self.wall_s
        progress = log.Progress("decode", None)
        while len(text) <= VERDICT_BYTES:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([pipe], [], [], min(left, 1.0))[0]:
                made = ((self.work / name).lstat() for name in _FILES)
                progress.update(sum(status.st_blocks * 512 for status in made))
                if left > 0:
                    continue
                raise Error(
                    f"decoding took longer than the limit of {self.wall_s:.0f} s",
                    "see whether the disk of the node is slow",
                )
            block = os.read(pipe, VERDICT_BYTES)
            if not block:
                break
            text += block
        progress.end()
        return text


@contextmanager
def started(
    file: BinaryIO, declared: str, limit_bytes: int, work: Path, total_bytes: Optional[int] = None
) -> Iterator[Decoder]:
    """Start the decoder on `file`; it makes one sparse raw file in `work` of the image.

    declared is the format that the image must have, or "auto". total_bytes is for a file that
    still grows: how long it will be, when complete() is called. The decoder is gone when the block
    ends; what is in `work` is of no use unless there was a result.
    """
    run.require("bwrap", "prlimit", "qemu-img", "unshare")
    for name in _FILES:
        (work / name).unlink(missing_ok=True)
        (work / name).touch(0o600)
    size_bytes = total_bytes or os.fstat(file.fileno()).st_size
    limits = _limits(limit_bytes, size_bytes)
    with ExitStack() as stack:
        reading, writing = os.pipe()
        told = stack.enter_context(open(reading, "rb"))
        teller = stack.enter_context(open(writing, "wb"))
        # for reading only, whatever `file` was opened for
        source = stack.enter_context(open(f"/proc/self/fd/{file.fileno()}", "rb"))
        words = stack.enter_context(open(os.memfd_create("stderr"), "w+b"))
        numbers = (limit_bytes, size_bytes, -1 if total_bytes is None else told.fileno())
        argv = ["/usr/bin/python3", "-I", "-S", "-B", PROGRAM, declared, *map(str, numbers)]
        write = {f"/{name}": work / name for name in _FILES}
        sandbox = Sandbox({"/tmp/lib": _library(work)}, write, limits)
        child = stack.enter_context(
            run.process(
                argv, stdin=source, stderr=words, sandbox=sandbox, descriptors=[told.fileno()]
            )
        )
        told.close()
        yield Decoder(child, words, file, work, limit_bytes, limits.wall_s, teller)


def _library(work: Path) -> Path:
    """Return the folder of our own code, readable to the sandbox's user.

    A clone made by root under umask 077 is not: then it is a copy, in `work`.
    """
    modules = [path for path in LIB.rglob("*") if path.is_dir() or path.suffix == ".py"]
    if all(path.stat().st_mode & 0o004 for path in (LIB, *modules)):
        return LIB
    copy = work / "lib"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(LIB, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy


def _limits(limit_bytes: int, size_bytes: int) -> Limits:
    """Bound the work by what there may be of it.

    Address space of each process: twice what qemu-img was seen to take (455 MiB: a stack for each
    of its threads). CPU: a tenth of the pace of zlib, the slowest (300 MiB/s). Wall clock, from
    when all of the image is there: a slow disk.
    """
    work = limit_bytes + size_bytes
    return Limits(
        address_space_bytes=1 << 30,
        cpu_s=60 + work // (32 << 20),
        file_size_bytes=limit_bytes,
        processes=4096,
        wall_s=120 + work / (8 << 20),
    )


def _verdict(text: bytes, limit_bytes: int) -> tuple[int, str]:
    """Return size and place; what was decoded may have taken the writer over."""
    try:
        said = json.loads(text)
        if "error" in said:
            hint = log.printable(str(said["hint"]), 300)
            raise Error(log.printable(str(said["error"]), 300), hint or None)
        size, where = said["size_bytes"], said["where"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise Error("the decoder gave no answer that could be read") from error
    sound = (
        type(size) is int
        and 0 < size <= limit_bytes
        and size % _SECTOR == 0
        and where in ("input", *_FILES)
    )
    if not sound:
        raise Error("the decoder gave an answer that makes no sense")
    return size, where


def _check(status: os.stat_result, size_bytes: int) -> None:
    """See from outside that the raw file is what the verdict says."""
    if not stat.S_ISREG(status.st_mode) or status.st_size != size_bytes:
        words = f"the decoder wrote {status.st_size} bytes instead of {size_bytes}"
        raise Error(words, "try again")
