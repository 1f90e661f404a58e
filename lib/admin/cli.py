"""The administrator's command: look at the node's image cache, fill it, and empty it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Optional

from lib import __version__, entry, log
from lib.environment import Environment
from lib.errors import Error, several
from lib.settings import params
from lib.settings.params import Job
from lib.source import obtain

_DAY_S = 86400.0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command of `cloudimage`; 0 done, 1 failed, 2 wrong arguments."""
    entry.prepare()
    parser = argparse.ArgumentParser(prog="cloudimage", description=__doc__)
    parser.add_argument("-d", "--debug", action="store_true", help="show each program that is run")
    version = f"cloudimage {__version__}"
    parser.add_argument("-V", "--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    words = "put images into the cache of this node, as create would"
    fetch = commands.add_parser("fetch", help=words, description=words)
    words = "an OS parameter, as for gnt-instance add"
    fetch.add_argument(
        "-O", dest="settings", metavar="NAME=VALUE", action="append", default=[], help=words
    )
    fetch.add_argument("images", nargs="+", metavar="VARIANT|URL|PATH")
    words = "list what is in the cache: name, URL, size on disk, age, last use"
    commands.add_parser("cache", help=words, description=words)
    words = "remove leftovers and what is over the limits of cloudimage.conf"
    prune = commands.add_parser("prune", help=words, description=words)
    prune.add_argument("--all", action="store_true", help="remove everything that is not in use")
    words = "list the variants as this node would use them: image, checksum, signature"
    commands.add_parser("variants", help=words, description=words)
    args = parser.parse_args(argv)
    if args.debug:
        log.enable_debug()
    actions = {
        "fetch": lambda: _fetch(args.images, args.settings),
        "cache": _cache,
        "prune": lambda: _prune(args.all),
        "variants": _variants,
    }
    return entry.guard(actions[args.command], args.debug)


def _environment(variant: Optional[str] = None, settings: Sequence[str] = ()) -> Environment:
    """Return the environment that Ganeti would give for this variant and these parameters."""
    variables = {key: os.environ[key] for key in ("CLOUDIMAGE_CONFDIR",) if key in os.environ}
    if variant is not None:
        variables["OS_VARIANT"] = variant
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise Error(f"-O {setting}: has no value", "write -O NAME=VALUE")
        variables["OSP_" + name.upper().replace("-", "_")] = value
    return Environment.from_environ(variables)


def _job(image: str, settings: Sequence[str]) -> Job:
    if "/" in image:
        return params.parse(_environment(None, [*settings, f"image={image}"]))
    return params.parse(_environment(image, settings))


def _fetch(images: Sequence[str], settings: Sequence[str]) -> None:
    problems = []
    for image in images:
        try:
            job = _job(image, settings)
            with obtain.raw_image(job) as raw:
                log.step(f"fetch: {image} is ready, {log.size(raw.size_bytes)} once on a disk")
        except Error as error:
            problems += [f"{log.redact(image)}: {line}" for line in error.lines]
    if problems:
        raise several(problems)


def _cache() -> None:
    settings = params.load_config(_environment())
    store = obtain.store(settings)
    entries = store.entries()
    for each in entries:
        in_use = "in use" if each.in_use else f"used {_days(each.idle_s)}"
        _print(
            f"{each.name[:12]}  {log.size(each.allocated_bytes):>8}  {_days(each.age_s):>10}"
            f"  {in_use:>15}  {each.note['url']}"
        )
    total = sum(each.allocated_bytes for each in entries)
    _print(
        f"{len(entries)} images, {log.size(total)} of {log.size(store.max_size_bytes)}"
        f" in {store.directory}"
    )


def _prune(everything: bool) -> None:
    store = obtain.store(params.load_config(_environment()))
    for each in store.prune(everything):
        _print(f"removed {each.name[:12]}  {log.size(each.allocated_bytes):>8}  {each.note['url']}")


def _variants() -> None:
    problems: list[str] = []
    for name in sorted(params.variant_files(params.config_directory(_environment()))):
        try:
            job = params.parse(_environment(name))
        except Error as error:
            problems += error.lines
            continue
        image = str(job.image) if job.image else "(from -O image=)"
        _print(f"{name}: {job.description}\n  image      {image}")
        checksum = ":".join(job.checksum) if isinstance(job.checksum, tuple) else job.checksum
        _print(f"  checksum   {checksum or 'none'}")
        _print(f"  signature  {job.signature or 'none'}")
    if problems:
        raise several(problems)


def _days(seconds: float) -> str:
    if seconds < _DAY_S:
        hours, minutes = divmod(int(seconds) // 60, 60)
        return f"{hours}h{minutes:02d} ago"
    return f"{seconds / _DAY_S:.0f} d ago"


def _print(line: str) -> None:
    sys.stdout.write("\n".join(map(log.printable, line.split("\n"))) + "\n")
