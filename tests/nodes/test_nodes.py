"""Everything that the doors do, on every release that the README names, by its own tools.

Images are made, and disks read back, outside, with the tools of this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import corpus, httpd
from tests.conftest import require
from tests.images import MIB, assert_image, convert, disk_image
from tests.nodes.conftest import BUNDLE, Node
from tests.scripts.conftest import GAP, UUID, seed_files
from tests.tars import ovf

pytestmark = pytest.mark.nodes
MBR_GAP = 1024 * 512
FORMATS = ["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx"]
PACKERS = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "zstd", "lz4": "lz4"}
DECODED = [item for item in corpus.GOOD if item.verdict is None]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with gpt.raw and mbr.raw, and gpt in every form that an image can have."""
    require("qemu-img", "sfdisk", "sgdisk", "mdir", *PACKERS.values())
    folder = tmp_path_factory.mktemp("images")
    disk_image(folder / "mbr.raw", "mbr", 12)
    raw = disk_image(folder / "gpt.raw", size_mib=12)
    for fmt in FORMATS[1:]:
        convert(raw, fmt, *(["force_size=on"] if fmt == "vpc" else []))
    for suffix, packer in PACKERS.items():
        with raw.open("rb") as source, (folder / f"gpt.raw.{suffix}").open("wb") as output:
            subprocess.run([packer, "-1"], stdin=source, stdout=output, check=True)
    stream = folder / "stream.vmdk"
    options = ["-O", "vmdk", "-o", "subformat=streamOptimized"]
    subprocess.run(["qemu-img", "convert", *options, raw, stream], check=True)
    with tarfile.open(folder / "gpt.tar.gz", "w:gz") as archive:
        archive.add(raw, "disk.raw")
    with tarfile.open(folder / "gpt.ova", "w", format=tarfile.USTAR_FORMAT) as archive:
        envelope = folder / "gpt.ovf"
        envelope.write_bytes(ovf(href="stream.vmdk"))
        archive.add(envelope, "gpt.ovf")
        archive.add(stream, "stream.vmdk")
    return folder


IMAGES = [f"gpt.{suffix}" for suffix in FORMATS]
IMAGES += [f"gpt.raw.{suffix}" for suffix in PACKERS]
IMAGES += ["gpt.tar.gz", "gpt.ova"]


@pytest.fixture
def disk(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a sparse disk of some MiB, full of holes."""

    def make(mib: int = 20, name: str = "disk0") -> Path:
        path = tmp_path / name
        path.touch()
        os.truncate(path, mib * MIB)
        return path

    return make


def listed(disk: Path) -> set[tuple[int, str]]:
    """Return first sector and name (MBR: type) of the disk's partitions."""
    argv = ["sfdisk", "--json", str(disk)]
    table = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return {(p["start"], p.get("name", p["type"])) for p in table["partitiontable"]["partitions"]}


def test_verify(node: Node, images: Path) -> None:
    error = node.refused("verify", "parameters", disks=[], OSP_IMAGE="/nowhere")
    assert error == "ERROR: image: /nowhere: No such file or directory"
    assert node.door("verify", "parameters", disks=[], OSP_IMAGE=f"{images}/gpt.raw") == ""


@pytest.mark.parametrize("name", IMAGES)
def test_create_from_a_path(node: Node, disk: Callable[..., Path], images: Path, name: str) -> None:
    target = disk()
    log = node.door("create", disks=[target], OSP_IMAGE=f"{images}/{name}")
    assert log.splitlines()[-1] == "create: vm1.example.com is ready"
    assert_image(target, images / "gpt.raw")
    assert json.loads(seed_files(target)["meta-data"])["instance-id"] == UUID


@pytest.mark.parametrize("name", IMAGES)
def test_create_over_http(node: Node, disk: Callable[..., Path], images: Path, name: str) -> None:
    target = disk()
    sums = subprocess.run(["sha256sum", name], cwd=images, check=True, capture_output=True).stdout
    routes = {
        f"/{name}": httpd.content((images / name).read_bytes()),
        "/SHA256SUMS": httpd.content(sums),
    }
    with httpd.serve(routes) as server:
        osp = {"OSP_IMAGE": server.url(f"/{name}"), "OSP_CHECKSUM": server.url("/SHA256SUMS")}
        node.door("create", disks=[target], **osp)
        assert server.count(f"/{name}") == 1
    assert_image(target, images / "gpt.raw")


@pytest.mark.parametrize("item", DECODED, ids=lambda item: item.name)
def test_every_kind_of_image(
    node: Node, disk: Callable[..., Path], tmp_path: Path, item: corpus.Item
) -> None:
    corpus.prepare(tmp_path)
    item.build(tmp_path)
    target = disk(4)
    osp = {"OSP_IMAGE": f"{tmp_path}/image", "OSP_FORMAT": item.declared, "OSP_SEED": "none"}
    if (node.release, item.name) == ("debian-11", "qcow2-zstd"):
        error = node.refused("create", disks=[target], **osp)
        assert "this node's qemu-img was built without zstd; convert the image elsewhere" in error
        return
    node.door("create", disks=[target], **osp)
    assert target.read_bytes() == corpus.base()


@pytest.mark.parametrize("mib", [20, 3 << 20])
@pytest.mark.parametrize("seed", ["gap", "tail"])
@pytest.mark.parametrize("layout", ["gpt", "mbr"])
def test_the_seed(
    node: Node, disk: Callable[..., Path], images: Path, layout: str, seed: str, mib: int
) -> None:
    target = disk(mib)
    osp = {"OSP_IMAGE": f"{images}/{layout}.raw", "OSP_SEED": seed}
    node.door("create", disks=[target], **osp)
    ((first, name),) = listed(target) - listed(images / f"{layout}.raw")
    assert name == ("cidata" if layout == "gpt" else "6")
    if seed == "gap":
        assert first * 512 == (GAP if layout == "gpt" else MBR_GAP)
    assert json.loads(seed_files(target, first * 512)["meta-data"])["instance-id"] == UUID


def test_export_and_import(
    node: Node, disk: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    source, target = disk(), disk(24, "disk1")
    node.door("create", disks=[source], OSP_IMAGE=f"{images}/gpt.qcow2")
    place = {"EXPORT_DEVICE": str(source), "EXPORT_DISK_PATH": str(source), "EXPORT_INDEX": "0"}
    node.pipe(f"( cd {BUNDLE} && ./export; ) | cat > {tmp_path}/dump", **place)
    assert (tmp_path / "dump").read_bytes()[:4] == b"\x28\xb5\x2f\xfd"
    place = {"IMPORT_DEVICE": str(target), "IMPORT_DISK_PATH": str(target), "IMPORT_INDEX": "0"}
    node.pipe(f"cat {tmp_path}/dump | ( cd {BUNDLE} && ./import; )", **place)
    assert_image(target, images / "gpt.raw")
    assert seed_files(target) == seed_files(source)


@pytest.mark.parametrize(("layout", "offset"), [("gpt", GAP), ("mbr", MBR_GAP)])
def test_rename(
    node: Node, disk: Callable[..., Path], images: Path, layout: str, offset: int
) -> None:
    target = disk()
    node.door("create", disks=[target], OSP_IMAGE=f"{images}/{layout}.raw")
    names = {"INSTANCE_NAME": "vm2.example.com", "OLD_INSTANCE_NAME": "vm1.example.com"}
    node.door("rename", disks=[target], **names)
    meta = json.loads(seed_files(target, offset)["meta-data"])
    assert (meta["instance-id"], meta["local-hostname"]) == (UUID, "vm2.example.com")


def test_the_command(node: Node, disk: Callable[..., Path], images: Path) -> None:
    osp = {"OSP_IMAGE": f"{images}/gpt.qcow2"}
    node.door("create", disks=[disk()], **osp)
    assert f"{images}/gpt.qcow2" in node.run("cloudimage", "cache")
    assert "debian-12" in node.run("cloudimage", "variants")
