"""The decoder program on what tools write and attackers make: its words, its bounds, side files."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import pytest

from lib.errors import Error
from lib.source import decode
from tests import corpus
from tests.conftest import require
from tests.decoding import coming, decoded
from tests.images import MIB, convert, disk_image
from tests.tars import END, gnu_sparse, member, ovf, pax
from tests.test_unpack import TOOLS, large_dictionary, large_window

LIMIT = 64 * MIB
LARGE = os.urandom(MIB + (MIB >> 3))  # larger than a side file of no name may be


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("sfdisk", "qemu-img", "bwrap", "prlimit", "setpriv", "tar", "lz4", "xz", "zstd")
    return disk_image(tmp_path_factory.mktemp("disk") / "disk.raw", size_mib=8)


def packed(data: bytes, *argv: str) -> bytes:
    require(argv[0])
    return subprocess.run(argv, input=data, capture_output=True, check=True).stdout


def refusal(tmp_path: Path, data: bytes, declared: str = "auto", limit: int = LIMIT) -> str:
    """Return what the decoder says, whole or still coming."""
    image = tmp_path / "image"
    image.write_bytes(data)
    with pytest.raises(Error) as whole:
        decoded(image, declared, limit)
    with pytest.raises(Error) as caught:
        coming(image, data, declared, limit)
    assert (caught.value.hint is None) == (whole.value.hint is None)
    return str(whole.value)


# -- what is no image, or of no format that is decoded ----------------------------------------


def split_extent(disk: Path) -> bytes:
    subformat = ("-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse")
    subprocess.run(
        ["qemu-img", "convert", *subformat, disk, disk.with_name("two.vmdk")], check=True
    )
    return disk.with_name("two-s001.vmdk").read_bytes()


def old_tar(disk: Path) -> bytes:
    return packed(b"", "tar", "-c", "--format=v7", "-C", str(disk.parent), disk.name)


KINDS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "lz4-legacy": (
        lambda disk: packed(disk.read_bytes(), "lz4", "-lc"),
        "the image is an lz4 file of the legacy format, none of raw, qcow2, vmdk, vdi, vpc, vhdx;"
        " pack it again with lz4 -9",
    ),
    "lzma": (
        lambda disk: packed(disk.read_bytes(), "xz", "--format=lzma", "-0c"),
        "the image is an lzma file of the old format, none of raw, qcow2, vmdk, vdi, vpc, vhdx;"
        " pack it again with xz",
    ),
    "lzip": (
        lambda disk: packed(disk.read_bytes(), "lzip", "-0c"),
        "the image is an lzip file, none of raw, qcow2, vmdk, vdi, vpc, vhdx; pack it again with"
        " xz",
    ),
    "v7-tar": (
        old_tar,
        "the image is a tar archive of the v7 format, none of raw, qcow2, vmdk, vdi, vpc, vhdx;"
        " pack it again with tar --format=gnu",
    ),
    "sesparse": (
        lambda _disk: struct.pack("<QQ", 0xCAFEBABE, 0x200000001).ljust(MIB, b"\0"),
        "the image is a VMware seSparse disk, none of raw, qcow2, vmdk, vdi, vpc, vhdx; make it"
        " one plain file, where you trust it, with qemu-img convert -O qcow2",
    ),
    "vma": (
        lambda _disk: b"VMA\0\0\0\0\1".ljust(MIB, b"\0"),
        "the image is a Proxmox VMA archive, none of raw, qcow2, vmdk, vdi, vpc, vhdx; extract"
        " the disk with vma",
    ),
    "split-extent": (
        split_extent,
        "the vmdk image is an extent without its descriptor; make it one plain file, where you"
        " trust it, with qemu-img convert -O qcow2",
    ),
}


@pytest.mark.parametrize(("make", "says"), KINDS.values(), ids=KINDS.keys())
def test_the_kind_is_named(
    tmp_path: Path, disk: Path, make: Callable[[Path], bytes], says: str
) -> None:
    assert refusal(tmp_path, make(disk)) == says


@pytest.mark.parametrize(("make", "says"), KINDS.values(), ids=KINDS.keys())
def test_declared_raw_makes_no_disk_of_it(
    tmp_path: Path, disk: Path, make: Callable[[Path], bytes], says: str
) -> None:
    """A container written to a disk as it is never boots: who wants that has dd."""
    if make is split_extent:
        says = "format=raw, but the image is vmdk; set format=vmdk or format=auto"
    assert refusal(tmp_path, make(disk), "raw") == says


def test_an_iso_alone_is_no_disk_in_any_format(tmp_path: Path) -> None:
    require("qemu-img", "bwrap")
    corpus.iso(tmp_path)
    for path, name in ((tmp_path / "image", "raw"), (convert(tmp_path / "image", "vdi"), "vdi")):
        with pytest.raises(Error) as caught:
            decoded(path)
        assert str(caught.value) == (
            "the image is an ISO 9660 file system, which does not boot as a disk; give a cloud"
            f" image, or set format={name} to write it as it is"
        )
        raw = decoded(path, name) or path
        assert raw.read_bytes() == (tmp_path / "image").read_bytes()


# -- what is cut, damaged, or wants too much --------------------------------------------------

MEMORY = (
    "it needs more memory to unpack than is allowed (xz: 512 MiB, zstd: 128 MiB) ({tool} failed"
    " with status 1); pack it again with a smaller dictionary or window"
)


def test_a_memory_limit_is_named(tmp_path: Path, disk: Path) -> None:
    for make, kind, tool in ((large_dictionary, "xz", "xz"), (large_window, "zst", "zstd")):
        assert refusal(tmp_path, make()) == f"unpacking {kind}: {MEMORY.format(tool=tool)}"


@pytest.mark.parametrize("kind", TOOLS)
def test_cut_and_compressed(tmp_path: Path, disk: Path, kind: str) -> None:
    data = packed(disk.read_bytes(), TOOLS[kind], "-1c")
    for cut in (20, len(data) // 2, len(data) - 600):
        said = refusal(tmp_path, data[:-cut])
        assert said.startswith(f"unpacking {kind}: it is cut short or damaged")
        assert said.endswith("; fetch it again")
    assert refusal(tmp_path, data + b"garbage\n").endswith(
        ("; pack it again", "; fetch it again", "; see whether it is damaged")
    )


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vdi", "vpc", "vhdx"])
def test_cut_anywhere(tmp_path: Path, disk: Path, kind: str) -> None:
    """In the middle of a sector as well, where qemu's NBD client used to wait for ever."""
    data = convert(disk, kind).read_bytes()
    for cut in (1, 512, 70_000, len(data) // 2 + 1, len(data) - 70_001):
        started = time.monotonic()
        said = refusal(tmp_path, data[:-cut])
        assert time.monotonic() - started < 20
        assert "; fetch it again" in said or "; see its words above; fetch it again" in said, cut


# -- bounds ------------------------------------------------------------------------------------


def test_the_extension_headers_have_a_sum(tmp_path: Path) -> None:
    records = {f"key{number}": "x" * 10_000 for number in range(90)}
    archive = pax(records) * 97 + member("disk.raw", b"x") + END
    assert refusal(tmp_path, packed(archive, "zstd", "-c")) == (
        "the archive is damaged: it has more than 4 MiB of extension headers"
    )


def test_an_archive_that_never_ends(tmp_path: Path) -> None:
    """A sparse map whose blocks go on over a pipe: the verdict does not wait for an end."""
    require("bwrap", "qemu-img")
    header = gnu_sparse(b"", 9000, (0, 0), more=True)
    block = (b"%011o\0%011o\0" % (0, 0) * 21 + b"\1").ljust(512, b"\0")
    with (tmp_path / "image").open("w+b", buffering=0) as file:
        with decode.started(file, "auto", LIMIT, tmp_path, 1 << 40) as decoder:
            file.write(header + block * 13_000)
            started = time.monotonic()
            with pytest.raises(Error, match="a sparse map of more than 262144 entries"):
                decoder.result()
            assert time.monotonic() - started < 10
    endless = packed(header, "zstd", "-c") + packed(block * 2048, "zstd", "-c") * 40_000
    assert "more than 262144 entries" in refusal(tmp_path, endless)


def test_a_manifest_hashes_the_disk_once(tmp_path: Path, disk: Path) -> None:
    """300 right lines of it: 8.7 KB took 90 s."""
    folder = tmp_path / "ova"
    folder.mkdir()
    os.truncate(convert_empty(disk, folder / "a.raw"), 256 * MIB)
    digest = packed(b"", "sha256sum", str(folder / "a.raw")).split()[0]
    descriptor = ovf(href="a.raw")
    own = packed(descriptor, "sha256sum").split()[0]
    took = []
    for lines in (1, 300):
        (folder / "a.ovf").write_bytes(descriptor)
        manifest = b"SHA256(a.ovf)= %s\n" % own + b"SHA256(a.raw)= %s\n" % digest * lines
        (folder / "a.mf").write_bytes(manifest)
        names = ("a.ovf", "a.mf", "a.raw")
        (tmp_path / "image").write_bytes(
            packed(b"", "tar", "-cS", "--zstd", "-C", str(folder), *names)
        )
        started = time.monotonic()
        assert decoded(tmp_path / "image", limit_bytes=256 * MIB) is not None
        took.append(time.monotonic() - started)
    assert took[1] < 3 * took[0] + 3


def convert_empty(disk: Path, target: Path) -> Path:
    """Copy a disk, with its holes."""
    subprocess.run(["cp", "--sparse=always", disk, target], check=True)
    return target


def test_a_grain_directory_of_any_size(tmp_path: Path) -> None:
    """8.7 MB of gzip, grains of a sector, 2^60 bytes said: root took 3.8 GiB for it."""
    for capacity, says in (
        (1 << 51, "the vmdk image is cut short: its grain directory lies outside the file"),
        (1 << 34, "the vmdk image has a table of more than 64 MiB; use larger clusters"),
    ):
        text = corpus.descriptor("monolithicSparse", f'RW {capacity} SPARSE "image"')
        corpus.embedded(text, capacity, grain=1, grains=512)(tmp_path)
        started = time.monotonic()
        os.truncate(tmp_path / "image", 160 * MIB)
        plain = tmp_path / "image.gz"
        with plain.open("wb") as output:
            subprocess.run(["gzip", "-1c", tmp_path / "image"], stdout=output, check=True)
        with pytest.raises(Error) as caught:
            decoded(plain, limit_bytes=1 << 31)
        assert str(caught.value).startswith(says)
        assert time.monotonic() - started < 20


# -- what may lie beside the disk ---------------------------------------------------------------


def accepted(tmp_path: Path, data: bytes) -> Optional[bytes]:
    (tmp_path / "image").write_bytes(data)
    path = decoded(tmp_path / "image", limit_bytes=LIMIT)
    return None if path is None else path.read_bytes()


def test_side_files_are_no_second_disk(tmp_path: Path, disk: Path) -> None:
    raw, vmdk = disk.read_bytes(), convert(disk, "vmdk").read_bytes()
    appliance = member("a.ovf", ovf()) + member("a.vmdk", vmdk)
    for archive in (
        member("._disk.raw", LARGE) + member("disk.raw", raw),
        member("./._disk.raw", LARGE[:4096]) + member("./disk.raw", raw),
        member("README", LARGE) + member("disk.raw", raw),
        member("disk.raw", raw) + member("doc/README.md", LARGE),
        appliance + member("a.nvram", LARGE),
        appliance + member("tools.iso", LARGE),
    ):
        assert accepted(tmp_path, archive + END) == raw
        assert accepted(tmp_path, packed(archive + END, "gzip", "-1c")) == raw


def test_the_tarball_of_pixz(tmp_path: Path, disk: Path) -> None:
    """Its index of files lies behind the archive's end."""
    require("pixz")
    tar = packed(b"", "tar", "-c", "-C", str(disk.parent), disk.name)
    (tmp_path / "a.tar").write_bytes(tar)
    subprocess.run(["pixz", "-1", tmp_path / "a.tar", tmp_path / "a.tpxz"], check=True)
    assert (tmp_path / "a.tpxz").read_bytes() != packed(tar, "xz", "-1c")
    assert accepted(tmp_path, (tmp_path / "a.tpxz").read_bytes()) == disk.read_bytes()
    assert "data behind the end" in refusal(tmp_path, packed(tar + LARGE, "xz", "-1c"))
