"""A Ceph cluster of one node, of processes that end with it: monitor, manager and one OSD."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

CONFIG = """[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/$name.keyring
run dir = {folder}
admin socket =
log to stderr = true
mon data = {folder}/mon
mon data avail warn = 0
mon data avail crit = 0
mgr data = {folder}/mgr
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
"""


class Ceph:
    """The cluster's folder, which has what a node has in /etc/ceph, and its clients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "ceph.conf"
        self.osd_pid = 0

    def run(self, tool: str, *words: str) -> str:
        """Run a client of Ceph's as the administrator; return what it prints."""
        command = [tool, f"--conf={self.config}", *words]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=120
        ).stdout

    def ask(self, tool: str, *words: str) -> Any:
        return json.loads(self.run(tool, *words, "--format=json"))

    def add_key(self, name: str, osd: str) -> None:
        """Make a client's key and put it where its keyring is looked for."""
        key = self.run("ceph", "auth", "get-or-create", name, "mon", "profile rbd", "osd", osd)
        (self.folder / f"{name}.keyring").write_text(key)

    def add_pool(self, name: str) -> None:
        self.run("ceph", "osd", "pool", "create", name, "8")
        self.run("rbd", "pool", "init", name)

    @contextmanager
    def stopped_osd(self) -> Iterator[None]:
        """Stop the OSD as a dead disk or network would: what it was sent stays unanswered."""
        subprocess.run(["kill", "-STOP", str(self.osd_pid)], check=True)
        try:
            yield
        finally:
            subprocess.run(["kill", "-CONT", str(self.osd_pid)], check=True)
            self.run("rbd", "ls", "vms")  # answered again


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _start(stack: ExitStack, ceph: Ceph, daemon: str, name: str) -> int:
    log = stack.enter_context((ceph.folder / f"{daemon}.log").open("wb"))
    command = [daemon, f"--conf={ceph.config}", "-f", "-i", name]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    stack.callback(_end, child)
    return child.pid


def _end(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGCONT)
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _make_monitor(ceph: Ceph, fsid: str, port: int) -> None:
    folder = ceph.folder
    keys, admin = folder / "mon.a.keyring", folder / "client.admin.keyring"
    everything = [part for kind in ("mon", "osd", "mgr") for part in ("--cap", kind, "allow *")]
    make = ["ceph-authtool", "--create-keyring", "--gen-key", "-n"]
    subprocess.run([*make, "mon.", "--cap", "mon", "allow *", keys], check=True)
    subprocess.run([*make, "client.admin", *everything, admin], check=True)
    both = folder / "both"
    both.write_text(keys.read_text() + admin.read_text())
    addresses = ["--addv", "a", f"[v2:127.0.0.1:{port}]"]
    subprocess.run(
        ["monmaptool", "--create", "--fsid", fsid, *addresses, folder / "monmap"], check=True
    )
    first = [f"--monmap={folder}/monmap", f"--keyring={both}"]
    command = ["ceph-mon", f"--conf={ceph.config}", "--mkfs", "-i", "a", *first]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def _make_osd(ceph: Ceph) -> None:
    own = str(uuid.uuid4())
    ceph.run("ceph", "osd", "new", own)
    caps = ["mon", "allow profile osd", "mgr", "allow profile osd", "osd", "allow *"]
    key = ceph.run("ceph", "auth", "get-or-create", "osd.0", *caps)
    (ceph.folder / "osd.0.keyring").write_text(key)
    command = ["ceph-osd", f"--conf={ceph.config}", "-i", "0", "--mkfs", "--osd-uuid", own]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def started() -> Iterator[Ceph]:
    """Start the cluster, with a pool `vms` and keys that may and may not write to it."""
    folder = Path(tempfile.mkdtemp(prefix="ceph-", dir="/var/tmp"))
    fsid, port = str(uuid.uuid4()), _free_port()
    ceph = Ceph(folder)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        for name in ("mon", "osd", "mgr"):
            (folder / name).mkdir()
        ceph.config.write_text(CONFIG.format(fsid=fsid, port=port, folder=folder))
        _make_monitor(ceph, fsid, port)
        _start(stack, ceph, "ceph-mon", "a")
        _make_osd(ceph)
        ceph.osd_pid = _start(stack, ceph, "ceph-osd", "0")
        caps = ["mon", "allow profile mgr", "osd", "allow *", "mds", "allow *"]
        key = ceph.run("ceph", "auth", "get-or-create", "mgr.x", *caps)
        (folder / "mgr.x.keyring").write_text(key)
        _start(stack, ceph, "ceph-mgr", "x")
        deadline = time.monotonic() + 60
        while ceph.ask("ceph", "osd", "stat")["num_up_osds"] != 1:
            assert time.monotonic() < deadline, "the OSD did not start"
            time.sleep(0.2)
        ceph.add_pool("vms")
        ceph.add_key("client.ganeti", "profile rbd pool=vms")
        ceph.add_key("client.reader", "profile rbd-read-only pool=vms")
        ceph.add_key(
            "client.half", "allow rwx object_prefix rbd_header, allow rx object_prefix rbd_"
        )
        yield ceph
