"""What a node in a virtual machine wrote to a volume is a guest that boots."""

from __future__ import annotations

import pytest

from tests.boot.conftest import boot
from tests.boot.instance import Instance, said
from tests.ganeti.test_gnt_backup import LAN
from tests.storage.machine import UUID, Machine
from tests.storage.test_plain import PLAIN

pytestmark = pytest.mark.storage


def test_a_volume_boots_elsewhere(node: Machine, vm: str) -> None:
    instance = Instance(f"{vm}.example.com", UUID, 4, 43, "static")
    nic = f"--net 0:ip=192.0.2.43,{LAN}".replace("generate", instance.macs[0])
    source = "-O image=/srv/debian.qcow2,user_data=@/srv/user-data"
    node.add(vm, f"{PLAIN} -H fake --disk 0:size=3G -o cloudimage+default {nic} {source}")
    report = boot([node.copy(node.volume(vm))], instance, "bios")
    assert '"errors":[]' in report["result"]
    assert report["name"] == vm
    assert said(report)["addresses"] == {("eth0", "192.0.2.43/24")}
    assert said(report)["routes"] == {("192.0.2.1", "eth0")}
    assert int(report["root"]) > 2 << 30  # growpart found the volume's end
