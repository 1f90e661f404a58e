"""rename as Ganeti runs it: the seed is found, changed or left alone, and read back with mtools."""

from __future__ import annotations

import base64
import email
import gzip
import json
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest

from tests.images import MIB, disk_image
from tests.scripts.conftest import GAP, UUID, Door, Result, seed_files

Disks = list[Path]
OTHER_UUID = "11111111-2222-4333-8444-555555555555"
USER_DATA = b"#!/bin/sh\nprintf '\xc3\xa9\x00\xff'\n"
VENDOR_DATA = b"#cloud-config\npackages: [vim]  # the user's\n"
OLD = {"INSTANCE_NAME": "vm1.example.com", "INSTANCE_UUID": UUID}
NEW = {
    "INSTANCE_NAME": "vm2.example.com",
    "OLD_INSTANCE_NAME": "vm1.example.com",
    "NIC_0_MAC": "AA:00:00:12:34:02",
    "NIC_0_IP": "192.0.2.2",
    "NIC_0_NETWORK_SUBNET": "192.0.2.0/24",
    "NIC_0_NETWORK_GATEWAY": "192.0.2.1",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    disk_image(folder / "gpt", size_mib=12)
    disk_image(folder / "mbr", "mbr", 12)
    drive = disk_image(folder / "config-drive", size_mib=12)
    # the first partition, 1 MiB like that of FreeBSD's images
    subprocess.run(["sgdisk", "--change-name=14:config-drive", drive], check=True)
    return folder


def created(door: Door, disk: Callable[..., Path], image: Path, **more: str) -> Disks:
    """Create an instance; its seed is on the last of the returned disks."""
    disks = [disk(20), *([disk(4, "disk1")] if "DISK_1_NAME" in more else [])]
    parameters = {
        "OSP_IMAGE": str(image),
        "OSP_USER_DATA": "base64:" + base64.b64encode(USER_DATA).decode(),
        "OSP_VENDOR_DATA": "base64:" + base64.b64encode(VENDOR_DATA).decode(),
        **more,
    }
    result = door("create", disks=disks, **parameters)
    assert result.status == 0, result.log
    return disks


def rename(door: Door, disks: Disks, variables: dict[str, str], **more: str) -> Result:
    return door("rename", disks=disks, **{**variables, **more})


def seed_extent(disk: Path) -> tuple[int, int]:
    """Return where sfdisk sees the seed's partition, in bytes; the whole of a disk without one."""
    listed = subprocess.run(["sfdisk", "--json", disk], check=True, capture_output=True)
    table = json.loads(listed.stdout)["partitiontable"]
    for row in table.get("partitions", []):
        if row.get("name") in ("cidata", "config-drive") or row["type"] == "6":
            return row["start"] * 512, row["size"] * 512
    return 0, disk.stat().st_size


def files_on(disks: Disks) -> dict[str, bytes]:
    return seed_files(disks[-1], seed_extent(disks[-1])[0])


def meta_data(disks: Disks) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files_on(disks)["meta-data"])
    return found


def leaves(vendor_data: bytes) -> list[bytes]:
    """Return the documents in a MIME archive, as cloud-init takes it apart."""
    parts = email.message_from_bytes(vendor_data).walk()
    found = [part.get_payload(decode=True) for part in parts if not part.is_multipart()]
    return [text for text in found if isinstance(text, bytes)]


def content(disks: Disks) -> list[bytes]:
    return [path.read_bytes() for path in disks]


def without_seed(disks: Disks) -> list[bytes]:
    """Return what the disks hold beside the seed."""
    *others, last = content(disks)
    offset, size = seed_extent(disks[-1])
    return [*others, last[:offset], last[offset + size :]]


PLACES: dict[str, tuple[str, dict[str, str]]] = {
    "gap": ("gpt", {}),
    "gap of an MBR": ("mbr", {}),
    "tail": ("gpt", {"OSP_SEED": "tail"}),
    "tail of an MBR": ("mbr", {"OSP_SEED": "tail"}),
    "a disk of its own": ("gpt", {"DISK_1_NAME": "cidata"}),
    "config-drive": ("config-drive", {}),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place(door: Door, disk: Callable[..., Path], images: Path, place: str) -> None:
    image, more = PLACES[place]
    disks = created(door, disk, images / image, **more)
    before, others, old_files = content(disks), without_seed(disks), files_on(disks)
    result = rename(door, disks, NEW, **more)
    assert result.status == 0, result.log
    assert result.log == "rename: the guest will be vm2.example.com at its next boot\n"
    files = files_on(disks)
    meta = json.loads(files["meta-data"])
    assert (meta["instance-id"], meta["local-hostname"]) == (UUID, "vm2.example.com")
    (nic,) = json.loads(files["network-config"])["config"]
    assert nic["mac_address"] == "aa:00:00:12:34:02"
    assert nic["subnets"][0]["address"] == "192.0.2.2/24"
    assert files["user-data"] == USER_DATA
    assert files["vendor-data"] == old_files["vendor-data"]
    assert without_seed(disks) == others
    result = rename(door, disks, OLD, **more)
    assert result.status == 0, result.log
    assert content(disks) == before


def test_a_clone_gets_an_identity(door: Door, disk: Callable[..., Path], images: Path) -> None:
    disks = created(door, disk, images / "gpt")
    clone = {**NEW, "INSTANCE_UUID": OTHER_UUID}
    assert rename(door, disks, clone).status == 0
    files, meta = files_on(disks), meta_data(disks)
    assert (meta["instance-id"], meta["local-hostname"]) == (OTHER_UUID, "vm2.example.com")
    assert files["user-data"] == USER_DATA
    assert VENDOR_DATA in leaves(files["vendor-data"])
    assert b"/etc/machine-id" in leaves(files["vendor-data"])[0]
    # a second call changes nothing, and a rename of the clone keeps who it is
    before = content(disks)
    assert rename(door, disks, clone).status == 0
    assert content(disks) == before
    assert rename(door, disks, {**clone, "INSTANCE_NAME": "vm3.example.com"}).status == 0
    assert meta_data(disks)["instance-id"] == OTHER_UUID
    assert files_on(disks)["vendor-data"] == files["vendor-data"]


def test_a_restored_instance_stays_who_it_is(
    door: Door, disk: Callable[..., Path], images: Path
) -> None:
    disks = created(door, disk, images / "gpt")
    old_files = files_on(disks)
    restored = {**OLD, "INSTANCE_UUID": OTHER_UUID}
    assert rename(door, disks, restored).status == 0
    meta = meta_data(disks)
    assert (meta["instance-id"], meta["local-hostname"]) == (UUID, "vm1.example.com")
    for name in ("user-data", "vendor-data", "network-config"):
        assert files_on(disks)[name] == old_files[name]
    # it is remembered as the same instance: a later rename is no clone
    assert rename(door, disks, {**NEW, "INSTANCE_UUID": OTHER_UUID}).status == 0
    meta = meta_data(disks)
    assert (meta["instance-id"], meta["local-hostname"]) == (UUID, "vm2.example.com")


def test_a_clone_with_compressed_vendor_data(
    door: Door, disk: Callable[..., Path], images: Path
) -> None:
    packed = base64.b64encode(gzip.compress(VENDOR_DATA)).decode()
    disks = created(door, disk, images / "gpt", OSP_VENDOR_DATA=f"base64:{packed}")
    assert rename(door, disks, {**NEW, "INSTANCE_UUID": OTHER_UUID}).status == 0
    unpacked = leaves(gzip.decompress(files_on(disks)["vendor-data"]))
    assert VENDOR_DATA in unpacked
    assert b"/etc/machine-id" in unpacked[0]


def test_files_of_hooks_stay(door: Door, disk: Callable[..., Path], images: Path) -> None:
    folder = door.confdir / "hooks.d/pre"
    folder.mkdir(parents=True)
    (folder / "more").write_text('#!/bin/sh\necho hello > "$CLOUDIMAGE_SEED_DIR/extra"\n')
    (folder / "more").chmod(0o755)
    disks = created(door, disk, images / "gpt")
    assert rename(door, disks, NEW).status == 0
    assert files_on(disks)["extra"] == b"hello\n"


def test_texts_that_are_gone_do_not_matter(
    door: Door, disk: Callable[..., Path], images: Path
) -> None:
    """The instance's OS parameters may name what was there when it was made."""
    disks = created(door, disk, images / "gpt")
    gone = {
        "OSP_IMAGE": "/gone/image",
        "OSP_SSH_KEYS": "@/gone/keys",
        "OSP_USER_DATA": "http://127.0.0.1:1/user-data",
        "OSP_VENDOR_DATA": "@/gone/vendor-data",
    }
    result = rename(door, disks, NEW, **gone)
    assert (result.status, result.error) == (
        0,
        "rename: the guest will be vm2.example.com at its next boot",
    )
    assert files_on(disks)["user-data"] == USER_DATA


@pytest.mark.parametrize(("value", "config"), [("none", "disabled"), ("dhcp", None)])
def test_the_network_parameter_counts(
    door: Door, disk: Callable[..., Path], images: Path, value: str, config: Optional[str]
) -> None:
    disks = created(door, disk, images / "gpt")
    assert rename(door, disks, NEW, OSP_NETWORK=value).status == 0
    found = json.loads(files_on(disks)["network-config"])["config"]
    assert found == config if config else found[0]["subnets"] == [{"type": "dhcp"}]


def test_a_seed_disk_without_its_name(door: Door, disk: Callable[..., Path], images: Path) -> None:
    """gnt-backup import --disk 1:size=4m forgets it."""
    disks = created(door, disk, images / "gpt", DISK_1_NAME="cidata")
    assert rename(door, disks, NEW).status == 0
    assert meta_data(disks)["local-hostname"] == "vm2.example.com"


def test_a_disk_that_only_has_the_name(door: Door, disk: Callable[..., Path], images: Path) -> None:
    disks = created(door, disk, images / "gpt")
    other = disk(4, "other")
    result = rename(door, [*disks, other], NEW, DISK_1_NAME="cidata")
    assert result.status == 0, result.log
    assert meta_data(disks)["local-hostname"] == "vm2.example.com"
    assert other.stat().st_blocks == 0


def test_no_disk(door: Door) -> None:
    result = rename(door, [], NEW)
    assert result.status == 0, result.log
    assert result.error.startswith("WARNING: vm2.example.com: its disks hold no seed")


# --- seeds that are not there, or not ours ---------------------------------------------------


def test_no_seed(door: Door, disk: Callable[..., Path], images: Path) -> None:
    disks = created(door, disk, images / "gpt", OSP_SEED="none")
    before = content(disks)
    result = rename(door, disks, NEW)
    assert (result.status, result.log) == (
        0,
        "WARNING: vm2.example.com: its disks hold no seed, so the guest keeps its name and"
        " addresses\n",
    )
    assert content(disks) == before


def on_volume(offset: int, change: Callable[[bytearray], None]) -> Callable[[Path], None]:
    """Return what damages the bytes of the seed's volume, which is a MiB at most."""

    def damage(disk: Path) -> None:
        data = bytearray(disk.read_bytes())
        volume = data[offset:MIB]
        change(volume)
        data[offset:MIB] = volume
        disk.write_bytes(data)

    return damage


def noise_behind_the_first_sector(volume: bytearray) -> None:
    volume[512:] = random.Random(1).randbytes(len(volume) - 512)


def no_root_directory(volume: bytearray) -> None:
    (sectors,) = struct.unpack_from("<H", volume, 22)
    root = 512 * (1 + 2 * sectors)
    volume[root : root + 32 * 512] = bytes(32 * 512)


def clusters_in_a_circle(volume: bytearray) -> None:
    """Every cluster is followed by cluster 2 (FAT12: three bytes for two entries)."""
    (sectors,) = struct.unpack_from("<H", volume, 22)
    volume[512 : 512 + 2 * sectors * 512] = b"\x02\x20\x00" * (2 * sectors * 512 // 3)


def larger_than_its_place(volume: bytearray) -> None:
    struct.pack_into("<H", volume, 19, 0)
    struct.pack_into("<L", volume, 32, 0xFFFFFFFF)


def absurd_geometry(volume: bytearray) -> None:
    struct.pack_into("<HBHBHH", volume, 11, 0, 0, 0xFFFF, 0xFF, 0xFFFF, 0)


def by_mtools(*argv: str, text: bytes = b"") -> Callable[[Path], None]:
    """Return what changes the files of the seed."""

    def change(disk: Path) -> None:
        words = [argv[0], "-i", f"{disk}@@{GAP}", *argv[1:]]
        subprocess.run(words, input=text, check=True)

    return change


YAML = b"instance-id: i-1\nlocal-hostname: mine\n"
NOT_OURS: dict[str, tuple[Callable[[Path], None], str]] = {
    "noise": (on_volume(GAP, noise_behind_the_first_sector), "the seed cannot be read: "),
    "no directory": (on_volume(GAP, no_root_directory), "it holds no meta-data"),
    "a circle": (on_volume(GAP, clusters_in_a_circle), "the seed"),
    "too large": (on_volume(GAP, larger_than_its_place), "the seed"),
    "absurd": (on_volume(GAP, absurd_geometry), "the seed cannot be read: "),
    "a file less": (by_mtools("mdel", "::/user-data"), "it holds no user-data"),
    "YAML by hand": (
        by_mtools("mcopy", "-o", "-", "::/meta-data", text=YAML),
        "the seed's meta-data is none that cloudimage wrote; set instance-id, local-hostname and"
        " the addresses in it by hand; the guest keeps",
    ),
    "JSON that is no mapping": (
        by_mtools("mcopy", "-o", "-", "::/meta-data", text=b"[1, 2]"),
        "the seed's meta-data is none that cloudimage wrote",
    ),
    "too deep": (
        by_mtools("mcopy", "-o", "-", "::/meta-data", text=b"[" * 100_000),
        "the seed's meta-data is none that cloudimage wrote",
    ),
}


@pytest.mark.parametrize("case", NOT_OURS)
def test_a_seed_that_is_not_ours(
    door: Door, disk: Callable[..., Path], images: Path, case: str
) -> None:
    damage, words = NOT_OURS[case]
    disks = created(door, disk, images / "gpt")
    damage(disks[0])
    before = content(disks)
    result = rename(door, disks, NEW)
    assert result.status == 0, result.log
    assert result.error.startswith("WARNING: vm2.example.com: "), result.log
    assert words in result.error
    assert result.error.endswith("; the guest keeps its name and addresses")
    assert content(disks) == before


def test_a_damaged_table(door: Door, disk: Callable[..., Path], images: Path) -> None:
    disks = created(door, disk, images / "gpt")
    with disks[0].open("r+b") as file:
        file.seek(512 + 40)  # the first usable sector
        file.write(b"\xff" * 8)
    before = content(disks)
    result = rename(door, disks, NEW)
    assert result.status == 0, result.log
    first, last = result.log.splitlines()
    assert first.startswith("WARNING: looking for the seed: ")
    assert last.startswith("WARNING: vm2.example.com: its disks hold no seed")
    assert content(disks) == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"INSTANCE_UUID": ""}, "INSTANCE_UUID is not set"),
        ({"NIC_0_IP": "192.0.3.1"}, "NIC_0_IP=192.0.3.1 is outside NIC_0_NETWORK_SUBNET"),
        ({"DISK_0_PATH": "/nonexistent"}, "/nonexistent: no such disk"),
    ],
)
def test_bad_variables(
    door: Door, disk: Callable[..., Path], images: Path, more: dict[str, str], words: str
) -> None:
    disks = created(door, disk, images / "gpt")
    before = content(disks)
    result = rename(door, disks, NEW, **more)
    assert result.status == 1
    assert result.error.startswith("ERROR: ")
    assert words in result.error
    assert content(disks) == before
