"""Instances on LVM, by a real Ganeti on a node in a virtual machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ganeti.test_gnt_backup import LAN, uuid
from tests.images import MIB, assert_image
from tests.scripts.conftest import seed_files
from tests.storage.machine import Machine

pytestmark = pytest.mark.storage
PLAIN = "-t plain --ignore-ipolicy"
NET = f"--net 0:ip=192.0.2.41,{LAN}"
OTHER = "gnt-instance reinstall -f -O image=/srv/other.raw {}.example.com"
# what is done to a volume, how it is undone, and what create says meanwhile
REFUSED = (
    (
        "lvreduce --quiet --yes --size 8M {}",
        "lvextend --quiet --size 64M {}",
        "16 MiB (16777216 bytes) do not fit on a disk of 8 MiB (8388608 bytes)",
    ),
    (
        "lvchange --permission r {}",
        "lvchange --permission rw {}",
        "the disk is read-only",
    ),
    (
        "dmsetup create held --table '0 8 linear {} 0'",
        "dmsetup remove held",
        "in use: part of dm-1 (held)",
    ),
    (
        "mke2fs -q -F {0} && mount --read-only {0} /mnt",
        "umount /mnt",
        "in use: mounted on /mnt",
    ),
)


@pytest.fixture
def vm(node: Machine) -> Iterator[str]:
    """Name an instance that is gone at the end of the test, under whatever name."""
    yield "vm4"
    node.remove_all()


def add(node: Machine, name: str, more: str = "-O image=/srv/small.qcow2") -> str:
    """Add an instance with a disk of 64 MiB, on a node that runs nothing; return its volume."""
    node.add(name, f"{PLAIN} -H fake --disk 0:size=64M -o cloudimage+default {NET} {more}")
    return node.disk(name)


def told(copy: Path) -> tuple[str, str, str]:
    """Return instance-id, name and address as the guest on this disk is told."""
    files = seed_files(copy)
    meta: dict[str, Any] = json.loads(files["meta-data"])
    network: dict[str, Any] = json.loads(files["network-config"])
    address: str = network["config"][0]["subnets"][0]["address"]
    return meta["instance-id"], meta["local-hostname"], address


def test_add_from_a_path(node: Machine, vm: str, images: Path) -> None:
    copy = node.copy(add(node, vm))
    assert copy.stat().st_size == 64 * MIB
    assert_image(copy, images / "small.raw")
    assert told(copy) == (uuid(node, vm), "vm4.example.com", "192.0.2.41/24")
    # neither udev nor LVM has looked into the guest's disk
    assert "part" not in node.run("lsblk --noheadings --output TYPE")


def test_a_volume_that_cannot_be_written(node: Machine, vm: str, images: Path) -> None:
    disk = add(node, vm)
    for taken, released, words in REFUSED:
        node.run(taken.format(disk))
        try:
            before = node.run(f"sha256sum < {disk}")
            out = node.run(OTHER.format(vm), status=1)
            assert f"ERROR: {disk}: {words}" in out
            assert node.run(f"sha256sum < {disk}") == before
        finally:
            node.run(released.format(disk))
    node.run(OTHER.format(vm))
    assert_image(node.copy(disk), images / "other.raw")
