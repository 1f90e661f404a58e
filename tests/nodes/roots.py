"""A release's root file system, with the packages that the README names, and a way into it.

Roots lie in a cache folder and are built once; remove the folder to have them anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
FOLDER = CACHE / "instance-cloudimage-tests"
DEBIAN, UBUNTU = "http://deb.debian.org/debian", "http://archive.ubuntu.com/ubuntu"
RELEASES = {
    "debian-11": ("bullseye", DEBIAN, "main"),
    "debian-12": ("bookworm", DEBIAN, "main"),
    "debian-13": ("trixie", DEBIAN, "main"),
    "debian-sid": ("sid", DEBIAN, "main"),
    "ubuntu-22.04": ("jammy", UBUNTU, "main,universe"),
    "ubuntu-24.04": ("noble", UBUNTU, "main,universe"),
}
# In a mount namespace of its own. Not chroot: in one, bubblewrap may make no namespaces. What is
# written goes to memory. The server of a test is on the same 127.0.0.1.
ENTER = """set -e
root=$1 source=$2 shared=$3
mount -t tmpfs tmpfs "$4"
mkdir "$4/upper" "$4/work" "$4/root"
mount -t overlay -o "lowerdir=$root,upperdir=$4/upper,workdir=$4/work" overlay "$4/root"
cd "$4/root"
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mkdir -p "./$shared" srv/source
mount --bind "$shared" "./$shared"
mount --bind -o ro "$source" srv/source
pivot_root . .
cd /
umount -l .
echo entered
exec sleep infinity
"""


class Unavailable(Exception):
    """The release cannot be had from its mirror."""


def readme_packages() -> list[str]:
    """Return what the README tells to install on Debian and Ubuntu."""
    (line,) = re.findall(r"^    apt-get install ([a-z].+)$", (ROOT / "README.md").read_text(), re.M)
    return str(line).split()


def root(release: str, more: Sequence[str] = ()) -> Path:
    """Return the release's root, built if it is not there, with `more` packages in it."""
    packages = [*readme_packages(), *more]
    suite, mirror, components = RELEASES[release]
    digest = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:8]
    path = FOLDER / f"{release}-{digest}"
    if not path.exists():
        options = ["--variant=minbase", f"--include={','.join(packages)}"]
        source = [mirror]
        if mirror == UBUNTU:
            # Debian 13 has Ubuntu's keys, signed with Debian's, which every mmdebstrap brings
            keys = "usr/share/keyrings/ubuntu-archive-keyring.gpg"
            ring = FOLDER / "ubuntu-keyring"
            if not ring.exists():
                only = ["--variant=extract", "--include=ubuntu-keyring"]
                _build(ring, [*only, "trixie"], [DEBIAN])
            words = components.replace(",", " ")
            source = [f"deb [signed-by={ring / keys}] {mirror} {suite} {words}"]
        _build(path, [*options, suite], source)
    return path


def _build(path: Path, before: list[str], after: list[str]) -> None:
    """Let mmdebstrap make a folder, which has its name only when it is whole."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=FOLDER))
    # a mirror may be a snapshot of some day
    command = ["mmdebstrap", "--quiet", "--aptopt=Acquire::Check-Valid-Until false", *before]
    try:
        made = subprocess.run([*command, str(work), *after], capture_output=True, text=True)
        if made.returncode != 0:
            raise Unavailable(made.stderr[-2000:])
        work.chmod(0o755)
        work.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def entered(path: Path, shared: Path, work: Path) -> Iterator[list[str]]:
    """Enter a root; yields the argv before a command in it. What is written there is lost then.

    `shared` is there under its own name, this tree as /srv/source, read-only.
    """
    command = ["unshare", "--mount", "sh", "-c", ENTER, "sh"]
    command += map(str, (path, ROOT, shared, work))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as inside:
        try:
            assert inside.stdout is not None
            assert inside.stdout.readline() == "entered\n"
            yield ["nsenter", f"--target={inside.pid}", "--mount", "--"]
        finally:
            inside.terminate()
