"""What several tests of this folder mount."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lib import run
from tests.conftest import require

Mount = Callable[[str, int], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Return a function that mounts a fresh file system of a type and size in bytes."""
    require("mount", "umount")
    with ExitStack() as mounts:

        def make(kind: str, size_bytes: int) -> Path:
            require(f"mkfs.{kind}")
            image, point = tmp_path / kind, tmp_path / f"{kind}-mount"
            image.touch()
            os.truncate(image, size_bytes)
            point.mkdir()
            run.run([f"mkfs.{kind}", "-q", str(image)])
            run.run(["mount", "--options", "loop", str(image), str(point)])
            mounts.callback(run.run, ["umount", str(point)])
            return point

        yield make
