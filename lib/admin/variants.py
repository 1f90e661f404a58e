"""cloudimage variants: what this node would use, and whether the vendors still have it."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lib import entry, log
from lib.admin import common
from lib.errors import Error, several
from lib.files import open_regular
from lib.settings import config, params
from lib.settings.params import Job
from lib.settings.values import Location
from lib.source import index, locations, obtain

AT_ONCE = 8
FORK = multiprocessing.get_context("fork")


def add(commands: common.Subparsers) -> None:
    """Add variants."""
    words = "list the variants as this node would use them: image, checksum, signature"
    parser = common.subcommand(commands, "variants", words)
    words = "ask each one's servers for image, list and signature; nothing is downloaded"
    parser.add_argument("--check", action="store_true", help=words)
    common.add_json(parser)
    parser.add_argument("names", nargs="*", metavar="VARIANT", help="only these")
    parser.set_defaults(action=_variants)


def listed(directory: Path) -> set[str]:
    """Return the variants that Ganeti offers: those of variants.list, the first word of a line."""
    path = config.BUNDLE / "variants.list"
    if not path.exists():  # a link to the administrator's, which may be elsewhere
        path = directory / "variants.list"
    if not path.exists():
        return set()
    with open_regular(path) as file:
        lines = file.read().decode("utf-8", "replace").splitlines()
    return {words[0] for words in map(str.split, lines) if words}


def _variants(args: argparse.Namespace) -> int:
    directory = common.directory()
    names = args.names or sorted(params.variant_files(directory))
    if args.check:
        return _check(args, [name for name in names if args.names or has_image(name)])
    problems: list[str] = []
    rows = []
    offered = listed(directory)
    for name in names:
        try:
            if not args.names and not read(name).is_for_this_machine:
                continue
            found = job(name)
        except Error as error:
            problems += error.lines
            continue
        rows.append(_row(found, name in offered))
        if not args.json:
            _show(rows[-1], found.is_past_end)
    if args.json:
        common.show_json(rows)
    if problems:
        raise several(problems)
    return 0


def _row(job: Job, is_offered: bool) -> dict[str, Any]:
    checksum = ":".join(job.checksum) if isinstance(job.checksum, tuple) else job.checksum
    return {
        "name": job.variant,
        "description": job.description,
        "image": str(job.image) if job.image else None,
        "checksum": str(checksum) if checksum else None,
        "signature": str(job.signature) if job.signature else None,
        "end_of_life": str(job.end_of_life) if job.end_of_life else None,
        "offered": is_offered,
    }


def _show(row: dict[str, Any], is_past_end: bool) -> None:
    marks = [] if row["offered"] else ["not in variants.list: Ganeti does not offer it"]
    if is_past_end:
        marks.append(f"end of life since {row['end_of_life']}")
    common.show(f"{row['name']}: {row['description']}{''.join(f'  ({each})' for each in marks)}")
    common.show(f"  image      {row['image'] or '(from -O image=)'}")
    common.show(f"  checksum   {row['checksum'] or 'none'}")
    common.show(f"  signature  {row['signature'] or 'none'}")


# --- --check ---------------------------------------------------------------------------------


def has_image(name: str) -> bool:
    """Whether the variant brings an image, for this node's architecture."""
    variant = read(name)
    return variant.is_for_this_machine and bool(variant.keys.get("image"))


def read(name: str) -> params.Variant:
    """Return the variant as its file says; Error with a hint for an unknown one."""
    return params.read_variant(common.environment({"OS_VARIANT": name}))


def job(name: str) -> Job:
    """Return the job of a variant as it is."""
    return params.parse(common.environment({"OS_VARIANT": name}))


def _check(args: argparse.Namespace, names: list[str]) -> int:
    rows: list[dict[str, str]] = [{}] * len(names)
    with ExitStack() as stack:
        parts = [slice(first, None, AT_ONCE) for first in range(min(AT_ONCE, len(names)))]
        answers = [stack.enter_context(_asking(names[part])) for part in parts]
        for part, answer in zip(parts, answers):
            rows[part] = answer.recv()
    if args.json:
        common.show_json(rows)
    else:
        for row in rows:
            common.show(f"{row['state']:<6} {log.printable(row['name'], 80)}: {row['what']}")
    return int(any(row["state"] != "ok" for row in rows))


@contextmanager
def _asking(names: list[str]) -> Iterator[Connection]:
    """Ask these variants' servers in a process that is gone when the block ends.

    A process, because a request's time limit is a signal, and those are for main threads.
    """
    ours, theirs = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_answer, args=(names, theirs))
    child.start()
    theirs.close()
    try:
        yield ours
    finally:
        child.terminate()  # our own handler is there too: it unwinds
        child.join()


def _answer(names: list[str], output: Connection) -> None:
    entry.quiet()
    output.send([_asked(name) for name in names])


def _asked(name: str) -> dict[str, str]:
    """Ask one variant's servers; what is wrong is the answer."""
    try:
        found = index.resolved(job(name))
        digest = obtain.expected_digest(found)
        words = [_there(found, found.source())]
        words.append(f"{digest[0]} from the list" if digest else "no checksum")
        if found.signature is None:
            words.append("no signature")
        elif found.checksum is not None:  # it was over the list
            words.append("signature good")
        elif isinstance(found.signature, Location):
            words.append(f"signature {_there(found, found.signature)}")
    except Error as error:
        return {"name": name, "state": "error", "what": "; ".join(error.lines)}
    return {"name": name, "state": "ok", "what": ", ".join(words)}


def _there(job: Job, place: Location) -> str:
    if place.url is None:
        with locations.open_file(Path(str(place.path))) as file:
            return log.size(file.seek(0, 2))
    size_bytes = locations.size(place.url, job.config)
    if size_bytes is None:
        raise Error(f"{place}: does not answer, or without a length")
    return log.size(size_bytes)
