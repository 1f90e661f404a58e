"""cloudimage push: one node's cache entry on another, over Ganeti's own ssh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.ganeti.conftest import Cluster

pytestmark = pytest.mark.cluster
COMMAND = ROOT / "lib/cloudimage"


def entries(pair: Cluster, on: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(pair.run(f"{on} {COMMAND} cache --json"))
    return found


def test_push(pair: Cluster, images: Path) -> None:
    out = pair.run(f"{COMMAND} push --all-nodes", 1)
    assert "ERROR: push: the cache of this node is empty; cloudimage fetch fills it" in out
    pair.run(f"{COMMAND} fetch {images}/small.qcow2")
    (ours,) = entries(pair)
    assert entries(pair, "on 2") == []
    out = pair.run(f"{COMMAND} push --all-nodes")
    assert f"push: node2.example.com has it now: file://{images}/small.qcow2" in out
    (theirs,) = entries(pair, "on 2")
    for key in ("name", "url", "digests", "fetched"):
        assert theirs[key] == ours[key]
    cache = "/var/cache/ganeti-instance-cloudimage"
    sums = [pair.run(f"{on} sh -c 'sha256sum {cache}/*.raw'").split()[0] for on in ("", "on 2")]
    assert sums[0] == sums[1]
    assert theirs["allocated_bytes"] < ours["allocated_bytes"] + (1 << 20)
    assert "node2.example.com has it already" in pair.run(f"{COMMAND} push node2.example.com")
    assert pair.run("ls /var/tmp | grep cloudimage-push; true") == ""
    # and it is what a create there uses
    out = pair.run(f"on 2 {COMMAND} -d fetch {images}/small.qcow2")
    assert "decode" not in out


def test_push_to_nobody(pair: Cluster, images: Path) -> None:
    pair.run(f"{COMMAND} fetch {images}/small.qcow2")
    assert "give nodes, or --all-nodes" in pair.run(f"{COMMAND} push", 2)
    out = pair.run(f"{COMMAND} push node9.example.com", 1)
    assert "ERROR: gnt-cluster command: Node name node9.example.com not found" in out
    out = pair.run(f"{COMMAND} push --entry 000 node2.example.com", 1)
    assert "ERROR: --entry 000: no such entry; cloudimage cache lists them" in out
    assert pair.run("ls /var/tmp | grep cloudimage-push; true") == ""
