"""A release's root file system, with the packages that the README names, and a way into it.

usage: python -m tests.nodes.roots RELEASE [PACKAGE...] -- COMMAND [ARGUMENT...]

runs COMMAND in the root of RELEASE with these packages too: in this tree, which is read-only there,
and with this machine's network and /var/tmp. Roots lie in a cache folder and are built once; remove
the folder to have them anew. Needs root.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
FOLDER = CACHE / "instance-cloudimage-tests"
SHARED = Path("/var/tmp")
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
mkdir -m 1777 run/lock
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
exec cat
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
    digest = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:8]
    path = FOLDER / f"{release}-{digest}"
    if not path.exists():
        suite = RELEASES[release][0]
        options = ["--variant=minbase", f"--include={','.join(packages)}", suite]
        build(path, options, sources(release))
    return path


def sources(release: str, suffixes: Sequence[str] = ("",)) -> list[str]:
    """Return apt's lines for the release: its suite, and those that are called suite + suffix."""
    suite, mirror, components = RELEASES[release]
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    if mirror == UBUNTU:
        # Debian 13 has Ubuntu's keys, signed with Debian's, which every mmdebstrap brings
        ring = FOLDER / "ubuntu-keyring"
        if not ring.exists():
            only = ["--variant=extract", "--include=ubuntu-keyring", "trixie"]
            build(ring, only, [f"deb [signed-by={keyring}] {DEBIAN} trixie main"])
        keyring = f"{ring}/usr/share/keyrings/ubuntu-archive-keyring.gpg"
    place, words = f"deb [signed-by={keyring}] {mirror}", components.replace(",", " ")
    return [f"{place} {suite}{suffix} {words}" for suffix in suffixes]


def build(
    path: Path,
    options: Sequence[str],
    lines: Sequence[str],
    finish: Callable[[Path], None] = lambda _folder: None,
) -> None:
    """Let mmdebstrap make a folder, which has its name only when it is whole and finished.

    The last of the options is the suite, the lines say where apt finds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))
    # a mirror may be a snapshot of some day
    command = ["mmdebstrap", "--quiet", "--aptopt=Acquire::Check-Valid-Until false", *options]
    try:
        made = subprocess.run([*command, str(work), *lines], capture_output=True, text=True)
        if made.returncode != 0:
            raise Unavailable(made.stderr[-2000:])
        finish(work)
        work.chmod(0o755)
        try:
            work.rename(path)
        except OSError:
            if not path.exists():  # another process was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def entered(path: Path, shared: Path, work: Path) -> Iterator[list[str]]:
    """Enter a root; yields the argv before a command in it. What is written there is lost then.

    `shared` is there under its own name, this tree as /srv/source, read-only.
    """
    command = ["unshare", "--mount", "sh", "-c", ENTER, "sh"]
    command += map(str, (path, ROOT, shared, work))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as inside:
        # leaving closes its input, on which it ends, and so does the end of this process
        assert inside.stdout is not None
        assert inside.stdout.readline() == "entered\n"
        yield ["nsenter", f"--target={inside.pid}", "--mount", "--"]


def main() -> int:
    """Run what the command line says; return the command's exit status."""
    words, command = sys.argv[1:], []
    if "--" in words:
        words, command = words[: words.index("--")], words[words.index("--") + 1 :]
    if not command or not words or words[0] not in RELEASES:
        raise SystemExit(f"usage: roots RELEASE [PACKAGE...] -- COMMAND; {' '.join(RELEASES)}")
    try:
        path = root(words[0], words[1:])
    except Unavailable as error:
        raise SystemExit(f"{words[0]} cannot be had: {error}") from error
    with tempfile.TemporaryDirectory(prefix="root-", dir=SHARED) as work:
        with entered(path, SHARED, Path(work)) as inside:
            return subprocess.run([*inside, "env", "--chdir=/srv/source", *command]).returncode


if __name__ == "__main__":
    sys.exit(main())
