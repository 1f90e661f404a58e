"""A guest under a real Ganeti with the hypervisor kvm, reached by ssh over the bridge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.boot.conftest import build_image
from tests.conftest import ROOT, require
from tests.ganeti.conftest import Cluster, start

pytestmark = [pytest.mark.cluster, pytest.mark.boot]
SSH = (
    "ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    " -o LogLevel=ERROR -o ConnectTimeout=5"
)


@pytest.fixture(scope="module")
def kvm_cluster() -> Iterator[Cluster]:
    require("qemu-system-x86_64", "ssh")
    yield from start("-x", "fake,kvm")


def test_ssh_into_an_instance(kvm_cluster: Cluster, folder: Path, public_key: str) -> None:
    image = build_image(folder / "gpt.raw")
    kvm_cluster.run(
        "gnt-instance add -H kvm -t file -n node1.example.com -B memory=768M --no-ip-check"
        " --disk 0:size=3G --net 0:ip=10.77.0.11,network=lan -o cloudimage+default"
        f" -O image={image},ssh_keys=@{folder}/key.pub,dns_servers=192.0.2.53 vm1.example.com"
    )
    ssh = f"{SSH} -i {folder}/key debian@10.77.0.11"
    kvm_cluster.run(f"for _ in $(seq 100); do {ssh} true && exit; sleep 3; done; {ssh} true")
    assert kvm_cluster.run(f"{ssh} hostname") == "vm1\n"
    assert "inet 10.77.0.11/24 " in kvm_cluster.run(f"{ssh} ip -4 address show dev eth0")
    assert "default via 10.77.0.1 dev eth0" in kvm_cluster.run(f"{ssh} ip route")
    assert "192.0.2.53" in kvm_cluster.run(f"{ssh} resolvectl dns eth0")
    assert kvm_cluster.run(f"{ssh} cat .ssh/authorized_keys") == f"{public_key}\n"
    root = int(kvm_cluster.run(f"{ssh} df --block-size=1M --output=size / | tail -n 1"))
    assert 2700 < root < 3 * 1024
    # after gnt-instance modify the guest is told its new address without a reinstall
    host_keys = kvm_cluster.run(f"{ssh} cat '/etc/ssh/ssh_host_*_key.pub'")
    kvm_cluster.run("gnt-instance modify -f --net 0:modify,ip=10.77.0.12 vm1.example.com")
    kvm_cluster.run(f"{ROOT}/lib/cloudimage reseed --reboot vm1.example.com")
    ssh = f"{SSH} -i {folder}/key debian@10.77.0.12"
    kvm_cluster.run(f"for _ in $(seq 100); do {ssh} true && exit; sleep 3; done; {ssh} true")
    assert "inet 10.77.0.12/24 " in kvm_cluster.run(f"{ssh} ip -4 address show dev eth0")
    assert "10.77.0.11" not in kvm_cluster.run(f"{ssh} ip -4 address show dev eth0")
    assert kvm_cluster.run(f"{ssh} cat '/etc/ssh/ssh_host_*_key.pub'") == host_keys
