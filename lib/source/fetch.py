"""A URL or a path of the node -> bytes: retries, resuming, length, size and digests."""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Optional

from lib import log
from lib.errors import Error
from lib.source import web
from lib.source.web import Options, Unavailable

__all__ = ["Options", "Response", "Unavailable", "download", "prepare", "read", "size"]

# What some servers call every stored .gz, whoever asks. The bytes are kept as they come, as curl
# and wget do: the digest is over them, and the decoder sees what they are.
STORED_GZIP = ("gzip", "x-gzip")
# An attempt that is slower than this on the average of ten minutes is as good as none.
PATIENCE_S, LEAST_RATE = 600.0, 16 << 10
ONE_BYTE = {"Range": "bytes=0-0"}


@dataclass(frozen=True)
class Response:
    """What a download came to: bytes, digests (lower-case hex), validators for the next time."""

    size_bytes: int
    digests: Mapping[str, str]
    etag: Optional[str]
    last_modified: Optional[str]


def download(
    url: str,
    output: BinaryIO,
    options: Options,
    *,
    algorithms: Sequence[str] = ("sha256",),
    etag: Optional[str] = None,
    last_modified: Optional[str] = None,
    need_framing: bool = False,
    begun: Callable[[Optional[int]], None] = lambda total_bytes: None,
) -> Optional[Response]:
    """Write the body at `url` to `output`, a fresh file; None if it is still what etag stands for.

    begun is told the length, if it is known, when a body begins; at its every restart from byte 0.
    need_framing refuses a body whose end only the closed connection would tell. Unavailable after
    all retries; any other Error is a definite no. Main thread only (http.py uses SIGALRM).
    """
    conditions = {"If-None-Match": etag, "If-Modified-Since": last_modified}
    headers = {key: value for key, value in conditions.items() if value}
    progress = log.Progress(f"fetch: {log.redact(url)}", None)
    transfer = _Transfer(url, output, options, algorithms, headers, need_framing, progress, begun)
    try:
        modified = transfer.run()
    finally:
        seconds = progress.end()
    if not modified:
        return None
    log.step(f"fetch: {log.size(transfer.received)} in {seconds:.0f} s")
    digests = {name: digest.hexdigest() for name, digest in transfer.digests.items()}
    return Response(transfer.received, digests, transfer.etag, transfer.last_modified)


def read(url: str, options: Options, limit_bytes: int) -> bytes:
    """Return the body of a small document; Error if it is larger than limit_bytes."""
    output = io.BytesIO()
    _Transfer(url, output, replace(options, max_size_bytes=limit_bytes)).run()
    return output.getvalue()


def prepare(options: Options) -> None:
    """Import requests now: it takes longer than most answers, and others may wait for a lock."""
    with web.session(options):
        pass


def size(url: str, options: Options) -> Optional[int]:
    """Return the length of the body in bytes, None if nothing tells it.

    Error if create would get a definite no; silence and trouble pass. Asks for one byte with GET,
    because many servers refuse HEAD or answer it otherwise.
    """
    quick = replace(
        options,
        connect_timeout_s=min(3.0, options.connect_timeout_s),
        read_timeout_s=min(5.0, options.read_timeout_s),
    )
    try:
        with web.session(quick) as session, session.get(url, ONE_BYTE) as answer:
            if answer.status in web.REFUSED:
                raise answer.failure()
            part = re.fullmatch(r"bytes 0-0/([0-9]{1,18})", answer.headers.get("Content-Range", ""))
            if answer.status == 206 and part:
                return int(part[1])
            return _length(answer) if answer.status == 200 else None
    except web.Broken:
        return None


@dataclass
class _Transfer:
    """One download: what is asked for, and what has arrived over all attempts."""

    url: str
    output: BinaryIO
    options: Options
    algorithms: Sequence[str] = ()
    conditions: Mapping[str, str] = field(default_factory=dict)
    need_framing: bool = False
    progress: Optional[log.Progress] = None  # of an image; a document has none
    begun: Callable[[Optional[int]], None] = lambda total_bytes: None
    received: int = 0
    total: Optional[int] = None
    etag: Optional[str] = None
    last_modified: Optional[str] = None
    digests: dict[str, Any] = field(default_factory=dict)
    encoding: str = "identity"

    def run(self) -> bool:
        """Try until the body is whole; False if it is not modified."""
        attempt = 0
        with web.session(self.options) as session:
            while True:
                try:
                    return self._attempt(session)
                except web.Broken as broken:
                    attempt += 1
                    pause_s = self._pause(attempt, broken)
                time.sleep(pause_s)

    def _pause(self, attempt: int, broken: web.Broken) -> float:
        """Return the seconds to wait after this attempt; Unavailable if it was the last."""
        options, shown = self.options, log.redact(self.url)
        if attempt > options.retries:
            message = f"{shown}: {broken} (attempt {attempt}, the last)"
            raise Unavailable(message, web.UNAVAILABLE_HINT) from broken
        pause_s = max(options.pause_s * (1 << (attempt - 1)), broken.after_s)
        pause_s = min(pause_s, options.max_pause_s)
        if self.progress:
            self.progress.end()
        retry = f"retry {attempt} of {options.retries} in {pause_s:g} s"
        log.step(f"fetch: {shown}: {broken}; {retry}")
        return pause_s

    def _attempt(self, session: web.Session) -> bool:
        resume = self._resume_headers()
        started = time.monotonic()
        with session.get(self.url, resume or self.conditions) as answer:
            if answer.status == 304 and self.conditions and not resume:
                return False
            if answer.status == 206 and resume:
                self._continue(answer)
            elif answer.status == 416 and resume:
                self._restart()
                raise web.Broken("the rest is no longer there, starting over")
            elif answer.status == 200:
                self._begin(answer)
            else:
                raise answer.failure()
            before = self.received  # nothing where the server began anew
            while block := answer.block():
                self._add(block, answer.shown)
                took_s = time.monotonic() - started
                if took_s > PATIENCE_S and self.received - before < LEAST_RATE * took_s:
                    slow = f"slower than {log.size(LEAST_RATE)} a second for {took_s:.0f} s"
                    raise web.Broken(slow)
        if self.total is not None and self.received != self.total:
            raise web.Broken(f"the connection ended after {self.received} of {self.total} bytes")
        if not self.received:
            raise Error(f"{answer.shown}: the body is empty", "check the URL")
        self.output.flush()
        return True

    def _resume_headers(self) -> dict[str, str]:
        """Return what asks for the rest, if a strong ETag can tell the file (RFC 9110 13.1.5)."""
        if not self.received or self.total is None or not (self.etag or "").startswith('"'):
            return {}
        return {"Range": f"bytes={self.received}-", "If-Range": self.etag or ""}

    def _restart(self) -> None:
        self.output.seek(0)
        self.output.truncate()
        self.received, self.total, self.etag = 0, None, None
        self.digests = {name: hashlib.new(name) for name in self.algorithms}

    def _begin(self, answer: web.Answer) -> None:
        """Take the header of a whole body, and refuse one that cannot be trusted."""
        self._restart()
        headers, length = answer.headers, _length(answer)
        encoding = _encoding(answer)
        if encoding != "identity" and not (self.progress and encoding in STORED_GZIP):
            raise Error(f"{answer.shown}: came with Content-Encoding {encoding}, unasked")
        if self.need_framing and length is None and "Transfer-Encoding" not in headers:
            raise Error(
                f"{answer.shown}: came with neither a length nor chunks; a cut would go unnoticed",
                "set checksum",
            )
        self._fits(length or 0, answer.shown)
        self.encoding = encoding
        self.total, self.etag = length, headers.get("ETag")
        self.last_modified = headers.get("Last-Modified")
        if self.progress:
            self.progress.total_bytes = length
        self.begun(length)

    def _continue(self, answer: web.Answer) -> None:
        """Check that a 206 is the rest of what has arrived, of the same file."""
        assert self.total is not None  # _resume_headers() looked
        there = f"bytes {self.received}-{self.total - 1}/{self.total}"
        if (
            answer.headers.get("Content-Range") != there
            or answer.headers.get("ETag", self.etag) != self.etag
            or _encoding(answer) != self.encoding
            or _length(answer) not in (None, self.total - self.received)
        ):
            self._restart()
            raise web.Broken("the server did not go on where the download stopped, starting over")

    def _fits(self, size_bytes: int, shown: str) -> None:
        limit = self.options.max_size_bytes
        if size_bytes > limit:
            words = f"{shown}: is larger than the limit of {log.size(limit)}"
            raise Error(words, self.options.max_size_hint)

    def _add(self, block: bytes, shown: str) -> None:
        self._fits(self.received + len(block), shown)
        self.output.write(block)
        self.received += len(block)
        for digest in self.digests.values():
            digest.update(block)
        if self.progress:
            self.progress.update(self.received)


def _encoding(answer: web.Answer) -> str:
    return answer.headers.get("Content-Encoding", "identity").lower()


def _length(answer: web.Answer) -> Optional[int]:
    """Return Content-Length or None; Error if the header leaves it open (RFC 9112 6.3)."""
    lengths = {each.strip() for each in answer.headers.get("Content-Length", "").split(",")} - {""}
    coding = answer.headers.get("Transfer-Encoding", "")
    if coding and (lengths or coding.lower() != "chunked"):
        and_length = " and a Content-Length" if lengths else ""
        raise Error(f"{answer.shown}: came with Transfer-Encoding {coding}{and_length}")
    if len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,18}", each) for each in lengths):
        raise Error(f"{answer.shown}: came with Content-Length {', '.join(sorted(lengths))}")
    return int(lengths.pop()) if lengths else None
