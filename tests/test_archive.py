"""Tests of lib.archive: tar archives and OVAs of several writers, and hostile ones made by hand."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import time
from pathlib import Path
from typing import BinaryIO, Union

import pytest

from lib.decoder import unpack
from lib.decoder.source import Source
from lib.errors import Error
from tests.conftest import require
from tests.tars import END, gnu_sparse, member, ovf, pax

LIMIT = 64 << 20
DISK = b"\xeb\x63" + bytes(510) + os.urandom(100_001)
OTHER = os.urandom(5000)


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """Return a folder with a disk.raw of more fragments than a header's sparse map holds."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with (folder / "disk.raw").open("wb") as file:
        for block in range(60):
            file.seek(block * (128 << 10))
            file.write(os.urandom(5000))
        file.truncate((16 << 20) + 7)
    return folder


def whole(source: BinaryIO) -> Source:
    return Source(source.fileno(), os.fstat(source.fileno()).st_size)


def unpacked(tmp_path: Path, packed: bytes) -> bytes:
    (tmp_path / "packed").write_bytes(packed)
    with (tmp_path / "packed").open("rb") as source, (tmp_path / "out").open("w+b") as output:
        unpack.unpack(whole(source), output, LIMIT)
    return (tmp_path / "out").read_bytes()


WRITERS = {
    "gnu": ("tar", "-c"),
    "gnu-sparse": ("tar", "-c", "--sparse"),
    "gce": ("tar", "-Scz", "--format=oldgnu"),
    "pax": ("tar", "-c", "--format=pax"),
    "pax-sparse": ("tar", "-c", "--sparse", "--format=pax"),
    "xz": ("tar", "-cJ"),
    "zst-sparse": ("tar", "-cS", "--zstd"),
    "ustar": ("tar", "-c", "--format=ustar"),
    "bsdtar": ("bsdtar", "-c"),
    "bsdtar-gnu": ("bsdtar", "-c", "--format=gnutar"),
}


@pytest.mark.parametrize("argv", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("name", ["disk.raw", "./disk.raw", "."])
def test_writers(tmp_path: Path, sparse: Path, argv: tuple[str, ...], name: str) -> None:
    require(argv[0], "bwrap", "xz", "zstd", "gzip")
    (sparse / "README").write_text("how to use it")
    command = [*argv, "-C", str(sparse), "-f", "-", name]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    assert unpacked(tmp_path, packed) == (sparse / "disk.raw").read_bytes()
    assert (tmp_path / "out").stat().st_blocks * 512 <= 60 * (68 << 10)


def test_long_names(tmp_path: Path, sparse: Path) -> None:
    deep = sparse / ("d" * 200) / ("e" * 120)
    deep.mkdir(parents=True)
    (sparse / "disk.raw").rename(deep / "disk.raw")
    for form in ("gnu", "pax"):
        command = ["tar", "-cS", f"--format={form}", "-C", str(sparse), "-f", "-", "."]
        packed = subprocess.run(command, capture_output=True, check=True).stdout
        assert unpacked(tmp_path, packed) == (deep / "disk.raw").read_bytes()


RAW = member("disk.raw", DISK)


def pax_sparse(sparse_map: str, stored: bytes, real_size: Union[int, str]) -> bytes:
    """Return a member in the sparse format 1.0 with this map before its data."""
    text = sparse_map.encode()
    said: dict[str, Union[int, str]] = {"GNU.sparse.major": 1, "GNU.sparse.minor": 0}
    records = pax({**said, "GNU.sparse.name": "disk.raw", "GNU.sparse.realsize": real_size})
    return records + member("GNUSparseFile.0/x", text + bytes(-len(text) % 512) + stored)


GOOD = {
    "alone": (RAW + END, DISK),
    "one-zero-block-ends-it": (RAW + END[:512], DISK),
    "padded": (RAW + END + bytes(20 * 512), DISK),
    "beside-small-files": (member("README", OTHER) + RAW + member("a/nvram", OTHER) + END, DISK),
    "large-without-a-suffix": (member("disk", DISK * 20) + END, DISK * 20),
    "suffix-in-capitals": (member("DISK.RAW", DISK) + END, DISK),
    "empty-disk": (member("disk.raw") + END, b""),
    "contiguous-type": (member("disk.raw", DISK, kind=b"7") + END, DISK),
    "type-of-before-posix": (member("disk.raw", DISK, kind=b"\0") + END, DISK),
    "folder": (member("x/", kind=b"5") + member("x/disk.raw", DISK) + END, DISK),
    "name-cannot-escape": (member("/../../etc/disk.raw", DISK) + END, DISK),
    "size-by-pax": (
        pax({"size": len(DISK), "comment": "x"}) + member("disk.raw", DISK, size=0) + END,
        DISK,
    ),
    "size-in-base-256": (
        member("disk.raw", DISK, patch={124: b"\x80" + len(DISK).to_bytes(11, "big")}) + END,
        DISK,
    ),
    "comment-for-all": (pax({"comment": "a commit"}, b"g") + RAW + END, DISK),
    "gnu-sparse": (
        gnu_sparse(OTHER[:1024], 9000, (512, 512), (8192, 512), (9000, 0)) + END,
        bytes(512) + OTHER[:512] + bytes(7168) + OTHER[512:1024] + bytes(296),
    ),
    "pax-sparse": (
        pax_sparse("2\n512\n512\n8192\n512\n", OTHER[:1024], 9000) + END,
        bytes(512) + OTHER[:512] + bytes(7168) + OTHER[512:1024] + bytes(296),
    ),
    "all-hole": (gnu_sparse(b"", 1 << 20, (1 << 20, 0)) + END, bytes(1 << 20)),
}


@pytest.mark.parametrize(("packed", "expected"), GOOD.values(), ids=GOOD.keys())
def test_good(tmp_path: Path, packed: bytes, expected: bytes) -> None:
    assert unpacked(tmp_path, packed) == expected


TRUNCATED = "the archive ends too early: it is truncated"
DAMAGED = "the archive is damaged: "
NO_FILE = "'disk.raw' in the archive is no regular file; repack it without"
TWICE = "the archive holds 'disk.raw' twice; repack it"
MISFIT = DAMAGED + "a sparse map that does not fit the size"
BAD = {
    "symbolic-link": (member("disk.raw", kind=tarfile.SYMTYPE) + END, NO_FILE),
    "hard-link": (member("disk.raw", kind=tarfile.LNKTYPE) + END, NO_FILE),
    "fifo": (member("disk.raw", kind=tarfile.FIFOTYPE) + END, NO_FILE),
    "block-device": (member("disk.raw", kind=tarfile.BLKTYPE) + END, NO_FILE),
    "character-device": (member("disk.raw", kind=tarfile.CHRTYPE) + END, NO_FILE),
    "link-then-file": (member("disk.raw", kind=tarfile.SYMTYPE) + RAW + END, NO_FILE),
    "folder-with-data": (member("disk.raw", DISK, kind=b"5") + END, NO_FILE),
    "solaris-extension": (member("disk.raw", DISK, kind=b"X") + END, NO_FILE),
    "volume-label": (member("disk.raw", kind=b"V") + END, NO_FILE),
    "two-disks": (
        RAW + member("b.img", DISK) + END,
        "the archive holds two disks, 'disk.raw' and 'b.img'; repack it with one",
    ),
    "second-disk-by-size": (RAW + member("b", DISK * 20) + END, "the archive holds two disks"),
    "twice": (RAW + RAW + END, TWICE),
    "twice-by-dot-slash": (RAW + member("./disk.raw", OTHER) + END, TWICE),
    "side-file-twice": (
        member("README") + member("README") + RAW + END,
        "the archive holds 'README' twice; repack it",
    ),
    "no-disk": (
        member("README", OTHER) + END,
        "the archive holds no disk; name it as one, disk.raw say",
    ),
    "too-large": (
        member("disk.raw", size=LIMIT + 1) + END,
        "unpacked, the image is larger than the limit of 64 MiB",
    ),
    "8-exbibytes": (
        member("disk.raw", patch={124: b"\x80" + (1 << 63).to_bytes(11, "big")}) + END,
        "unpacked, the image is larger than the limit of 64 MiB",
    ),
    "sparse-8-tebibytes": (
        gnu_sparse(b"", 8 << 30, (0, 0)) + END,
        "unpacked, the image is larger than the limit of 64 MiB",
    ),
    "negative-size": (member("disk.raw", patch={124: b"\xff" * 12}), DAMAGED + "'-1' is no size"),
    "size-no-number": (member("disk.raw", patch={124: b"xx"}), DAMAGED + "invalid header"),
    "bad-checksum": (RAW[:100] + b"x" + RAW[101:] + END, DAMAGED + "bad checksum"),
    "cut-in-the-data": (RAW[:-1024], TRUNCATED),
    "cut-in-a-header": (RAW + RAW[:300], TRUNCATED),
    "cut-in-the-first-header": (RAW[:300], DAMAGED + "truncated header"),
    "without-an-end": (RAW, TRUNCATED),
    "garbage-behind": (RAW + END + b"x", "there is data behind the end of the archive"),
    "archive-behind": (RAW + END + RAW + END, "there is data behind the end of the archive"),
    "endless-padding": (
        RAW + END + bytes(2 << 20),
        "there is data behind the end of the image",
    ),
    "many-members": (
        b"".join(member(f"{number}") for number in range(101)) + RAW + END,
        DAMAGED + "it has more than 100 headers",
    ),
    "gz-inside": (
        member("disk.raw", b"\x1f\x8b\x08" + OTHER) + END,
        "the image is packed twice: there is gz in it",
    ),
    "tar-inside": (
        member("disk.raw", RAW + END) + END,
        "the image is packed twice: there is tar in it",
    ),
    "long-extension": (
        member("x", kind=b"x", size=2 << 20) + END,
        DAMAGED + "an extension header of 2 MiB",
    ),
    "long-name-too-long": (
        member("x", kind=b"L", size=1 << 33) + END,
        DAMAGED + "an extension header of 8 GiB",
    ),
    **{
        f"pax-{name}": (
            member("x", records, kind=b"x") + RAW + END,
            DAMAGED + "an extension header that is none",
        )
        for name, records in {
            "no-length": b"path=x\n",
            "length-zero": b"0 path=x\n",
            "length-inside-the-key": b"5 path=x\n",
            "length-behind-the-end": b"99 path=x\n",
            "length-huge": b"9" * 5000 + b" path=x\n",
            "no-newline": b"8 path=x6 b=c\n",
            "no-key": b"6 =x\n\n",
        }.items()
    },
    "pax-size-no-number": (pax({"size": "-5"}) + RAW + END, DAMAGED + "'-5' is no size"),
    "pax-size-no-ascii": (pax({"size": "\u0665"}) + RAW + END, DAMAGED + "'\u0665' is no size"),
    "pax-size-for-all": (
        pax({"size": 5}, b"g") + RAW + END,
        DAMAGED + "a name or a size for all members",
    ),
    "old-sparse": (
        pax({"GNU.sparse.map": "0,512", "GNU.sparse.size": 512}) + RAW + END,
        "the archive is of an old sparse format; repack it with tar --sparse",
    ),
    "sparse-overlap": (
        gnu_sparse(OTHER[:1024], 9000, (512, 512), (512, 512)) + END,
        DAMAGED + "a sparse map out of order",
    ),
    "sparse-behind-the-end": (gnu_sparse(OTHER[:512], 600, (512, 512)) + END, MISFIT),
    "sparse-more-than-stored": (gnu_sparse(OTHER[:512], 9000, (0, 1024)) + END, MISFIT),
    "sparse-less-than-stored": (gnu_sparse(OTHER[:1024], 9000, (0, 512)) + END, MISFIT),
    "sparse-no-number": (
        member("disk.raw", kind=b"S", patch={386: b"-5", 483: b"1"}) + END,
        DAMAGED + "b'-5' is no size",
    ),
    "sparse-endless-map": (
        gnu_sparse(b"", 9000, (0, 0), more=True)
        + (b"%011o\0%011o\0" % (0, 0) * 21 + b"\1" + bytes(7)) * 13_000,
        DAMAGED + "a sparse map of more than 262144 entries",
    ),
    "pax-sparse-misfit": (pax_sparse("1\n0\n512\n", OTHER[:100], 9000) + END, MISFIT),
    "pax-sparse-count": (
        pax_sparse("999999999\n" + "0\n" * 600_000, b"", 9000) + END,
        DAMAGED + "a sparse map of more than 262144 entries",
    ),
    "pax-sparse-endless-line": (
        pax_sparse("1\n" + "0" * 5000, b"", 9000) + END,
        DAMAGED + "a sparse map of more than 262144 entries",
    ),
    "pax-sparse-no-number": (pax_sparse("1\n-5\n0\n", b"", 9000) + END, DAMAGED + "'-5' is no"),
    "pax-sparse-no-size": (pax_sparse("0\n", b"", "") + END, DAMAGED + "'' is no size"),
}


@pytest.mark.parametrize(("packed", "message"), BAD.values(), ids=BAD.keys())
def test_bad(tmp_path: Path, packed: bytes, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(Error) as raised:
        unpacked(tmp_path, packed)
    assert str(raised.value).startswith(message)
    assert time.monotonic() - started < 3


def test_truncated_compressed_archive(tmp_path: Path) -> None:
    require("gzip", "bwrap")
    packed = subprocess.run(["gzip", "-c"], input=RAW + END, capture_output=True, check=True).stdout
    with pytest.raises(Error, match=r"^unpacking gz: it is cut short"):
        unpacked(tmp_path, packed[: len(packed) // 2])


def test_every_cut_is_an_error(tmp_path: Path) -> None:
    packed = pax_sparse("1\n512\n512\n", OTHER[:512], 9000) + member("README", b"x")
    for cut in range(263, len(packed), 61):
        with pytest.raises(Error):
            unpacked(tmp_path, packed[:cut])


def manifest(algorithm: str = "SHA256", **contents: bytes) -> bytes:
    """Return the manifest of these contents; a.vmdk and a.ovf unless given."""
    contents = {"ovf": ovf(), "vmdk": DISK, **contents}
    return b"".join(
        f"{algorithm}(a.{suffix})= {hashlib.new(algorithm, data).hexdigest()}\n".encode()
        for suffix, data in contents.items()
    )


VMDK = member("a.vmdk", DISK)
GOOD_OVA = {
    "vmware": member("a.ovf", ovf()) + member("a.mf", manifest()) + VMDK,
    "virtualbox": member("a.ovf", ovf()) + VMDK + member("a.mf", manifest("SHA1")),
    "sha512": member("a.ovf", ovf()) + VMDK + member("a.mf", manifest("SHA512")),
    "no-manifest": member("a.ovf", ovf()) + VMDK,
    "blank-disk-beside": member("a.ovf", ovf('<Disk ovf:fileRef="f1"/><Disk/>')) + VMDK,
    "openssl-style": member("a.ovf", ovf())
    + member("a.mf", manifest().replace(b"(", b" (").replace(b"=", b" ="))
    + VMDK,
    "blank-lines": member("a.ovf", ovf()) + member("a.mf", manifest() + b"\r\n") + VMDK,
    "deep-descriptor": member(
        "a.ovf", ovf("<a>" * 100_000 + '<Disk ovf:fileRef="f1"/>' + "</a>" * 100_000)
    )
    + VMDK,
    "nvram": member("a.ovf", ovf())
    + VMDK
    + member("a.nvram", OTHER)
    + member("a.mf", manifest(nvram=OTHER)),
}


@pytest.mark.parametrize("members", GOOD_OVA.values(), ids=GOOD_OVA.keys())
def test_good_ova(tmp_path: Path, members: bytes) -> None:
    assert unpacked(tmp_path, members + END) == DISK


@pytest.mark.parametrize("href", ["a%20b.vmdk", "a b.vmdk"])
@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha512"])
def test_an_ova_packed_by_hand(tmp_path: Path, href: str, algorithm: str) -> None:
    require("openssl", "tar")
    (tmp_path / "a.ovf").write_bytes(ovf(href=href))
    (tmp_path / "a b.vmdk").write_bytes(DISK)
    for argv in (
        ["openssl", "dgst", f"-{algorithm}", "-out", "a.mf", "a.ovf", "a b.vmdk"],
        ["tar", "--format=ustar", "-cf", "a.ova", "a.ovf", "a.mf", "a b.vmdk"],
    ):
        subprocess.run(argv, cwd=tmp_path, check=True)
    assert unpacked(tmp_path, (tmp_path / "a.ova").read_bytes()) == DISK


DIFFERS = "the OVA's manifest has another digest of "
BAD_OVA = {
    **{
        f"href-{name}": (
            member("a.ovf", ovf(href=href)) + VMDK,
            f"the OVA's descriptor is about {href!r}, the disk in it is 'a.vmdk'",
        )
        for name, href in {
            "absolute": "/etc/shadow",
            "above": "../a.vmdk",
            "file": "file:///etc/shadow",
            "http": "http://127.0.0.1/",
            "missing": "b.vmdk",
            "side-file": "a.ovf",
        }.items()
    },
    "two-descriptors": (
        member("a.ovf", ovf()) + member("b.ovf", ovf()) + VMDK,
        "the archive holds two descriptors, 'a.ovf' and 'b.ovf'; repack it with one",
    ),
    "doctype": (
        member("a.ovf", ovf(head='<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/shadow">]>')) + VMDK,
        "the OVA's descriptor has a DOCTYPE; repack it without",
    ),
    "doctype-in-utf-16": (
        member("a.ovf", ovf(head='<!DOCTYPE x [<!ENTITY a "a">]>').decode().encode("utf-16"))
        + VMDK,
        "the OVA's descriptor is no XML in UTF-8: ",
    ),
    "no-xml": (member("a.ovf", b"x") + VMDK, "the OVA's descriptor is no XML in UTF-8: "),
    "deep-xml": (
        member("a.ovf", b"<a>" * 300_000) + VMDK,
        "the OVA's descriptor is no XML in UTF-8: ",
    ),
    "no-disk": (
        member("a.ovf", ovf(disks="")) + VMDK,
        "the OVA's descriptor is about 0 disks with a file, not one",
    ),
    "two-disks": (
        member("a.ovf", ovf('<Disk ovf:fileRef="f1"/><Disk ovf:fileRef="f2"/>')) + VMDK,
        "the OVA's descriptor is about 2 disks with a file, not one",
    ),
    "unknown-file": (
        member("a.ovf", ovf('<Disk ovf:fileRef="f2"/>')) + VMDK,
        "the OVA's descriptor is about '', the disk in it is 'a.vmdk'",
    ),
    "disk-changed": (
        member("a.ovf", ovf()) + member("a.mf", manifest(vmdk=OTHER)) + VMDK,
        DIFFERS + "'a.vmdk'; download it again",
    ),
    "descriptor-changed": (
        member("a.ovf", ovf()) + VMDK + member("a.mf", manifest(ovf=OTHER)),
        DIFFERS + "'a.ovf'; download it again",
    ),
    "side-file-changed": (
        member("a.ovf", ovf()) + VMDK + member("a.nvram") + member("a.mf", manifest(nvram=OTHER)),
        DIFFERS + "'a.nvram'; download it again",
    ),
    "disk-not-in-the-manifest": (
        member("a.ovf", ovf()) + VMDK + member("a.mf", manifest().splitlines()[0]),
        "the OVA's manifest has no digest of 'a.vmdk'",
    ),
    "empty-manifest": (
        member("a.ovf", ovf()) + VMDK + member("a.mf"),
        "the OVA's manifest has no digest of 'a.",
    ),
    "file-missing": (
        member("a.ovf", ovf()) + VMDK + member("a.mf", manifest(iso=OTHER)),
        "the OVA's manifest has a digest of 'a.iso', which is not in it",
    ),
    "manifest-no-digests": (
        member("a.ovf", ovf()) + VMDK + member("a.mf", b"<html>"),
        "the OVA's manifest has a line that is no digest: b'<html>'",
    ),
}


@pytest.mark.parametrize(("members", "message"), BAD_OVA.values(), ids=BAD_OVA.keys())
def test_bad_ova(tmp_path: Path, members: bytes, message: str) -> None:
    with pytest.raises(Error) as raised:
        unpacked(tmp_path, members + END)
    assert str(raised.value).startswith(message)


def test_python_reads_our_hand_made_members_alike() -> None:
    for packed, expected in GOOD.values():
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            disks = [m for m in archive if m.isreg() and m.name.lower().endswith((".raw", "disk"))]
            file = archive.extractfile(disks[0])
            assert file is not None
            assert file.read() == expected
