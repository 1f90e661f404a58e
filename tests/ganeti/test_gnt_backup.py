"""gnt-backup export and import, and gnt-instance rename, on a real Ganeti."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ganeti.conftest import Cluster
from tests.images import MIB

pytestmark = pytest.mark.cluster
EXPORTS = "/var/lib/ganeti/export"
LAN = "network=lan,mac=generate"


@dataclass(frozen=True)
class Exported:
    """The export of vm1, which is gone; and what was on its disk."""

    dump: str
    uuid: str
    data: str  # the digest of what is behind table and seed
    files: dict[str, str]


def seed(cluster: Cluster, disk: str, offset: int = 32768) -> dict[str, str]:
    """Return the seed's files."""
    names = ("meta-data", "network-config", "user-data", "vendor-data")
    return {name: cluster.run(f"mtype -i {disk}@@{offset} ::/{name}") for name in names}


def meta_data(files: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files["meta-data"])
    return found


def address(files: dict[str, str]) -> str:
    found: str = json.loads(files["network-config"])["config"][0]["subnets"][0]["address"]
    return found


def uuid(cluster: Cluster, name: str) -> str:
    return cluster.run(f"gnt-instance list --no-headers -o uuid {name}.example.com").strip()


def data(cluster: Cluster, disk: str) -> str:
    return cluster.run(f"tail -c +{MIB + 1} {disk} | sha256sum")


def export(cluster: Cluster, name: str) -> None:
    """Export an instance; a running one is stopped, for only LVM's disks have snapshots."""
    cluster.run(f"gnt-backup export --long-sleep -n node1.example.com {name}.example.com")


def restore(cluster: Cluster, source: str, name: str, more: str = "", complaint: str = "") -> None:
    """Import what was exported under the name `source`; a failure too ends with status 0."""
    out = cluster.run(
        "gnt-backup import -t file -n node1.example.com --src-node=node1.example.com"
        f" --src-dir={source}.example.com -B memory=256M --no-name-check --no-ip-check"
        f" {more} {name}.example.com"
    )
    assert ("were not imported successfully" in out) == bool(complaint), out
    assert complaint in out


@pytest.fixture(scope="module")
def exported(cluster: Cluster, images: Path) -> Iterator[Exported]:
    cluster.add(
        "vm1",
        f"--disk 0:size=64M --net 0:ip=10.77.0.31,{LAN} -o cloudimage+default"
        f" -O 'image={images}/small.qcow2,user_data=#!/bin/sh\necho {{}}'",
    )
    disk = cluster.disk("vm1")
    export(cluster, "vm1")
    dump = cluster.run(f"ls {EXPORTS}/vm1.example.com/*-*-*").strip()
    yield Exported(dump, uuid(cluster, "vm1"), data(cluster, disk), seed(cluster, disk))
    cluster.run(f"rm -r {EXPORTS}/vm1.example.com")


@pytest.fixture
def vm(cluster: Cluster) -> Iterator[str]:
    """Name an instance that is gone at the end of the test, under whatever name."""
    yield "vm2"
    for name in ("vm2", "vm3"):
        cluster.attempt(f"gnt-instance remove -f --ignore-failures {name}.example.com")


def test_restore(cluster: Cluster, exported: Exported) -> None:
    cluster.remove("vm1")
    restore(cluster, "vm1", "vm1")
    disk = cluster.disk("vm1")
    files = seed(cluster, disk)
    assert data(cluster, disk) == exported.data
    assert uuid(cluster, "vm1") != exported.uuid
    assert meta_data(files)["instance-id"] == exported.uuid
    assert meta_data(files)["local-hostname"] == "vm1.example.com"
    for name in ("user-data", "vendor-data", "network-config"):
        assert files[name] == exported.files[name]
    cluster.remove("vm1")


def test_clone_and_rename(cluster: Cluster, exported: Exported, vm: str) -> None:
    restore(cluster, "vm1", vm, f"--net 0:ip=10.77.0.32,{LAN}")
    disk = cluster.disk(vm)
    assert data(cluster, disk) == exported.data
    clone = seed(cluster, disk)
    meta = meta_data(clone)
    assert (meta["instance-id"], meta["local-hostname"]) == (uuid(cluster, vm), "vm2.example.com")
    assert address(exported.files) == "10.77.0.31/24"
    assert address(clone) == "10.77.0.32/24"
    assert clone["user-data"] == exported.files["user-data"]
    before = cluster.run(f"sha256sum < {disk}")
    rename = "gnt-instance rename"
    out = cluster.run(f"{rename} vm2.example.com vm3.example.com")
    assert "Could not run OS rename script" not in out
    files = seed(cluster, cluster.disk("vm3"))
    renamed = meta_data(files)
    assert renamed["instance-id"] == meta["instance-id"]
    assert renamed["local-hostname"] == "vm3.example.com"
    assert files["vendor-data"] == clone["vendor-data"]
    cluster.run(f"{rename} vm3.example.com vm2.example.com")
    assert cluster.run(f"sha256sum < {cluster.disk(vm)}") == before


def test_a_larger_disk(cluster: Cluster, exported: Exported, vm: str) -> None:
    restore(cluster, "vm1", vm, f"--disk 0:size=96M --net 0:ip=10.77.0.33,{LAN}")
    disk = cluster.disk(vm)
    assert "No problems found" in cluster.run(f"sgdisk -v {disk}")
    assert meta_data(seed(cluster, disk))["local-hostname"] == "vm2.example.com"


def test_a_dump_made_by_dd(cluster: Cluster, exported: Exported, vm: str, images: Path) -> None:
    """Another provider's, without a seed: the instance is imported, and a WARNING in the log."""
    cluster.run(f"cp {exported.dump} /root/dump")
    try:
        cluster.run(f"dd if={images}/small.raw of={exported.dump} bs=1M")
        restore(cluster, "vm1", vm, f"--net 0:ip=10.77.0.34,{LAN}")
    finally:
        cluster.run(f"mv /root/dump {exported.dump}")
    count = 31 * MIB - 33 * 512
    cluster.run(f"cmp --ignore-initial=1M --bytes={count} {cluster.disk(vm)} {images}/small.raw")
    log = cluster.run("cat /var/log/ganeti/os/rename-*-vm2.example.com-*.log")
    assert "WARNING: vm2.example.com: its disks hold no seed" in log


def test_a_truncated_dump(cluster: Cluster, exported: Exported, vm: str) -> None:
    cluster.run(f"cp {exported.dump} /root/dump; truncate -s -1000 {exported.dump}")
    try:
        complaint = "zstd failed with status 1"
        restore(cluster, "vm1", vm, f"--net 0:ip=10.77.0.35,{LAN}", complaint)
    finally:
        cluster.run(f"mv /root/dump {exported.dump}")
    disk = cluster.disk(vm)
    assert cluster.run(f"head -c 1M {disk} | tr -d '\\0' | wc -c").strip() == "0"


def test_several_disks_of_a_running_instance(cluster: Cluster, vm: str, images: Path) -> None:
    cluster.add(
        vm,
        "--disk 0:size=64M --disk 1:size=4M,name=cidata --disk 2:size=8M"
        f" --net 0:ip=10.77.0.36,{LAN} -o cloudimage+default -O image={images}/small.raw",
    )

    def disks() -> list[str]:
        """Return the disks' paths by size, the largest first."""
        return cluster.run(f"ls -S /srv/ganeti/file-storage/{vm}.example.com/*").split()

    cluster.run(f"head -c 5M /dev/urandom | dd of={disks()[1]} bs=1M seek=2 conv=notrunc")
    cluster.run(f"gnt-instance startup {vm}.example.com")
    before = [cluster.run(f"sha256sum < {disk}") for disk in disks()]
    files = seed(cluster, disks()[2], 0)
    export(cluster, vm)
    try:
        assert "running" in cluster.run(f"gnt-instance list {vm}.example.com")
        cluster.remove(vm)
        restore(cluster, vm, vm)
        after = [cluster.run(f"sha256sum < {disk}") for disk in disks()]
        assert after[:2] == before[:2]
        restored = seed(cluster, disks()[2], 0)
        assert meta_data(restored)["instance-id"] == meta_data(files)["instance-id"]
        assert restored["network-config"] == files["network-config"]
    finally:
        cluster.run(f"rm -r {EXPORTS}/{vm}.example.com")
