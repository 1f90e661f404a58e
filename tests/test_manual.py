"""The manual pages and the completion name what there is, all of it and nothing else."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import pytest

from lib.admin import cli
from lib.settings import config, params
from tests.conftest import ROOT, require

PAGES = sorted((ROOT / "doc/man").iterdir())


def subcommands() -> dict[str, argparse.ArgumentParser]:
    actions = cli.parser()._actions
    (found,) = [each for each in actions if isinstance(each, argparse._SubParsersAction)]
    return dict(found.choices)


def long_options(parser: argparse.ArgumentParser) -> set[str]:
    return {o for each in parser._actions for o in each.option_strings if o.startswith("--")}


def items(page: str, heading: str) -> list[str]:
    """Return the tagged items (.It Cm NAME) below a heading, up to the next one."""
    text = (ROOT / "doc/man" / page).read_text()
    part = re.split(rf"^\.S[hs] {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    part = re.split(r"^\.S[hs] ", part, flags=re.MULTILINE)[0]
    return re.findall(r"^\.It Cm (\S+)", part, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_is_sound(page: Path) -> None:
    require("groff")
    argv = ["groff", "-ww", "-mandoc", "-Tascii", "-z", str(page)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_every_parameter_is_described() -> None:
    assert items("ganeti-instance-cloudimage.7", "OS PARAMETERS") == list(params.NAMES)
    assert set(items("ganeti-instance-cloudimage.7", "VARIANTS")) == set(params.VARIANT_KEYS)


def test_every_setting_is_described() -> None:
    for section in {section for section, *_rest in config._SETTINGS}:
        known = [key for where, key, *_rest in config._SETTINGS if where == section]
        assert items("cloudimage.conf.5", f"[{section}]") == known
        template = (ROOT / "doc/cloudimage.conf").read_text()
        assert [key for key in known if f"#{key} =" not in template] == []


def test_every_default_is_told() -> None:
    template = (ROOT / "doc/cloudimage.conf").read_text()
    for _section, key, _parse, default in config._SETTINGS:
        assert f"#{key} = {default}".rstrip() in template.splitlines()


def test_every_subcommand_and_option_is_described() -> None:
    text = (ROOT / "doc/man/cloudimage.8").read_text()
    found = subcommands()
    assert set(re.findall(r"^\.It Ic (\w+)", text, re.MULTILINE)) == set(found)
    for name, parser in found.items():
        (line,) = re.findall(rf"^\.It Ic {name}\b(.*)$", text, re.MULTILINE)
        described = {"-" + each for each in re.findall(r"Fl (-[a-z-]+)", line)}
        assert described | {"--help"} == long_options(parser), name


@pytest.mark.parametrize("words", [[""], *([name, "-"] for name in subcommands())])
def test_completion_offers_what_there_is(words: list[str]) -> None:
    script = (
        f"source {ROOT}/packaging/cloudimage.bash-completion;"
        ' COMP_WORDS=(cloudimage "$@"); COMP_CWORD=$#; _cloudimage; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True
    )
    found = set(done.stdout.split())
    if words == [""]:
        assert {each for each in found if not each.startswith("-")} == set(subcommands())
    else:
        assert {o for o in found if o.startswith("--")} == long_options(subcommands()[words[0]])
