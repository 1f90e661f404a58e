"""Instances on LVM, by a real Ganeti on a node in a virtual machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ganeti.test_gnt_backup import LAN, data, restore, uuid
from tests.images import MIB, assert_image
from tests.scripts.conftest import seed_files
from tests.storage.machine import Machine

pytestmark = pytest.mark.storage
PLAIN = "-t plain --ignore-ipolicy"
ONE, TWO = (f"--net 0:ip=192.0.2.{last},{LAN}" for last in (41, 42))
OTHER = "gnt-instance reinstall -f -O image=/srv/other.raw,checksum=none {}.example.com"
BEHIND = 32 * MIB  # where the image ends, and the next partition would begin
# what an old guest leaves where the image does not reach
STALE = """set -e
head -c 64M /dev/zero | tr '\\0' '\\377' > $disk
mke2fs -q -F -t ext4 $disk
loop=$(losetup --find --show --offset=$behind $disk)
pvcreate --quiet $loop
losetup --detach $loop
python3 - $disk <<'ZFS'
import sys
disk = open(sys.argv[1], "r+b")
disk.seek(-128 << 10, 2)
disk.write(128 * (bytes.fromhex("0cb1ba00") + bytes(1020)))
ZFS
rule=/run/udev/rules.d/64-md-raid-assembly.rules  # udev would start the array again
mkdir -p ${rule%/*}
ln -sf /dev/null $rule
udevadm control --reload
mdadm --quiet --create --run --force --metadata=1.0 --level=1 --raid-devices=1 /dev/md9 $disk
mdadm --quiet --stop /dev/md9
udevadm settle
rm $rule
udevadm control --reload
"""
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
        "(held); release it and run this again",
    ),
    (
        "mke2fs -q -F {0} && mount --read-only {0} /mnt",
        "umount /mnt",
        "in use: mounted on /mnt",
    ),
)


def add(
    node: Machine,
    name: str,
    more: str = "-O image=/srv/small.qcow2",
    template: str = PLAIN,
) -> str:
    """Add an instance with a disk of 64 MiB, which runs nothing; return its disk's path."""
    node.add(name, f"{template} -H fake --disk 0:size=64M -o cloudimage+default {ONE} {more}")
    return node.disk(name)


def told(copy: Path) -> tuple[str, str, str]:
    """Return instance-id, name and address as the guest on this disk is told."""
    files = seed_files(copy)
    meta: dict[str, Any] = json.loads(files["meta-data"])
    network: dict[str, Any] = json.loads(files["network-config"])
    address: str = network["config"][0]["subnets"][0]["address"]
    return meta["instance-id"], meta["local-hostname"], address


@contextmanager
def served(node: Machine) -> Iterator[str]:
    """Serve /srv in the machine, with a list that has the digest of small.qcow2."""
    node.run("cd /srv; sha256sum small.qcow2 > SHA256SUMS")
    node.run(
        "python3 -m http.server --bind 127.0.0.1 --directory /srv 8000 > /dev/null 2>&1 &"
        " echo $! > /run/web; until (: < /dev/tcp/127.0.0.1/8000) 2> /dev/null; do sleep 1; done"
    )
    try:
        yield "http://127.0.0.1:8000"
    finally:
        node.run("kill $(cat /run/web)")


def test_add_from_a_path(node: Machine, vm: str, images: Path) -> None:
    copy = node.copy(add(node, vm))
    assert copy.stat().st_size == 64 * MIB
    assert_image(copy, images / "small.raw")
    assert told(copy) == (uuid(node, vm), "vm4.example.com", "192.0.2.41/24")
    # neither udev nor LVM has looked into the guest's disk
    assert "part" not in node.run("lsblk --noheadings --output TYPE")


def test_add_over_http(node: Machine, vm: str, images: Path) -> None:
    with served(node) as web:
        source = f"-O image={web}/small.qcow2,checksum={web}/SHA256SUMS"
        assert_image(node.copy(add(node, vm, source)), images / "small.raw")


def test_rename_grow_and_reinstall(node: Machine, vm: str, images: Path) -> None:
    disk = add(node, vm)
    before = data(node, disk)
    node.run("gnt-instance rename --no-ip-check vm4.example.com vm5.example.com")
    assert node.disk("vm5") == disk
    assert data(node, disk) == before
    own = uuid(node, "vm5")
    assert told(node.copy(disk)) == (own, "vm5.example.com", "192.0.2.41/24")
    node.run("gnt-instance grow-disk --ignore-ipolicy vm5.example.com 0 16M")
    grown = node.copy(disk)
    assert grown.stat().st_size == 80 * MIB
    assert told(grown) == (own, "vm5.example.com", "192.0.2.41/24")
    node.run(OTHER.format("vm5"))
    copy = node.copy(disk)
    assert_image(copy, images / "other.raw")
    assert told(copy) == (own, "vm5.example.com", "192.0.2.41/24")


@pytest.mark.parametrize("state", ["stopped", "running"])
def test_export_and_import(node: Machine, vm: str, state: str) -> None:
    export_and_import(node, vm, state, PLAIN)


def export_and_import(node: Machine, vm: str, state: str, template: str) -> None:
    """Export an instance, import it as a clone beside it, and as itself when it is gone."""
    disk = add(node, vm, template=template)
    own, before = uuid(node, vm), data(node, disk)
    first = seed_files(node.copy(node.volume(vm)))
    volumes = node.run("lvs --noheadings -o lv_path")
    option = ""
    if state == "running":
        node.run(f"gnt-instance startup {vm}.example.com")
        option = "--noshutdown"
    node.run(f"gnt-backup export {option} -n node1.example.com {vm}.example.com")
    assert node.run("lvs --noheadings -o lv_path") == volumes  # no snapshot is left
    listed = node.run(f"gnt-instance list --no-headers -o oper_state {vm}.example.com")
    assert listed.strip() == ("Y" if state == "running" else "N"), listed
    restore(node, vm, "vm5", f"{template} --disk 0:size=96M {TWO}")
    clone = node.copy(node.volume("vm5"))
    assert told(clone) == (uuid(node, "vm5"), "vm5.example.com", "192.0.2.42/24")
    node.remove("vm5")
    node.remove(vm)
    restore(node, vm, vm, template)
    assert data(node, node.disk(vm)) == before
    assert uuid(node, vm) != own
    copy = node.copy(node.volume(vm))
    assert told(copy) == (own, "vm4.example.com", "192.0.2.41/24")
    assert seed_files(copy)["user-data"] == first["user-data"]


def test_stale_bytes_do_not_come_back(node: Machine, vm: str, images: Path) -> None:
    disk = add(node, vm)
    node.run(f"disk={disk} behind={BEHIND}\n{STALE}")
    seen = node.run(f"wipefs --noheadings --output TYPE {disk}").split()
    assert {"ext4", "linux_raid_member", "zfs_member"} <= set(seen)
    assert "LVM2_member" in node.run(f"blkid --probe --offset {BEHIND} {disk}")
    node.run(f"gnt-instance reinstall -f {vm}.example.com")
    assert_image(node.copy(disk), images / "small.raw")
    seen = node.run(f"wipefs --noheadings --output TYPE {disk}").split()
    assert set(seen) == {"gpt", "PMBR"}
    node.run(f"blkid --probe --offset {BEHIND} {disk}", status=2)


def test_a_volume_that_cannot_be_written(node: Machine, vm: str, images: Path) -> None:
    disk = add(node, vm)
    for taken, released, words in REFUSED:
        node.run(taken.format(disk))
        try:
            before = node.run(f"sha256sum < {disk}")
            out = node.run(OTHER.format(vm), status=1)
            assert f"ERROR: {disk}: " in out
            assert words in out
            assert node.run(f"sha256sum < {disk}") == before
        finally:
            node.run(released.format(disk))
    node.run(OTHER.format(vm))
    assert_image(node.copy(disk), images / "other.raw")
