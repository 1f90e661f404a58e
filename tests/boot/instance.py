"""An instance: what Ganeti tells the doors of it, and what its guest must say in the end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv6Network, ip_address, ip_network

DNS = ("192.0.2.53", "2001:db8:53::53")
SEARCH = "example.com"
# what qemu's own DHCP server says; in a network without a way out neither gateway nor name server
DHCP_ADDRESS = "10.0.2.15/24"
ROUTED_GATEWAY = "169.254.1.1"

LAN = {
    "IP": "10.77.0.{host}",
    "NETWORK_SUBNET": "10.77.0.0/24",
    "NETWORK_GATEWAY": "10.77.0.1",
}
LAN6 = {"NETWORK_SUBNET6": "2001:db8:77::/64", "NETWORK_GATEWAY6": "2001:db8:77::1"}
STORAGE = [{"IP": f"10.{n}.0.{{host}}", "NETWORK_SUBNET": f"10.{n}.0.0/16"} for n in range(80, 87)]
# name -> the NICs, as Ganeti's variables without NIC_n_; {host} is the instance's number
NETWORKS: dict[str, list[dict[str, str]]] = {
    "static": [LAN],
    "dhcp": [{}],
    "dual": [{**LAN, **LAN6}],
    "ipv6-only": [LAN6],
    "two": [LAN, STORAGE[0]],
    "routed": [{"IP": "10.77.0.{host}", "MODE": "routed"}],
    "none": [],
    "eight": [LAN, *STORAGE],
}


@dataclass(frozen=True)
class Instance:
    """What Ganeti knows of an instance; `number` makes its MACs and `host` its addresses."""

    name: str
    uuid: str
    number: int
    host: int
    network: str

    @property
    def nics(self) -> list[dict[str, str]]:
        return [
            {key: value.format(host=self.host) for key, value in nic.items()}
            for nic in NETWORKS[self.network]
        ]

    @property
    def macs(self) -> list[str]:
        return [f"aa:00:00:12:{self.number:02x}:{index:02x}" for index in range(len(self.nics))]

    def variables(self) -> dict[str, str]:
        """Return what Ganeti tells the doors."""
        told = {
            "INSTANCE_NAME": self.name,
            "INSTANCE_UUID": self.uuid,
            "NIC_COUNT": str(len(self.nics)),
        }
        for index, (mac, nic) in enumerate(zip(self.macs, self.nics)):
            values = {"MAC": mac, "MODE": "bridged", **nic}
            told.update({f"NIC_{index}_{key}": value for key, value in values.items()})
        return told

    def addresses(self) -> list[tuple[str, str, str]]:
        """Return NIC, address with prefix, and gateway or "" for each address of the guest."""
        found = []
        for index, (mac, nic) in enumerate(zip(self.macs, self.nics)):
            ip, subnet, subnet6 = map(nic.get, ("IP", "NETWORK_SUBNET", "NETWORK_SUBNET6"))
            if ip and subnet:
                length = ip_network(subnet).prefixlen
                gateway = nic.get("NETWORK_GATEWAY", "")
                found.append((f"eth{index}", f"{ip}/{length}", gateway))
            elif ip:
                found.append((f"eth{index}", f"{ip}/32", ROUTED_GATEWAY))
            elif not subnet6:
                found.append((f"eth{index}", DHCP_ADDRESS, ""))
            if subnet6:
                found.append((f"eth{index}", _eui64(subnet6, mac), nic["NETWORK_GATEWAY6"]))
        return found

    def told(self) -> dict[str, object]:
        """Return what the guest's network must be."""
        found = self.addresses()
        with_dhcp = any(address == DHCP_ADDRESS for _nic, address, _gateway in found)
        families = {ip_address(address.split("/")[0]).version for _nic, address, _gateway in found}
        servers = {each for each in DNS if with_dhcp or ip_address(each).version in families}
        return {
            "addresses": {(nic, address) for nic, address, _gateway in found},
            "routes": {(gateway, nic) for nic, _address, gateway in found if gateway},
            "dns": servers,
            "search": {SEARCH} if found else set(),
        }


def _eui64(subnet: str, mac: str) -> str:
    """Return the address that a NIC of this MAC has in a /64 by RFC 4291, appendix A."""
    octets = [int(each, 16) for each in mac.split(":")]
    octets[0] ^= 2
    host = int.from_bytes(bytes([*octets[:3], 0xFF, 0xFE, *octets[3:]]), "big")
    return f"{IPv6Network(subnet)[host]}/64"


# what the guest is asked at every boot -> the command whose output, in one line, is the answer
RESOLVED = "systemctl --quiet is-active systemd-resolved"
QUESTIONS = {
    "name": "hostname",
    "addresses": "ip -o address show scope global",
    "routes": "ip route show default; ip -6 route show default",
    "dns": f"{RESOLVED} && resolvectl dns || grep ^nameserver /etc/resolv.conf",
    "search": f"{RESOLVED} && resolvectl domain || grep ^search /etc/resolv.conf",
    "keys": "cat /home/*/.ssh/authorized_keys",
    "host keys": "cat /etc/ssh/ssh_host_*_key.pub",
    "machine-id": "cat /etc/machine-id",
    "root": "df --block-size=1 --output=size / | tail -n 1",
    "root fs": "stat --file-system --format=%T /",
    "user data ran": "cat /var/lib/user-data-ran",
    "result": "tr -d ' \\n' < /run/cloud-init/result.json",
    "renderer": "grep -o \"Selected renderer '[a-z-]*'\" /var/log/cloud-init.log | tail -n 1",
    "firmware": "test -d /sys/firmware/efi && echo uefi || echo bios",
    "cloud-init": "dpkg-query --show cloud-init",
}
USER_DATA = """#cloud-config
write_files:
- path: /var/lib/cloud/scripts/per-boot/report
  permissions: "0755"
  content: |
    #!/bin/sh
    exec systemd-run --no-block --property=After=cloud-final.service /usr/local/sbin/report
- path: /usr/local/sbin/report
  permissions: "0755"
  content: |
    #!/bin/sh
    {{
      echo
{answers}
    }} > /dev/ttyS1
    systemctl poweroff
# of the later modules only what is asked for: each costs an emulated guest seconds
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts-vendor, scripts-per-boot, scripts-user]
runcmd:
- echo once an instance >> /var/lib/user-data-ran
"""


def user_data() -> str:
    """Return user data that makes a guest answer all QUESTIONS at each boot and power off."""
    answers = [f'      echo "{name}="$({command})' for name, command in QUESTIONS.items()]
    return USER_DATA.format(answers="\n".join(answers))


def said(report: Mapping[str, str]) -> dict[str, object]:
    """Return what a guest's report says of its network, in the form of Instance.told."""
    addresses = re.findall(r"(eth\d+)\s+inet6? (\S+)", report["addresses"])
    routes = re.findall(r"default via (\S+) dev (\S+)", report["routes"])
    dns = {
        word for word in report["dns"].split() if re.fullmatch(r"[0-9a-f.:]*[.:][0-9a-f]+", word)
    }
    search = {word for word in report["search"].split() if "." in word}
    return {"addresses": set(addresses), "routes": set(routes), "dns": dns, "search": search}
