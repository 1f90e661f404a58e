"""cloudimage cache and cloudimage prune: what is in the cache, and away with it."""

from __future__ import annotations

import argparse

from lib import log
from lib.admin import common
from lib.source.stored import Stored


def add(commands: common.Subparsers) -> None:
    """Add cache and prune."""
    words = "list what is in the cache: name, URL, size on disk, age, last use"
    parser = common.subcommand(commands, "cache", words)
    common.add_json(parser)
    parser.set_defaults(action=_cache)
    words = "remove leftovers and what is over the limits of cloudimage.conf"
    parser = common.subcommand(commands, "prune", words)
    parser.add_argument("--all", action="store_true", help="remove everything that is not in use")
    parser.set_defaults(action=_prune)


def _cache(args: argparse.Namespace) -> None:
    store = common.store()
    entries = store.entries()
    if args.json:
        common.show_json(list(map(_row, entries)))
        return
    for each in entries:
        in_use = "in use" if each.in_use else f"used {common.days(each.idle_s)}"
        common.show(
            f"{each.name[:12]}  {log.size(each.allocated_bytes):>8}  {common.days(each.age_s):>10}"
            f"  {in_use:>15}  {each.note['url']}"
        )
    total = sum(each.allocated_bytes for each in entries)
    common.show(
        f"{len(entries)} images, {log.size(total)} of {log.size(store.max_size_bytes)}"
        f" in {store.directory}"
    )


def _row(each: Stored) -> dict[str, object]:
    return {
        "name": each.name,
        "url": each.note["url"],
        "digests": each.note["digests"],
        "fetched": each.note["fetched"],
        "allocated_bytes": each.allocated_bytes,
        "age_s": int(each.age_s),
        "idle_s": int(each.idle_s),
        "in_use": each.in_use,
    }


def _prune(args: argparse.Namespace) -> None:
    for each in common.store().prune(args.all):
        size = log.size(each.allocated_bytes)
        common.show(f"removed {each.name[:12]}  {size:>8}  {each.note['url']}")
