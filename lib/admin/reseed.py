"""cloudimage reseed: after gnt-instance modify, tell the guest what Ganeti says now.

A rename to the same name makes Ganeti run our rename script, which writes name and addresses into
the seed and leaves the rest alone; the guest reads it at its next boot.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager

from lib import log
from lib.admin import common, ganeti, seed
from lib.admin.ganeti import Instance
from lib.errors import Error

JOB_S = 3600.0


def add(commands: common.Subparsers) -> None:
    """Add reseed."""
    words = "write the name and addresses that Ganeti has now into a guest's seed (on the master)"
    parser = common.subcommand(commands, "reseed", words)
    words = "shut a running instance down for it, and start it again"
    parser.add_argument("--reboot", action="store_true", help=words)
    parser.add_argument("instance", metavar="INSTANCE")
    parser.set_defaults(action=_reseed)


def _reseed(args: argparse.Namespace) -> None:
    instance = ganeti.instance(args.instance)
    name = instance.name
    if instance.is_running and not args.reboot:
        raise Error(f"{name}: is running", "gnt-instance shutdown it first, or use --reboot")
    if not _differs(instance):
        log.step(f"reseed: {name} is told already what Ganeti says")
        return
    if instance.is_running:
        _job("shutdown", name)
    try:
        _job("rename", *_unasked(), name, name)
    finally:
        if instance.is_running:  # also after a failure: it ran before
            _job("startup", name)
    if _differs(ganeti.instance(name)):
        raise Error(
            f"{name}: the seed is still another than Ganeti's",
            f"look at the log of rename in /var/log/ganeti/os on {instance.node}",
        )
    when = "by now" if instance.is_running else "at its next boot"
    log.step(f"reseed: {name} gets what Ganeti says {when}")


def _differs(instance: Instance) -> bool:
    """Whether the seed is out of date; Error if there is none or it cannot be read."""
    with _active_disks(instance):
        return bool(seed.difference(instance, seed.of(instance)))


def _unasked() -> list[str]:
    """Return the options by which rename asks neither DNS nor the user; Ganeti 3.1 has none."""
    known = re.findall(r"--[a-z-]+", ganeti.call("gnt-instance", "rename", "--help"))
    options = ("--force", "--no-ip-check", "--no-name-check")
    return [option for option in options if option in known]


@contextmanager
def _active_disks(instance: Instance) -> Iterator[None]:
    """Keep the disks of a stopped instance reachable for the block."""
    if instance.is_running:
        yield
        return
    _job("activate-disks", instance.name)
    try:
        yield
    finally:
        # Ganeti does that by itself to what is marked down only
        force = ("--force",) if instance.is_offline else ()
        _job("deactivate-disks", *force, instance.name)


def _job(*words: str) -> None:
    log.step(f"reseed: gnt-instance {' '.join(words)}")
    ganeti.call("gnt-instance", *words, timeout_s=JOB_S)
