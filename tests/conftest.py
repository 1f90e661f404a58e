"""Fixtures and rules that every test shares."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CI = os.environ.get("CI") == "true"
NEED_ROOT = ("root", "cluster", "boot", "nodes", "storage", "guests")
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def require(*tools: str) -> None:
    """Skip the test where a tool is missing; with CI=true that is a failure."""
    missing = [tool for tool in tools if shutil.which(tool, path=SYSTEM_PATH) is None]
    if missing:
        words = f"not installed: {' '.join(missing)} (make setup installs what the tests need)"
        if CI:
            pytest.fail(words)
        pytest.skip(words)


@contextmanager
def gpg_home() -> Iterator[Path]:
    """Make a home for gpg's keys; its agent ends with it."""
    require("gpg", "gpgv", "bwrap")
    home = Path(tempfile.mkdtemp(prefix="gpg"))  # short: the agent's socket lies in it
    try:
        yield home
    finally:
        subprocess.run(["gpgconf", f"--homedir={home}", "--kill", "all"], check=True)
        shutil.rmtree(home)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need root are skipped for others; with CI=true that is a failure."""
    for item in items:
        if os.geteuid() != 0 and any(map(item.get_closest_marker, NEED_ROOT)):
            if CI:
                raise pytest.UsageError("CI=true needs root")
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what could leak in from the shell that runs the tests."""
    for key in list(os.environ):
        if key.lower().endswith("_proxy") or key.startswith(
            ("LC_", "OSP_", "CLOUDIMAGE_", "NETRC")
        ):
            monkeypatch.delenv(key)
    monkeypatch.setenv("PATH", SYSTEM_PATH)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Return a function that puts a shell script in front of a tool; it returns the call log.

    For provoking failures only: success always runs the real tool.
    """
    directory = tmp_path / "shims"

    def install(name: str, script: str) -> Path:
        directory.mkdir(exist_ok=True)
        calls = directory / f"{name}.calls"
        shim = directory / name
        shim.write_text(f'#!/bin/sh\necho "$0 $*" >> {calls}\n{script}\n')
        shim.chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}:{SYSTEM_PATH}")
        return calls

    return install
