"""A corpus of disk images, good and hostile, made on the spot: nothing binary is kept in git.

Every hostile item lies beside `secret`, a file of the node that carries MARKER; who follows the
image's reference to it leaks. The writers are of our own where an attack needs bytes that qemu-img
would not write, and where a second writer shows that not only qemu-img's images pass.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

MARKER = b"MARKER-of-a-file-of-the-node-"
MIB = 1 << 20
LIMIT_BYTES = 1 << 40
Build = Callable[[Path], None]  # makes `image` in the directory that holds base.raw and secret


@dataclass(frozen=True)
class Item:
    """One image: how it is made, and what is to come of it."""

    name: str
    build: Build
    verdict: Optional[str] = None  # None: decodes to base.raw; else what the refusal says
    declared: str = "auto"
    leaks: Optional[str] = None  # the format by which stock qemu-img reads the secret


def base() -> bytes:
    """Return the disk that all good images hold: 4 MiB, an MBR's signature, holes, a last word."""
    disk = bytearray(4 * MIB)
    disk[510:512] = b"\x55\xaa"
    disk[MIB : MIB + 100_000] = random.Random(1).randbytes(100_000)
    disk[2 * MIB : 2 * MIB + 200_000] = b"what zlib likes " * 12_500
    disk[-512:] = random.Random(2).randbytes(512)
    return bytes(disk)


def prepare(directory: Path) -> None:
    """Put the base disk and the bait into `directory`."""
    (directory / "base.raw").write_bytes(base())
    (directory / "secret").write_bytes((MARKER * MIB)[: 4 * MIB])


def qemu_img(directory: Path, *arguments: str) -> None:
    """Run the real qemu-img in `directory`."""
    subprocess.run(
        ["qemu-img", *arguments], cwd=directory, check=True, capture_output=True, timeout=60
    )


# -- ways to make an image --------------------------------------------------------------------


def convert(image_format: str, *options: str) -> Build:
    """qemu-img convert of the base disk."""

    def build(directory: Path) -> None:
        qemu_img(directory, "convert", "-O", image_format, *options, "base.raw", "image")

    return build


def create(*arguments: str) -> Build:
    """qemu-img create; `{d}` in an argument is the directory."""

    def build(directory: Path) -> None:
        qemu_img(directory, "create", *(a.replace("{d}", str(directory)) for a in arguments))

    return build


def then(first: Build, *steps: Build) -> Build:
    """One after the other."""

    def build(directory: Path) -> None:
        for step in (first, *steps):
            step(directory)

    return build


def patch(offset: int, data: bytes) -> Build:
    """Overwrite bytes of the image; a negative offset counts from its end."""

    def build(directory: Path) -> None:
        with open(directory / "image", "r+b") as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            file.write(data)

    return build


def cut(count: int) -> Build:
    """Take the last `count` bytes away."""

    def build(directory: Path) -> None:
        os.truncate(directory / "image", (directory / "image").stat().st_size - count)

    return build


def content(data: bytes, at: int = 0, size: int = 0) -> Build:
    """These bytes at an offset of a file of at least `size` bytes, else zeros."""

    def build(directory: Path) -> None:
        with open(directory / "image", "wb") as file:
            file.truncate(size)
            file.seek(at)
            file.write(data)

    return build


def written(writer: Callable[[bytes], bytes]) -> Build:
    """The base disk by a writer of our own."""

    def build(directory: Path) -> None:
        (directory / "image").write_bytes(writer(base()))

    return build


def nested(inner: Build, outer: str) -> Build:
    """The image of `inner`, bytes as they are, inside an image of format `outer`."""

    def build(directory: Path) -> None:
        inner(directory)
        (directory / "image").rename(directory / "inner")
        os.truncate(directory / "inner", 4 * MIB)
        qemu_img(directory, "convert", "-f", "raw", "-O", outer, "inner", "image")

    return build


def fifo(directory: Path) -> None:
    """A FIFO, which stops for ever whoever opens it to read."""
    os.mkfifo(directory / "fifo")


def overlay(name: str, *options: str) -> Build:
    """A qcow2 whose backing file has this name (patched in: qemu-img would want to open it)."""

    def build(directory: Path) -> None:
        text = name.replace("{d}", str(directory)).encode()
        qemu_img(directory, "create", "-f", "qcow2", *options, "image", "4M")
        patch(1024, text)(directory)
        patch(8, struct.pack(">QI", 1024, len(text)))(directory)

    return build


# -- writers of our own -----------------------------------------------------------------------


def _clusters(disk: bytes, size: int) -> list[tuple[int, bytes]]:
    """Return (index, bytes) of every part of the disk that is not zero."""
    parts = [(n, disk[n * size : (n + 1) * size]) for n in range(-(-len(disk) // size))]
    return [(n, part.ljust(size, b"\0")) for n, part in parts if any(part)]


def write_qcow2(disk: bytes, version: int = 3) -> bytes:
    """Header, refcount table and block, L1, L2, data: a cluster of 64 KiB each."""
    size = 1 << 16
    parts = _clusters(disk, size)
    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        *(b"QFI\xfb", version, 0, 0, 16, len(disk), 0, 1, 3 * size, size, 1, 0, 0),
    )
    if version == 3:
        header += struct.pack(">QQQII", 0, 0, 0, 4, 104)
    l2 = [0] * (size // 8)
    for place, (index, _part) in enumerate(parts, 5):
        l2[index] = place * size | 1 << 63
    blocks = [
        header,
        struct.pack(">Q", 2 * size),
        struct.pack(f">{5 + len(parts)}H", *[1] * (5 + len(parts))),
        struct.pack(">Q", 4 * size | 1 << 63),
        struct.pack(f">{len(l2)}Q", *l2),
        *(part for _index, part in parts),
    ]
    return b"".join(block.ljust(size, b"\0") for block in blocks)


DESCRIPTOR = """# Disk DescriptorFile
version=1
encoding="windows-1252"
CID=fffffffe
parentCID=ffffffff
isNativeSnapshot="no"
createType="streamOptimized"

# Extent description
RW 8192 SPARSE "disk.vmdk"

# The Disk Data Base
#DDB
ddb.adapterType = "lsilogic"
ddb.uuid.image="b2a1c5f0-0000-4000-8000-000000000001"
"""


def vmdk_header(capacity: int, directory: int, flags: int = 0x30001, **changes: int) -> bytes:
    """A sparse extent's header, as VMware writes it, in a sector."""
    f = {"version": 3, "grain": 128, "place": 1, "length": 20, "grains": 512, "overhead": 128}
    f.update(changes)
    data = struct.pack(
        "<4sIIQQQQIQQQB4sH",
        *(b"KDMV", f["version"], flags, capacity, f["grain"], f["place"], f["length"]),
        *(f["grains"], 0, directory, f["overhead"], 0, b"\n \r\n", 1),
    )
    return data.ljust(512, b"\0")


def write_vmdk(disk: bytes, descriptor: str = DESCRIPTOR, footer_capacity: int = 0) -> bytes:
    """streamOptimized as VMware's OVA export writes it: markers, the directory at the end."""
    capacity = len(disk) // 512
    out = bytearray(vmdk_header(capacity, (1 << 64) - 1))
    out += descriptor.encode().ljust(20 * 512, b"\0")
    out = out.ljust(128 * 512, b"\0")
    table = [0] * 512
    for index, part in _clusters(disk, 128 * 512):
        table[index] = len(out) // 512
        data = zlib.compress(part)
        grain = struct.pack("<QI", index * 128, len(data)) + data
        out += grain.ljust(-(-len(grain) // 512) * 512, b"\0")

    def marker(sectors: int, kind: int) -> bytes:
        return struct.pack("<QII", sectors, 0, kind).ljust(512, b"\0")

    out += marker(4, 1)
    place = len(out) // 512
    out += struct.pack("<512I", *table) + marker(1, 2)
    directory = len(out) // 512
    out += struct.pack("<I", place).ljust(512, b"\0") + marker(1, 3)
    return bytes(out + vmdk_header(footer_capacity or capacity, directory) + bytes(512))


def write_vdi(disk: bytes, size: Optional[int] = None, image_type: int = 1) -> bytes:
    """Header, block map, blocks of 1 MiB; all of them in a fixed disk (type 2)."""
    count = -(-len(disk) // MIB)
    parts = [(n, disk[n * MIB :][:MIB]) for n in range(count)]
    parts = [part for part in parts if image_type == 2 or any(part[1])]
    block_map = [0xFFFFFFFF] * count
    for place, (index, _part) in enumerate(parts):
        block_map[index] = place
    header = b"<<< QEMU VM Virtual Disk Image >>>\n".ljust(64, b"\0")
    header += struct.pack("<IIII", 0xBEDA107F, 0x00010001, 400, image_type)
    header = header.ljust(340, b"\0") + struct.pack("<II", 512, 1024)
    header += struct.pack("<IIII", 0, 0, 0, 512) + bytes(4)
    header += struct.pack("<QIIII", size or len(disk), MIB, 0, count, len(parts)) + b"U" * 16
    blocks = b"".join(part for _index, part in parts)
    data = header.ljust(512, b"\0") + struct.pack(f"<{count}I", *block_map)
    return data.ljust(1024, b"\0") + blocks


def vhd_footer(size: int, kind: int, table: int = (1 << 64) - 1, creator: bytes = b"vbox") -> bytes:
    """A VHD footer; its geometry is smaller than the disk, as VirtualBox's is."""
    head = struct.pack(">8sIIQI4sI4s", b"conectix", 2, 0x10000, table, 0, creator, 0x50000, b"Wi2k")
    head += struct.pack(">QQHBBI", size, size, size // 512 // 68 - 1, 4, 17, kind)
    tail = (b"\0" * 4 + b"U" * 16).ljust(512 - len(head), b"\0")
    checksum = ~sum(head + tail) & 0xFFFFFFFF
    return head + struct.pack(">I", checksum) + tail[4:]


def write_vhd_fixed(disk: bytes) -> bytes:
    """The disk, then the footer."""
    return disk + vhd_footer(len(disk), 2)


def write_vhd(disk: bytes, kind: int = 3) -> bytes:
    """A dynamic VHD: footer's copy, header, block map, bitmap and block for each, footer."""
    parts = _clusters(disk, 2 * MIB)
    count = -(-len(disk) // (2 * MIB))
    block_map = [0xFFFFFFFF] * count
    blocks = b""
    for index, part in parts:
        block_map[index] = 4 + len(blocks) // 512
        blocks += b"\xff" * 512 + part
    header = struct.pack(">8sQQIII", b"cxsparse", (1 << 64) - 1, 1536, 0x10000, count, 2 * MIB)
    checksum = ~sum(header) & 0xFFFFFFFF
    header = (header + struct.pack(">I", checksum)).ljust(1024, b"\0")
    footer = vhd_footer(len(disk), kind, 512)
    data = footer + header + struct.pack(f">{count}I", *block_map).ljust(512, b"\xff")
    return data + blocks + footer


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum that VHDX uses, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _summed(data: bytes, size: int) -> bytes:
    data = data.ljust(size, b"\0")
    return data[:4] + struct.pack("<I", crc32c(data)) + data[8:]


def guid(text: str) -> bytes:
    """Return a GUID as it lies on the disk."""
    a, b, c, d, e = text.split("-")
    return struct.pack("<IHH", int(a, 16), int(b, 16), int(c, 16)) + bytes.fromhex(d + e)


VHDX_ITEMS = {
    "file": guid("caa16737-fa36-4d43-b3b6-33f0aa44e76b"),
    "size": guid("2fa54224-cd1b-4876-b211-5dbed83bf4b8"),
    "page83": guid("beca12ab-b2e6-4523-93ef-c309e000c746"),
    "sector": guid("8141bf1d-a96f-4709-ba47-f233a8faab5f"),
    "physical": guid("cda348c7-445d-4471-9cc9-e9885251c556"),
    "parent": guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c"),
}


def write_vhdx(disk: bytes, flags: int = 0, log: bytes = bytes(16), parent: bool = False) -> bytes:
    """Blocks of 1 MiB after headers, log (1 MiB), block map (2 MiB) and metadata (3 MiB)."""
    bat, meta = (
        guid("2dc27766-f623-4200-9d64-115e9bfd4a08"),
        guid("8b7ca206-4790-4b9a-b8fe-575f050f886e"),
    )
    out = bytearray(4 * MIB)
    out[:8] = b"vhdxfile"
    for offset, sequence in ((64 << 10, 1), (128 << 10, 2)):
        header = struct.pack("<4sIQ16s16s16s", b"head", 0, sequence, b"F" * 16, b"D" * 16, log)
        header += struct.pack("<HHIQ", 0, 1, MIB, MIB)
        out[offset : offset + 4096] = _summed(header, 4096)
    regions = struct.pack("<4sIII", b"regi", 0, 2, 0)
    regions += struct.pack("<16sQII", bat, 2 * MIB, MIB, 1)
    regions += struct.pack("<16sQII", meta, 3 * MIB, MIB, 1)
    for offset in (192 << 10, 256 << 10):
        out[offset : offset + (64 << 10)] = _summed(regions, 64 << 10)
    values = {
        "file": struct.pack("<II", MIB, flags),
        "size": struct.pack("<Q", len(disk)),
        "page83": b"P" * 16,
        "sector": struct.pack("<I", 512),
        "physical": struct.pack("<I", 4096),
    }
    if parent:
        values["parent"] = b"L" * 20
    table = struct.pack("<8sHH20s", b"metadata", 0, len(values), b"")
    items = b""
    for name, value in values.items():
        flag = 4 if name in ("file", "parent") else 6
        table += struct.pack("<16sIIII", VHDX_ITEMS[name], 65536 + len(items), len(value), flag, 0)
        items += value
    out[3 * MIB : 3 * MIB + len(table)] = table
    out[3 * MIB + 65536 : 3 * MIB + 65536 + len(items)] = items
    for index, part in _clusters(disk, MIB):
        struct.pack_into("<Q", out, 2 * MIB + 8 * index, len(out) | 6)
        out += part
    return bytes(out)


def descriptor(kind: str, extent: str, before: str = "", parent: str = "ffffffff") -> bytes:
    """A VMware descriptor."""
    return (
        f"# Disk DescriptorFile\nversion=1\nCID=fffffffe\n{before}parentCID={parent}\n"
        f'createType="{kind}"\n{extent}\n'
    ).encode()


def embedded(text: bytes, capacity: int = 8192, **changes: int) -> Build:
    """A KDMV header with this descriptor inside."""
    data = vmdk_header(capacity, 24, 1, **{"version": 1, **changes}) + text.ljust(20 * 512, b"\0")
    table = struct.pack("<I", 25).ljust(512, b"\0") + bytes(4096)
    return content((data.ljust(24 * 512, b"\0") + table).ljust(128 * 1024, b"\0"))


def iso(directory: Path) -> None:
    """The signature of an ISO 9660 volume in a file with an empty system area."""
    content(b"\x01CD001\x01", 32768, MIB)(directory)


def tagged(offset: int, data: bytes, first: Build) -> Build:
    """An image that carries a second format's mark."""
    return then(first, patch(offset, data))


def appended(data: bytes, first: Build) -> Build:
    """An image with bytes behind its end."""

    def build(directory: Path) -> None:
        first(directory)
        with open(directory / "image", "ab") as file:
            file.write(data)

    return build


# -- the good ones ----------------------------------------------------------------------------

_QCOW2 = {
    "default": (),
    "v2": ("-o", "compat=0.10"),
    "clusters-512": ("-o", "cluster_size=512"),
    "clusters-2m": ("-o", "cluster_size=2M"),
    "zlib": ("-c",),
    "zlib-clusters-4k": ("-c", "-o", "cluster_size=4k"),
    "zstd": ("-c", "-o", "compression_type=zstd"),
    "lazy-refcounts": ("-o", "lazy_refcounts=on"),
    "extended-l2": ("-o", "extended_l2=on,cluster_size=128k"),
    "extended-l2-zlib": ("-c", "-o", "extended_l2=on,cluster_size=128k"),
    "refcounts-1": ("-o", "refcount_bits=1"),
    "refcounts-64": ("-o", "refcount_bits=64"),
    "metadata": ("-o", "preallocation=metadata"),
    "falloc": ("-o", "preallocation=falloc"),
    "full": ("-o", "preallocation=full"),
}
_OTHERS = {
    "vmdk-sparse": ("vmdk",),
    "vmdk-stream": ("vmdk", "-o", "subformat=streamOptimized"),
    "vmdk-compat6-zeroed": ("vmdk", "-o", "compat6=on,zeroed_grain=on,adapter_type=lsilogic"),
    "vdi-dynamic": ("vdi",),
    "vpc-dynamic": ("vpc", "-o", "force_size=on"),
    "vpc-fixed": ("vpc", "-o", "subformat=fixed,force_size=on"),
    "vhdx-dynamic": ("vhdx",),
    "vhdx-fixed": ("vhdx", "-o", "subformat=fixed"),
    "vhdx-blocks-1m": ("vhdx", "-o", "block_size=1M,block_state_zero=off"),
}


def _snapshot(directory: Path) -> None:
    convert("qcow2")(directory)
    qemu_img(directory, "snapshot", "-c", "before", "image")


def _bitmap(directory: Path) -> None:
    convert("qcow2")(directory)
    qemu_img(directory, "bitmap", "--add", "image", "changed")


def _file_system(name: str, tool: str, *options: str) -> Item:
    """A file system on the whole disk, as in Alpine's BIOS images and with kernel_path=."""

    def build(directory: Path) -> None:
        content(b"", size=160 * MIB)(directory)
        argv = [tool, *options, "image"]
        subprocess.run(argv, cwd=directory, check=True, capture_output=True, timeout=60)

    return Item(f"raw-{name}", build, RAW)


RAW = "raw"  # a verdict: accepted as it is
GOOD = [
    *(Item(f"qcow2-{name}", convert("qcow2", *options)) for name, options in _QCOW2.items()),
    *(Item(name, convert(*options)) for name, options in _OTHERS.items()),
    Item("qcow2-snapshot", _snapshot),
    Item("qcow2-bitmap", _bitmap),
    Item("qcow2-declared", convert("qcow2"), declared="qcow2"),
    Item("qcow2-own-v3", written(write_qcow2)),
    Item("qcow2-own-v2", written(lambda disk: write_qcow2(disk, 2))),
    # a leaked cluster wastes space and harms nothing
    Item(
        "qcow2-leak",
        appended(bytes(1 << 16), tagged(131072 + 2 * 30, b"\0\1", written(write_qcow2))),
    ),
    Item("vmdk-own-stream", written(write_vmdk)),
    Item("vmdk-crlf", written(lambda disk: write_vmdk(disk, DESCRIPTOR.replace("\n", "\r\n")))),
    Item("vdi-own", written(write_vdi)),
    Item("vdi-own-fixed", written(lambda disk: write_vdi(disk, image_type=2))),
    Item("vdi-odd-size", written(lambda disk: write_vdi(disk, len(disk) - 100))),
    Item("vpc-own-dynamic", written(write_vhd)),
    # by its CHS geometry, which qemu believes for this creator, the disk's end would be missing
    Item("vpc-own-fixed", written(write_vhd_fixed)),
    Item("vpc-declared", written(write_vhd_fixed), declared="vpc"),
    Item("vhdx-own", written(write_vhdx)),
    Item("raw-mbr", written(bytes), RAW),
    Item("raw-gpt", content(b"EFI PART", 512, MIB), RAW),
    Item("raw-gpt-4k-sectors", content(b"EFI PART", 4096, MIB), RAW),
    Item("raw-hybrid-iso", tagged(510, b"\x55\xaa", iso), RAW),
    Item("raw-declared-iso", iso, RAW, declared="raw"),
    Item("raw-declared-unknown", content(b"\1\2\3", 100, MIB), RAW, declared="raw"),
    _file_system("ext4", "mke2fs", "-q", "-t", "ext4"),
]

# -- qcow2 ------------------------------------------------------------------------------------

_BACKING, _DATA = "has a backing file", "keeps its data in another file"
_QCOW2_FROM = {
    "absolute": ("{d}/secret", ()),
    "relative": ("secret", ()),
    "parent": ("../{d}/../secret", ()),
    "file": ("file:secret", ()),
    "json": ('json:{"driver":"file","filename":"secret"}', ()),
    "v2": ("secret", ("-o", "compat=0.10")),
    "nbd": ("nbd://127.0.0.1:1/secret", ()),
    "http": ("http://127.0.0.1:1/secret", ()),
    "itself": ("image", ()),
    "control-characters": ("\x1b[2Jsecret\nERROR: all is well", ()),
}
_LEAKING = ("absolute", "relative", "file", "json", "v2")


def _chain(directory: Path) -> None:
    for name, backing in (("middle", "secret"), ("image", "middle")):
        kind = "raw" if backing == "secret" else "qcow2"
        qemu_img(directory, "create", "-f", "qcow2", "-b", backing, "-F", kind, name)


def _partly(directory: Path) -> None:
    create("-f", "qcow2", "-b", "secret", "-F", "raw", "image")(directory)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "image"],
        cwd=directory,
        check=True,
        capture_output=True,
        timeout=60,
    )


def _data_file(*options: str) -> Build:
    """A qcow2 whose data file is exchanged for the secret once it is made."""

    def build(directory: Path) -> None:
        option = ",".join(("data_file=data", *options))
        create("-f", "qcow2", "-o", option, "image", "4M")(directory)
        qemu_img(directory, "convert", "-n", "-O", "qcow2", "base.raw", "image")
        (directory / "secret").replace(directory / "data")
        (directory / "secret").write_bytes(b"")

    return build


def compressed_and_cut(directory: Path) -> None:
    """A compressed qcow2 that lacks the last half KiB of the last compressed cluster."""
    (directory / "base.raw").write_bytes(b"".join(b"%07d\n" % n for n in range(1 << 18)))
    then(convert("qcow2", "-c"), cut(512))(directory)


def _l2_bomb(directory: Path) -> None:
    """More than 1 GiB of L2 tables, all of them holes."""
    size = 2 * MIB
    create("-f", "qcow2", "-o", "cluster_size=2M", "image", "257T")(directory)
    os.truncate(directory / "image", 520 * size)
    patch(3 * size, struct.pack(">513Q", *(n * size for n in range(4, 517))))(directory)


_V3 = convert("qcow2", "-o", "compat=1.1")
QCOW2 = [
    *(
        Item(
            f"qcow2-backing-{name}",
            overlay(backing, *options),
            _BACKING,
            leaks="qcow2" if name in _LEAKING else None,
        )
        for name, (backing, options) in _QCOW2_FROM.items()
    ),
    Item(
        "qcow2-backing-format",
        create("-f", "qcow2", "-b", "secret", "-F", "raw", "image"),
        _BACKING,
        leaks="qcow2",
    ),
    Item("qcow2-backing-chain", _chain, _BACKING, leaks="qcow2"),
    Item("qcow2-backing-partly", _partly, _BACKING, leaks="qcow2"),
    Item("qcow2-backing-fifo", then(fifo, overlay("{d}/fifo")), _BACKING),
    Item("qcow2-backing-declared", overlay("secret"), _BACKING, declared="qcow2"),
    Item("qcow2-data-file", _data_file(), _DATA, leaks="qcow2"),
    Item("qcow2-data-file-raw", _data_file("data_file_raw=on"), _DATA, leaks="qcow2"),
    Item("qcow2-data-file-bit-only", tagged(79, b"\4", _V3), _DATA),
    Item("qcow2-raw-external-bit", tagged(95, b"\2", _V3), _DATA),
    Item(
        "qcow2-data-file-name-only",
        tagged(112, struct.pack(">II8sQ", 0x44415441, 6, b"secret", 0), _V3),
        "names an external data file",
    ),
    Item(
        "qcow2-many-extensions", tagged(112, b"\1\1\1\1\0\0\0\0" * 200, _V3), "more than 64 header"
    ),
    Item("qcow2-corrupt", tagged(79, b"\2", _V3), "is marked as corrupt"),
    Item("qcow2-unknown-feature", tagged(76, b"\1", _V3), "needs unknown features (0x1000000)"),
    Item("qcow2-unknown-compression", tagged(104, b"\7", tagged(79, b"\10", _V3)), "failed"),
    Item("qcow2-aes", tagged(32, b"\0\0\0\1", _V3), "is encrypted"),
    Item("qcow2-luks", tagged(32, b"\0\0\0\2", _V3), "is encrypted"),
    Item("qcow2-version-1", tagged(7, b"\1", _V3), "a version other than 2 and 3"),
    Item("qcow2-version-4", tagged(7, b"\4", _V3), "a version other than 2 and 3"),
    Item("qcow2-declared-raw", _V3, "format=raw, but the image is qcow2", declared="raw"),
    Item("qcow2-declared-vdi", _V3, "format=vdi, but the image is qcow2", declared="vdi"),
    Item("qcow2-cluster-bits", tagged(20, b"\0\0\0\x28", _V3), "has clusters of 2^40 bytes"),
    Item("qcow2-refcount-order", tagged(96, b"\0\0\0\7", _V3), "has an impossible header"),
    Item("qcow2-header-length", tagged(100, b"\0\0\0\x08", _V3), "has an impossible header"),
    Item("qcow2-8-eib", tagged(24, b"\x7f" + b"\xff" * 6 + b"\0", _V3), "has an L1 table of"),
    Item("qcow2-l1-bomb", tagged(36, b"\x7f\0\0\0", _V3), "has an L1 table of 2130706432"),
    Item("qcow2-l1-outside", tagged(40, b"\0\0\0\x40", _V3), "its L1 table lies"),
    Item("qcow2-l1-unaligned", tagged(47, b"\1", _V3), "has an impossible header"),
    Item("qcow2-refcounts-outside", tagged(48, b"\0\0\1", _V3), "its refcount table lies"),
    Item("qcow2-refcounts-bomb", tagged(56, b"\x7f\0\0\0", _V3), "has an impossible header"),
    Item("qcow2-snapshots", tagged(60, b"\0\1\0\0", _V3), "has 65536 snapshots"),
    Item("qcow2-snapshots-outside", tagged(60, b"\0\0\0\1\0\0\1", _V3), "its snapshot table lies"),
    Item("qcow2-header-only", then(_V3, lambda d: os.truncate(d / "image", 104)), "too short"),
    Item(
        "qcow2-512-bytes", then(_V3, lambda d: os.truncate(d / "image", 512)), "its L1 table lies"
    ),
    Item("qcow2-half", then(_V3, lambda d: os.truncate(d / "image", 400 << 10)), "cut short"),
    Item("qcow2-cut", tagged(-1, b"\0", then(_V3, cut(512))), "data lies outside the file"),
    # qemu-img check, map and convert all let this pass, and the disk's last bytes are gone
    Item(
        "qcow2-compressed-cut",
        compressed_and_cut,
        "its last compressed cluster lies outside",
    ),
    Item(
        "qcow2-l2-outside",
        tagged(3 << 16, b"\x80\0\0\0\x40\0\0\0", written(write_qcow2)),
        "its last L2 table lies",
    ),
    Item(
        "qcow2-dangling",
        tagged(4 << 16, b"\x80\0\0\0\x40\0\0\0", written(write_qcow2)),
        "cut short",
    ),
    Item(
        "qcow2-overlap",
        tagged(4 << 16, b"\x80\0\0\0\0\0\0\0\x80\0\0\0\0\1\0\0", written(write_qcow2)),
        "failed",
    ),
    Item(
        "qcow2-1-pib",
        create("-f", "qcow2", "-o", "cluster_size=2M", "image", "1P"),
        "max_virtual_size is 1 TiB",
    ),
    Item("qcow2-l2-bomb", _l2_bomb, "has more than 1 GiB of L2 tables"),
    Item("qcow2-nested", nested(overlay("secret"), "qcow2"), "the disk inside is qcow2 again"),
    Item("vmdk-in-qcow2", nested(convert("vmdk"), "qcow2"), "the disk inside is vmdk again"),
    Item("qcow2-in-vdi", nested(overlay("secret"), "vdi"), "the disk inside is qcow2 again"),
    Item("qcow2-in-vhd", nested(overlay("secret"), "vpc"), "the disk inside is qcow2 again"),
]

_SEVERAL = "is several things at once"
POLYGLOTS = [
    Item("qcow2-and-mbr", tagged(510, b"\x55\xaa", overlay("secret")), _SEVERAL),
    Item("qcow2-and-gpt", tagged(512, b"EFI PART", _V3), _SEVERAL),
    Item("qcow2-and-iso", tagged(32768, b"\1CD001", overlay("secret")), _SEVERAL),
    Item("qcow2-and-vhd", appended(vhd_footer(4 * MIB, 2), _V3), _SEVERAL),
    Item("qcow2-and-vdi", tagged(64, b"\x7f\x10\xda\xbe", _V3), _SEVERAL),
    Item("qcow2-and-dmg", appended(b"koly".ljust(512, b"\0"), _V3), _SEVERAL),
    Item(
        "vhd-and-qcow2",
        written(lambda d: write_qcow2(d) + vhd_footer(4 * MIB, 2)),
        _SEVERAL,
        declared="vpc",
    ),
    Item(
        "descriptor-and-iso",
        tagged(0, descriptor("monolithicFlat", 'RW 8192 FLAT "secret" 0'), iso),
        "a VMware descriptor",
    ),
    Item("html-and-iso", tagged(0, b"<html>" + b" " * 2000, iso), "an HTML page"),
]

# -- vmdk -------------------------------------------------------------------------------------

_FLAT = 'RW 8192 FLAT "secret" 0'
_PLAIN = 'RW 8192 SPARSE "image"'
_SEVERAL_FILES = "a VMware descriptor of a disk in several files"
_TEXT_VMDK = {
    "flat": ("monolithicFlat", _FLAT),
    "split-flat": ("twoGbMaxExtentFlat", _FLAT),
    "split-sparse": ("twoGbMaxExtentSparse", 'RW 8192 SPARSE "image2"'),
    "vmfs": ("vmfs", 'RW 8192 VMFS "secret"'),
    "full-device": ("fullDevice", 'RW 8192 FLAT "/dev/sda" 0'),
    "rdm": ("vmfsRawDeviceMap", 'RW 8192 VMFSRDM "/dev/sda"'),
    "fifo": ("monolithicFlat", 'RW 8192 FLAT "fifo" 0'),
}
_ODD = "a line in its descriptor that is not accepted"
VMDK = [
    *(
        Item(
            f"vmdk-text-{name}",
            then(fifo, content(descriptor(kind, extent), size=4096)),
            _SEVERAL_FILES,
            leaks="vmdk" if name in ("flat", "split-flat", "vmfs") else None,
        )
        for name, (kind, extent) in _TEXT_VMDK.items()
    ),
    Item(
        "vmdk-text-odd-start",
        content(b"\n# x\nversion=1\n" + descriptor("vmfs", _FLAT), size=4096),
        _SEVERAL_FILES,
    ),
    Item(
        "vmdk-capacity-0",
        embedded(descriptor("monolithicFlat", _FLAT), 0),
        "(capacity 0)",
        leaks="vmdk",
    ),
    Item(
        "vmdk-capacity-0-two-types",
        embedded(descriptor("monolithicFlat", _FLAT, 'CREATETYPE="monolithicSparse"\n'), 0),
        "(capacity 0)",
        leaks="vmdk",
    ),
    Item(
        "vmdk-two-types",
        embedded(descriptor("monolithicSparse", _PLAIN, 'CREATETYPE="x"\n')),
        "a key twice",
    ),
    Item(
        "vmdk-type",
        embedded(descriptor("monolithicFlat", _PLAIN)),
        "is not of type monolithicSparse or",
    ),
    Item("vmdk-flat-extent", embedded(descriptor("monolithicSparse", _FLAT)), _ODD),
    Item(
        "vmdk-two-extents",
        embedded(descriptor("monolithicSparse", f"{_PLAIN}\n{_PLAIN}")),
        "has 2 extents",
    ),
    Item("vmdk-no-extent", embedded(descriptor("monolithicSparse", "")), "has 0 extents"),
    Item("vmdk-odd-line", embedded(descriptor("monolithicSparse", f"{_PLAIN}\n\x1b[2J")), _ODD),
    Item(
        "vmdk-parent",
        embedded(descriptor("monolithicSparse", _PLAIN, parent="fffffffe")),
        "has a parent",
    ),
    Item(
        "vmdk-parent-name",
        embedded(descriptor("monolithicSparse", _PLAIN, 'parentFileNameHint="secret.vmdk"\n')),
        "has a parent",
    ),
    Item(
        "vmdk-parent-in-comment",
        embedded(descriptor("monolithicSparse", _PLAIN, '#parentFileNameHint="secret"\n')),
        "has a parent",
    ),
    Item(
        "vmdk-descriptor-elsewhere",
        embedded(descriptor("monolithicSparse", _PLAIN), place=2),
        "no descriptor of its own",
    ),
    Item("vmdk-no-descriptor", embedded(b"", length=0), "no descriptor of its own"),
    Item("vmdk-version", embedded(b"", version=9), "has version 9"),
    Item("vmdk-grain", embedded(b"", grain=100), "has an impossible header"),
    Item("vmdk-grains", embedded(b"", grains=1 << 30), "has an impossible header"),
    Item(
        "vmdk-overhead",
        embedded(descriptor("monolithicSparse", _PLAIN), overhead=1 << 40),
        "its first grain lies",
    ),
    Item("vmdk-8-eib", embedded(b"", 1 << 55), "has an impossible capacity"),
    Item(
        "vmdk-bomb",
        embedded(descriptor("monolithicSparse", _PLAIN), 1 << 50),
        "its grain directory lies",
    ),
    Item(
        "vmdk-tables-outside",
        tagged(24 * 512, b"\0\0\0\x40", embedded(descriptor("monolithicSparse", _PLAIN))),
        "its last grain table lies",
    ),
    Item(
        "vmdk-dangling",
        tagged(25 * 512, b"\0\0\0\x40", embedded(descriptor("monolithicSparse", _PLAIN))),
        "failed",
    ),
    Item("vmdk-cut", then(convert("vmdk"), cut(512)), "data lies outside the file"),
    Item("vmdk-stream-cut", then(written(write_vmdk), cut(512)), "it has no footer"),
    Item("vmdk-stream-half", then(written(write_vmdk), cut(120 << 10)), "it has no footer"),
    Item("vmdk-stream-damaged", tagged(80 << 10, b"\0" * 512, written(write_vmdk)), "failed"),
    Item(
        "vmdk-footer", written(lambda d: write_vmdk(d, footer_capacity=1)), "contradicts its header"
    ),
    Item("vmdk-cowd", content(b"COWD\1", size=MIB), "a VMware ESX sparse disk"),
]

# -- vdi, vpc, vhdx ---------------------------------------------------------------------------

_VDI = written(write_vdi)
_VHD = written(write_vhd)
VDI = [
    Item(
        "vdi-bomb",
        then(tagged(384, b"\xff\xff\xff\x3f", _VDI), lambda d: os.truncate(d / "image", 512)),
        "its block map lies",
    ),
    Item("vdi-differencing", written(lambda d: write_vdi(d, image_type=4)), "has a parent"),
    Item("vdi-parent", tagged(440, b"P" * 16, _VDI), "has a parent"),
    Item("vdi-link", tagged(424, b"P" * 16, _VDI), "has a parent"),
    Item("vdi-version", tagged(68, b"\2", _VDI), "has version"),
    Item("vdi-block-size", tagged(376, b"\0\0\0\0", _VDI), "has an impossible header"),
    Item("vdi-map-outside", tagged(340, b"\0\0\0\x40", _VDI), "its block map lies"),
    Item("vdi-cut", then(_VDI, cut(512)), "data lies outside the file"),
    Item("vdi-dangling", tagged(512, b"\3\0\0\0", _VDI), "failed"),
]
VPC = [
    Item("vpc-differencing", written(lambda d: write_vhd(d, 4)), "has a parent"),
    Item("vpc-type", written(lambda d: write_vhd(d, 6)), "has type 6"),
    Item("vpc-checksum", tagged(-448, b"x", _VHD), "a wrong checksum"),
    Item("vpc-copy", tagged(70, b"x", _VHD), "contradicts its copy"),
    Item("vpc-cut", then(_VHD, cut(512)), "it has no footer"),
    Item(
        "vpc-fixed-size",
        written(lambda d: d[:-MIB] + vhd_footer(len(d), 2)),
        "another size than its footer",
    ),
    Item(
        "vpc-fixed-declared-raw",
        written(write_vhd_fixed),
        "format=raw, but the image is vpc",
        declared="raw",
    ),
    Item(
        "vpc-fixed-with-a-copy",
        written(lambda d: vhd_footer(len(d), 4) + d[512:] + vhd_footer(len(d), 2)),
        "contradicts its copy",
    ),
    Item("vpc-header", tagged(512, b"x", _VHD), "has an impossible header"),
    Item("vpc-map-outside", tagged(528, b"\0\0\0\0\x40\0\0\0", _VHD), "its block map lies"),
    Item("vpc-dangling", tagged(1536, b"\0\x40\0\0", _VHD), "failed"),
]
VHDX = [
    Item("vhdx-parent-flag", written(lambda d: write_vhdx(d, flags=2)), "has a parent"),
    Item("vhdx-parent-locator", written(lambda d: write_vhdx(d, parent=True)), "has a parent"),
    Item("vhdx-log", written(lambda d: write_vhdx(d, log=b"L" * 16)), "its log is pending"),
    Item("vhdx-no-header", content(b"vhdxfile", size=8 * MIB), "has no header"),
    Item("vhdx-short", content(b"vhdxfile", size=4096), "ends within its header"),
    Item("vhdx-cut", then(written(write_vhdx), cut(512)), "failed"),
    Item(
        "vhdx-region-outside",
        tagged((192 << 10) + 32, b"\0\0\0\x40", written(write_vhdx)),
        "its region lies",
    ),
    Item(
        "vhdx-no-regions", tagged(192 << 10, b"x", written(write_vhdx)), "has an impossible header"
    ),
    Item(
        "vhdx-8-eib",
        tagged(3 * MIB + 65536 + 8, b"\0\0\0\0\0\0\0\x7f", written(write_vhdx)),
        "its block map lies",
    ),
]

# -- raw, and what is no image ----------------------------------------------------------------


def _no_image(name: str, data: bytes, says: str, at: int = 0) -> Item:
    return Item(f"raw-{name}", content(data, at, MIB), says)


_PAGE = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n" * 40
RAW_ITEMS = [
    Item("raw-empty", content(b""), "too short"),
    Item("raw-511", content(b"\1" * 511), "too short"),
    Item("raw-unaligned", then(written(bytes), cut(100)), "whole number of 512-byte sectors"),
    Item("raw-zeros", content(b"", size=MIB), "neither a partition table nor"),
    Item("raw-iso", iso, "an ISO 9660 file system, which does not boot"),
    Item("raw-html", content(_PAGE), "an HTML page"),
    Item("raw-html-declared", content(_PAGE), "an HTML page", declared="raw"),
    Item("raw-xml", content(b"\xef\xbb\xbf<?xml version='1.0'?><Error/>" * 40), "an XML document"),
    Item(
        "raw-json", content(json.dumps({"message": "not found"}).encode() * 40), "a JSON document"
    ),
    Item(
        "raw-lfs",
        content(b"version https://git-lfs.github.com/spec/v1\n" + b"o" * 600),
        "a git-LFS pointer",
    ),
    Item("raw-text", content(b"404: Not Found\n" * 80), "the image is text"),
    Item(
        "raw-huge",
        content(b"\x55\xaa", 510, 2 << 40),
        "a disk of 2 TiB, and max_virtual_size is 1 TiB",
    ),
    _no_image("qed", b"QED\0", "a QED disk"),
    _no_image("luks", b"LUKS\xba\xbe", "a LUKS volume"),
    _no_image("parallels", b"WithoutFreeSpace", "a Parallels disk"),
    _no_image("parallels-2", b"WithouFreSpacExt", "a Parallels disk"),
    _no_image("cloop", b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "a cloop disk"),
    _no_image("bochs", b"Bochs Virtual HD Image\0", "a Bochs disk"),
    _no_image("dmg", b"koly", "a DMG disk", MIB - 512),
    _no_image("android", b"\x3a\xff\x26\xed", "an Android sparse image"),
    _no_image("gzip", b"\x1f\x8b\x08", "unpacking gz"),
    _no_image("xz", b"\xfd7zXZ\0", "unpacking xz"),
    _no_image("zstd", b"\x28\xb5\x2f\xfd", "unpacking zst"),
    _no_image("bzip2", b"BZh91AY", "a bzip2 file"),
    _no_image("lz4", b"\x04\x22\x4d\x18", "unpacking lz4"),
    _no_image("tar", b"ustar", "the archive is damaged", 257),
    _no_image("zip", b"PK\x03\x04", "a zip archive"),
    _no_image("7zip", b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    _no_image("cpio", b"070701", "a cpio archive"),
    _no_image("cpio-odc", b"070707", "a cpio archive"),
    _no_image("wim", b"MSWIM\0\0\0", "a WIM archive"),
    _no_image("squashfs", b"hsqs", "a squashfs file system"),
    _no_image("elf", b"\x7fELF", "an ELF program"),
]

HOSTILE = [*QCOW2, *POLYGLOTS, *VMDK, *VDI, *VPC, *VHDX, *RAW_ITEMS]
