"""Private folders: gone with their run, and if that is killed, with a later one."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from pathlib import Path

from lib import workspace
from tests.conftest import ROOT

SCRIPT = """
import sys, time; from pathlib import Path
sys.path.insert(0, sys.argv[1]); from lib import workspace
with workspace.folder(Path(sys.argv[2])) as work:
    print(work, flush=True)
    time.sleep(600)
"""


def started(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    argv = ["/usr/bin/python3", "-B", "-c", SCRIPT, str(ROOT), str(parent)]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, Path(child.stdout.readline().strip())


def age(path: Path) -> None:
    past = time.time() - workspace.STALE_S - 1
    os.utime(path, (past, past))


def test_folder(tmp_path: Path) -> None:
    with workspace.folder(tmp_path) as work:
        assert stat.S_IMODE(work.stat().st_mode) == workspace.MARKED == 0o1700
        (work / "secret").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    (dead, left), (alive, used) = started(tmp_path), started(tmp_path)
    with dead, alive:
        try:
            (left / "secret").write_text("x")
            dead.kill()
            dead.wait()
            workspace.sweep(tmp_path)
            assert left.exists()  # it may be one that its run has not locked yet
            age(left)
            age(used)
            workspace.sweep(tmp_path)
            assert list(tmp_path.iterdir()) == [used]
        finally:
            alive.kill()


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "cloudimage-link").symlink_to(elsewhere)
    (parent / "cloudimage-file").touch()
    (parent / "cloudimage-backups1").mkdir(0o700)  # an administrator's, of a name like ours
    (parent / "other").mkdir()
    for each in (elsewhere, *parent.iterdir()):
        age(each)
    workspace.sweep(parent)
    assert len(list(parent.iterdir())) == 4
    assert (elsewhere / "file").exists()
