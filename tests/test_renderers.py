"""What cloud-init itself makes of the seed: its renderers and its early stages, several versions.

The versions are Debian's and Ubuntu's packages, unpacked below build/, never installed; they run in
bubblewrap with inside_guest.py, the python3 modules that they need are Debian's.
"""

from __future__ import annotations

import base64
import collections
import configparser
import functools
import gzip
import ipaddress
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import pytest

from lib.environment import Nic
from lib.guest import network, seed
from lib.settings import values
from tests.conftest import CI, ROOT, SYSTEM_PATH, require
from tests.test_network import LAN, LAN6, TALK, nic

DEBIAN = ("http://deb.debian.org/debian", "http://archive.debian.org/debian")
UBUNTU = ("http://archive.ubuntu.com/ubuntu", "http://old-releases.ubuntu.com/ubuntu")
# in the order of their versions; EL has 24.1 and 24.4 too
MIRRORS = {
    "bullseye": DEBIAN,  # 20.4
    "bookworm": DEBIAN,  # 22.4
    "noble": UBUNTU,  # 24.1
    "focal-updates": UBUNTU,  # 24.4
    "trixie": DEBIAN,  # 25.1
    "jammy-updates": UBUNTU,  # 26.1
    "testing": DEBIAN,  # 26.2 and newer
    "resolute-updates": UBUNTU,  # as noble-updates
}
SUITES = tuple(MIRRORS)
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PACKAGES = {"resolute-updates": "cloud-init-base"}  # which cloud-init there only depends on
MODULES = ("configobj", "jinja2", "jsonpatch", "jsonschema", "oauthlib", "requests", "yaml")
GUEST = ROOT / "tests" / "inside_guest.py"


# --- cloud-init, of several versions


def unavailable(reason: str) -> None:
    if CI:
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def unpacked(suite: str) -> Path:
    """Return the /usr of this suite's cloud-init, fetched once."""
    require("apt-get", "bwrap", "dpkg-deb")
    argv = ["/usr/bin/python3", "-W", "ignore", "-c", f"import {', '.join(MODULES)}"]
    if subprocess.run(argv, capture_output=True).returncode != 0:
        unavailable(f"not installed, some of: python3-{' python3-'.join(MODULES)}")
    directory = ROOT / "build" / "cloud-init" / suite
    if not (directory / "usr").is_dir():
        shutil.rmtree(directory, ignore_errors=True)
        keyring = ubuntu_keyring() if MIRRORS[suite] == UBUNTU else KEYRING
        package = PACKAGES.get(suite, "cloud-init")
        for mirror in MIRRORS[suite]:
            if fetched(mirror, suite, keyring, package, directory):
                break
        else:
            unavailable(f"{package} of {suite} is not to be had from {' or '.join(MIRRORS[suite])}")
    return directory / "usr"


@functools.cache
def ubuntu_keyring() -> str:
    """Return Ubuntu's keys, which Debian 13 has, signed with Debian's."""
    directory = ROOT / "build" / "cloud-init" / "ubuntu-keyring"
    if not directory.is_dir() and not fetched(
        DEBIAN[0], "trixie", KEYRING, "ubuntu-keyring", directory
    ):
        unavailable(f"ubuntu-keyring of trixie is not to be had from {DEBIAN[0]}")
    return str(directory / "usr/share/keyrings/ubuntu-archive-keyring.gpg")


def fetched(mirror: str, suite: str, keyring: str, package: str, directory: Path) -> bool:
    """Download and unpack the package with an apt of its own, which knows nothing else."""
    apt = directory / "apt"
    (apt / "lists" / "partial").mkdir(parents=True)
    (apt / "archives" / "partial").mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [signed-by={keyring}] {mirror} {suite} main\n")
    options = {
        "Acquire::Check-Valid-Until": "false",
        "Acquire::Languages": "none",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "",
        "Dir::Cache": apt,
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/nonexistent",
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
    }
    argv = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in options.items())]
    for words in (["update"], ["download", package]):
        if subprocess.run([*argv, *words], cwd=apt, capture_output=True).returncode != 0:
            shutil.rmtree(directory)
            return False
    (archive,) = apt.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, directory / "unpacked"], check=True)
    shutil.rmtree(apt)
    (directory / "unpacked" / "usr").rename(directory / "usr")
    return True


def inside(suite: str, etc: Path, task: str, given: Any) -> Any:
    """Run inside_guest.py under the suite's cloud-init; /etc is its own, the rest read-only."""
    usr = unpacked(suite)
    (etc / "cloud").mkdir(parents=True)
    (etc / "cloud" / "cloud.cfg").write_text(
        "datasource_list: [NoCloud]\nsystem_info: {distro: debian}\n"
    )
    (etc / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (etc / "os-release").write_text("ID=debian\nVERSION_ID=12\nVERSION_CODENAME=bookworm\n")
    (etc / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (etc / "group").write_text("root:x:0:\n")
    links = [word for name in ("bin", "lib", "lib64", "sbin") for word in link(name)]
    argv = ["bwrap", "--unshare-all", "--die-with-parent", "--uid", "0", "--gid", "0"]
    argv += ["--ro-bind", "/usr", "/usr", *links, "--proc", "/proc", "--dev", "/dev"]
    argv += ["--tmpfs", "/tmp", "--tmpfs", "/run", "--tmpfs", "/var", "--bind", str(etc), "/etc"]
    argv += ["--ro-bind", str(usr), "/guest", "--ro-bind", str(GUEST), "/inside_guest.py"]
    argv += ["--clearenv", "--setenv", "PATH", f"/guest/bin:{SYSTEM_PATH}"]
    argv += ["--setenv", "PYTHONPATH", "/guest/lib/python3/dist-packages", "--"]
    argv += ["/usr/bin/python3", "-W", "ignore", "/inside_guest.py"]
    text = json.dumps([task, given])
    ran = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def link(name: str) -> list[str]:
    path = Path("/", name)
    return ["--symlink", str(path.readlink()), str(path)] if path.is_symlink() else []


# --- the renderers


@dataclass
class Told:
    """What a guest's network software was told about one NIC."""

    addresses: set[str] = field(default_factory=set)
    gateways: set[str] = field(default_factory=set)
    dns: set[str] = field(default_factory=set)
    dhcp: set[int] = field(default_factory=set)


Files = dict[str, Any]
Facts = dict[str, Told]


def read_eni(files: Files) -> Facts:
    facts: Facts = {}
    for line in files["etc/network/interfaces"].splitlines():
        words = line.split()
        if words[:1] == ["iface"]:
            told = facts.setdefault(words[1], Told())
            if words[3] == "dhcp":
                told.dhcp.add(6 if words[2] == "inet6" else 4)
        elif words[:1] == ["address"]:
            told.addresses.add(words[1])
        elif words[:1] == ["gateway"]:
            told.gateways.add(words[1])
        elif words[:1] == ["dns-nameservers"]:
            told.dns.update(words[1:])
        elif words[:1] == ["post-up"] and (match := re.search("default (?:gw|via) ([^ ]+)", line)):
            told.gateways.add(match[1])
    del facts["lo"]
    return facts


def read_netplan(files: Files) -> Facts:
    ethernets = files["etc/netplan/cloud-init.yaml"]["network"]["ethernets"]
    facts = {}
    for name, entry in ethernets.items():
        assert entry["set-name"] == name
        routes = entry.get("routes", [])
        gateways = {entry.get("gateway4"), entry.get("gateway6"), *(each["via"] for each in routes)}
        facts[name] = Told(
            addresses=set(entry.get("addresses", [])),
            gateways=gateways - {None},
            dns=set(entry.get("nameservers", {}).get("addresses", [])),
            dhcp={family for family in (4, 6) if entry.get(f"dhcp{family}")},
        )
    return facts


def read_networkd(files: Files) -> Facts:
    facts = {}
    for path, text in files.items():
        if path.endswith(".network"):
            values: dict[str, set[str]] = collections.defaultdict(set)
            for key, value in re.findall("^([A-Za-z]+)=(.*)$", text, re.MULTILINE):
                values[key].update(value.split())
            (name,) = values["Name"]
            families = {"ipv4": {4}, "ipv6": {6}, "yes": {4, 6}}
            facts[name] = Told(
                addresses=values["Address"],
                gateways=values["Gateway"],
                dns=values["DNS"],
                dhcp=families.get("".join(values["DHCP"]), set()),
            )
    return facts


def read_network_manager(files: Files) -> Facts:
    facts = {}
    for path, text in files.items():
        if path.endswith(".nmconnection"):
            parser = configparser.ConfigParser()
            parser.read_string(text)
            told = facts[parser["connection"]["id"].split()[1]] = Told()
            for family in (4, 6):
                section = parser[f"ipv{family}"] if parser.has_section(f"ipv{family}") else {}
                addresses = {v for k, v in section.items() if re.fullmatch("address[0-9]+", k)}
                told.addresses |= addresses
                if "gateway" in section:
                    told.gateways.add(section["gateway"])
                for key, value in section.items():
                    if re.fullmatch("route[0-9]+", key):
                        told.gateways.add(value.split(",")[1])
                told.dns |= set(filter(None, section.get("dns", "").split(";")))
                if section.get("method") == "auto" and not addresses:
                    told.dhcp.add(family)
    return facts


def read_sysconfig(files: Files) -> Facts:
    facts = {}
    resolver = set(re.findall("^nameserver (.*)$", files.get("etc/resolv.conf", ""), re.MULTILINE))
    for path, text in files.items():
        if "/ifcfg-" in path:
            keys = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
            told = facts[keys["DEVICE"]] = Told(dns=set(resolver))
            if "IPADDR" in keys:
                both = ipaddress.ip_interface(f"{keys['IPADDR']}/{keys['NETMASK']}")
                told.addresses.add(str(both))
            if "IPV6ADDR" in keys:
                told.addresses.add(keys["IPV6ADDR"])
            told.gateways |= {keys[key] for key in ("GATEWAY", "IPV6_DEFAULTGW") if key in keys}
            told.dns |= {value for key, value in keys.items() if re.fullmatch("DNS[0-9]", key)}
            told.dhcp |= {4} if keys["BOOTPROTO"] == "dhcp" else set()
            told.dhcp |= {6} if keys.get("DHCPV6C") == "yes" else set()
    return facts


READERS: dict[str, Callable[[Files], Facts]] = {
    "eni": read_eni,
    "netplan": read_netplan,
    "networkd": read_networkd,
    "NetworkManager": read_network_manager,
    "sysconfig": read_sysconfig,
}
EUI64 = "2001:db8::a800:ff:fe12:3400/64"
STATIC = Told({"192.0.2.10/24"}, {"192.0.2.1"})
BOTH = Told({"192.0.2.10/24", EUI64}, {"192.0.2.1", "2001:db8::1"})
CASES: dict[str, tuple[list[Nic], Facts]] = {
    "static": ([nic(ip="192.0.2.10", **LAN)], {"eth0": STATIC}),
    "DHCP": ([nic()], {"eth0": Told(dhcp={4})}),
    "DHCPv6": ([nic(ip="2001:db8::10")], {"eth0": Told(dhcp={6})}),
    "IPv4 and IPv6": ([nic(ip="192.0.2.10", **LAN, **LAN6)], {"eth0": BOTH}),
    "DHCP and IPv6": (
        [nic(**LAN, **LAN6)],
        {"eth0": Told({EUI64}, {"2001:db8::1"}, dhcp={4})},
    ),
    "IPv6 only": (
        [nic(ip="2001:db8::10", **LAN6)],
        {"eth0": Told({"2001:db8::10/64"}, {"2001:db8::1"})},
    ),
    "routed": (
        [nic(ip="203.0.113.5", mode="routed")],
        {"eth0": Told({"203.0.113.5/32"}, {"169.254.1.1"})},
    ),
    "routed IPv6": (
        [nic(ip="2001:db8::10", mode="routed")],
        {"eth0": Told({"2001:db8::10/128"}, {"fe80::1"})},
    ),
    "two and the communication NIC": (
        [
            nic(0, ip="192.0.2.10", **LAN, **LAN6),
            nic(1, ip="198.51.100.2", subnet="198.51.100.0/24", gateway="198.51.100.1"),
            nic(2, ip="169.254.0.7", name=TALK, mode="routed"),
        ],
        {
            "eth0": BOTH,
            "eth1": Told({"198.51.100.2/24"}),
            "eth2": Told({"169.254.0.7/16"}),
        },
    ),
    "five": (
        [
            nic(n, ip=f"10.0.{n}.2", subnet=f"10.0.{n}.0/24", gateway=f"10.0.{n}.1")
            for n in range(5)
        ],
        {f"eth{n}": Told({f"10.0.{n}.2/24"}, {"10.0.0.1"} if n == 0 else set()) for n in range(5)},
    ),
}
SERVERS = ["192.0.2.53", "2001:db8::53"]
# beside DHCP these renderers leave out what version 1 or 2 says of DNS, some cloud-init or all
NO_DNS_BESIDE_DHCP = {(1, "netplan"), (2, "eni"), (2, "NetworkManager"), (2, "sysconfig")}


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    @functools.cache
    def of(suite: str) -> dict[str, Any]:
        configs = {
            f"{version} {case}": network.config(nics, version, "auto", SERVERS, ["example.com"])
            for version in (1, 2)
            for case, (nics, _facts) in CASES.items()
        }
        result = inside(suite, tmp_path_factory.mktemp(suite) / "etc", "render", configs)
        assert isinstance(result, dict)
        return result

    return of


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("suite", SUITES)
def test_every_renderer_gets_it_right(
    rendered: Callable[[str], dict[str, Any]], suite: str, version: int, case: str
) -> None:
    made = rendered(suite)[f"{version} {case}"]
    expected = CASES[case][1]
    for renderer, files in made.items():
        found = READERS[renderer](files)
        for name, told in expected.items():
            what = f"{renderer} {name} {found[name]}"
            assert found[name].addresses == told.addresses, what
            assert found[name].gateways == told.gateways, what
            assert found[name].dhcp == told.dhcp, what
        assert found.keys() == expected.keys(), renderer
        if not expected["eth0"].dhcp or (version, renderer) not in NO_DNS_BESIDE_DHCP:
            # some write no server of a family that the NIC has no address of
            families = {4 if "." in each else 6 for each in expected["eth0"].addresses}
            families |= expected["eth0"].dhcp
            needed = {each for each in SERVERS if ipaddress.ip_address(each).version in families}
            assert needed <= found["eth0"].dns <= set(SERVERS), f"{renderer} {found['eth0']}"
            assert "example.com" in str(files), renderer
    if case == "routed" and (version == 2 or suite not in ("bullseye", "bookworm")):
        # what version 2 is for: before 23.1 cloud-init does not say it by itself
        assert "'on-link': True" in str(made["netplan"])


# --- the early stages of a boot

UUID, OTHER = "7eb7a864-32d5-4cce-a37f-4dfde4aaf87e", "11111111-2222-4333-8444-555555555555"
KEY = "ssh-ed25519 AAAA me"


def texts(directory: Path, **changed: Any) -> dict[str, bytes]:
    values: dict[str, Any] = {
        "name": "web1.example.com",
        "uuid": UUID,
        "ssh_keys": [KEY],
        "user_data": b"",
        "vendor_data": b"",
        "network": seed.document(network.config([nic(ip="192.0.2.10", **LAN)], 1, "auto", [], [])),
    }
    directory.mkdir()
    for file, text in seed.texts(**{**values, **changed}).items():
        (directory / file).write_bytes(text)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


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
    first = texts(tmp_path / "seed", vendor_data=theirs)
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
        texts(tmp_path / str(n), vendor_data=theirs, uuid=f"{n}{UUID[1:]}")
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
        texts(tmp_path / "default", vendor_data=default),
        texts(tmp_path / "own", vendor_data=default, user_data=own, uuid=OTHER),
    ]
    first, second = boots(suite, tmp_path, *seeds)
    assert (first["packages"], second["packages"]) == (["jq"], ["vim"])
    assert first["cfg"]["apt"] == second["cfg"]["apt"] == {"http_proxy": "http://192.0.2.10:3142"}
    assert first["network at boot"] is second["network at boot"] is True


@pytest.mark.parametrize("suite", SUITES[1:])
def test_the_password_of_the_default_user(tmp_path: Path, suite: str) -> None:
    password = "$6$abcdefgh$" + "x" * 86
    theirs = b"#cloud-config\npackages: [jq]\n"
    given = texts(tmp_path / "seed", vendor_data=theirs, password_hash=password)
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
