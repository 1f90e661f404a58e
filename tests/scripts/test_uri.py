"""create on disks that have no path on the node, only a URI: qemu's drivers reach them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.images import MIB, convert, disk_image
from tests.scripts.conftest import GAP, UUID, Door, Result, begun_import, impatient, seed_files

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
        (
            "nosuch:pool/disk",
            "nosuch:pool/disk: qemu-nbd: Unknown protocol 'nosuch'; install qemu's driver for it:"
            " qemu-block-extra (EL: qemu-kvm-block-*)",
        ),
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


@pytest.fixture
def server(nbd: Uri, disk: Make, tmp_path: Path) -> Iterator[tuple[str, Path, int]]:
    """Serve a disk of old bytes; yield its URI, its file and the server, which goes on later."""
    target = disk(32)
    target.write_bytes(OLD * 32 * MIB)
    address = nbd(target)
    pid = int((tmp_path / "pid").read_text())
    yield address, target, pid
    os.kill(pid, signal.SIGCONT)


def clients(server: int, address: str) -> list[str]:
    """Return the processes that use the address, but for who serves it."""
    found = subprocess.run(["pgrep", "-f", address[-40:]], capture_output=True, text=True)
    return [pid for pid in found.stdout.split() if int(pid) != server]


@pytest.mark.parametrize("phase", ["pre", "post"])
def test_create_on_storage_that_stalls(
    door: Door, image: Path, server: tuple[str, Path, int], phase: str
) -> None:
    address, target, pid = server
    folder = door.confdir / "hooks.d" / phase
    folder.mkdir(parents=True)
    (folder / "stop").write_text(f"#!/bin/sh\nkill -STOP {pid}\n")
    (folder / "stop").chmod(0o755)
    given = {"OSP_IMAGE": str(image), "DISK_COUNT": "1", "DISK_0_URI": address}
    started = time.monotonic()
    result = door(impatient("create", 2), disks=[], **given)
    assert time.monotonic() - started < 15
    assert result.status == 1
    assert result.error == (
        f"ERROR: {address}: the storage did not answer within 2 s; see that the storage serves"
        " this node and is not full (ceph health detail), then run this again"
    )
    assert ("its head could not be wiped, it may boot" in result.log) == (phase == "post")
    assert not clients(pid, address)
    assert not door.leftovers()
    if phase == "pre":
        assert target.read_bytes() == OLD * 32 * MIB


def test_import_to_storage_that_stalls(
    door: Door, image: Path, server: tuple[str, Path, int]
) -> None:
    address, target, pid = server
    dump = image.read_bytes()
    child = begun_import(door, address, 2, dump[: 6 * MIB])
    while target.read_bytes()[4 * MIB : 5 * MIB] != dump[4 * MIB : 5 * MIB]:
        assert child.poll() is None
        time.sleep(0.05)
    os.kill(pid, signal.SIGSTOP)
    _out, said = child.communicate(dump[6 * MIB :], timeout=30)
    assert child.returncode == 1
    last = said.decode("ascii").splitlines()[-1]
    assert last.startswith(f"ERROR: importing to {address}: {address}: the storage did not answer")
    assert not clients(pid, address)
    os.kill(pid, signal.SIGCONT)
    assert create(door, image, address).status == 0  # when the server has done what it had got
    assert seed_files(target)


def test_a_signal_while_storage_stalls(
    door: Door, image: Path, server: tuple[str, Path, int]
) -> None:
    """The request that was cut off is not taken for the wipe: that is a connection's first."""
    address, target, pid = server
    dump = image.read_bytes()
    child = begun_import(door, address, 20, dump[: 6 * MIB])
    while target.read_bytes()[4 * MIB : 5 * MIB] != dump[4 * MIB : 5 * MIB]:
        time.sleep(0.05)
    os.kill(pid, signal.SIGSTOP)
    assert child.stdin is not None
    child.stdin.write(dump[6 * MIB : 8 * MIB])
    child.stdin.flush()
    time.sleep(1)
    child.terminate()
    time.sleep(2)
    os.kill(pid, signal.SIGCONT)
    assert child.stderr is not None
    said = child.stderr.read().decode("ascii")
    assert child.wait(30) == 128 + signal.SIGTERM
    child.stdin.close()
    child.stderr.close()
    assert f"{address}: made unbootable" in said
    content = target.read_bytes()
    assert not any(content[:MIB])
    assert not any(content[-MIB:])
