"""What the subcommands share: how they read -O, -o and variables, and how they print."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from lib import log
from lib.environment import Environment
from lib.errors import Error
from lib.settings import params
from lib.settings.params import Job
from lib.source import obtain
from lib.source.cache import Cache

Subparsers = Any  # argparse has no public name for it
DAY_S = 86400.0


def subcommand(commands: Subparsers, name: str, words: str) -> argparse.ArgumentParser:
    """Add a subcommand; `words` is its help, in the list and in its own page."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=words, description=words)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add -O, as gnt-instance has it: of several the last counts."""
    words = "OS parameters, as for gnt-instance add"
    parser.add_argument("-O", dest="settings", metavar="NAME=VALUE,...", default="", help=words)


def split(text: str) -> list[str]:
    r"""Split at commas as Ganeti does (UnescapeAndSplit): \, is a comma, \\ a backslash."""
    parts = [""]
    for piece in re.findall(r"\\.|,|[^,\\]+|\\", text, re.DOTALL):
        if piece == ",":
            parts.append("")
        else:
            parts[-1] += piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece
    return parts


def pairs(option: str, text: str) -> dict[str, str]:
    """Parse NAME=VALUE,NAME=VALUE; `option` is where it was given."""
    found = {}
    for part in split(text) if text else ():
        name, equals, value = part.partition("=")
        if not equals:
            shown = log.printable(log.redact(part), 80)
            raise Error(
                f"{option} {shown}: has no value", r"write NAME=VALUE; a comma in a value is \,"
            )
        found[name] = value
    return found


def variable(parameter: str) -> str:
    """Return the variable that Ganeti gives an OS parameter in."""
    return "OSP_" + parameter.upper().replace("-", "_")


def parameters(settings: str) -> dict[str, str]:
    """Return the variables that Ganeti makes of -O."""
    return {variable(name): value for name, value in pairs("-O", settings).items()}


def environment(variables: Optional[Mapping[str, str]] = None) -> Environment:
    """Return what Ganeti would give with these variables, and the administrator's own folder."""
    if variables and variables.get("OS_VARIANT") == "":  # to a door: an OS without variants
        raise Error("the variant's name is empty", "cloudimage variants lists them")
    own = {key: os.environ[key] for key in ("CLOUDIMAGE_CONFDIR",) if key in os.environ}
    return Environment.from_environ({**own, **(variables or {})})


def directory() -> Path:
    """Return the folder of the administrator's files."""
    return params.config_directory(environment())


def store() -> Cache:
    """Return this node's cache."""
    return obtain.store(params.load_config(environment()))


def job(image: str, settings: str = "") -> Job:
    """Return the job of a variant's name, or of an image's path or URL."""
    variables = parameters(settings)
    variables.update({"OSP_IMAGE": image} if "/" in image else {"OS_VARIANT": image})
    return params.parse(environment(variables))


def days(seconds: float) -> str:
    """Return a time before now as a person reads it."""
    if seconds < DAY_S:
        hours, minutes = divmod(int(seconds) // 60, 60)
        return f"{hours}h{minutes:02d} ago"
    return f"{seconds / DAY_S:.0f} d ago"


def show(line: str) -> None:
    """Print lines on standard output, whatever is in them."""
    print("\n".join(map(_clean, line.split("\n"))))


def _clean(line: str) -> str:
    return log.printable(line, limit=max(len(line) * 10, 80))


def show_json(data: Any) -> None:
    """Print a value as JSON, in ASCII."""
    print(json.dumps(data, indent=1))
