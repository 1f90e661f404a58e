"""Start other programs, in the sandbox or out of it: the only module that imports subprocess."""

from __future__ import annotations

import os
import selectors
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Optional, Union

from lib import log
from lib.errors import Error
from lib.sandbox import Sandbox, enclosed

PIPE, STDOUT = subprocess.PIPE, subprocess.STDOUT  # for callers, who do not import subprocess
Process = subprocess.Popen
DEFAULT_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# glibc's arenas, one a thread, would burst a sandbox's limit on the address space
ENVIRONMENT = {"LC_ALL": "C", "MALLOC_ARENA_MAX": "3"}
OUTPUT_LIMIT_BYTES = 64 << 20
REPLAY_LINES, REPLAY_WIDTH = 10, 200

# Debian's package, and EL's where its name is another
PACKAGES = {
    **dict.fromkeys(("gnt-cluster", "gnt-instance", "gnt-network", "gnt-node"), "ganeti"),
    "bwrap": "bubblewrap",
    "bzip2": "bzip2",
    "gpg": "gnupg (EL: gnupg2)",
    "gpgv": "gpgv (EL: gnupg2)",
    "gzip": "gzip",
    "lz4": "lz4",
    "mcopy": "mtools",
    "mdir": "mtools",
    "mkfs.vfat": "dosfstools",
    "prlimit": "util-linux",
    "qemu-img": "qemu-utils (EL: qemu-img)",
    "qemu-io": "qemu-utils (EL: qemu-img)",
    "qemu-nbd": "qemu-utils (EL: qemu-img)",
    "sfdisk": "fdisk (EL: util-linux)",
    "unshare": "util-linux",
    "xz": "xz-utils (EL: xz)",
    "zstd": "zstd",
}


class Failed(Error):
    """A program failed; `words` is what it said last, for those who know what it means."""

    def __init__(self, message: str, words: str = "") -> None:
        super().__init__(message)
        self.words = words


def require(*tools: str) -> None:
    """Raise an Error that names the package unless every tool is installed."""
    missing = [tool for tool in tools if _which(tool) is None]
    if missing:
        packages = " ".join(sorted({PACKAGES.get(tool, tool) for tool in missing}))
        raise Error(f"{', '.join(missing)}: not installed", f"install the package {packages}")


def _which(tool: str) -> Optional[str]:
    return shutil.which(tool, path=os.environ.get("PATH") or DEFAULT_PATH)


def _resolve(tool: str) -> str:
    require(tool)
    path = _which(tool)
    assert path is not None  # require() has just found it
    return os.path.abspath(path)


@contextmanager
def process(
    argv: Sequence[str],
    *,
    stdin: Union[int, IO[bytes], None] = None,
    stdout: Union[int, IO[bytes]] = subprocess.PIPE,
    stderr: Union[int, IO[bytes]] = subprocess.PIPE,
    environment: Optional[Mapping[str, str]] = None,
    sandbox: Optional[Sandbox] = None,
    descriptors: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `argv` in a process group of its own, which is gone when the block ends.

    But if the block has waited for the leader: what that left running is left alone, as its number
    may be somebody else's by now.

    stdin is /dev/null unless given, the environment is PATH and ENVIRONMENT unless given.
    """
    if environment is None:
        environment = {**ENVIRONMENT, "PATH": os.environ.get("PATH") or DEFAULT_PATH}
    command, passed = [_resolve(argv[0]), *argv[1:]], list(descriptors)
    with ExitStack() as stack:
        if sandbox is not None:
            environment = {**ENVIRONMENT, "PATH": DEFAULT_PATH}
            command, bound = enclosed(command, sandbox, stack, _resolve)
            passed += bound
        log.debug(shlex.join(command))
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=stdout,
            stderr=stderr,
            env=dict(environment),
            pass_fds=passed,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            _end(child)


def end(child: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Let the child end by itself until the time is over, then end its process group."""
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout_s)
    _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child's process group, unless its leader was waited for, and close the pipes."""
    if child.returncode is None:  # its number is still its own, be it dead or alive
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()


def run(
    argv: Sequence[str],
    *,
    input: bytes = b"",
    stdin: Union[int, IO[bytes], None] = None,
    stdout: Union[int, IO[bytes], None] = None,
    environment: Optional[Mapping[str, str]] = None,
    sandbox: Optional[Sandbox] = None,
    descriptors: Sequence[int] = (),
    timeout_s: Optional[float] = None,
    accept: Sequence[int] = (0,),
    silent: bool = False,
) -> str:
    """Run `argv` to its end and return its standard output as text; Error if it fails.

    accept: the exit statuses that are no failure. silent: anything on stderr is a failure too.
    timeout_s is the wall clock, a sandbox's own unless given; the whole process group ends with it.
    """
    if timeout_s is None and sandbox is not None:
        timeout_s = sandbox.limits.wall_s
    with process(
        argv,
        stdin=subprocess.PIPE if input else stdin,
        stdout=subprocess.PIPE if stdout is None else stdout,
        environment=environment,
        sandbox=sandbox,
        descriptors=descriptors,
    ) as child:
        out, err = _communicate(child, input, timeout_s, argv[0])
    _judge(argv[0], child.returncode, err, accept, silent)
    return out.decode("utf-8", "backslashreplace")


def said(argv: Sequence[str], *, timeout_s: float) -> str:
    """Run `argv` and return what it says on both streams, whatever its status."""
    with process(argv, stderr=STDOUT) as child:
        out, _err = _communicate(child, b"", timeout_s, argv[0])
    return out.decode("ascii", "backslashreplace")


def _communicate(
    child: subprocess.Popen[bytes], data: bytes, timeout_s: Optional[float], tool: str
) -> tuple[bytes, bytes]:
    """Feed and read the child under the time limit and the limit on its output."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    collected: dict[Optional[IO[bytes]], bytearray] = {}
    pending = memoryview(data)  # slices of bytes would be copies: 15 s for 40 MiB
    with selectors.DefaultSelector() as selector:
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                collected[stream] = bytearray()
                selector.register(stream, selectors.EVENT_READ)
        if child.stdin is not None:
            os.set_blocking(child.stdin.fileno(), False)
            selector.register(child.stdin, selectors.EVENT_WRITE)
        while selector.get_map():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise Error(f"{tool} did not end within {timeout_s:g} s")
            for key, _events in selector.select(left):
                if key.fileobj is child.stdin:
                    try:
                        pending = pending[os.write(key.fd, pending[:65536]) :]
                    except BrokenPipeError:
                        pending = pending[:0]
                    if not pending:
                        selector.unregister(key.fileobj)
                        child.stdin.close()
                    continue
                block = os.read(key.fd, 1 << 18)
                buffer = collected[key.fileobj]  # type: ignore[index]
                buffer += block
                if not block:
                    selector.unregister(key.fileobj)
                elif len(buffer) > OUTPUT_LIMIT_BYTES:
                    raise Error(f"{tool} printed more than {log.size(OUTPUT_LIMIT_BYTES)}")
    try:
        child.wait(None if deadline is None else max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise Error(f"{tool} did not end within {timeout_s:g} s") from None
    return bytes(collected.get(child.stdout, b"")), bytes(collected.get(child.stderr, b""))


def _judge(tool: str, status: int, err: bytes, accept: Sequence[int], silent: bool) -> None:
    """Replay the tool's last words and raise unless it succeeded."""
    if status in accept and not (silent and err.strip()):
        return
    lines = [line for line in err.decode("ascii", "backslashreplace").splitlines() if line.strip()]
    for line in lines[-REPLAY_LINES:]:
        log.step(log.printable(f"{tool}: {line}", REPLAY_WIDTH))
    words = "\n".join(lines[-REPLAY_LINES:])
    if status in accept:
        raise Failed(f"{tool} complained about its input", words)
    if status > 128 and status - 128 in set(signal.Signals):
        status = 128 - status
    if status < 0:
        raise Failed(f"{tool} was ended by {signal.Signals(-status).name}", words)
    raise Failed(f"{tool} failed with status {status}", words)


@contextmanager
def _watchdog(child: subprocess.Popen[bytes], wall_s: Optional[float]) -> Iterator[None]:
    """End the child's process group after `wall_s` seconds, whatever it waits for."""
    if wall_s is None:
        yield
        return
    timer = threading.Timer(wall_s, os.killpg, (child.pid, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def reader(
    argv: Sequence[str],
    *,
    stdin: Union[int, IO[bytes], None] = None,
    environment: Optional[Mapping[str, str]] = None,
    sandbox: Optional[Sandbox] = None,
    descriptors: Sequence[int] = (),
    accept: Sequence[int] = (0,),
    silent: bool = False,
) -> Iterator[IO[bytes]]:
    """Start `argv` and hand out its standard output; on leaving, Error if the program failed.

    The block must read to the end of the output; the exit status of the program is then checked,
    so that half a stream is never taken for a whole one.
    """
    with open(os.memfd_create("stderr"), "w+b") as err:
        with process(
            argv,
            stdin=stdin,
            stderr=err,
            environment=environment,
            sandbox=sandbox,
            descriptors=descriptors,
        ) as child:
            assert child.stdout is not None
            wall_s = None if sandbox is None else sandbox.limits.wall_s
            with _watchdog(child, wall_s):
                yield child.stdout
                child.wait()
        err.seek(0)
        _judge(argv[0], child.returncode, err.read(1 << 16), accept, silent)
