"""Hooks: which run, in which order, with what, and which are refused."""

from __future__ import annotations

import os
import time
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


@pytest.mark.parametrize(
    ("text", "words"),
    [("#!/bin/sh\r\ntrue\r\n", "No such file or directory"), ("true\n", "Exec format error")],
)
def test_a_hook_that_names_no_program(pre: Path, tmp_path: Path, text: str, words: str) -> None:
    hook(pre, "10-bad", "").write_bytes(text.encode())
    with pytest.raises(Error, match=f"hook pre/10-bad cannot be started: {words}; let its first"):
        hooks.call(tmp_path, "pre", {})


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
    (pre / "80-link").symlink_to("nowhere")
    hooks.warn(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": will not run")[0] for line in lines] == [
        f"WARNING: {pre.parent}/70-top",
        f"WARNING: {pre}/20-ntp.sh",
        f"WARNING: {pre}/60-mode",
        f"WARNING: {pre}/80-link",
    ]


def is_alive(path: Path) -> bool:
    """Whether the process whose number a hook wrote into the file is there, and no zombie."""
    try:
        status = Path(f"/proc/{path.read_text().strip()}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_what_a_hook_leaves_running_holds_nothing(
    pre: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A daemon that was started on purpose, and forgot to close its output, goes on."""
    pid = tmp_path / "pid"
    hook(pre, "10-daemon", f"sleep 60 & echo $! > {pid}\necho started; printf 'no newline'")
    hook(pre, "20-next", "echo next")
    started = time.monotonic()
    hooks.call(tmp_path, "pre", {"PATH": os.environ["PATH"]})
    assert time.monotonic() - started < 10
    assert is_alive(pid)
    os.kill(int(pid.read_text()), 9)
    assert capsys.readouterr().err.splitlines() == [
        "hook pre/10-daemon",
        "10-daemon: started",
        "10-daemon: no newline",
        "hook pre/20-next",
        "20-next: next",
    ]


def test_a_daemon_that_talks_without_end(
    pre: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hook(pre, "10-noisy", f"yes & echo $! > {tmp_path}/pid; sleep 0.1")
    started = time.monotonic()
    hooks.call(tmp_path, "pre", {"PATH": os.environ["PATH"]})
    assert time.monotonic() - started < 30
    assert "10-noisy: y\n" in capsys.readouterr().err


def test_last_words_are_heard(
    pre: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hook(pre, "10-tail", "(sleep 0.3; echo last) &")
    hooks.call(tmp_path, "pre", {"PATH": os.environ["PATH"]})
    assert capsys.readouterr().err.splitlines() == ["hook pre/10-tail", "10-tail: last"]


def test_a_hook_that_hangs_is_ended_with_all_it_started(
    pre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "LIMIT_S", 0.5)
    hook(pre, "10-hang", f"sleep 60 & echo $! > {tmp_path}/pid; wait")
    with pytest.raises(Error, match=r"^hook pre/10-hang did not end within 0.5 s; see its output"):
        hooks.call(tmp_path, "pre", {"PATH": os.environ["PATH"]})
    time.sleep(0.2)
    assert not is_alive(tmp_path / "pid")
