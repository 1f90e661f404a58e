"""The doors that change something, a page each: what happens in which order."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from lib import compression, environment, hooks, log, run, tools, workspace
from lib.disk import partition, transfer
from lib.disk import target as disk
from lib.environment import Environment
from lib.errors import Error, context
from lib.guest import keys, network, seed
from lib.settings import params
from lib.settings.params import Job
from lib.settings.values import Document
from lib.source import cache, locations, obtain

SEED_DISK = "cidata"
METAD_URL = "http://169.254.169.254/ganeti/latest"


def create(env: Environment) -> None:
    """Write the image named by the OS parameters to the first disk of the instance.

    Called by gnt-instance add and reinstall; everything it needs is in the environment.
    """
    name, _uuid = env.identity()
    job = params.parse(env)
    first, seed_disk = env.first_disk(), _seed_disk(env, job)
    run.require(*tools.CORE)
    target = disk.open_target(first)
    for phase in hooks.PHASES:
        hooks.find(params.config_directory(env), phase)
    hooks.warn(params.config_directory(env))
    _warn_end_of_life(job)
    log.step(f"create: {job.source()} for {name} on {first.label}")
    with workspace.folder() as work:
        texts = work / "seed"
        texts.mkdir()
        if job.seed != "none":
            for file, data in seed_texts(env, job).items():
                (texts / file).write_bytes(data)
        call_hooks = _hook_caller(env, job, texts)
        call_hooks("pre")
        with obtain.raw_image(job, target.size_bytes) as raw:
            disk.require(target, raw.size_bytes)
            plan = _plan(raw, target, "none" if seed_disk else job.seed)
            place = _place(target, plan.seed, seed_disk)
            volume = _volume(work, texts, place.size_bytes) if place else None
            with disk.hold(target), disk.unbootable_on_failure(target):
                with disk.claim(target):
                    disk.write(raw.file, target)
                    for offset, data in plan.writes:
                        target.write(offset, data)
                    if place is not None and volume is not None:
                        _write_seed(volume, place, target)
                    disk.sync(target)
                call_hooks("post")
                disk.sync(target)
    log.step(f"create: {name} is ready")


def _warn_end_of_life(job: Job) -> None:
    if job.is_past_end:
        log.warning(
            f"variant {job.variant}: the vendor's support ended on {job.end_of_life},"
            " the guest gets no more updates; see cloudimage variants"
        )


def _plan(raw: cache.Entry, target: disk.Target, seed_place: str) -> partition.Plan:
    with context(f"planning the partition table of {target.label}"):
        return partition.plan(
            lambda offset, length: os.pread(raw.file.fileno(), length, offset),
            raw.size_bytes,
            target.size_bytes,
            seed_place,
        )


def _write_seed(volume: Path, place: Place, target: disk.Target) -> None:
    if place.target is target:
        target.write(place.offset_bytes, volume.read_bytes())
        return
    with disk.hold(place.target), disk.claim(place.target):
        _write_volume(volume, place)


def _seed_disk(env: Environment, job: Job) -> Optional[environment.Disk]:
    """Return the Ganeti disk that is kept for the seed, if the seed goes there."""
    if job.seed not in ("auto", "disk"):
        return None
    found = env.disk_named(SEED_DISK)
    if found is None and job.seed == "disk":
        raise Error(
            f"seed=disk: no disk of the instance is named {SEED_DISK}",
            f"add one with --disk 1:size=4m,name={SEED_DISK}",
        )
    return found


def seed_texts(env: Environment, job: Job) -> dict[str, bytes]:
    """Return the seed's four files from what Ganeti and the OS parameters say."""
    name, uuid = env.identity()
    user_data = _read(job, "user_data", job.user_data)
    vendor_data = _read(job, "vendor_data", job.vendor_data)
    ssh_keys = keys.parse(_read(job, "ssh_keys", job.ssh_keys))
    if not (ssh_keys or user_data or vendor_data or job.password_hash or job.metad):
        log.warning(
            "neither ssh_keys nor user_data nor password_hash: nobody can log in to the guest,"
            " unless the image itself has a way"
        )
    if job.metad:
        _require_communication_nic(env)
        # what came as a parameter stays with metad; the disk only says where to ask
        source = "os/package" if job.os_package else "user-data"
        user_data = seed.include_once(f"{METAD_URL}/{source}")
        if not job.os_package:
            vendor_data = seed.include_once(f"{METAD_URL}/vendor-data")
    return seed.texts(
        name=name,
        uuid=uuid,
        ssh_keys=ssh_keys,
        user_data=user_data,
        vendor_data=vendor_data,
        network=network_config(env, job),
        password_hash=job.password_hash,
    )


def _read(job: Job, parameter: str, document: Document) -> bytes:
    """Read a text of the user's; an Error names the parameter, never the content."""
    with context(f"reading {parameter}"):
        text = locations.read(document, job.config, params.DOCUMENT_LIMIT_BYTES)
    if parameter in ("user_data", "vendor_data"):
        seed.warn_unless_known(parameter, text)
    return text


def _require_communication_nic(env: Environment) -> None:
    if not any(nic.is_communication for nic in env.nics):
        raise Error(
            "metad=yes: the instance has no communication NIC",
            "set one up with gnt-instance add -c yes (see doc/metad.md), or use metad=no",
        )


def network_config(env: Environment, job: Job) -> Optional[bytes]:
    """Return the text of network-config: the user's own, or one from the NICs; None for none."""
    if isinstance(job.network, Document):
        return _read(job, "network", job.network)
    if job.network == "none":
        return None
    with context("writing network-config"):
        return seed.document(
            network.config(
                env.nics, job.network_version, job.network, job.dns_servers, job.dns_search
            )
        )


def _hook_caller(env: Environment, job: Job, texts: Path) -> Callable[[str], None]:
    """Return what runs the hooks of a phase with their environment."""
    first = env.first_disk()
    environment = {
        **env.variables,
        "CLOUDIMAGE_TARGET": str(first.path or first.uri),
        "CLOUDIMAGE_IMAGE": str(job.source()),
        "CLOUDIMAGE_VARIANT": job.variant or "",
        "CLOUDIMAGE_SEED_DIR": str(texts),
    }
    directory = params.config_directory(env)
    return lambda phase: hooks.call(directory, phase, environment)


# --- the other doors -------------------------------------------------------------------------


def export(env: Environment) -> None:
    """Write one disk of the instance to standard output, compressed as cloudimage.conf says.

    Called by gnt-backup export, once for each disk.
    """
    settings = params.load_config(env)
    source = disk.open_target(env.transfer_disk("EXPORT_DEVICE"))
    with context(f"exporting {source.disk.label}"):
        transfer.dump(source, sys.stdout.buffer, settings.export_compression, env.exp_size_fd)


def restore(env: Environment) -> None:
    """Write the dump on standard input to one disk of the instance.

    Called by gnt-backup import, once for each disk. The dump is what export wrote, or any disk
    dump, raw or compressed with gzip, xz, bzip2 or zstd.
    """
    target = disk.open_target(env.transfer_disk("IMPORT_DEVICE"))
    dump = sys.stdin.buffer
    head = dump.read(512)
    kind = compression.detect(head)
    doing = context(f"importing to {target.label}")
    with disk.hold(target), disk.unbootable_on_failure(target), doing:
        with disk.claim(target):
            size_bytes = transfer.load(compression.decompressed(dump, kind, head), target)
            if size_bytes < target.size_bytes:
                _spread(target, size_bytes)
            disk.sync(target)


def _spread(target: disk.Target, size_bytes: int) -> None:
    """Move the second GPT to the end of a disk that is larger than its dump.

    What a guest has made of its table is its own matter: a damaged one is restored as it was. Error
    for a dump without all of what its table names: raw ones tell nothing else of being cut short.
    """
    end_bytes = partition.end_bytes(target.read, size_bytes)
    if end_bytes > size_bytes:
        raise Error(
            f"the dump is cut short: it has {size_bytes} bytes, and its partitions {end_bytes}",
            "export it again, or import it as it is to a disk of exactly its size",
        )
    try:
        plan = partition.plan(target.read, size_bytes, target.size_bytes, "none")
    except Error as error:
        log.warning(f"{target.label}: the partition table is left as it was: {error.message}")
        return
    for offset, data in plan.writes:
        target.write(offset, data)


def rename(env: Environment) -> None:
    """Tell the guest its new name and addresses, by way of its seed.

    Called by gnt-instance rename, and by gnt-backup import after the last disk.
    """
    name, uuid = env.identity()
    job = params.parse(env)
    place = find_seed(env.disks)
    if place is None:
        log.warning(f"{name}: its disks hold no seed, so the guest keeps its name and addresses")
        return
    text = network_config(env, job)
    with workspace.folder() as work, disk.hold(place.target), disk.claim(place.target):
        texts = work / "seed"
        texts.mkdir()
        try:
            files = seed.renamed(read_seed(place, work), name=name, uuid=uuid, network=text)
        except Error as error:
            log.warning(f"{name}: {error}; the guest keeps its name and addresses")
            return
        for file, data in files.items():
            (texts / file).write_bytes(data)
        _write_volume(_volume(work, texts, place.size_bytes), place)
    log.step(f"rename: the guest will be {name} at its next boot")


# --- the seed and its place ------------------------------------------------------------------


class Place(NamedTuple):
    """Where on which disk the seed's volume is."""

    target: disk.Target
    offset_bytes: int
    size_bytes: int


def _place(
    target: disk.Target, extent: Optional[partition.Extent], seed_disk: Optional[environment.Disk]
) -> Optional[Place]:
    if seed_disk is not None:
        own = disk.open_target(seed_disk)
        return Place(own, 0, min(own.size_bytes, seed.MAX_VOLUME_BYTES))
    if extent is None:
        return None
    return Place(target, extent.offset_bytes, min(extent.size_bytes, seed.MAX_VOLUME_BYTES))


def find_seed(disks: Sequence[environment.Disk]) -> Optional[Place]:
    """Return where the instance's seed is; the disk that is kept for it is asked first.

    By content, for an import may have left a disk without its name.
    """
    for each in sorted(disks, key=lambda each: each.name != SEED_DISK):
        target = disk.open_target(each)
        place = _place(target, partition.find_seed(target.read, target.size_bytes), None)
        if place is not None:
            return place
    return None


def read_seed(place: Place, work: Path) -> dict[str, bytes]:
    """Return the files of the seed there, by a private folder; Error if they are damaged."""
    old = work / "old"
    old.write_bytes(place.target.read(place.offset_bytes, place.size_bytes))
    return seed.read_volume(old)


def _volume(work: Path, texts: Path, size_bytes: int) -> Path:
    """Return the seed as a FAT volume of at most this size."""
    path = work / "volume"
    with context("making the seed's volume"):
        seed.volume(texts, size_bytes, path)
    return path


def _write_volume(volume: Path, place: Place) -> None:
    if place.offset_bytes == 0:  # a disk of its own, which may hold old signatures
        with volume.open("rb") as file:
            disk.write(file, place.target)
    else:
        place.target.write(place.offset_bytes, volume.read_bytes())
    disk.sync(place.target)
