"""What Ganeti tells a script: os.environ read once, into frozen values.

The variables are those of ganeti-os-interface(7) for OS API 20; which of them a door gets was
read from Ganeti's lib/backend.py (OSCoreEnv, OSEnvironment, _GetImportExportIoCommand).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lib.errors import Error

COMMUNICATION_PREFIX = "ganeti:communication:"
_NAME = re.compile(r"[a-z0-9_][a-z0-9._-]{0,254}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Disk:
    """A disk of the instance: a path on the node, or only a URI that qemu understands."""

    index: int
    path: Optional[Path] = None
    uri: Optional[str] = None
    name: Optional[str] = None

    @property
    def label(self) -> str:
        """What error messages call this disk."""
        return str(self.path or self.uri or f"disk {self.index}")


@dataclass(frozen=True)
class Nic:
    """A NIC of the instance and the Ganeti network it is in; addresses as Ganeti writes them."""

    index: int
    mac: str
    name: Optional[str] = None
    ip: Optional[str] = None
    mode: Optional[str] = None
    subnet: Optional[str] = None
    gateway: Optional[str] = None
    subnet6: Optional[str] = None
    gateway6: Optional[str] = None

    @property
    def is_communication(self) -> bool:
        """Whether this is the NIC of gnt-instance add -c yes, the way to ganeti-metad."""
        return (self.name or "").startswith(COMMUNICATION_PREFIX)


@dataclass(frozen=True)
class Environment:
    """What Ganeti gave to one call of one script. Absent variables are None or empty."""

    variables: Mapping[str, str]  # all of them, for hooks only
    config_directory: Optional[Path]  # $CLOUDIMAGE_CONFDIR
    parameters: Mapping[str, str]  # OS parameters, by their variable's name without OSP_
    variant: Optional[str]
    name: Optional[str]
    uuid: Optional[str]
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    transfer: Optional[Disk]  # the one disk of an export or import call
    exp_size_fd: Optional[int]

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Environment:
        """Parse the variables; Error names the one that Ganeti would not have set so."""
        given = {key: value for key, value in environ.items() if value != ""}
        return cls(
            variables=dict(environ),
            config_directory=_path(given, "CLOUDIMAGE_CONFDIR"),
            parameters={k[4:]: v for k, v in environ.items() if k.startswith("OSP_")},
            variant=_matching(given, "OS_VARIANT", _VARIANT),
            name=_matching(given, "INSTANCE_NAME", _NAME),
            uuid=_matching(given, "INSTANCE_UUID", _UUID),
            disks=tuple(_disk(given, n) for n in range(_count(given, "DISK_COUNT"))),
            nics=tuple(_nic(given, n) for n in range(_count(given, "NIC_COUNT"))),
            transfer=_transfer(given),
            exp_size_fd=_count(given, "EXP_SIZE_FD") if "EXP_SIZE_FD" in given else None,
        )

    def identity(self) -> tuple[str, str]:
        """Return the instance's name and uuid."""
        if self.name is None:
            raise Error("INSTANCE_NAME is not set", "let Ganeti call this script")
        if self.uuid is None:
            raise Error("INSTANCE_UUID is not set", "let Ganeti (3.0 or newer) call this script")
        return self.name, self.uuid

    def first_disk(self) -> Disk:
        """Return disk 0, which gets the image."""
        if not self.disks:
            raise Error(
                "DISK_COUNT=0: the instance has no disk for the image", "add --disk 0:size=3G"
            )
        return _reachable(self.disks[0], "DISK_0_PATH")

    def transfer_disk(self, variable: str) -> Disk:
        """Return the disk of this export or import call; `variable` names its path."""
        if self.transfer is None:
            raise Error(f"{variable} is not set", "let Ganeti call this script")
        return self.transfer

    def disk_named(self, name: str) -> Optional[Disk]:
        """Return the disk with this Ganeti name (--disk N:name=...), never disk 0."""
        for disk in self.disks[1:]:
            if disk.name == name:
                return _reachable(disk, f"DISK_{disk.index}_PATH")
        return None


def _reachable(disk: Disk, variable: str) -> Disk:
    if disk.path is None and disk.uri is None:
        raise Error(
            f"{variable} is not set and neither is its URI: the disk cannot be reached",
            "activate it with gnt-instance activate-disks",
        )
    return disk


def _matching(given: Mapping[str, str], key: str, pattern: re.Pattern[str]) -> Optional[str]:
    value = given.get(key)
    if value is not None and not pattern.fullmatch(value):
        raise Error(f"{key}={value[:80]!r} is not of the form that Ganeti uses")
    return value


def _count(given: Mapping[str, str], key: str) -> int:
    value = given.get(key, "0")
    if not re.fullmatch(r"[0-9]{1,4}", value):
        raise Error(f"{key}={value[:80]!r} is not a number")
    return int(value)


def _path(given: Mapping[str, str], key: str) -> Optional[Path]:
    value = given.get(key)
    if value is None:
        return None
    if not value.startswith("/") or "\0" in value:
        raise Error(f"{key}={value[:80]!r} is not an absolute path")
    return Path(value)


def _uri(given: Mapping[str, str], key: str) -> Optional[str]:
    # qemu's own prefixes, json: above all, would open any file by any driver
    value = given.get(key)
    if value is not None and not re.fullmatch(r"[a-z][a-z0-9+]*:[\x21-\x7e]+", value):
        raise Error(f"{key}={value[:80]!r} is not a URI")
    if value is not None and value.startswith("json:"):
        raise Error(f"{key}={value[:80]!r}: json: is not accepted")
    return value


def _disk(given: Mapping[str, str], index: int) -> Disk:
    prefix = f"DISK_{index}_"
    return Disk(
        index,
        _path(given, prefix + "PATH"),
        _uri(given, prefix + "URI"),
        given.get(prefix + "NAME"),
    )


def _transfer(given: Mapping[str, str]) -> Optional[Disk]:
    for word in ("EXPORT", "IMPORT"):
        path = _path(given, f"{word}_DISK_PATH") or _path(given, f"{word}_DEVICE")
        uri = _uri(given, f"{word}_DISK_URI")
        if path is not None or uri is not None:
            return Disk(_count(given, f"{word}_INDEX"), path, uri)
    return None


def _nic(given: Mapping[str, str], index: int) -> Nic:
    prefix = f"NIC_{index}_"
    mac = given.get(prefix + "MAC", "").lower()
    if not _MAC.fullmatch(mac):
        raise Error(f"{prefix}MAC={mac[:80]!r} is not a MAC address")
    return Nic(
        index=index,
        mac=mac,
        name=given.get(prefix + "NAME"),
        ip=given.get(prefix + "IP"),
        mode=given.get(prefix + "MODE"),
        subnet=given.get(prefix + "NETWORK_SUBNET"),
        gateway=given.get(prefix + "NETWORK_GATEWAY"),
        subnet6=given.get(prefix + "NETWORK_SUBNET6"),
        gateway6=given.get(prefix + "NETWORK_GATEWAY6"),
    )
