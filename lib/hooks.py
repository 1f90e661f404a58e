"""Run the administrator's scripts of hooks.d/<phase>, as root, in name order."""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Optional

from lib import log, run
from lib.errors import Error
from lib.settings import config

PHASES = ("pre", "post")
LIMIT_S = 3600.0  # a hook that takes longer hangs
LINGER_S = 1.0  # for the last words of what a hook leaves running
_READ_BYTES = 65536
_NAME = re.compile(r"[A-Za-z0-9_-]+")  # run-parts(8)'s rule without --lsbsysinit

# what editors and packagers leave, and our own README
_LEFTOVER = re.compile(r"~$|^#|^\.|\.(dpkg|rpm|ucf)[-a-z]*$|\.sw[op]$|^README")


def find(directory: Path, phase: str) -> list[Path]:
    """Return the hooks of a phase: the bundle's, then those of the configuration directory.

    Error if others than root can write a hook or its folder.
    """
    scripts = config.overlay(
        directory,
        f"hooks.d/{phase}",
        lambda path: path.is_file() and _obstacle(path) is None,
    )
    for script in scripts:
        config.require_trusted(script)
        config.require_trusted(script.parent)
    return scripts


def _obstacle(path: Path) -> Optional[str]:
    """Return the way out for a file that will not run as a hook, None for one that will."""
    if not _NAME.fullmatch(path.name):
        return "use letters, digits, - and _ for its name, no dot"
    return None if os.access(path, os.X_OK) else f"chmod +x {path}, or take it away"


def warn(directory: Path) -> None:
    """Say which files look like hooks and will not run, a WARNING each, with the way out."""
    for line in skipped(directory):
        log.warning(line)


def skipped(directory: Path) -> list[str]:
    """Return a line for each file that looks like a hook and will not run, with the way out."""
    lines = []
    for base in (config.BUNDLE, directory):
        for folder in ("", *PHASES):
            place = base / "hooks.d" / folder
            if not place.is_dir():
                continue
            for path in sorted(each for each in place.iterdir() if not each.is_dir()):
                if _LEFTOVER.search(path.name):
                    continue
                way_out = _obstacle(path) if folder else "move it into pre or post beside it"
                if way_out is not None:
                    lines.append(f"{path}: will not run; {way_out}")
    return lines


def call(directory: Path, phase: str, environment: Mapping[str, str]) -> None:
    """Run the hooks of a phase; Error names the first that does not end with status 0.

    environment: all that Ganeti gave, and the CLOUDIMAGE_ variables. Output goes to the log. What
    a hook leaves running goes on; a hook that is ended by its time limit takes all with it.
    """
    for script in find(directory, phase):
        name = f"hook {phase}/{script.name}"
        log.step(name)
        with ExitStack() as stack:
            try:
                child = stack.enter_context(
                    run.process(
                        [os.fspath(script)],
                        stderr=run.STDOUT,
                        environment={**environment, "CLOUDIMAGE_PHASE": phase},
                    )
                )
            except OSError as error:  # what is missing is mostly not the file, but what it names
                raise Error(
                    f"{name} cannot be started: {error.strerror}",
                    "let its first line be #! and a program that is there, without a carriage"
                    " return",
                ) from error
            for line in _lines(child, name):
                log.step(f"{script.name}: {line.decode('ascii', 'backslashreplace').rstrip()}")
            status = child.wait()
        if status != 0:
            words = f"status {status}" if status > 0 else f"signal {-status}"
            raise Error(
                f"{name} ended with {words}",
                f"see its output above, or take {script} away",
            )


def _lines(child: run.Process[bytes], name: str) -> Iterator[bytes]:
    """Yield what a hook prints until it has ended, whoever keeps its output open after that."""
    assert child.stdout is not None
    output, deadline, rest = child.stdout.fileno(), time.monotonic() + LIMIT_S, b""
    ended = os.pidfd_open(child.pid)
    watched = [output, ended]
    try:
        while watched:
            ready = select.select(watched, [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready and ended in watched:
                words = f"{name} did not end within {LIMIT_S:g} s"
                raise Error(words, "see its output above, or let it start what takes long")
            if not ready:
                break
            if ended in ready:
                watched.remove(ended)
                deadline = time.monotonic() + LINGER_S
            if output in ready:
                block = os.read(output, _READ_BYTES)
                if not block:
                    watched.remove(output)
                *lines, rest = (rest + block).split(b"\n")
                yield from lines
                if len(rest) > _READ_BYTES:
                    yield rest
                    rest = b""
            if time.monotonic() > deadline and ended not in watched:
                break
    finally:
        os.close(ended)
    if rest:
        yield rest
