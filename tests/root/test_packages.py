"""The packages as they are built, and the RPM in a root: installed, upgraded, and removed.

tests/nodes installs the Debian package, on every release.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib import __version__
from tests.conftest import ROOT, SYSTEM_PATH, require
from tests.nodes import roots
from tests.packages import BUNDLE, CONFIG, NAME, OLD, build, older_tree, tree

pytestmark = pytest.mark.root
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree(tmp_path_factory.mktemp("new") / "tree"))


@pytest.fixture(scope="module")
def new_rpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree(tmp_path_factory.mktemp("new") / "tree"), "rpm")


@pytest.fixture(scope="module")
def old_rpm(new_rpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(older_tree(tmp_path_factory.mktemp("old") / "tree"), "rpm")


class Node:
    """A Debian with what our package depends on, and nothing else."""

    def __init__(self, root: Path) -> None:
        self.root, self.bundle, self.config = root, root / BUNDLE, root / CONFIG

    def __call__(self, *argv: str, **more: str) -> Done:
        environment = {"PATH": SYSTEM_PATH, "DEBIAN_FRONTEND": "noninteractive", **more}
        return subprocess.run(
            ["unshare", "--pid", "--fork", "--mount-proc", "--root", self.root, *argv],
            stdin=subprocess.DEVNULL,
            env=environment,
            capture_output=True,
            text=True,
        )

    def rpm(self, *arguments: object) -> Done:
        """Run the machine's rpm on the root, whose own packages it does not know."""
        argv = ["rpm", "--root", self.root, "--nodeps", *arguments]
        return subprocess.run(list(map(str, argv)), capture_output=True, text=True)

    def verify_imports(self) -> list[str]:
        """Run verify; return where Python had the code of our modules from."""
        door = ["/usr/bin/python3", "-B", "-v", f"/{BUNDLE}/verify", "parameters"]
        before = self.traces()
        done = self(*door, OS_VARIANT="mine")
        assert "the sandbox does not start" in done.stderr  # not in a chroot
        assert self.traces() == before
        return re.findall(rf"^# code object from '?(/{BUNDLE}/lib/[^'\n]+)", done.stderr, re.M)

    def traces(self) -> set[str]:
        """Return what there is with our name."""
        found = {str(path.relative_to(self.root)) for path in self.root.rglob("*cloudimage*")}
        return {path for path in found if not path.startswith("var/log/")}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with what the README names, and with the Python that compiles the modules."""
    require("mmdebstrap")
    root = tmp_path_factory.mktemp("node") / "root"
    subprocess.run(["cp", "-a", roots.root("debian-12"), root], check=True)
    return root


@pytest.fixture
def node(fresh: Path) -> Iterator[Node]:
    node = Node(fresh)
    yield node
    node.rpm("--erase", "--noscripts", NAME)
    for folder in ("etc/ganeti", "usr/share/ganeti"):
        shutil.rmtree(fresh / folder, ignore_errors=True)


def test_lintian(new: Path) -> None:
    require("lintian")
    (changes,) = new.parent.glob("*.changes")
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on=error,warning", changes],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


def test_depends_are_what_the_readme_names(new: Path) -> None:
    line = re.search(r"^    apt-get install ([a-z].*)$", (ROOT / "README.md").read_text(), re.M)
    assert line is not None
    named = set(line[1].split()) - {"gzip", "make"}  # essential; for make install only
    depends = subprocess.check_output(["dpkg-deb", "-f", new, "Depends"], text=True)
    assert set(depends.strip().split(", ")) == {*named, "python3:any (>= 3.9~)"}


def test_the_changelog_is_of_news(new: Path) -> None:
    folder = new.parent / f"{NAME}-{__version__}"
    fields = subprocess.check_output(
        ["dpkg-parsechangelog", "-S", "Version"], cwd=folder, text=True
    )
    assert fields.strip() == __version__
    every = subprocess.check_output(
        ["dpkg-parsechangelog", "--all", "-S", "Changes"], cwd=folder, text=True
    )
    assert every.startswith(f"\n{NAME} ({__version__}) ")
    assert re.findall(r"Release (\S+): see NEWS", every) == re.findall(
        r"^\* Noteworthy changes in release (\S+) ", (ROOT / "NEWS").read_text(), re.M
    )


# --- rpm -------------------------------------------------------------------------------------


def test_rpmlint(new_rpm: Path) -> None:
    require("rpmlint")
    spec = new_rpm.parent / f"{NAME}.spec"
    argv = ["rpmlint", f"--config={ROOT}/packaging/rpmlint.toml", str(new_rpm), str(spec)]
    done = subprocess.run(argv, capture_output=True, text=True)
    found = re.findall(r"^\S+: [EW]: .*", done.stdout, re.M)
    assert not found
    assert " 1 packages and 1 specfiles checked; 0 errors" in done.stdout


def test_requires_are_what_the_readme_names(new_rpm: Path) -> None:
    line = re.search(r"^    dnf install (.*)$", (ROOT / "README.md").read_text(), re.M)
    assert line is not None
    named = set(line[1].split()) - {"make"}  # for make install only
    text = subprocess.check_output(["rpm", "-qp", "--requires", new_rpm], text=True)
    requires = {each for each in text.splitlines() if not re.match(r"rpmlib|config|/", each)}
    assert requires == {*named, "python3 >= 3.9"}


def test_rpm_install_upgrade_erase(node: Node, old_rpm: Path, new_rpm: Path) -> None:
    done = node.rpm("--install", old_rpm)
    assert done.returncode == 0, done.stderr
    assert node("cloudimage", "--version").stdout == f"cloudimage {OLD}\n"
    settings, mine = node.config / "cloudimage.conf", node.config / "variants.d/mine.conf"
    settings.write_text("[image]\nrequire_checksum = no\n")
    mine.write_text("[variant]\nimage = /etc/passwd\n")

    done = node.rpm("--upgrade", new_rpm)
    assert done.returncode == 0, done.stderr
    assert node("cloudimage", "--version").stdout == f"cloudimage {__version__}\n"
    assert settings.read_text() == "[image]\nrequire_checksum = no\n"
    assert (node.config / "cloudimage.conf.rpmnew").exists()
    assert (node.config / "variants.list").read_text() == (ROOT / "variants.list").read_text()
    assert not list(node.bundle.rglob("gone*"))
    assert node.rpm("--upgrade", "--replacepkgs", new_rpm).returncode == 0

    origins = node.verify_imports()  # the root's Python is the one that built
    assert len(origins) > 5
    assert not [path for path in origins if not path.endswith(".pyc")]

    cache = node.root / "var/cache/ganeti-instance-cloudimage"
    cache.mkdir()
    (cache / "x.raw").touch()
    assert node.rpm("--erase", NAME).returncode == 0
    left = {path for path in node.traces() if not Path(node.root / path).is_dir()}
    assert left == {f"{CONFIG}/cloudimage.conf.{kind}" for kind in ("rpmsave", "rpmnew")}
    assert mine.exists()
    assert not cache.exists()


def test_rpm_leaves_alone_what_no_package_owns(node: Node, new_rpm: Path) -> None:
    node.bundle.mkdir(parents=True)
    for each in ("common.sh", "create"):
        (node.bundle / each).write_text("#!/bin/bash\n")
    before = node.traces()
    done = node.rpm("--install", new_rpm)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    assert f"/{BUNDLE} was not put there by a package (common.sh  create)" in line
    assert node.traces() == before
    assert {path.read_text() for path in node.bundle.iterdir()} == {"#!/bin/bash\n"}
    assert not node.config.exists()
