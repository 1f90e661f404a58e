"""The rules of the tree: who imports whom, how small a door is, that lists and code agree."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

from lib import __version__
from lib.settings import params
from tests.conftest import ROOT

DOORS = ("create", "export", "import", "rename", "verify")
GROUND = {"errors", "log", "run", "sandbox", "environment", "compression", "workspace", "files"}
# who may import what: everything else is an arrow too many. A room is the name of its folder.
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "files": {"errors"},
    "log": {"errors"},
    "environment": {"errors"},
    "sandbox": {"errors", "log", "workspace"},
    "workspace": set(),
    "run": {"errors", "log", "sandbox"},
    "compression": {"errors", "log", "run", "sandbox"},
    "settings": GROUND,
    "decoder": GROUND,
    "source": GROUND | {"settings"},
    "disk": GROUND,
    "guest": GROUND,
    "hooks": GROUND | {"settings"},
    "entry": {"errors", "log", "environment"},
    "commands": GROUND | {"settings", "source", "disk", "guest", "hooks", "tools"},
    "verify": GROUND | {"settings", "source", "guest", "hooks", "tools"},
    "tools": {"errors", "run", "sandbox"},
    "admin": GROUND
    | {"entry", "commands", "settings", "source", "disk", "guest", "hooks", "tools"},
}
MODULES = sorted((ROOT / "lib").rglob("*.py"))


def room(path: Path) -> str:
    """Return the folder of lib/ that a module is in, or the module's own name."""
    return path.relative_to(ROOT / "lib").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the top-level and lib modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "lib":
            found |= {f"lib.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_import_arrows(path: Path) -> None:
    own = {name[4:].split(".")[0] for name in imports(path) if name.startswith("lib.")}
    own -= {"__version__", room(path)}
    assert own <= ALLOWED[room(path)], f"{path} must not import {own - ALLOWED[room(path)]}"


@pytest.mark.parametrize(
    ("module", "owner"), [("subprocess", "run"), ("requests", "web"), ("urllib3", "web")]
)
def test_one_importer(module: str, owner: str) -> None:
    found = [p.stem for p in MODULES if module in {n.split(".")[0] for n in imports(p)}]
    assert set(found) <= {owner}


# what understands bytes that nobody vouches for; zlib is there for checksums and users' own data
FOREIGN = {"bz2", "gzip", "lzma", "tarfile", "xml", "zipfile", "lib.decoder"}


@pytest.mark.parametrize("path", [each for each in MODULES if room(each) != "decoder"], ids=str)
def test_root_parses_nothing_foreign(path: Path) -> None:
    found = imports(path)
    assert not FOREIGN & (found | {name.partition(".")[0] for name in found})
    assert not any(name.startswith("lib.decoder") for name in found)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_function_is_long(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_environment_is_read_at_the_border(path: Path) -> None:
    if path.stem not in ("common", "entry", "run"):  # run reads PATH
        assert "environ" not in {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        }


@pytest.mark.parametrize("name", DOORS)
def test_doors_hold_no_logic(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK)
    assert len(path.read_text().splitlines()) <= 10
    assert path.read_text().startswith("#!/usr/bin/python3 -B\n")


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_doors_explain_themselves(name: str, option: str) -> None:
    result = subprocess.run([ROOT / name, option], capture_output=True, text=True, env={}, cwd="/")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: {name}")
    assert result.stderr == ""


@pytest.mark.parametrize("name", DOORS)
def test_doors_refuse_other_arguments(name: str) -> None:
    result = subprocess.run([ROOT / name, "x"], capture_output=True, text=True, env={}, cwd="/")
    assert result.returncode == 2
    assert "usage: " in result.stderr
    assert result.stderr.splitlines()[-1].startswith("ERROR: arguments 'x': expected ")


def test_a_door_works_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "create").symlink_to(ROOT / "create")
    result = subprocess.run([tmp_path / "create", "-h"], capture_output=True, text=True, env={})
    assert result.returncode == 0, result.stderr


def test_parameters_list_is_the_table() -> None:
    assert (ROOT / "parameters.list").read_text() == params.parameters_list()


def test_variants_list_names_every_variant_once() -> None:
    listed = (ROOT / "variants.list").read_text().split()
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "variants.d").glob("*.conf"))
    # Ganeti takes the first one where a name has no variant: it must have an image
    assert listed[0] != "default"


def test_news_begin_with_this_version() -> None:
    title, empty, first = (ROOT / "NEWS").read_text().splitlines()[:3]
    assert "NEWS" in title
    assert empty == ""
    day = r"\(20\d\d-\d\d-\d\d\)"
    words = f"\\* Noteworthy changes in release {re.escape(__version__)} {day}"
    assert re.fullmatch(words, first)


def test_api_version() -> None:
    assert (ROOT / "ganeti_api_version").read_text() == "20\n"


def test_what_is_shipped_is_ascii() -> None:
    for folder in ("lib", "variants.d", "hooks.d", "doc", "packaging"):
        for path in (ROOT / "NEWS", *(ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix not in (".pyc", ".patch"):
                assert path.read_bytes().isascii(), path


def test_the_top_level_is_as_documented() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked.stdout.split()}
    expected = {*DOORS, "ganeti_api_version", "variants.list", "parameters.list", "lib"}
    expected |= {
        "variants.d",
        "hooks.d",
        "tests",
        "doc",
        "Makefile",
        "README.md",
        "LICENSE",
        "NEWS",
    }
    assert top <= expected | {"packaging", "pyproject.toml", ".ci", ".gitignore"}
