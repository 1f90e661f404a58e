"""A create killed on its way: the disk keeps its size, does not boot half, can be used again."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, require
from tests.images import disk_image
from tests.scripts.conftest import Door, seed_files

MIB = 1 << 20
OLD = b"old "


def killed(door: Door, disk: Path, image: Path, call: str, number: int) -> bool:
    """Let create die at its Nth call of this kind on the disk; say whether it lived to make it."""
    strace = ["strace", "--output=/dev/null", f"--trace-path={disk}"]
    strace += [f"--inject={call}:signal=KILL:when={number}"]
    before = set(Path("/run").glob("cloudimage-*"))
    status = subprocess.run(
        [*strace, ROOT / "create"],
        cwd=ROOT,
        env=door.environment([disk], {"OSP_IMAGE": str(image)}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    ).returncode
    for folder in set(Path("/run").glob("cloudimage-*")) - before:
        if is_unlocked(folder):  # another create on this machine has locked its own
            shutil.rmtree(folder)
    return status != 0


def is_unlocked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


@pytest.mark.parametrize("call", ["fsync", "pwrite64", "fallocate"])
def test_killed(door: Door, disk: Callable[..., Path], tmp_path: Path, call: str) -> None:
    require("strace", "sfdisk")
    image = disk_image(tmp_path / "image.raw")
    target = disk(32)
    wanted = image.read_bytes()[446:512]  # the table of its boot sector
    for number in range(1, 20):
        target.write_bytes(OLD * (32 * MIB // len(OLD)))
        if not killed(door, target, image, call, number):
            break
        head = target.read_bytes()[:4096]
        assert target.stat().st_size == 32 * MIB, number
        if head[446:512] == wanted:
            assert "meta-data" in seed_files(target), number
        else:
            assert head in (bytes(4096), (OLD * 1024)[:4096]), number
        result = door("create", disks=[target], OSP_IMAGE=str(image))
        assert result.status == 0, result.log
        assert os.path.getsize(target) == 32 * MIB
    assert number > 1
