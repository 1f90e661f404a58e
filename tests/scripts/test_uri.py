"""create on disks that have no path on the node, only a URI: qemu's drivers reach them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import require
from tests.images import MIB, convert, disk_image
from tests.scripts.conftest import GAP, UUID, Door, Result, seed_files

OLD = b"\xff"
Make = Callable[..., Path]
Uri = Callable[[Path], str]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("sfdisk", "qemu-img", "sgdisk")
    return disk_image(tmp_path_factory.mktemp("images") / "image.raw", size_mib=12)


@pytest.fixture(params=["file", "nbd"])
def uri(request: pytest.FixtureRequest, nbd: Uri) -> Uri:
    """Return what gives a disk's URI; that of nbd is of a server which knows no path."""
    return nbd if request.param == "nbd" else "file:{}".format


def create(door: Door, image: Path, uri: str, **more: str) -> Result:
    """Call the door with what Ganeti's OSEnvironment sets for storage without a path."""
    given = {"DISK_COUNT": "1", "DISK_0_URI": uri, "DISK_0_ACCESS": "rw", **more}
    return door("create", disks=[], OSP_IMAGE=str(image), **given)


def test_create(door: Door, disk: Make, image: Path, uri: Uri) -> None:
    target = disk(20)
    target.write_bytes(OLD * 20 * MIB)
    result = create(door, convert(image, "qcow2"), uri(target))
    assert result.status == 0, result.log
    want, got = image.read_bytes(), target.read_bytes()
    assert got[:440] == want[:440]
    assert got[MIB : 11 * MIB] == want[MIB : 11 * MIB]
    checked = subprocess.run(["sgdisk", "-v", target], capture_output=True, text=True)
    assert "No problems found" in checked.stdout
    assert got[-512:].startswith(b"EFI PART")
    assert not any(got[-MIB : -33 * 512])
    assert json.loads(seed_files(target)["meta-data"])["instance-id"] == UUID


def test_rename(door: Door, disk: Make, image: Path, uri: Uri) -> None:
    target = disk(20)
    address = uri(target)
    assert create(door, image, address).status == 0
    given = {"DISK_COUNT": "1", "DISK_0_URI": address, "INSTANCE_NAME": "vm2.example.com"}
    result = door("rename", disks=[], **given)
    assert result.status == 0, result.log
    assert json.loads(seed_files(target)["meta-data"])["local-hostname"] == "vm2.example.com"


def test_a_hook_gets_the_uri(door: Door, disk: Make, image: Path) -> None:
    folder = door.confdir / "hooks.d/post"
    folder.mkdir(parents=True)
    (folder / "show").write_text('#!/bin/sh\necho "on $CLOUDIMAGE_TARGET"; exit 1\n')
    (folder / "show").chmod(0o755)
    target = disk(20)
    result = create(door, image, f"file:{target}")
    assert result.status == 1
    assert f"show: on file:{target}\n" in result.log
    # and its failure left nothing to boot
    content = target.read_bytes()
    assert not any(content[:MIB])
    assert not any(content[-MIB:])


def test_too_small(door: Door, disk: Make, image: Path, uri: Uri) -> None:
    target = disk(8)
    result = create(door, image, uri(target))
    assert result.status == 1
    assert result.error.endswith(
        f"12 MiB ({12 * MIB} bytes) do not fit on a disk of 8 MiB ({8 * MIB} bytes);"
        " use --disk 0:size=12M"
    )
    assert target.stat().st_blocks == 0


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("file:/nonexistent", "No such file or directory"),
        ("nbd+unix:///?socket=/nonexistent", "No such file or directory"),
        ("nosuch:pool/disk", "nosuch:pool/disk: "),
        ('json:{"driver":"file"}', 'DISK_0_URI=\'json:{"driver":"file"}\': json: is not accepted'),
        ("/dev/null", "DISK_0_URI='/dev/null' is not a URI"),
    ],
)
def test_bad_uris(door: Door, image: Path, uri: str, words: str) -> None:
    result = create(door, image, uri)
    assert result.status == 1
    assert result.error.startswith("ERROR: ")
    assert words in result.error


def test_a_seed_disk(door: Door, disk: Make, image: Path) -> None:
    first, second = disk(20), disk(4, "disk1")
    second.write_bytes(OLD * 4 * MIB)
    seeds = {"DISK_1_URI": f"file:{second}", "DISK_1_NAME": "cidata"}
    result = create(door, image, f"file:{first}", **{"DISK_COUNT": "2", **seeds})
    assert result.status == 0, result.log
    assert json.loads(seed_files(second, 0)["meta-data"])["instance-id"] == UUID
    with first.open("rb") as file:
        assert os.pread(file.fileno(), 512, GAP) == bytes(512)
