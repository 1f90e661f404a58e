"""The partition table: made by real tools, planned, applied to a copy, judged by real tools."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.disk import partition
from lib.disk.partition import Extent, Plan
from lib.errors import Error
from tests.conftest import require

MIB = 1 << 20
IMAGE_MIB = 64
LINUX, BIOS, ESP = (
    "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
    "21686148-6449-6E6F-744E-656564454649",
    "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
)
WAY_OUT = "; add a second disk, --disk 1:size=4m,name=cidata, or set seed=none"


def call(*argv: object, stdin: str = "") -> str:
    """Run a tool to its end; return all that it printed."""
    done = subprocess.run(
        [os.fspath(a) if isinstance(a, Path) else str(a) for a in argv],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, (argv, done.stdout)
    return done.stdout


QUICK = ("--quiet", "--no-reread", "--no-tell-kernel")


def sfdisk(*lines: str) -> Callable[[Path], object]:
    """Return what makes a table with sfdisk."""
    script = "\n".join(lines) + "\n"
    return lambda path: call("sfdisk", *QUICK, path, stdin=script)


def sgdisk(*options: str) -> Callable[[Path], object]:
    return lambda path: call("sgdisk", *options, path)


def parted(*commands: str) -> Callable[[Path], object]:
    return lambda path: call("parted", "--script", path, *" ".join(commands).split())


# how the vendors make their tables: a name, its maker, the root's number
LAYOUTS: dict[str, tuple[Callable[[Path], object], int]] = {
    "debian": (
        sfdisk(
            "label: gpt",
            f"14: start=2048, size=6144, type={BIOS}",
            f"15: start=8192, size=20480, type={ESP}",
            f"1: start=28672, size=100352, type={LINUX}",
        ),
        1,
    ),
    "ubuntu": (
        sfdisk(
            "label: gpt",
            f"14: start=2048, size=8192, type={BIOS}",
            f"15: start=10240, size=20480, type={ESP}",
            f"16: start=30720, size=20480, type={LINUX}, name=BOOT",
            f"1: start=51200, type={LINUX}",
        ),
        1,
    ),
    "rocky": (
        parted(
            "mklabel gpt mkpart esp fat16 1MiB 11MiB mkpart boot 11MiB 21MiB",
            "mkpart prep 21MiB 25MiB mkpart bios 25MiB 26MiB mkpart root 26MiB 100%",
            "set 4 bios_grub on",
        ),
        5,
    ),
    "archlinux": (
        sgdisk(
            *("--align-end", "--clear", "--new=1:0:+1M", "--typecode=1:ef02"),
            *("--new=2:0:+10M", "--typecode=2:ef00", "--new=3:0:0", "--attributes=1:set:2"),
        ),
        3,
    ),
    "alpine-uefi": (
        parted("mklabel gpt mkpart esp fat16 512KiB 1MiB mkpart root 1MiB 100% set 1 esp on"),
        2,
    ),
    "amazon": (
        sgdisk("-n128:2048:+1M", "-t128:ef00", "-n127:0:+1M", "-t127:ef02", "-n1:0:0", "-c1:Linux"),
        1,
    ),
    "hybrid": (sgdisk("-n1:2048:+10M", "-t1:ef00", "-n2:0:0", "-h1:2"), 2),
    "12-entries": (
        sfdisk("label: gpt", "table-length: 12", f"2: start=2048, type={LINUX}"),
        2,
    ),
    "odd-entries": (
        sfdisk(
            "label: gpt",
            f'3: start=2048, size=2048, type={LINUX}, name="a, b=\\\\x41 \u00e9\u4e2d\U0001f600"',
            f'7: start=4096, size=2048, type={LINUX}, name=" ", attrs="RequiredPartition GUID:63"',
            f"9: start=6144, type={LINUX}, attrs=LegacyBIOSBootable",
        ),
        9,
    ),
    "mbr": (sfdisk("label: dos", "start=2048, type=83, bootable"), 1),
    "mbr-3": (
        sfdisk(
            "label: dos",
            "start=2048, size=20480, type=c",
            "start=22528, size=20480, type=82",
            "start=43008, type=83, bootable",
        ),
        3,
    ),
    "mbr-extended": (
        sfdisk(
            "label: dos",
            "2: start=2048, size=20480, type=83",
            "3: start=22528, size=40960, type=5",
            "5: start=24576, size=8192, type=83",
            "6: start=34816, size=8192, type=83",
            "1: start=65536, type=83",
        ),
        1,
    ),
}
PMBR_SIZE = range(458, 462)  # where the protective MBR says how large the disk is
MBRS = [name for name in LAYOUTS if name.startswith("mbr")]


MADE: dict[tuple[object, int], Path] = {}


def make(path: Path, maker: Callable[[Path], object], size_bytes: int = IMAGE_MIB * MIB) -> Path:
    """Make an image with boot code, a table and something in its root; each kind only once."""
    require("sfdisk", "sgdisk", "parted")
    if (maker, size_bytes) not in MADE:
        made = path.parent.parent / f"made-{len(MADE)}"
        made.touch()
        os.truncate(made, size_bytes)
        maker(made)
        put(made, 0, bytes(range(256)) + b"boot code" * 20)
        put(made, 50 * MIB, b"root" * 1000)
        MADE[maker, size_bytes] = made
    call("cp", "--sparse=always", MADE[maker, size_bytes], path)
    return path


def reader(path: Path) -> partition.Read:
    def read(offset: int, length: int) -> bytes:
        assert length > 0
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        assert len(data) == length, "read behind the end"
        return data

    return read


def plan(image: Path, disk_size: int, seed: str) -> Plan:
    return partition.plan(reader(image), image.stat().st_size, disk_size, seed)


def apply(image: Path, disk: Path, disk_size: int, planned: Plan) -> bytes:
    """Make the disk as create does; return the seed's bytes."""
    call("cp", "--sparse=always", image, disk)
    content = b""
    with disk.open("r+b") as file:
        file.truncate(disk_size)
        for offset, data in planned.writes:
            assert offset + len(data) <= disk_size
            file.seek(offset)
            file.write(data)
        if planned.seed is not None:
            content = bytes(range(1, 256)) * (planned.seed.size_bytes // 255 + 1)
            content = content[: planned.seed.size_bytes]
            file.seek(planned.seed.offset_bytes)
            file.write(content)
    return content


def listed(path: Path) -> dict[int, dict[str, Any]]:
    """Return the partitions by number as sfdisk sees them."""
    table = json.loads(subprocess.run(["sfdisk", "--json", path], capture_output=True).stdout)
    rows = table["partitiontable"].get("partitions", [])
    return {int(row.pop("node")[len(str(path)) :]): row for row in rows}


def judge(disk: Path) -> None:
    """Let three tools say that the table is whole."""
    assert "No errors detected" in call("sfdisk", "--verify", disk)
    shown = call("parted", "--script", disk, "unit", "s", "print")
    assert "Warning" not in shown and "Error" not in shown, shown
    if "Partition Table: gpt" in shown:
        assert "No problems found" in call("sgdisk", "--verify", disk)


def added(image: Path, disk: Path, planned: Plan) -> int:
    """Return the number of the one new partition, the seed's; the others are as they were."""
    before, after = listed(image), listed(disk)
    assert {number: after[number] for number in before} == before
    (number,) = set(after) - set(before)
    row = after[number]
    assert planned.seed is not None
    assert row["start"] * 512 == planned.seed.offset_bytes
    assert row["size"] * 512 == planned.seed.size_bytes
    return number


def changed(image: Path, disk: Path) -> set[int]:
    """Return which bytes of sector 0 are not the image's."""
    before, after = reader(image)(0, 512), reader(disk)(0, 512)
    return {at for at in range(512) if before[at] != after[at]}


def end_of(disk: Path, number: int) -> int:
    row = listed(disk)[number]
    return int(row["start"] + row["size"]) * 512


@contextmanager
def gpt(image: Path) -> Iterator[memoryview]:
    """Hand out the first 34 sectors for changes, then make the first copy's checksums right."""
    with image.open("r+b") as file:
        table = bytearray(file.read(34 * 512))
        yield memoryview(table)
        lba, slots, size = struct.unpack_from("<QII", table, 512 + 72)
        if lba == 2 and slots * size <= 16384:
            struct.pack_into("<I", table, 512 + 88, zlib.crc32(table[1024:][: slots * size]))
        struct.pack_into("<I", table, 512 + 16, 0)
        struct.pack_into("<I", table, 512 + 16, zlib.crc32(table[512:604]))
        file.seek(0)
        file.write(table)


def entry(table: memoryview, number: int) -> memoryview:
    return table[1024 + 128 * (number - 1) :][:128]


def put(image: Path, offset: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gap_before_the_first_partition_leaves_root_free_to_grow(
    tmp_path: Path, layout: str
) -> None:
    require("growpart")
    maker, root = LAYOUTS[layout]
    image, disk = make(tmp_path / "image", maker), tmp_path / "disk"
    before = listed(image)
    planned = plan(image, 100 * MIB, "auto")
    content = apply(image, disk, 100 * MIB, planned)
    judge(disk)
    number, places = added(image, disk, planned), PMBR_SIZE
    if layout in MBRS:
        places = range(430 + 16 * number, 446 + 16 * number)
        assert listed(disk)[number] == {"start": 1024, "size": 1024, "type": "6"}
    else:
        row = listed(disk)[number]
        assert row.pop("uuid")
        size = (1024 if layout == "alpine-uefi" else 2048) - 64
        basic_data = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
        assert row == {"start": 64, "size": size, "type": basic_data, "name": "cidata"}
    assert number == min(set(range(1, 130)) - set(before))
    assert changed(image, disk) - set(places) == set()

    call("growpart", disk, root)
    judge(disk)
    assert end_of(disk, root) >= 99 * MIB
    assert planned.seed is not None and planned.seed.kind == "gap"
    assert reader(disk)(planned.seed.offset_bytes, planned.seed.size_bytes) == content


@pytest.mark.parametrize("layout", ["debian", "12-entries", "odd-entries", "mbr-extended"])
def test_a_tail_lies_behind_the_image(tmp_path: Path, layout: str) -> None:
    require("growpart")
    maker, root = LAYOUTS[layout]
    image, disk = make(tmp_path / "image", maker), tmp_path / "disk"
    planned = plan(image, 100 * MIB, "tail")
    content = apply(image, disk, 100 * MIB, planned)
    judge(disk)
    # a GPT needs room behind it
    offset = (96 if layout in MBRS else 95) * MIB
    assert planned.seed == Extent(offset, 4 * MIB, "tail")
    assert listed(disk)[added(image, disk, planned)]["start"] * 512 == offset
    call("growpart", disk, root)
    assert offset - MIB < end_of(disk, root) <= offset
    assert reader(disk)(offset, 4 * MIB) == content


@pytest.mark.parametrize("layout", ["debian", "hybrid", "12-entries", "mbr"])
def test_without_a_seed_the_table_is_only_spread(tmp_path: Path, layout: str) -> None:
    image, disk = make(tmp_path / "image", LAYOUTS[layout][0]), tmp_path / "disk"
    planned = plan(image, 100 * MIB, "none")
    apply(image, disk, 100 * MIB, planned)
    judge(disk)
    assert planned.seed is None and listed(disk) == listed(image)
    assert changed(image, disk) == (
        set() if layout in MBRS else changed(image, disk) & {*PMBR_SIZE}
    )
    assert bool(planned.writes) == (layout not in MBRS)


@pytest.mark.parametrize("seed", ["gap", "none"])
@pytest.mark.parametrize("more", [0, 1, 511, 512, 1000, 32 * 512, 33 * 512, 34 * 512, 64 * 512 + 1])
def test_the_disk_may_be_larger_by_any_number_of_bytes(
    tmp_path: Path, more: int, seed: str
) -> None:
    image, disk = make(tmp_path / "image", LAYOUTS["debian"][0]), tmp_path / "disk"
    size = IMAGE_MIB * MIB + more
    planned = plan(image, size, seed)
    apply(image, disk, size, planned)
    judge(disk)
    assert reader(disk)(size // 512 * 512 - 512, 8) == b"EFI PART"
    if more < 512 and seed == "none":
        assert planned.writes == ()


@pytest.mark.parametrize("layout", ["debian", "mbr"])
def test_a_disk_that_the_image_fills_has_a_gap_too(tmp_path: Path, layout: str) -> None:
    image, disk = make(tmp_path / "image", LAYOUTS[layout][0], 64 * MIB + 300), tmp_path / "disk"
    planned = plan(image, 64 * MIB + 300, "auto")
    apply(image, disk, 64 * MIB + 300, planned)
    judge(disk)
    assert planned.seed is not None and planned.seed.kind == "gap"


def test_the_disk_may_be_of_many_terabytes(tmp_path: Path) -> None:
    image = make(tmp_path / "image", LAYOUTS["debian"][0])
    planned = plan(image, 8 << 40, "tail")
    assert planned.seed == Extent((8 << 40) - 5 * MIB, 4 * MIB, "tail")
    assert max(offset + len(data) for offset, data in planned.writes) == 8 << 40
    image = make(tmp_path / "image", LAYOUTS["mbr"][0])
    # the last of the 2 TiB that an MBR can address is left free: sfdisk 2.41 has no use for it
    assert plan(image, 8 << 40, "tail").seed == Extent((2 << 40) - 5 * MIB, 4 * MIB, "tail")


def test_the_second_copy_leaves_the_image_s_old_end(tmp_path: Path) -> None:
    image, disk = make(tmp_path / "image", LAYOUTS["debian"][0]), tmp_path / "disk"
    apply(image, disk, 100 * MIB, plan(image, 100 * MIB, "none"))
    assert reader(image)(64 * MIB - 512, 8) == b"EFI PART"
    assert reader(disk)(64 * MIB - 33 * 512, 33 * 512).strip(b"\0") == b""


def test_reserved_attributes_malformed_names_and_old_entries_survive(tmp_path: Path) -> None:
    image, disk = make(tmp_path / "image", LAYOUTS["debian"][0]), tmp_path / "disk"
    with gpt(image) as table:
        entry(table, 1)[48:] = struct.pack("<Q", 1 << 40 | 1 << 3) + b"\0\xd8\xff\xff\n\0" * 12
        entry(table, 15)[48:] = struct.pack("<Q", (1 << 64) - 1) + b'"\0\\\0' * 18
        # deleted by its type alone: not for sfdisk
        entry(table, 2)[16:] = bytes(range(112))
    apply(image, disk, 100 * MIB, plan(image, 100 * MIB, "gap"))
    before, after = reader(image)(1024, 16384), reader(disk)(1024, 16384)
    assert before[:256] == after[:256] and before[384:] == after[384:]


# Places that the image has


@pytest.mark.parametrize("seed", ["auto", "gap", "tail"])
def test_a_seed_partition_of_ours_is_used_again(tmp_path: Path, seed: str) -> None:
    image, disk = make(tmp_path / "image", LAYOUTS["debian"][0]), tmp_path / "disk"
    first = plan(image, 100 * MIB, "gap")
    apply(image, disk, 100 * MIB, first)
    again = plan(disk, 100 * MIB, seed)
    assert again == Plan((), Extent(64 * 512, 1984 * 512, "cidata"))
    assert plan(disk, 200 * MIB, seed).seed == again.seed


def test_an_mbr_s_seed_partition_is_used_again_if_there_is_a_seed_in_it(tmp_path: Path) -> None:
    image, disk = make(tmp_path / "image", LAYOUTS["mbr"][0]), tmp_path / "disk"
    apply(image, disk, 100 * MIB, plan(image, 100 * MIB, "gap"))
    assert plan(disk, 104 * MIB, "tail").seed == Extent(100 * MIB, 4 * MIB, "tail")
    put(disk, 1024 * 512, fat(tmp_path / "fat", 512).read_bytes())
    assert plan(disk, 100 * MIB, "tail") == Plan((), Extent(1024 * 512, 512 << 10, "cidata"))


# as mkimg packs it: five entries, partitions right behind them, no alignment
FREEBSD = sfdisk(
    *("label: gpt", "table-length: 5", "first-lba: 4", "grain: 512"),
    f"1: start=4, size=250, type={BIOS}, name=bootfs",
    f"2: start=254, size=20480, type={ESP}, name=efiesp",
    f"3: start=20734, size=4096, type={LINUX}, name=swapfs",
    f"4: start=24830, size=2048, type={LINUX}, name=config-drive",
    f"5: start=26878, type={LINUX}, name=rootfs",
)


def test_freebsd_s_config_drive_is_the_place(tmp_path: Path) -> None:
    require("growpart")
    image, disk = make(tmp_path / "image", FREEBSD), tmp_path / "disk"
    planned = plan(image, 100 * MIB, "auto")
    row = listed(image)[4]
    assert planned.seed == Extent(row["start"] * 512, row["size"] * 512, "config-drive")
    assert row["size"] == 2048
    content = apply(image, disk, 100 * MIB, planned)
    judge(disk)
    assert listed(disk) == listed(image)
    call("growpart", disk, 5)
    assert end_of(disk, 5) >= 99 * MIB
    assert reader(disk)(planned.seed.offset_bytes, MIB) == content
    with pytest.raises(Error, match="tail: no entry of the table is free"):
        plan(image, 100 * MIB, "tail")


# No place


@pytest.mark.parametrize(
    ("layout", "seed", "size_mib", "message"),
    [
        (
            "mbr-4",
            "auto",
            100,
            "no room for a seed: gap: no entry of the table is free; tail: no entry of the table "
            "is free (MBR, partitions in sectors 2048 to 131071; image 64 MiB, "
            "disk 100 MiB)",
        ),
        (
            "packed",
            "gap",
            100,
            "no room for a seed: gap: no 256 KiB between sector 64 and the first partition at 34 "
            "(GPT, partitions in sectors 34 to 131038; image 64 MiB, disk 100 MiB)",
        ),
        (
            "full-gap",
            "auto",
            68,
            "no room for a seed: gap: sectors 64 to 2047 are not empty; tail: the disk is too "
            "little larger than the image for 4 MiB, aligned (GPT, partitions in sectors 2048 to "
            "129023; image 64 MiB, disk 68 MiB)",
        ),
        (
            "full-mbr-gap",
            "gap",
            68,
            "no room for a seed: gap: sectors 1024 to 2047 are not empty (MBR, partitions in "
            "sectors 2048 to 131071; image 64 MiB, disk 68 MiB)",
        ),
        (
            "empty-gpt",
            "tail",
            64,
            "no room for a seed: tail: the disk is too little larger than the image for 4 MiB, "
            "aligned (GPT without partitions; image 64 MiB, disk 64 MiB)",
        ),
        (
            "none",
            "auto",
            100,
            "no room for a seed: the image has no partition table (image 64 MiB, disk 100 MiB)",
        ),
    ],
)
def test_no_room_says_why_and_the_way_out(
    tmp_path: Path, layout: str, seed: str, size_mib: int, message: str
) -> None:
    makers: dict[str, Callable[[Path], object]] = {
        "mbr-4": sfdisk("label: dos", *["size=20480"] * 3, "type=83"),
        "packed": sgdisk("--set-alignment=1", "--new=1:34:0"),
        "full-gap": LAYOUTS["debian"][0],
        "full-mbr-gap": LAYOUTS["mbr"][0],
        "empty-gpt": sfdisk("label: gpt"),
        "none": lambda path: None,
    }
    image = make(tmp_path / "image", makers[layout])
    if layout.startswith("full"):
        put(image, 2047 * 512 + 511, b"x")
    with pytest.raises(Error) as caught:
        plan(image, size_mib * MIB, seed)
    assert str(caught.value) == message + WAY_OUT
    assert plan(image, size_mib * MIB, "none").seed is None


@pytest.mark.parametrize("layout", ["debian", "mbr"])
def test_a_table_that_reaches_behind_the_disk_is_refused(tmp_path: Path, layout: str) -> None:
    image = make(tmp_path / "image", LAYOUTS[layout][0])
    os.truncate(image, 60 * MIB)
    last, room = (129023, 122846) if layout == "debian" else (131071, 122879)
    with pytest.raises(Error) as caught:
        plan(image, 60 * MIB, "none")
    assert str(caught.value) == (
        f"partition 1 of the image ends at sector {last}, on the disk there is room up to {room}; "
        "make the disk larger (--disk 0:size=...)"
    )


@pytest.mark.parametrize(
    "maker", ["mkfs.ext4", "mkfs.vfat", "mkfs.xfs", "boot code", "no entries", "zeroes"]
)
def test_an_image_without_a_table_has_no_place(tmp_path: Path, maker: str) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    if maker.startswith("mkfs"):
        require(maker)
        call(maker, image)
    elif maker == "boot code":  # as extlinux leaves it in front of an ext4
        put(image, 0, bytes(range(1, 256)) * 2 + b"\x55\xaa")
    elif maker == "no entries":
        put(image, 510, b"\x55\xaa")
    assert plan(image, 500 * MIB, "none") == Plan((), None)
    with pytest.raises(Error, match="the image has no partition table"):
        plan(image, 500 * MIB, "auto")
    assert partition.find_seed(reader(image), 400 * MIB) is None


# Damage


def field(offset: int, value: bytes) -> Callable[[memoryview], None]:
    def change(table: memoryview) -> None:
        table[offset : offset + len(value)] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (field(512, b"EFI_PART"), "the GPT is damaged: no valid header in sector 1"),
        (field(512 + 24, b"\2"), "the GPT is damaged: no valid header in sector 1"),
        (field(512 + 84, b"\0\1"), "the GPT is damaged: 128 entries of 256 bytes"),
        (
            field(512 + 80, b"\xff\xff\xff\xff"),
            "the GPT is damaged: 4294967295 entries of 128 bytes",
        ),
        (field(512 + 72, b"\1"), "the GPT is damaged: entries in sectors 1 to 32"),
        (
            field(512 + 72, b"\xff" * 8),
            "the GPT is damaged: entries in sectors 18446744073709551615 to 18446744073709551646",
        ),
        (
            field(512 + 40, b"\xff" * 7),
            "the GPT is damaged: room from sector 72057594037927935 to 131038",
        ),
        (field(512 + 72, b"\3"), "the GPT is damaged: wrong checksum of its entries"),
        (field(1024 + 32, b"\0" * 8), "the GPT is damaged: overlapping partitions"),
        (field(1024 + 40, b"\0" * 8), "the GPT is damaged: overlapping partitions"),
    ],
)
def test_a_damaged_gpt_is_refused(
    tmp_path: Path, change: Callable[[memoryview], None], message: str
) -> None:
    image = make(tmp_path / "image", LAYOUTS["debian"][0])
    with gpt(image) as table:
        change(table)
    with pytest.raises(Error) as caught:
        plan(image, 100 * MIB, "none")
    assert str(caught.value) == f"{message}; fetch the image again, or repair it with sgdisk"


def test_a_gpt_for_another_sector_size_is_named(tmp_path: Path) -> None:
    image = make(tmp_path / "image", LAYOUTS["debian"][0])
    put(image, 512, bytes(512))
    put(image, 4096, b"EFI PART")
    with pytest.raises(Error) as caught:
        plan(image, 100 * MIB, "none")
    assert str(caught.value) == (
        "the GPT is for sectors of 4096 bytes; take the image for sectors of 512"
    )


def test_a_missing_second_copy_is_made_from_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, disk = make(tmp_path / "image", LAYOUTS["debian"][0]), tmp_path / "disk"
    put(image, 64 * MIB - 512, bytes(512))
    apply(image, disk, 100 * MIB, plan(image, 100 * MIB, "gap"))
    judge(disk)
    words = "the image's GPT has no valid second copy: made anew from the first"
    assert capsys.readouterr().err == f"WARNING: {words}\n"


@pytest.mark.parametrize("layout", ["debian", "mbr"])
def test_an_edit_that_did_not_happen_is_noticed(
    tmp_path: Path, layout: str, tool: Callable[[str, str], Path]
) -> None:
    image = make(tmp_path / "image", LAYOUTS[layout][0])
    tool("bwrap", "exit 0")
    with pytest.raises(Error) as caught:
        plan(image, 100 * MIB, "gap")
    assert str(caught.value) == (
        "fitting the partition table to the disk: sfdisk did something else than it was asked to; "
        "report this as a bug"
    )


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make(tmp_path / "image", LAYOUTS["debian"][0])
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    plan(image, 100 * MIB, "gap")
    assert list(temporary.iterdir()) == []


# The way back


def fat(path: Path, size_kib: int, label: str = "cidata") -> Path:
    require("mkfs.vfat")
    call("mkfs.vfat", "-C", "-n", label, path, size_kib)
    return path


@pytest.mark.parametrize("kind", ["gap", "tail", "mbr gap", "mbr tail", "config-drive"])
def test_a_seed_is_found_where_it_was_put(tmp_path: Path, kind: str) -> None:
    maker = FREEBSD if kind == "config-drive" else LAYOUTS["mbr" if "mbr" in kind else "debian"][0]
    image, disk = make(tmp_path / "image", maker), tmp_path / "disk"
    planned = plan(image, 100 * MIB, kind.split()[-1] if "-" not in kind else "auto")
    apply(image, disk, 100 * MIB, planned)
    assert planned.seed is not None
    # what was put there is no FAT yet
    assert partition.find_seed(reader(disk), 100 * MIB) is None
    put(
        disk,
        planned.seed.offset_bytes,
        fat(tmp_path / "fat", planned.seed.size_bytes // 1024).read_bytes(),
    )
    found = partition.find_seed(reader(disk), 100 * MIB)
    assert found is not None
    assert found.kind == ("config-drive" if kind == "config-drive" else "cidata")
    assert found.offset_bytes == planned.seed.offset_bytes
    assert found.size_bytes == planned.seed.size_bytes


@pytest.mark.parametrize(
    ("size_mib", "label", "found"),
    [(4, "cidata", True), (600, "cidata", True), (4, "CIDATA", True), (4, "other", False)],
)
def test_a_disk_may_be_the_seed(tmp_path: Path, size_mib: int, label: str, found: bool) -> None:
    disk = tmp_path / "disk"
    fat(disk, size_mib << 10, label)
    extent = Extent(0, size_mib * MIB, "cidata") if found else None
    assert partition.find_seed(reader(disk), size_mib * MIB) == extent


def test_a_damaged_table_is_a_warning_when_the_seed_is_sought(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = make(tmp_path / "disk", LAYOUTS["debian"][0])
    put(disk, 512, bytes(512))
    assert partition.find_seed(reader(disk), 64 * MIB) is None
    words = "looking for the seed: the GPT is damaged: no valid header in sector 1"
    assert capsys.readouterr().err == f"WARNING: {words}\n"


def test_a_seed_behind_the_disk_s_end_is_none(tmp_path: Path) -> None:
    image, disk = make(tmp_path / "image", LAYOUTS["debian"][0]), tmp_path / "disk"
    planned = plan(image, 100 * MIB, "tail")
    apply(image, disk, 100 * MIB, planned)
    put(disk, 95 * MIB, fat(tmp_path / "fat", 4096).read_bytes())
    assert partition.find_seed(reader(disk), 100 * MIB) is not None
    assert partition.find_seed(reader(disk), 99 * MIB - 512) is None


# Mutations


CHANGES = st.lists(
    st.tuples(
        st.one_of(
            st.integers(430, 511),
            st.integers(512, 512 + 92),
            st.integers(1024, 1024 + 16 * 128 - 1),
        ),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8)])),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("layout", ["debian", "odd-entries", "mbr-extended", "random"])
def test_no_table_makes_it_crash_or_leave_the_disk(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    maker = LAYOUTS[layout][0] if layout in LAYOUTS else lambda path: None
    image = make(tmp_path / "image", maker)
    original = reader(image)(0, 34 * 512)

    @settings(max_examples=25, deadline=None, database=None)
    @given(CHANGES, st.booleans(), st.integers(0, 40 * MIB), st.sampled_from(["auto", "none"]))
    def mutate(changes: list[tuple[int, bytes]], seal: bool, more: int, seed: str) -> None:
        put(image, 0, original)
        size = IMAGE_MIB * MIB
        with gpt(image) as table:
            for at, data in changes:
                table[at : at + len(data)] = data
        if not seal:
            for at, data in changes:
                put(image, at, data)
        try:
            planned = plan(image, size + more, seed)
        except Error as error:
            assert len(str(error)) < 500
        else:
            for offset, data in planned.writes:
                assert offset + len(data) <= size + more
                if offset == 0 and not layout.startswith("mbr"):
                    there = reader(image)(0, 512)
                    assert data == there[:458] + data[458:462] + there[462:]
                    continue
                assert offset >= 512 or layout.startswith("mbr")
            inside(planned.seed, size + more)
        inside(partition.find_seed(reader(image), size), size)

    mutate()
    capsys.readouterr()


def inside(extent: Optional[Extent], size: int) -> None:
    if extent is not None:
        assert 0 <= extent.offset_bytes < extent.offset_bytes + extent.size_bytes <= size
