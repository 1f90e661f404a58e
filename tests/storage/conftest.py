"""One Ceph cluster and one node in a virtual machine, each for all tests of this folder."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.boot.conftest import build_image
from tests.boot.instance import user_data
from tests.conftest import require
from tests.images import convert, disk_image
from tests.scripts.conftest import Door
from tests.storage import ceph as cluster
from tests.storage import machine
from tests.storage.ceph import Ceph
from tests.storage.machine import Machine, System


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    require("ceph", "ceph-mgr", "ceph-mon", "ceph-osd", "rbd", "qemu-nbd", "qemu-io", "unshare")
    if not list(Path("/usr/lib").glob("**/qemu/block-rbd.so")):
        require("qemu-block-extra")
    with cluster.started() as started:
        yield started


@pytest.fixture
def door(tmp_path: Path, ceph: Ceph) -> Door:
    """Return what runs the doors on a node whose /etc/ceph leads to the cluster."""
    require("qemu-img", "bwrap", "prlimit", "sfdisk", "mkfs.vfat", "mcopy", "zstd")
    door = Door(tmp_path)
    enter = f'mount --bind {ceph.folder} /etc/ceph && exec "$@"'
    door.wrapper = ["unshare", "--mount", "sh", "-c", enter, "sh"]
    return door


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what machines have in /srv: small images, user-data, and debian.qcow2, which boots."""
    require("qemu-img", "sfdisk", "mmdebstrap", "grub-mkimage")
    folder = tmp_path_factory.mktemp("images")
    bootable = build_image(folder / "debian.raw")
    subprocess.run(
        ["qemu-img", "convert", "-c", "-O", "qcow2", bootable, folder / "debian.qcow2"], check=True
    )
    bootable.unlink()
    (folder / "user-data").write_text(user_data())
    convert(disk_image(folder / "small.raw"), "qcow2")
    disk_image(folder / "other.raw", size_mib=16, seed=2)
    return folder


@pytest.fixture(scope="session")
def system(images: Path) -> Iterator[System]:
    """Build what the machines boot from; they find the images in /srv."""
    require("mmdebstrap", "mke2fs", "qemu-system-x86_64", "tar", "sgdisk", "mdir")
    with tempfile.TemporaryDirectory(prefix="cloudimage-machines-", dir="/var/tmp") as folder:
        yield machine.build(Path(folder), images)


@pytest.fixture(scope="session")
def node(system: System) -> Iterator[Machine]:
    """Boot node1.example.com and make a cluster of it."""
    with machine.started(system, 1) as node:
        machine.make_cluster(node)
        yield node


@pytest.fixture(scope="session")
def second(system: System) -> Iterator[Machine]:
    """Boot node2.example.com, which is in no cluster yet."""
    with machine.started(system, 2) as node:
        yield node


@pytest.fixture
def vm(node: Machine) -> Iterator[str]:
    """Name an instance that is gone at the end of the test, under whatever name."""
    yield "vm4"
    node.remove_all()
