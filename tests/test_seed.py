"""lib/guest/seed.py: the documents, the FAT volume and what a rename makes of them."""

from __future__ import annotations

import email
import gzip
import json
import os
import subprocess
import sys
from email.message import Message
from pathlib import Path
from typing import Any, Optional

import pytest

from lib.errors import Error
from lib.guest import seed
from tests.conftest import require

NAME, UUID = "web1.example.com", "7eb7a864-32d5-4cce-a37f-4dfde4aaf87e"
OTHER, THIRD = "11111111-2222-4333-8444-555555555555", "99999999-8888-4777-8666-555555555555"
ED25519 = "ssh-ed25519 AAAA me"
NETWORK = b'{"version": 1, "config": []}\n'


def write(directory: Path, **changed: Any) -> Path:
    values: dict[str, Any] = {
        "name": NAME,
        "uuid": UUID,
        "ssh_keys": [],
        "user_data": b"",
        "vendor_data": b"",
        "network": NETWORK,
    }
    directory.mkdir(exist_ok=True)
    for file, text in seed.texts(**{**values, **changed}).items():
        (directory / file).write_bytes(text)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- the documents


def test_meta_data_is_json_with_the_identity(tmp_path: Path) -> None:
    keys = ["ssh-ed25519 AAAA J\u00fcrgen", 'ssh-rsa BBBB "]}\\']
    text = (write(tmp_path, ssh_keys=keys) / "meta-data").read_bytes()
    assert json.loads(text) == {
        "instance-id": UUID,
        "local-hostname": NAME,
        "ganeti": {"uuid": UUID, "name": NAME},
        "public-keys": keys,
        "public_keys": keys,
    }
    assert "J\u00fcrgen".encode() in text
    assert b"\t" not in text


def test_no_key_no_list(tmp_path: Path) -> None:
    assert "public-keys" not in json.loads((write(tmp_path) / "meta-data").read_bytes())


USER_DATA = {
    "cloud-config": b"#cloud-config\nhostname: x",
    "script with CR LF and no end": b"#!/bin/sh\r\necho \xc3\xa9",
    "gzip": gzip.compress(b"#cloud-config\n"),
    "any bytes": bytes(range(256)),
}


@pytest.mark.parametrize("data", USER_DATA.values(), ids=USER_DATA)
def test_user_data_goes_through_byte_for_byte(tmp_path: Path, data: bytes) -> None:
    assert (write(tmp_path, user_data=data) / "user-data").read_bytes() == data


def test_no_user_data_is_an_empty_file(tmp_path: Path) -> None:
    assert (write(tmp_path) / "user-data").read_bytes() == b""


def test_network_config_is_given_or_disabled(tmp_path: Path) -> None:
    assert (write(tmp_path / "given") / "network-config").read_bytes() == NETWORK
    text = (write(tmp_path / "none", network=None) / "network-config").read_bytes()
    assert json.loads(text)["config"] == "disabled"


def test_include_once() -> None:
    assert seed.include_once("http://169.254.169.254/ganeti/latest/user-data") == (
        b"#include-once\nhttp://169.254.169.254/ganeti/latest/user-data\n"
    )


# --- vendor data; what cloud-init makes of it is in test_stages.py


def parts(text: bytes) -> list[Message]:
    return [part for part in email.message_from_bytes(text).walk() if not part.is_multipart()]


def vendor(directory: Path, theirs: bytes) -> bytes:
    return (write(directory, vendor_data=theirs) / "vendor-data").read_bytes()


def test_vendor_data_of_ours(tmp_path: Path) -> None:
    head, _newline, text = vendor(tmp_path, b"").partition(b"\n")
    assert head == b"#cloud-config"
    assert json.loads(text) == {"updates": {"network": {"when": ["boot"]}}}


MIME = b"""\
Content-Type: multipart/mixed; boundary="XX"
MIME-Version: 1.0

--XX
Content-Type: text/x-shellscript

#!/bin/sh
--XX
Content-Type: text/cloud-config

#cloud-config
packages: [jq]
--XX--
"""
VENDOR_DATA = {
    "cloud-config": (b"#cloud-config\npackages: [jq]", [b"#cloud-config\npackages: [jq]"]),
    "jinja": (b"## template: jinja\n#cloud-config\n{}", [b"## template: jinja\n#cloud-config\n{}"]),
    "any bytes": (bytes(range(256)), [bytes(range(256))]),
    "a boundary": (b"#!/bin/sh\n--XX--\n", [b"#!/bin/sh\n--XX--\n"]),
    "MIME": (MIME, [b"#!/bin/sh", b"#cloud-config\npackages: [jq]"]),
}


@pytest.mark.parametrize("theirs, found", VENDOR_DATA.values(), ids=VENDOR_DATA)
def test_vendor_data_of_the_user_follows_ours(
    tmp_path: Path, theirs: bytes, found: list[bytes]
) -> None:
    text = vendor(tmp_path / "plain", theirs)
    assert [part.get_payload(decode=True) for part in parts(text)[1:]] == found
    compressed = vendor(tmp_path / "gzip", gzip.compress(theirs))
    assert gzip.decompress(compressed) == text
    assert vendor(tmp_path / "again", theirs) == text


def test_vendor_data_is_unpacked_once_as_cloud_init_does(tmp_path: Path) -> None:
    inner = gzip.compress(b"#!/bin/sh")
    text = gzip.decompress(vendor(tmp_path, gzip.compress(inner)))
    assert parts(text)[1].get_payload(decode=True) == inner


def test_all_members_of_gzip_vendor_data_count(tmp_path: Path) -> None:
    """As in what cat or pigz made; zeroes behind them are gzip's padding."""
    theirs = gzip.compress(b"#!/bin/sh\n") + gzip.compress(b"echo all\n")
    for padding in (b"", bytes(100)):
        text = gzip.decompress(vendor(tmp_path, theirs + padding))
        assert parts(text)[1].get_payload(decode=True) == b"#!/bin/sh\necho all\n"
    with pytest.raises(Error, match="it is cut short"):
        write(tmp_path, vendor_data=theirs[:-9])
    with pytest.raises(Error, match="more than 32 MiB"):
        write(tmp_path, vendor_data=gzip.compress(bytes(17 << 20)) * 2)


def test_bad_gzip_vendor_data(tmp_path: Path) -> None:
    good = gzip.compress(b"#cloud-config\n")
    with pytest.raises(Error) as raised:
        write(tmp_path, vendor_data=good[:-9])
    assert str(raised.value) == (
        "vendor_data is damaged gzip data: it is cut short; compress it again"
    )
    with pytest.raises(Error) as raised:
        write(tmp_path, vendor_data=gzip.compress(bytes(33 << 20)))
    assert str(raised.value) == (
        "vendor_data is more than 32 MiB when unpacked; let it fetch what is large"
    )


# --- the volume

SECTORS = {"512": 512, "gap": 960, "odd": 1985, "gap from 64": 1984, "tail": 8192}


def output_of(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("sectors", SECTORS.values(), ids=SECTORS)
def test_volume_is_read_by_other_tools(tmp_path: Path, sectors: int) -> None:
    require("blkid", "bwrap", "fsck.vfat", "mcopy", "mkfs.vfat")
    source = write(tmp_path / "seed", user_data=bytes(range(256)), network=None)
    (source / "extra_of-a-hook.json").write_bytes(b"{}")
    path = tmp_path / "volume"
    seed.volume(source, sectors * 512, path)
    assert path.stat().st_size == sectors * 512
    assert path.stat().st_mode & 0o777 == 0o600
    found = dict(
        line.split("=") for line in output_of("blkid", "-p", "-oexport", str(path)).split()
    )
    assert (found["TYPE"], found["LABEL"], found["LABEL_FATBOOT"]) == ("vfat", "cidata", "cidata")
    output_of("fsck.vfat", "-n", str(path))
    assert "is cidata" in output_of("mdir", "-i", str(path), "::")
    names = output_of("mdir", "-b", "-i", str(path), "::").split()
    assert names == sorted(f"::/{name}" for name in (*seed.FILES, "extra_of-a-hook.json"))
    assert seed.read_volume(path) == contents(source)


def test_the_same_seed_makes_the_same_volume(tmp_path: Path) -> None:
    require("bwrap", "mcopy", "mkfs.vfat")
    for name in ("a", "b"):
        source = write(tmp_path / name)
        os.utime(source / "meta-data", (1, 10**9 + ord(name)))
        seed.volume(source, 1 << 20, tmp_path / f"{name}.img")
    assert (tmp_path / "a.img").read_bytes() == (tmp_path / "b.img").read_bytes()


def test_a_large_disk_gets_a_small_volume(tmp_path: Path) -> None:
    require("bwrap", "mcopy", "mkfs.vfat")
    path = tmp_path / "volume"
    seed.volume(write(tmp_path / "seed"), 1 << 30, path)
    assert path.stat().st_size == 32 << 20
    assert path.stat().st_blocks * 512 < 1 << 20
    assert seed.read_volume(path).keys() == set(seed.FILES)


def test_a_volume_can_be_filled_to_the_last_cluster(tmp_path: Path) -> None:
    require("bwrap", "mcopy", "mkfs.vfat")
    source = write(tmp_path / "seed")
    others = sum(-(-len(text) // 512) * 512 for text in contents(source).values())
    room = (512 - 1 - 2 * 2 - 32) * 512
    (source / "large").write_bytes(os.urandom(room - others))
    seed.volume(source, 512 * 512, tmp_path / "full")
    assert seed.read_volume(tmp_path / "full") == contents(source)
    (source / "large").write_bytes(bytes(room - others + 1))
    with pytest.raises(Error) as raised:
        seed.volume(source, 512 * 512, tmp_path / "too small")
    assert str(raised.value) == (
        "the seed's files need 243712 bytes, but its place holds 243200; give the seed a disk of"
        " its own with --disk 1:size=32m,name=cidata and seed=disk"
    )


def test_the_nodes_mtools_configuration_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("bwrap", "mcopy", "mkfs.vfat")
    (tmp_path / "mtoolsrc").write_text("MTOOLS_NO_VFAT=1\nMTOOLS_LOWER_CASE=1\n")
    monkeypatch.setenv("MTOOLSRC", str(tmp_path / "mtoolsrc"))
    monkeypatch.setenv("MTOOLS_NO_VFAT", "1")
    seed.volume(write(tmp_path / "seed"), 1 << 20, tmp_path / "volume")
    assert seed.read_volume(tmp_path / "volume").keys() == set(seed.FILES)


def test_mkfs_does_not_warn(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    require("bwrap", "mcopy", "mkfs.vfat")
    seed.volume(write(tmp_path / "seed"), 1 << 20, tmp_path / "volume")
    assert capfd.readouterr() == ("", "")


def refusal(source: Path) -> str:
    """Return what is said of a folder that makes no seed, of which no volume is left."""
    volume = source.parent / "volume"
    with pytest.raises(Error) as raised:
        seed.volume(source, 1 << 20, volume)
    assert not volume.exists()
    return str(raised.value)


def test_what_a_hook_must_not_leave(tmp_path: Path) -> None:
    source = write(tmp_path / "seed")
    (source / "folder").mkdir()
    assert refusal(source) == (
        "folder in CLOUDIMAGE_SEED_DIR is no regular file;"
        " let the pre hooks write regular files only"
    )
    (source / "folder").rmdir()
    (source / "link").symlink_to("/etc/shadow")
    assert refusal(source).startswith("link in CLOUDIMAGE_SEED_DIR is no regular file")
    (source / "link").unlink()
    (source / "a:b").write_bytes(b"")
    assert refusal(source) == (
        "'a:b' in CLOUDIMAGE_SEED_DIR is no name for a file of the seed;"
        " let the pre hooks use letters, digits, dots, - and _, at most 64"
    )
    (source / "a:b").unlink()
    for number in range(61):
        (source / str(number)).write_bytes(b"")
    assert refusal(source) == (
        "CLOUDIMAGE_SEED_DIR holds 65 files, the seed takes 64; let the pre hooks write fewer"
    )
    for number in range(61):
        (source / str(number)).unlink()
    (source / "meta-data").unlink()
    assert refusal(source) == (
        "meta-data is gone from CLOUDIMAGE_SEED_DIR;"
        " let the pre hooks change the seed's files, or empty them, but not take them away"
    )


def test_as_many_files_as_the_seed_takes(tmp_path: Path) -> None:
    require("bwrap", "mcopy", "mkfs.vfat")
    source = write(tmp_path / "seed")
    for number in range(60):
        (source / f"{number:064}").write_bytes(b"x")
    seed.volume(source, 512 * 512, tmp_path / "volume")
    assert len(output_of("mdir", "-b", "-i", str(tmp_path / "volume"), "::").split()) == 64


# --- reading what a guest may have changed


def made_volume(tmp_path: Path) -> Path:
    require("bwrap", "mcopy", "mkfs.vfat")
    path = tmp_path / "volume"
    seed.volume(write(tmp_path / "seed"), 1 << 20, path)
    return path


def root_entry(volume: bytes, short_name: bytes) -> int:
    """Return the offset of a file's entry in the root directory."""
    return volume.index(short_name.ljust(11))


def test_folders_and_odd_names_of_the_guest_are_left_out(tmp_path: Path) -> None:
    path = made_volume(tmp_path)
    (tmp_path / "odd").write_bytes(b"x")
    subprocess.run(["mmd", "-i", path, "::System Volume Information", "::sub"], check=True)
    for name in ("a b", "$(reboot)", "-n", "caf\u00e9"):
        argv = ["mcopy", "-i", str(path), str(tmp_path / "odd"), f"::{name}"]
        subprocess.run(argv, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert seed.read_volume(path).keys() == set(seed.FILES)


@pytest.mark.parametrize("damage", [b"\0", b"\xff"], ids=["zeroes", "ones"])
def test_a_volume_that_is_none(tmp_path: Path, damage: bytes) -> None:
    require("bwrap", "mcopy")
    (tmp_path / "volume").write_bytes(damage * (1 << 20))
    with pytest.raises(Error) as raised:
        seed.read_volume(tmp_path / "volume")
    assert str(raised.value) == (
        "the seed cannot be read: it holds no meta-data;"
        " mend it in the guest, or write a new one with gnt-instance reinstall"
    )


def test_files_larger_than_any_seed(tmp_path: Path) -> None:
    """Two entries for the same clusters, together larger than the volume."""
    require("bwrap", "mcopy", "mkfs.vfat")
    path = tmp_path / "volume"
    source = write(tmp_path / "seed")
    (source / "one").write_bytes(bytes(20 << 20))
    seed.volume(source, 32 << 20, path)
    volume = bytearray(path.read_bytes())
    free = volume.index(bytes(32), root_entry(bytes(volume), b"VENDOR~1"))
    one = root_entry(bytes(volume), b"ONE")
    free += -(free - one) % 32
    volume[free : free + 32] = b"TWO" + volume[one + 3 : one + 32]
    path.write_bytes(volume)
    with pytest.raises(Error) as raised:
        seed.read_volume(path)
    assert str(raised.value) == (
        "the seed cannot be read: its files are larger than 32 MiB;"
        " mend it in the guest, or write a new one with gnt-instance reinstall"
    )


def test_hostile_volumes_end_in_an_error_or_in_bounded_files(tmp_path: Path) -> None:
    """A file of 4 GiB in its entry, a chain that bites its tail, a cut volume, noise in the FAT."""
    good = made_volume(tmp_path).read_bytes()
    entry = root_entry(good, b"USER-D~1")
    fat = 512
    huge = bytearray(good)
    huge[entry + 28 : entry + 32] = b"\xff\xff\xff\xff"
    loop = bytearray(huge)
    loop[fat + 3 : fat + 400] = b"\x02\x20\x00" * 132 + b"\0"
    noise = bytearray(good)
    noise[fat : fat + 3000] = bytes((7 * n) & 0xFF for n in range(3000))
    sectors = bytearray(good)
    sectors[11:13] = b"\x00\x00"
    clusters = bytearray(good)
    clusters[13] = 255
    for hostile in (huge, loop, noise, sectors, clusters, good[:20000], good[:700]):
        (tmp_path / "hostile").write_bytes(hostile)
        try:
            files = seed.read_volume(tmp_path / "hostile")
        except Error as error:
            assert str(error).startswith("the seed cannot be read: ")
        else:
            assert sum(map(len, files.values())) <= seed.MAX_VOLUME_BYTES


# --- rename, clone, restore


def meta(files: dict[str, bytes]) -> dict[str, Any]:
    loaded = json.loads(files["meta-data"])
    assert isinstance(loaded, dict)
    return loaded


def rename(
    files: dict[str, bytes], name: str, uuid: str, network: Optional[bytes] = NETWORK
) -> dict[str, bytes]:
    return seed.renamed(files, name=name, uuid=uuid, network=network)


@pytest.fixture
def made(tmp_path: Path) -> dict[str, bytes]:
    source = write(tmp_path / "seed", ssh_keys=[ED25519], user_data=b"\xff", vendor_data=b"#!/x")
    (source / "extra").write_bytes(b"of a hook")
    return contents(source)


CASES = {
    "rename": ("web2.example.com", UUID, UUID),
    "clone": ("web2.example.com", OTHER, OTHER),
    "restore": (NAME, OTHER, UUID),
    "nothing new": (NAME, UUID, UUID),
}


@pytest.mark.parametrize("name, uuid, instance_id", CASES.values(), ids=CASES)
def test_the_cases(made: dict[str, bytes], name: str, uuid: str, instance_id: str) -> None:
    after = rename(made, name, uuid, b"{}")
    assert meta(after) == {
        **meta(made),
        "instance-id": instance_id,
        "local-hostname": name,
        "ganeti": {"uuid": uuid, "name": name},
    }
    assert after["network-config"] == b"{}"
    untouched = ["user-data", "vendor-data", "extra"]
    if instance_id == OTHER:
        untouched = untouched[::2]
        machine_id, *rest = parts(after["vendor-data"])
        assert machine_id.get_content_type() == "text/cloud-boothook"
        assert [part.as_bytes() for part in rest] == [
            part.as_bytes() for part in parts(made["vendor-data"])
        ]
    assert {key: after[key] for key in untouched} == {key: made[key] for key in untouched}
    assert after.keys() == made.keys()


def test_a_seed_that_says_no_more_than_it_must(made: dict[str, bytes]) -> None:
    plain = {"instance-id": UUID, "local-hostname": NAME}
    made["meta-data"] = json.dumps(plain).encode()
    assert meta(rename(made, "web2.example.com", UUID))["instance-id"] == UUID
    assert meta(rename(made, "web2.example.com", OTHER))["instance-id"] == OTHER


def test_a_restored_instance_that_is_renamed_is_no_clone(made: dict[str, bytes]) -> None:
    restored = rename(made, NAME, OTHER)
    assert meta(rename(restored, "web2.example.com", OTHER))["instance-id"] == UUID
    assert meta(rename(restored, "web2.example.com", THIRD))["instance-id"] == THIRD


def test_a_clone_of_a_clone_and_its_restore(made: dict[str, bytes]) -> None:
    clone = rename(made, "web2.example.com", OTHER)
    again = rename(clone, "web3.example.com", THIRD)
    assert meta(again)["instance-id"] == THIRD
    assert again["vendor-data"] == clone["vendor-data"]
    assert meta(rename(clone, "web2.example.com", THIRD))["instance-id"] == OTHER


def test_rename_and_back_is_the_same(made: dict[str, bytes]) -> None:
    assert rename(rename(made, "web2.example.com", UUID), NAME, UUID) == made


def test_rename_with_network_none(made: dict[str, bytes]) -> None:
    after = rename(made, NAME, UUID, None)
    assert json.loads(after["network-config"])["config"] == "disabled"


FOREIGN = {
    "missing": None,
    "empty": b"",
    "YAML": b"instance-id: x\nlocal-hostname: y\n",
    "another's JSON": b'{"instance-id": "x"}',
    "a list": b"[]",
    "ganeti is no mapping": b'{"instance-id": "x", "ganeti": "y"}',
    "no instance-id": b'{"ganeti": {"uuid": "u", "name": "n"}}',
    "deep": b"[" * 100000,
    "a lone surrogate": b'{"instance-id": "\\ud800", "ganeti": {"uuid": "u", "name": "n"}}',
    "no UTF-8": b'{"instance-id": "\xff"}',
    "large": b" " * seed.MAX_META_DATA_BYTES + b"{}",
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_foreign_meta_data(text: Optional[bytes]) -> None:
    with pytest.raises(Error) as raised:
        rename({} if text is None else {"meta-data": text}, "n", UUID)
    assert str(raised.value) == (
        "the seed's meta-data is none that cloudimage wrote;"
        " set instance-id, local-hostname and the addresses in it by hand"
    )


def test_the_module_is_quick_to_import() -> None:
    """verify answers within 0.1 s."""
    code = "import sys; from lib.guest import seed; print('email' in sys.modules)"
    argv = [sys.executable, "-c", code]
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run(argv, check=True, capture_output=True, cwd=root).stdout == b"False\n"
