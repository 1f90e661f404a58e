"""One Ceph cluster for all tests of this folder, and doors that find it as on a node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.scripts.conftest import Door
from tests.storage import ceph as cluster
from tests.storage.ceph import Ceph


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
