"""create on XFS, where it shares blocks with the image, and on full file systems."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require
from tests.images import MIB, disk_image
from tests.root.conftest import Mount
from tests.scripts.conftest import Door, seed_files
from tests.scripts.test_killed import killed

pytestmark = pytest.mark.root
OLD = b"old " * (MIB // 4)
SIZE = 48 * MIB  # of the disk; the image is smaller


@pytest.fixture
def door(tmp_path: Path) -> Door:
    require("qemu-img", "bwrap", "prlimit", "sfdisk", "mkfs.vfat", "mcopy", "strace")
    return Door(tmp_path)


def fill(folder: Path, left_bytes: int = 0) -> None:
    """Leave no block of a file system free, but for so many bytes."""
    for size in (MIB, 4096):
        with (folder / f"ballast{size}").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass
            os.fsync(file.fileno())
    ballast = folder / f"ballast{MIB}"
    os.truncate(ballast, ballast.stat().st_size - left_bytes)
    os.sync()


def assert_safe(disk: Path, image: Path) -> None:
    """The disk is as large as it was, and boots with a seed or not at all."""
    assert disk.stat().st_size == SIZE
    with disk.open("rb") as file:
        head = file.read(4096)
    # the table of its boot sector, but for the disk's size in it
    if head[462:512] == image.read_bytes()[462:512]:
        assert "meta-data" in seed_files(disk)
    else:
        assert head in (bytes(4096), OLD[:4096])


@pytest.mark.parametrize("call", ["fsync", "ioctl", "pwrite64", "fallocate"])
def test_killed_on_xfs(door: Door, mount: Mount, call: str) -> None:
    require("filefrag")
    folder = mount("xfs", 512 * MIB)
    image, disk = disk_image(folder / "image.raw"), folder / "disk"
    for number in range(1, 30):
        disk.write_bytes(OLD * (SIZE // MIB))
        os.sync()
        if not killed(door, disk, image, call, number):
            break
        assert_safe(disk, image)
        result = door("create", disks=[disk], OSP_IMAGE=str(image))
        assert result.status == 0, result.log
        assert_safe(disk, image)
        assert disk.read_bytes()[4 * MIB : 31 * MIB] == image.read_bytes()[4 * MIB : 31 * MIB]
        shared = subprocess.run(["filefrag", "-v", disk], capture_output=True, text=True).stdout
        assert "shared" in shared
    assert 1 < number < 29


@pytest.mark.parametrize(("kind", "mib"), [("xfs", 320), ("ext4", 128)])
@pytest.mark.parametrize("left_kib", [0, 64, 512, 1100, 4096])
def test_full(door: Door, mount: Mount, kind: str, mib: int, left_kib: int) -> None:
    """A clone takes no space, what follows it does; and so must not the wipe."""
    folder = mount(kind, mib * MIB)
    image, disk = disk_image(folder / "image.raw"), folder / "disk"
    other = disk_image(folder / "other.raw", seed=2)
    for first in (None, other):
        disk.unlink(missing_ok=True)
        disk.touch()
        os.truncate(disk, SIZE)
        if first is not None:  # a disk that boots, and is to be installed again
            assert door("create", disks=[disk], OSP_IMAGE=str(first)).status == 0
        fill(folder, left_kib << 10)
        result = door("create", disks=[disk], OSP_IMAGE=str(image))
        assert_safe(disk, image)
        if result.status == 0:
            assert "meta-data" in seed_files(disk)
        else:
            assert "No space left on device" in result.error
            assert not any(disk.read_bytes()[:4096])
            assert f"{disk}: made unbootable" in result.log
        assert "may boot" not in result.log
        for ballast in folder.glob("ballast*"):
            ballast.unlink()
        assert door("create", disks=[disk], OSP_IMAGE=str(image)).status == 0
        assert_safe(disk, image)
