"""The programs that a node must have: which versions, and whether the sandbox starts."""

from __future__ import annotations

import re
from functools import cache
from typing import Optional

from lib import run
from lib.errors import Error
from lib.sandbox import Sandbox

# the oldest that were tried, those of Debian 11; None: any
NEEDED: dict[str, Optional[tuple[int, ...]]] = {
    "bwrap": (0, 4, 1),
    "bzip2": None,
    "gpgv": None,
    "gzip": None,
    "lz4": None,
    "mcopy": None,
    "mdir": None,
    "mkfs.vfat": (4, 2),  # --invariant
    "prlimit": None,
    "qemu-img": (5, 2),
    "qemu-nbd": None,
    "sfdisk": (2, 36),
    "unshare": None,
    "xz": None,
    "zstd": None,
}
# what every create needs, whatever the image is
CORE = ("bwrap", "mcopy", "mkfs.vfat", "prlimit", "qemu-img", "sfdisk", "unshare")
_TRIAL_S = 10.0


@cache
def version(tool: str) -> str:
    """Return the version that an installed tool tells, "" for none; both streams are looked at."""
    option = {"mkfs.vfat": "--help", "bzip2": "--help"}.get(tool, "--version")
    try:
        text = run.said([tool, option], timeout_s=_TRIAL_S)
    except Error:
        return ""
    found = re.search(r"\bv?([0-9]+(?:\.[0-9]+)+)", text)
    return found[1] if found else ""


def problem(tool: str) -> Optional[str]:
    """Return what is wrong with a tool, in one line with the package that is needed; or None."""
    try:
        run.require(tool)
    except Error as error:
        return str(error)
    least = NEEDED[tool]
    if least is None:
        return None
    there = version(tool)
    if there and tuple(map(int, there.split("."))) >= least:
        return None
    needed = f"{run.PACKAGES[tool]} {'.'.join(map(str, least))}"
    return f"{tool} {there or '(no version)'}: too old; install {needed} or newer"


def try_sandbox() -> None:
    """Start a program in the sandbox; Error with the way out if this node forbids it."""
    try:
        run.run(["true"], sandbox=Sandbox(), timeout_s=_TRIAL_S)
    except run.Failed as error:
        words = error.words.strip().splitlines()
        raise Error(
            f"the sandbox does not start: {words[-1] if words else error.message}",
            "bubblewrap needs mount, PID and network namespaces: not a chroot",
        ) from error
