"""lib/disk/target.py on loop devices full of old bytes, on reflinks, and on full file systems."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lib import run
from lib.disk import target as disk
from lib.environment import Disk
from lib.errors import Error
from tests.conftest import require
from tests.root.conftest import Mount

pytestmark = pytest.mark.root
MIB = disk.MIB
OLD = b"\xff"


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that sets up a loop device on a file, and takes it down again."""
    require("losetup")
    with ExitStack() as devices:

        def attach(file: Path, *options: str) -> Path:
            name = run.run(["losetup", "--find", "--show", *options, str(file)]).strip()
            devices.callback(run.run, ["losetup", "--detach", name])
            return Path(name)

        yield attach


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Make a file of 12 MiB full of old bytes."""
    (tmp_path / "backing").write_bytes(OLD * 12 * MIB)
    return tmp_path / "backing"


def image(path: Path) -> Path:
    """Make an image of 5 MiB and an odd sector, with two holes."""
    data = random.Random(1)
    with open(path, "wb") as file:
        file.truncate(5 * MIB + 512)
        os.pwrite(file.fileno(), data.randbytes(MIB + 4096), 0)
        os.pwrite(file.fileno(), data.randbytes(70_000), 3 * MIB)
        os.pwrite(file.fileno(), data.randbytes(512), 5 * MIB)
    return path


def create(source: Path, place: Path) -> disk.Target:
    with open(source, "rb") as file:
        target = disk.open_target(Disk(0, place))
        disk.require(target, os.fstat(file.fileno()).st_size)
        with disk.unbootable_on_failure(target):
            with disk.claim(target):
                disk.write(file, target)
            disk.sync(target)
    return target


def test_device_full_of_old_bytes(tmp_path: Path, old: Path, loop: Callable[..., Path]) -> None:
    source = image(tmp_path / "image")
    (tmp_path / "link").symlink_to(loop(old))
    target = create(source, tmp_path / "link")
    assert target.is_device
    content = old.read_bytes()
    size = 5 * MIB + 512
    assert content[:size] == source.read_bytes()
    assert content[size : 7 * MIB] == bytes(2 * MIB - 512)
    assert content[7 * MIB : 11 * MIB] == OLD * 4 * MIB
    assert content[11 * MIB :] == bytes(MIB)
    # 1.1 MiB of data and 4 MiB of old bytes: the rest was punched out
    assert old.stat().st_blocks * 512 < 6 * MIB


def test_device_with_large_sectors(tmp_path: Path, old: Path, loop: Callable[..., Path]) -> None:
    source = image(tmp_path / "image")
    create(source, loop(old, "--sector-size=4096"))
    content = old.read_bytes()
    assert content[: 5 * MIB + 512] == source.read_bytes()
    assert content[5 * MIB + 512 : 7 * MIB] == bytes(2 * MIB - 512)


def test_splice(old: Path, loop: Callable[..., Path]) -> None:
    target = disk.open_target(Disk(0, loop(old)))
    target.write(3 * 512, b"a" * 512)
    disk.sync(target)
    assert target.read(3 * 512, 512) == b"a" * 512
    assert old.read_bytes()[: 5 * 512] == OLD * 3 * 512 + b"a" * 512 + OLD * 512


@pytest.mark.parametrize("part", ["", "p1"])
def test_mounted_device(tmp_path: Path, loop: Callable[..., Path], part: str) -> None:
    require("mkfs.ext4", "mount", "sfdisk", "partx")
    backing, point = tmp_path / "backing", tmp_path / "point"
    backing.write_bytes(bytes(12 * MIB))
    point.mkdir()
    offset = MIB if part else 0
    if part:
        run.run(["sfdisk", "--quiet", str(backing)], input=b"label: gpt\nstart=2048, size=20480\n")
    run.run(["mkfs.ext4", "-q", "-E", f"offset={offset}", str(backing), "10M"])
    before = backing.read_bytes()
    device = loop(backing)
    if part:
        run.run(["partx", "--add", str(device)])
    run.run(["mount", "--options", "ro", f"{device}{part}", str(point)])
    try:
        with pytest.raises(Error) as caught:
            create(image(tmp_path / "image"), device)
    finally:
        run.run(["umount", str(point)])
        if part:
            run.run(["partx", "--delete", str(device)])
    assert str(caught.value) == (
        f"{device}: in use: mounted on {point}; release it and run this again"
    )
    assert backing.read_bytes() == before


@pytest.mark.skipif(not Path("/sys/class/misc/device-mapper").exists(), reason="no device-mapper")
def test_device_of_a_mapping(tmp_path: Path, old: Path, loop: Callable[..., Path]) -> None:
    require("dmsetup")
    device = loop(old)
    name = f"cloudimage-{os.getpid()}"
    run.run(["dmsetup", "create", name, "--table", f"0 {12 * 2048} linear {device} 0"])
    try:
        with pytest.raises(Error, match=r"in use: part of dm-\d+; release it and run this again"):
            create(image(tmp_path / "image"), device)
    finally:
        run.run(["dmsetup", "remove", "--retry", name])


def test_claim_keeps_others_off(old: Path, loop: Callable[..., Path]) -> None:
    target = disk.open_target(Disk(0, loop(old)))
    with disk.claim(target):
        with pytest.raises(Error) as caught, disk.claim(target):
            pytest.fail("claimed twice")
        target.write(0, b"x")
    assert str(caught.value) == (
        f"{target.label}: in use: by a running instance or another create; "
        "release it and run this again"
    )
    with disk.claim(target):
        pass


def test_read_only_device(tmp_path: Path, old: Path, loop: Callable[..., Path]) -> None:
    device = loop(old, "--read-only")
    with pytest.raises(Error) as caught:
        create(image(tmp_path / "image"), device)
    assert str(caught.value) == f"{device}: the disk is read-only; make it writable on this node"
    assert old.read_bytes() == OLD * 12 * MIB


def test_failure_leaves_nothing_to_boot(
    tmp_path: Path, old: Path, loop: Callable[..., Path]
) -> None:
    target = disk.open_target(Disk(0, loop(old)))
    with pytest.raises(KeyboardInterrupt), disk.unbootable_on_failure(target):
        with disk.claim(target), open(image(tmp_path / "image"), "rb") as file:
            disk.write(file, target)
            raise KeyboardInterrupt
    content = old.read_bytes()
    assert not any(content[:MIB]) and not any(content[-MIB:])
    assert any(content[MIB : 2 * MIB])


def test_device_that_cannot_store(tmp_path: Path, mount: Mount, loop: Callable[..., Path]) -> None:
    """A loop device on a full file system takes every write and fails in fsync."""
    backing = mount("ext4", 16 * MIB) / "backing"
    backing.touch()
    os.truncate(backing, 64 * MIB)
    source = tmp_path / "image"
    source.write_bytes(random.Random(2).randbytes(32 * MIB))
    device = loop(backing)
    with pytest.raises(OSError) as caught:
        create(source, device)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(device))
    assert not any(backing.read_bytes()[:MIB])


def test_full_file_system(tmp_path: Path, mount: Mount) -> None:
    place = mount("ext4", 16 * MIB) / "disk"
    place.touch()
    os.truncate(place, 64 * MIB)
    source = tmp_path / "image"
    source.write_bytes(random.Random(2).randbytes(32 * MIB))
    with pytest.raises(OSError) as caught:
        create(source, place)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(place))
    assert not any(place.read_bytes()[:MIB])
    assert place.stat().st_size == 64 * MIB


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_reflink(mount: Mount, kind: str) -> None:
    require("filefrag")
    folder = mount(kind, 512 * MIB)
    source, place = folder / "image", folder / "disk"
    source.write_bytes(random.Random(3).randbytes(40 * MIB + 512))
    place.write_bytes(OLD * 48 * MIB)
    os.sync()
    started = time.monotonic()
    create(source, place)
    assert time.monotonic() - started < 1
    content = place.read_bytes()
    assert content[: 40 * MIB + 512] == source.read_bytes()
    assert len(content) == 48 * MIB and not any(content[40 * MIB + 512 :])
    assert "shared" in run.run(["filefrag", "-v", str(place)])
