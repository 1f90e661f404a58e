"""An instance added over Ganeti's remote API, as Ansible and Terraform do it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ganeti.conftest import Cluster

pytestmark = pytest.mark.cluster
NAME = "vm6.example.com"


@pytest.fixture
def rapi(cluster: Cluster) -> Iterator[Cluster]:
    cluster.run("echo 'ansible s3cret write' > /var/lib/ganeti/rapi/users")
    for _attempt in range(50):  # the daemon watches the file
        if "OK" in cluster.run(
            "curl -sk -u ansible:s3cret https://127.0.0.1:5080/2/info | grep -q cluster.example"
            " && echo OK; true"
        ):
            break
        time.sleep(0.2)
    yield cluster
    cluster.attempt(f"gnt-instance remove -f {NAME}")


def ask(rapi: Cluster, path: str, body: Any = None) -> Any:
    data = "" if body is None else f"-H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    url = f"https://127.0.0.1:5080{path}"
    return json.loads(rapi.run(f"curl -sk -u ansible:s3cret {data} {url}"))


def test_an_instance_over_rapi(rapi: Cluster, images: Path) -> None:
    assert "cloudimage+debian-12" in ask(rapi, "/2/os")
    body = {
        "__version__": 1,
        "mode": "create",
        "instance_name": NAME,
        "os_type": "cloudimage+default",
        "osparams": {"image": f"{images}/small.qcow2", "dns_servers": "192.0.2.53"},
        "osparams_private": {"user_data": "#cloud-config\n# pr1vate\n"},
        "disk_template": "file",
        "disks": [{"size": 64}],
        "nics": [{"ip": "10.77.0.16", "network": "lan"}],
        "pnode": "node1.example.com",
        "name_check": False,
        "ip_check": False,
        "start": False,
    }
    job = ask(rapi, "/2/instances", body)
    for _attempt in range(300):
        state = ask(rapi, f"/2/jobs/{job}")
        if state["status"] in ("success", "error"):
            break
        time.sleep(0.2)
    assert state["status"] == "success", state
    disk = rapi.disk("vm6")
    text = "".join(
        rapi.run(f"mtype -i {disk}@@32768 ::/{name}") for name in ("user-data", "network-config")
    )
    assert "# pr1vate" in text
    assert '"10.77.0.16/24"' in text
    assert "192.0.2.53" in text
    told = json.dumps(ask(rapi, f"/2/instances/{NAME}"))
    assert "cloudimage+default" in told
    assert "pr1vate" not in told
