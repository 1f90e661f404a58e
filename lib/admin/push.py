"""cloudimage push: this node's cache entries to other nodes, so that one download serves a cluster.

gnt-cluster copyfile and gnt-cluster command carry them, over Ganeti's own ssh set-up. A node takes
an entry only if its bytes have the digest that this node computed, and puts it into its cache under
the lock and by the rename that a download of its own would end with.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from lib import log, run
from lib.admin import common, ganeti
from lib.errors import Error
from lib.files import open_regular
from lib.source import checksum
from lib.source.stored import Stored, check_note

FOLDER = "/var/tmp"  # copyfile copies to the same path; this folder is on every node


def add(commands: common.Subparsers) -> None:
    """Add push, and receive, which it calls on the other nodes."""
    words = "copy what is in this node's cache to other nodes (on the master)"
    parser = common.subcommand(commands, "push", words)
    parser.add_argument("--all-nodes", action="store_true", help="all other online nodes")
    words = "only this entry, by the name that cloudimage cache shows; may be given several times"
    parser.add_argument("--entry", action="append", default=[], metavar="NAME", help=words)
    parser.add_argument("nodes", nargs="*", metavar="NODE")
    parser.set_defaults(action=_push, error=parser.error)
    words = "take an entry that push has sent (push calls this)"
    parser = common.subcommand(commands, "receive", words)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("note", metavar="BASE64")
    parser.add_argument("file", metavar="FILE")
    parser.set_defaults(action=_receive)


def _push(args: argparse.Namespace) -> None:
    if bool(args.nodes) == args.all_nodes:
        args.error("give nodes, or --all-nodes")
    nodes = [ganeti.checked("node", name) for name in args.nodes] or ganeti.other_nodes()
    if not nodes:
        raise Error("push: no other node is online", "gnt-node list shows them")
    entries = common.store().entries()
    for name in args.entry:
        if not name or not any(each.name.startswith(name) for each in entries):
            raise Error(f"--entry {name}: no such entry", "cloudimage cache lists them")
    if args.entry:
        entries = [each for each in entries if each.name.startswith(tuple(args.entry))]
    if not entries:
        raise Error("push: the cache of this node is empty", "cloudimage fetch fills it")
    for entry in entries:
        _push_entry(entry, nodes)


def _push_entry(entry: Stored, nodes: list[str]) -> None:
    with entry.raw.open("rb") as raw:
        digest = checksum.digest(raw, "sha256")
    note = base64.b64encode(json.dumps({**entry.note, "raw_sha256": digest}).encode()).decode()
    descriptor, packed = tempfile.mkstemp(".zst", "cloudimage-push-", FOLDER)
    try:
        with open(descriptor, "wb") as output:
            run.run(["zstd", "-q", "-1", "-T0", "-c", os.fspath(entry.raw)], stdout=output)
        for node in nodes:
            _send(entry, node, packed, note)
    finally:
        Path(packed).unlink(missing_ok=True)


def _send(entry: Stored, node: str, packed: str, note: str) -> None:
    ganeti.call("gnt-cluster", "copyfile", "-n", node, packed, timeout_s=3600.0)
    answer = ganeti.on_node(node, "receive", entry.name, note, packed)
    words = "has it already" if answer["known"] else "has it now"
    log.step(f"push: {node} {words}: {entry.note['url']}")


def _receive(args: argparse.Namespace) -> None:
    packed = Path(args.file)
    if not re.fullmatch(rf"{FOLDER}/cloudimage-push-[A-Za-z0-9_]+\.zst", args.file):
        raise Error(f"{args.file}: is no file of cloudimage push")
    try:
        known = _adopted(args.name, _note(args.note), packed)
    finally:
        packed.unlink(missing_ok=True)
    common.show_json({"known": known})


def _note(text: str) -> dict[str, Any]:
    try:
        note: dict[str, Any] = json.loads(base64.b64decode(text))
        check_note(note)
        return {**note, "raw_sha256": str(note["raw_sha256"])}
    except (ValueError, LookupError, RecursionError) as error:
        raise Error(f"receive: the note of the entry is damaged: {error}") from error


def _adopted(name: str, note: dict[str, Any], packed: Path) -> bool:
    """Put the entry into the cache; return whether it was there already."""
    if not re.fullmatch("[0-9a-f]{64}", name):
        raise Error(f"{name[:80]}: is no name of an entry")
    is_known = True

    def refresh(old: Any, work: Path) -> Any:
        nonlocal is_known
        if old is not None and old.get("fetched", "") >= note["fetched"]:
            return None
        is_known, raw = False, work / "raw"
        with open_regular(packed, follow=False) as source, raw.open("xb") as output:
            run.run(["zstd", "-dcq", "--sparse"], stdin=source, stdout=output)
        run.run(["fallocate", "--dig-holes", os.fspath(raw)])
        wanted = ("sha256", note.pop("raw_sha256"))
        with raw.open("rb") as file:
            checksum.check(wanted, checksum.digest(file, "sha256"), f"what came of {name[:12]}")
        return raw, note

    store = common.store()
    with store.adopt(name, refresh):
        if not any(each.name == name for each in store.entries()):
            raise Error(f"{store.directory}: cannot be used, see the WARNING")
    return is_known
