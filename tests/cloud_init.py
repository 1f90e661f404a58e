"""cloud-init of several versions, to be run on what the product writes.

They are Debian's and Ubuntu's packages, unpacked below build/, never installed; they run in
bubblewrap with inside_guest.py, the python3 modules that they need are Debian's.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CI, ROOT, SYSTEM_PATH, require

DEBIAN = ("http://deb.debian.org/debian", "http://archive.debian.org/debian")
UBUNTU = ("http://archive.ubuntu.com/ubuntu", "http://old-releases.ubuntu.com/ubuntu")
# in the order of their versions; EL has 24.1 and 24.4 too
MIRRORS = {
    "bullseye": DEBIAN,  # 20.4
    "bookworm": DEBIAN,  # 22.4
    "noble": UBUNTU,  # 24.1
    "focal-updates": UBUNTU,  # 24.4
    "trixie": DEBIAN,  # 25.1
    "jammy-updates": UBUNTU,  # 26.1
    "testing": DEBIAN,  # 26.2 and newer
    "resolute-updates": UBUNTU,  # as noble-updates
}
SUITES = tuple(MIRRORS)
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PACKAGES = {"resolute-updates": "cloud-init-base"}  # which cloud-init there only depends on
MODULES = ("configobj", "jinja2", "jsonpatch", "jsonschema", "oauthlib", "requests", "yaml")
GUEST = ROOT / "tests" / "inside_guest.py"


def unavailable(reason: str, must: bool = True) -> None:
    """Skip what cannot be had; with CI=true that is a failure, unless it is Ubuntu's."""
    if CI and must:
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def unpacked(suite: str) -> Path:
    """Return the /usr of this suite's cloud-init, fetched once."""
    require("apt-get", "bwrap", "dpkg-deb")
    argv = ["/usr/bin/python3", "-W", "ignore", "-c", f"import {', '.join(MODULES)}"]
    if subprocess.run(argv, capture_output=True).returncode != 0:
        unavailable(f"not installed, some of: python3-{' python3-'.join(MODULES)}")
    directory = ROOT / "build" / "cloud-init" / suite
    if not (directory / "usr").is_dir():
        shutil.rmtree(directory, ignore_errors=True)
        keyring = ubuntu_keyring() if MIRRORS[suite] == UBUNTU else KEYRING
        package = PACKAGES.get(suite, "cloud-init")
        for mirror in MIRRORS[suite]:
            if fetched(mirror, suite, keyring, package, directory):
                break
        else:
            where = " or ".join(MIRRORS[suite])
            reason = f"{package} of {suite} is not to be had from {where}"
            unavailable(reason, must=MIRRORS[suite] == DEBIAN)
    return directory / "usr"


@functools.cache
def ubuntu_keyring() -> str:
    """Return Ubuntu's keys, which Debian 13 has, signed with Debian's."""
    directory = ROOT / "build" / "cloud-init" / "ubuntu-keyring"
    if not directory.is_dir() and not fetched(
        DEBIAN[0], "trixie", KEYRING, "ubuntu-keyring", directory
    ):
        unavailable(f"ubuntu-keyring of trixie is not to be had from {DEBIAN[0]}")
    return str(directory / "usr/share/keyrings/ubuntu-archive-keyring.gpg")


def fetched(mirror: str, suite: str, keyring: str, package: str, directory: Path) -> bool:
    """Download and unpack the package with an apt of its own, which knows nothing else."""
    apt = directory / "apt"
    (apt / "lists" / "partial").mkdir(parents=True)
    (apt / "archives" / "partial").mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [signed-by={keyring}] {mirror} {suite} main\n")
    options = {
        "Acquire::Check-Valid-Until": "false",
        "Acquire::Languages": "none",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "",
        "Dir::Cache": apt,
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/nonexistent",
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
    }
    argv = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in options.items())]
    for words in (["update"], ["download", package]):
        if subprocess.run([*argv, *words], cwd=apt, capture_output=True).returncode != 0:
            shutil.rmtree(directory)
            return False
    (archive,) = apt.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, directory / "unpacked"], check=True)
    shutil.rmtree(apt)
    (directory / "unpacked" / "usr").rename(directory / "usr")
    return True


def sandbox(suite: str, etc: Path, *options: str) -> list[str]:
    """Return the argv before a command under the suite's cloud-init; only /etc can be written."""
    usr = unpacked(suite)
    links = [word for name in ("bin", "lib", "lib64", "sbin") for word in link(name)]
    argv = ["bwrap", "--unshare-all", "--die-with-parent", "--uid", "0", "--gid", "0"]
    argv += ["--ro-bind", "/usr", "/usr", *links, "--proc", "/proc", "--dev", "/dev"]
    argv += ["--tmpfs", "/tmp", "--tmpfs", "/run", "--tmpfs", "/var", "--bind", str(etc), "/etc"]
    argv += ["--ro-bind", str(usr), "/guest", "--clearenv", *options]
    return argv


def inside(suite: str, etc: Path, task: str, given: Any) -> Any:
    """Run inside_guest.py under the suite's cloud-init."""
    (etc / "cloud").mkdir(parents=True)
    (etc / "cloud" / "cloud.cfg").write_text(
        "datasource_list: [NoCloud]\nsystem_info: {distro: debian}\n"
    )
    (etc / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (etc / "os-release").write_text("ID=debian\nVERSION_ID=12\nVERSION_CODENAME=bookworm\n")
    (etc / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (etc / "group").write_text("root:x:0:\n")
    argv = sandbox(suite, etc, "--setenv", "PATH", f"/guest/bin:{SYSTEM_PATH}")
    argv += ["--setenv", "PYTHONPATH", "/guest/lib/python3/dist-packages"]
    argv += ["--ro-bind", str(GUEST), "/inside_guest.py", "--"]
    argv += ["/usr/bin/python3", "-W", "ignore", "/inside_guest.py"]
    text = json.dumps([task, given])
    ran = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def link(name: str) -> list[str]:
    path = Path("/", name)
    return ["--symlink", str(path.readlink()), str(path)] if path.is_symlink() else []
