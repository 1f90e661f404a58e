"""Booted guests: what they make of the seed, of a grown disk, a rename, a clone and a restore."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.boot.conftest import Instance, Node, boot, build_image, user_data

pytestmark = pytest.mark.boot
GIB = 1 << 30
ORIGINAL = Instance(
    "vm1.example.com", "7eb7a864-32d5-4cce-a37f-4dfde4aaf87e", "aa:00:00:12:34:01", "10.77.0.11"
)
RENAMED = replace(ORIGINAL, name="vm2.example.com", ip="10.77.0.12")
CLONE = Instance(
    "vm3.example.com", "0b0c4f3e-7a37-4c52-8a1e-2f5e5d0d6f03", "aa:00:00:12:34:03", "10.77.0.13"
)
RESTORED = replace(ORIGINAL, uuid="c3a8d4f2-5c1b-4b9e-9a57-61d2b8f0e904")
MBR = Instance(
    "vm5.example.com", "5d5f2a1c-90a4-4d0c-8c63-1b7a9e2c4d05", "aa:00:00:12:34:05", "10.77.0.15"
)


@dataclass(frozen=True)
class History:
    """Five instances of two images, and what four boots of them reported."""

    original: dict[str, str]
    mbr: dict[str, str]
    renamed: dict[str, str]
    clone: dict[str, str]
    restored_disk: Path


def _disk(folder: Path, name: str, size_bytes: int) -> Path:
    path = folder / f"{name}.disk"
    path.touch()
    os.truncate(path, size_bytes)
    return path


@pytest.fixture(scope="module")
def history(folder: Path, public_key: str) -> History:
    """Create two instances and boot them; then rename, clone and restore the first; boot those."""
    node = Node(folder)
    script = folder / "user-data"
    script.write_text(user_data())
    original, mbr = _disk(folder, "original", 3 * GIB), _disk(folder, "mbr", 3 * GIB)
    for disk, instance, layout in ((original, ORIGINAL, "gpt"), (mbr, MBR, "mbr")):
        parameters = {
            "OSP_IMAGE": str(build_image(folder, layout)),
            "OSP_SSH_KEYS": public_key,
            "OSP_USER_DATA": f"@{script}",
            "OSP_DNS_SERVERS": "192.0.2.53",
            "OSP_DNS_SEARCH": "example.com",
        }
        node.call("create", disk, instance, parameters)
    original_report, mbr_report = boot((original, ORIGINAL), (mbr, MBR))

    clone, restored = _disk(folder, "clone", 5 * GIB), _disk(folder, "restored", 3 * GIB)
    for disk, instance in ((clone, CLONE), (restored, RESTORED), (original, RENAMED)):
        if disk != original:
            node.copy(original, disk)
        settings = {"OLD_INSTANCE_NAME": ORIGINAL.name, "OSP_DNS_SERVERS": "192.0.2.54"}
        node.call("rename", disk, instance, settings)
    os.truncate(original, 4 * GIB)  # what gnt-instance grow-disk does to a file
    renamed_report, clone_report = boot((original, RENAMED), (clone, CLONE))
    return History(original_report, mbr_report, renamed_report, clone_report, restored)


def has_identity(report: dict[str, str], instance: Instance, dns: str) -> None:
    assert '"errors":[]' in report["result"]
    assert report["name"] == instance.name.partition(".")[0]
    assert report["address"] == f"{instance.ip}/24"
    assert report["route"].startswith("default via 10.77.0.1 dev eth0")
    assert report["dns"].split()[-1] == dns


def fills(report: dict[str, str], disk_bytes: int, before_bytes: int) -> None:
    """The root file system takes all of the disk that is not before it, but for its own tables."""
    room = disk_bytes - before_bytes
    assert 0.95 * room < int(report["root"]) < room


@pytest.mark.parametrize(
    ("which", "instance", "before_bytes"),
    [("original", ORIGINAL, 128 << 20), ("mbr", MBR, 1 << 20)],
    ids=["gpt", "mbr"],
)
def test_first_boot(
    history: History, public_key: str, which: str, instance: Instance, before_bytes: int
) -> None:
    report = getattr(history, which)
    has_identity(report, instance, "192.0.2.53")
    assert report["search"].split()[-1] == "example.com"
    assert report["keys"] == public_key
    assert report["user data ran"] == "once an instance"
    fills(report, 3 * GIB, before_bytes)


def test_rename_and_grow(history: History) -> None:
    report = history.renamed
    has_identity(report, RENAMED, "192.0.2.54")
    for same in ("host keys", "machine-id", "keys", "user data ran"):
        assert report[same] == history.original[same], same
    fills(report, 4 * GIB, 128 << 20)


def test_clone(history: History) -> None:
    report, original = history.clone, history.original
    has_identity(report, CLONE, "192.0.2.54")
    for own in ("host keys", "machine-id"):
        assert len(report[own]) > 30
        assert report[own] != original[own], own
    assert report["keys"] == original["keys"]
    assert report["user data ran"] == "once an instance once an instance"
    fills(report, 5 * GIB, 128 << 20)


def test_restore_keeps_the_instance_id(history: History, folder: Path) -> None:
    volume = f"{history.restored_disk}@@32768"
    data = subprocess.run(
        ["mcopy", "-i", volume, "::/meta-data", "-"], check=True, stdout=subprocess.PIPE
    ).stdout
    meta = json.loads(data)
    assert meta["instance-id"] == ORIGINAL.uuid
    assert meta["local-hostname"] == RESTORED.name
    assert meta["ganeti"]["uuid"] == RESTORED.uuid
