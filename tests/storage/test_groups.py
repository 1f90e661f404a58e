"""The sandbox where the node has cgroups v2, as systemd makes them."""

from __future__ import annotations

import shlex

import pytest

from tests.storage.machine import Machine

pytestmark = pytest.mark.storage
GROUPS = "/sys/fs/cgroup/cloudimage-*"
START = """
import sys; sys.path.insert(0, "/usr/share/ganeti/os/cloudimage")
from lib import run
from lib.sandbox import Limits, Sandbox
limits = Limits(memory_bytes=int(sys.argv[1]))
run.run(["python3", "-c", sys.argv[2]], sandbox=Sandbox(limits=limits))
"""
# four processes, of which none does much
FOUR = """
import os, time
for _child in range(4):
    if os.fork() == 0:
        held = b"x" * (100 << 20)
        time.sleep(5)
        os._exit(0)
for _child in range(4):
    os.wait()
"""


def started(program: str, memory_bytes: int) -> str:
    return f"/usr/bin/python3 -c {shlex.quote(START)} {memory_bytes} {shlex.quote(program)}"


def test_memory_is_bounded_for_all_processes_together(node: Machine) -> None:
    out = node.run(started(FOUR, 256 << 20), 1)
    assert "lib.errors.Error: in the sandbox more memory was needed than 256 MiB" in out
    node.run(started(FOUR, 1 << 30))
    assert "No such file" in node.run(f"ls -d {GROUPS}", 2)
    assert "its memory is bounded for all that it runs" in node.run("cloudimage check; true")


def test_what_a_killed_run_left_goes(node: Machine) -> None:
    sleeps = started("import time; time.sleep(987)", 1 << 30)
    runs = "pgrep -f '^[^ ]*python3 -c import time; time.sleep.987'"
    node.run(
        f"{sleeps} & until {runs}; do sleep 1; done; kill -9 $!; while {runs}; do sleep 1; done"
    )
    left = node.run(f"ls -d {GROUPS}").split()
    assert len(left) == 1
    node.run("cloudimage check; true")
    assert node.run(f"ls -d {GROUPS}").split() == left  # it may be one that was just made
    node.run(f"touch -d '2 minutes ago' {left[0]}; cloudimage check; true")
    assert "No such file" in node.run(f"ls -d {GROUPS}", 2)
