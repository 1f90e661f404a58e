"""Guests under qemu's software emulation, which answer questions over a serial port."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT, require
from tests.scripts.conftest import Door

BOOT_LIMIT_S = 600.0
# what the guest is asked at every boot -> the command whose output, in one line, is the answer
QUESTIONS = {
    "name": "hostname",
    "address": "ip -o -4 address show dev eth0 | awk '{print $4}'",
    "route": "ip route show default",
    "dns": "resolvectl dns eth0",
    "search": "resolvectl domain eth0",
    "keys": "cat /home/debian/.ssh/authorized_keys",
    "host keys": "cat /etc/ssh/ssh_host_*_key.pub",
    "machine-id": "cat /etc/machine-id",
    "root": "df --block-size=1 --output=size / | tail -n 1",
    "user data ran": "cat /var/lib/user-data-ran",
    "result": "tr -d ' \\n' < /run/cloud-init/result.json",
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
{answers}
    }} > /dev/ttyS1
    systemctl poweroff
runcmd:
- echo once an instance >> /var/lib/user-data-ran
"""


def user_data() -> str:
    """Return user data that makes a guest answer all QUESTIONS at each boot and power off."""
    answers = [f'      echo "{name}="$({command})' for name, command in QUESTIONS.items()]
    return USER_DATA.format(answers="\n".join(answers))


@dataclass(frozen=True)
class Instance:
    """What Ganeti knows of an instance with one NIC in the network 10.77.0.0/24."""

    name: str
    uuid: str
    mac: str
    ip: str

    def variables(self) -> dict[str, str]:
        return {
            "INSTANCE_NAME": self.name,
            "INSTANCE_UUID": self.uuid,
            "NIC_0_MAC": self.mac,
            "NIC_0_IP": self.ip,
            "NIC_0_NETWORK_SUBNET": "10.77.0.0/24",
            "NIC_0_NETWORK_GATEWAY": "10.77.0.1",
        }


class Guest:
    """A virtual machine that was started; its consoles go to files beside the disk."""

    def __init__(self, disk: Path, mac: str) -> None:
        self.console = disk.with_suffix(".console")
        self.answers = disk.with_suffix(".answers")
        self.process = subprocess.Popen(
            [
                "qemu-system-x86_64",
                *("-accel", "tcg,thread=multi", "-m", "768"),
                *("-display", "none", "-no-reboot"),
                *("-serial", f"file:{self.console}", "-serial", f"file:{self.answers}"),
                *("-drive", f"file={disk},format=raw,if=virtio"),
                *("-netdev", "user,id=net,restrict=on"),
                *("-device", f"virtio-net-pci,netdev=net,mac={mac}"),
            ],
            stdin=subprocess.DEVNULL,
        )

    def report(self, deadline: float) -> dict[str, str]:
        """Wait until the guest is off and return its answers."""
        try:
            self.process.wait(deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            pass
        lines = self.answers.read_text("ascii", "backslashreplace").splitlines()
        answers = dict(line.strip().split("=", 1) for line in lines)
        console = self.console.read_text("ascii", "backslashreplace")
        assert list(answers) == list(QUESTIONS), f"{answers}\n{console[-4000:]}"
        return answers


@contextmanager
def _started(disk: Path, instance: Instance) -> Iterator[Guest]:
    guest = Guest(disk, instance.mac)
    try:
        yield guest
    finally:
        guest.process.kill()
        guest.process.wait()


def boot(*machines: tuple[Path, Instance]) -> list[dict[str, str]]:
    """Boot these disks side by side, each until its guest powers off; return the reports."""
    deadline = time.monotonic() + BOOT_LIMIT_S
    with ExitStack() as stack:
        guests = [stack.enter_context(_started(*machine)) for machine in machines]
        return [guest.report(deadline) for guest in guests]


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Return a folder that is gone at the end: guests' disks are too large to be left behind."""
    require("qemu-system-x86_64", "mmdebstrap", "grub-mkimage", "mkfs.ext4", "ssh-keygen")
    with tempfile.TemporaryDirectory(prefix="cloudimage-boot-", dir="/var/tmp") as path:
        yield Path(path)


def build_image(folder: Path, layout: str) -> Path:
    """Build a Debian 12 image with this partition table."""
    image = folder / f"{layout}.raw"
    subprocess.run([ROOT / "tests/build-image", "--layout", layout, image], check=True)
    return image


@pytest.fixture(scope="session")
def public_key(folder: Path) -> str:
    """Make folder/key, a key of ssh without a passphrase, and return its public half."""
    path = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path.with_suffix(".pub").read_text().strip()


class Node(Door):
    """The doors as they are called for the instances of these tests."""

    def call(self, door: str, disk: Path, instance: Instance, more: Mapping[str, str]) -> None:
        """Run create or rename for the instance."""
        result = self(door, disks=[disk], **instance.variables(), **more)
        assert result.status == 0, result.log

    def copy(self, source: Path, target: Path) -> None:
        """Export one disk and import the dump to another, as gnt-backup's pipes do."""
        with subprocess.Popen(
            [ROOT / "export"],
            env=self.environment([], {"EXPORT_DEVICE": str(source), "EXPORT_INDEX": "0"}),
            stdout=subprocess.PIPE,
        ) as export:
            imported = {"IMPORT_DEVICE": str(target), "IMPORT_INDEX": "0"}
            result = self("import", disks=[], stdin=export.stdout, **imported)
        assert (export.returncode, result.status) == (0, 0), result.log
