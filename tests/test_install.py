"""What make install puts where, what it leaves alone, and that it works."""

from __future__ import annotations

import importlib.util
import marshal
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, SYSTEM_PATH, require
from tests.images import MIB, convert, disk_image
from tests.scripts.conftest import Door, seed_files


class Installed:
    """What make install put below a folder."""

    def __init__(self, root: Path) -> None:
        require("make")
        self.root = root
        self.bundle = root / "usr/share/ganeti/os/cloudimage"
        self.config = root / "etc/ganeti/instance-cloudimage"
        self.command = root / "usr/sbin/cloudimage"

    def make(self, target: str, *more: str) -> str:
        """Run make with a strict umask."""
        done = self.tried(target, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tried(self, target: str, *more: str) -> subprocess.CompletedProcess[str]:
        words = shlex.join(["make", "-sC", str(ROOT), target, f"DESTDIR={self.root}", *more])
        return subprocess.run(["sh", "-c", f"umask 077; {words}"], capture_output=True, text=True)

    def content(self) -> dict[Path, str]:
        """Return what is in all of its files."""
        return {path: path.read_text() for path in self.root.rglob("*") if path.is_file()}

    def files(self, folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    place = Installed(tmp_path / "root")
    place.make("install")
    return place


def test_install(installed: Installed) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "lib", "variants.d", "hooks.d", "doc", ":!doc/man"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    doors = {"create", "export", "import", "rename", "verify"}
    top = {"ganeti_api_version", "parameters.list", "variants.list", "README.md"}
    top |= {"NEWS", "LICENSE"}
    assert installed.files(installed.bundle) >= {*tracked, *doors, *top}
    assert not (installed.bundle / "tests").exists()
    assert installed.files(installed.config) == {"cloudimage.conf", "variants.list"}
    for folder in ("variants.d", "hooks.d/pre", "hooks.d/post"):
        assert (installed.config / folder).is_dir()
    executable = {installed.bundle / name for name in (*doors, "lib/cloudimage")}
    for path in installed.root.rglob("*"):
        if not path.is_symlink():
            mode = 0o755 if path.is_dir() or path in executable else 0o644
            assert path.stat().st_mode & 0o7777 == mode, path
    link = Path(os.readlink(installed.command))
    assert not link.is_absolute()
    assert installed.command.resolve() == installed.bundle / "lib/cloudimage"
    named = Path(os.readlink(installed.bundle / "variants.list"))
    assert installed.root / named.relative_to("/") == installed.config / "variants.list"


def test_a_second_install_keeps_what_was_edited(installed: Installed) -> None:
    edited = [installed.config / name for name in ("cloudimage.conf", "variants.list")]
    for path in edited:
        path.write_text("# edited\n")
    (installed.bundle / "create").write_text("old\n")
    installed.make("install")
    assert [path.read_text() for path in edited] == ["# edited\n"] * 2
    assert (installed.bundle / "create").read_bytes() == (ROOT / "create").read_bytes()


def test_uninstall(installed: Installed) -> None:
    before = installed.files(installed.config)
    assert installed.make("uninstall") == f"left alone: {installed.config} and the cache\n"
    assert not installed.bundle.exists()
    assert not os.path.lexists(installed.command)
    assert installed.files(installed.config) == before


def test_what_comes_along(tmp_path: Path) -> None:
    """Manual pages, the completion and units: uninstall takes them away too."""
    place, kinds = Installed(tmp_path / "root"), ("a.8", "b.5", "c.bash-completion", "d.timer")
    for name in kinds:
        (tmp_path / name).touch()
    pages, completion, services = f"{tmp_path}/a.8 {tmp_path}/b.5", tmp_path / kinds[2], kinds[3]
    more = f"PAGES={pages}", f"COMPLETION={completion}", f"SERVICES={tmp_path / services}"
    place.make("install", *more)
    usr = place.root / "usr"
    expected = {
        "share/man/man8/a.8",
        "share/man/man5/b.5",
        "share/bash-completion/completions/cloudimage",
        "lib/systemd/system/d.timer",
    }
    assert place.files(usr) >= expected
    place.make("uninstall", *more)
    assert not place.files(usr)


def test_other_places(tmp_path: Path) -> None:
    place = Installed(tmp_path / "root")
    place.make("install", "PREFIX=/usr/local", "SYSCONFDIR=/opt/etc")
    bundle = place.root / "usr/local/share/ganeti/os/cloudimage"
    assert (bundle / "create").exists()
    named = os.readlink(bundle / "variants.list")
    assert named == "/opt/etc/ganeti/instance-cloudimage/variants.list"
    assert (place.root / "opt/etc/ganeti/instance-cloudimage/cloudimage.conf").exists()
    assert (place.root / "usr/local/sbin/cloudimage").resolve() == bundle / "lib/cloudimage"


def test_the_modules_are_compiled(installed: Installed) -> None:
    for module in (installed.bundle / "lib").rglob("*.py"):
        compiled = Path(importlib.util.cache_from_source(str(module)))
        code = compiled.read_bytes()
        assert int.from_bytes(code[4:8], "little") == 0b11, "not by the hash of the text"
        path = marshal.loads(code[16:]).co_filename
        assert path == f"/{module.relative_to(installed.root)}"


@pytest.mark.parametrize(
    "program", [("verify", "parameters"), ("lib/decoder/__main__.py", "auto", "1048576", "0", "-1")]
)
def test_no_module_is_compiled_at_run_time(installed: Installed, program: list[str]) -> None:
    """As a door and as the sandbox start it; Python tells where each module's code is from."""
    before = installed.files(installed.bundle)
    for path in (installed.bundle / "lib").rglob("*.py"):
        os.utime(path, (0, 0))  # as a packager would
    isolated = ["-I", "-S"] if program[0].startswith("lib") else []
    door, *arguments = program
    done = subprocess.run(
        ["/usr/bin/python3", *isolated, "-B", "-v", installed.bundle / door, *arguments],
        stdin=subprocess.DEVNULL,
        env={"PATH": SYSTEM_PATH, "OS_VARIANT": "default", "OSP_IMAGE": "/etc/passwd"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = rf"^# code object from '?({re.escape(str(installed.bundle))}/lib/[^'\n]+)"
    origins = re.findall(told, done.stderr, re.M)
    assert len(origins) > 5
    assert not [path for path in origins if not path.endswith(".pyc")]
    assert installed.files(installed.bundle) == before


def test_an_edited_module_counts(installed: Installed) -> None:
    module = installed.bundle / "lib/__init__.py"
    status = module.stat()
    module.write_text(module.read_text().replace('"0.', '"1.'))
    os.utime(module, ns=(status.st_atime_ns, status.st_mtime_ns))
    words = subprocess.check_output([installed.bundle / "lib/cloudimage", "-V"], text=True)
    assert words.startswith("cloudimage 1.")


# --- another project's files -----------------------------------------------------------------


def refused(place: Installed, target: str, *words: str) -> None:
    """Expect one line of error, and nothing changed."""
    before = place.content()
    done = place.tried(target)
    assert done.returncode != 0
    line, *rest = done.stderr.splitlines()
    assert line.startswith("ERROR: ")
    assert all(word in line for word in words), line
    assert not [each for each in rest if not re.match(r"make(\[1\])?: ", each)]
    assert done.stdout == ""
    assert place.content() == before


@pytest.mark.parametrize("target", ["install", "uninstall"])
def test_a_bundle_of_others_is_left_alone(tmp_path: Path, target: str) -> None:
    place = Installed(tmp_path / "root")
    place.bundle.mkdir(parents=True)
    for name in ("common.sh", "create", "export", "import", "rename", "variant-debian"):
        (place.bundle / name).write_text("#!/bin/bash\n")
    words = (str(place.bundle), "common.sh", "variant-debian", "remove or rename it first")
    refused(place, target, *words)


def test_a_configuration_of_others_is_left_alone(tmp_path: Path) -> None:
    place = Installed(tmp_path / "root")
    place.config.mkdir(parents=True)
    (place.config / "variants.list").write_text("debian-bullseye\ndebian-bookworm\n")
    words = "it names debian-bullseye debian-bookworm"
    refused(place, "install", f"{place.config}/variants.list", words, "remove or rename it first")


@pytest.mark.parametrize("listed", ["# none\n", "gone-1\ndebian-12\n", "gone-1\nmine\n"])
def test_a_configuration_that_was_there_first(tmp_path: Path, listed: str) -> None:
    """Written before the first install, or for an older one."""
    place = Installed(tmp_path / "root")
    (place.config / "variants.d").mkdir(parents=True)
    (place.config / "variants.d/mine.conf").write_text("[variant]\n")
    (place.config / "variants.list").write_text(listed)
    place.make("install")
    assert (place.config / "variants.list").read_text() == listed


def test_an_install_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    place = Installed(tmp_path / "root")
    place.bundle.mkdir(parents=True)
    (place.bundle / "doc").write_text("in the way\n")
    assert place.tried("install").returncode != 0
    (place.bundle / "doc").unlink()
    place.make("install")


def test_what_was_installed_works(installed: Installed, tmp_path: Path) -> None:
    """With the installed configuration, of which only the cache's place is changed."""
    require("sfdisk", "qemu-img", "bwrap", "prlimit", "mkfs.vfat", "mcopy", "mtype")
    image = disk_image(tmp_path / "image.raw", "gpt", 12)
    convert(image, "qcow2")
    cache = tmp_path / "cache"
    config = installed.config / "cloudimage.conf"
    default = "#dir = /var/cache/ganeti-instance-cloudimage"
    assert default in config.read_text()
    config.write_text(config.read_text().replace(default, f"dir = {cache}"))
    (installed.config / "variants.d/mine.conf").write_text(
        f"[variant]\nimage = {image.with_suffix('.qcow2')}\n"
    )
    before = installed.files(installed.bundle)
    folder = tmp_path / "node"
    folder.mkdir()
    environment = {"PATH": SYSTEM_PATH, "CLOUDIMAGE_CONFDIR": str(installed.config)}
    done = subprocess.run(
        [installed.command, "fetch", "mine"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 32 * MIB)
    done = subprocess.run(
        [str(installed.bundle / "create")],
        cwd=installed.bundle,
        env={**Door(folder).environment([disk], {"OS_VARIANT": "mine"}), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert seed_files(disk)["user-data"] == b""
    assert installed.files(installed.bundle) == before
    assert len(list(cache.glob("*.raw"))) == 1
