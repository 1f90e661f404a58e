"""One node for each release: its root, and the bundle installed in it as the README says."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CI, require
from tests.nodes import roots
from tests.scripts.conftest import given

BUNDLE = "/usr/share/ganeti/os/cloudimage"
NODES = os.environ.get("NODES", "").split() or list(roots.RELEASES)


@dataclass(frozen=True)
class Node:
    """A root that was entered, seen from outside."""

    release: str
    inside: list[str]

    def run(self, *argv: str, environment: Any = None, cwd: str = "/", status: int = 0) -> str:
        """Run a command in this environment alone; return what it prints. It ends with `status`."""
        words = [f"{key}={value}" for key, value in (environment or given([], {})).items()]
        done = subprocess.run(
            [*self.inside, "env", "-i", f"--chdir={cwd}", *words, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        output = done.stdout.decode("ascii")
        assert done.returncode == status, f"{self.release}: status {done.returncode}: {output}"
        return output

    def door(self, name: str, *arguments: str, disks: list[Path], **more: str) -> str:
        """Run a door as Ganeti does."""
        command = [f"{BUNDLE}/{name}", *arguments]
        return self.run(*command, environment=given(disks, more), cwd=BUNDLE)

    def refused(self, name: str, *arguments: str, disks: list[Path], **more: str) -> str:
        """Run a door that must fail; return its last line."""
        command = [f"{BUNDLE}/{name}", *arguments]
        log = self.run(*command, environment=given(disks, more), cwd=BUNDLE, status=1)
        return log.splitlines()[-1]

    def pipe(self, command: str, **more: str) -> str:
        """Run a pipe with a door in it, as impexpd does, in the node daemon's environment."""
        shell = ["bash", "-o", "errexit", "-o", "pipefail", "-c"]
        environment = {**given([], more), "LC_ALL": "C", "HOME": "/"}
        return self.run(*shell, command, environment=environment)


@contextmanager
def entered(release: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Enter a release's root as it was built; what the tests make is there under its own name."""
    require("mmdebstrap", "unshare", "nsenter", "pivot_root")
    try:
        root = roots.root(release)
    except roots.Unavailable as error:
        if CI and release.startswith("debian"):
            pytest.fail(f"{release} cannot be had: {error}")
        pytest.skip(f"{release} cannot be had: {error}")
    shared = tmp_path_factory.getbasetemp()
    with roots.entered(root, shared, tmp_path_factory.mktemp(release)) as inside:
        yield Node(release, inside)


@pytest.fixture(scope="session", params=NODES)
def release(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="session")
def node(release: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with entered(release, tmp_path_factory) as node:
        assert "installed cloudimage " in node.run("make", "-C", "/srv/source", "install")
        yield node
