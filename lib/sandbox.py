"""The sandbox: what a program in it sees, may do and may use, and how it is started."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Union

from lib import log
from lib.errors import Error
from lib.workspace import PREFIX, STALE_S

GROUPS = Path("/sys/fs/cgroup")
JOIN = ("/bin/sh", "-c", 'echo 0 > "$0" && exec "$@"')  # with the group's file
MAX_TASKS = 512  # qemu-img has a thread for each request that it has open
# A user and group that own nothing and run nothing else: no distribution hands out this number
# (systemd's UIDS-GIDS keeps 65520 to 65533 unused, Debian's policy 9.2.2 reserves it), and it is
# not nobody, whom NFS servers and daemons use.
SANDBOX_ID = 65531


@dataclass(frozen=True)
class Limits:
    """What a sandboxed program may use; prlimit(1) sets all but the wall clock and `memory_bytes`.

    That is what all its processes take together, their part of the page cache too; it holds where
    the node has cgroups v2.
    """

    memory_bytes: int = 2 << 30
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


def enclosed(
    argv: Sequence[str], sandbox: Sandbox, stack: ExitStack, resolve: Callable[[str], str]
) -> tuple[list[str], list[int]]:
    """Return the argv that runs `argv` in the sandbox, and the descriptors that it needs.

    resolve finds the path of a tool. What was made for the run is gone when the stack is left.

    Root needs no user namespace, which some nodes forbid: its program changes to a user of the
    node before it starts. Nothing here is newer than bubblewrap 0.4.1.
    """
    limits, is_root = sandbox.limits, os.geteuid() == 0
    group = stack.enter_context(_group(limits)) if is_root else None
    command = [
        *((*JOIN, f"{group}/cgroup.procs") if group else ()),
        resolve("prlimit"),
        f"--as={limits.address_space_bytes}",
        f"--cpu={limits.cpu_s}",
        f"--fsize={limits.file_size_bytes}",
        f"--nofile={limits.open_files}",
        "--core=0",
        *([f"--nproc={limits.processes}"] if is_root else []),
        "--",
        resolve("bwrap"),
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
        command += [resolve("unshare"), *user, "--"]
    return [*command, *argv], descriptors


@contextmanager
def _group(limits: Limits) -> Iterator[Optional[Path]]:
    """Make a cgroup that bounds memory and processes together; None where the node has none.

    At the top, as container managers do that do without systemd, which leaves alone what it has
    not made: no instance should fail because PID 1 does not answer systemd-run. The files are
    those of https://docs.kernel.org/admin-guide/cgroup-v2.html. Error if the memory was not enough.
    """
    group = _made_group(limits)
    if group is None:
        yield None
        return
    try:
        yield group
    finally:
        events = (group / "memory.events").read_text()
        with suppress(OSError):  # Linux 5.14
            (group / "cgroup.kill").write_text("1")
        _remove_group(group)
        if re.search(r"^oom_kill [1-9]", events, re.MULTILINE):
            raise Error(
                f"in the sandbox more memory was needed than {log.size(limits.memory_bytes)}",
                "see whether the image is what it should be",
            )


def has_groups() -> bool:
    """Return whether the node has cgroups v2 with what bounds a sandbox."""
    try:
        given = (GROUPS / "cgroup.subtree_control").read_text()
    except OSError:
        return False
    return {"memory", "pids"} <= set(given.split())


def _made_group(limits: Limits) -> Optional[Path]:
    if not has_groups():
        return None
    with suppress(OSError):
        for each in GROUPS.glob(f"{PREFIX}*"):
            with suppress(OSError):  # in use
                if time.time() - each.stat().st_mtime > STALE_S:
                    each.rmdir()  # a killed run left it
        group = Path(tempfile.mkdtemp(prefix=PREFIX, dir=GROUPS))
        bounds = {"memory.max": limits.memory_bytes, "memory.oom.group": 1, "pids.max": MAX_TASKS}
        try:
            for name, number in bounds.items():
                (group / name).write_text(str(number))
            with suppress(FileNotFoundError):  # a kernel that does not count it
                (group / "memory.swap.max").write_text("0")
        except OSError:
            group.rmdir()
            raise
        return group
    return None  # not for us to make: in a container say


def _remove_group(group: Path) -> None:
    for _attempt in range(100):  # what was killed may take a moment
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.01)


def _lend(name: str, stack: ExitStack) -> None:
    """Give a file to the sandbox's user until the stack is left."""
    status = os.stat(name)
    os.chown(name, SANDBOX_ID, SANDBOX_ID)
    stack.callback(os.chown, name, status.st_uid, status.st_gid)
