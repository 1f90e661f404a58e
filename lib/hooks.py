"""Run the administrator's scripts of hooks.d/<phase>, as root, in name order."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

from lib import log, run
from lib.errors import Error
from lib.settings import config

PHASES = ("pre", "post")
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
            for path in sorted(each for each in place.iterdir() if each.is_file()):
                if _LEFTOVER.search(path.name):
                    continue
                way_out = _obstacle(path) if folder else "move it into pre or post beside it"
                if way_out is not None:
                    lines.append(f"{path}: will not run; {way_out}")
    return lines


def call(directory: Path, phase: str, environment: Mapping[str, str]) -> None:
    """Run the hooks of a phase; Error names the first that does not end with status 0.

    environment: all that Ganeti gave, and the CLOUDIMAGE_ variables. Output goes to the log.
    """
    for script in find(directory, phase):
        log.step(f"hook {phase}/{script.name}")
        with run.process(
            [os.fspath(script)],
            stderr=run.STDOUT,
            environment={**environment, "CLOUDIMAGE_PHASE": phase},
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                log.step(f"{script.name}: {line.decode('ascii', 'backslashreplace').rstrip()}")
            status = child.wait()
        if status != 0:
            words = f"status {status}" if status > 0 else f"signal {-status}"
            raise Error(
                f"hook {phase}/{script.name} ended with {words}",
                f"see its output above, or take {script} away",
            )
