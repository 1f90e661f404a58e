"""One throwaway cluster for all tests of this folder: they talk to it through one shell."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, require
from tests.images import convert, disk_image


class Cluster:
    """A shell on the master node."""

    def __init__(self, shell: subprocess.Popen[str]) -> None:
        self.shell = shell

    def run(self, command: str, status: int = 0) -> str:
        """Run a command and return what it prints; it must end with this status."""
        got, output = self.attempt(command)
        assert got == status, f"{command}\nstatus {got}\n{output}"
        return output

    def attempt(self, command: str) -> tuple[int, str]:
        """Run a command; return its exit status and what it prints."""
        assert self.shell.stdin is not None
        assert self.shell.stdout is not None
        mark = secrets.token_hex(8)
        self.shell.stdin.write(f"( {command}\n) < /dev/null 2>&1; echo {mark} $?\n")
        self.shell.stdin.flush()
        lines: list[str] = []
        for line in self.shell.stdout:
            if mark in line:
                before, _, status = line.partition(mark)
                return int(status), "".join([*lines, before])
            lines.append(line)
        raise AssertionError(f"the cluster is gone:\n{''.join(lines)}")

    def add(self, name: str, more: str, status: int = 0) -> str:
        """Run gnt-instance add with what every test needs."""
        return self.run(
            f"gnt-instance add -t file -n node1.example.com -B memory=256M --no-start"
            f" --no-name-check --no-ip-check {more} {name}.example.com",
            status,
        )

    def remove(self, name: str) -> None:
        """Remove an instance; one whose create failed stays in Ganeti too."""
        self.run(f"gnt-instance remove -f --ignore-failures {name}.example.com")

    def disk(self, name: str, index: int = 0) -> str:
        """Return the path of an instance's disk."""
        pattern = f"/srv/ganeti/file-storage/{name}.example.com/*"
        return self.run(f"ls -d {pattern} | sort").split()[index]


def start(*options: str) -> Iterator[Cluster]:
    """Start a cluster with the bundle; it ends with the test session."""
    require("gnt-cluster", "sshd", "ip", "unshare")
    shell = subprocess.Popen(
        [ROOT / "tests/cluster", *options, "-o", f"{ROOT}:cloudimage", "--", "bash"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    with shell:  # leaving closes its input, on which the shell and with it the cluster end
        yield Cluster(shell)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    yield from start()


@pytest.fixture(scope="session")
def pair() -> Iterator[Cluster]:
    """Start a cluster of two nodes; node1 is its master."""
    yield from start("-n", "2")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with small.raw and small.qcow2; the cluster's nodes see it too."""
    folder = tmp_path_factory.mktemp("images")
    convert(disk_image(folder / "small.raw"), "qcow2")
    return folder
