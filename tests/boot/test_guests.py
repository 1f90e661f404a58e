"""Guests of many releases: what each makes of its seed, and of what Ganeti does to it later.

A cell is one guest with one value of every other axis; the chosen cells have every value of every
axis. Those of Debian 12 with netplan and BIOS are quick, and run with the marker boot too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import pytest

from tests.boot.conftest import FIRMWARE, OVMF_PARTS, Node, boot, build_image
from tests.boot.instance import DNS, NETWORKS, SEARCH, Instance, said, user_data

GIB, MIB = 1 << 30, 1 << 20
IMAGE_BYTES, DISK_BYTES, GROWN_BYTES = 2 * GIB, 3 * GIB, 4 * GIB
# what has the guest's network -> the releases that have it so, and cloud-init's name for it
STACKS = {
    "ifupdown": (["debian-11", "debian-12"], "eni"),
    "netplan": (["debian-12", "debian-13", "ubuntu-22.04", "ubuntu-24.04"], "netplan"),
    "networkd": (["debian-sid"], "networkd"),
    "network-manager": (["debian-13"], "network-manager"),
}
# a table -> what of the disk is not root's; where root is not the last it stays as it is
TABLES = {"gpt": 128 * MIB, "mbr": 1 * MIB, "gpt-middle": 132 * MIB}
ROOT_FS = {"ext4": "ext2/ext3", "xfs": "xfs", "btrfs": "btrfs"}
ACTIONS = ["create", "rename", "clone", "restore", "grow-disk", "reinstall"]


@dataclass(frozen=True)
class Cell:
    """One value of each axis."""

    release: str
    stack: str
    network: str
    table: str
    firmware: str
    root_fs: str
    action: str

    def __str__(self) -> str:
        return "_".join(astuple(self))

    def image_options(self) -> list[str]:
        values = {"release": self.release, "network": self.stack, "root-fs": self.root_fs}
        return [f"--{key}={value}" for key, value in {**values, "layout": self.table}.items()]

    def network_version(self) -> str:
        """Return what doc/guests.md says for this guest."""
        is_netplan = self.stack == "netplan"
        return "2" if is_netplan and self.network in ("dhcp", "routed") else "1"


# release, stack, network, table, firmware, root file system, action
CHOSEN = """
debian-12     netplan          dual       gpt         bios            ext4   rename
debian-12     netplan          static     mbr         bios            ext4   clone
debian-12     netplan          two        gpt         uefi            ext4   grow-disk
debian-13     network-manager  dual       gpt         uefi            ext4   create
debian-13     network-manager  two        mbr         bios            btrfs  restore
debian-13     network-manager  eight      gpt         bios            xfs    create
debian-13     netplan          dhcp       gpt-middle  uefi-on-a-disk  xfs    create
debian-11     ifupdown         static     gpt         bios            ext4   grow-disk
debian-11     ifupdown         two        gpt-middle  uefi-on-a-disk  ext4   clone
debian-12     ifupdown         routed     gpt         bios            ext4   create
debian-sid    networkd         dual       gpt         uefi            btrfs  create
debian-sid    networkd         routed     gpt-middle  bios            ext4   create
debian-sid    networkd         none       mbr         bios            ext4   create
ubuntu-22.04  netplan          ipv6-only  mbr         bios            ext4   create
ubuntu-22.04  netplan          routed     gpt         uefi-on-a-disk  xfs    reinstall
ubuntu-24.04  netplan          dhcp       gpt-middle  uefi            ext4   create
ubuntu-24.04  netplan          eight      gpt         bios            btrfs  create
"""
CELLS = [Cell(*line.split()) for line in CHOSEN.strip().splitlines()]
AXES = {
    "release": {release for releases, _renderer in STACKS.values() for release in releases},
    "stack": set(STACKS),
    "network": set(NETWORKS),
    "table": set(TABLES),
    "firmware": set(FIRMWARE),
    "root_fs": set(ROOT_FS),
    "action": set(ACTIONS),
}


@pytest.mark.parametrize("axis", [each.name for each in fields(Cell)])
def test_every_value_is_in_a_chosen_cell(axis: str) -> None:
    assert {getattr(cell, axis) for cell in CELLS} == AXES[axis]


@dataclass(frozen=True)
class Boot:
    """One boot: of whom, on which disk, and what the guest said."""

    instance: Instance
    disk_bytes: int
    table: str
    report: dict[str, str]


ORIGINAL = Instance("vm1.example.com", "7eb7a864-32d5-4cce-a37f-4dfde4aaf87e", 1, 11, "static")
OTHER_UUID = "0b0c4f3e-7a37-4c52-8a1e-2f5e5d0d6f03"
CHANGES: dict[str, dict[str, Any]] = {
    "rename": {"name": "vm2.example.com", "host": 12},
    "clone": {"name": "vm3.example.com", "host": 13, "number": 3, "uuid": OTHER_UUID},
    "restore": {"uuid": OTHER_UUID},
}
OTHER_TABLE = {"gpt": "gpt-middle", "gpt-middle": "gpt", "mbr": "gpt"}


class Machine:
    """The disks of a cell's instance, and the node that they are on."""

    def __init__(self, cell: Cell, folder: Path, public_key: str) -> None:
        folder.mkdir()
        self.cell, self.folder, self.node = cell, folder, Node(folder)
        self.parameters = {
            "OSP_SSH_KEYS": public_key,
            "OSP_USER_DATA": f"@{folder}/user-data",
            "OSP_DNS_SERVERS": " ".join(DNS),
            "OSP_DNS_SEARCH": SEARCH,
            "OSP_NETWORK_VERSION": cell.network_version(),
        }
        (folder / "user-data").write_text(user_data())
        self.disks = [self._disk("disk", DISK_BYTES)]
        if cell.firmware == "uefi-on-a-disk":
            self.disks.append(folder / "firmware")
            self.disks[1].write_bytes(b"".join(Path(part).read_bytes() for part in OVMF_PARTS))

    def _disk(self, name: str, size_bytes: int) -> Path:
        path = self.folder / f"{name}.disk"
        path.touch()
        os.truncate(path, size_bytes)
        return path

    def call(self, door: str, instance: Instance, **more: str) -> None:
        """Call create or rename, which leaves the firmware's disk alone."""
        before = [disk.read_bytes() for disk in self.disks[1:]]
        self.node.call(door, self.disks, instance, {**self.parameters, **more})
        assert [disk.read_bytes() for disk in self.disks[1:]] == before

    def create(self, instance: Instance, table: str) -> None:
        image = self.folder / f"{table}.raw"
        build_image(image, *replace(self.cell, table=table).image_options())
        self.call("create", instance, OSP_IMAGE=str(image))
        image.unlink()

    def move(self) -> None:
        """Export every disk, and import the dumps to the disks of another instance."""
        for index, disk in enumerate(self.disks):
            self.disks[index] = self._disk(f"other{index}", disk.stat().st_size)
            self.node.copy(disk, self.disks[index])
            disk.unlink()

    def boot(self, instance: Instance, table: str) -> Boot:
        report = boot(self.disks, instance, self.cell.firmware)
        return Boot(instance, self.disks[0].stat().st_size, table, report)


def run(cell: Cell, folder: Path, public_key: str) -> list[Boot]:
    """Create and boot the cell's instance; do to it what the cell says, and boot it again."""
    instance, table = replace(ORIGINAL, network=cell.network), cell.table
    machine = Machine(cell, folder, public_key)
    machine.create(instance, table)
    boots = [machine.boot(instance, table)]
    if cell.action == "grow-disk":
        os.truncate(machine.disks[0], GROWN_BYTES)
    elif cell.action == "reinstall":
        table = OTHER_TABLE[table]
        machine.create(instance, table)
    elif cell.action in CHANGES:
        if cell.action != "rename":
            machine.move()
        instance = replace(instance, **CHANGES[cell.action])
        machine.call("rename", instance, OLD_INSTANCE_NAME=ORIGINAL.name)
    if cell.action != "create":
        boots.append(machine.boot(instance, table))
    shutil.rmtree(folder)
    return boots


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, folder: Path, public_key: str
) -> Iterator[dict[Cell, Future[list[Boot]]]]:
    """Start all cells that were selected, as many side by side as there are processors."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    selected = [item.callspec.params["cell"] for item in items if "runs" in item.fixturenames]
    cells = cast(list[Cell], selected)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield {cell: pool.submit(run, cell, folder / str(cell), public_key) for cell in cells}
    finally:
        pool.shutdown(cancel_futures=True)


def check(cell: Cell, boot: Boot, public_key: str) -> None:
    """Everything that a guest must say at each boot."""
    report, instance = boot.report, boot.instance
    assert '"errors":[]' in report["result"]
    assert report["name"] == instance.name.partition(".")[0]
    assert said(report) == instance.told()
    assert report["keys"] == public_key
    assert report["root fs"] == ROOT_FS[cell.root_fs]
    assert report["firmware"] == cell.firmware.partition("-")[0]
    assert report["renderer"].split("'")[1] == STACKS[cell.stack][1]
    last = IMAGE_BYTES if boot.table == "gpt-middle" else boot.disk_bytes
    room = last - TABLES[boot.table]
    assert 0.9 * room < int(report["root"]) <= room


def marks(cell: Cell) -> list[pytest.MarkDecorator]:
    is_quick = (cell.release, cell.stack, cell.firmware) == ("debian-12", "netplan", "bios")
    return [pytest.mark.boot] if is_quick else []


@pytest.mark.guests
@pytest.mark.parametrize("cell", [pytest.param(c, id=str(c), marks=marks(c)) for c in CELLS])
def test_guest(runs: dict[Cell, Future[list[Boot]]], public_key: str, cell: Cell) -> None:
    boots = runs[cell].result()
    for each in boots:
        check(cell, each, public_key)
    first, last = boots[0].report, boots[-1].report
    is_new = {"clone", "reinstall"} & {cell.action}
    for own in ("host keys", "machine-id"):
        assert len(first[own]) > 30
        assert (first[own] != last[own]) == bool(is_new), own
    times = 2 if cell.action == "clone" else 1
    assert last["user data ran"] == " ".join(["once an instance"] * times)
