"""cloudimage fetch: the cache filled before the first instance asks."""

from __future__ import annotations

import argparse

from lib import log
from lib.admin import common
from lib.errors import Error, several
from lib.source import obtain


def add(commands: common.Subparsers) -> None:
    """Add fetch."""
    words = "put images into the cache of this node, as create would"
    parser = common.subcommand(commands, "fetch", words)
    common.add_settings(parser)
    parser.add_argument("images", nargs="+", metavar="VARIANT|URL|PATH")
    parser.set_defaults(action=_fetch)


def _fetch(args: argparse.Namespace) -> None:
    problems = []
    for image in args.images:
        try:
            with obtain.raw_image(common.job(image, args.settings)) as raw:
                log.step(f"fetch: {image} is ready, {log.size(raw.size_bytes)} once on a disk")
        except Error as error:
            problems += [f"{log.redact(image)}: {line}" for line in error.lines]
    if problems:
        raise several(problems)
