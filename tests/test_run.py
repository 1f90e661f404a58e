"""Starting programs: limits, failures in words, and what the sandbox keeps from them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lib import run
from lib.errors import Error
from lib.sandbox import SANDBOX_ID, Limits, Sandbox
from tests.conftest import require


@pytest.fixture(autouse=True)
def needed() -> None:
    require("bwrap", "prlimit")


def sandboxed(script: str, sandbox: Sandbox, **options: bool) -> str:
    return run.run(["sh", "-c", script], sandbox=sandbox, **options)  # type: ignore[arg-type]


def test_input_and_output() -> None:
    data = os.urandom(1 << 20).hex()
    assert run.run(["cat"], input=data.encode()) == data


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sh", "-c", "exit 3"], "sh failed with status 3"),
        (["sh", "-c", "kill -9 $$"], "sh was ended by SIGKILL"),
        (["no-such-tool"], "no-such-tool: not installed; install the package no-such-tool"),
    ],
)
def test_failures(argv: list[str], words: str) -> None:
    with pytest.raises(Error) as caught:
        run.run(argv)
    assert str(caught.value) == words


def test_a_missing_tool_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        Error, match=r"^qemu-img, bwrap: not installed; install the package bubblewrap"
    ):
        run.require("qemu-img", "bwrap")


def test_stderr_is_a_failure_where_asked() -> None:
    assert run.run(["sh", "-c", "echo x >&2"]) == ""
    with pytest.raises(Error, match="sh complained about its input"):
        run.run(["sh", "-c", "echo x >&2"], silent=True)


def test_the_wall_clock_ends_the_group(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(Error, match=r"sh did not end within 0.5 s"):
        run.run(["sh", "-c", f"(sleep 1; touch {tmp_path}/late) & sleep 30"], timeout_s=0.5)
    assert time.monotonic() - started < 5
    time.sleep(1)
    assert not (tmp_path / "late").exists()


def test_output_is_bounded() -> None:
    with pytest.raises(Error, match="yes printed more than 64 MiB"):
        run.run(["yes"])


def test_reader_checks_the_status() -> None:
    with pytest.raises(Error, match="sh failed with status 4"):
        with run.reader(["sh", "-c", "echo half; exit 4"]) as stream:
            assert stream.read() == b"half\n"


def test_reader_ends_the_child_when_the_block_fails() -> None:
    with pytest.raises(KeyError), run.reader(["sleep", "60"]):
        raise KeyError


def test_reader_watches_the_clock() -> None:
    sandbox = Sandbox(limits=Limits(wall_s=0.5))
    with pytest.raises(Error, match="sleep was ended by SIGKILL"):
        with run.reader(["sleep", "60"], sandbox=sandbox) as stream:
            assert stream.read() == b""


def test_sandbox_sees_nothing_of_the_node(tmp_path: Path) -> None:
    seen = sandboxed("ls -A / /etc /root /home /proc /tmp 2>/dev/null; env; id", Sandbox())
    assert "passwd" not in seen
    assert set(seen.split("\n\n")[0].split()) - {"/:"} <= {
        *("bin", "dev", "lib", "lib32", "lib64", "libx32", "sbin", "tmp", "usr")
    }
    assert f"uid={SANDBOX_ID if os.geteuid() == 0 else 65534}" in seen
    assert "OSP_" not in seen
    assert "HOME" not in seen


def test_sandbox_has_no_privileges() -> None:
    seen = sandboxed("cat /proc/self/status", Sandbox(read={"/proc": Path("/proc")}))
    status = {key: words.split() for key, words in (row.split(":") for row in seen.splitlines())}
    assert [status[name] for name in ("CapPrm", "CapEff", "CapAmb")] == [["0" * 16]] * 3
    assert status["NoNewPrivs"] == ["1"]
    if os.geteuid() == 0:
        assert set(status["Uid"] + status["Gid"]) == {str(SANDBOX_ID)}
        assert status["Groups"] == []


@pytest.mark.parametrize(
    "script",
    [
        "echo x > /usr/x",
        "echo x > /in",
        "exec 3<>/dev/tcp/127.0.0.1/22",
        "mount -t tmpfs x /tmp",
        "chown 1 /out",
    ],
)
def test_sandbox_forbids(script: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("input")
    (tmp_path / "out").write_text("")
    sandbox = Sandbox({"/in": tmp_path / "in"}, {"/out": tmp_path / "out"})
    with pytest.raises(Error):
        run.run(["bash", "-ec", script], sandbox=sandbox)
    assert (tmp_path / "in").read_text() == "input"


def test_sandbox_binds_the_open_file_not_its_name(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("checked")
    with (tmp_path / "in").open("rb") as file:
        (tmp_path / "in").rename(tmp_path / "moved")
        (tmp_path / "in").write_text("swapped")
        assert sandboxed("cat /in", Sandbox({"/in": file.fileno()})) == "checked"


def test_sandbox_writes_to_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    sandboxed("echo done > /out", Sandbox(write={"/out": tmp_path / "out"}))
    assert (tmp_path / "out").read_text() == "done\n"


@pytest.mark.parametrize(
    ("limits", "script"),
    [
        (Limits(file_size_bytes=1 << 20), "head -c 2M /dev/zero > /out"),
        (Limits(address_space_bytes=100 << 20), "head -c 500M /dev/zero | sort > /out"),
        (Limits(cpu_s=1), "while :; do :; done"),
    ],
    ids=["file-size", "memory", "cpu"],
)
def test_sandbox_limits(limits: Limits, script: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(Error):
        run.run(
            ["bash", "-ec", f"set -o pipefail; {script}"],
            sandbox=Sandbox(write={"/out": tmp_path / "out"}, limits=limits),
        )


def test_sandbox_needs_bubblewrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Callable[[str, str], Path]
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("prlimit", "sh"):
        (tmp_path / "bin" / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    with pytest.raises(Error, match="bwrap: not installed; install the package bubblewrap"):
        sandboxed("true", Sandbox())


def test_sandbox_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from lib import run\nfrom lib.sandbox import Sandbox\n"
        f"box = Sandbox(write={{'/out': {str(tmp_path)!r}}})\n"
        "run.run(['sh', '-c', 'touch /out/up; sleep 7654'], sandbox=box)"
    )
    parent = subprocess.Popen(["/usr/bin/python3", "-c", script])
    while not (tmp_path / "up").exists():
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    for _attempt in range(100):
        if subprocess.run(["pgrep", "-f", "sleep 7654"], stdout=subprocess.DEVNULL).returncode:
            return
        time.sleep(0.05)
    pytest.fail("the sandboxed program outlived its parent")


def test_a_leader_that_ended_does_not_save_its_group(tmp_path: Path) -> None:
    """What it left keeps the output open until the time is over."""
    with pytest.raises(Error, match=r"sh did not end within 0.5 s"):
        run.run(["sh", "-c", f"(sleep 1.5; touch {tmp_path}/late) & exit 0"], timeout_s=0.5)
    time.sleep(1.5)
    assert not (tmp_path / "late").exists()
