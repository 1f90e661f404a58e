"""A disk that only has a URI (rbd:, gluster:): qemu-nbd serves it, and this is the client.

Format: doc/proto.md of https://github.com/NetworkBlockDevice/nbd, fixed newstyle handshake and
simple replies. qemu-img alone would do for whole images, but it neither writes to a pipe nor
reads from one, and its dd counts `count=` from the image's start when `skip=` is given.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Optional

from lib import log, run, workspace
from lib.errors import Error

CONNECT_TIMEOUT_S = 60.0  # a Ceph cluster may take its time
ANSWER_TIMEOUT_S = 180.0  # for one request: a Ceph cluster that heals may take its time
END_TIMEOUT_S = 3.0  # for a server of which nothing is wanted any more
ZERO_LIMIT_BYTES = 64 << 20  # in one request
REQUEST, REQUEST_MAGIC, REPLY_MAGIC = ">IHHQQI", 0x25609513, 0x67446698
READ, WRITE, DISCONNECT, FLUSH, WRITE_ZEROES = 0, 1, 2, 3, 6
UNDER_WAY = 16  # as many as qemu-nbd works on at once
HINTS = {
    "Unknown protocol": "install qemu's driver for it: qemu-block-extra (EL: qemu-kvm-block-*)",
    "not permitted": "let the node's key write to it (Ceph: osd 'profile rbd pool=...')",
    "No space left": "make room in the storage, then run this again",
}


class Connection:
    """An export.

    Several writes may be under way at once, but never two that overlap: either could come last. The
    error of one is raised by a later call, by sync() at the latest.
    """

    is_device = is_empty = False  # as a disk that has a path may be

    def __init__(self, server: socket.socket, uri: str, ended: Callable[[], str]) -> None:
        self.server, self.uri = server, uri
        self.ended = ended  # ends the server and returns what it said last
        self.under_way = self.end = 0  # how many writes, and where the last of them ends
        self.failure: Optional[BaseException] = None  # what ended the server
        with self._exchange():
            magic, version, _flags = struct.unpack(">8s8sH", self._receive(18))
            if (magic, version) != (b"NBDMAGIC", b"IHAVEOPT"):
                raise Error(f"{uri}: qemu-nbd does not speak NBD's newstyle handshake")
            # client flags: fixed newstyle, no padding; option 1 names the export (the empty name)
            server.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
            self.size_bytes: int = struct.unpack(">QH", self._receive(10))[0]

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on."""
        self._request(READ, offset, length)
        with self._exchange():
            return self._receive(length)

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`."""
        self._begin(WRITE, offset, len(data), data)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes; the storage may drop what it held."""
        for start in range(offset, offset + length, ZERO_LIMIT_BYTES):
            self._begin(WRITE_ZEROES, start, min(ZERO_LIMIT_BYTES, offset + length - start))

    def data(self, first: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what is no hole from `first` on: all of it."""
        yield first, self.size_bytes

    def sync(self) -> None:
        """Return when everything written is on stable storage."""
        self._request(FLUSH)

    def close(self) -> None:
        """Tell the server that this was all, so that it ends."""
        with self._exchange():
            self.server.sendall(struct.pack(REQUEST, REQUEST_MAGIC, 0, DISCONNECT, 0, 0, 0))
            self.server.shutdown(socket.SHUT_WR)

    def _begin(self, kind: int, offset: int, length: int, data: bytes = b"") -> None:
        """Send a request as soon as there may be one more under way."""
        self._await(0 if offset < self.end else UNDER_WAY - 1)
        with self._exchange():
            self.server.sendall(struct.pack(REQUEST, REQUEST_MAGIC, 0, kind, 0, offset, length))
            self.server.sendall(data)
        self.under_way += 1
        self.end = offset + length

    def _request(self, kind: int, offset: int = 0, length: int = 0) -> None:
        """Send a request when all before it are answered, and take its answer."""
        self._await(0)
        self._begin(kind, offset, length)
        self._await(0)

    def _await(self, most: int) -> None:
        """Take answers until no more than `most` requests are under way; of an error, all."""
        failed = 0
        while self.under_way > most:
            with self._exchange():
                magic, status, _cookie = struct.unpack(">IIQ", self._receive(16))
                if magic != REPLY_MAGIC:
                    raise Error(f"{self.uri}: qemu-nbd sent what is no reply")
            self.under_way -= 1
            if status:
                failed, most = failed or status, 0
        if failed:
            raise _failed(self.uri, os.strerror(failed))

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """End the server if a request is not answered whole, a signal included.

        What is sent next would be taken for the rest of it, or its answer for that of the next.
        """
        if self.failure is not None:
            raise self.failure
        try:
            yield
        except BaseException as error:
            self.failure = error
            self.server.close()
            words = self.ended()
            if not isinstance(error, OSError):
                raise
            if isinstance(error, socket.timeout):  # TODO: TimeoutError, with Python 3.10
                within = f"within {ANSWER_TIMEOUT_S:g} s"
                self.failure = _silent(f"{self.uri}: the storage did not answer {within}")
            else:
                self.failure = _failed(self.uri, words)
            raise self.failure from error

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            count = self.server.recv_into(view)
            if count == 0:
                raise ConnectionResetError
            view = view[count:]
        return bytes(data)


def _silent(message: str) -> Error:
    # Ceph lets writes to a full pool wait, and a node without a ceph.conf look for its monitors
    hint = "see that the storage serves this node and is not full (ceph health detail)"
    return Error(message, f"{hint}, then run this again")


def _failed(uri: str, words: str) -> Error:
    """Return the error for what qemu-nbd or the kernel said, with the way out if it is known."""
    hint = next((hint for part, hint in HINTS.items() if part in words), None)
    return Error(f"{uri}: {words or 'qemu-nbd ended'}", hint)


@contextmanager
def connect(uri: str, *, writable: bool) -> Iterator[Connection]:
    """Open the raw disk that qemu finds under `uri`; on leaving, what was written is flushed."""
    with ExitStack() as stack:
        path = os.fspath(stack.enter_context(workspace.folder()) / "nbd")
        command = ["qemu-nbd", "--format=raw", "--cache=writeback", "--discard=unmap"]
        command += [f"--socket={path}", *([] if writable else ["--read-only"]), "--", uri]
        # a file, for nobody reads meanwhile: librados fills a pipe with its complaints
        said = stack.enter_context(open(os.memfd_create("stderr"), "w+b"))
        child = stack.enter_context(run.process(command, stdout=said, stderr=said))
        # killed at once, it would leave a lock in the storage
        stack.callback(run.end, child, END_TIMEOUT_S)
        server = stack.enter_context(socket.socket(socket.AF_UNIX))

        def ended() -> str:
            run.end(child, END_TIMEOUT_S)
            said.seek(0)
            return _last_words(said.read().decode("ascii", "backslashreplace"), uri)

        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while server.connect_ex(path) != 0:  # it does not listen yet
            if child.poll() is not None:
                raise _failed(uri, ended())
            if time.monotonic() > deadline:
                raise _silent(f"{uri}: the storage did not open it within {CONNECT_TIMEOUT_S:g} s")
            time.sleep(0.01)
        server.settimeout(ANSWER_TIMEOUT_S)
        connection = Connection(server, uri, ended)
        yield connection
        if writable:
            connection.sync()
        connection.close()
        run.end(child, ANSWER_TIMEOUT_S)


def _last_words(text: str, uri: str) -> str:
    """Return the line that says why qemu-nbd ended: its own last one, else the last of all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("qemu-nbd: ")] or lines or [""]
    return log.printable(own[-1].replace(f"Failed to blk_new_open '{uri}': ", ""), 200)
