"""Guests under qemu's software emulation, which answer questions over a serial port."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.boot.instance import QUESTIONS, Instance
from tests.conftest import ROOT, require
from tests.scripts.conftest import Door

BOOT_LIMIT_S = 1500.0  # a minute where nothing else runs
# Debian's package ovmf: the 4 MiB that Ganeti would keep on a disk are its variables and its code
OVMF = "/usr/share/ovmf/OVMF.fd"
OVMF_PARTS = ("/usr/share/OVMF/OVMF_VARS_4M.fd", "/usr/share/OVMF/OVMF_CODE_4M.fd")
FIRMWARE = {
    "bios": (),
    "uefi": ("-bios", OVMF),
    "uefi-on-a-disk": ("-drive", "file={firmware},format=raw,if=pflash"),
}


def command(disks: Sequence[Path], instance: Instance, firmware: str) -> list[str]:
    """Return what boots these disks; the consoles go to files beside the first.

    Guests tell NICs apart by their MACs: they come in the reverse order.
    """
    where = disks[0].with_suffix("")
    nics = []
    for mac in reversed(instance.macs):
        network = f"n{mac[-2:]}"
        nics += ["-netdev", f"user,id={network},restrict=on,ipv6=off"]
        nics += ["-device", f"virtio-net-pci,netdev={network},mac={mac},romfile="]
    return [
        "qemu-system-x86_64",
        *("-accel", "tcg,thread=multi", "-m", "768", "-nodefaults"),
        *("-machine", "pc,hpet=off"),
        *("-display", "none", "-no-reboot"),
        *("-serial", f"file:{where}.console", "-serial", f"file:{where}.answers"),
        *("-drive", f"file={disks[0]},format=raw,if=virtio,cache=unsafe"),
        *(word.format(firmware=disks[-1]) for word in FIRMWARE[firmware]),
        *nics,
    ]


def boot(disks: Sequence[Path], instance: Instance, firmware: str) -> dict[str, str]:
    """Boot these disks until the guest powers off; return its answers."""
    console, answers = disks[0].with_suffix(".console"), disks[0].with_suffix(".answers")
    with subprocess.Popen(command(disks, instance, firmware), stdin=subprocess.DEVNULL) as guest:
        try:
            guest.wait(BOOT_LIMIT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            guest.kill()
    lines = answers.read_text("ascii", "backslashreplace").splitlines()
    # UEFI writes to every serial port before
    pairs = [line.strip().split("=", 1) for line in lines if line.partition("=")[0] in QUESTIONS]
    report = dict(pairs)
    tail = console.read_text("ascii", "backslashreplace")[-4000:]
    assert list(report) == list(QUESTIONS), f"{report}\n{tail}"
    return report


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Return a folder that is gone at the end: guests' disks are too large to be left behind."""
    require("qemu-system-x86_64", "mmdebstrap", "grub-mkimage", "mformat", "ssh-keygen")
    require("mkfs.ext4", "mkfs.xfs", "mkfs.btrfs")
    for path, package in ((OVMF, "ovmf"), ("/usr/lib/grub/x86_64-efi", "grub-efi-amd64-bin")):
        if not Path(path).exists():
            require(package)
    with tempfile.TemporaryDirectory(prefix="cloudimage-boot-", dir="/var/tmp") as path:
        yield Path(path)


def build_image(image: Path, *options: str) -> Path:
    """Build an image, of Debian 12 with a GPT unless the options say otherwise."""
    subprocess.run([ROOT / "tests/build-image", *options, image], check=True)
    return image


@pytest.fixture(scope="session")
def public_key(folder: Path) -> str:
    """Make folder/key, a key of ssh without a passphrase, and return its public half."""
    path = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path.with_suffix(".pub").read_text().strip()


class Node(Door):
    """The doors as they are called for the instances of these tests."""

    def call(
        self, door: str, disks: list[Path], instance: Instance, more: Mapping[str, str]
    ) -> None:
        """Run create or rename for the instance."""
        result = self(door, disks=disks, **instance.variables(), **more)
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
