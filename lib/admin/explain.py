"""cloudimage explain: what gnt-instance add would do here, without doing any of it."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from ipaddress import ip_network
from typing import BinaryIO, NamedTuple, Optional

from lib import commands, log
from lib.admin import common, ganeti, seed
from lib.disk import partition
from lib.errors import Error, describe
from lib.settings import config, params
from lib.settings.params import Job
from lib.settings.values import Location
from lib.source import fetch, index, locations, obtain

EXAMPLE = {
    "INSTANCE_NAME": "instance.example.com",
    "INSTANCE_UUID": "00000000-0000-4000-8000-000000000000",
}
GRAIN_BYTES = 4 << 20  # what Ganeti rounds the size of a disk to
_NET_KEYS = {
    "mac": "MAC",
    "ip": "IP",
    "mode": "MODE",
    "name": "NAME",
    "subnet": "NETWORK_SUBNET",
    "gateway": "NETWORK_GATEWAY",
    "subnet6": "NETWORK_SUBNET6",
    "gateway6": "NETWORK_GATEWAY6",
}
_IGNORED = {"bridge", "link", "vlan"}  # Ganeti's, of no matter to the guest


def add(commands: common.Subparsers) -> None:
    """Add explain."""
    words = "show what gnt-instance add with the same options would do here; nothing is written"
    parser = common.subcommand(commands, "explain", words)
    parser.add_argument("-o", dest="os", metavar="cloudimage+VARIANT", required=True)
    common.add_settings(parser)
    words = "the instance's name"
    parser.add_argument("--name", metavar="FQDN", default=EXAMPLE["INSTANCE_NAME"], help=words)
    words = (
        "a NIC, as for gnt-instance add; a network is asked of Ganeti on the master, or say"
        " subnet=, gateway=, subnet6= and gateway6= instead"
    )
    parser.add_argument(
        "--net", metavar="N:KEY=VALUE,...", dest="nets", action="append", default=[], help=words
    )
    words = "a disk, as for gnt-instance add"
    parser.add_argument(
        "--disk", metavar="N:size=SIZE,...", dest="disks", action="append", default=[], help=words
    )
    seed.add_show_secrets(parser)
    common.add_json(parser)
    parser.set_defaults(action=_explain)


def _explain(args: argparse.Namespace) -> None:
    name = args.name.lower().rstrip(".")  # as Ganeti keeps it (netutils.py, GetNormalizedName)
    if not name:
        raise Error("--name: is empty", "give the instance's name")
    base, _plus, variant = args.os.rpartition("+")
    mode, own = _defaults(f"{base or config.BUNDLE.name}+{variant}")
    own.update(common.parameters(args.settings))
    variables = {**EXAMPLE, "INSTANCE_NAME": name, "OS_VARIANT": variant, **own}
    variables.update(_nics(args.nets, name, mode))
    disks = _disks(args.disks)
    env = common.environment(variables)
    job = params.parse(env)
    job.require_checksum()
    rows = [
        {
            "name": each.parameter.name,
            "value": each.text if args.show_secrets else each.shown,
            "origin": each.origin,
        }
        for each in params.given(env)
    ]
    image = _image(job, disks)
    texts = commands.seed_texts(env, job) if job.seed != "none" else {}
    if args.json:
        files = seed.wrapped_files(texts, args.show_secrets)
        common.show_json({"parameters": rows, "image": image, "seed": files})
        return
    for row in rows:
        common.show(f"{row['name']:<15} {row['value'] or '(empty)'}  ({row['origin']})")
    for key, value in image.items():
        common.show(f"{key:<15} {value}")
    seed.show_files(texts, args.show_secrets)


# --- the image -------------------------------------------------------------------------------


class _Disks(NamedTuple):
    """What --disk says: the size of disk 0, and whether another is kept for the seed."""

    disk0_bytes: Optional[int]
    has_seed_disk: bool


def _image(job: Job, disks: _Disks) -> dict[str, str]:
    """Return what can be known of the image without fetching it, in words."""
    asked = job
    facts = {"digest": "none: nothing proves that it is genuine", "signature": "none"}
    digest = None
    try:
        job = index.resolved(job)
        digest = obtain.expected_digest(job)
        if digest:
            facts["digest"] = ":".join(digest)
        if job.signature is not None:
            # one over the image itself needs the image; that over a list was checked just now
            state = "good" if isinstance(job.checksum, Location) else "checked at the download"
            facts["signature"] = f"{job.signature}: {state}, by {job.keyring}"
    except fetch.Unavailable as error:
        facts["digest"] = facts["signature"] = f"not known: {error.message}"
    source = job.source()
    stored = obtain.cached(asked)  # an entry is known by the names before they are filled in
    if stored is not None:
        current = digest is None or stored.note["digests"].get(digest[0]) in (None, digest[1])
        facts["cache"] = (
            f"{log.size(stored.allocated_bytes)} on disk, fetched {stored.note['fetched']}"
            f"{'' if current else '; out of date, it will be fetched again'}"
        )
        with stored.raw.open("rb") as file:
            facts.update(_fit(job, file, disks))
        return facts
    if source.path is None:
        facts["cache"] = f"not there; {_download(job, str(source.url))}"
    else:
        with locations.open_image(job, source.path) as file:
            if job.format in ("auto", "raw") and os.pread(file.fileno(), 2, 510) == b"\x55\xaa":
                facts["cache"] = "not needed, the image is a raw disk on this node"
                facts.update(_fit(job, file, disks))
                return facts
            facts["cache"] = f"not there; {log.size(os.fstat(file.fileno()).st_size)} to decode"
    facts["seed place"] = "known when the image is in the cache, see cloudimage fetch"
    return facts


def _download(job: Job, url: str) -> str:
    try:
        size_bytes = locations.size(url, job.config)
    except fetch.Unavailable as error:
        return error.message
    return f"{'an unknown size' if size_bytes is None else log.size(size_bytes)} to download"


def _fit(job: Job, image: BinaryIO, disks: _Disks) -> dict[str, str]:
    """Return whether the raw image fits on disk 0, and where the seed would go there."""
    image_bytes = os.fstat(image.fileno()).st_size
    facts = {"image size": f"{log.size(image_bytes)} ({image_bytes} bytes) once on a disk"}
    disk_bytes = image_bytes if disks.disk0_bytes is None else disks.disk0_bytes
    if disk_bytes < image_bytes:
        mib = -(-image_bytes // (1 << 20))
        return {**facts, "disk 0": f"too small: use --disk 0:size={mib}M or more"}
    if job.seed == "none":
        return {**facts, "seed place": "none"}
    if disks.has_seed_disk and job.seed in ("auto", "disk"):
        return {**facts, "seed place": f"the disk named {commands.SEED_DISK}"}
    if job.seed == "disk":
        way_out = f"add --disk 1:size=4m,name={commands.SEED_DISK}"
        return {**facts, "seed place": f"none: no disk is named {commands.SEED_DISK}; {way_out}"}
    try:
        extent = partition.plan(
            lambda offset, length: os.pread(image.fileno(), length, offset),
            image_bytes,
            disk_bytes,
            job.seed,
        ).seed
    except Error as error:
        return {**facts, "seed place": f"none: {error}"}
    assert extent is not None  # only seed=none has none
    place = f"{extent.kind} at byte {extent.offset_bytes}, {log.size(extent.size_bytes)}"
    guess = " (on a disk as large as the image; say --disk 0:size=)"
    return {**facts, "seed place": place + (guess if disks.disk0_bytes is None else "")}


# --- what gnt-instance add would take --------------------------------------------------------


def _indexed(option: str, text: str) -> tuple[int, dict[str, str]]:
    index, _colon, rest = text.partition(":")
    if not index.isdecimal() or len(index) > 2:
        raise Error(f"{option} {log.printable(text, 80)}: has no number", "write 0:KEY=...")
    return int(index), common.pairs(f"{option} {index}:", rest)


def _defaults(os_name: str) -> tuple[str, dict[str, str]]:
    """Return a NIC's mode, and the variables of what gnt-os modify set, as the cluster has them."""
    try:
        mode, parameters = ganeti.defaults(os_name)
    except Error as error:
        log.step(f"explain: without the cluster's own OS parameters and NIC mode: {error.message}")
        return "bridged", {}
    return mode, {common.variable(name): value for name, value in parameters.items()}


def _nics(nets: Sequence[str], instance: str, mode: str) -> dict[str, str]:
    """Return the variables of the NICs; one without --net has none, and so asks for DHCP.

    Ganeti's "none" is the same as to say nothing, and it makes the NICs below the last number.
    """
    variables: dict[str, str] = {}
    given = dict(_indexed("--net", text) for text in nets) or {0: {}}
    for number in range(max(given) + 1):
        keys = {key: text for key, text in given.get(number, {}).items() if text.lower() != "none"}
        prefix = f"NIC_{number}_"
        variables[f"{prefix}MAC"] = f"aa:00:00:00:00:{number:02x}"
        if keys.get("mac") in ("auto", "generate"):
            del keys["mac"]
        name = keys.pop("network", None)
        if name is None:
            variables[f"{prefix}MODE"] = mode
        else:
            found = ganeti.network(name)
            variables.update({f"{prefix}NETWORK_{key}": value for key, value in found.items()})
        for key, value in keys.items():
            if key not in _NET_KEYS and key not in _IGNORED:
                near = config.nearest(key, [*_NET_KEYS, *_IGNORED, "network"])
                raise Error(f"--net {number}:{key}: is unknown", near)
            if key not in _IGNORED:
                variables[prefix + _NET_KEYS[key]] = value
        if keys.get("ip") == "pool":
            variables[f"{prefix}IP"] = _from_pool(number, variables)
        if keys.get("ip") == "auto":
            variables[f"{prefix}IP"] = _resolved(number, instance)
    return {**variables, "NIC_COUNT": str(max(given) + 1)}


def _from_pool(index: int, variables: dict[str, str]) -> str:
    """Return an address that the pool could give; which one it will be nobody knows yet."""
    subnet = variables.get(f"NIC_{index}_NETWORK_SUBNET")
    if subnet is None:
        raise Error(f"--net {index}:ip=pool: there is no network", "add network=NAME or subnet=")
    gateway = variables.get(f"NIC_{index}_NETWORK_GATEWAY")
    try:
        hosts = map(str, ip_network(subnet, strict=False).hosts())
    except ValueError as error:
        raise Error(f"--net {index}:subnet={subnet}: {error}", "write it as 192.0.2.0/24") from None
    chosen = next((host for host in hosts if host != gateway), None)
    if chosen is None:
        raise Error(f"--net {index}:ip=pool: {subnet} has no address for an instance")
    log.step(f"--net {index}:ip=pool: shown with {chosen}, the pool may choose another")
    return chosen


def _resolved(index: int, instance: str) -> str:
    """Return the address that the instance's name has."""
    try:
        return socket.gethostbyname(instance)
    except (OSError, UnicodeError) as error:  # no name of a host at all is the latter
        words = describe(error) if isinstance(error, OSError) else "is no host's name"
        raise Error(
            f"--net {index}:ip=auto: {instance[:80]}: {words}", "give another with --name"
        ) from error


def _disks(options: Sequence[str]) -> _Disks:
    disk0_bytes, has_seed_disk = None, False
    for number, keys in (_indexed("--disk", text) for text in options):
        size_bytes = _size(number, keys.get("size", ""))
        if number == 0:
            disk0_bytes = size_bytes
        elif keys.get("name") == commands.SEED_DISK:
            has_seed_disk = True
    return _Disks(disk0_bytes, has_seed_disk)


def _size(index: int, text: str) -> int:
    """Return bytes: MiB if no unit is given, rounded up (Ganeti's utils/text.py, ParseUnit)."""
    try:
        size_bytes = config.size_bytes(f"{text}M" if text[-1:].isdecimal() else text)
    except ValueError as error:
        raise Error(f"--disk {index}:size={text}: must be {error}") from None
    return -(-size_bytes // GRAIN_BYTES) * GRAIN_BYTES
