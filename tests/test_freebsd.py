"""What FreeBSD's nuageinit needs of the seed, as far as it can be said without FreeBSD.

It cannot be had from a package registry, so its rules are here: those of libexec/nuageinit of
freebsd-src at 072ca5df87a6, which were read. Its YAML parser, lyaml, is Debian's lua-yaml.
"""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest

from lib.guest import network, seed
from tests.conftest import ROOT, require
from tests.test_network import LAN, LAN6, nic
from tests.test_renderers import CASES, SERVERS, Told

# a table with numbers only is a list; what nuageinit loads is written back as JSON
LUA = r"""
local yaml = require("lyaml")
local function text(value)
    if type(value) ~= "table" then
        return type(value) == "string" and string.format('"%s"', value) or tostring(value)
    end
    local parts = {}
    for key, each in pairs(value) do
        parts[#parts + 1] = #value > 0 and text(each) or text(key) .. ":" .. text(each)
    end
    return (#value > 0 and "[%s]" or "{%s}"):format(table.concat(parts, ","))
end
print(text(yaml.load(io.read("*a"))))
"""
KEYS = ["ssh-ed25519 AAAA me", "ssh-ed25519 BBBB \u00fcs"]


def loaded(document: bytes) -> Any:
    """Return what lyaml makes of a document."""
    require("lua5.4")
    ran = subprocess.run(["lua5.4", "-e", LUA], input=document, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def read(document: dict[str, Any]) -> dict[str, Told]:
    """Do as its network_config does, NIC by NIC, with a version 2 document."""
    facts = {}
    for entry in document["ethernets"].values():
        # it knows NICs by ifconfig's MACs, in lower case
        assert re.fullmatch("([0-9a-f]{2}:){5}[0-9a-f]{2}", entry["match"]["macaddress"])
        assert list(entry["match"]) == ["macaddress"]
        told = facts[entry["set-name"]] = Told()
        if entry.get("dhcp4"):
            told.dhcp.add(4)
        elif "addresses" in entry:
            told.addresses.update(entry["addresses"])
            # a second one of a family takes the first one's place
            assert len({":" in each for each in told.addresses}) == len(entry["addresses"])
            told.gateways.update(entry[key] for key in ("gateway4", "gateway6") if key in entry)
            told.dns.update(entry.get("nameservers", {}).get("addresses", []))
    return facts


# no routes, no DHCPv6, and beside DHCP nothing
LOST = {
    "routed": Told({"203.0.113.5/32"}),
    "DHCP and IPv6": Told(dhcp={4}),
    "DHCPv6": Told(),
}


@pytest.mark.parametrize("case", CASES)
def test_it_gets_what_doc_guests_says(case: str) -> None:
    nics, facts = CASES[case]
    made = network.config(nics, 2, "auto", SERVERS, ["example.com"])
    assert loaded(seed.document(made)) == made or not nics  # an empty table is no list
    found = read(made)
    for name, told in facts.items():
        told = LOST.get(case, told) if name == "eth0" else told
        assert found[name].addresses == told.addresses
        assert found[name].gateways == told.gateways
        assert found[name].dhcp == told.dhcp


def test_name_servers() -> None:
    dual = network.config([nic(ip="192.0.2.10", **LAN, **LAN6)], 2, "auto", SERVERS, [])
    assert read(dual)["eth0"].dns == set(SERVERS)


def test_no_network_is_a_document_with_ethernets() -> None:
    files = seed.texts(
        name="vm1", uuid="1", ssh_keys=[], user_data=b"", vendor_data=b"", network=None
    )
    assert loaded(files["network-config"])["ethernets"] == {}


def test_name_and_keys() -> None:
    files = seed.texts(
        name="vm1.example.com",
        uuid="7eb7a864-32d5-4cce-a37f-4dfde4aaf87e",
        ssh_keys=KEYS,
        user_data=b"",
        vendor_data=b"",
        network=None,
    )
    meta = loaded(files["meta-data"])
    assert meta["local-hostname"] == "vm1.example.com"
    assert meta["public_keys"] == KEYS
    assert meta == json.loads(files["meta-data"])


@pytest.mark.parametrize(
    "name", ["freebsd-14", "freebsd-14-arm64", "freebsd-15", "freebsd-15-arm64"]
)
def test_the_variants_user_data_lets_it_read_the_network(name: str) -> None:
    """Only below exactly this first line, and with a second one, it comes to the network."""
    text = (ROOT / f"variants.d/{name}.conf").read_text()
    assert "network_version = 2\n" in text
    (encoded,) = re.findall("^user_data = base64:(.*)$", text, re.MULTILINE)
    ran = subprocess.run(["base64", "-d"], input=encoded.encode(), capture_output=True, check=True)
    first, _line, rest = ran.stdout.partition(b"\n")
    assert first == b"#cloud-config"
    assert rest.strip()
    assert loaded(ran.stdout) == {}
