"""The decoder's whole door, as root uses it: bytes in, verdict out."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from lib.source import decode
from tests.conftest import require


def decoded(image: Path, declared: str = "auto", limit_bytes: int = 1 << 40) -> Optional[Path]:
    """Decode a file in the sandbox; return the raw file that it made, None if the image is raw."""
    require("bwrap", "prlimit", "unshare", "qemu-img")
    folder = image.parent / "decoded"
    folder.mkdir(exist_ok=True)
    with image.open("rb") as file:
        with decode.started(file, declared, limit_bytes, folder) as decoder:
            return decoder.result().path


def coming(
    image: Path, data: bytes, declared: str = "auto", limit_bytes: int = 1 << 40
) -> Optional[Path]:
    """Decode a file while it comes, a twentieth of it at a time."""
    require("bwrap", "prlimit", "unshare", "qemu-img")
    folder = image.parent / "decoded"
    folder.mkdir(exist_ok=True)
    step = len(data) // 20 + 1
    with image.open("w+b", buffering=0) as file:
        with decode.started(file, declared, limit_bytes, folder, len(data)) as decoder:
            for start in range(0, len(data), step):
                file.write(data[start : start + step])
            decoder.complete()
            return decoder.result().path
