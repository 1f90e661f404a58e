"""Templates that Ganeti only passes through: ext, with a provider of our own, and sharedfile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ganeti.conftest import Cluster
from tests.ganeti.test_gnt_backup import EXPORTS, LAN, data, export, meta_data, restore, seed
from tests.images import MIB

pytestmark = pytest.mark.cluster
# one program under all names that Ganeti calls: a volume is a file behind a loop device
PROVIDER = r"""#!/bin/sh
set -e
file=/srv/ganeti/ext/$VOL_NAME
device() { losetup --noheadings --output NAME --associated "$file"; }
case ${0##*/} in
    create) truncate --size="${VOL_SIZE}M" "$file" ;;
    attach) found=$(device); echo "${found:-$(losetup --find --show "$file")}" ;;
    detach) found=$(device); [ -z "$found" ] || losetup --detach "$found" ;;
    grow) truncate --size="${VOL_NEW_SIZE}M" "$file"; losetup --set-capacity "$(device)" ;;
    remove) rm "$file" ;;
esac
"""
ACTIONS = "attach create detach grow remove setinfo verify"
SHARED = "/srv/ganeti/shared-file-storage"


@pytest.fixture(scope="module")
def provider(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    script = tmp_path_factory.mktemp("provider") / "script"
    script.write_text(PROVIDER)
    place = "/srv/ganeti/extstorage/files"
    cluster.run(
        f"mkdir -p {place} /srv/ganeti/ext /var/log/ganeti/extstorage &&"
        f" : > {place}/parameters.list &&"
        f" for name in {ACTIONS}; do install -m 755 {script} {place}/$name; done &&"
        " gnt-cluster modify --enabled-disk-templates=file,sharedfile,diskless,ext"
        " --ipolicy-disk-templates=file,sharedfile,diskless,ext"
    )
    yield "files"
    cluster.run(
        "gnt-cluster modify --enabled-disk-templates=file,sharedfile,diskless"
        " --ipolicy-disk-templates=file,sharedfile,diskless"
    )


@pytest.fixture(params=["ext", "sharedfile"])
def template(request: pytest.FixtureRequest, provider: str) -> tuple[str, str, str]:
    """Return a template, the options for a disk of it, and where its only disk is."""
    if request.param == "ext":
        return "ext", f",provider={provider}", "/srv/ganeti/ext/*"
    return "sharedfile", "", f"{SHARED}/*.example.com/*"


def test_add_rename_grow_and_backup(
    cluster: Cluster, images: Path, template: tuple[str, str, str]
) -> None:
    a_whole_life(cluster, images, "10.77.0.34", *template)
    left = "losetup --noheadings --output BACK-FILE | grep -c srv/ganeti/ext || :"
    assert cluster.run(left) in ("0\n",)


def a_whole_life(
    cluster: Cluster, images: Path, ip: str, kind: str, option: str, place: str
) -> None:
    """Add, rename, export, remove, import and grow an instance whose only disk is at `place`."""
    more = f"-t {kind} --ignore-ipolicy --disk 0:size=64M{option}"
    try:
        cluster.add(
            "vm4",
            f"{more} --net 0:ip={ip},{LAN} -o cloudimage+default -O image={images}/small.qcow2",
        )
        disk = cluster.run(f"ls -d {place}").strip()
        assert meta_data(seed(cluster, disk))["local-hostname"] == "vm4.example.com"
        size = int(cluster.run(f"stat -c %s {images}/small.raw"))
        part = f"head -c {size - MIB} {{}} | tail -c +{MIB + 1} | sha256sum"
        assert cluster.run(part.format(disk)) == cluster.run(part.format(images / "small.raw"))
        before = data(cluster, disk)
        cluster.run("gnt-instance rename --no-ip-check vm4.example.com vm5.example.com")
        disk = cluster.run(f"ls -d {place}").strip()
        assert meta_data(seed(cluster, disk))["local-hostname"] == "vm5.example.com"
        export(cluster, "vm5")
        cluster.remove("vm5")
        restore(cluster, "vm5", "vm5", more)
        disk = cluster.run(f"ls -d {place}").strip()
        assert data(cluster, disk) == before
        files = seed(cluster, disk)
        assert json.loads(files["meta-data"])["local-hostname"] == "vm5.example.com"
        cluster.run("gnt-instance grow-disk --ignore-ipolicy vm5.example.com 0 16M")
        assert int(cluster.run(f"stat -c %s {disk}")) == 80 * MIB
    finally:
        for name in ("vm4", "vm5"):
            cluster.attempt(f"gnt-instance remove -f --ignore-failures {name}.example.com")
        cluster.run(f"rm -rf {EXPORTS}/vm5.example.com")
