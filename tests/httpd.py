"""A real HTTP server for the tests, which misbehaves on demand.

    with httpd.serve({"/image": httpd.content(b"...")}) as server:
        fetch.download(server.url("/image"), ...)
        assert server.seen[0].headers["Accept-Encoding"] == "identity"

A behaviour is a function of one Exchange; the makers below cover what servers do wrong. `routes`
may be changed while the server runs; an unknown path is answered with 404.
"""

from __future__ import annotations

import base64
import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Callable, Optional, Union

Behaviour = Callable[["Exchange"], None]
BLOCK = 1 << 16


@dataclass(frozen=True)
class Seen:
    """One request as it arrived; headers.get() ignores case."""

    method: str
    path: str  # with the query
    headers: Message


class Exchange(BaseHTTPRequestHandler):
    """One request and what is written back; the connection closes after it."""

    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 5  # a client that neither reads nor leaves must not hold up the end of a test

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.seen.append(Seen(self.command, self.path, self.headers))
        path = self.path.partition("?")[0]
        try:
            self.server.routes.get(path, reply(404, b"no such page"))(self)
        except OSError:
            pass  # the client went away

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `seen` has it."""

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        """Write the status line and the headers, none but these."""
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [f"{key}: {value}" for key, value in headers.items()]
        self.write("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1"))

    def write(self, data: Union[bytes, memoryview]) -> None:
        self.wfile.write(data)

    def pause(self, seconds: float) -> None:
        """Wait; OSError when the server is stopped meanwhile."""
        if self.server.stopping.wait(seconds):
            raise ConnectionAbortedError


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() waits for the threads
    request_queue_size = 64

    def __init__(self, routes: dict[str, Behaviour]) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.routes = routes
        self.seen: list[Seen] = []
        self.stopping = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a failed handshake is what the test wanted."""


class Server:
    """What a test sees of the running server."""

    def __init__(self, server: _Server, scheme: str) -> None:
        self.routes, self.seen = server.routes, server.seen
        self.port: int = server.server_address[1]
        self.scheme = scheme

    def url(self, path: str, *, host: str = "127.0.0.1", user: str = "") -> str:
        """Return the URL of `path`; user is "name:password"."""
        return f"{self.scheme}://{user + '@' if user else ''}{host}:{self.port}{path}"

    def count(self, path: str) -> int:
        """Return how often `path` was asked for."""
        return sum(seen.path.partition("?")[0] == path for seen in self.seen)


@contextmanager
def serve(
    routes: Mapping[str, Behaviour], certificate: Optional[tuple[Path, Path]] = None
) -> Iterator[Server]:
    """Serve on a free port of 127.0.0.1; over TLS with (certificate, key)."""
    server = _Server(dict(routes))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Server(server, "http" if certificate is None else "https")
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


def content(
    data: bytes,
    *,
    etag: Optional[str] = '"v1"',
    last_modified: Optional[str] = None,
    framing: str = "length",
    cut: Optional[int] = None,
    ranges: bool = True,
    headers: Optional[Mapping[str, str]] = None,
) -> Behaviour:
    """Serve `data` as a good server does: 304, 206 with If-Range, 416.

    framing: length, chunked, or none (the body ends with the connection). cut: stop after so many
    bytes of this response's body. headers: added, and they win.
    """

    def behave(exchange: Exchange) -> None:
        asked = exchange.headers
        answer = {"ETag": etag or "", "Last-Modified": last_modified or ""}
        answer = {key: value for key, value in answer.items() if value}
        if (etag and asked["If-None-Match"] == etag) or (
            last_modified and asked["If-Modified-Since"] == last_modified
        ):
            return exchange.head(304, answer)
        status, body = 200, data
        span = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", asked["Range"] or "")
        if span and ranges and asked["If-Range"] in (None, etag):
            start, end = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            if start >= len(data):
                return exchange.head(416, {"Content-Range": f"bytes */{len(data)}"})
            status, body = 206, data[start : end + 1]
            answer["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        if framing == "length":
            answer["Content-Length"] = str(len(body))
        elif framing == "chunked":
            answer["Transfer-Encoding"] = "chunked"
        exchange.head(status, {**answer, **(headers or {})})
        if exchange.command == "HEAD":
            return None
        sent = memoryview(body)[:cut]
        if framing != "chunked":
            return exchange.write(sent)
        for start in range(0, len(sent), BLOCK):
            exchange.write(_chunk(sent[start : start + BLOCK]))
        return exchange.write(b"0\r\n\r\n") if cut is None else None

    return behave


def _chunk(data: Union[bytes, memoryview]) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), bytes(data))


def reply(status: int, body: bytes = b"", headers: Optional[Mapping[str, str]] = None) -> Behaviour:
    """Answer with this status, body and, beside Content-Length, these headers."""

    def behave(exchange: Exchange) -> None:
        exchange.head(status, {"Content-Length": str(len(body)), **(headers or {})})
        exchange.write(body)

    return behave


def redirect(location: str, status: int = 302) -> Behaviour:
    """Send the client elsewhere."""
    return reply(status, b"over there", {"Location": location})


def raw(data: bytes) -> Behaviour:
    """Write exactly these bytes, status line and all, and close."""
    return lambda exchange: exchange.write(data)


def sequence(*behaviours: Behaviour) -> Behaviour:
    """Answer the first request with the first behaviour, and so on; the last one stays."""
    upcoming = chain(behaviours, repeat(behaviours[-1]))
    lock = threading.Lock()

    def behave(exchange: Exchange) -> None:
        with lock:
            behaviour = next(upcoming)
        behaviour(exchange)

    return behave


def protected(user: str, password: str, behaviour: Behaviour) -> Behaviour:
    """Answer 401 unless the request carries these credentials."""
    expected = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    def behave(exchange: Exchange) -> None:
        if exchange.headers["Authorization"] == expected:
            behaviour(exchange)
        else:
            reply(401, b"", {"WWW-Authenticate": 'Basic realm="test"'})(exchange)

    return behave


def endless(framing: str = "none", status: int = 200, **headers: str) -> Behaviour:
    """Send zeroes until the client has had enough."""

    def behave(exchange: Exchange) -> None:
        chunked = {"Transfer-Encoding": "chunked"} if framing == "chunked" else {}
        exchange.head(status, {**chunked, **headers})
        block = _chunk(bytes(BLOCK)) if chunked else bytes(BLOCK)
        while not exchange.server.stopping.is_set():
            exchange.write(block)

    return behave


def trickle(data: bytes, pause_s: float, *, from_head: bool = False) -> Behaviour:
    """Send a byte at a time; from_head: the header too."""

    def behave(exchange: Exchange) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        if not from_head:
            exchange.write(head)
        for byte in head + data if from_head else data:
            exchange.write(bytes([byte]))
            exchange.pause(pause_s)

    return behave


def hang(exchange: Exchange) -> None:
    """Take the request and say nothing."""
    exchange.pause(3600)
