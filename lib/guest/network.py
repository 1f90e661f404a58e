"""The guest's network: Ganeti's NICs as a cloud-init network-config of version 1 or 2."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
)
from typing import Any, Optional, Union

from lib import log
from lib.environment import Nic
from lib.errors import Error

Address = Union[IPv4Address, IPv6Address]
Network = Union[IPv4Network, IPv6Network]

COMMUNICATION_PREFIX_LENGTH = 16  # of 169.254.0.0/16, Ganeti's constants.py
# A routed NIC without a network has an address but no prefix and no gateway. Ganeti's net-common
# routes the address to the tap and turns on proxy ARP there: the node answers for every address
# that it can route itself, so any one is a gateway; a link-local one hides no address from the
# guest. There is no such proxy for IPv6: the administrator puts this one on the tap, as is usual.
ROUTED_GATEWAYS: dict[int, Address] = {4: IPv4Address("169.254.1.1"), 6: IPv6Address("fe80::1")}
DEFAULT_ROUTES = {4: "0.0.0.0/0", 6: "::/0"}  # "default" crashes most renderers before 25.3
_DOMAIN = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?")


@dataclass
class _Static:
    """An address of the guest's own, its prefix, and the default gateway if it has one."""

    interface: Union[IPv4Interface, IPv6Interface]
    gateway: Optional[Address]

    @property
    def family(self) -> int:
        return self.interface.version

    @property
    def on_link(self) -> bool:
        """Whether the gateway is outside the subnet, so that the guest must be told it is there."""
        if self.gateway is None or self.gateway in self.interface.network:
            return False
        return self.family == 4 or not self.gateway.is_link_local


@dataclass
class _Link:
    """One NIC: the family that it asks DHCP for, its own addresses, and the resolver's data."""

    nic: Nic
    dhcp: Optional[int] = None
    static: list[_Static] = field(default_factory=list)
    name_servers: list[Address] = field(default_factory=list)
    search: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"eth{self.nic.index}"

    def dns(self, servers: str, search: str) -> dict[str, list[str]]:
        """Return what the resolver gets under these two names, if there is any."""
        words = {servers: [str(each) for each in self.name_servers], search: self.search}
        return {key: value for key, value in words.items() if value}


def config(
    nics: Sequence[Nic],
    version: int,
    mode: str,
    dns_servers: Sequence[str],
    dns_search: Sequence[str],
) -> dict[str, Any]:
    """Return the network-config document of these NICs; Error names the variable that is wrong.

    mode "auto": static where Ganeti knows address and prefix, else DHCP; "dhcp": DHCP everywhere
    but on the communication NIC. Version 2 keeps to the keys that FreeBSD's nuageinit knows
    (gateway4, gateway6), and has a route only where on-link must be said.
    https://docs.cloud-init.io/en/latest/reference/network-config.html
    """
    for domain in dns_search:
        if not _DOMAIN.fullmatch(domain):
            raise Error(f"dns_search={domain!r} is not a domain", "write it as example.com")
    name_servers = [_ip("dns_servers", server) for server in dns_servers]
    _check_macs(nics)
    links = [_link(nic, mode) for nic in nics]
    _leave_one_gateway_a_family(links)
    carriers = [link for link in links if not link.nic.is_communication]
    if carriers:
        _spread_dns(carriers, name_servers, list(dns_search))
    if version == 1:
        entries = [_version1(link) for link in links]
        told = (link for link in links if link.name_servers or link.search)
        entries += [_nameserver(link) for link in told if not link.static]
        return {"version": 1, "config": entries}
    return {"version": 2, "ethernets": {link.name: _version2(link) for link in links}}


def _leave_one_gateway_a_family(links: Sequence[_Link]) -> None:
    """Keep the first default gateway of each family.

    A second default route is an error to ifupdown, which then leaves that NIC down, and a matter
    of chance elsewhere.
    """
    seen: set[int] = set()
    for each in (each for link in links for each in link.static):
        if each.family in seen:
            each.gateway = None
        elif each.gateway is not None:
            seen.add(each.family)


def _spread_dns(links: Sequence[_Link], servers: list[Address], search: list[str]) -> None:
    """Give one NIC all that it can use, and the next ones what is left of the servers.

    None gets a server of a family that it does not have: NetworkManager refuses the whole profile
    for one (EL 9.1 to 9.4: no address at all), and the guest could not reach it there. With DHCP
    nobody knows what the NIC will have.
    """
    # all on one NIC: some renderers keep the last list only
    first = min(links, key=lambda link: not any(each.gateway for each in link.static))
    first.search = search
    for link in (first, *(each for each in links if each is not first and not each.dhcp)):
        families = {4, 6} if link.dhcp else {each.family for each in link.static}
        link.name_servers = [server for server in servers if server.version in families]
        servers = [server for server in servers if server.version not in families]
    for server in servers:
        log.warning(f"dns_servers: {server} is left out, no NIC has an address of its family")


def _version1(link: _Link) -> dict[str, Any]:
    subnets: list[dict[str, Any]] = []
    if link.dhcp:
        subnets.append({"type": "dhcp" if link.dhcp == 4 else "dhcp6"})
    for each in link.static:
        subnet: dict[str, Any] = {
            "type": "static" if each.family == 4 else "static6",
            "address": str(each.interface),
        }
        if each.gateway is not None:
            subnet["gateway"] = str(each.gateway)
        subnets.append(subnet)
    # what stands beside DHCP, not all renderers read
    for subnet in subnets[: 2 if link.dhcp else 1]:
        subnet.update(link.dns("dns_nameservers", "dns_search"))
    return {
        "type": "physical",
        "name": link.name,
        "mac_address": link.nic.mac,
        "subnets": subnets,
    }


def _nameserver(link: _Link) -> dict[str, Any]:
    """Return the resolver's data for the guest as a whole; with DHCP, networkd heeds only this."""
    log.warning(
        "dns_servers and dns_search beside DHCP: a guest with netplan (Debian, Ubuntu) heeds them"
        " only with network_version=2"
    )
    return {"type": "nameserver", "address": [], "search": [], **link.dns("address", "search")}


def _version2(link: _Link) -> dict[str, Any]:
    entry: dict[str, Any] = {"match": {"macaddress": link.nic.mac}, "set-name": link.name}
    if link.dhcp:
        entry[f"dhcp{link.dhcp}"] = True
    if link.static:
        entry["addresses"] = [str(each.interface) for each in link.static]
    for each in link.static:
        if each.on_link:
            route = {"to": DEFAULT_ROUTES[each.family], "via": str(each.gateway), "on-link": True}
            entry.setdefault("routes", []).append(route)
        elif each.gateway is not None:
            entry[f"gateway{each.family}"] = str(each.gateway)
    dns = link.dns("addresses", "search")
    return {**entry, "nameservers": dns} if dns else entry


def _link(nic: Nic, mode: str) -> _Link:
    """Decide how this NIC gets its addresses."""
    ip = None if nic.ip is None else _ip(f"NIC_{nic.index}_IP", nic.ip)
    if nic.is_communication and ip is not None:
        return _Link(nic, static=[_Static(ip_interface((ip, COMMUNICATION_PREFIX_LENGTH)), None)])
    if mode == "dhcp":
        return _Link(nic, dhcp=4)
    family = 4 if ip is None else ip.version
    own = None if ip is None else _static(nic, ip)
    derived = None if family == 6 else _derived(nic)
    if ip is not None and own is None:
        log.warning(
            f"NIC_{nic.index}_IP={ip}: the guest asks DHCP, nothing tells the prefix of its"
            " address; connect the NIC to a Ganeti network"
        )
    # a network with IPv6 only has no DHCPv4 either
    is_ipv6_only = ip is None and derived is not None and nic.subnet is None
    return _Link(
        nic,
        dhcp=None if own or is_ipv6_only else family,
        static=[each for each in (own, derived) if each is not None],
    )


def _static(nic: Nic, ip: Address) -> Optional[_Static]:
    """Return the NIC's own address; None if nothing tells its prefix."""
    subnet, gateway = _network(nic, ip.version)
    if subnet is None:
        if nic.mode != "routed":
            return None
        return _Static(ip_interface((ip, ip.max_prefixlen)), ROUTED_GATEWAYS[ip.version])
    if ip not in subnet:
        suffix = "" if ip.version == 4 else "6"
        raise Error(
            f"NIC_{nic.index}_IP={ip} is outside NIC_{nic.index}_NETWORK_SUBNET{suffix}={subnet}",
            f"give it another with gnt-instance modify --net {nic.index}:modify,ip=pool",
        )
    return _Static(ip_interface((ip, subnet.prefixlen)), gateway)


def _derived(nic: Nic) -> Optional[_Static]:
    """Return the IPv6 address beside an IPv4 one: the network's prefix and the MAC's EUI-64.

    A NIC has one IP in Ganeti; its network's IPv6 values are there "for EUI64 generation from a
    NIC's MAC address" (gnt-network(8)). Written down, it waits for no router's advertisement.
    """
    subnet, gateway = _network(nic, 6)
    if subnet is None:
        return None
    if subnet.prefixlen != 64:
        log.warning(
            f"NIC_{nic.index}_NETWORK_SUBNET6={subnet}: no IPv6 address for the guest,"
            " one made of its MAC needs a /64"
        )
        return None
    mac = bytes.fromhex(nic.mac.replace(":", ""))
    eui64 = bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    address = IPv6Address(subnet.network_address.packed[:8] + eui64)
    return _Static(ip_interface((address, 64)), gateway)


def _network(nic: Nic, family: int) -> tuple[Optional[Network], Optional[Address]]:
    """Return subnet and gateway of this family of the NIC's Ganeti network."""
    suffix, kind = ("", IPv4Network) if family == 4 else ("6", IPv6Network)
    subnet_text, gateway_text = (
        (nic.subnet, nic.gateway) if family == 4 else (nic.subnet6, nic.gateway6)
    )
    if subnet_text is None:
        return None, None
    try:
        subnet = kind(subnet_text, strict=False)
    except ValueError:
        raise Error(
            f"NIC_{nic.index}_NETWORK_SUBNET{suffix}={subnet_text!r} is not an IPv{family} network",
            "make a right one with gnt-network add, and connect the NIC to it",
        ) from None
    if gateway_text is None:
        return subnet, None
    variable = f"NIC_{nic.index}_NETWORK_GATEWAY{suffix}"
    gateway = _ip(variable, gateway_text)
    if gateway.version != family:
        raise Error(
            f"{variable}={gateway} is not an IPv{family} address",
            f"correct it with gnt-network modify --gateway{suffix}=ADDRESS",
        )
    return subnet, gateway


def _ip(what: str, value: str) -> Address:
    with suppress(ValueError):
        if "%" not in value:  # a zone means something on one machine only
            return ip_address(value)
    raise Error(f"{what}={value!r} is not an IP address", "write it as 192.0.2.10 or 2001:db8::10")


def _check_macs(nics: Sequence[Nic]) -> None:
    """The guest tells its NICs apart by their MACs."""
    first: dict[str, int] = {}
    for nic in nics:
        other = first.setdefault(nic.mac, nic.index)
        if other != nic.index:
            raise Error(
                f"NIC_{nic.index}_MAC={nic.mac} is NIC_{other}_MAC too",
                f"give it another with gnt-instance modify --net {nic.index}:modify,mac=generate",
            )
