"""Hooks: which run, in which order, with what, and which are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib import hooks
from lib.errors import Error


@pytest.fixture
def pre(tmp_path: Path) -> Path:
    folder = tmp_path / "hooks.d/pre"
    folder.mkdir(parents=True)
    return folder


def hook(folder: Path, name: str, script: str, mode: int = 0o755) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(mode)
    return path


def test_order_and_names(pre: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("20-b", "10-a", "30_c", "no.sh", "also~"):
        hook(pre, name, f"echo this is {name}")
    hook(pre, "40-not-executable", "echo never", 0o644)
    (pre / "50-folder").mkdir()
    hooks.call(tmp_path, "pre", {"PATH": os.environ["PATH"]})
    assert capsys.readouterr().err.splitlines() == [
        "hook pre/10-a",
        "10-a: this is 10-a",
        "hook pre/20-b",
        "20-b: this is 20-b",
        "hook pre/30_c",
        "30_c: this is 30_c",
    ]


def test_environment_is_what_is_given(pre: Path, tmp_path: Path) -> None:
    hook(pre, "show", f"/usr/bin/env > {tmp_path}/out; cat >> {tmp_path}/out")
    hooks.call(tmp_path, "pre", {"INSTANCE_NAME": "vm1", "CLOUDIMAGE_TARGET": "/dev/x"})
    lines = (tmp_path / "out").read_text().splitlines()
    assert {"INSTANCE_NAME=vm1", "CLOUDIMAGE_TARGET=/dev/x", "CLOUDIMAGE_PHASE=pre"} <= set(lines)
    assert not any(line.startswith(("HOME=", "LC_ALL=", "PYTEST")) for line in lines)


def test_output_cannot_break_the_log(
    pre: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hook(pre, "noisy", r"printf 'a\rb\033[1m\351\n' >&2; head -c 3000 /dev/zero | tr '\0' x")
    hooks.call(tmp_path, "pre", {"PATH": os.environ["PATH"]})
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == r"noisy: a\x0db\x1b[1m\xe9"
    assert len(lines[2]) == 400


@pytest.mark.parametrize(
    ("script", "words"), [("exit 3", "ended with status 3"), ("kill -9 $$", "ended with signal 9")]
)
def test_a_failing_hook_is_named(pre: Path, tmp_path: Path, script: str, words: str) -> None:
    path = hook(pre, "10-bad", script)
    hook(pre, "20-never", f"touch {tmp_path}/never")
    with pytest.raises(Error, match=f"hook pre/10-bad {words}; .*{path}"):
        hooks.call(tmp_path, "pre", {})
    assert not (tmp_path / "never").exists()


def test_a_hook_that_others_can_write_is_refused(pre: Path, tmp_path: Path) -> None:
    hook(pre, "10-bad", f"touch {tmp_path}/never", 0o757)
    with pytest.raises(Error, match=r"10-bad: others than root can write this file"):
        hooks.call(tmp_path, "pre", {})
    assert not (tmp_path / "never").exists()


def test_a_folder_that_others_can_write_is_refused(pre: Path, tmp_path: Path) -> None:
    pre.chmod(0o777)
    with pytest.raises(Error, match=r"hooks.d/pre: others than root can write this folder"):
        hooks.call(tmp_path, "pre", {})


def test_what_will_not_run_is_said(
    pre: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("10-good", "20-ntp.sh", "30-old~", "40-x.dpkg-dist", "README", ".50.swp"):
        hook(pre, name, "true")
    hook(pre, "60-mode", "true", 0o644)
    hook(pre.parent, "70-top", "true")
    hooks.warn(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": will not run")[0] for line in lines] == [
        f"WARNING: {pre.parent}/70-top",
        f"WARNING: {pre}/20-ntp.sh",
        f"WARNING: {pre}/60-mode",
    ]
