"""lib/guest/network.py: what a guest is told about its NICs, in both versions."""

from __future__ import annotations

from typing import Any

import pytest

from lib.environment import Environment, Nic
from lib.errors import Error
from lib.guest import network

MACS = [f"aa:00:00:12:34:0{n}" for n in range(8)]
LAN: dict[str, Any] = {"subnet": "192.0.2.0/24", "gateway": "192.0.2.1"}
LAN6: dict[str, Any] = {"subnet6": "2001:db8::/64", "gateway6": "2001:db8::1"}
EUI64 = "2001:db8::a800:ff:fe12:3400/64"  # of MACS[0]
TALK = "ganeti:communication:web1.example.com"


def nic(index: int = 0, **values: Any) -> Nic:
    values = {"mode": "bridged", **values}
    return Nic(index=index, mac=MACS[index], **values)


def v1(nics: list[Nic], mode: str = "auto", **dns: list[str]) -> list[list[dict[str, Any]]]:
    """Return the subnets of every NIC."""
    made = network.config(nics, 1, mode, dns.get("servers", []), dns.get("search", []))
    assert made["version"] == 1
    for given, entry in zip(nics, made["config"]):
        assert entry["type"] == "physical"
        assert entry["name"] == f"eth{given.index}"
        assert entry["mac_address"] == given.mac
    return [entry["subnets"] for entry in made["config"][: len(nics)]]


def v2(nics: list[Nic], mode: str = "auto", **dns: list[str]) -> list[dict[str, Any]]:
    """Return what every NIC gets beside its identity."""
    made = network.config(nics, 2, mode, dns.get("servers", []), dns.get("search", []))
    assert made["version"] == 2
    for given, (name, entry) in zip(nics, made["ethernets"].items()):
        assert name == entry.pop("set-name") == f"eth{given.index}"
        assert entry.pop("match") == {"macaddress": given.mac}
    return list(made["ethernets"].values())


STATIC = {"type": "static", "address": "192.0.2.10/24", "gateway": "192.0.2.1"}
ONE_NIC = {
    "static": (
        nic(ip="192.0.2.10", **LAN),
        [STATIC],
        {"addresses": ["192.0.2.10/24"], "gateway4": "192.0.2.1"},
    ),
    "openvswitch": (
        nic(ip="192.0.2.10", **{**LAN, "mode": "openvswitch"}),
        [STATIC],
        {"addresses": ["192.0.2.10/24"], "gateway4": "192.0.2.1"},
    ),
    "no gateway": (
        nic(ip="192.0.2.10", subnet="192.0.2.0/24"),
        [{"type": "static", "address": "192.0.2.10/24"}],
        {"addresses": ["192.0.2.10/24"]},
    ),
    "neither IP nor network": (nic(), [{"type": "dhcp"}], {"dhcp4": True}),
    "network without IP": (nic(**LAN), [{"type": "dhcp"}], {"dhcp4": True}),
    "IP without network": (nic(ip="192.0.2.10"), [{"type": "dhcp"}], {"dhcp4": True}),
    "IPv6 beside IPv4": (
        nic(ip="192.0.2.10", **LAN, **LAN6),
        [STATIC, {"type": "static6", "address": EUI64, "gateway": "2001:db8::1"}],
        {
            "addresses": ["192.0.2.10/24", EUI64],
            "gateway4": "192.0.2.1",
            "gateway6": "2001:db8::1",
        },
    ),
    "IPv6 beside DHCP": (
        nic(**LAN, **LAN6),
        [{"type": "dhcp"}, {"type": "static6", "address": EUI64, "gateway": "2001:db8::1"}],
        {"dhcp4": True, "addresses": [EUI64], "gateway6": "2001:db8::1"},
    ),
    "IPv6 only": (
        nic(ip="2001:db8::10", **LAN6),
        [{"type": "static6", "address": "2001:db8::10/64", "gateway": "2001:db8::1"}],
        {"addresses": ["2001:db8::10/64"], "gateway6": "2001:db8::1"},
    ),
    "IPv6 only, made of the MAC": (
        nic(**LAN6),
        [{"type": "static6", "address": EUI64, "gateway": "2001:db8::1"}],
        {"addresses": [EUI64], "gateway6": "2001:db8::1"},
    ),
    "IPv6 without network": (nic(ip="2001:db8::10"), [{"type": "dhcp6"}], {"dhcp6": True}),
    "IPv6 by a link-local gateway": (
        nic(ip="2001:db8::10", **{**LAN6, "gateway6": "fe80::1"}),
        [{"type": "static6", "address": "2001:db8::10/64", "gateway": "fe80::1"}],
        {"addresses": ["2001:db8::10/64"], "gateway6": "fe80::1"},
    ),
    "routed": (
        nic(ip="203.0.113.5", mode="routed"),
        [{"type": "static", "address": "203.0.113.5/32", "gateway": "169.254.1.1"}],
        {
            "addresses": ["203.0.113.5/32"],
            "routes": [{"to": "0.0.0.0/0", "via": "169.254.1.1", "on-link": True}],
        },
    ),
    "routed in a network": (
        nic(ip="192.0.2.10", **{**LAN, "mode": "routed"}),
        [STATIC],
        {"addresses": ["192.0.2.10/24"], "gateway4": "192.0.2.1"},
    ),
    "routed IPv6": (
        nic(ip="2001:db8::10", mode="routed"),
        [{"type": "static6", "address": "2001:db8::10/128", "gateway": "fe80::1"}],
        {"addresses": ["2001:db8::10/128"], "gateway6": "fe80::1"},
    ),
    "gateway outside the subnet": (
        nic(ip="203.0.113.5", subnet="203.0.113.5/32", gateway="10.9.9.1"),
        [{"type": "static", "address": "203.0.113.5/32", "gateway": "10.9.9.1"}],
        {
            "addresses": ["203.0.113.5/32"],
            "routes": [{"to": "0.0.0.0/0", "via": "10.9.9.1", "on-link": True}],
        },
    ),
    "IPv6 gateway outside the subnet": (
        nic(ip="2001:db8::10", **{**LAN6, "gateway6": "2001:db8:1::1"}),
        [{"type": "static6", "address": "2001:db8::10/64", "gateway": "2001:db8:1::1"}],
        {
            "addresses": ["2001:db8::10/64"],
            "routes": [{"to": "::/0", "via": "2001:db8:1::1", "on-link": True}],
        },
    ),
    "communication": (
        # Ganeti gives this network fe80::/10, which is no address to write down
        nic(
            ip="169.254.0.7", name=TALK, mode="routed", subnet="169.254.0.0/16", subnet6="fe80::/10"
        ),
        [{"type": "static", "address": "169.254.0.7/16"}],
        {"addresses": ["169.254.0.7/16"]},
    ),
}


@pytest.mark.parametrize("given, subnets, entry", ONE_NIC.values(), ids=ONE_NIC)
def test_one_nic(given: Nic, subnets: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    assert v1([given]) == [subnets]
    assert v2([given]) == [entry]


def test_an_address_without_a_network_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert v1([nic(ip="192.0.2.10", mode="ext")]) == [[{"type": "dhcp"}]]
    assert "WARNING: NIC_0_IP=192.0.2.10: the guest asks DHCP" in capsys.readouterr().err
    v1([nic()])
    assert capsys.readouterr().err == ""


def test_mode_dhcp_leaves_only_the_communication_nic_static() -> None:
    nics = [
        nic(0, ip="192.0.2.10", **LAN, **LAN6),
        nic(1, ip="203.0.113.5", mode="routed"),
        nic(2, ip="169.254.0.7", name=TALK),
    ]
    talk = {"type": "static", "address": "169.254.0.7/16"}
    assert v1(nics, "dhcp") == [[{"type": "dhcp"}], [{"type": "dhcp"}], [talk]]
    assert v2(nics, "dhcp") == [
        {"dhcp4": True},
        {"dhcp4": True},
        {"addresses": ["169.254.0.7/16"]},
    ]


def test_only_the_first_gateway_of_each_family_is_a_default_route() -> None:
    nics = [
        nic(0, ip="10.0.0.2", subnet="10.0.0.0/24"),
        nic(1, ip="192.0.2.10", **LAN),
        nic(2, ip="198.51.100.2", subnet="198.51.100.0/24", gateway="198.51.100.1", **LAN6),
        nic(3, ip="203.0.113.5", mode="routed"),
        nic(4, ip="2001:db8:1::2", subnet6="2001:db8:1::/64", gateway6="2001:db8:1::1"),
    ]
    gateways = [[each.get("gateway") for each in subnets] for subnets in v1(nics)]
    assert gateways == [[None], ["192.0.2.1"], [None, "2001:db8::1"], [None], [None]]


DNS = {"dns_nameservers": ["192.0.2.53", "2001:db8::53"], "dns_search": ["example.com"]}
CARRIERS = {
    "the first NIC with a gateway": (
        [nic(0, ip="10.0.0.2", subnet="10.0.0.0/24"), nic(1, ip="192.0.2.10", **LAN, **LAN6)],
        [False, True],
    ),
    "else the first": ([nic(0), nic(1)], [True, False]),
    "never the communication NIC": ([nic(0, ip="169.254.0.7", name=TALK), nic(1)], [False, True]),
    "nobody": ([nic(0, ip="169.254.0.7", name=TALK)], [False]),
}


@pytest.mark.parametrize("nics, carries", CARRIERS.values(), ids=CARRIERS)
def test_dns_is_all_on_one_nic(nics: list[Nic], carries: list[bool]) -> None:
    servers, search = ["192.0.2.53", "2001:0db8::53"], ["example.com"]
    first = [subnets[0] for subnets in v1(nics, servers=servers, search=search)]
    assert [DNS.items() <= subnet.items() for subnet in first] == carries
    nameservers = {"addresses": ["192.0.2.53", "2001:db8::53"], "search": ["example.com"]}
    entries = v2(nics, servers=servers, search=search)
    assert [entry.get("nameservers") == nameservers for entry in entries] == carries


def test_name_servers_are_of_the_families_of_their_nic(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """NetworkManager of EL 9.1 to 9.4 refuses a profile that has others."""
    (subnets,) = v1([nic(ip="192.0.2.10", **LAN)], servers=["192.0.2.53", "2001:db8::53"])
    assert subnets[0]["dns_nameservers"] == ["192.0.2.53"]
    (entry,) = v2([nic(ip="192.0.2.10", **LAN)], servers=["2001:db8::53"])
    assert "nameservers" not in entry
    six = nic(1, ip="2001:db8:1::2", subnet6="2001:db8:1::/64")
    made = v1([nic(0, ip="192.0.2.10", **LAN), six], servers=["192.0.2.53", "2001:db8::53"])
    assert [each[0]["dns_nameservers"] for each in made] == [["192.0.2.53"], ["2001:db8::53"]]
    assert "dns_servers: 2001:db8::53 is left out, no NIC has" in capsys.readouterr().err


def test_dns_is_on_the_first_subnet_only() -> None:
    subnets = v1([nic(ip="192.0.2.10", **LAN, **LAN6)], servers=["192.0.2.53"])[0]
    assert [each.get("dns_nameservers") for each in subnets] == [["192.0.2.53"], None]
    assert "dns_search" not in subnets[0]


def test_dns_beside_dhcp_is_said_wherever_a_renderer_looks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = network.config([nic()], 1, "auto", ["192.0.2.53"], ["example.com"])
    assert made["config"][0]["subnets"] == [
        {"type": "dhcp", "dns_nameservers": ["192.0.2.53"], "dns_search": ["example.com"]}
    ]
    assert made["config"][1:] == [
        {"type": "nameserver", "address": ["192.0.2.53"], "search": ["example.com"]}
    ]
    assert capsys.readouterr().err == (
        "WARNING: dns_servers and dns_search beside DHCP: a guest with netplan (Debian, Ubuntu)"
        " heeds them only with network_version=2\n"
    )
    subnets = v1([nic(**LAN, **LAN6)], servers=["192.0.2.53"])[0]
    assert [each["dns_nameservers"] for each in subnets] == [["192.0.2.53"]] * 2


def test_no_nic_at_all() -> None:
    assert network.config([], 1, "auto", ["192.0.2.53"], []) == {"version": 1, "config": []}
    assert network.config([], 2, "auto", ["192.0.2.53"], []) == {"version": 2, "ethernets": {}}


def test_no_ipv6_address_is_made_in_a_prefix_that_is_no_64(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert v1([nic(ip="192.0.2.10", **LAN, subnet6="2001:db8::/56")]) == [[STATIC]]
    assert capsys.readouterr().err == (
        "WARNING: NIC_0_NETWORK_SUBNET6=2001:db8::/56: no IPv6 address for the guest,"
        " one made of its MAC needs a /64\n"
    )


def test_what_ganeti_sets() -> None:
    """The variables of ganeti-os-interface(7), with a MAC in capitals."""
    environ = {
        "NIC_COUNT": "1",
        "NIC_0_MAC": "AA:00:00:12:34:00",
        "NIC_0_IP": "192.0.2.10",
        "NIC_0_MODE": "bridged",
        "NIC_0_LINK": "br0",
        "NIC_0_NETWORK_NAME": "lan",
        "NIC_0_NETWORK_SUBNET": "192.0.2.0/24",
        "NIC_0_NETWORK_GATEWAY": "192.0.2.1",
    }
    assert v1(list(Environment.from_environ(environ).nics)) == [[STATIC]]


BAD = {
    "IP outside its subnet": (
        [nic(ip="192.0.3.10", **LAN)],
        "NIC_0_IP=192.0.3.10 is outside NIC_0_NETWORK_SUBNET=192.0.2.0/24;"
        " give it another with gnt-instance modify --net 0:modify,ip=pool",
    ),
    "IPv6 outside its subnet": (
        [nic(ip="2001:db8:1::1", **LAN6)],
        "NIC_0_IP=2001:db8:1::1 is outside NIC_0_NETWORK_SUBNET6=2001:db8::/64;"
        " give it another with gnt-instance modify --net 0:modify,ip=pool",
    ),
    "IP is none": (
        [nic(ip="pool", **LAN)],
        "NIC_0_IP='pool' is not an IP address; write it as 192.0.2.10 or 2001:db8::10",
    ),
    "IP with a zone": (
        [nic(ip="fe80::2%eth0", **LAN6)],
        "NIC_0_IP='fe80::2%eth0' is not an IP address; write it as 192.0.2.10 or 2001:db8::10",
    ),
    "subnet is none": (
        [nic(ip="192.0.2.10", subnet="192.0.2.0/33")],
        "NIC_0_NETWORK_SUBNET='192.0.2.0/33' is not an IPv4 network;"
        " make a right one with gnt-network add, and connect the NIC to it",
    ),
    "subnet of the other family": (
        [nic(ip="192.0.2.10", **LAN, subnet6="192.0.2.0/24")],
        "NIC_0_NETWORK_SUBNET6='192.0.2.0/24' is not an IPv6 network;"
        " make a right one with gnt-network add, and connect the NIC to it",
    ),
    "gateway of the other family": (
        [nic(ip="192.0.2.10", subnet="192.0.2.0/24", gateway="2001:db8::1")],
        "NIC_0_NETWORK_GATEWAY=2001:db8::1 is not an IPv4 address;"
        " correct it with gnt-network modify --gateway=ADDRESS",
    ),
    "IPv6 gateway of the other family": (
        [nic(ip="2001:db8::10", **{**LAN6, "gateway6": "192.0.2.1"})],
        "NIC_0_NETWORK_GATEWAY6=192.0.2.1 is not an IPv6 address;"
        " correct it with gnt-network modify --gateway6=ADDRESS",
    ),
    "one MAC twice": (
        [nic(0), Nic(index=1, mac=MACS[0])],
        "NIC_1_MAC=aa:00:00:12:34:00 is NIC_0_MAC too;"
        " give it another with gnt-instance modify --net 1:modify,mac=generate",
    ),
}


@pytest.mark.parametrize("nics, message", BAD.values(), ids=BAD)
def test_bad_nics(nics: list[Nic], message: str) -> None:
    with pytest.raises(Error) as raised:
        network.config(nics, 1, "auto", [], [])
    assert str(raised.value) == message


def test_bad_dns() -> None:
    with pytest.raises(Error) as raised:
        network.config([nic()], 1, "auto", ["ns.example.com"], [])
    assert str(raised.value) == (
        "dns_servers='ns.example.com' is not an IP address; write it as 192.0.2.10 or 2001:db8::10"
    )
    with pytest.raises(Error) as raised:
        network.config([nic()], 1, "auto", [], ["example.com\nnameserver 6.6.6.6"])
    assert str(raised.value) == (
        "dns_search='example.com\\nnameserver 6.6.6.6' is not a domain; write it as example.com"
    )
