"""What cloud-init's renderers make of the network-config, in several versions."""

from __future__ import annotations

import collections
import configparser
import functools
import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from lib.environment import Nic
from lib.guest import network
from tests.cloud_init import SUITES, inside
from tests.conftest import ROOT
from tests.test_network import LAN, LAN6, TALK, nic


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
    ethernets = files["etc/netplan/cloud-init.yaml"]["network"].get("ethernets", {})
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
                # a profile without a word of IPv4 asks DHCP; of IPv6, heeds routers as others do
                method = section.get("method", "auto" if family == 4 else "")
                if method == "auto" and not addresses:
                    told.dhcp.add(family)
    return facts


def ifcfg(files: Files) -> Iterator[tuple[str, dict[str, str], Told]]:
    """Yield path and keys of each NIC's file, and what RHEL and SUSE say in the same words."""
    resolver = set(re.findall("^nameserver (.*)$", files.get("etc/resolv.conf", ""), re.MULTILINE))
    for path, text in files.items():
        if "/ifcfg-" in path:
            keys = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
            told = Told(dns=set(resolver))
            if "IPADDR" in keys:
                both = ipaddress.ip_interface(f"{keys['IPADDR']}/{keys['NETMASK']}")
                told.addresses.add(str(both))
            yield path, keys, told


def read_sysconfig(files: Files) -> Facts:
    facts = {}
    for _path, keys, told in ifcfg(files):
        facts[keys["DEVICE"]] = told
        if "IPV6ADDR" in keys:
            told.addresses.add(keys["IPV6ADDR"])
        told.gateways |= {keys[key] for key in ("GATEWAY", "IPV6_DEFAULTGW") if key in keys}
        told.dns |= {value for key, value in keys.items() if re.fullmatch("DNS[0-9]", key)}
        told.dhcp |= {4} if keys["BOOTPROTO"] == "dhcp" else set()
        told.dhcp |= {6} if keys.get("DHCPV6C") == "yes" else set()
    return facts


def read_wicked(files: Files) -> Facts:
    families = {"dhcp": {4}, "dhcp4": {4}, "dhcp6": {6}, "static": set()}
    facts = {}
    for path, keys, told in ifcfg(files):
        facts[path.rpartition("-")[2]] = told
        if "IPADDR6" in keys:
            told.addresses.add(keys["IPADDR6"])
        told.dhcp |= families[keys["BOOTPROTO"]]
    return facts


READERS: dict[str, Callable[[Files], Facts]] = {
    "eni": read_eni,
    "netplan": read_netplan,
    "networkd": read_networkd,
    "NetworkManager": read_network_manager,
    "sysconfig": read_sysconfig,
    "wicked": read_wicked,
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
    "IPv6 only, of a network without IPv4": (
        [nic(**LAN6)],
        {"eth0": Told({EUI64}, {"2001:db8::1"})},
    ),
    "no NIC": ([], {}),
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
    "two in one network": (
        [nic(0, ip="192.0.2.10", **LAN), nic(1, ip="192.0.2.11", **LAN)],
        {"eth0": STATIC, "eth1": Told({"192.0.2.11/24"})},
    ),
    "IPv4, and IPv6 on the second": (
        [nic(0, ip="192.0.2.10", **LAN), nic(1, ip="2001:db8::10", **LAN6)],
        {"eth0": STATIC, "eth1": Told({"2001:db8::10/64"}, {"2001:db8::1"})},
    ),
    "eight": (
        [
            nic(n, ip=f"10.0.{n}.2", subnet=f"10.0.{n}.0/24", gateway=f"10.0.{n}.1")
            for n in range(8)
        ],
        {f"eth{n}": Told({f"10.0.{n}.2/24"}, {"10.0.0.1"} if n == 0 else set()) for n in range(8)},
    ),
}
SERVERS = ["192.0.2.53", "2001:db8::53"]
# Leap 15.6 has 23.3, which is as 22.4 here: its variant says version 2. Upstream never writes
# routes for wicked, SUSE has a patch for that.
WICKED_WITHOUT_DNS = {
    *(("bullseye", 1), ("bullseye", 2), ("bookworm", 1)),
    *(("noble", 1), ("noble", 2)),
}
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
    asks = any(told.dhcp for told in expected.values())
    families = {family_of(each) for told in expected.values() for each in told.addresses}
    families |= {family for told in expected.values() for family in told.dhcp}
    servers = {each for each in SERVERS if family_of(each) in families}
    for renderer, files in made.items():
        found = READERS[renderer](files)
        for name, told in expected.items():
            what = f"{renderer} {name} {found[name]}"
            assert found[name].addresses == told.addresses, what
            assert found[name].gateways == (told.gateways if renderer != "wicked" else set()), what
            has_ipv4 = 4 in told.dhcp or any("." in each for each in told.addresses)
            if renderer == "NetworkManager" and not has_ipv4:
                # cloud-init has no words by which it would leave IPv4 alone (doc/guests.md)
                found[name].dhcp.discard(4)
            assert found[name].dhcp == told.dhcp, what
        assert found.keys() == expected.keys(), renderer
        if asks and (version, renderer) in NO_DNS_BESIDE_DHCP:
            continue
        if expected and (renderer != "wicked" or (suite, version) not in WICKED_WITHOUT_DNS):
            dns = set().union(*(each.dns for each in found.values()))
            # some leave out what DHCP was not asked for
            assert servers <= dns <= set(SERVERS if asks else servers), f"{renderer} {dns}"
            assert "example.com" in str(files), renderer
    if case == "routed" and (version == 2 or suite not in ("bullseye", "bookworm")):
        # what version 2 is for: before 23.1 cloud-init does not say it by itself
        assert "'on-link': True" in str(made["netplan"])


def family_of(address: str) -> int:
    return 6 if ":" in address else 4


def test_why_leap_15_6_has_version_2(rendered: Callable[[str], dict[str, Any]]) -> None:
    made = rendered("bookworm")
    assert read_wicked(made["1 static"]["wicked"])["eth0"].dns == set()
    assert read_wicked(made["2 static"]["wicked"])["eth0"].dns == {"192.0.2.53"}
    variant = (ROOT / "variants.d/opensuse-leap-15.6.conf").read_text()
    assert "network_version = 2\n" in variant
