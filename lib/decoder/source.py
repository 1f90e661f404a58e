"""The input: a file that may still grow, read at any place or as a stream, or served to qemu-img.

Nothing in the sandbox can open the input by a name: there is one descriptor of it.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, Optional, cast

from lib.compression import HEAD_BYTES, widen
from lib.errors import Error

COMPLETE = b"."  # what root writes to the pipe when all is there
_POLL_S = 0.01
_BLOCK_BYTES = 1 << 20


class Source:
    """A file of a known size; a read waits until the bytes are there."""

    def __init__(self, descriptor: int, size_bytes: int, growing: Optional[int] = None) -> None:
        self.descriptor, self.size_bytes = descriptor, size_bytes
        self._growing = growing  # a pipe: COMPLETE, or its end if the rest will never come
        self._lock = threading.Lock()

    def wait(self, end: Optional[int] = None) -> None:
        """Return when the file has `end` bytes, or all of them."""
        end = self.size_bytes if end is None else min(end, self.size_bytes)
        while os.fstat(self.descriptor).st_size < end or end == self.size_bytes:
            with self._lock:
                if self._growing is None:
                    break
                if select.select([self._growing], [], [], _POLL_S)[0]:
                    if os.read(self._growing, 1) != COMPLETE:
                        raise Error("the rest of the image did not come")
                    self._growing = None
        if end == self.size_bytes != os.fstat(self.descriptor).st_size:
            raise Error("the image is not as long as it was said to be")

    @property
    def is_whole(self) -> bool:
        """Whether nothing is waited for any more."""
        return self._growing is None

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes at `offset`, fewer only at the end."""
        if offset >= self.size_bytes:
            return b""  # an offset from a header may be more than the kernel takes
        self.wait(offset + length)
        return os.pread(self.descriptor, length, offset)

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """Hand out the file as a stream that a child can read as well."""
        if self.is_whole:
            yield open(self.descriptor, "rb", closefd=False)
            return
        reading, writing = os.pipe()
        widen(writing)
        threading.Thread(target=self._feed, args=(writing,), daemon=True).start()
        with open(reading, "rb", buffering=0) as stream:
            yield cast(BinaryIO, stream)

    def _feed(self, pipe: int) -> None:
        offset = 0
        with suppress(BrokenPipeError, Error), open(pipe, "wb", buffering=0) as output:
            while block := self.read(offset, min(HEAD_BYTES, self.size_bytes)):
                block = os.pread(self.descriptor, _BLOCK_BYTES, offset)
                offset += len(block)
                rest = memoryview(block)
                while rest:
                    rest = rest[output.write(rest) :]


# -- NBD: the protocol of https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md ----

_GREETING = struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3)
_ABORT, _GO = 2, 7  # the options that qemu-img cannot do without
_ACK, _REP_INFO, _UNSUPPORTED = 1, 3, (1 << 31) + 1
_FLAGS = 1 | 1 << 1  # there are flags; read-only
_EINVAL, _EIO = 22, 5


@contextmanager
def served(source: Source) -> Iterator[int]:
    """Hand out a connection, as a descriptor, to an NBD server of the source.

    A read waits for what is still to come, so that its client works at the pace of the download.
    """
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=_serve, args=(ours, source), daemon=True)
    thread.start()
    with ours, theirs:
        yield theirs.fileno()
        theirs.close()
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()


def _serve(connection: socket.socket, source: Source) -> None:
    with suppress(OSError, EOFError, Error):
        connection.sendall(_GREETING)
        _receive(connection, 4)
        # whole sectors: qemu's client waits for ever for the rest of a read at an odd end
        if _negotiated(connection, -(-source.size_bytes // 512) * 512):
            while True:
                _magic, _flags, kind, handle, offset, length = struct.unpack(
                    ">IHH8sQI", _receive(connection, 28)
                )
                if kind == 2:
                    return
                error, data = _answer(source, kind, offset, length)
                connection.sendall(struct.pack(">II8s", 0x67446698, error, handle))
                connection.sendall(data)


def _answer(source: Source, kind: int, offset: int, length: int) -> tuple[int, bytes]:
    if kind != 0 or length > 64 << 20:
        return _EINVAL, b""
    try:
        return 0, source.read(offset, length).ljust(length, b"\0")
    except (Error, OSError):
        return _EIO, b""


def _negotiated(connection: socket.socket, size_bytes: int) -> bool:
    while True:
        _magic, option, length = struct.unpack(">8sII", _receive(connection, 16))
        _receive(connection, length)
        if option == _GO:
            _reply(connection, option, _REP_INFO, struct.pack(">HQH", 0, size_bytes, _FLAGS))
        _reply(connection, option, _ACK if option in (_ABORT, _GO) else _UNSUPPORTED)
        if option in (_ABORT, _GO):
            return bool(option == _GO)


def _reply(connection: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    head = struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data))
    connection.sendall(head + data)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = connection.recv(length, socket.MSG_WAITALL)
    if len(data) < length:
        raise EOFError
    return data
