"""Start other programs: the only module that imports subprocess, and the sandbox they run in."""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Optional, Union

from lib import log
from lib.errors import Error

STDOUT = subprocess.STDOUT  # for callers, who do not import subprocess
Process = subprocess.Popen
DEFAULT_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# glibc's arenas, one a thread, would burst a sandbox's limit on the address space
ENVIRONMENT = {"LC_ALL": "C", "MALLOC_ARENA_MAX": "3"}
OUTPUT_LIMIT_BYTES = 64 << 20
REPLAY_LINES, REPLAY_WIDTH = 10, 200

# A user and group that own nothing and run nothing else: no distribution hands out this number
# (systemd's UIDS-GIDS keeps 65520 to 65533 unused, Debian's policy 9.2.2 reserves it), and it is
# not nobody, whom NFS servers and daemons use.
SANDBOX_ID = 65531

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


@dataclass(frozen=True)
class Limits:
    """What a sandboxed program may use; prlimit(1) sets all but the wall clock."""

    address_space_bytes: int = 2 << 30
    cpu_s: int = 60
    file_size_bytes: int = 64 << 20
    open_files: int = 64
    processes: int = 256  # with threads, of all our sandboxes on the node
    wall_s: float = 120.0


@dataclass(frozen=True)
class Sandbox:
    """What a sandboxed program sees beside a read-only /usr: names inside -> files of the node.

    A file is a path, or an open descriptor: then it is that very file that is bound, whatever its
    name stands for by now. No network, no capabilities, no /proc, nothing to write but `write`,
    and no right but that of a user who owns nothing: so what is read must be readable by all (in a
    folder that is not), and what is written belongs to that user while the program runs.
    """

    read: Mapping[str, Union[Path, int]] = field(default_factory=dict)
    write: Mapping[str, Union[Path, int]] = field(default_factory=dict)
    limits: Limits = Limits()


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


def _sandboxed(
    argv: Sequence[str], sandbox: Sandbox, stack: ExitStack
) -> tuple[list[str], list[int]]:
    """Return the argv that runs `argv` in the sandbox, and the descriptors that it needs.

    Root needs no user namespace, which some nodes forbid: its program changes to a user of the
    node before it starts. Nothing here is newer than bubblewrap 0.4.1.
    """
    limits, is_root = sandbox.limits, os.geteuid() == 0
    command = [
        _resolve("prlimit"),
        f"--as={limits.address_space_bytes}",
        f"--cpu={limits.cpu_s}",
        f"--fsize={limits.file_size_bytes}",
        f"--nofile={limits.open_files}",
        "--core=0",
        *([f"--nproc={limits.processes}"] if is_root else []),
        "--",
        _resolve("bwrap"),
        *("--unshare-ipc", "--unshare-net", "--unshare-pid", "--unshare-uts"),
        "--unshare-cgroup-try",
        *([] if is_root else ["--unshare-user", "--uid", "65534", "--gid", "65534"]),
        "--die-with-parent",
        "--new-session",
        *("--cap-drop", "ALL"),
        *(("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID") if is_root else ()),
        *("--ro-bind", "/usr", "/usr"),
    ]
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            command += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            command += ["--ro-bind", f"/{name}", f"/{name}"]
    command += ["--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp"]
    descriptors = []
    for option, files in (("--ro-bind", sandbox.read), ("--bind", sandbox.write)):
        for inside, outside in files.items():
            # the program inherits these: they name a file, and open it for nobody
            name = f"/proc/self/fd/{outside}" if isinstance(outside, int) else os.fspath(outside)
            bound = os.open(name, os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, bound)
            descriptors.append(bound)
            command += [option, f"/proc/self/fd/{bound}", inside]
            if is_root and option == "--bind":
                _lend(f"/proc/self/fd/{bound}", stack)
    if is_root:
        # not setpriv: the libcap-ng of Debian 11 and Ubuntu 22.04 wants a /proc
        user = (f"--setgid={SANDBOX_ID}", f"--setuid={SANDBOX_ID}")  # and no other groups
        command += [_resolve("unshare"), *user, "--"]
    return [*command, *argv], descriptors


def _lend(name: str, stack: ExitStack) -> None:
    """Give a file to the sandbox's user until the stack is left."""
    status = os.stat(name)
    os.chown(name, SANDBOX_ID, SANDBOX_ID)
    stack.callback(os.chown, name, status.st_uid, status.st_gid)


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
            command, bound = _sandboxed(command, sandbox, stack)
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
