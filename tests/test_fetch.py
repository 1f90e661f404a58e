"""fetch and http, against real servers that misbehave.

The floor is EL 9's requests 2.25.1 with urllib3 1.26.5 on Python 3.9; what is newest counts too:
python3 -m venv V && V/bin/pip install pytest requests && V/bin/python -m pytest tests/test_fetch.py
"""

from __future__ import annotations

import email.utils
import gc
import hashlib
import io
import os
import pwd
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest

from lib.errors import Error
from lib.source import fetch
from lib.source.web import BLOCK_BYTES
from tests import httpd
from tests.conftest import ROOT, require

DATA = bytes(range(251)) * 3000
OTHER = DATA[::-1]
DEAD = "http://127.0.0.1:1"
QUICK = fetch.Options(
    connect_timeout_s=0.3, read_timeout_s=0.3, retries=2, pause_s=0.01, max_pause_s=0.05
)


def get(url: str, options: fetch.Options = QUICK, **more: Any) -> bytes:
    """Download and return the body; what download() says of it must be true."""
    with io.BytesIO() as output:
        response = fetch.download(url, output, options, algorithms=("sha256", "sha512"), **more)
        assert response is not None
        body = output.getvalue()
    assert response.size_bytes == len(body)
    assert response.digests == {
        name: hashlib.new(name, body).hexdigest() for name in ("sha256", "sha512")
    }
    return body


def refusal(url: str, options: fetch.Options = QUICK, **more: Any) -> Error:
    with pytest.raises(Error) as caught:
        get(url, options, **more)
    return caught.value


def raw(*headers: str, body: bytes = b"hello") -> httpd.Behaviour:
    return httpd.raw("\r\n".join(["HTTP/1.1 200 OK", *headers, "", ""]).encode() + body)


# --- good answers


@pytest.mark.parametrize("framing", ["length", "chunked", "none"])
@pytest.mark.parametrize("size", [1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_whole_body(framing: str, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    behaviour = httpd.content(DATA[:size], framing=framing, last_modified="yesterday")
    with httpd.serve({"/image": behaviour}) as server, io.BytesIO() as output:
        response = fetch.download(server.url("/image?a=1#x"), output, QUICK)
        assert output.getvalue() == DATA[:size]
        assert server.seen[0].path == "/image?a=1"
        assert server.seen[0].headers["Accept-Encoding"] == "identity"
        assert server.seen[0].headers["User-Agent"].startswith("instance-cloudimage/")
    sha256 = hashlib.sha256(DATA[:size]).hexdigest()
    assert response == fetch.Response(size, {"sha256": sha256}, '"v1"', "yesterday")
    assert capsys.readouterr().err.startswith("fetch: ")
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"etag": '"v1"'}, None),
        ({"last_modified": "then"}, None),
        ({"etag": '"v0"'}, DATA),
        ({"etag": '"v0"', "last_modified": "before"}, DATA),
    ],
    ids=["same-etag", "same-time", "other-etag", "both-other"],
)
def test_only_if_modified(given: dict[str, str], expected: Optional[bytes]) -> None:
    with (
        httpd.serve({"/image": httpd.content(DATA, last_modified="then")}) as server,
        io.BytesIO() as output,
    ):
        response = fetch.download(server.url("/image"), output, QUICK, **given)  # type: ignore[arg-type]
        assert (output.getvalue() or None) == expected
        assert (response is None) == (expected is None)


def test_read_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with httpd.serve({"/list": httpd.content(b"abc")}) as server:
        assert fetch.read(server.url("/list"), QUICK, 3) == b"abc"
        with pytest.raises(Error, match=r"/list: is larger than the limit of 2 bytes"):
            fetch.read(server.url("/list"), QUICK, 2)
    assert capsys.readouterr().err == ""


# --- statuses


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_transient_status_is_tried_again(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    behaviour = httpd.sequence(httpd.reply(status), httpd.reply(status), httpd.content(DATA))
    with httpd.serve({"/image": behaviour}) as server:
        assert get(server.url("/image")) == DATA
        url = server.url("/image")
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert first.startswith(f"fetch: {url}: answered {status} ")
    assert first.endswith("; retry 1 of 2 in 0.01 s")
    assert second.endswith("; retry 2 of 2 in 0.02 s")


def test_unavailable_after_the_last_retry() -> None:
    with httpd.serve({"/image": httpd.reply(503)}) as server:
        error = refusal(server.url("/image"))
        assert server.count("/image") == 3
    assert isinstance(error, fetch.Unavailable)
    assert "/image: answered 503 Service Unavailable (attempt 3, the last)" in error.message
    assert error.hint and "[http] of cloudimage.conf" in error.hint


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (401, "put user:password@ into the URL, or the host into root's ~/.netrc"),
        (403, "check the URL, and the credentials in it or in root's ~/.netrc"),
        (404, "check the URL; vendors remove old builds"),
        (410, "check the URL; vendors remove old builds"),
        (407, "put user:password@ into proxy in cloudimage.conf"),
        (400, "check the URL"),
        (204, "check the URL"),
        (206, "check the URL"),
        (304, "check the URL"),
    ],
    ids=str,
)
def test_definite_status(status: int, hint: str) -> None:
    with httpd.serve({"/image": httpd.reply(status)}) as server:
        error = refusal(server.url("/image?token=secret", user="me:secret"))
        assert server.count("/image") == 1
        assert f"http://***@127.0.0.1:{server.port}/image?***: answered {status} " in error.message
    assert not isinstance(error, fetch.Unavailable)
    assert error.hint == hint


def test_other_server_errors_are_not_tried_again_but_a_cache_may_serve() -> None:
    with httpd.serve({"/image": httpd.reply(501)}) as server:
        assert isinstance(refusal(server.url("/image")), fetch.Unavailable)
        assert server.count("/image") == 1


@pytest.mark.parametrize(
    ("value", "pause"),
    [
        ("0", "0.01 s"),
        ("1", "1 s"),
        ("99999", "1.2 s"),
        (email.utils.formatdate(time.time() + 9999, usegmt=True), "1.2 s"),
        (email.utils.formatdate(time.time() - 9999, usegmt=True), "0.01 s"),
        ("soon", "0.01 s"),
    ],
    ids=["none", "seconds", "too-long", "date", "past", "nonsense"],
)
def test_retry_after(value: str, pause: str, capsys: pytest.CaptureFixture[str]) -> None:
    busy = httpd.reply(429, headers={"Retry-After": value})
    with httpd.serve({"/image": httpd.sequence(busy, httpd.content(DATA))}) as server:
        assert get(server.url("/image"), replace(QUICK, max_pause_s=1.2)) == DATA
    assert f"; retry 1 of 2 in {pause}\n" in capsys.readouterr().err


# --- broken connections, resuming

PART = BLOCK_BYTES + 1000
CUT = httpd.content(DATA, cut=PART)


def lying(**headers: str) -> httpd.Behaviour:
    """A 206 for the rest after PART, but for what these headers say otherwise."""
    truth = {
        "Content-Range": f"bytes {PART}-{len(DATA) - 1}/{len(DATA)}",
        "Content-Length": str(len(DATA) - PART),
        "ETag": '"v1"',
    }
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    return httpd.reply(206, OTHER[PART:], {**truth, **headers})


@pytest.mark.parametrize(
    ("behaviours", "ranges"),
    [
        ([CUT, httpd.content(DATA)], [0, PART]),
        ([CUT, CUT, httpd.content(DATA)], [0, PART, 2 * PART]),
        ([CUT, httpd.reply(503), httpd.content(DATA)], [0, PART, PART]),
        ([CUT, httpd.content(DATA, ranges=False)], [0, PART]),
        ([CUT, httpd.content(DATA, framing="chunked")], [0, PART]),
        ([httpd.content(OTHER, etag='"v0"', cut=PART), httpd.content(DATA)], [0, PART]),
        ([httpd.content(OTHER * 2, etag='"v0"', cut=PART), httpd.content(DATA)], [0, PART]),
        ([CUT, httpd.reply(416), httpd.content(DATA)], [0, PART, 0]),
        ([httpd.content(DATA, etag='W/"v1"', cut=PART), httpd.content(DATA)], [0, 0]),
        ([httpd.content(DATA, etag=None, cut=PART), httpd.content(DATA)], [0, 0]),
        ([httpd.content(DATA, framing="chunked", cut=PART), httpd.content(DATA)], [0, 0]),
        ([httpd.content(DATA, cut=0), httpd.content(DATA)], [0, 0]),
        ([CUT, lying(Content_Range="bytes 0-9/10"), httpd.content(DATA)], [0, PART, 0]),
        (
            [CUT, lying(Content_Range=f"bytes {PART}-{len(DATA)}/{len(DATA) + 1}"), CUT],
            [0, PART, 0],
        ),
        ([CUT, lying(Content_Range=""), httpd.content(DATA)], [0, PART, 0]),
        ([CUT, lying(ETag='"v2"'), httpd.content(DATA)], [0, PART, 0]),
        ([CUT, lying(Content_Length="7"), httpd.content(DATA)], [0, PART, 0]),
        ([CUT, lying(Content_Encoding="gzip"), httpd.content(DATA)], [0, PART, 0]),
        ([httpd.raw(b""), httpd.content(DATA)], [0, 0]),
        ([httpd.raw(b"what?\r\n\r\n"), httpd.content(DATA)], [0, 0]),
        ([raw("Transfer-Encoding: chunked", body=b"zz\r\n"), httpd.content(DATA)], [0, 0]),
        ([raw("Transfer-Encoding: chunked", body=b"-5\r\n"), httpd.content(DATA)], [0, 0]),
    ],
    ids=[
        "resumed", "resumed-twice", "busy-between", "no-ranges", "no-ranges-chunked",
        "file-changed", "file-changed-size", "416", "weak-etag", "no-etag", "chunked",
        "nothing-came", "other-start", "other-total", "no-content-range", "other-etag",
        "other-length", "encoded", "dropped", "nonsense", "bad-chunk", "negative-chunk",
    ],
)  # fmt: skip
def test_broken_connection(behaviours: list[httpd.Behaviour], ranges: list[int]) -> None:
    whole = httpd.content(DATA)
    options = replace(QUICK, retries=len(behaviours))
    with httpd.serve({"/image": httpd.sequence(*behaviours, whole)}) as server:
        assert get(server.url("/image"), options) == DATA
        asked = [seen.headers["Range"] for seen in server.seen]
        validators = [seen.headers["If-Range"] for seen in server.seen]
    expected = [f"bytes={start}-" if start else None for start in ranges]
    assert asked[: len(expected)] == expected
    assert all((one is None) == (other is None) for one, other in zip(asked, validators))


def late(exchange: httpd.Exchange) -> None:
    exchange.head(200, {"Content-Length": str(len(DATA))})
    exchange.pause(0.2)
    exchange.write(DATA)


def test_pace_counts_from_where_the_server_began_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PATIENCE_S", 0.1)
    monkeypatch.setattr(fetch, "LEAST_RATE", 1000)
    with httpd.serve({"/image": httpd.sequence(CUT, late)}) as server:
        assert get(server.url("/image"), replace(QUICK, retries=1)) == DATA


def test_an_attempt_that_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PATIENCE_S", 0.1)
    monkeypatch.setattr(fetch, "LEAST_RATE", 1 << 30)
    with httpd.serve({"/image": late}) as server:
        with pytest.raises(fetch.Unavailable, match="slower than 1 GiB a second for "):
            get(server.url("/image"), replace(QUICK, retries=0))


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (
            httpd.content(DATA, etag=None, cut=9),
            f"the connection ended after 9 of {len(DATA)} bytes",
        ),
        (httpd.content(DATA, framing="chunked", cut=9), "the connection ended within a chunk"),
        (httpd.raw(b""), "Remote end closed connection without response"),
        (httpd.raw(b"what?\r\n\r\n"), "BadStatusLine what?"),
        (httpd.hang, "timed out"),
        (httpd.trickle(DATA, 0.01), "too slow or silent for 0.3 s"),
        (httpd.trickle(DATA, 0.05, from_head=True), "too slow or silent for 0.6 s"),
        (httpd.sequence(CUT, httpd.reply(416)), "the rest is no longer there"),
        (httpd.sequence(CUT, lying(ETag="x")), "the server did not go on where the download"),
    ],
    ids=[
        "cut", "cut-chunked", "dropped", "nonsense", "hang", "slow-body",
        "slow-head", "forgets", "lies",
    ],
)  # fmt: skip
def test_broken_for_good(behaviour: httpd.Behaviour, words: str) -> None:
    with httpd.serve({"/image": behaviour}) as server:
        error = refusal(server.url("/image"), replace(QUICK, retries=1))
    assert isinstance(error, fetch.Unavailable)
    assert words in error.message


def test_connection_refused() -> None:
    error = refusal(f"{DEAD}/image?token=secret", replace(QUICK, retries=0))
    assert isinstance(error, fetch.Unavailable)
    assert error.message == f"{DEAD}/image?***: Connection refused (attempt 1, the last)"


def test_no_connection() -> None:
    # a full backlog lets the kernel drop what comes after it
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/image"
        error = refusal(url, replace(QUICK, retries=0))
    assert "timed out" in error.message


def test_what_was_being_handled_before_is_not_the_cause() -> None:
    try:
        socket.getaddrinfo("nosuch.invalid", 80)
    except OSError:
        assert "Connection refused" in refusal(DEAD + "/", replace(QUICK, retries=0)).message


def test_unknown_host() -> None:
    error = refusal("http://nosuch.invalid/image")
    assert isinstance(error, fetch.Unavailable)
    assert error.message == "http://nosuch.invalid/image: the name of the host does not exist"
    error = refusal(f"{DEAD}/image", replace(QUICK, proxy="http://nosuch.invalid:3128"))
    assert error.message == f"{DEAD}/image: the name of the proxy does not exist"


def test_a_failing_output_is_no_network_trouble(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with httpd.serve({"/image": httpd.content(DATA)}) as server:
        with open(tmp_path / "image", "w+b", buffering=0) as output:
            resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK_BYTES, hard))
            try:
                with pytest.raises(OSError, match="File too large"):
                    fetch.download(server.url("/image"), output, QUICK)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert server.count("/image") == 1


# --- bodies that are refused


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (raw("Content-Length: -5"), "came with Content-Length -5"),
        (raw("Content-Length: five"), "came with Content-Length five"),
        (
            raw("Content-Length: 5", "Content-Length: 3"),
            "Content-Length contained multiple unmatching values (5, 3)",
        ),
        (
            raw("Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
            "came with Transfer-Encoding chunked and a Content-Length",
        ),
        (raw("Transfer-Encoding: gzip"), "came with Transfer-Encoding gzip"),
        (raw("Content-Encoding: deflate"), "came with Content-Encoding deflate, unasked"),
        (raw(body=b""), "the body is empty"),
        (raw("Content-Length: 0"), "the body is empty"),
        (raw("Content-Length: 1000001"), "is larger than the limit of 977 KiB"),
        (httpd.endless(), "is larger than the limit of 977 KiB"),
        (httpd.endless("chunked"), "is larger than the limit of 977 KiB"),
    ],
    ids=[
        "negative", "no-number", "two-lengths", "length-and-chunks", "coding", "encoded", "empty",
        "length-0", "too-large", "endless", "endless-chunks",
    ],
)  # fmt: skip
def test_refused_body(behaviour: httpd.Behaviour, words: str) -> None:
    with httpd.serve({"/image": behaviour}) as server:
        error = refusal(server.url("/image"), replace(QUICK, max_size_bytes=1_000_000))
        assert server.count("/image") == 1
    assert words in error.message
    assert not isinstance(error, fetch.Unavailable)


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip"])
def test_a_stored_gz_is_kept_as_it_is(encoding: str) -> None:
    """Some servers say so of every .gz, and whoever asks for the rest of one hears it again."""
    head = {"Content-Encoding": encoding}
    whole = httpd.content(DATA, headers=head)
    cut = httpd.content(DATA, cut=PART, headers=head)
    with httpd.serve({"/image": httpd.sequence(cut, whole)}) as server:
        assert get(server.url("/image"), replace(QUICK, retries=1)) == DATA
        assert [seen.headers["Range"] for seen in server.seen] == [None, f"bytes={PART}-"]
        with pytest.raises(Error) as caught:
            fetch.read(server.url("/image"), QUICK, 1 << 30)
    assert caught.value.message.endswith(f"came with Content-Encoding {encoding}, unasked")


def test_the_same_length_twice_is_one_length() -> None:
    with httpd.serve({"/image": raw("Content-Length: 5", "Content-Length: 5")}) as server:
        assert get(server.url("/image")) == b"hello"


def test_need_framing() -> None:
    routes = {
        framing: httpd.content(DATA, framing=framing[1:])
        for framing in ("/length", "/chunked", "/none")
    }
    with httpd.serve(routes) as server:
        assert get(server.url("/length"), need_framing=True) == DATA
        assert get(server.url("/chunked"), need_framing=True) == DATA
        error = refusal(server.url("/none"), need_framing=True)
    assert "came with neither a length nor chunks; a cut would go unnoticed" in error.message
    assert error.hint == "set checksum"


# --- redirects and credentials


def test_five_redirects_are_followed_but_not_six() -> None:
    hops = {f"/{n}": httpd.redirect(f"{n - 1}", 308) for n in range(2, 8)}
    hops["/1"] = httpd.redirect("/image")
    with httpd.serve({"/image": httpd.content(DATA), **hops}) as server:
        assert get(server.url("/5")) == DATA
        assert refusal(server.url("/6")).message.endswith("/6: more than 5 redirects")


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("file:///etc/passwd", " -> file:///etc/passwd: is not an http or https URL"),
        ("ftp://me:secret@127.0.0.1/", " -> ftp://***@127.0.0.1/: is not an http or https URL"),
        ("http://[", "/image: redirects to a malformed URL"),
        ("/gone?token=secret", "/gone?***: answered 404 Not Found"),
        ("", "more than 5 redirects"),
    ],
    ids=["file", "ftp", "malformed", "gone", "none"],
)
def test_refused_redirect(location: str, words: str) -> None:
    with httpd.serve({"/image": httpd.redirect(location)}) as server:
        assert words in refusal(server.url("/image")).message


def test_a_redirect_may_have_spaces() -> None:
    routes = {"/image": httpd.redirect("/my image.raw"), "/my%20image.raw": httpd.content(DATA)}
    with httpd.serve(routes) as server:
        assert get(server.url("/image")) == DATA


def test_the_body_of_a_redirect_is_not_read() -> None:
    routes = {
        "/image": httpd.endless(status=302, Location="/there"),
        "/there": httpd.content(DATA),
    }
    with httpd.serve(routes) as server:
        assert get(server.url("/image")) == DATA


def test_resuming_follows_the_redirect_again() -> None:
    routes = {
        "/image": httpd.redirect("/there"),
        "/there": httpd.sequence(CUT, httpd.content(DATA)),
    }
    with httpd.serve(routes) as server:
        assert get(server.url("/image")) == DATA
        assert [seen.path for seen in server.seen] == ["/image", "/there"] * 2


@pytest.mark.parametrize(
    ("user", "name", "password"),
    [("me:secret", "me", "secret"), ("me%40x:p%2Fw%25", "me@x", "p/w%"), ("me", "me", "")],
)
def test_credentials_in_the_url(user: str, name: str, password: str) -> None:
    protected = httpd.protected(name, password, httpd.content(DATA))
    routes = {"/here": httpd.redirect("/image"), "/image": protected}
    with httpd.serve(routes) as server:
        assert get(server.url("/here", user=user)) == DATA


def test_credentials_stay_with_their_origin() -> None:
    with httpd.serve({"/image": httpd.content(DATA)}) as other:
        back = httpd.redirect(other.url("/image", user="you:other"))
        with httpd.serve({"/image": back}) as server:
            assert get(server.url("/image", user="me:secret")) == DATA
            assert server.seen[0].headers["Authorization"]
            assert server.url("/image") not in str(other.seen[0].headers)
        # there and back again: it is the other server that wants the request now
        there = httpd.redirect(f"http://127.0.0.1:{other.port}/back")
        with httpd.serve({"/image": there, "/end": httpd.content(DATA)}) as server:
            other.routes["/back"] = httpd.redirect(server.url("/end"))
            assert get(server.url("/image", user="me:secret")) == DATA
            assert [bool(seen.headers["Authorization"]) for seen in server.seen] == [True, False]
        assert all(seen.headers["Authorization"] is None for seen in other.seen)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://me:p/secret@host/image", "http://***@host/image: is malformed"),
        ("http://host:port/", "http://host:port/: is malformed"),
        ("http:///image", "http:///image: is not an http or https URL"),
        ("ftp://me:secret@host/", "ftp://***@host/: is not an http or https URL"),
        (f"http://{'a' * 64}/?secret", f"http://{'a' * 64}/?***: "),
    ],
)
def test_malformed_url(url: str, words: str) -> None:
    error = refusal(url)
    assert words in error.message
    assert "secret" not in str(error)


def test_malformed_proxy() -> None:
    error = refusal(f"{DEAD}/", replace(QUICK, proxy="http://me:p/secret@proxy:3128"))
    assert error.message == "proxy http://***@proxy:3128: is malformed"


def netrc_home(tmp_path: Path, netrc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text(netrc)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc_home(tmp_path, "machine 127.0.0.1 login me password secret", monkeypatch)
    image = httpd.protected("me", "secret", httpd.content(DATA))
    with httpd.serve({"/image": image}) as server, httpd.serve({}) as other:
        assert get(server.url("/image")) == DATA
        # the URL's own win; and the other port of the same machine was not what was asked for
        assert "answered 401" in refusal(server.url("/image", user="me:wrong")).message
        other.routes["/image"] = httpd.redirect(server.url("/image"))
        assert "answered 401" in refusal(other.url("/image")).message


def test_netrc_malformed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc_home(tmp_path, "machine 127.0.0.1\n login me pass word secret", monkeypatch)
    error = refusal(f"{DEAD}/image")
    assert str(error) == "~/.netrc: line 2 is malformed; correct it"


def test_netrc_without_home(tmp_path: Path) -> None:
    """Ganeti wipes the environment, HOME too; ~ is then what the user database says."""
    require("bwrap")
    user = pwd.getpwuid(os.getuid())
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret")
    (tmp_path / "passwd").write_text(f"{user.pw_name}:x:{user.pw_uid}:0::{tmp_path}:/bin/sh")
    image = httpd.protected("me", "secret", httpd.content(b"hello"))
    with httpd.serve({"/image": image}) as server:
        script = "from lib.source import fetch; import sys; "
        script += "sys.stdout.buffer.write(fetch.read(sys.argv[1], fetch.Options(), 9))"
        done = subprocess.run(
            ["bwrap", "--dev-bind", "/", "/", "--ro-bind", tmp_path / "passwd", "/etc/passwd",
             "--clearenv", sys.executable, "-c", script, server.url("/image")],
            cwd=ROOT, capture_output=True, check=False,
        )  # fmt: skip
    assert (done.stdout, done.stderr) == (b"hello", b"")


# --- proxy


@contextmanager
def tinyproxy(tmp_path: Path, *lines: str) -> Iterator[int]:
    """Run a real proxy on a free port."""
    require("tinyproxy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    configuration = tmp_path / "tinyproxy.conf"
    text = f"Port {port}\nListen 127.0.0.1\nTimeout 5\nMaxClients 9\n"
    configuration.write_text(text + "\n".join([*lines, ""]))
    with subprocess.Popen(["tinyproxy", "-d", "-c", configuration], stdout=-3, stderr=-3) as child:
        try:
            for _ in range(100):
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.02)
            yield port
        finally:
            child.kill()  # its handler of SIGTERM may come before it waits, and then it waits on


def test_proxy(tmp_path: Path, authority: Authority) -> None:
    certificate = authority.certificate("127.0.0.1")
    routes = {"/image": httpd.content(DATA)}
    with (
        tinyproxy(tmp_path, "BasicAuth me secret", 'ViaProxyName "test"') as port,
        httpd.serve(routes) as plain,
        httpd.serve(routes, certificate) as encrypted,
    ):
        proxy = f"http://me:secret@127.0.0.1:{port}"
        options = replace(QUICK, proxy=proxy, ca_bundle=authority.bundle, retries=0)
        assert get(plain.url("/image"), options) == DATA
        assert plain.seen[0].headers["Via"]
        assert plain.seen[0].headers["Proxy-Authorization"] is None
        assert get(encrypted.url("/image"), options) == DATA
        options = replace(options, proxy=f"http://me:wrong@127.0.0.1:{port}")
        error = refusal(plain.url("/image"), options)
        assert "answered 401" in error.message or "answered 407" in error.message
        error = refusal(encrypted.url("/image"), options)
        assert "Tunnel connection failed: 40" in error.message
        assert "wrong" not in str(error)
    # http.client (Python 3.11) leaves the answer of a refused tunnel to the garbage collector
    del error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, DEAD)
    with httpd.serve({"/image": httpd.content(DATA)}) as server:
        assert get(server.url("/image")) == DATA


# --- TLS


class Authority:
    """A private certificate authority."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bundle, self.key = directory / "ca.pem", directory / "ca.key"
        self.openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", self.key, "-out", self.bundle, "-days", "2", "-subj", "/CN=authority",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip

    def openssl(self, *arguments: Any) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.directory, check=True, capture_output=True)

    def certificate(self, address: str) -> tuple[Path, Path]:
        """Return a certificate for this IP address, and its key."""
        paths = self.directory / f"{address}.pem", self.directory / f"{address}.key"
        self.openssl(
            "req", "-x509", "-CA", self.bundle, "-CAkey", self.key,
            "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", paths[1], "-out", paths[0], "-days", "2", "-subj", "/CN=server",
            "-addext", f"subjectAltName=IP:{address}", "-addext", "basicConstraints=CA:FALSE",
        )  # fmt: skip
        return paths


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    require("openssl")
    return Authority(tmp_path_factory.mktemp("authority"))


def test_tls(authority: Authority, tmp_path: Path) -> None:
    trusting = replace(QUICK, ca_bundle=authority.bundle)
    stranger = replace(QUICK, ca_bundle=Authority(tmp_path).bundle)
    behaviour = httpd.sequence(CUT, httpd.content(DATA))
    with httpd.serve({"/image": behaviour}, authority.certificate("127.0.0.1")) as server:
        assert get(server.url("/image"), trusting) == DATA
        for options in (QUICK, stranger):
            error = refusal(server.url("/image"), options)
            assert "/image: the certificate is not trusted: unable to get local" in error.message
            assert error.hint == "set ca_bundle in section [http] of cloudimage.conf"
            assert not isinstance(error, fetch.Unavailable)
    with httpd.serve({"/image": behaviour}, authority.certificate("127.0.0.9")) as server:
        error = refusal(server.url("/image"), trusting)
        assert "the certificate is not trusted: " in error.message
        assert "127.0.0.1" in error.message.partition("trusted")[2]


def test_tls_is_never_left(authority: Authority) -> None:
    options = replace(QUICK, ca_bundle=authority.bundle)
    with (
        httpd.serve({"/image": httpd.content(DATA)}) as plain,
        httpd.serve({}, authority.certificate("127.0.0.1")) as encrypted,
    ):
        encrypted.routes["/image"] = httpd.redirect(plain.url("/image?token=secret"))
        error = refusal(encrypted.url("/image"), options)
        assert f"/image: redirects from https to {plain.url('/image')}?***" in error.message
        assert error.hint == "if the unencrypted URL is trusted, name it"
        assert plain.seen == []
        plain.routes["/up"] = httpd.redirect(encrypted.url("/end"))
        encrypted.routes["/end"] = httpd.content(DATA)
        assert get(plain.url("/up", user="me:secret"), options) == DATA
        assert encrypted.seen[-1].headers["Authorization"] is None


def test_no_tls_there() -> None:
    with httpd.serve({}) as server:
        url = server.url("/image").replace("http:", "https:")
        assert isinstance(refusal(url, replace(QUICK, retries=0)), fetch.Unavailable)


@pytest.mark.parametrize(
    ("text", "words"), [(None, "No such file"), ("none", "no certificate")], ids=["missing", "junk"]
)
def test_ca_bundle_unusable(text: Optional[str], words: str, tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    if text is not None:
        bundle.write_text(text)
    message = refusal(f"{DEAD}/image", replace(QUICK, ca_bundle=bundle)).message
    assert message.startswith(f"ca_bundle {bundle}: ")
    assert words.lower() in message.lower()


# --- probe


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (httpd.content(DATA), None),
        (httpd.reply(404), "/image: answered 404 Not Found"),
        (httpd.reply(410), "/image: answered 410 Gone"),
        (httpd.reply(403), "/image: answered 403 Forbidden"),
        (httpd.reply(401), "/image: answered 401 Unauthorized"),
        (httpd.redirect("file:///etc/passwd"), "file:///etc/passwd: is not an http or https URL"),
        (httpd.redirect("/image"), "more than 5 redirects"),
        (httpd.reply(400), None),
        (httpd.reply(416), None),
        (httpd.reply(503), None),
        (httpd.endless(), None),
        (httpd.hang, None),
        (httpd.raw(b""), None),
    ],
    ids=[
        "good", "404", "410", "403", "401", "file", "loop", "400", "416", "503", "endless", "hang",
        "dropped",
    ],
)  # fmt: skip
def test_probe(behaviour: httpd.Behaviour, words: Optional[str]) -> None:
    with httpd.serve({"/image": behaviour}) as server:
        if words is None:
            fetch.size(server.url("/image"), QUICK)
        else:
            with pytest.raises(Error, match=words.replace("?", "[?]")):
                fetch.size(server.url("/image"), QUICK)
        assert server.seen[0].headers["Range"] == "bytes=0-0"


def test_probe_of_a_host() -> None:
    fetch.size(f"{DEAD}/image", QUICK)
    with pytest.raises(Error, match="the name of the host does not exist"):
        fetch.size("http://nosuch.invalid/image", QUICK)


# --- the library itself


def test_requests_is_imported_late_and_named_when_missing() -> None:
    script = f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}]
        from lib import errors
        from lib.source import fetch
        assert "requests" not in sys.modules
        try:
            fetch.read("http://127.0.0.1:1/", fetch.Options(), 1)
        except errors.Error as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "requests: not installed; install the package python3-requests\n"


def test_an_interruption_leaves_nothing_behind() -> None:
    """As entry.Interrupted does: it is raised by a signal, wherever the program is."""

    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        with httpd.serve({"/image": httpd.trickle(DATA, 0.01)}) as server:
            server.routes["/image"] = lambda exchange: os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted):
                get(server.url("/image"), fetch.Options())
            assert server.count("/image") == 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("no_proxy", "is_bypassed"),
    [
        ("", False),
        ("example.com,127.0.0.1", True),
        ("127.0.0.0/8", True),
        ("10.0.0.0/8, .example.com", False),
        ("*", True),
    ],
)
def test_no_proxy(tmp_path: Path, no_proxy: str, is_bypassed: bool) -> None:
    with httpd.serve({"/image": httpd.content(b"x")}) as server:
        with tinyproxy(tmp_path, 'ViaProxyName "test"') as port:
            options = replace(QUICK, proxy=f"http://127.0.0.1:{port}", no_proxy=no_proxy)
            assert fetch.read(server.url("/image"), options, 10) == b"x"
    assert ("Via" not in server.seen[0].headers) == is_bypassed
