"""Files of the node, opened without being led astray or kept waiting."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from lib.errors import Error


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a regular file, once: nothing that would block, under this very name unless links count.

    Error for what is none; OSError as ever for what cannot be opened.
    """
    flags = os.O_RDONLY | (0 if follow else os.O_NOFOLLOW) | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise Error(f"{path}: is a symbolic link", "name the file itself") from error
        if error.errno == errno.ENXIO:
            raise Error(f"{path}: is not a regular file") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise Error(f"{path}: is a directory", "name a file in it")
    raise Error(f"{path}: is not a regular file")
