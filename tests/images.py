"""Small disk images for tests that need no guest: a table, and data that can be checked."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

MIB = 1 << 20
TABLES = {
    # the layout of Debian's and Ubuntu's images: GRUB, ESP, and root as the last one
    "gpt": "label: gpt\n14: start=2048, size=2048, type=21686148-6449-6E6F-744E-656564454649\n"
    "15: start=4096, size=4096, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\n"
    '1: start=8192, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name="root"\n',
    "mbr": "label: dos\n1: start=2048, type=83, bootable\n",
}


def disk_image(path: Path, layout: str = "gpt", size_mib: int = 32, seed: int = 1) -> Path:
    """Make a raw image: a table, boot code, and random data with holes in between."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size_mib * MIB)
    subprocess.run(["sfdisk", "--quiet", path], input=TABLES[layout].encode(), check=True)
    with path.open("r+b") as file:
        file.write(rng.randbytes(440))
        for mib in range(4, size_mib - 1, 3):
            file.seek(mib * MIB)
            file.write(rng.randbytes(MIB))
    return path


def convert(source: Path, fmt: str, *options: str) -> Path:
    """Return the image in another of qemu-img's formats, beside the original."""
    target = source.with_suffix(f".{fmt}")
    flags = [part for option in options for part in ("-o", option)]
    subprocess.run(["qemu-img", "convert", "-O", fmt, *flags, source, target], check=True)
    return target


def assert_image(disk: Path, image: Path) -> None:
    """The image is on the disk but for the table, and sgdisk finds nothing wrong."""
    want, got = image.read_bytes(), disk.read_bytes()
    assert got[:440] == want[:440]
    assert got[MIB : len(want) - MIB] == want[MIB : len(want) - MIB]
    checked = subprocess.run(["sgdisk", "-v", disk], capture_output=True, text=True)
    assert "No problems found" in checked.stdout
