"""The doors on a real Ceph, with URIs as Ganeti gives them for access=userspace."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import httpd
from tests.conftest import ROOT
from tests.images import MIB, convert, disk_image
from tests.scripts.conftest import UUID, Door, Result, begun_import, impatient, seed_files
from tests.storage.ceph import Ceph

pytestmark = pytest.mark.storage
HOLE = 16 * MIB, 48 * MIB  # of the image
NEXT = "see that the storage serves this node and is not full (ceph health detail)"
Volume = Callable[..., str]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = disk_image(tmp_path_factory.mktemp("images") / "image.raw", size_mib=64)
    with path.open("r+b") as file:
        file.seek(HOLE[0])
        file.write(bytes(HOLE[1] - HOLE[0]))
    return path


@pytest.fixture
def volume(ceph: Ceph, tmp_path: Path) -> Volume:
    """Return a function that makes a volume, full of old bytes, and gives its name."""

    def make(mib: int = 80, name: str = "", pool: str = "vms") -> str:
        # a name that no other test has, as Ganeti's have a UUID in them
        name = f"{pool}/{tmp_path.name}{name}.rbd.disk0"
        ceph.run("rbd", "create", f"--size={mib}M", name)
        address = f"rbd:{name}:conf={ceph.config}"
        command = ["qemu-io", "-f", "raw", "-c", f"write -P 0xff 0 {mib}M", address]
        subprocess.run(command, check=True, capture_output=True)
        return name

    return make


def read(ceph: Ceph, name: str, file: Path) -> bytes:
    """Read a volume with Ceph's own tool."""
    file.unlink(missing_ok=True)
    ceph.run("rbd", "export", "--no-progress", name, str(file))
    return file.read_bytes()


def used(ceph: Ceph, name: str) -> int:
    return sum(int(part["length"]) for part in ceph.ask("rbd", "diff", name))


def create(door: Door, source: str, uri: str) -> Result:
    given = {"DISK_COUNT": "1", "DISK_0_URI": uri, "DISK_0_ACCESS": "rw"}
    return door("create", disks=[], OSP_IMAGE=source, **given)


def left(ceph: Ceph, door: Door, name: str) -> list[object]:
    """Return what a door left: files, servers, the volume's watchers and locks."""
    servers = subprocess.run(["pgrep", "-f", f"rbd:{name}"], capture_output=True).stdout.split()
    watchers = ceph.ask("rbd", "status", name)["watchers"]
    return [*door.leftovers(), *servers, *watchers, *ceph.ask("rbd", "lock", "ls", name)]


@pytest.mark.parametrize("more", ["", ":id=ganeti:conf={}"])
@pytest.mark.parametrize("source", ["path", "http"])
def test_create_and_rename(
    ceph: Ceph, door: Door, volume: Volume, image: Path, tmp_path: Path, more: str, source: str
) -> None:
    name = volume()
    uri = f"rbd:{name}{more.format(ceph.config)}"
    packed = convert(image, "qcow2")
    with httpd.serve({"/image": httpd.content(packed.read_bytes())}) as server:
        place = str(packed) if source == "path" else server.url("/image")
        result = create(door, place, uri)
    assert result.status == 0, result.log
    got, want = read(ceph, name, tmp_path / "disk"), image.read_bytes()
    assert got[:440] == want[:440]
    assert got[MIB : 63 * MIB] == want[MIB : 63 * MIB]
    assert got[-512:].startswith(b"EFI PART")
    assert json.loads(seed_files(tmp_path / "disk")["meta-data"])["instance-id"] == UUID
    # the hole has given back what the old bytes took; those behind the image are left alone
    assert used(ceph, name) <= 80 * MIB - (HOLE[1] - HOLE[0])
    assert not left(ceph, door, name)
    given = {"DISK_COUNT": "1", "DISK_0_URI": uri, "INSTANCE_NAME": "vm2.example.com"}
    renamed = door("rename", disks=[], **given)
    assert renamed.status == 0, renamed.log
    read(ceph, name, tmp_path / "disk")
    meta_data = json.loads(seed_files(tmp_path / "disk")["meta-data"])
    assert meta_data["local-hostname"] == "vm2.example.com"
    assert not left(ceph, door, name)


def test_export_and_import(
    ceph: Ceph, door: Door, volume: Volume, image: Path, tmp_path: Path
) -> None:
    first, second, dump = volume(name="a"), volume(96, name="b"), tmp_path / "dump"
    assert create(door, str(image), f"rbd:{first}").status == 0
    given = {"EXPORT_DISK_URI": f"rbd:{first}", "EXPORT_INDEX": "0"}
    with dump.open("wb") as output:
        subprocess.run(
            [*door.wrapper, ROOT / "export"],
            env=door.environment([], given),
            stdin=subprocess.DEVNULL,
            stdout=output,
            check=True,
        )
    given = {"IMPORT_DISK_URI": f"rbd:{second}", "IMPORT_INDEX": "0"}
    with dump.open("rb") as stream:
        result = door("import", disks=[], stdin=stream, **given)
    assert result.status == 0, result.log
    want, got = read(ceph, first, tmp_path / "a"), read(ceph, second, tmp_path / "b")
    assert got[MIB : 79 * MIB] == want[MIB : 79 * MIB]
    assert seed_files(tmp_path / "b") == seed_files(tmp_path / "a")
    assert got[-512:].startswith(b"EFI PART")  # the table was spread over the larger disk
    assert used(ceph, second) <= 96 * MIB - (HOLE[1] - HOLE[0])
    assert not left(ceph, door, first)
    assert not left(ceph, door, second)


def test_an_osd_that_stops(
    ceph: Ceph, door: Door, volume: Volume, image: Path, tmp_path: Path
) -> None:
    name = volume()
    uri = f"rbd:{name}"
    dump = image.read_bytes()
    child = begun_import(door, uri, 5, dump[: 8 * MIB])
    while any(read(ceph, name, tmp_path / "disk")[:MIB]):  # wiped before anything is written
        assert child.poll() is None
    with ceph.stopped_osd():
        started = time.monotonic()
        said = child.communicate(dump[8 * MIB :], timeout=60)[1].decode("ascii")
        assert time.monotonic() - started < 25
        assert child.returncode == 1
        assert said.splitlines()[-1] == (
            f"ERROR: importing to {uri}: {uri}: the storage did not answer within 5 s; {NEXT},"
            " then run this again"
        )
        servers = subprocess.run(["pgrep", "-f", uri], capture_output=True).stdout
        assert not servers
    content = read(ceph, name, tmp_path / "disk")
    assert not any(content[:MIB])
    assert not any(content[-MIB:])
    assert create(door, str(image), uri).status == 0


@pytest.mark.parametrize("client", ["reader", "half"])
def test_a_key_that_may_not_write(
    ceph: Ceph, door: Door, volume: Volume, image: Path, tmp_path: Path, client: str
) -> None:
    name = volume()
    before = read(ceph, name, tmp_path / "disk")
    result = create(door, str(image), f"rbd:{name}:id={client}")
    assert result.status == 1
    assert result.error.startswith(f"ERROR: rbd:{name}:id={client}: "), result.log
    assert result.error.endswith(
        "Operation not permitted; let the node's key write to it (Ceph: osd 'profile rbd pool=...')"
    )
    assert read(ceph, name, tmp_path / "disk") == before
    assert not left(ceph, door, name)


def test_a_full_pool(ceph: Ceph, door: Door, volume: Volume, image: Path) -> None:
    ceph.add_pool("small")
    name = volume(pool="small")
    ceph.run("ceph", "osd", "pool", "set-quota", "small", "max_bytes", str(MIB))
    deadline = time.monotonic() + 60
    while "running out of quota" not in ceph.run("ceph", "health", "detail"):
        assert time.monotonic() < deadline
        time.sleep(1)
    given = {"OSP_IMAGE": str(image), "DISK_COUNT": "1", "DISK_0_URI": f"rbd:{name}"}
    result = door(impatient("create", 3), disks=[], **given)
    assert result.status == 1
    assert result.error.startswith(f"ERROR: rbd:{name}: the storage did not ")
    assert result.error.endswith(f" within 3 s; {NEXT}, then run this again")
    assert not door.leftovers()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("rbd:vms/nosuch", "error reading header from nosuch: No such file or directory"),
        ("rbd:nosuch/disk", "error opening pool nosuch: No such file or directory"),
        ("rbd:vms/disk:id=nobody", "error connecting: No such file or directory"),
    ],
)
def test_what_is_not_there(door: Door, image: Path, uri: str, words: str) -> None:
    result = create(door, str(image), uri)
    assert result.status == 1
    assert result.error == f"ERROR: {uri}: qemu-nbd: {words}"


@pytest.mark.parametrize("uri", ["rbd:vms/disk", "gluster://127.0.0.1:24007/vms/disk"])
def test_without_the_driver(door: Door, image: Path, uri: str) -> None:
    modules = next(Path("/usr/lib").glob("**/qemu/block-rbd.so")).parent
    hide = f'mount -t tmpfs none {modules} && exec "$@"'
    door.wrapper = ["unshare", "--mount", "sh", "-c", hide, "sh"]
    result = create(door, str(image), uri)
    assert result.status == 1
    assert result.error == (
        f"ERROR: {uri}: qemu-nbd: Unknown protocol '{uri.partition(':')[0]}'; install qemu's"
        " driver for it: qemu-block-extra (EL: qemu-kvm-block-*)"
    )
