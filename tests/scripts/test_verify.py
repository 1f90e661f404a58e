"""verify as Ganeti runs it: with OSCoreEnv's variables only, and all of its output shown."""

from __future__ import annotations

import base64
import resource
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests import httpd
from tests.conftest import ROOT
from tests.images import convert, disk_image
from tests.scripts.conftest import Door

CORE = ("PATH", "OS_", "OSP_", "DEBUG_LEVEL", "CLOUDIMAGE_CONFDIR")
KEY = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(32)).decode()
SECRET = "s3cret"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(disk_image(tmp_path_factory.mktemp("images") / "image.raw"), "qcow2")


def variables(door: Door, **more: str) -> dict[str, str]:
    """Return what Ganeti's OSCoreEnv sets: nothing of an instance."""
    every = door.environment([], more)
    return {key: value for key, value in every.items() if key.startswith(CORE)}


def verify(door: Door, **more: str) -> tuple[int, list[str]]:
    """Run the door; return its status and, both streams together as Ganeti shows them, lines."""
    argv = [str(ROOT / "verify"), "parameters"]
    environment = variables(door, **more)
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    return done.returncode, done.stdout.decode("ascii").splitlines()


GOOD: dict[str, dict[str, str]] = {
    "nothing": {},
    "a path": {"IMAGE": "@IMAGE"},
    "a file URL": {"IMAGE": "file://@IMAGE", "FORMAT": "qcow2"},
    "a pinned digest": {"IMAGE": "@IMAGE", "CHECKSUM": "sha512:" + "aB" * 64},
    "keys": {"SSH_KEYS": f"# mine\nssh-ed25519 {KEY} me\n\nno-pty ssh-ed25519 {KEY}"},
    "keys in a file": {"SSH_KEYS": "@@KEYS"},
    "user data": {"USER_DATA": "#cloud-config\npackages: [vim]\n"},
    "user data in base64": {"USER_DATA": "base64:H4sIAAAAAAAAAwMAAAAAAAAAAAA="},
    "vendor data": {"VENDOR_DATA": "#!/bin/sh\n"},
    "a network": {"NETWORK": "version: 2\nethernets: {}\n", "NETWORK_VERSION": "2"},
    "name servers": {"DNS_SERVERS": "192.0.2.1, 2001:db8::1", "DNS_SEARCH": "example.com"},
    "metad": {"METAD": "yes", "OS_PACKAGE": "@KEYS"},
    "empty values": {"IMAGE": "", "SSH_KEYS": "", "DNS_SERVERS": "", "OS_PACKAGE": ""},
}


@pytest.mark.parametrize("case", GOOD)
def test_good_values_are_met_with_silence(door: Door, image: Path, case: str) -> None:
    keys = door.folder / "keys"
    keys.write_text(f"ssh-ed25519 {KEY} me\n")
    given = {
        f"OSP_{name}": value.replace("@IMAGE", str(image)).replace("@KEYS", str(keys))
        for name, value in GOOD[case].items()
    }
    assert verify(door, **given) == (0, [])


def test_the_shipped_variants_are_right(door: Door) -> None:
    """Their checks that ask the network are left to a proxy that is down: it passes."""
    door.configure("[http]\nproxy = http://127.0.0.1:1\n[defaults]\nformat = auto\n")
    assert verify(door, OS_VARIANT="debian-12") == (0, [])


def test_every_problem_is_a_line(door: Door) -> None:
    status, lines = verify(
        door,
        OSP_IMAGE="image.qcow2",
        OSP_FORMAT="qcow3",
        OSP_CHECKSUM="sha256:abc",
        OSP_USER_DATA="base64:" + SECRET,
        OSP_DNS_SERVERS="none",
        OSP_SEDE="gap",
        OSP_METAD="maybe",
        OSP_OS_PACKAGE="package",
    )
    assert status == 1
    assert lines == [
        "ERROR: OSP_SEDE: unknown OS parameter; did you mean seed?",
        "ERROR: image=image.qcow2 (OS parameter): must be an absolute path, or a file://, http://"
        " or https:// URL",
        "ERROR: format=qcow3 (OS parameter): must be one of auto raw qcow2 vmdk vdi vpc vhdx;"
        " did you mean qcow2?",
        "ERROR: checksum=sha256:abc (OS parameter): must be none, sha256: with 64 or sha512: with"
        " 128 hex digits, or path or URL of a list",
        "ERROR: user_data=(not shown) (OS parameter): must be base64: and valid base64 data",
        "ERROR: dns_servers=none (OS parameter): must be IP addresses separated by spaces or commas"
        " ('none' does not appear to be an IPv4 or IPv6 address)",
        "ERROR: metad=maybe (OS parameter): must be yes or no",
        "ERROR: os-package=package (OS parameter): must be an absolute path",
    ]


def test_missing_files_are_all_named(door: Door) -> None:
    missing = door.folder / "missing"
    status, lines = verify(
        door,
        OSP_IMAGE=f"file://{missing}",
        OSP_CHECKSUM=f"{missing}.list",
        OSP_SSH_KEYS=f"@{missing}",
        OSP_USER_DATA="@/etc",
        OSP_VENDOR_DATA="@missing",
    )
    assert (status, lines) == (
        1,
        [
            "ERROR: vendor_data=(not shown) (OS parameter): must be @ and an absolute path on the"
            " node, as in @/etc/ganeti/user-data"
        ],
    )
    status, lines = verify(
        door,
        OSP_IMAGE=f"file://{missing}",
        OSP_CHECKSUM=f"{missing}.list",
        OSP_SSH_KEYS=f"@{missing}",
        OSP_USER_DATA="@/etc",
        OSP_METAD="no",
    )
    assert status == 1
    assert lines == [
        f"ERROR: image: {missing}: No such file or directory",
        f"ERROR: checksum: {missing}.list: No such file or directory",
        f"ERROR: ssh_keys: {missing}: No such file or directory",
        "ERROR: user_data: /etc: is a directory; name a file in it",
    ]


def test_bad_keys_in_a_file(door: Door) -> None:
    keys = door.folder / "keys"
    keys.write_text(f"ssh-ed25519 {KEY} me\nssh-ed25519 {KEY[:-8]} {SECRET}\n{SECRET}\n")
    status, lines = verify(door, OSP_SSH_KEYS=f"@{keys}")
    assert status == 1
    assert lines == [
        "ERROR: ssh_keys line 2: the ssh-ed25519 key is damaged or cut; copy the whole line again",
        "ERROR: ssh_keys line 3: no OpenSSH public key; write it as ssh-ed25519 AAAA... comment",
    ]


def test_a_folder_that_is_not_allowed(door: Door, image: Path) -> None:
    door.configure("[image]\nlocal_paths = /srv/images\n")
    status, lines = verify(door, OSP_IMAGE=str(image))
    assert status == 1
    assert lines == [
        f"ERROR: image={image}: is outside [image] local_paths of cloudimage.conf;"
        " move it below /srv/images"
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"OS_VARIANT": "debian12"}, "there is no variants.d/debian12.conf; did you mean debian-1"),
        ({"OS_VARIANT": "a/b"}, "OS_VARIANT='a/b' is not of the form that Ganeti uses"),
        ({"OSP_SIGNATURE": "inline"}, "signature=inline: there is no list; set checksum="),
        ({"OSP_OS_PACKAGE": "/x"}, "os-package: is served by metad only; add metad=yes"),
        ({"OSP_IMAGE": "/caf\u00e9"}, r"image=/caf\xe9 (OS parameter): must be ASCII"),
    ],
)
def test_variant_and_conflicts(door: Door, more: dict[str, str], words: str) -> None:
    status, lines = verify(door, **more)
    assert status == 1
    assert words in lines[0]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_definite_no_of_the_network(door: Door, status: int) -> None:
    with httpd.serve({"/image": httpd.reply(status)}) as server:
        url = server.url("/image")
        got, lines = verify(door, OSP_IMAGE=url, OSP_USER_DATA=url, OSP_CHECKSUM=url)
    assert got == 1
    assert [line.split(":")[1] for line in lines] == [" image", " checksum", " user_data"]
    assert all(f"{url}: answered {status}" in line for line in lines)


def test_an_unknown_host(door: Door) -> None:
    url = "http://nowhere.invalid/image"
    status, lines = verify(door, OSP_IMAGE=url)
    assert status == 1
    assert lines == [f"ERROR: image: {url}: the name of the host does not exist; check the URL"]


@pytest.mark.parametrize(
    "behaviour",
    [httpd.content(b"x" * 1000), httpd.reply(500), httpd.reply(503), httpd.hang, httpd.endless()],
    ids=["good", "500", "503", "slow", "endless"],
)
def test_a_server_in_trouble_passes(door: Door, behaviour: httpd.Behaviour) -> None:
    door.configure("[http]\nconnect_timeout = 0.2\nread_timeout = 0.2\nretries = 9\n")
    with httpd.serve({"/image": behaviour}) as server:
        assert verify(door, OSP_IMAGE=server.url("/image")) == (0, [])
        assert server.count("/image") == 1


def test_a_server_that_is_down_passes(door: Door) -> None:
    with socket.socket() as bound:  # but does not listen
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/image"
        assert verify(door, OSP_IMAGE=url) == (0, [])


def test_no_secret_is_shown(door: Door) -> None:
    """What is wrong in several ways is named; what it says stays secret, with debugging too."""
    with httpd.serve({}) as server:
        url = server.url("/image", user=f"user:{SECRET}")
        status, lines = verify(
            door,
            DEBUG_LEVEL="1",
            OSP_IMAGE=f"{url}?token={SECRET}",
            OSP_CHECKSUM=f"{url}?token={SECRET}",
            OSP_SSH_KEYS=f"ssh-ed25519 {SECRET} {SECRET}",
            OSP_USER_DATA=f"{url}?token={SECRET}",
        )
    assert status == 1
    assert [line.split(":")[1] for line in lines if line.startswith("ERROR")] == [
        " image",
        " checksum",
        " ssh_keys line 1",
        " user_data",
    ]
    assert SECRET not in "\n".join(lines)


@pytest.mark.parametrize("delimiter", "/?#")
def test_no_password_of_a_malformed_url_is_shown(door: Door, delimiter: str) -> None:
    url = f"http://user:a{delimiter}{SECRET}@host/image"
    status, lines = verify(door, OSP_IMAGE=url, OSP_CHECKSUM=url)
    assert (status, len(lines)) == (1, 2)
    assert SECRET not in "".join(lines) and "user" not in "".join(lines)
    door.configure(f"[http]\nproxy = {url}\n")
    status, lines = verify(door)
    assert (status, len(lines)) == (1, 1)
    assert SECRET not in lines[0] and "user" not in lines[0]


def test_quick_where_nothing_is_asked_of_the_network(door: Door, image: Path) -> None:
    given = {
        "OSP_IMAGE": str(image),
        "OSP_CHECKSUM": "sha256:" + "0" * 64,
        "OSP_SSH_KEYS": f"ssh-ed25519 {KEY} me",
    }
    spent = []
    for _time in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert verify(door, **given) == (0, [])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # 0.1 s on an idle machine; on a loaded one caches are cold and clocks slow
    assert min(spent) < 0.2
    argv = ["/usr/bin/python3", "-B", "-X", "importtime", str(ROOT / "verify"), "parameters"]
    done = subprocess.run(
        argv, cwd=ROOT, env=variables(door, **given), capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "lib.settings.params" in imported
    assert not imported & {"requests", "urllib3", "ssl", "asyncio"}


@pytest.mark.parametrize("arguments", [[], ["parameters", "more"], ["osp"]])
def test_wrong_arguments(door: Door, arguments: list[str]) -> None:
    argv = [str(ROOT / "verify"), *arguments]
    done = subprocess.run(argv, env=variables(door), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: verify parameters\n")


def test_a_pre_hook_may_bring_the_image(door: Door, tmp_path: Path) -> None:
    missing = str(tmp_path / "comes-later")
    assert verify(door, OSP_IMAGE=missing)[0] == 1
    folder = door.confdir / "hooks.d/pre"
    folder.mkdir(parents=True)
    (folder / "10-mount").write_text("#!/bin/sh\n")
    (folder / "10-mount").chmod(0o755)
    assert verify(door, OSP_IMAGE=missing) == (0, [])


# --- texts that a guest would ignore, and guests that nobody can enter -------------------------


@pytest.mark.parametrize(
    ("text", "is_known"),
    [
        ("#cloud-config\n{}", True),
        ("\n #Cloud-Config\n", True),
        ("#!/bin/sh\n", True),
        ("## template: jinja\n#cloud-config\n", True),
        ("#include-once\nhttp://192.0.2.1/\n", True),
        ("Content-Type: multipart/mixed; boundary=x\nMIME-Version: 1.0\n\n", True),
        ("base64:H4sIAAAAAAAAA1NOzskvTdFNzs9Ly0znAgCyO7ZXDgAAAA==", True),
        ("#ps1_sysnative\n", True),
        ("packages: [s3cret]\n", False),
        ("base64:77u/I2Nsb3VkLWNvbmZpZwo=", False),  # behind a byte order mark
        ("# cloud-config\n", False),
    ],
)
@pytest.mark.parametrize("parameter", ["user_data", "vendor_data"])
def test_texts_that_cloud_init_ignores(
    door: Door, image: Path, parameter: str, text: str, is_known: bool
) -> None:
    result = door(
        "verify", "parameters", disks=[], OSP_IMAGE=str(image), **{f"OSP_{parameter.upper()}": text}
    )
    assert result.status == 0, result.log
    warnings = [line for line in result.log.splitlines() if line.startswith("WARNING: ")]
    assert bool(warnings) != is_known
    assert all(line.startswith(f"WARNING: {parameter}: its first line") for line in warnings)
    assert "s3cret" not in result.log


@pytest.mark.parametrize(
    "value", ["secret", "$6$short", "$1$abcdefgh$0123456789abcdefghijkl", "$y$j9T$a$b", "$6$a$b:c"]
)
def test_a_password_is_no_hash(door: Door, image: Path, value: str) -> None:
    result = door("verify", "parameters", disks=[], OSP_IMAGE=str(image), OSP_PASSWORD_HASH=value)
    assert result.status == 1
    assert result.error == (
        "ERROR: password_hash=(not shown) (OS parameter): must be a hash, not a password: let"
        " openssl passwd -6 make one"
    )
    assert value not in result.log


def test_missing_and_old_tools(door: Door, image: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bwrap", "prlimit", "unshare", "qemu-img", "mcopy"):
        (tmp_path / "bin" / name).symlink_to(f"/usr/bin/{name}")
    (tmp_path / "bin/bwrap").unlink()
    (tmp_path / "bin/bwrap").write_text("#!/bin/sh\necho bubblewrap 0.3.1\n")
    (tmp_path / "bin/bwrap").chmod(0o755)
    (tmp_path / "bin/mkfs.vfat").symlink_to("/usr/sbin/mkfs.vfat")
    door.path = f"{tmp_path}/bin"
    status, lines = verify(door, OSP_IMAGE=str(image))
    assert (status, lines) == (
        1,
        [
            "ERROR: bwrap 0.3.1: too old; install bubblewrap 0.4.1 or newer",
            "ERROR: sfdisk: not installed; install the package fdisk (EL: util-linux)",
        ],
    )


def test_all_questions_together_have_a_limit(door: Door) -> None:
    """Servers that drip: six URLs, each of which would be worth half a minute."""
    with httpd.serve({"/a": httpd.trickle(b"x" * 100, 0.5, from_head=True)}) as server:
        url = server.url("/a")
        given = dict.fromkeys(("OSP_IMAGE", "OSP_CHECKSUM", "OSP_USER_DATA"), url)
        given |= dict.fromkeys(("OSP_VENDOR_DATA", "OSP_SSH_KEYS", "OSP_NETWORK"), url)
        before = time.monotonic()
        status, lines = verify(door, **given)
        took_s = time.monotonic() - before
    assert (status, lines) == (0, [])
    assert took_s < 30
