"""Packages as make builds them, of this tree and of an older release that is made of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from lib import __version__
from tests.conftest import ROOT, require

NAME = "instance-cloudimage"
BUNDLE = "usr/share/ganeti/os/cloudimage"
CONFIG = "etc/ganeti/instance-cloudimage"
OLD = "0.0.9"


def tree(folder: Path) -> Path:
    """Copy what makes the package, as a release has it."""
    parts = "create export import rename verify ganeti_api_version parameters.list variants.list"
    parts += " variants.d hooks.d lib doc packaging Makefile README.md NEWS LICENSE"
    folder.mkdir()
    subprocess.run(["cp", "-r", *parts.split(), folder], cwd=ROOT, check=True)
    return folder


def older_tree(folder: Path) -> Path:
    """Make an older release: one module more, one variant less, another default."""
    tree(folder)
    for name, before, after in (
        ("lib/__init__.py", __version__, OLD),
        ("NEWS", f"release {__version__} ", f"release {OLD} "),
        ("variants.list", "debian-13\n", ""),
        ("doc/cloudimage.conf", "20G", "10G"),
    ):
        text = (folder / name).read_text()
        assert before in text
        (folder / name).write_text(text.replace(before, after))
    (folder / "lib/gone.py").write_text('"""A module that was."""\n')
    return folder


def build(folder: Path, kind: str = "deb") -> Path:
    """Build a package of a tree; return its file."""
    tools = {"deb": ("dh", "dh_python3", "dpkg-buildpackage"), "rpm": ("rpmbuild",)}
    require("make", *tools[kind])
    # what a machine with Ubuntu takes by itself; Debian 11 cannot read it
    environment = {**os.environ, "DPKG_DEB_COMPRESSOR_TYPE": "zstd"}
    command = ["make", "-sC", str(folder), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (package,) = (folder / "build").glob(f"*.{kind}")
    assert done.stdout.splitlines()[-1] == f"built build/{package.name}"
    return package
