"""The boundary: what an exception becomes, signals, and a log that Ganeti can show."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lib import log
from tests.conftest import ROOT

PROLOGUE = f"""
import os, sys, signal, time
sys.path.insert(0, {str(ROOT)!r})
from lib import entry, log
from lib.errors import Error, context, several
"""


def run(body: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    script = PROLOGUE + body + "\nsys.exit(entry.run(create, argv=[]))\n"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, env=environ)


@pytest.mark.parametrize(
    ("body", "status", "last"),
    [
        ("def create(env): pass", 0, None),
        (
            "def create(env):\n"
            " with context('writing the seed to /dev/x'): raise Error('no room', 'use seed=tail')",
            1,
            b"ERROR: writing the seed to /dev/x: no room; use seed=tail",
        ),
        (
            "def create(env):\n with context('reading it'):\n  open('/nonexistent')",
            1,
            b"ERROR: reading it: No such file or directory: /nonexistent",
        ),
        (
            "def create(env):\n"
            " with context('reading the list', 'https://h/a'): raise Error('https://h/a: is gone')",
            1,
            b"ERROR: reading the list https://h/a: is gone",
        ),
        ("def create(env): raise several(['a=1: bad', 'b=2: worse'])", 1, b"ERROR: b=2: worse"),
        ("def create(env): 1 / 0", 2, b"ERROR: this is a bug: ZeroDivisionError: division by zero"),
        ("def create(env): raise Error('caf\\u00e9\\r\\x1b')", 1, rb"ERROR: caf\xe9\x0d\x1b"),
    ],
    ids=["fine", "error", "oserror", "twice", "several", "bug", "not-ascii"],
)  # fmt: skip
def test_what_an_exception_becomes(body: str, status: int, last: bytes | None) -> None:
    result = run(body)
    assert result.returncode == status
    assert result.stdout == b""
    lines = result.stderr.splitlines()
    assert (lines[-1] if lines else None) == last
    assert (b"Traceback" in result.stderr) == (status == 2)


def test_a_traceback_only_for_debugging() -> None:
    result = run("def create(env): raise Error('x')", DEBUG_LEVEL="1")
    assert b"Traceback" in result.stderr
    assert result.stderr.endswith(b"ERROR: x\n")


def test_files_are_private(tmp_path: Path) -> None:
    run(f"def create(env): open('{tmp_path}/f', 'w')")
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_unwind_once(tmp_path: Path, number: signal.Signals) -> None:
    body = f"""
def create(env):
    try:
        open('{tmp_path}/started', 'w').close()
        time.sleep(60)
    finally:
        os.kill(os.getpid(), {int(number)})  # a second one must not disturb the cleaning up
        open('{tmp_path}/cleaned', 'w').close()
"""
    script = PROLOGUE + body + "\nsys.exit(entry.run(create, argv=[]))\n"
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        env={},
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    while not (tmp_path / "started").exists():
        assert child.poll() is None
    child.send_signal(number)
    _out, err = child.communicate(timeout=10)
    assert child.returncode == 128 + number
    assert (tmp_path / "cleaned").exists()
    assert err.splitlines()[-1].startswith(f"ERROR: interrupted by {number.name}".encode())


def test_what_nohup_ignores_stays_ignored() -> None:
    script = PROLOGUE + "\nsys.exit(entry.run(lambda env: os.kill(os.getpid(), 1), argv=[]))\n"
    argv = ["nohup", sys.executable, "-c", script]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, env={})
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@h/a?x=1 b", "http://***@h/a?*** b"),
        ("https://h/a#f?", "https://h/a#f?"),
        ("HTTPS://h/a?x=1", "HTTPS://h/a?***"),
        ("https://h/a?x=1: no; 'https://h/?y,'", "https://h/a?***: no; 'https://h/?***,'"),
        ("https://u:p%40@h", "https://***@h"),
        ("http://u:p@q@h/a", "http://***@h/a"),
        ("rbd://x@y, a@b", "rbd://***@y, a@b"),
        ("no url: me@example.com", "no url: me@example.com"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert log.redact(text) == shown


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (1536, "1.5 KiB"), (3 << 30, "3 GiB")],
)
def test_sizes_as_a_person_reads_them(count: int, words: str) -> None:
    assert log.size(count) == words


def test_progress_is_rare(capsys: pytest.CaptureFixture[str]) -> None:
    progress = log.Progress("fetch", 1000)
    for done in range(1000):
        progress.update(done)
    assert capsys.readouterr().err == ""
    progress.printed -= log.PROGRESS_INTERVAL_S
    progress.started -= 300
    progress.update(500)
    assert capsys.readouterr().err == "fetch: 50 % of 1000 bytes, 5 min left\n"
    progress.update(501)
    assert capsys.readouterr().err == ""


def test_progress_without_a_length(capsys: pytest.CaptureFixture[str]) -> None:
    progress = log.Progress("decode", None)
    progress.printed -= log.PROGRESS_INTERVAL_S
    progress.update(3 << 20)
    assert capsys.readouterr().err == "decode: 3 MiB so far\n"


def test_a_failure_fits_what_ganeti_shows(tmp_path: Path) -> None:
    """The last 20 lines of the last 4096 bytes hold the error and the tool's own words."""
    body = """
from lib import run
def create(env):
    noise = "head -c 1000 /dev/zero | tr '\\\\0' x >&2; echo >&2"
    run.run(["sh", "-c", f"for i in $(seq 100); do {noise}; done; exit 7"])
"""
    result = run(body, PATH="/usr/bin:/bin")
    tail = result.stderr[-4096:].decode("ascii").splitlines()[-20:]
    assert tail[-1] == "ERROR: sh failed with status 7"
    assert len(tail) == 11
    assert os.linesep not in tail[0]
