"""What cloudbase-init, which is Windows' cloud-init, makes of what create wrote: its own code.

It comes from PyPI into build/ and runs under Debian's Python in bubblewrap, with inside_windows.py.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import pytest

from lib.guest import network, seed
from tests.cloud_init import link, unavailable
from tests.conftest import ROOT, SYSTEM_PATH
from tests.images import disk_image
from tests.scripts.conftest import UUID, Door, seed_files
from tests.test_network import LAN, LAN6, MACS, nic
from tests.test_renderers import CASES, SERVERS
from tests.test_stages import OTHER, texts

PINS = ROOT / "tests/cloudbase-init.txt"
PLUGINS = """
username=Admin
plugins=cloudbaseinit.plugins.common.sethostname.SetHostNamePlugin,
 cloudbaseinit.plugins.common.networkconfig.NetworkConfigPlugin,
 cloudbaseinit.plugins.common.sshpublickeys.SetUserSSHPublicKeysPlugin,
 cloudbaseinit.plugins.common.userdata.UserDataPlugin
"""
ADAPTERS = {mac: f"Ethernet {n}" for n, mac in enumerate(MACS)}
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f me"

Boot = tuple[dict[str, Path], list[Path]]  # folders by label, and raw disks


@functools.cache
def cloudbase_init() -> Path:
    """Return where it is, fetched once for these pins."""
    folder = ROOT / "build" / "cloudbase-init"
    if not (folder / PINS.name).is_file() or (folder / PINS.name).read_text() != PINS.read_text():
        shutil.rmtree(folder, ignore_errors=True)
        argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        argv += ["--target", str(folder), "--requirement", str(PINS)]
        ran = subprocess.run(argv, capture_output=True, text=True)
        if ran.returncode != 0:
            unavailable(f"cloudbase-init is not to be had from PyPI: {ran.stderr[-500:]}")
        shutil.copy(PINS, folder)
    return folder


def recipe() -> str:
    """Return the configuration that doc/guests.md tells, with this test's mtools and user."""
    text = (ROOT / "doc/guests.md").read_text().partition("\n## Windows\n")[2]
    lines = re.findall(r"^    (.*)$", text.partition("\n## ")[0], re.MULTILINE)
    told = "\n".join(line for line in lines if re.match(r"\[DEFAULT|[a-z_]+=", line))
    config, count = re.subn(r"mtools_path=.*", f"mtools_path=/tmp/mtools/{PLUGINS}", told)
    assert count == 1
    return config


def windows(folder: Path, *machines: list[Boot]) -> list[list[dict[str, Any]]]:
    """Let machines boot, each as often as it has seeds; return what each boot did."""
    argv: list[Union[str, Path]] = ["bwrap", "--unshare-all", "--die-with-parent"]
    argv += ["--ro-bind", "/usr", "/usr"]
    argv += [word for name in ("bin", "lib", "lib64", "sbin") for word in link(name)]
    argv += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--ro-bind", folder, folder]
    argv += ["--ro-bind", cloudbase_init(), "/cloudbase-init"]
    argv += ["--ro-bind", ROOT / "tests/inside_windows.py", "/inside_windows.py"]
    argv += ["--clearenv", "--setenv", "PATH", SYSTEM_PATH, "--setenv", "HOME", "/tmp"]
    argv += ["--setenv", "PYTHONPATH", "/cloudbase-init", "--"]
    argv += ["/usr/bin/python3", "-W", "ignore", "/inside_windows.py"]
    text = json.dumps([recipe(), [(ADAPTERS, boots) for boots in machines]], default=os.fspath)
    ran = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    result: list[list[dict[str, Any]]] = json.loads(ran.stdout)
    return result


def shown(folder: Path, files: dict[str, bytes]) -> dict[str, Path]:
    """Return the seed's partition as Windows shows it: a volume with a label, and its files."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_bytes(text)
    return {"cidata": folder}


@pytest.mark.parametrize("place", ["gap", "disk"])
def test_windows_takes_what_create_wrote(
    door: Door, disk: Callable[..., Path], tmp_path: Path, place: str
) -> None:
    script = "#ps1\r\nNew-Item C:\\here\r\n"
    disks = [disk(), *([disk(4, "disk1")] if place == "disk" else [])]
    variables = {
        "OSP_IMAGE": str(disk_image(tmp_path / "image", size_mib=12)),
        "OSP_SSH_KEYS": KEY,
        "OSP_USER_DATA": "base64:" + base64.b64encode(script.encode()).decode(),
        "OSP_DNS_SERVERS": "192.0.2.53",
        "NIC_0_MAC": MACS[0],
        "NIC_0_IP": "192.0.2.10",
        "NIC_0_NETWORK_SUBNET": "192.0.2.0/24",
        "NIC_0_NETWORK_GATEWAY": "192.0.2.1",
        "DISK_1_NAME": "cidata",
    }
    result = door("create", disks=disks, OSP_SEED=place, **variables)
    assert result.status == 0, result.log
    volumes = shown(tmp_path / "volume", seed_files(disks[0])) if place == "gap" else {}
    ((made,),) = windows(tmp_path, [(volumes, disks)])
    assert made["name"] == "vm1"
    assert made["nics"][MACS[0]] == "eth0"
    assert made["networks"] == [["eth0", "192.0.2.10", "24", "192.0.2.1", ["192.0.2.53"]]]
    assert made["keys"] == {"Admin": KEY + "\n"}
    assert made["ran"] == [script.replace("\r\n", "\n")]
    assert made["log"] == ""


def test_every_network_of_version_1(tmp_path: Path) -> None:
    boots: list[list[Boot]] = []
    for n, (nics, _facts) in enumerate(CASES.values()):
        config = seed.document(network.config(nics, 1, "auto", SERVERS, ["example.com"]))
        boots.append([(shown(tmp_path / str(n), texts(network=config)), [])])
    for (made,), (case, (nics, facts)) in zip(windows(tmp_path, *boots), CASES.items()):
        assert made["log"] == ("" if nics else "Network configuration is empty\n"), case
        assert made["links"] == [[name, True] for name in facts], case
        assert [made["nics"][each.mac] for each in nics] == list(facts), case
        for name, told in facts.items():
            rows = [row[1:] for row in made["networks"] if row[0] == name]
            assert {f"{row[0]}/{row[1]}" for row in rows} == told.addresses, case
            assert {row[2] for row in rows} - {None} == told.gateways, case
            for address, _prefix, gateway, _dns in rows:  # of its own family
                assert gateway is None or (":" in gateway) == (":" in address), case
        if not any(told.dhcp for told in facts.values()):
            dns = {server for row in made["networks"] for server in row[4]}
            families = {":" in each for told in facts.values() for each in told.addresses}
            assert dns == {server for server in SERVERS if (":" in server) in families}, case


def test_version_2_loses_a_gateway_beside_ipv6(tmp_path: Path) -> None:
    """Why doc/guests.md says version 1: theirs has one default route for both families."""
    config = network.config([nic(ip="192.0.2.10", **LAN, **LAN6)], 2, "auto", [], [])
    ((made,),) = windows(
        tmp_path, [(shown(tmp_path / "seed", texts(network=seed.document(config))), [])]
    )
    assert {row[3] for row in made["networks"]} == {"2001:db8::1"}


def test_no_network(tmp_path: Path) -> None:
    ((made,),) = windows(tmp_path, [(shown(tmp_path / "seed", texts(network=None)), [])])
    assert (made["networks"], made["links"]) == ([], [])
    assert made["name"] == "web1"
    assert "Network config 'disabled' is not a list" in made["log"].replace('"', "'")


USER_DATA: list[tuple[bytes, Union[str, None]]] = [
    (b"rem cmd\necho a > C:\\b\n", "rem cmd\necho a > C:\\b\n"),
    (b"#ps1_sysnative\nGet-Item C:\\\n", "#ps1_sysnative\nGet-Item C:\\\n"),
    (b"<powershell>Get-Item C:\\</powershell>", "Get-Item C:\\"),
    (b"#cloud-config\nruncmd: ['echo a']\n", "rem cmd\necho a"),
    (b"#include-once\nhttp://169.254.169.254/\n", None),  # metad=yes
    (b"", None),
]


def test_user_data(tmp_path: Path) -> None:
    boots: list[list[Boot]] = [
        [(shown(tmp_path / str(n), texts(user_data=text)), [])]
        for n, (text, _ran) in enumerate(USER_DATA)
    ]
    for (made,), (text, ran) in zip(windows(tmp_path, *boots), USER_DATA):
        assert [each.strip() for each in made["ran"]] == ([] if ran is None else [ran.strip()]), (
            text
        )
        assert ("Unsupported user_data format" in made["log"]) is text.startswith(b"#include")


def test_a_rename_is_not_followed_a_clone_is_new(tmp_path: Path) -> None:
    """Each of its plugins runs once for an instance-id."""
    first = texts()
    other = seed.document(network.config([nic(ip="192.0.2.11", **LAN)], 1, "auto", [], []))
    renamed = seed.renamed(first, name="web2.example.com", uuid=UUID, network=other)
    clone = seed.renamed(renamed, name="web3-of-our-cluster.example.com", uuid=OTHER, network=other)
    boots: list[Boot] = [
        (shown(tmp_path / str(n), files), []) for n, files in enumerate([first, renamed, clone])
    ]
    (made,) = windows(tmp_path, boots)
    assert [each["name"] for each in made] == ["web1", None, "web3-of-our-clu"]
    addresses = [[row[1] for row in each["networks"]] for each in made]
    assert addresses == [["192.0.2.10"], [], ["192.0.2.11"]]
