"""The sandbox on a node that forbids user namespaces, as hardening guides ask for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, require

pytestmark = pytest.mark.root

SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
from lib import run
from lib.sandbox import Sandbox
with open("/proc/sys/user/max_user_namespaces", "w") as file:
    file.write("0")
box = Sandbox()
print(run.run(["sh", "-c", "id -u; unshare -U true || echo none"], sandbox=box), end="")
"""


def test_no_user_namespace_is_needed() -> None:
    """A namespace with the node's own numbers stands for the node, whose setting stays."""
    require("bwrap", "unshare")
    limit = Path("/proc/sys/user/max_user_namespaces")
    before = limit.read_text()
    # a program that starts before the numbers are there has lost its capabilities
    start = 'read go; exec /usr/bin/python3 -c "$0" "$1"'
    argv = ["unshare", "--user", "sh", "-c", start, SCRIPT, str(ROOT)]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdin is not None
        while (
            Path(f"/proc/{child.pid}/ns/user").readlink() == Path("/proc/self/ns/user").readlink()
        ):
            assert child.poll() is None
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{child.pid}/{kind}").write_text("0 0 100000\n")
        out, _err = child.communicate("\n", timeout=30)
    assert (child.returncode, out) == (0, "65531\nnone\n")
    assert limit.read_text() == before
