"""The Debian package on every release: installed, upgraded, and removed without a trace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib import __version__
from tests.conftest import ROOT, SYSTEM_PATH
from tests.images import assert_image, disk_image
from tests.nodes.conftest import Node, entered
from tests.packages import BUNDLE, CONFIG, NAME, OLD, build, older_tree, tree

pytestmark = pytest.mark.nodes
# what dpkg and apt keep for themselves
NOT_OURS = (
    "/var/log/|/var/lib/dpkg/|/var/lib/apt/|/var/cache/(apt|debconf|ldconfig|man)/|.*/__pycache__/"
)
DPKG = {"PATH": SYSTEM_PATH, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree(tmp_path_factory.mktemp("new") / "tree"))


@pytest.fixture(scope="module")
def old(new: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(older_tree(tmp_path_factory.mktemp("old") / "tree"))


@pytest.fixture
def bare(release: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Enter a root as the release has it, with nothing of ours."""
    with entered(release, tmp_path_factory) as node:
        yield node


def files(node: Node) -> set[str]:
    """Return all that is in the root."""
    found = node.run("sh", "-c", "find / -xdev | cat -v", environment=DPKG).splitlines()
    return {path for path in found if not re.match(NOT_OURS, path)}


def dpkg(node: Node, *arguments: object, status: int = 0) -> str:
    """Run dpkg, which configures nothing that lacks a dependency."""
    command = ["dpkg", "--force-confold", *map(str, arguments)]
    return node.run(*command, environment=DPKG, status=status)


def test_install_upgrade_purge(bare: Node, old: Path, new: Path, tmp_path: Path) -> None:
    before = files(bare)
    dpkg(bare, "--install", old)
    assert bare.run("cloudimage", "--version") == f"cloudimage {OLD}\n"
    settings, mine = f"/{CONFIG}/cloudimage.conf", f"/{CONFIG}/variants.d/mine.conf"
    bare.run("sh", "-c", f"echo '[image]' > {settings}; echo '[variant]' > {mine}")
    assert bare.run("ls", f"/{BUNDLE}/lib/gone.py")

    dpkg(bare, "--install", new)
    assert bare.run("cloudimage", "--version") == f"cloudimage {__version__}\n"
    assert bare.run("cat", settings) == "[image]\n"
    shipped = (ROOT / "doc/cloudimage.conf").read_text()
    assert bare.run("cat", f"{settings}.dpkg-dist") == shipped
    assert bare.run("cat", f"/{CONFIG}/variants.list") == (ROOT / "variants.list").read_text()
    assert not bare.run("find", f"/{BUNDLE}", "-name", "gone*")

    image, disk = disk_image(tmp_path / "gpt.raw", size_mib=12), tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    bare.door("verify", "parameters", disks=[], OSP_IMAGE=str(image))
    bare.door("create", disks=[disk], OSP_IMAGE=str(image))
    assert_image(disk, image)
    read = bare.run("python3", "-B", "-v", f"/{BUNDLE}/verify", "--help")
    origins = re.findall(rf"^# code object from '?(/{BUNDLE}/lib/[^'\n]+)", read, re.M)
    assert len(origins) > 5
    assert not [path for path in origins if not path.endswith(".pyc")]

    dpkg(bare, "--remove", NAME)
    kept = f"/etc/ganeti$|/{CONFIG}|/var/cache/ganeti-instance-cloudimage|/var/lib/systemd/"
    assert not [path for path in files(bare) - before if not re.match(kept, path)]
    assert bare.run("cat", settings) == "[image]\n"
    dpkg(bare, "--purge", NAME)
    # the administrator's own file keeps its folder
    assert files(bare) - before == {"/etc/ganeti", f"/{CONFIG}", f"/{CONFIG}/variants.d", mine}
    assert not before - files(bare)


@pytest.mark.parametrize("name", ["common.sh", "lib"])
def test_what_no_package_owns_is_left_alone(bare: Node, new: Path, name: str) -> None:
    """The other project's bundle, and one that make install or git clone put there."""
    bare.run("sh", "-c", f"mkdir -p /{BUNDLE}; cd /{BUNDLE}; touch create {name}")
    before = files(bare)
    said = dpkg(bare, "--install", new, status=1)
    (line,) = [line for line in said.splitlines() if line.startswith("ERROR: ")]
    found = "  ".join(sorted(("create", name)))
    assert f"/{BUNDLE} was not put there by a package ({found})" in line
    assert files(bare) == before
