"""Instances on disks that nodes share: NFS and Gluster, served by the node, and adopted ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ganeti.test_gnt_backup import data, export, meta_data, restore, seed, uuid
from tests.ganeti.test_storage import SHARED, a_whole_life
from tests.images import MIB, assert_image
from tests.storage.machine import UUID, Machine
from tests.storage.test_plain import ONE, OTHER, TWO, told

pytestmark = pytest.mark.storage
TEMPLATES = "gnt-cluster modify --enabled-disk-templates={0} --ipolicy-disk-templates={0} {1}"
NFS = f"""set -e
mkdir -p /srv/nfs {SHARED}
echo {SHARED} >> /etc/ganeti/file-storage-paths
systemctl start nfs-kernel-server
exportfs -o rw,no_root_squash,fsid=0 10.77.0.1:/srv/nfs
mount -t nfs4 10.77.0.1:/ {SHARED}
"""
GLUSTER = """set -e
echo /var/run/ganeti/gluster >> /etc/ganeti/file-storage-paths
systemctl start glusterd
gluster --mode=script volume create vms node1.example.com:/srv/brick force
gluster volume start vms
"""


@pytest.fixture(scope="module")
def nfs(node: Machine) -> Iterator[None]:
    node.run(NFS)
    node.run(TEMPLATES.format("plain,drbd,sharedfile", f"--shared-file-storage-dir={SHARED}"))
    yield
    node.run(TEMPLATES.format("plain,drbd", ""))
    node.run(f"umount {SHARED}; systemctl stop nfs-kernel-server")


@pytest.fixture(scope="module")
def gluster(node: Machine) -> Iterator[str]:
    """Return the place on the server where what is on the volume lies."""
    node.run(GLUSTER)
    node.run(TEMPLATES.format("plain,drbd,gluster", ""))
    node.run("gnt-cluster modify -D gluster:host=node1.example.com,port=24007,volume=vms")
    yield "/srv/brick"
    node.run(TEMPLATES.format("plain,drbd", ""))


def test_sharedfile_on_nfs(node: Machine, nfs: None) -> None:
    assert "nfs4" in node.run(f"findmnt --noheadings --output FSTYPE {SHARED}")
    a_whole_life(node, Path("/srv"), "192.0.2.51", "sharedfile", "", "/srv/nfs/*.example.com/*")


def test_gluster(node: Machine, gluster: str) -> None:
    a_whole_life(node, Path("/srv"), "192.0.2.52", "gluster", "", f"{gluster}/ganeti/*")


def test_gluster_by_its_uri(node: Machine, gluster: str) -> None:
    """The doors with the URI that Ganeti gives for access=userspace, and no path."""
    uri, file = "gluster://10.77.0.1:24007/vms/disk", f"{gluster}/disk"
    node.run(f"qemu-img create -q -f raw {uri} 64M")
    disk = f"DISK_COUNT=1 DISK_0_URI={uri} DISK_0_ACCESS=rw"
    node.door("create", f"{disk} OSP_IMAGE=/srv/small.qcow2")
    node.run(f"cmp --ignore-initial=1M --bytes=30M {file} /srv/small.raw")
    node.door("rename", f"{disk} OLD_INSTANCE_NAME=vm4.example.com INSTANCE_NAME=vm5.example.com")
    files = seed(node, file)
    meta = meta_data(files)
    assert (meta["instance-id"], meta["local-hostname"]) == (UUID, "vm5.example.com")
    before = data(node, file)
    node.door("export > /srv/dump", f"EXPORT_DISK_URI={uri} EXPORT_INDEX=0")
    node.run(f"qemu-io -f raw -c 'write -P 255 0 64M' {uri}")
    node.door("import < /srv/dump", f"IMPORT_DISK_URI={uri} IMPORT_INDEX=0")
    assert data(node, file) == before
    assert seed(node, file) == files
    node.run("gluster --mode=script volume stop vms")
    try:
        out = node.door("create", f"{disk} OSP_IMAGE=/srv/small.qcow2", 1)
    finally:
        node.run("gluster volume start vms")
    assert f"ERROR: {uri}: " in out


def test_an_adopted_block_device(node: Machine, images: Path) -> None:
    """Ganeti takes the disk as it is, whoever made it; reinstall writes to it."""
    node.run("lvcreate --quiet --yes --size 64M --name san xenvg")
    node.run(TEMPLATES.format("plain,drbd,blockdev", ""))
    disk, volume = "/dev/disk/by-id/dm-name-xenvg-san", "/dev/xenvg/san"
    old = node.run(f"sha256sum < {disk}")
    try:
        node.add(
            "vm4",
            f"-t blockdev --ignore-ipolicy -H fake --disk 0:adopt={disk}"
            f" -o cloudimage+default {ONE} -O image=/srv/small.qcow2",
        )
        assert node.run(f"sha256sum < {disk}") == old
        for command, image in (
            ("gnt-instance reinstall -f vm4.example.com", "small.raw"),
            (OTHER.format("vm4"), "other.raw"),
        ):
            node.run(command)
            copy = node.copy(volume)
            assert copy.stat().st_size == 64 * MIB
            assert_image(copy, images / image)
        own = uuid(node, "vm4")
        assert told(copy) == (own, "vm4.example.com", "192.0.2.41/24")
        before = data(node, disk)
        node.run("gnt-instance rename --no-ip-check vm4.example.com vm5.example.com")
        assert told(node.copy(volume)) == (own, "vm5.example.com", "192.0.2.41/24")
        export(node, "vm5")
        node.run(f"head -c 64M /dev/zero > {disk}")
        restore(node, "vm5", "vm6", f"-t plain --ignore-ipolicy --disk 0:size=64M {TWO}")
        assert data(node, node.disk("vm6")) == before
        assert data(node, disk) != before
    finally:
        for name in ("vm4", "vm5", "vm6"):
            node.attempt(f"gnt-instance remove -f --ignore-failures {name}.example.com")
        node.run(f"lvremove --quiet --yes {volume}; rm -rf /var/lib/ganeti/export/*")
        node.run(TEMPLATES.format("plain,drbd", ""))
