"""cloudimage fetch: the cache filled before the first instance asks."""

from __future__ import annotations

import argparse

from lib import log
from lib.admin import common, variants
from lib.errors import Error, context, several
from lib.source import obtain


def add(commands: common.Subparsers) -> None:
    """Add fetch."""
    words = "put images into the cache of this node, as create would"
    parser = common.subcommand(commands, "fetch", words)
    common.add_settings(parser)
    words = "every variant of variants.list that has an image for this node"
    parser.add_argument("--all", action="store_true", help=words)
    parser.add_argument("images", nargs="*", metavar="VARIANT|URL|PATH")
    parser.set_defaults(action=_fetch, error=parser.error)


def _fetch(args: argparse.Namespace) -> None:
    images = [*args.images, *(_offered() if args.all else ())]
    if not images:
        args.error("give a variant, a URL, a path, or --all")
    with common.store().workspace():
        pass  # where it would not be kept, nothing is fetched
    problems: list[str] = []
    for image in images:
        what = log.redact(image) or repr(image)
        try:
            with context("", what), obtain.raw_image(common.job(image, args.settings)) as raw:
                log.step(f"fetch: {image} is ready, {log.size(raw.size_bytes)} once on a disk")
        except Error as error:
            problems += error.lines
    if problems:
        raise several(problems)


def _offered() -> list[str]:
    """Return the variants that Ganeti offers, if they are for this machine and have an image."""
    names = variants.listed(common.directory())
    return sorted(filter(variants.has_image, names))
