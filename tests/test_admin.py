"""explain, seed and check: what an administrator is shown, and that nothing is changed by it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lib.admin import common
from lib.errors import Error
from tests import httpd
from tests.conftest import ROOT, SYSTEM_PATH
from tests.scripts.conftest import Door, disk, seed_files
from tests.test_cli import Command, command, image

__all__ = ["command", "disk", "image"]  # fixtures
Disk = Callable[..., Path]
NICS = ["--net", "0", "--net", "1:ip=192.0.2.1,mode=routed"]
NETWORK = "subnet=192.0.2.0/24,gateway=192.0.2.1"


@pytest.fixture
def door(tmp_path: Path) -> Door:
    (tmp_path / "node").mkdir()
    return Door(tmp_path / "node")


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what is below a folder, with times: nothing may be written there."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        found[str(path)] = (status.st_mtime_ns, status.st_size)
    return found


# --- -O --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a=1,b=2", ["a=1", "b=2"]),
        (r"a=1\,2,b=3", ["a=1,2", "b=3"]),
        (r"a=1\\,b=2", ["a=1\\", "b=2"]),
        (r"a=\n", ["a=n"]),
        ("a=1,", ["a=1", ""]),
        ("a=\\", ["a=\\"]),
        ("a=1\n2", ["a=1\n2"]),
        ("", [""]),
    ],
)
def test_options_are_split_as_ganeti_does(text: str, parts: list[str]) -> None:
    assert common.split(text) == parts


def test_a_value_is_needed() -> None:
    with pytest.raises(Error, match=r"-O b: has no value; write NAME=VALUE; a comma"):
        common.pairs("-O", "a=1,b")


# --- explain ---------------------------------------------------------------------------------


def test_explain_tells_all_and_writes_nothing(command: Command, image: Path) -> None:
    data = image.with_suffix(".qcow2").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    pages = {
        "/image": httpd.content(data),
        "/SUMS": httpd.content(f"{digest}  image\n".encode()),
    }
    with httpd.serve(pages) as server:
        url = server.url("/image")
        command.variant("mine", f"image = {url}\nchecksum = {server.url('/SUMS')}")
        (command.folder / "cloudimage.conf").write_text(
            f"[cache]\ndir = {command.cache}\n[defaults]\ndns_search = example.com\n"
        )
        words = ["explain", "-o", "cloudimage+mine", "--disk", "0:size=64M", "--name", "vm9.lan"]
        words += ["-O", "user_data=s3cret,dns_servers=192.0.2.53", "--net", f"0:ip=pool,{NETWORK}"]
        before = snapshot(command.folder)
        done = command(*words)
        assert done.returncode == 0, done.stderr
        assert snapshot(command.folder) == before
        assert not command.cache.exists()
        assert "s3cret" not in done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert f"image           {url}  ({command.folder}/variants.d/mine.conf)" in lines
        assert "user_data       (not shown)  (OS parameter)" in lines
        assert f"dns_search      example.com  ({command.folder}/cloudimage.conf)" in lines
        assert "seed            auto  (default)" in lines
        assert f"digest          sha256:{digest}" in lines
        (there,) = [line for line in lines if line.startswith("cache ")]
        assert there.endswith("to download")
        assert ' "local-hostname": "vm9.lan",' in lines
        assert '     "address": "192.0.2.2/24",' in lines
        # a HEAD, so to speak: not one byte more than the first
        ranges = [seen.headers.get("Range") for seen in server.seen if seen.path == "/image"]
        assert ranges == ["bytes=0-0"]
        assert command("fetch", "mine").returncode == 0
        before = snapshot(command.cache)
        done = command(*words, "--json", "--show-secrets")
        assert snapshot(command.cache) == before
    found = json.loads(done.stdout)
    assert found["image"]["image size"].startswith("12 MiB ")
    assert found["image"]["seed place"] == "gap at byte 32768, 992 KiB"
    assert found["seed"]["user-data"] == {"size": 6, "text": "s3cret"}


def test_explain_says_what_create_does(
    command: Command, image: Path, door: Door, disk: Callable[..., Path]
) -> None:
    """The four files are byte for byte those that create writes with the same options."""
    words = ["-O", f"image={image},dns_servers=192.0.2.53"]
    net = f"mac=aa:00:00:12:34:01,ip=192.0.2.5,{NETWORK}"
    words += ["--name", "vm1.example.com", "--net", f"0:{net}", "--json", "--show-secrets"]
    done = command("explain", "-o", "cloudimage+default", *words)
    assert done.returncode == 0, done.stderr
    said = {name: each["text"] for name, each in json.loads(done.stdout)["seed"].items()}
    target = disk()
    more = {"NIC_0_NETWORK_SUBNET": "192.0.2.0/24", "NIC_0_NETWORK_GATEWAY": "192.0.2.1"}
    result = door(
        "create",
        disks=[target],
        OSP_IMAGE=str(image),
        OSP_DNS_SERVERS="192.0.2.53",
        INSTANCE_UUID="00000000-0000-4000-8000-000000000000",
        NIC_0_IP="192.0.2.5",
        **more,
    )
    assert result.status == 0, result.log
    assert said == {name: data.decode() for name, data in seed_files(target).items()}


def test_explain_resolves_the_name(command: Command, image: Path) -> None:
    net = "0:ip=auto,subnet=127.0.0.0/8,gateway=127.0.0.9"
    words = ["-O", f"image={image}", "--name", "localhost", "--net", net]
    done = command("explain", "-o", "default", *words)
    assert done.returncode == 0, done.stderr
    assert '     "address": "127.0.0.1/8",' in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--net", "ip=192.0.2.1"], "--net ip=192.0.2.1: has no number; write 0:KEY=..."),
        (["--net", "0:ips=192.0.2.1"], "--net 0:ips: is unknown; did you mean ip?"),
        (["--net", "0:ip=pool"], "--net 0:ip=pool: there is no network; add network=NAME"),
        (
            ["--net", "0:ip=auto", "--name", "vm1.invalid"],
            "--net 0:ip=auto: vm1.invalid: ",
        ),
        (
            ["--net", f"0:ip=10.0.0.1,{NETWORK}"],
            "writing network-config: NIC_0_IP=",
        ),
        (["--net", "0:ip"], "--net 0: ip: has no value; write NAME=VALUE; a comma in a value is"),
        (["--disk", "0:size=much"], "--disk 0:size=much: must be a size such as 20G"),
        (["--net", "0:ip=auto", "--name", "a..b"], "--net 0:ip=auto: a..b: is no host's name"),
        (["--net", "0:ip=pool,subnet=lan"], "--net 0:subnet=lan: 'lan' does not appear to be an"),
        (
            ["--net", "0:ip=pool,subnet=10.0.0.0/32,gateway=10.0.0.0"],
            "--net 0:ip=pool: 10.0.0.0/32",
        ),
        (["--net", "0:network=-x"], "'-x' is no network's name; gnt-network list shows them"),
        (["--name", ""], "--name: is empty; give the instance's name"),
        (["-o", ""], "the variant's name is empty; cloudimage variants lists them"),
        (["--name", "a b"], "INSTANCE_NAME='a b' is not of the form that Ganeti uses"),
        (["-O", "image=/i,sead=gap"], "OSP_SEAD: unknown OS parameter; did you mean seed?"),
    ],
)
def test_explain_refuses(command: Command, image: Path, words: list[str], error: str) -> None:
    done = command("explain", "-o", "default", "-O", f"image={image}", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith(f"ERROR: {error}")


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["--net", "0"], []),
        (["--net", "0:ip=none,network=none,name=None,mac=auto,bridge=br0"], []),
        (["--net", "1:ip=192.0.2.1,mode=routed"], NICS),  # Ganeti makes NIC 0 too
        (["--name", "VM1.Example.com."], ["--name", "vm1.example.com"]),
        (["--disk", "0:size=0.01G"], ["--disk", "0:size=12M"]),
        (["--disk", "0:size=11.5"], ["--disk", "0:size=12"]),
        (["-O", "image=/nonexistent,seed=none", "-O", "image={image}"], []),
    ],
)
def test_explain_reads_options_as_ganeti_does(
    command: Command, image: Path, words: list[str], same: list[str]
) -> None:
    given = ["explain", "-o", "default", "-O", f"image={image}"]
    one, other = (
        command(*given, *(word.replace("{image}", str(image)) for word in each))
        for each in (words, same)
    )
    assert one.returncode == 0, one.stderr
    assert one.stdout == other.stdout


@pytest.mark.parametrize(
    ("disks", "said"),
    [
        (["0:size=8M"], "disk 0          too small: use --disk 0:size=12M or more"),
        (["0:size=1G", "1:size=4m,name=cidata"], "seed place      the disk named cidata"),
        ([], "seed place      gap at byte 32768, 992 KiB (on a disk as large as the image;"),
    ],
)
def test_explain_knows_where(command: Command, image: Path, disks: list[str], said: str) -> None:
    options = [word for each in disks for word in ("--disk", each)]
    done = command("explain", "-o", "default", "-O", f"image={image}", *options)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith(said) for line in done.stdout.splitlines())


def test_explain_goes_on_without_the_server(command: Command) -> None:
    settings = "image=http://127.0.0.1:9/a.qcow2,checksum=http://127.0.0.1:9/SUMS"
    done = command("explain", "-o", "default", "-O", settings)
    assert done.returncode == 0, done.stderr
    assert (
        "digest          not known: reading the checksum list http://127.0.0.1:9/SUMS: "
        in done.stdout
    )
    assert "cache           not there; an unknown size to download" in done.stdout


# --- seed ------------------------------------------------------------------------------------


@pytest.fixture
def seeded(door: Door, disk: Callable[..., Path], image: Path) -> Path:
    target = disk()
    user_data = "password: s3cret"
    result = door("create", disks=[target], OSP_IMAGE=str(image), OSP_USER_DATA=user_data)
    assert result.status == 0, result.log
    return target


def test_seed_shows_what_is_there(command: Command, seeded: Path) -> None:
    before = seeded.read_bytes()
    done = command("seed", seeded)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"seed: {seeded} at 32768, 992 KiB" in done.stdout
    assert '"local-hostname": "vm1.example.com"' in done.stdout
    assert "--- user-data, 16 bytes (not shown)" in done.stdout
    assert "s3cret" not in done.stdout
    assert "s3cret" in command("seed", "--show-secrets", seeded).stdout
    files = json.loads(command("seed", "--json", "--show-secrets", seeded).stdout)["files"]
    assert {n: f["text"].encode() for n, f in files.items()} == seed_files(seeded)
    assert seeded.read_bytes() == before


def test_a_seed_that_is_not_there_or_damaged(command: Command, seeded: Path, image: Path) -> None:
    done = command("seed", image)
    assert done.returncode == 1
    assert done.stderr.startswith(f"ERROR: {image}: holds no seed; ")
    done = command("seed", "/nonexistent")
    assert done.stderr.startswith("ERROR: /nonexistent: ")
    with seeded.open("r+b") as file:
        file.seek(32768 + 512)
        file.write(b"\xff" * 65536)
    before = seeded.read_bytes()
    done = command("seed", seeded)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ERROR: the seed cannot be read: ")
    assert seeded.read_bytes() == before


def test_seed_of_an_instance_needs_ganeti(command: Command, seeded: Path) -> None:
    command.environment["PATH"] = "/nonexistent"
    done = command("seed", "vm1")
    assert done.stderr.endswith("ERROR: gnt-instance: not installed; install the package ganeti\n")
    done = command("seed", "--diff", seeded)
    assert done.stderr == (
        "ERROR: --diff: a disk does not tell whose it is; give the instance's name\n"
    )


# --- check -----------------------------------------------------------------------------------


def findings(command: Command) -> tuple[int, dict[str, list[str]]]:
    done = command("check", "--json")
    assert done.stderr == ""
    rows: dict[str, list[str]] = {"ok": [], "warning": [], "error": []}
    for row in json.loads(done.stdout):
        rows[row["state"]].append(row["what"])
    return done.returncode, rows


def test_a_fit_node(command: Command) -> None:
    status, rows = findings(command)
    assert (status, rows["error"]) == (0, [])
    assert any(row.startswith("the sandbox starts; its memory is bounded") for row in rows["ok"])
    assert f"cache {command.cache}: safe, can be written" in rows["ok"]
    assert any(row.startswith("qemu-img ") for row in rows["ok"])
    debugged = command("--debug", "check").stderr
    assert debugged.count("/qemu-img --version\n") == 1
    assert list(command.cache.iterdir()) == []


def test_an_unfit_node(command: Command, tmp_path: Path) -> None:
    old = tmp_path / "sfdisk"
    old.write_text("#!/bin/sh\necho sfdisk from util-linux 2.33.1\n")
    old.chmod(0o755)
    command.environment["PATH"] = f"{tmp_path}:{SYSTEM_PATH}"
    command.variant("broken", "imgae = /a")
    command.variant("unsigned", "image = /a\nchecksum = /l\nsignature = /s\nkeyring = /none.gpg")
    (command.folder / "hooks.d/pre").mkdir(parents=True)
    (command.folder / "hooks.d/pre/a.sh").write_text("#!/bin/sh\n")
    command.cache.mkdir()
    command.cache.chmod(0o777)
    status, rows = findings(command)
    assert status == 1
    assert "sfdisk 2.33.1: too old; install fdisk (EL: util-linux) 2.36 or newer" in rows["error"]
    assert any("can be written by others, mode 0777" in row for row in rows["error"])
    warnings = "\n".join(rows["warning"])
    assert "variant broken: " in warnings
    assert "variant unsigned: /none.gpg: No such file or directory" in warnings
    assert "a.sh: will not run; use letters, digits" in warnings


def test_what_is_wrong_with_the_configuration_is_no_fault_of_each_variant(
    command: Command,
) -> None:
    (command.folder / "cloudimage.conf").write_text("[cache]\nmax_size = much\n")
    status, rows = findings(command)
    assert status == 1
    assert len(rows["error"]) == 2  # the configuration, and the variants as a whole


def test_a_node_without_tools(command: Command) -> None:
    command.environment["PATH"] = "/usr/sbin"
    done = command("check")
    assert done.returncode == 1
    assert "error    zstd: not installed; install the package zstd\n" in done.stdout
    assert "error    qemu-img: not installed; install the package qemu-utils (EL" in done.stdout


# --- receive, the other end of push ------------------------------------------------------------


def test_an_entry_that_came_damaged(command: Command, image: Path) -> None:
    note = {"url": "file:///a", "digests": {}, "fetched": "2026-01-01T00:00:00Z"}
    text = json.dumps({**note, "raw_sha256": "0" * 64}).encode()
    packed = Path("/var/tmp/cloudimage-push-test_0.zst")
    subprocess.run(["zstd", "-qf", image, "-o", packed], check=True)
    done = command("receive", "a" * 64, base64.b64encode(text).decode(), packed)
    assert done.returncode == 1
    assert "what came of aaaaaaaaaaaa: its sha256 is " in done.stderr.splitlines()[-1]
    assert not packed.exists()
    assert list(command.cache.iterdir()) == []
    done = command("receive", "a" * 64, base64.b64encode(text).decode(), image)
    assert done.stderr == f"ERROR: {image}: is no file of cloudimage push\n"
    assert image.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"not JSON", "Expecting value: "),
        (b"[]", "is not a JSON object"),
        (b"{}", "has no url that makes sense"),
        (b'{"url": "u", "digests": {}, "fetched": "now"}', "'raw_sha256'"),
    ],
)
def test_a_note_that_came_damaged(command: Command, text: bytes, words: str) -> None:
    packed = Path("/var/tmp/cloudimage-push-test_1.zst")
    packed.touch()
    done = command("receive", "a" * 64, base64.b64encode(text).decode(), packed)
    assert done.returncode == 1
    assert done.stderr.startswith(f"ERROR: receive: the note of the entry is damaged: {words}")
    assert not packed.exists()


@pytest.mark.parametrize("name", ["", "-x", "--all", "*", "a b", "a|b"])
def test_what_is_no_name_is_not_asked_of_ganeti(command: Command, name: str) -> None:
    for words in (["seed"], ["seed", "--diff"], ["reseed"]):
        done = command(*words, "--", name)
        assert (
            done.stderr == f"ERROR: {name!r} is no instance's name; gnt-instance list shows them\n"
        )
    done = command("push", "--", name)
    assert done.stderr == f"ERROR: {name!r} is no node's name; gnt-node list shows them\n"


def test_push_takes_nodes_or_all(command: Command) -> None:
    assert command("push", "--all-nodes", "node1").returncode == 2
    done = command("push", "--entry", "", "node1")
    assert done.stderr == "ERROR: --entry : no such entry; cloudimage cache lists them\n"


# --- the catalogue -----------------------------------------------------------------------------


LISTING = """<html><a href="v-9.1.qcow2">v-9.1.qcow2</a> <a href="v-10.2.qcow2">v-10.2.qcow2</a>
<a href="v-10.10.qcow2">v-10.10.qcow2</a> <a href="v-..%2F..%2Fetc.qcow2">x</a></html>"""
INDEXED = r"""description = of an index
index = {base}/
index_match = v-(?P<release>[0-9.]+)\.qcow2
image = {base}/v-{{release}}.qcow2
checksum = {base}/v-{{release}}.qcow2.sha256"""


def vendor(data: bytes) -> dict[str, httpd.Behaviour]:
    digest = hashlib.sha256(data).hexdigest().encode()
    return {
        "/": httpd.content(LISTING.encode()),
        "/v-10.10.qcow2": httpd.content(data),
        "/v-10.10.qcow2.sha256": httpd.content(digest + b"\n"),
        "/alias.qcow2": httpd.redirect("/v-10.10.qcow2"),
    }


def test_the_newest_of_an_index(command: Command, image: Path) -> None:
    routes = vendor(image.with_suffix(".qcow2").read_bytes())
    with httpd.serve(routes) as server:
        base = server.url("")
        command.variant("indexed", INDEXED.format(base=base))
        assert command("fetch", "indexed").returncode == 0
        assert server.count("/v-10.10.qcow2") == 1
        # any name that a group can have
        command.variant("other", INDEXED.replace("release", "Build1").format(base=base))
        assert command("explain", "-o", "other").stdout.count("digest          sha256:") == 1
        done = command("fetch", "indexed")
        assert "is in the cache (sha256 as expected)" in done.stderr
        # an index that is none any more: the last good image serves
        for behaviour in (httpd.content(b"{}"), httpd.reply(503)):
            server.routes["/"] = behaviour
            done = command("fetch", "indexed")
            assert done.returncode == 0, done.stderr
            (warning,) = [line for line in done.stderr.splitlines() if "WARNING" in line]
            assert warning.startswith(f"WARNING: reading the index {base}/: ")
            assert "; using the copy in the cache, fetched 2" in warning
        command("prune", "--all")
        done = command("fetch", "indexed")
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        # the image of an OS parameter has nothing to do with the variant's index
        parameters = f"image={base}/v-10.10.qcow2,checksum=none"
        done = command("explain", "-o", "indexed", "-O", parameters)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image = https://h/{Release1}", "must be without other {names} than {arch}"),
        ("image = https://h/{release}", "must be without other {names} than {arch}"),
        ("image = https://h/{b}\nindex = https://h/\nindex_match = (?P<a>x)", "named groups of"),
        ("image = https://h/a\nindex = https://h/\nindex_match = (x", "index_match or end_of_life"),
        ("image = https://h/a\nindex = https://h/", "index_match is missing; index and index_"),
        ("image = https://h/a\nindex_match = (?P<a>x)", "index is missing; index and index_match"),
        ("image = https://h/a\nend_of_life = soon", "(YYYY-MM-DD): Invalid isoformat string"),
    ],
)
def test_a_variant_with_a_bad_rule(command: Command, text: str, words: str) -> None:
    command.variant("bad", text)
    done = command("variants", "bad")
    assert done.returncode == 1
    assert words in done.stderr


def test_variants_are_asked_for(command: Command, image: Path) -> None:
    """A vendor that redirects, one that answers no HEAD, one without the image, one with a lie."""
    routes = vendor(image.with_suffix(".qcow2").read_bytes())
    with httpd.serve(routes) as server:
        base = server.url("")
        command.variant("indexed", INDEXED.format(base=base))
        command.variant("alias", f"image = {base}/alias.qcow2")
        command.variant("gone", f"image = {base}/gone.qcow2")
        other = f"image = {base}/alias.qcow2\nchecksum = {base}/"
        command.variant("unlisted", other)
        names = ["alias", "gone", "indexed", "unlisted"]
        done = command("variants", "--check", *names)
        assert not any(seen.method == "HEAD" for seen in server.seen)
        assert {seen.headers["Range"] for seen in server.seen if "alias" in seen.path} == {
            "bytes=0-0"
        }
        rows = json.loads(command("variants", "--check", "--json", *names).stdout)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"ok     alias: [0-9.]+ MiB, no checksum, no signature", lines[0])
    assert lines[1].startswith(f"error  gone: {base}/gone.qcow2: answered 404 Not Found")
    assert re.fullmatch(
        r"ok     indexed: [0-9.]+ MiB, sha256 from the list, no signature", lines[2]
    )
    assert lines[3].startswith("error  unlisted: reading the checksum list ")
    assert done.stderr == ""
    assert [(row["name"], row["state"]) for row in rows] == [
        ("alias", "ok"), ("gone", "error"), ("indexed", "ok"), ("unlisted", "error"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_asks_the_servers_can_be_interrupted(command: Command, number: signal.Signals) -> None:
    with httpd.serve({"/image": httpd.hang, "/SUMS": httpd.hang}) as server:
        command.variant("mine", f"image = {server.url('/image')}\nchecksum = {server.url('/SUMS')}")
        argv = [str(command.program), "variants", "--check", "mine", "default"]
        child = subprocess.Popen(
            argv,
            env=command.environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        )
        while not server.seen:
            assert child.poll() is None
        child.send_signal(number)
        _out, err = child.communicate(timeout=10)
        assert err == f"ERROR: interrupted by {number.name}; nothing is left behind, run it again\n"
        assert child.returncode == 128 + number
        with pytest.raises(ProcessLookupError):
            os.killpg(child.pid, 0)


def test_a_variant_past_its_end(command: Command, image: Path, door: Door, disk: Disk) -> None:
    command.variant("old", f"description = old\nend_of_life = 2020-01-31\nimage = {image}")
    command.variant("new", f"description = new\nend_of_life = 2120-01-31\nimage = {image}")
    lines = command("variants", "old", "new").stdout.splitlines()
    assert lines[0].endswith("(end of life since 2020-01-31)")
    assert "end of life" not in lines[4]
    for name in ("old", "new"):
        confdir = {"CLOUDIMAGE_CONFDIR": str(command.folder)}
        result = door("create", disks=[disk()], OS_VARIANT=name, **confdir)
        assert result.status == 0, result.log
        words = f"WARNING: variant {name}: the vendor's support ended on 2020-01-31"
        assert (words in result.log) == (name == "old")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("debian-bookworm", "debian-12"),
        ("bookworm", "debian-12"),
        ("ubuntu-jammy", "ubuntu-22.04"),
        ("Ubuntu-Noble", "ubuntu-24.04"),
        ("debain-13", "debian-13"),
    ],
)
def test_code_names_lead_to_the_variant(command: Command, name: str, hint: str) -> None:
    done = command("variants", name)
    assert done.stderr.endswith(f"; did you mean {hint}?\n")


def test_what_is_no_file_keeps_nobody_waiting(command: Command) -> None:
    os.mkfifo(command.folder / "variants.d/almalinux-1.conf")
    assert command("variants", "bookworm").stderr.endswith("; did you mean debian-12?\n")
    path = command.folder / "variants.d/almalinux-1.conf"
    done = command("variants", "almalinux-1")
    assert (done.returncode, done.stderr) == (1, f"ERROR: {path}: is not a regular file\n")


def test_fetch_all(command: Command, image: Path) -> None:
    command.variant("mine", f"image = {image}")
    bundle = command.folder / "bundle"
    bundle.mkdir()
    for part in ("lib", "variants.d", "hooks.d"):
        shutil.copytree(ROOT / part, bundle / part)
    (bundle / "variants.list").write_text("mine\ndefault\n")
    argv = [str(bundle / "lib/cloudimage"), "fetch", "--all"]
    done = subprocess.run(argv, env=command.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fetch: mine is ready" in done.stderr
    assert done.stderr.count(" is ready") == 1
