"""Run the doors as Ganeti runs them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import pytest

from tests.conftest import ROOT, SYSTEM_PATH, require

UUID = "7eb7a864-32d5-4cce-a37f-4dfde4aaf87e"
GAP = 64 * 512  # where the seed is in tests/images.py's GPT


@dataclass(frozen=True)
class Result:
    """What Ganeti and the user see of a script."""

    status: int
    log: str
    tail: str  # what gnt-instance shows of a failure

    @property
    def error(self) -> str:
        """The last line."""
        return self.log.splitlines()[-1] if self.log else ""


def tail_as_ganeti(path: Path) -> str:
    """Read the log as Ganeti's TailFile does: the last 20 lines of the last 4096 bytes."""
    data = path.read_bytes()[-4096:]
    return "\n".join(data.decode("ascii").splitlines()[-20:])


def seed_files(disk: Path, offset: int = GAP) -> dict[str, bytes]:
    """Read the seed back with mtools."""
    volume = f"{disk}@@{offset}"
    names = subprocess.run(["mdir", "-b", "-i", volume, "::/"], check=True, capture_output=True)
    return {
        name[3:]: subprocess.run(
            ["mtype", "-i", volume, name], check=True, capture_output=True
        ).stdout
        for name in names.stdout.decode().split()
    }


def given(disks: list[Path], more: Mapping[str, str]) -> dict[str, str]:
    """Return what OSCoreEnv and OSEnvironment of Ganeti's backend.py set."""
    variables = {
        "PATH": SYSTEM_PATH,
        "OS_API_VERSION": "20",
        "OS_NAME": "cloudimage",
        "OS_VARIANT": "default",
        "DEBUG_LEVEL": "0",
        "INSTANCE_NAME": "vm1.example.com",
        "INSTANCE_OS": "cloudimage+default",
        "INSTANCE_UUID": UUID,
        "INSTANCE_PRIMARY_NODE": "node1.example.com",
        "INSTANCE_SECONDARY_NODES": "",
        "HYPERVISOR": "kvm",
        "NIC_COUNT": "1",
        "NIC_0_MAC": "aa:00:00:12:34:01",
        "NIC_0_MODE": "bridged",
        "NIC_0_LINK": "br0",
        "NIC_0_BRIDGE": "br0",
        "DISK_COUNT": str(len(disks)),
    }
    for index, disk in enumerate(disks):
        variables[f"DISK_{index}_PATH"] = str(disk)
        variables[f"DISK_{index}_ACCESS"] = "rw"
        variables[f"DISK_{index}_SIZE"] = str(disk.stat().st_size >> 20)
    return {**variables, **more}


def _work_folders() -> list[Path]:
    return [*Path("/run").glob("cloudimage-*"), *Path("/tmp").glob("cloudimage*")]


def impatient(command: str, seconds: float) -> list[Union[str, Path]]:
    """Return what runs a door that waits only so long for storage; a door takes no options."""
    program = (
        "import sys; from lib import commands, entry; from lib.disk import nbd; "
        f"nbd.CONNECT_TIMEOUT_S = nbd.ANSWER_TIMEOUT_S = {seconds}; "
        f"sys.exit(entry.run(commands.{command}))"
    )
    return ["/usr/bin/python3", "-B", "-c", program]


def begun_import(door: Door, uri: str, seconds: float, head: bytes) -> subprocess.Popen[bytes]:
    """Start an import that waits only so long for storage, and feed it the dump's head."""
    given = {"IMPORT_DISK_URI": uri, "IMPORT_INDEX": "0"}
    child = subprocess.Popen(
        [*door.wrapper, *impatient("restore", seconds)],
        cwd=ROOT,
        env=door.environment([], given),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdin is not None
    child.stdin.write(head)
    child.stdin.flush()
    return child


class Door:
    """Calls one script with exactly the variables that Ganeti sets, and no other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = set(_work_folders())
        self.confdir = folder / "conf"
        self.confdir.mkdir()
        self.cache = folder / "cache"
        self.configure("")
        self.path = SYSTEM_PATH
        self.wrapper: list[Union[str, Path]] = []  # what starts the door instead of Ganeti

    def configure(self, text: str) -> None:
        """Write cloudimage.conf; the cache is always below the test's own folder."""
        config = self.confdir / "cloudimage.conf"
        config.write_text(f"[cache]\ndir = {self.cache}\n{text}")

    def leftovers(self) -> list[Path]:
        """Return what a door left behind: work folders, temporary files, half an entry.

        Another create on this machine, which is none of the test's business, ends by itself.
        """
        for _attempt in range(100):
            new = [path for path in _work_folders() if path not in self.before]
            if not new:
                break
            time.sleep(0.1)
        return new + list(self.cache.glob("*.work"))

    def environment(self, disks: list[Path], more: Mapping[str, str]) -> dict[str, str]:
        """Return what Ganeti gives, with this test's PATH and configuration."""
        own = {"PATH": self.path, "CLOUDIMAGE_CONFDIR": str(self.confdir)}
        return {**given(disks, own), **more}

    def __call__(
        self,
        door: Union[str, list[Union[str, Path]]],
        *arguments: str,
        disks: list[Path],
        stdin: Any = None,
        **more: str,
    ) -> Result:
        """Run the door, or what stands for it; both streams go to one file, as for create."""
        command = [ROOT / door] if isinstance(door, str) else door
        log = self.folder / "log"
        with log.open("wb") as output:
            status = subprocess.run(
                [*self.wrapper, *command, *arguments],
                cwd=ROOT,
                env=self.environment(disks, more),
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=output,
                stderr=output,
                timeout=300,
            ).returncode
        return Result(status, log.read_text("ascii"), tail_as_ganeti(log))


@pytest.fixture
def door(tmp_path: Path) -> Door:
    """Return what runs the doors; tests that create need the real tools."""
    require("qemu-img", "bwrap", "prlimit", "sfdisk", "mkfs.vfat", "mcopy")
    return Door(tmp_path)


@pytest.fixture
def disk(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a sparse disk of some MiB."""

    def make(mib: int = 64, name: str = "disk0") -> Path:
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(mib << 20)
        return path

    return make


@pytest.fixture
def nbd(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Return a function that serves a disk as storage without a path, and gives its URI."""
    require("qemu-nbd")
    servers = []

    def serve(disk: Path) -> str:
        address = tmp_path / "nbd"
        ready = f"--socket={address}", f"--pid-file={tmp_path}/pid"
        command = ["qemu-nbd", "--persistent", "--shared=0", "--format=raw", *ready, str(disk)]
        servers.append(subprocess.Popen(command))
        while not (tmp_path / "pid").exists():
            assert servers[-1].poll() is None
        return f"nbd+unix:///?socket={address}"

    yield serve
    for server in servers:
        server.terminate()
        server.wait()
