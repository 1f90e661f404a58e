"""See, fill and empty this node's images, and see and refresh what the guests are told."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Optional

from lib import __version__, entry, log
from lib.admin import cached, check, explain, fetch, push, reseed, seed, variants

SUBCOMMANDS = (explain, seed, reseed, check, variants, fetch, cached, push)
STATUSES = "exit status: 0 done, 1 failed, 2 wrong arguments, 3 seed --diff found a difference"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command; each subcommand's module adds its own part."""
    top = argparse.ArgumentParser(prog="cloudimage", description=__doc__, epilog=STATUSES)
    top.add_argument("-d", "--debug", action="store_true", help="show each program that is run")
    top.add_argument("-V", "--version", action="version", version=f"cloudimage {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for each in SUBCOMMANDS:
        each.add(commands)
    return top


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command of `cloudimage`; return its exit status (see STATUSES)."""
    entry.prepare()
    status: list[Optional[int]] = []
    return entry.guard(lambda: status.append(_run(argv))) or status[0] or 0


def _run(argv: Optional[Sequence[str]]) -> Optional[int]:
    args = parser().parse_args(argv)
    if args.debug:
        log.enable_debug()
    found: Optional[int] = args.action(args)
    return found
