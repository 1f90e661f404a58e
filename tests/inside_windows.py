"""Runs cloudbase-init's own code, which is Windows' cloud-init: test_windows.py gives it seeds.

Started in a sandbox with cloudbase-init on PYTHONPATH. Only Windows itself is played: what is asked
of it is answered from what the test says of the machine, or written down. Reads and writes JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

CONFIG = Path("/tmp/cloudbase-init.conf")
TOOLS = Path("/tmp/mtools")
HOME = Path("/tmp/home")


def load(name: str) -> Any:
    return importlib.import_module(f"cloudbaseinit.{name}")


class NoImage(contextlib.nullcontext[None]):
    """A disk without an ISO image on it or in its partitions."""

    fixed = False

    def partitions(self) -> list[Any]:
        return []


class Windows:
    """One machine: its NICs by MAC, its registry, what its disks hold, and what was done to it."""

    def __init__(self, nics: dict[str, str]) -> None:
        self.nics = nics
        self.registry: dict[tuple[str, str], Any] = {}
        self.volumes: dict[str, str] = {}
        self.disks: list[str] = []
        self.done: dict[str, Any] = {}

    def start(self, volumes: dict[str, str], disks: list[str]) -> None:
        """Begin a boot: folders of files by label, which Windows shows for FAT, and raw disks."""
        self.volumes, self.disks = {folder: label for label, folder in volumes.items()}, disks
        self.done = {"name": None, "networks": [], "links": [], "ran": []}

    def get_config_value(self, name: str, section: str) -> Any:
        return self.registry.get((section, name))

    def set_config_value(self, name: str, value: Any, section: str) -> None:
        self.registry[section, name] = value

    def get_volumes(self) -> list[str]:
        return list(self.volumes)

    def get_volume_label(self, volume: str) -> str:
        return self.volumes[volume]

    def get_cdrom_drives(self) -> list[str]:
        return []

    def get_physical_disks(self) -> list[str]:
        return self.disks

    def execute_process(self, argv: list[str], **_options: Any) -> tuple[bytes, bytes, int]:
        if Path(argv[0]).parent == TOOLS:
            ran = subprocess.run(argv, capture_output=True)
            return ran.stdout, ran.stderr, ran.returncode
        self.done["ran"].append(Path(argv[0]).read_text())
        return b"", b"", 0

    def execute_powershell_script(self, path: str, _sysnative: bool) -> tuple[bytes, bytes, int]:
        self.done["ran"].append(Path(path).read_text())
        return b"", b"", 0

    def set_host_name(self, name: str) -> bool:
        self.done["name"] = name
        return False

    def get_network_adapter_name_by_mac_address(self, mac: str) -> str:
        return self.nics[mac]

    def rename_network_adapter(self, old: str, new: str) -> None:
        self.nics.update({mac: new for mac, name in self.nics.items() if name == old})

    def enable_network_adapter(self, name: str, enabled: bool) -> None:
        self.done["links"].append([name, enabled])

    def set_static_network_config(self, *arguments: Any) -> None:
        self.done["networks"].append(arguments)

    def get_user_home(self, name: str) -> str:
        return str(HOME / name)

    def get_default_script_exec_header(self) -> str:
        return "rem cmd"

    def __getattr__(self, name: str) -> Any:
        """Take it that the rest has no effect that the test looks at."""
        return lambda *_arguments, **_options: None


def boot(windows: Windows, volumes: dict[str, str], disks: list[str]) -> dict[str, Any]:
    """Let the service start once; return what it did to the machine, and what it complained of."""
    windows.start(volumes, disks)
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    load("init").InitManager().configure_host()
    logging.getLogger().removeHandler(handler)
    keys = {path.parent.parent.name: path.read_text() for path in HOME.glob("*/.ssh/*")}
    return {**windows.done, "keys": keys, "nics": dict(windows.nics), "log": log.getvalue()}


def main() -> None:
    """Read the configuration and the machines' boots, write what became of each."""
    config, machines = json.load(sys.stdin)
    answer = sys.stdout
    sys.stdout = sys.stderr
    CONFIG.write_text(config)
    TOOLS.mkdir()
    for name in ("mcopy", "mlabel"):
        (TOOLS / f"{name}.exe").write_text(f'#!/bin/sh\nexec {name} "$@"\n')
        (TOOLS / f"{name}.exe").chmod(0o755)
    # reads raw disks with Windows' own calls, to look for ISO images
    disk = types.ModuleType("disk")
    disk.Disk = NoImage  # type: ignore[attr-defined]
    sys.modules["cloudbaseinit.utils.windows.disk"] = disk
    factory, settings = load("osutils.factory"), load("conf")
    load("init")
    sys.platform = "win32"
    settings.CONF([], project="cloudbase-init", default_config_files=[str(CONFIG)])
    result = []
    for nics, boots in machines:
        windows = Windows(nics)
        factory.get_os_utils = lambda windows=windows: windows
        result.append([boot(windows, *each) for each in boots])
    json.dump(result, answer)


if __name__ == "__main__":
    main()
