"""A disk that only has a URI (rbd:, gluster:): qemu-nbd serves it, and this is the client.

Format: doc/proto.md of https://github.com/NetworkBlockDevice/nbd, fixed newstyle handshake and
simple replies. qemu-img alone would do for whole images, but it neither writes to a pipe nor
reads from one, and its dd counts `count=` from the image's start when `skip=` is given.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lib import log, run
from lib.errors import Error

CONNECT_TIMEOUT_S = 60.0  # a Ceph cluster may take its time
ANSWER_TIMEOUT_S = 180.0  # for one request: a Ceph cluster that heals may take its time
ZERO_LIMIT_BYTES = 1 << 30
REQUEST, REQUEST_MAGIC, REPLY_MAGIC = ">IHHQQI", 0x25609513, 0x67446698
READ, WRITE, DISCONNECT, FLUSH, WRITE_ZEROES = 0, 1, 2, 3, 6


class Connection:
    """An export, by requests that end before the next one starts."""

    def __init__(self, server: socket.socket, uri: str) -> None:
        self.server = server
        self.uri = uri
        magic, version, _flags = struct.unpack(">8s8sH", self._receive(18))
        if (magic, version) != (b"NBDMAGIC", b"IHAVEOPT"):
            raise Error(f"{uri}: qemu-nbd does not speak NBD's newstyle handshake")
        # client flags: fixed newstyle, no padding; option 1 names the export (the empty name)
        server.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
        self.size_bytes: int = struct.unpack(">QH", self._receive(10))[0]

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on."""
        return self._request(READ, offset, length, answer_bytes=length)

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`."""
        self._request(WRITE, offset, len(data), data)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes; the storage may drop what it held."""
        for start in range(offset, offset + length, ZERO_LIMIT_BYTES):
            self._request(WRITE_ZEROES, start, min(ZERO_LIMIT_BYTES, offset + length - start))

    def extents(self) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, end, is data): all of it is."""
        yield 0, self.size_bytes, True

    def sync(self) -> None:
        """Return when everything written is on stable storage."""
        self._request(FLUSH)

    def close(self) -> None:
        """Tell the server that this was all, so that it ends."""
        self.server.sendall(struct.pack(REQUEST, REQUEST_MAGIC, 0, DISCONNECT, 0, 0, 0))
        self.server.shutdown(socket.SHUT_WR)

    def _request(
        self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", answer_bytes: int = 0
    ) -> bytes:
        try:
            self.server.sendall(struct.pack(REQUEST, REQUEST_MAGIC, 0, kind, 0, offset, length))
            self.server.sendall(data)
        except socket.timeout as error:  # TODO: TimeoutError, with Python 3.10
            raise _Stalled from error
        except OSError as error:
            raise _Gone from error
        magic, status, _cookie = struct.unpack(">IIQ", self._receive(16))
        if magic != REPLY_MAGIC:
            raise Error(f"{self.uri}: qemu-nbd sent what is no reply")
        if status:
            raise Error(f"{self.uri}: {os.strerror(status)}")
        return self._receive(answer_bytes)

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            try:
                count = self.server.recv_into(view)
            except socket.timeout as error:
                raise _Stalled from error
            except OSError as error:
                raise _Gone from error
            if count == 0:
                raise _Gone
            view = view[count:]
        return bytes(data)


class _Stalled(Exception):
    """The storage behind the server does not answer."""


class _Gone(Exception):
    """The server closed the connection; its standard error says why."""


@contextmanager
def connect(uri: str, *, writable: bool) -> Iterator[Connection]:
    """Open the raw disk that qemu finds under `uri`; on leaving, what was written is flushed."""
    with tempfile.TemporaryDirectory(prefix="cloudimage-") as directory:
        path = os.path.join(directory, "nbd")
        command = ["qemu-nbd", "--format=raw", "--cache=writeback", "--discard=unmap"]
        command += [f"--socket={path}", *([] if writable else ["--read-only"]), "--", uri]
        with run.process(command) as child:
            try:
                with socket.socket(socket.AF_UNIX) as server:
                    _await(server, path, uri, lambda: child.poll() is not None)
                    server.settimeout(ANSWER_TIMEOUT_S)
                    connection = Connection(server, uri)
                    yield connection
                    if writable:
                        connection.sync()
                    connection.close()
            except _Stalled as error:
                raise Error(
                    f"{uri}: the storage did not answer within {ANSWER_TIMEOUT_S:g} s",
                    "look at the storage (ceph health), then run this again",
                ) from error
            except _Gone as error:
                assert child.stderr is not None  # run.process makes a pipe of it
                words = child.stderr.read(4096).decode("ascii", "backslashreplace").strip()
                raise Error(
                    f"{uri}: {log.printable(words, 200) or 'qemu-nbd ended'}",
                    "qemu's driver for it may be missing: qemu-block-extra (EL: qemu-kvm-block-*)",
                ) from error
            child.wait()


def _await(server: socket.socket, path: str, uri: str, ended: Callable[[], bool]) -> None:
    """Connect as soon as qemu-nbd listens."""
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while server.connect_ex(path) != 0:
        if ended():
            raise _Gone
        if time.monotonic() > deadline:
            raise Error(f"{uri}: qemu-nbd did not open it within {CONNECT_TIMEOUT_S:g} s")
        time.sleep(0.01)
