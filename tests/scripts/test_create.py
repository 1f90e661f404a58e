"""create as Ganeti runs it: what lands on the disk, and what bad input comes to."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lib import log
from tests import httpd
from tests.conftest import ROOT
from tests.images import MIB, assert_image, convert, disk_image
from tests.scripts.conftest import GAP, UUID, Door, seed_files


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    disk_image(folder / "gpt.raw")
    disk_image(folder / "mbr.raw", "mbr")
    convert(disk_image(folder / "small.raw", size_mib=8), "qcow2")
    for fmt in ("qcow2", "vmdk", "vdi", "vpc", "vhdx"):
        convert(folder / "gpt.raw", fmt)
    return folder


@pytest.mark.parametrize("fmt", ["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx"])
def test_every_format(door: Door, disk: Callable[..., Path], images: Path, fmt: str) -> None:
    target = disk()
    result = door("create", disks=[target], OSP_IMAGE=f"{images}/gpt.{fmt}")
    assert result.status == 0, result.log
    assert result.error == "create: vm1.example.com is ready"
    assert_image(target, images / "gpt.raw")
    assert target.stat().st_blocks * 512 < 20 * MIB
    assert door.leftovers() == []


@pytest.mark.parametrize("tool", ["gzip", "bzip2", "xz", "zstd", "lz4"])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_every_compression(
    door: Door, disk: Callable[..., Path], images: Path, tmp_path: Path, tool: str, fmt: str
) -> None:
    packed = tmp_path / "image"
    with packed.open("wb") as output, (images / f"small.{fmt}").open("rb") as source:
        subprocess.run([tool, "-1"], stdin=source, stdout=output, check=True)
    target = disk()
    result = door("create", disks=[target], OSP_IMAGE=str(packed))
    assert result.status == 0, result.log
    assert_image(target, images / "small.raw")


def test_archive(door: Door, disk: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    packed = tmp_path / "image.tar.gz"
    argv = ["tar", "-C", str(images), "--transform=s/.*/disk.raw/", "-Sczf", str(packed)]
    subprocess.run([*argv, "gpt.raw"], check=True)
    target = disk()
    result = door("create", disks=[target], OSP_IMAGE=str(packed))
    assert result.status == 0, result.log
    assert_image(target, images / "gpt.raw")


def test_http_with_a_list(door: Door, disk: Callable[..., Path], images: Path) -> None:
    data = (images / "gpt.qcow2").read_bytes()
    digest = hashlib.sha512(data).hexdigest()
    routes = {
        "/gpt.qcow2": httpd.content(data),
        "/SHA512SUMS": httpd.content(f"{digest}  gpt.qcow2\n".encode()),
    }
    with httpd.serve(routes) as server:
        osp = {
            "OSP_IMAGE": server.url("/gpt.qcow2"),
            "OSP_CHECKSUM": server.url("/SHA512SUMS"),
        }
        for _time in range(2):
            target = disk()
            result = door("create", disks=[target], **osp)
            assert result.status == 0, result.log
            assert_image(target, images / "gpt.raw")
            assert server.count("/gpt.qcow2") == 1
    (note,) = door.cache.glob("*.json")
    assert json.loads(note.read_text())["digests"] == {"sha512": digest}
    assert door.cache.stat().st_mode & 0o777 == 0o700
    # the server is gone: the last good image is used, and said so
    door.configure("[http]\nretries = 0\n")
    result = door("create", disks=[disk()], **osp)
    assert result.status == 0, result.log
    assert "WARNING: " in result.log
    assert "using the copy in the cache" in result.log


def test_the_seed(door: Door, disk: Callable[..., Path], images: Path) -> None:
    target = disk()
    user_data = b"#!/bin/sh\nprintf '\xc3\xa9\x00\xff'\n"
    result = door(
        "create",
        disks=[target],
        OSP_IMAGE=f"{images}/gpt.qcow2",
        OSP_USER_DATA="base64:" + base64.b64encode(user_data).decode(),
        OSP_DNS_SERVERS="192.0.2.53",
        NIC_0_IP="192.0.2.10",
        NIC_0_NETWORK_SUBNET="192.0.2.0/24",
        NIC_0_NETWORK_GATEWAY="192.0.2.1",
    )
    assert result.status == 0, result.log
    files = seed_files(target)
    assert files["user-data"] == user_data
    meta = json.loads(files["meta-data"])
    assert (meta["instance-id"], meta["local-hostname"]) == (UUID, "vm1.example.com")
    (nic,) = json.loads(files["network-config"])["config"]
    assert nic["mac_address"] == "aa:00:00:12:34:01"
    assert nic["subnets"][0]["address"] == "192.0.2.10/24"
    assert (
        "cidata"
        in subprocess.run(
            ["blkid", "-p", "-O", str(GAP), target], capture_output=True, text=True
        ).stdout
    )


def test_a_seed_disk(door: Door, disk: Callable[..., Path], images: Path) -> None:
    disks = [disk(), disk(4, "disk1"), disk(4, "disk2")]
    disks[1].write_bytes(b"\xff" * (4 * MIB))
    result = door("create", disks=disks, OSP_IMAGE=f"{images}/gpt.raw", DISK_2_NAME="cidata")
    assert result.status == 0, result.log
    assert set(seed_files(disks[2], 0)) == {
        "meta-data",
        "network-config",
        "user-data",
        "vendor-data",
    }
    assert disks[1].read_bytes() == b"\xff" * (4 * MIB)
    assert disks[0].read_bytes()[GAP : GAP + 512] == bytes(512)


def test_mbr(door: Door, disk: Callable[..., Path], images: Path) -> None:
    target = disk()
    result = door("create", disks=[target], OSP_IMAGE=f"{images}/mbr.raw")
    assert result.status == 0, result.log
    assert set(seed_files(target, 1024 * 512)) >= {"meta-data", "user-data"}
    assert target.read_bytes()[:440] == (images / "mbr.raw").read_bytes()[:440]


def test_no_seed(door: Door, disk: Callable[..., Path], images: Path) -> None:
    target = disk()
    result = door("create", disks=[target], OSP_IMAGE=f"{images}/gpt.raw", OSP_SEED="none")
    assert result.status == 0, result.log
    assert target.read_bytes()[GAP:MIB] == bytes(MIB - GAP)


def test_hooks(door: Door, disk: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    target = disk()
    for phase, script in (
        ("pre", 'echo "seed in $CLOUDIMAGE_SEED_DIR"; echo more > "$CLOUDIMAGE_SEED_DIR/extra"'),
        ("post", f'env > {tmp_path}/env; flock -n "$CLOUDIMAGE_TARGET" true'),
    ):
        folder = door.confdir / "hooks.d" / phase
        folder.mkdir(parents=True)
        (folder / "10-test").write_text(f"#!/bin/sh\nset -e\n{script}\n")
        (folder / "10-test").chmod(0o755)
    result = door("create", disks=[target], OSP_IMAGE=f"{images}/gpt.raw")
    assert result.status == 0, result.log
    assert "10-test: seed in /" in result.log
    assert seed_files(target)["extra"] == b"more\n"
    environment = (tmp_path / "env").read_text().splitlines()
    for line in (
        f"CLOUDIMAGE_TARGET={target}",
        f"CLOUDIMAGE_IMAGE={images}/gpt.raw",
        "CLOUDIMAGE_VARIANT=default",
        "CLOUDIMAGE_PHASE=post",
        f"INSTANCE_UUID={UUID}",
    ):
        assert line in environment


# --- bad input -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_images(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Path]:
    """Make the files that must be refused."""
    folder = tmp_path_factory.mktemp("bad")
    raw = (images / "gpt.raw").read_bytes()
    made = {
        "directory": folder,
        "empty": folder / "empty",
        "random": folder / "random",
        "html": folder / "page.html",
        "gz": folder / "cut.gz",
        "xz": folder / "cut.xz",
        "zst": folder / "cut.zst",
        "backing": folder / "backing.qcow2",
        "two": folder / "two.tar",
        "fifo": folder / "fifo",
    }
    made["empty"].touch()
    made["random"].write_bytes(b"\x01\x02\x03" * 1000)
    made["html"].write_text("<!DOCTYPE html><html><body>Please log in</body></html>" + " " * 4096)
    for tool, name in (("gzip", "gz"), ("xz", "xz"), ("zstd", "zst")):
        packed = subprocess.run([tool, "-1", "-c"], input=raw, capture_output=True, check=True)
        made[name].write_bytes(packed.stdout[:-1000])
    options = ["-f", "qcow2", "-b", str(images / "gpt.raw"), "-F", "raw"]
    subprocess.run(["qemu-img", "create", "-q", *options, str(made["backing"])], check=True)
    with tarfile.open(made["two"], "w") as tar:
        for name in ("a.raw", "b.raw"):
            member = tarfile.TarInfo(name)
            member.size = MIB
            tar.addfile(member, io.BytesIO(raw[:MIB]))
    os.mkfifo(made["fifo"])
    return made


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("directory", "is a directory"),
        ("empty", "is empty"),
        ("random", "neither a partition table"),
        ("html", "is an HTML page"),
        ("gz", "unpacking gz: it is cut short or damaged"),
        ("xz", "xz failed"),
        ("zst", "zstd failed"),
        ("backing", "backing"),
        ("two", "b.raw"),
        ("fifo", "is not a regular file"),
    ],
)
def test_bad_images(
    door: Door, disk: Callable[..., Path], bad_images: dict[str, Path], which: str, words: str
) -> None:
    path = bad_images[which]
    target = disk()
    result = door("create", disks=[target], OSP_IMAGE=str(path))
    assert result.status == 1
    assert result.error.startswith("ERROR: ")
    assert words in result.error
    assert str(path) in result.error
    assert target.stat().st_blocks == 0, "nothing is written for an image that is refused"
    assert door.leftovers() == []


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OSP_IMAGE": "gpt.raw"}, "image=gpt.raw (OS parameter): must be an absolute path"),
        ({"OSP_IMAGE": "/nonexistent/a.raw"}, "/nonexistent/a.raw: No such file or directory"),
        ({"OSP_IMAGE": "/dev/null"}, "/dev/null: is not a regular file"),
        ({"OSP_IMAGE": "ftp://h/a"}, "image=ftp://h/a (OS parameter): must be an absolute path"),
        ({"OSP_IMAGE": "http://127.0.0.1:1/a"}, "http://127.0.0.1:1/a"),
        ({"OSP_IMAGE": "http://nowhere.invalid/a"}, "nowhere.invalid"),
        ({"OSP_IMAGE": "/caf\u00e9.raw"}, r"image=/caf\xe9.raw (OS parameter): must be ASCII"),
        ({}, "image: variant default has no image of its own; give -O image="),
        ({"OSP_SEED": "disk"}, "seed=disk: no disk of the instance is named cidata"),
        ({"OSP_SSH_KEYS": "ssh-rsa x"}, "ssh_keys line 1"),
        ({"OSP_USER_DATA": "@/nonexistent"}, "reading user_data: /nonexistent: No such file"),
        ({"NIC_0_IP": "192.0.3.1"}, "NIC_0_IP=192.0.3.1 is outside NIC_0_NETWORK_SUBNET"),
        ({"OSP_METAD": "yes"}, "metad=yes: the instance has no communication NIC"),
        ({"DISK_COUNT": "0"}, "DISK_COUNT=0: the instance has no disk for the image"),
        ({"DISK_0_PATH": ""}, "DISK_0_PATH is not set and neither is its URI"),
        ({"DISK_0_PATH": "/nonexistent"}, "/nonexistent: no such disk"),
        ({"INSTANCE_NAME": ""}, "INSTANCE_NAME is not set"),
    ],
)
def test_bad_variables(
    door: Door, disk: Callable[..., Path], images: Path, variables: dict[str, str], words: str
) -> None:
    target = disk()
    more = {"NIC_0_NETWORK_SUBNET": "192.0.2.0/24", "OSP_IMAGE": f"{images}/gpt.raw", **variables}
    if not variables:
        del more["OSP_IMAGE"]
    door.configure("[http]\nretries = 0\n")
    result = door("create", disks=[target], **more)
    assert result.status == 1
    assert result.error.startswith("ERROR: ")
    assert words in result.error
    assert target.stat().st_blocks == 0
    assert door.leftovers() == []


@pytest.mark.parametrize(("status", "words"), [(404, "404"), (500, "500"), (403, "403")])
def test_bad_answers(door: Door, disk: Callable[..., Path], status: int, words: str) -> None:
    door.configure("[http]\nretries = 0\n")
    with httpd.serve({"/a": httpd.reply(status)}) as server:
        result = door("create", disks=[disk()], OSP_IMAGE=server.url("/a"))
    assert result.status == 1
    assert words in result.error
    assert server.url("/a") in result.error


def test_a_wrong_digest(door: Door, disk: Callable[..., Path], images: Path) -> None:
    target = disk()
    result = door(
        "create",
        disks=[target],
        OSP_IMAGE=f"{images}/gpt.qcow2",
        OSP_CHECKSUM="sha256:" + "0" * 64,
    )
    assert result.status == 1
    assert "0" * 64 in result.error
    assert target.stat().st_blocks == 0


def test_a_disk_that_is_too_small(door: Door, disk: Callable[..., Path], images: Path) -> None:
    target = disk(31)
    result = door("create", disks=[target], OSP_IMAGE=f"{images}/gpt.qcow2")
    assert result.status == 1
    assert "use --disk 0:size=32M" in result.error
    assert target.stat().st_blocks == 0


def test_a_missing_tool(
    door: Door, disk: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bwrap", "prlimit", "unshare", "sfdisk", "mkfs.vfat", "mcopy"):
        path = next(p for p in (Path(f"/usr/bin/{name}"), Path(f"/usr/sbin/{name}")) if p.exists())
        (folder / name).symlink_to(path)
    door.path = str(folder)
    result = door("create", disks=[disk()], OSP_IMAGE=f"{images}/gpt.qcow2")
    assert result.status == 1
    assert result.error == (
        "ERROR: qemu-img: not installed; install the package qemu-utils (EL: qemu-img)"
    )


def test_a_failure_after_the_first_byte(
    door: Door, disk: Callable[..., Path], images: Path
) -> None:
    folder = door.confdir / "hooks.d/post"
    folder.mkdir(parents=True)
    (folder / "fail").write_text("#!/bin/sh\nexit 1\n")
    (folder / "fail").chmod(0o755)
    target = disk()
    result = door("create", disks=[target], OSP_IMAGE=f"{images}/gpt.qcow2")
    assert result.status == 1
    assert target.read_bytes()[:MIB] == bytes(MIB)
    assert target.read_bytes()[-MIB:] == bytes(MIB)


def test_a_cancelled_job(door: Door, disk: Callable[..., Path], images: Path) -> None:
    folder = door.confdir / "hooks.d/post"
    folder.mkdir(parents=True)
    (folder / "wait").write_text(f"#!/bin/sh\ntouch {door.folder}/waiting; sleep 60\n")
    (folder / "wait").chmod(0o755)
    target = disk()
    environment = door.environment([target], {"OSP_IMAGE": f"{images}/gpt.qcow2"})
    child = subprocess.Popen([ROOT / "create"], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    while not (door.folder / "waiting").exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    _out, err = child.communicate(timeout=20)
    assert child.returncode == 128 + signal.SIGTERM
    assert err.splitlines()[-1].startswith(b"ERROR: interrupted by SIGTERM")
    assert target.read_bytes()[:MIB] == bytes(MIB)
    assert door.leftovers() == []


def test_no_secret_in_the_log(door: Door, disk: Callable[..., Path], images: Path) -> None:
    packed = httpd.content(gzip.compress((images / "gpt.raw").read_bytes(), 1))
    with httpd.serve({"/a": httpd.protected("user", "s3cret", packed)}) as server:
        url = server.url("/a", user="user:s3cret")
        result = door(
            "create",
            disks=[disk()],
            DEBUG_LEVEL="1",
            OSP_IMAGE=f"{url}?token=s3cret",
            OSP_USER_DATA="#cloud-config\npassword: s3cret",
        )
    assert result.status == 0, result.log
    assert "s3cret" not in result.log
    assert all("s3cret" not in path.read_text() for path in door.cache.glob("*.json"))


def test_the_log_is_what_ganeti_can_show(
    door: Door, disk: Callable[..., Path], images: Path
) -> None:
    result = door("create", disks=[disk(16)], OSP_IMAGE=f"{images}/gpt.qcow2")
    assert result.tail.splitlines()[-1] == result.error
    assert all(len(line) <= log.LINE_LIMIT + 10 for line in result.log.splitlines())
    assert len(result.log.splitlines()) <= 6


def test_what_costs_nothing_is_checked_first(
    door: Door, disk: Callable[..., Path], images: Path
) -> None:
    """A post hook that will be refused, before the image is fetched and written."""
    folder = door.confdir / "hooks.d/post"
    folder.mkdir(parents=True)
    (folder / "bad").write_text("#!/bin/sh\n")
    (folder / "bad").chmod(0o777)
    target = disk()
    result = door("create", disks=[target], OSP_IMAGE=f"{images}/gpt.qcow2")
    assert "others than root can write this file" in result.error
    assert result.log.splitlines() == [result.error]
    assert target.stat().st_blocks == 0


def test_a_clone_that_only_root_can_read(
    door: Door, disk: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    """As git makes it under umask 077; the decoder is another user."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "lib", clone / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("create", "variants.d"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, clone / name)
    for path in (clone, *clone.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o077)
    done = subprocess.run(
        [clone / "create"],
        cwd=clone,
        env=door.environment([disk()], {"OSP_IMAGE": f"{images}/gpt.qcow2"}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
