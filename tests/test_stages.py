"""What cloud-init makes of the whole seed, in several versions: the early stages of a boot."""

from __future__ import annotations

import base64
import gzip
import re
import subprocess
from pathlib import Path
from typing import Any, Optional

import pytest

from lib.guest import network, seed
from lib.settings import values
from tests.cloud_init import SUITES, inside, sandbox, unpacked
from tests.conftest import ROOT, SYSTEM_PATH, require
from tests.test_network import LAN, nic

# --- ds-identify: whether there is anything for cloud-init to do at this boot


def identified(suite: str, directory: Path, volume: Path) -> str:
    """Let the suite's ds-identify look at what blkid says of a volume; return its verdict."""
    shims = directory / "shims"
    shims.mkdir(parents=True)
    blkid = shims / "blkid"  # of one file instead of all devices
    blkid.write_text("#!/bin/sh\nexec /usr/sbin/blkid --probe --output export /volume\n")
    blkid.chmod(0o755)
    (directory / "etc/cloud").mkdir(parents=True)
    (directory / "etc/cloud/cloud.cfg").write_text("system_info: {distro: debian}\n")
    argv = sandbox(suite, directory / "etc", "--setenv", "PATH", f"/shims:{SYSTEM_PATH}")
    argv += ["--ro-bind", str(shims), "/shims", "--ro-bind", str(volume), "/volume", "--"]
    argv += ["sh", "-c", "/guest/lib/cloud-init/ds-identify; cat /run/cloud-init/cloud.cfg"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("suite", SUITES)
def test_ds_identify_sees_the_seed(tmp_path: Path, suite: str) -> None:
    require("blkid", "mkfs.vfat", "mcopy")
    (tmp_path / "seed").mkdir()
    for file, text in texts().items():
        (tmp_path / "seed" / file).write_bytes(text)
    for size_bytes in (960 * 512, 1984 * 512, 4 << 20, 64 << 20):  # the gaps, a disk of its own
        volume = tmp_path / f"{size_bytes}.img"
        seed.volume(tmp_path / "seed", size_bytes, volume)
        said = identified(suite, tmp_path / f"{size_bytes}", volume)
        assert re.match(r"datasource_list: \[ NoCloud(, None)? \]", said), said
    other = tmp_path / "other.img"
    subprocess.run(["mkfs.vfat", "-C", "-n", "OTHER", other, "1000"], check=True)
    assert "NoCloud" not in identified(suite, tmp_path / "none", other)


# --- the early stages of a boot

UUID, OTHER = "7eb7a864-32d5-4cce-a37f-4dfde4aaf87e", "11111111-2222-4333-8444-555555555555"
KEY = "ssh-ed25519 AAAA me"


def texts(**changed: Any) -> dict[str, bytes]:
    """Return the seed's files for one instance, but for what is changed."""
    values: dict[str, Any] = {
        "name": "web1.example.com",
        "uuid": UUID,
        "ssh_keys": [KEY],
        "user_data": b"",
        "vendor_data": b"",
        "network": seed.document(network.config([nic(ip="192.0.2.10", **LAN)], 1, "auto", [], [])),
    }
    return seed.texts(**{**values, **changed})


def boots(suite: str, directory: Path, *seeds: dict[str, bytes]) -> list[dict[str, Any]]:
    """Boot the same guest with one seed after the other."""
    given = [{k: base64.b64encode(v).decode() for k, v in files.items()} for files in seeds]
    result = inside(suite, directory / "etc", "boot", given)
    assert isinstance(result, list)
    return result


# 20.4.1 has no updates and its stages want a real boot
@pytest.mark.parametrize("suite", SUITES[1:])
def test_a_guest_takes_its_seed_is_renamed_and_cloned(tmp_path: Path, suite: str) -> None:
    theirs = b"#cloud-config\npackages: [jq]\n"
    first = texts(vendor_data=theirs)
    other_nic = seed.document(network.config([nic(ip="192.0.2.11", **LAN)], 1, "auto", [], []))
    renamed = seed.renamed(first, name="web2.example.com", uuid=UUID, network=other_nic)
    clone = seed.renamed(renamed, name="web3.example.com", uuid=OTHER, network=None)
    made = boots(suite, tmp_path, first, first, renamed, clone, clone)
    assert [each["instance-id"] for each in made] == [UUID, UUID, UUID, OTHER, OTHER]
    names = [f"web{n}.example.com" for n in (1, 1, 2, 3, 3)]
    assert [each["hostname"][0] for each in made] == names
    assert {tuple(each["keys"]) for each in made} == {(KEY,)}
    assert [each["network at boot"] for each in made] == [True] * 5
    assert [each["packages"] for each in made] == [["jq"]] * 5
    addresses = [re.findall("192.0.2.1[01]", str(each["network"])) for each in made]
    assert addresses[:3] == [["192.0.2.10"], ["192.0.2.10"], ["192.0.2.11"]]
    assert made[3]["network"] is None  # network=none: cloud-init leaves it alone
    ids = [each["machine-id"] for each in made]
    assert ids[0] == ids[1] == ids[2] != ids[3] == ids[4]
    assert re.fullmatch("[0-9a-f]{32}\n", ids[3])
    assert [each["log"] for each in made] == [""] * 5


MIME = b"""\
Content-Type: multipart/mixed; boundary="XX"
MIME-Version: 1.0

--XX
Content-Type: text/x-shellscript

#!/bin/sh
echo from MIME
--XX
Content-Type: text/cloud-config

#cloud-config
packages: [jq]
--XX--
"""
JINJA = b"## template: jinja\n#cloud-config\npackages: [{{ ds.meta_data.ganeti.name }}]\n"
VENDOR_DATA: list[tuple[bytes, Optional[list[str]], str, bool]] = [
    (b"#cloud-config\npackages: [jq]", ["jq"], "", True),
    (b"#!/bin/sh\r\necho a script", None, "echo a script", True),
    (gzip.compress(b"#!/bin/sh\necho a script"), None, "echo a script", True),
    (MIME, ["jq"], "from MIME", True),
    (gzip.compress(MIME), ["jq"], "from MIME", True),
    (JINJA, ["web1.example.com"], "", True),
    (b"#cloud-config-archive\n- '#!/bin/sh'\n", None, "#!/bin/sh", True),
    (b"#cloud-config\nupdates: {network: {when: []}}\n", None, "", False),
]


@pytest.mark.parametrize("suite", SUITES[1:])
def test_both_vendor_data_take_effect(tmp_path: Path, suite: str) -> None:
    seeds = [
        texts(vendor_data=theirs, uuid=f"{n}{UUID[1:]}")
        for n, (theirs, *_expected) in enumerate(VENDOR_DATA)
    ]
    for made, (theirs, packages, script, at_boot) in zip(
        boots(suite, tmp_path, *seeds), VENDOR_DATA
    ):
        assert made["packages"] == packages, theirs
        assert script in "".join(made["scripts"]), theirs
        assert made["network at boot"] is at_boot, theirs
        assert made["log"] == "", theirs


# --- the examples, and who wins

EXAMPLES = {path.name: path.read_text() for path in (ROOT / "doc/examples").glob("*.yaml")}


@pytest.mark.parametrize("suite", SUITES[1:])
def test_the_examples_fit_the_schema(tmp_path: Path, suite: str) -> None:
    wrong = "#cloud-config\nmounts: yes\n"
    judged = inside(suite, tmp_path / "etc", "schema", {**EXAMPLES, "wrong": wrong})
    assert judged.pop("wrong") != ""
    assert judged == dict.fromkeys(EXAMPLES, "")
    assert all(text.startswith("#cloud-config\n") for text in EXAMPLES.values())


@pytest.mark.parametrize("suite", SUITES[1:])
def test_the_users_own_wins_over_the_clusters_default(tmp_path: Path, suite: str) -> None:
    """vendor_data from [defaults] for all, user_data of one instance: keys of the latter count."""
    default = EXAMPLES["apt-proxy.yaml"].encode() + b"packages: [jq]\n"
    own = b"#cloud-config\npackages: [vim]\n"
    seeds = [
        texts(vendor_data=default),
        texts(vendor_data=default, user_data=own, uuid=OTHER),
    ]
    first, second = boots(suite, tmp_path, *seeds)
    assert (first["packages"], second["packages"]) == (["jq"], ["vim"])
    assert first["cfg"]["apt"] == second["cfg"]["apt"] == {"http_proxy": "http://192.0.2.10:3142"}
    assert first["network at boot"] is second["network at boot"] is True


@pytest.mark.parametrize("suite", SUITES[1:])
def test_the_password_of_the_default_user(tmp_path: Path, suite: str) -> None:
    password = "$6$abcdefgh$" + "x" * 86
    theirs = b"#cloud-config\npackages: [jq]\n"
    given = texts(vendor_data=theirs, password_hash=password)
    (made,) = boots(suite, tmp_path, given)
    assert made["cfg"]["password"] == password
    assert made["cfg"]["chpasswd"] == {"expire": False}
    assert made["packages"] == ["jq"]
    # what cloud-init takes for a hash and not for a plain password
    source = unpacked(suite) / "lib/python3/dist-packages/cloudinit/config/cc_set_passwords.py"
    pattern = re.search(r"re\.compile\(r[\"'](.+?)[\"']\)", source.read_text())
    assert pattern is not None
    for each in (password, "$5$rounds=5000$salt$hash.", "$2y$10$abcdefghijklmnopqrstuv"):
        assert values.password_hash(each) == each
        assert re.match(pattern[1], each)
