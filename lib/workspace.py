"""Private folders for the time of a run: seeds hold secrets, and what is killed leaves nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE
from typing import Optional

MEMORY = Path("/run")
PREFIX, STALE_S = "cloudimage-", 60.0
MARKED = 0o1700  # the sticky bit says nothing here, and no folder of others has it by chance


@contextmanager
def folder(parent: Optional[Path] = None) -> Iterator[Path]:
    """Make a folder that only its owner can look into, for the block only.

    It is in `parent`, else in memory where the node has /run. Those of killed runs go meanwhile.
    """
    if parent is None:
        parent = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    sweep(parent)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent) as name:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.fchmod(descriptor, MARKED)
            yield Path(name)
        finally:
            os.close(descriptor)


def sweep(parent: Path) -> None:
    """Remove the folders that killed runs left: marked ones that nobody has locked for a minute.

    A name alone is no proof: in /var/tmp an administrator's own folder may have it too.
    """
    for left in parent.glob(f"{PREFIX}*"):
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or not ours
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            is_ours = status.st_uid == os.geteuid() and S_IMODE(status.st_mode) == MARKED
            if is_ours and time.time() - status.st_mtime > STALE_S:
                shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
