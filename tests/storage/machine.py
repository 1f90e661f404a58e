"""A node in a virtual machine: with a kernel of its own, so with device mapper and DRBD.

A machine is one qemu under software emulation. What tests run in it goes through its standard input
and output, which are a shell there.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT
from tests.ganeti.conftest import Cluster
from tests.nodes import roots

# beside what README names: a node of Ganeti, its Debian, and what the tests look with
PACKAGES = (
    *("drbd-utils", "ganeti", "lvm2", "qemu-system-x86"),
    *("iproute2", "linux-image-cloud-amd64", "systemd-sysv", "udev"),
    *("glusterfs-server", "nfs-kernel-server", "qemu-block-extra"),
    *("gdisk", "mdadm"),
)
BOOT_LIMIT_S = 600.0
SYSTEM_BYTES, VOLUMES_BYTES = 4 << 30, 24 << 30  # Ganeti wants a volume group of 20 GiB
PE_START_MIB, EXTENT_MIB = 1, 4  # where LVM begins, and its unit
# systemd runs it in place of the services of a normal boot; the port is where qemu's stdio ends
SHELL = (
    "udevadm wait /dev/virtio-ports/shell; HOME=/root exec bash <>/dev/virtio-ports/shell >&0 2>&1"
)
# tsc: else a look at the clock leaves the emulation, and the node is several times as slow
KERNEL_LINE = (
    "root=/dev/vda rw console=ttyS0 quiet panic=-1 net.ifnames=0 mitigations=off tsc=reliable"
    " random.trust_cpu=on drbd.usermode_helper=/bin/true systemd.firstboot=off"
    " systemd.hostname=node{number}.example.com"
    f" systemd.run=\"/bin/bash -c '{SHELL}'\""
)
PREPARE = """set -e
# an emulated node takes more than 5 s to answer, and 10 s to begin with an export
cd /usr/share/ganeti/3.0/ganeti
sed -i 's/^RPC_CONNECT_TIMEOUT = .*/RPC_CONNECT_TIMEOUT = 60/' _constants.py
sed -Ei 's/DEFAULT_(READY|LISTEN)_TIMEOUT = 10$/DEFAULT_\\1_TIMEOUT = 90/' masterd/instance.py
cd /
tar -C /srv -xf /dev/vdb
make -s -C /srv/source install
(
echo 127.0.0.1 localhost
echo 10.77.0.100 cluster.example.com
for n in 1 2; do echo 10.77.0.$n node$n.example.com; done
for n in 1 2 3 4 5 6 7 8 9; do echo 192.0.2.$((n + 1)) vm$n.example.com; done
) > /etc/hosts
ip link add br0 type bridge
ip addr add 10.77.0.{number}/24 dev br0
ip link set br0 up
ip link set eth0 master br0 up
modprobe drbd
pvcreate -q /dev/vdc
vgcreate -q xenvg /dev/vdc
systemctl start ssh
"""


@dataclass(frozen=True)
class System:
    """What all machines of a test session boot from; it is not changed."""

    folder: Path
    kernel: Path
    initrd: Path

    def volumes(self, number: int) -> Path:
        """Return the file that is the machine's second disk, all of a volume group."""
        return self.folder / f"volumes{number}"


BUNDLE = "/usr/share/ganeti/os/cloudimage"
UUID = "74c12b91-926e-4fd2-b50d-1c533ca36193"
REMOVE = """for name in $(gnt-instance list --no-headers -o name); do
gnt-instance remove -f --ignore-failures --shutdown-timeout=0 $name
done
rm -rf /var/lib/ganeti/export/*
"""


class Machine(Cluster):
    """The shell, and the machine's disks seen from outside."""

    def __init__(self, shell: subprocess.Popen[str], volumes: Path) -> None:
        super().__init__(shell)
        self.volumes = volumes

    def disk(self, name: str, index: int = 0) -> str:
        """Return the path of an instance's disk."""
        return self._paths(name, "/dev/")[index]

    def volume(self, name: str) -> str:
        """Return the volume that holds what is on the instance's first disk."""
        return self._paths(name, "/dev/xenvg/")[0]

    def _paths(self, name: str, start: str) -> list[str]:
        """Return the paths of the instance's disks, each before what it lies on."""
        info = self.run(f"gnt-instance info {name}.example.com")
        if "template: drbd" in info:  # a device only while it is active, whole when it is in sync
            self.run(f"gnt-instance activate-disks --wait-for-sync {name}.example.com")
            info = self.run(f"gnt-instance info {name}.example.com")
        return re.findall(rf"on primary: *({start}\S+)", info)

    def door(self, name: str, given: str, status: int = 0) -> str:
        """Run a door, and its redirections, without Ganeti: for vm4 with what is given."""
        who = f"OS_API_VERSION=20 INSTANCE_NAME=vm4.example.com INSTANCE_UUID={UUID} NIC_COUNT=0"
        return self.run(f"env {who} OS_VARIANT=default {given} {BUNDLE}/{name}", status)

    def remove_all(self) -> None:
        """Remove all instances, those too whose create failed, and what was exported."""
        self.run(REMOVE)
        assert self.run("lvs --noheadings") == ""

    def copy(self, volume: str) -> Path:
        """Copy a volume out of the machine's disk, past its kernel.

        What was not synced in the machine is not there.
        """
        options = "--noheadings --nosuffix --units m --segments -o seg_size,devices"
        words = self.run(f"lvs {options} {volume}").split()
        target, end = self.volumes.with_suffix(".copy"), 0
        target.unlink(missing_ok=True)
        for size, place in zip(words[::2], words[1::2]):
            (extent,) = re.findall(r"^/dev/vdc\((\d+)\)$", place)
            subprocess.run(
                [
                    *("dd", "status=none", f"if={self.volumes}", f"of={target}"),
                    *("bs=1M", "conv=sparse,notrunc", f"count={int(float(size))}"),
                    *(f"skip={PE_START_MIB + int(extent) * EXTENT_MIB}", f"seek={end}"),
                ],
                check=True,
            )
            end += int(float(size))
        os.truncate(target, end << 20)
        return target


def build(folder: Path, images: Path) -> System:
    """Make the machines' system disk, and the archive of what they are given: tree and images."""
    root = roots.root("debian-12", PACKAGES)
    kernel = max((root / "boot").glob("vmlinuz-*"))
    options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1"]
    system = folder / "system"
    with system.open("wb") as file:
        file.truncate(SYSTEM_BYTES)
    subprocess.run(["mke2fs", *options, "-d", root, system], check=True)
    leave = [f"--exclude=./{name}" for name in (".*", "build")]
    subprocess.run(
        [
            *("tar", "--create", f"--file={folder}/given", *leave),
            *("--transform=s,^\\.,source,", f"--directory={ROOT}", "."),
            *(f"--directory={images}", *(path.name for path in images.iterdir())),
        ],
        check=True,
    )
    return System(folder, kernel, root / "boot" / kernel.name.replace("vmlinuz", "initrd.img"))


def _command(system: System, number: int) -> list[str]:
    """Return qemu's argv; vda is the system, vdb what is given, vdc the volume group."""
    folder = system.folder
    local, remote = folder / f"lan{number}", folder / f"lan{3 - number}"
    lan = f"local.type=unix,local.path={local},remote.type=unix,remote.path={remote}"
    disk = "format=raw,if=virtio,cache=unsafe"
    return [
        "qemu-system-x86_64",
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off"),
        *("-m", "4096", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-kernel", str(system.kernel), "-initrd", str(system.initrd)),
        *("-append", KERNEL_LINE.format(number=number)),
        *("-drive", f"file={folder}/system,snapshot=on,{disk}"),
        *("-drive", f"file={folder}/given,readonly=on,{disk}"),
        *("-drive", f"file={system.volumes(number)},{disk}"),
        *("-device", "virtio-rng-pci", "-serial", f"file:{folder}/console{number}"),
        *("-device", "virtio-serial-pci", "-chardev", "stdio,id=shell,signal=off"),
        *("-device", "virtserialport,chardev=shell,name=shell"),
        # one packet is one datagram: it does not matter which machine comes first
        *("-netdev", f"dgram,id=lan,{lan}"),
        *("-device", f"virtio-net-pci,netdev=lan,mac=52:54:00:00:00:0{number}"),
    ]


@contextmanager
def started(system: System, number: int) -> Iterator[Machine]:
    """Boot machine 1 or 2 with the bundle installed as README says; it ends with the block."""
    volumes = system.volumes(number)
    with volumes.open("wb") as file:
        file.truncate(VOLUMES_BYTES)
    shell = subprocess.Popen(
        _command(system, number),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    limit = threading.Timer(BOOT_LIMIT_S, shell.kill)
    limit.start()
    with shell:
        try:
            machine = Machine(shell, volumes)
            machine.run(PREPARE.replace("{number}", str(number)))
            limit.cancel()
            yield machine
        finally:
            limit.cancel()
            shell.kill()


def readme_commands() -> list[str]:
    """Return the commands of README's first instance as they are printed, in their order."""
    text = (ROOT / "README.md").read_text()
    section = text.split("\n## The first instance\n")[1].split("\n###")[0]
    return [command.strip() for command in re.findall(r"^    (?:.*\\\n)*.*$", section, re.M)]


def make_cluster(node: Machine) -> None:
    """Make a cluster of the node, as README has it before its first gnt-instance add."""
    node.run(
        "gnt-cluster init --vg-name=xenvg --enabled-disk-templates=plain,drbd"
        " --drbd-usermode-helper=/bin/true --enabled-hypervisors=kvm,fake --master-netdev=br0"
        " --nic-parameters=mode=bridged,link=br0 --no-etc-hosts cluster.example.com"
    )
    node.run("ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519")
    for command in readme_commands()[:-1]:
        node.run(command)
    # by this name qemu takes software emulation, by its name kvm it takes /dev/kvm
    node.run("gnt-cluster modify -H kvm:kvm_path=/usr/bin/qemu-system-x86_64")
