"""cloudimage variants: what this node would use."""

from __future__ import annotations

import argparse
from pathlib import Path

from lib.admin import common
from lib.errors import Error, several
from lib.settings import config, params
from lib.settings.params import Job


def add(commands: common.Subparsers) -> None:
    """Add variants."""
    words = "list the variants as this node would use them: image, checksum, signature"
    parser = common.subcommand(commands, "variants", words)
    common.add_json(parser)
    parser.set_defaults(action=_variants)


def _variants(args: argparse.Namespace) -> None:
    problems: list[str] = []
    rows = []
    offered = listed(params.config_directory(common.environment()))
    for name in sorted(params.variant_files(params.config_directory(common.environment()))):
        try:
            rows.append(_row(common.job(name), name in offered))
        except Error as error:
            problems += error.lines
    if args.json:
        common.show_json(rows)
    else:
        for row in rows:
            _show(row)
    if problems:
        raise several(problems)


def listed(directory: Path) -> set[str]:
    """Return the variants that Ganeti offers: those of variants.list, the first word of a line."""
    path = config.BUNDLE / "variants.list"
    if not path.exists():  # a link to the administrator's, which may be elsewhere
        path = directory / "variants.list"
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    return {words[0] for words in map(str.split, lines) if words}


def _row(job: Job, is_offered: bool) -> dict[str, object]:
    checksum = ":".join(job.checksum) if isinstance(job.checksum, tuple) else job.checksum
    return {
        "name": job.variant,
        "description": job.description,
        "image": str(job.image) if job.image else None,
        "checksum": str(checksum) if checksum else None,
        "signature": str(job.signature) if job.signature else None,
        "offered": is_offered,
    }


def _show(row: dict[str, object]) -> None:
    mark = "" if row["offered"] else "  (not in variants.list: Ganeti does not offer it)"
    common.show(f"{row['name']}: {row['description']}{mark}")
    common.show(f"  image      {row['image'] or '(from -O image=)'}")
    common.show(f"  checksum   {row['checksum'] or 'none'}")
    common.show(f"  signature  {row['signature'] or 'none'}")
