"""gnt-os and gnt-instance add, reinstall and their failures on a real Ganeti."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.settings import params
from tests.ganeti.conftest import Cluster

pytestmark = pytest.mark.cluster
DISK = "--disk 0:size=64M"


@pytest.fixture
def vm(cluster: Cluster) -> Iterator[str]:
    yield "vm1"
    cluster.remove("vm1")


def same_data(cluster: Cluster, disk: str, image: Path) -> None:
    """The image's data behind the partition table is on the disk, and the table is whole."""
    count = image.stat().st_size - (1 << 20) - 33 * 512
    cluster.run(f"cmp --ignore-initial=1M --bytes={count} {disk} {image}")
    assert "No problems found" in cluster.run(f"sgdisk -v {disk}")


def test_diagnose_and_info(cluster: Cluster) -> None:
    assert "cloudimage [global status: valid]" in cluster.run("gnt-os diagnose")
    info = cluster.run("gnt-os info cloudimage")
    assert "valid: True" in info
    assert "- debian-12" in info
    for name in params.NAMES:
        assert f"- {name}: " in info


def test_add_from_a_path(cluster: Cluster, vm: str, images: Path) -> None:
    image = images / "small.qcow2"
    cluster.add(vm, f"{DISK} -o cloudimage+default -O image={image}")
    disk = cluster.disk(vm)
    same_data(cluster, disk, images / "small.raw")
    table = cluster.run(f"sgdisk -p {disk}")
    assert "cidata" in table
    listing = cluster.run(f"mdir -b -i {disk}@@32768 ::/")
    for name in ("meta-data", "user-data", "vendor-data", "network-config"):
        assert f"::/{name}" in listing


def test_add_from_http(cluster: Cluster, vm: str, images: Path) -> None:
    cluster.run(
        f"cd {images}; sha256sum small.qcow2 > SHA256SUMS;"
        " nohup python3 -m http.server --bind 127.0.0.1 8000 > /tmp/httpd.log 2>&1 &"
    )
    cluster.run("curl -s --retry 9 --retry-connrefused -o /dev/null http://127.0.0.1:8000/")
    url = "http://127.0.0.1:8000"
    try:
        cluster.add(
            vm,
            f"{DISK} -o cloudimage+default"
            f" -O image={url}/small.qcow2,checksum={url}/SHA256SUMS,dns_servers=192.0.2.53",
        )
        same_data(cluster, cluster.disk(vm), images / "small.raw")
        missing = f"-O image={url}/none.qcow2"
        out = cluster.add("vm2", f"{DISK} -o cloudimage+default {missing}", 1)
        assert f"image: {url}/none.qcow2: " in out
        assert "404" in out
        # verify refused it: nothing was created
        assert "vm2" not in cluster.run("gnt-instance list")
    finally:
        cluster.run("pkill -f 'http.server --bind 127.0.0.1 8000'")


def test_a_failed_create_is_explained(cluster: Cluster, vm: str, images: Path) -> None:
    out = cluster.add(
        vm, f"--disk 0:size=16M -o cloudimage+default -O image={images}/small.qcow2", 1
    )
    assert "ERROR: " in out
    assert "32 MiB (33554432 bytes) do not fit on a disk of 16 MiB (16777216 bytes)" in out
    assert "use --disk 0:size=32M" in out
    disk = cluster.disk(vm)
    assert cluster.run(f"tr -d '\\0' < {disk} | wc -c").strip() == "0"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("-O format=qcow3,image=/x", "format=qcow3 (OS parameter): must be one of auto raw"),
        ("-O image=/nonexistent", "image: /nonexistent: No such file or directory"),
        ("-O image=/etc", "image: /etc: is a directory"),
        ("-O sead=auto", "sead"),  # Ganeti itself knows parameters.list
    ],
)
def test_a_bad_parameter_is_refused(cluster: Cluster, options: str, words: str) -> None:
    out = cluster.add("vm3", f"{DISK} -o cloudimage+default {options}", 1)
    assert words in out
    assert "vm3" not in cluster.run("gnt-instance list")


def test_reinstall(cluster: Cluster, vm: str, images: Path) -> None:
    image = f"image={images}/small.raw"
    cluster.add(vm, f"{DISK} -o cloudimage+default -O {image}")
    disk = cluster.disk(vm)
    cluster.run(f"tr '\\0' '\\377' < /dev/zero | dd of={disk} bs=1M count=64 conv=notrunc")
    cluster.run(f"gnt-instance reinstall -f -O {image} {vm}.example.com")
    same_data(cluster, disk, images / "small.raw")
    # what lay behind the image's end is not in the way of the next partition
    assert (
        cluster.run(f"dd if={disk} bs=1M skip=32 count=1 status=none | tr -d '\\0' | wc -c")
        == "0\n"
    )


def test_a_failing_hook(cluster: Cluster, vm: str, images: Path) -> None:
    hooks = "/etc/ganeti/instance-cloudimage/hooks.d/post"
    cluster.run(f"mkdir -p {hooks}; printf '#!/bin/sh\\necho no; exit 5\\n' > {hooks}/fail")
    cluster.run(f"chmod 755 {hooks}/fail")
    try:
        out = cluster.add(vm, f"{DISK} -o cloudimage+default -O image={images}/small.raw", 1)
    finally:
        cluster.run(f"rm -r {hooks}")
    assert "fail: no" in out
    assert "ERROR: hook post/fail ended with status 5" in out
    disk = cluster.disk(vm)
    assert cluster.run(f"head -c 1M {disk} | tr -d '\\0' | wc -c").strip() == "0"


def test_gnt_os_modify(cluster: Cluster) -> None:
    cluster.run("gnt-os modify -O dns_servers=192.0.2.1 cloudimage+default")
    out = cluster.run("gnt-os modify -O dns_servers=none cloudimage+default", 1)
    assert "dns_servers=none (OS parameter): must be IP addresses" in out
    cluster.run("gnt-os modify -O dns_servers= cloudimage+default")
