"""Instances on DRBD, by a real Ganeti of two nodes in virtual machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ganeti.test_gnt_backup import data, uuid
from tests.images import MIB, assert_image
from tests.storage.machine import Machine
from tests.storage.test_plain import OTHER, add, export_and_import, served, told

pytestmark = pytest.mark.storage
DRBD = "-t drbd --ignore-ipolicy -n node1.example.com:node2.example.com"
Pair = tuple[Machine, Machine]


@pytest.fixture(scope="module")
def pair(node: Machine, second: Machine) -> Pair:
    """Return the nodes of a cluster of two, of which the first is the master."""
    if "node2" not in node.run("gnt-node list --no-headers -o name"):
        keys = node.run("cat /root/.ssh/id_*.pub")
        second.run(f"mkdir -p -m 700 /root/.ssh; echo '{keys}' > /root/.ssh/authorized_keys")
        node.run("gnt-node add --no-ssh-key-check node2.example.com")
    return node, second


def copies(pair: Pair, name: str) -> list[Path]:
    """Copy what each node has of an instance's disk, which both have whole."""
    volume = pair[0].volume(name)
    return [node.copy(volume) for node in pair]


def test_add_grow_and_reinstall(pair: Pair, vm: str, images: Path) -> None:
    node, _second = pair
    with served(node) as web:
        source = f"-O image={web}/small.qcow2,checksum={web}/SHA256SUMS"
        assert add(node, vm, source, DRBD).startswith("/dev/drbd")
    expected = uuid(node, vm), "vm4.example.com", "192.0.2.41/24"
    for copy in copies(pair, vm):
        assert copy.stat().st_size == 64 * MIB
        assert_image(copy, images / "small.raw")
        assert told(copy) == expected
    node.run(f"gnt-instance grow-disk --ignore-ipolicy {vm}.example.com 0 16M")
    node.run(OTHER.format(vm))
    for copy in copies(pair, vm):
        assert copy.stat().st_size == 80 * MIB
        assert_image(copy, images / "other.raw")
        assert told(copy) == expected


def test_the_seed_travels(pair: Pair, vm: str) -> None:
    """Failover, replaced disks and a name that the other node wrote."""
    node, second = pair
    disk = add(node, vm, template=DRBD)
    own, before = uuid(node, vm), data(node, disk)
    given = f"DISK_COUNT=1 DISK_0_PATH={disk} DISK_0_ACCESS=rw OSP_IMAGE=/srv/other.raw"
    complaint = second.door("create", given, 1)
    assert f"ERROR: {disk}: " in complaint
    assert "DRBD is secondary here; run this on the primary node" in complaint
    node.run(f"gnt-instance failover -f {vm}.example.com")
    disk = node.disk(vm)
    assert data(second, disk) == before
    node.run(f"gnt-instance rename --no-ip-check {vm}.example.com vm5.example.com")
    node.run("gnt-instance replace-disks --on-secondary vm5.example.com")
    node.run("gnt-instance replace-disks --on-primary vm5.example.com")
    for copy in copies(pair, "vm5"):
        assert told(copy) == (own, "vm5.example.com", "192.0.2.41/24")
    node.run("gnt-instance failover -f vm5.example.com")
    assert data(node, node.disk("vm5")) == before
    assert "node1" in node.run("gnt-instance list --no-headers -o pnode vm5.example.com")


@pytest.mark.parametrize("state", ["stopped", "running"])
def test_export_and_import(pair: Pair, vm: str, state: str) -> None:
    export_and_import(pair[0], vm, state, DRBD)
