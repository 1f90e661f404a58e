"""cloudimage seed, reseed and explain on a real cluster, for an instance of either node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.ganeti.conftest import Cluster

pytestmark = pytest.mark.cluster
COMMAND = ROOT / "lib/cloudimage"
NAME = "vm1.example.com"


@pytest.fixture(scope="module", params=["node1.example.com", "node2.example.com"])
def node(request: pytest.FixtureRequest, pair: Cluster, images: Path) -> Iterator[str]:
    """Add a stopped instance on this node; the master is node1."""
    where: str = request.param
    pair.run(
        f"gnt-instance add -t file -n {where} -B memory=256M --no-start --no-name-check"
        f" --no-ip-check --disk 0:size=64M --net 0:ip=10.77.0.20,network=lan"
        f" -o cloudimage+default -O image={images}/small.raw,dns_search=a.example {NAME}"
    )
    yield where
    pair.run(f"gnt-instance remove -f --shutdown-timeout=1 {NAME}")


def stopped_with(pair: Cluster, last: int) -> None:
    """Bring the instance to an address and a seed that says so, stopped."""
    pair.run(f"gnt-instance shutdown --timeout=1 {NAME}")
    pair.run(f"gnt-instance modify -f --net 0:modify,ip=10.77.0.{last} {NAME}; true")
    pair.run(f"{COMMAND} reseed {NAME}")


def seed(pair: Cluster) -> dict[str, str]:
    found = json.loads(pair.run(f"{COMMAND} seed --json --show-secrets {NAME}"))
    return {name: each["text"] for name, each in found["files"].items()}


def test_reseed(pair: Cluster, node: str) -> None:
    stopped_with(pair, 20)
    before = seed(pair)
    assert "10.77.0.20/24" in before["network-config"]
    assert pair.run(f"{COMMAND} seed --diff {NAME}") == ""
    assert "is told already" in pair.run(f"{COMMAND} reseed {NAME}")
    pair.run(f"gnt-instance modify -f --net 0:modify,ip=10.77.0.21 {NAME}")
    difference = pair.run(f"{COMMAND} seed --diff {NAME}", 3)
    assert '-     "address": "10.77.0.20/24",\n+     "address": "10.77.0.21/24",' in difference
    pair.run(f"{COMMAND} reseed {NAME}")
    assert pair.run(f"{COMMAND} seed --diff {NAME}") == ""
    after = seed(pair)
    assert after == {
        **before,
        "network-config": before["network-config"].replace("77.0.20/", "77.0.21/"),
    }
    assert "a.example" in after["network-config"]


def test_parameters_of_the_whole_cluster(pair: Cluster, node: str) -> None:
    """Ganeti gives them to rename, so diff must know them too."""
    stopped_with(pair, 20)
    text = "dns_search=b.example,dns_servers=192.0.2.53 192.0.2.54,vendor_data=#!/bin/sh\n(true)\n"
    pair.run(f"gnt-os modify -O '{text}' cloudimage+default")
    try:
        assert '+      "192.0.2.54"' in pair.run(f"{COMMAND} seed --diff {NAME}", 3)
        pair.run(f"{COMMAND} reseed {NAME}")
        assert "192.0.2.54" in seed(pair)["network-config"]
        assert "a.example" in seed(pair)["network-config"]  # the instance's own comes first
        assert pair.run(f"{COMMAND} seed --diff {NAME}") == ""
    finally:
        words = "dns_search=default,dns_servers=default,vendor_data=default"
        pair.run(f"gnt-os modify -O {words} cloudimage+default")


def test_a_running_instance(pair: Cluster, node: str) -> None:
    stopped_with(pair, 20)
    pair.run(f"gnt-instance startup {NAME}")
    pair.run(f"gnt-instance modify -f --net 0:modify,ip=10.77.0.22 {NAME}")
    out = pair.run(f"{COMMAND} reseed {NAME}", 1)
    assert f"ERROR: {NAME}: is running; gnt-instance shutdown it first, or use --reboot" in out
    assert "10.77.0.20/24" in seed(pair)["network-config"]
    pair.run(f"{COMMAND} reseed --reboot {NAME}")
    assert "10.77.0.22/24" in seed(pair)["network-config"]
    assert "10.77.0.22/24" in pair.run(f"on {node[4]} {COMMAND} seed {NAME.partition('.')[0]}")
    assert "running" in pair.run(f"gnt-instance list --no-headers -o status {NAME}")


def test_one_that_is_marked_offline(pair: Cluster, node: str) -> None:
    stopped_with(pair, 20)
    pair.run(f"gnt-instance modify --offline {NAME}")
    try:
        pair.run(f"gnt-instance modify -f --net 0:modify,ip=10.77.0.24 {NAME}")
        pair.run(f"{COMMAND} reseed {NAME}")
        assert pair.run(f"gnt-instance list --no-headers -o disks_active {NAME}") == "N\n"
    finally:
        pair.run(f"gnt-instance modify --online {NAME}")
    assert "10.77.0.24/24" in seed(pair)["network-config"]


def test_the_example_hook(pair: Cluster, node: str) -> None:
    folder = "/etc/ganeti/hooks/instance-modify-post.d"
    hook = f"{folder}/seed-out-of-date"
    source = f"{ROOT}/doc/examples/seed-out-of-date"
    pair.run(f"mkdir -p {folder}; install -m 755 {source} {hook}")
    pair.run(f"sed -i 's|(cloudimage|({COMMAND}|' {hook}")  # not installed here
    try:
        stopped_with(pair, 20)
        out = pair.run(f"gnt-instance modify -f --net 0:modify,ip=10.77.0.23 {NAME}")
        assert f"cloudimage reseed --reboot {NAME}" in out
        assert "10.77.0.23/24" in out
        out = pair.run(f"gnt-instance modify -f --net 0:modify,ip=10.77.0.20 {NAME}")
        assert "reseed" not in out
    finally:
        pair.run(f"rm -r {folder}")


def disk_of(pair: Cluster) -> str:
    info = f"gnt-instance info {NAME} | sed -n 's/^ *on primary: \\([^ ]*\\) .*/\\1/p'"
    return pair.run(info).strip()


def test_a_seed_that_its_guest_has_damaged(pair: Cluster, node: str) -> None:
    """One line, and everything as it was: the disk, and what was running."""
    stopped_with(pair, 20)
    path, on = disk_of(pair), f"on {node[4]} "
    pair.run(f"{on} cp --sparse=always {path} {path}.whole")
    behind_its_first_sector = f"of={path} bs=512 seek=65 count=32 conv=notrunc status=none"
    pair.run(f"{on} dd if=/dev/urandom {behind_its_first_sector}")
    damaged = pair.run(f"{on} sha256sum {path}")
    for is_running, options in (False, ""), (False, "--reboot"), (True, "--reboot"):
        if is_running:
            pair.run(f"gnt-instance startup {NAME}")
        out = pair.run(f"{COMMAND} reseed {options} {NAME}", 1)
        errors = [line for line in out.splitlines() if "ERROR" in line]
        assert len(errors) == 1, out
        assert "the seed cannot be read: " in errors[0]
        assert "; mend it in the guest, or write a new one with gnt-instance reins" in errors[0]
        assert ("shutdown" in out, "rename" in out) == (False, False), out
        status = pair.run(f"gnt-instance list --no-headers -o status {NAME}").strip()
        assert status == ("running" if is_running else "ADMIN_down")
    pair.run(f"gnt-instance shutdown --timeout=1 {NAME}")
    assert pair.run(f"{on} sha256sum {path}") == damaged
    pair.run(f"{on} mv {path}.whole {path}")
    assert pair.run(f"{COMMAND} seed --diff {NAME}") == ""


def test_what_cannot_be_reseeded(pair: Cluster, node: str) -> None:
    out = pair.run(f"{COMMAND} reseed vm8.example.com", 1)
    assert "ERROR: gnt-instance list: Instance name vm8.example.com not found" in out
    path, on = disk_of(pair), f"on {node[4]} "
    whole = pair.run(f"{on} sha256sum {path}")
    damage = f"{on} dd if=/dev/zero of={path} bs=1k seek=32 count=1 conv=notrunc status=none"
    pair.run(damage)
    out = pair.run(f"{COMMAND} reseed {NAME}", 1)
    assert "holds no seed" in out
    pair.run(damage.replace("if=/dev/zero", "if=/dev/urandom"))
    assert pair.run(f"{COMMAND} seed {NAME}", 1)
    assert whole != pair.run(f"{on} sha256sum {path}")
    if node == "node2.example.com":
        out = pair.run(f"on 2 {COMMAND} reseed {NAME}", 1)
        assert "gnt-* commands work on the master" in out


def test_explain_asks_ganeti_for_the_network(pair: Cluster, images: Path) -> None:
    out = pair.run(
        f"{COMMAND} explain -o cloudimage+default -O image={images}/small.raw"
        " --net 0:ip=pool,network=lan --disk 0:size=64M"
    )
    assert '"gateway": "10.77.0.1"' in out
    out = pair.run(
        f"{COMMAND} explain -o default -O image={images}/small.raw --net 0:network=nowhere", 1
    )
    assert "ERROR: gnt-network list: " in out


def test_explain_asks_ganeti_for_the_clusters_defaults(pair: Cluster, images: Path) -> None:
    settings = f"--show-secrets --disk 0:size=64M -O image={images}/small.raw"
    nic = "--net 0:ip=192.0.2.9"
    explain = f"{COMMAND} explain -o cloudimage+default {settings}"
    text = "dns_search=b.example,vendor_data=#!/bin/sh\n    (true): seed\n,seed=tail"
    pair.run(f"gnt-os modify -O '{text}' cloudimage+default")
    modify = "gnt-cluster modify --nic-parameters=link=br0,mode="
    pair.run(f"{modify}routed")
    try:
        out = pair.run(f"{explain} {nic}")
        assert "seed            tail  (OS parameter)" in out
        assert "dns_search      b.example  (OS parameter)" in out
        assert "    (true): seed\n" in out
        assert '"address": "192.0.2.9/32"' in out
        assert "seed            gap  (OS parameter)" in pair.run(f"{explain},seed=gap {nic}")
        assert "192.0.2.9/32" not in pair.run(f"{explain} {nic},mode=bridged")
        assert "b.example" not in pair.run(f"{COMMAND} explain -o debian-12 {settings}")
        out = pair.run(f"on 2 {explain} {nic}")
        words = "explain: without the cluster's own OS parameters and NIC mode: gnt-cluster info: "
        assert words in out
        assert "b.example" not in out
    finally:
        pair.run(f"{modify}bridged")
        words = "dns_search=default,vendor_data=default,seed=default"
        pair.run(f"gnt-os modify -O {words} cloudimage+default")


def test_explain_takes_what_add_takes(pair: Cluster, images: Path) -> None:
    """The four files are those that create writes, but for the UUID and the MACs."""
    options = f"-o cloudimage+default -O image=/nonexistent -O image={images}/small.raw"
    options += " --disk 0:size=0.04G --net 0:ip=none,network=none,name=none,bridge=br0"
    options += " --net 2:ip=10.77.0.44,network=lan,mac=generate"
    add = "gnt-instance add -t file -n node1.example.com -B memory=256M --no-start --no-name-check"
    pair.run(f"{add} --no-ip-check {options} VM2.Example.com.")
    try:
        found = pair.run(f"{COMMAND} seed --json --show-secrets vm2.example.com")
        asked = "gnt-instance list --no-headers --separator=, -o uuid,nic.macs vm2.example.com"
        uuid, *macs = pair.run(asked).strip().split(",")
    finally:
        pair.run("gnt-instance remove -f --shutdown-timeout=0 vm2.example.com")
    explain = f"{COMMAND} explain --name VM2.Example.com. --json --show-secrets {options}"
    said = pair.run(f"{explain} 2> /dev/null")
    for number, mac in enumerate(macs):
        found = found.replace(mac, f"aa:00:00:00:00:{number:02x}")
    found = found.replace(uuid, "00000000-0000-4000-8000-000000000000")
    assert json.loads(said)["seed"] == json.loads(found)["files"]


def test_check_on_every_node(pair: Cluster) -> None:
    out = pair.run(f"gnt-cluster command {COMMAND} check")
    assert out.count("the sandbox starts") == 2
    assert out.count("return code = 0") == 2
