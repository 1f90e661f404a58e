"""create as Ganeti runs it, on loop devices full of old bytes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import require
from tests.images import MIB, convert, disk_image
from tests.scripts.conftest import GAP, UUID, Door, seed_files

pytestmark = pytest.mark.root
OLD = b"\xff"
Device = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two images of 12 MiB with other data in other places."""
    require("sfdisk", "sgdisk", "qemu-img", "bwrap", "prlimit", "mkfs.vfat", "mcopy")
    folder = tmp_path_factory.mktemp("images")
    disk_image(folder / "first.raw", size_mib=12)
    disk_image(folder / "second.raw", size_mib=12, seed=2)
    convert(folder / "first.raw", "qcow2")
    return folder


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """Return a function that makes a loop device full of old bytes, and the file behind it."""
    require("losetup")
    with ExitStack() as devices:

        def make(mib: int = 20, *options: str) -> tuple[Path, Path]:
            backing = tmp_path / f"backing{len(list(tmp_path.glob('backing*')))}"
            backing.write_bytes(OLD * mib * MIB)
            argv = ["losetup", "--find", "--show", *options, str(backing)]
            name = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
            devices.callback(subprocess.run, ["losetup", "--detach", name], check=True)
            return Path(name), backing

        yield make


def assert_image(backing: Path, image: Path) -> None:
    """The image is there with real zeroes, the table spread, and old bytes in nobody's way."""
    want, got = image.read_bytes(), backing.read_bytes()
    assert got[:440] == want[:440]
    assert got[MIB : 11 * MIB] == want[MIB : 11 * MIB]
    assert got[11 * MIB : 13 * MIB - 33 * 512].strip(b"\0") == b""
    assert got[-512:].startswith(b"EFI PART")
    assert got[-MIB : -33 * 512].strip(b"\0") == b""
    checked = subprocess.run(["sgdisk", "-v", backing], capture_output=True, text=True)
    assert "No problems found" in checked.stdout


@pytest.mark.parametrize("name", ["first.raw", "first.qcow2"])
def test_create(door: Door, device: Device, images: Path, name: str) -> None:
    target, backing = device()
    other, untouched = device(4)
    result = door("create", disks=[target, other], OSP_IMAGE=f"{images}/{name}")
    assert result.status == 0, result.log
    assert_image(backing, images / "first.raw")
    assert json.loads(seed_files(target)["meta-data"])["instance-id"] == UUID
    assert untouched.read_bytes() == OLD * 4 * MIB


def test_reinstall(door: Door, device: Device, images: Path) -> None:
    target, backing = device()
    for number, name in enumerate(("first.raw", "second.raw")):
        more = {"INSTANCE_REINSTALL": "1"} if number else {}
        result = door("create", disks=[target], OSP_IMAGE=f"{images}/{name}", **more)
        assert result.status == 0, result.log
    assert_image(backing, images / "second.raw")


def test_a_device_in_use(door: Door, device: Device, images: Path) -> None:
    target, backing = device()
    claimed = os.open(target, os.O_RDONLY | os.O_EXCL)
    try:
        result = door("create", disks=[target], OSP_IMAGE=f"{images}/first.raw")
    finally:
        os.close(claimed)
    assert result.status == 1
    assert result.error == (
        f"ERROR: {target}: in use: by a running instance or another create; release it and run"
        " this again"
    )
    assert backing.read_bytes() == OLD * 20 * MIB


def test_post_hooks_may_claim_the_device(door: Door, device: Device, images: Path) -> None:
    folder = door.confdir / "hooks.d/post"
    folder.mkdir(parents=True)
    claim = "import os, sys; os.open(os.environ['CLOUDIMAGE_TARGET'], os.O_RDWR | os.O_EXCL)"
    (folder / "claim").write_text(f"#!/usr/bin/python3\n{claim}\n")
    (folder / "claim").chmod(0o755)
    target, _backing = device()
    result = door("create", disks=[target], OSP_IMAGE=f"{images}/first.raw")
    assert result.status == 0, result.log


def test_a_failure_after_the_first_byte(door: Door, device: Device, images: Path) -> None:
    folder = door.confdir / "hooks.d/post"
    folder.mkdir(parents=True)
    (folder / "fail").write_text("#!/bin/sh\nexit 3\n")
    (folder / "fail").chmod(0o755)
    target, backing = device()
    result = door("create", disks=[target], OSP_IMAGE=f"{images}/first.raw")
    assert result.status == 1
    assert result.error.startswith("ERROR: hook post/fail ended with status 3")
    content = backing.read_bytes()
    assert not any(content[:MIB])
    assert not any(content[-MIB:])
    assert any(content[4 * MIB : 5 * MIB])


def test_a_device_that_is_too_small(door: Door, device: Device, images: Path) -> None:
    target, backing = device(11)
    result = door("create", disks=[target], OSP_IMAGE=f"{images}/first.qcow2")
    assert result.status == 1
    assert f"12 MiB ({12 * MIB} bytes) do not fit on a disk of 11 MiB" in result.error
    assert backing.read_bytes() == OLD * 11 * MIB


def test_a_read_only_device(door: Door, device: Device, images: Path) -> None:
    target, backing = device(20, "--read-only")
    result = door("create", disks=[target], OSP_IMAGE=f"{images}/first.raw")
    assert result.status == 1
    assert result.error == (
        f"ERROR: {target}: the disk is read-only; make it writable on this node"
    )
    assert backing.read_bytes() == OLD * 20 * MIB


def test_a_seed_disk(door: Door, device: Device, images: Path) -> None:
    target, backing = device()
    second, seed = device(4)
    given = {"OSP_IMAGE": f"{images}/first.raw", "DISK_1_NAME": "cidata"}
    result = door("create", disks=[target, second], **given)
    assert result.status == 0, result.log
    assert_image(backing, images / "first.raw")
    assert not any(backing.read_bytes()[GAP:MIB])
    assert json.loads(seed_files(second, 0)["meta-data"])["instance-id"] == UUID
    assert not any(seed.read_bytes()[-MIB:])
    result = door("rename", disks=[target, second], INSTANCE_NAME="vm2.example.com")
    assert result.status == 0, result.log
    assert json.loads(seed_files(second, 0)["meta-data"])["local-hostname"] == "vm2.example.com"
