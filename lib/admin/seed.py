"""cloudimage seed: what a guest finds in its seed now, and whether Ganeti would say the same."""

from __future__ import annotations

import argparse
import base64
import difflib
import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import commands, log, workspace
from lib.admin import common, ganeti
from lib.admin.ganeti import Instance
from lib.environment import Disk
from lib.errors import Error
from lib.guest import seed as documents
from lib.settings import params

STATUS_DIFFERS = 3
LINKS = Path("/run/ganeti/instance-disks")  # NAME:INDEX, while a disk is active on this node
# what the user gave and nobody else may see; the other two files say what Ganeti says
SECRET = ("user-data", "vendor-data")


class Found(NamedTuple):
    """A seed: where it is, and its files by name."""

    where: str
    files: dict[str, bytes]


def add(commands: common.Subparsers) -> None:
    """Add seed."""
    words = "show what the guest is told now; on its node, or on the master for all"
    parser = common.subcommand(commands, "seed", words)
    words = "compare with what Ganeti would tell it (on the master)"
    parser.add_argument("--diff", action="store_true", help=words)
    add_show_secrets(parser)
    common.add_json(parser)
    words = "an instance, or the paths of its disks; of both, the disks are for an inactive one"
    parser.add_argument("what", nargs="+", metavar="INSTANCE|DISK", help=words)
    parser.set_defaults(action=_seed)


def add_show_secrets(parser: argparse.ArgumentParser) -> None:
    """Add --show-secrets."""
    words = "show user data, vendor data and quiet parameters too"
    parser.add_argument("--show-secrets", action="store_true", help=words)


def _seed(args: argparse.Namespace) -> int:
    disks = [Path(word) for word in args.what if word.startswith("/")]
    names = [word for word in args.what if not word.startswith("/")]
    if len(names) > 1:
        raise Error(f"seed: {' '.join(names)}: several instances", "give one, or its disks")
    if not names:
        if args.diff:
            raise Error("--diff: a disk does not tell whose it is", "give the instance's name")
        _print(args, read(disks))
        return 0
    if not args.diff:
        is_here = disks or _links(names[0])
        _print(args, _here(names[0], disks) if is_here else of(ganeti.instance(names[0])))
        return 0
    instance = ganeti.instance(names[0])
    lines = difference(instance, of(instance))
    if args.json:
        common.show_json({"instance": instance.name, "differs": bool(lines), "diff": lines})
    else:
        for line in lines:
            common.show(line)
    return STATUS_DIFFERS if lines else 0


def _links(name: str) -> list[Path]:
    """Return the active disks of the instance of this name, or of the one that it is short for."""
    name = glob.escape(ganeti.checked("instance", name))
    for pattern in (f"{name}:*", f"{name}.*:*"):
        found = {path: path.name.rpartition(":") for path in LINKS.glob(pattern)}
        if len({owner for owner, _colon, _index in found.values()}) == 1:
            return sorted(found, key=lambda path: int(found[path][2]))
    return []


def _here(name: str, disks: Sequence[Path]) -> Found:
    """Read the seed of an instance of this node: active disks have links here, others may not."""
    links = _links(name)
    if links or disks:
        return read(links or disks)
    raise Error(
        f"{name}: its disks are not active",
        f"gnt-instance activate-disks {name}, and deactivate-disks afterwards",
    )


def of(instance: Instance) -> Found:
    """Read the seed of an instance, on its node; Error if its disks are not active."""
    if instance.is_here:
        return _here(instance.name, instance.disks())
    options = ("seed", "--json", "--show-secrets", instance.name)
    answer = ganeti.on_node(instance.node, *options, *map(os.fspath, instance.disks()))
    files = {name: _unwrapped(each) for name, each in answer["files"].items()}
    return Found(f"{instance.node}:{answer['where']}", files)


def read(disks: Sequence[Path]) -> Found:
    """Read the seed that is on one of these disks of this node."""
    place = commands.find_seed([Disk(index, path) for index, path in enumerate(disks)])
    if place is None:
        raise Error(
            f"{', '.join(map(str, disks))}: holds no seed",
            "cloudimage writes one at create and reinstall, unless seed=none",
        )
    with workspace.folder() as work:
        where = f"{place.target.label} at {place.offset_bytes}, {log.size(place.size_bytes)}"
        return Found(where, commands.read_seed(place, work))


def difference(instance: Instance, found: Found) -> list[str]:
    """Return what reseed would change, as lines of a unified diff; none if it is up to date."""
    given = common.environment(instance.variables)
    name, uuid = given.identity()
    network = commands.network_config(given, params.parse(given))
    wanted = documents.renamed(found.files, name=name, uuid=uuid, network=network)
    lines: list[str] = []
    for file in sorted(wanted):
        if wanted[file] == found.files.get(file):
            continue
        texts = (found.files.get(file, b""), wanted[file])
        before, after = ([] if file in SECRET else _lines(each) for each in texts)
        labels = (f"{file} (the guest's)", f"{file} (Ganeti's)")
        changes = list(difflib.unified_diff(before, after, *labels, lineterm=""))
        lines += changes or [f"{file}: differs"]
    return lines


def _lines(text: bytes) -> list[str]:
    return text.decode("utf-8", "backslashreplace").splitlines()


def show_files(files: Mapping[str, bytes], show_secrets: bool) -> None:
    """Print the files of a seed, one after the other."""
    for name, data in files.items():
        hidden = name in SECRET and data and not show_secrets
        common.show(f"--- {name}, {log.size(len(data))}{' (not shown)' if hidden else ''}")
        for line in [] if hidden else _lines(data):
            common.show(line)


def wrapped_files(files: Mapping[str, bytes], show_secrets: bool) -> dict[str, Any]:
    """Return the files for JSON: sizes in bytes, and the text, or base64 of what is none."""
    return {
        name: {"size": len(data)} if name in SECRET and not show_secrets else _wrapped(data)
        for name, data in files.items()
    }


def _wrapped(data: bytes) -> dict[str, Any]:
    try:
        return {"size": len(data), "text": data.decode()}
    except UnicodeDecodeError:
        return {"size": len(data), "base64": base64.b64encode(data).decode()}


def _unwrapped(file: Mapping[str, Any]) -> bytes:
    return str(file["text"]).encode() if "text" in file else base64.b64decode(file["base64"])


def _print(args: argparse.Namespace, found: Found) -> None:
    if args.json:
        files = wrapped_files(found.files, args.show_secrets)
        common.show_json({"where": found.where, "files": files})
        return
    common.show(f"seed: {found.where}")
    show_files(found.files, args.show_secrets)
