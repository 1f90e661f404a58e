"""One answer of an HTTP server: redirects, credentials, deadlines, and which failures are final.

The only module that imports requests. Its transport (HTTPAdapter) is used without its Session,
which would read a redirect's body into memory whatever its size, take proxies from the environment
and look up netrc for every host on the way.
"""

from __future__ import annotations

import email.utils
import netrc
import os
import re
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException, IncompleteRead
from itertools import takewhile
from netrc import NetrcParseError
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Optional
from urllib.parse import urljoin

from lib import __version__, log
from lib.errors import Error, causes, describe
from lib.settings.url import Credentials, Url, parse

if TYPE_CHECKING:
    import requests
    from requests.adapters import HTTPAdapter

BLOCK_BYTES = 256 << 10
MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})  # those of curl --retry
REFUSED = {
    401: "put user:password@ into the URL, or the host into root's ~/.netrc",
    403: "check the URL, and the credentials in it or in root's ~/.netrc",
    404: "check the URL; vendors remove old builds",
    407: "put user:password@ into proxy in cloudimage.conf",
    410: "check the URL; vendors remove old builds",
}
# with identity the bytes, and so their length and digest, are those of the file as published
HEADERS = {
    "User-Agent": f"instance-cloudimage/{__version__}",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
}
UNAVAILABLE_HINT = "try again later, or check the network and section [http] of cloudimage.conf"


@dataclass(frozen=True)
class Options:
    """How to talk to servers: section [http] of cloudimage.conf."""

    proxy: Optional[str] = field(default=None, repr=False)  # may hold a password
    no_proxy: str = ""  # where the proxy is not asked
    ca_bundle: Optional[Path] = None
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0  # for an answer, and for each BLOCK_BYTES: at least 4 KiB/s
    retries: int = 5
    max_size_bytes: int = 1 << 40
    max_size_hint: str = "raise max_virtual_size in section [image] of cloudimage.conf"
    deadline: Optional[float] = None  # of time.monotonic(), for all that is asked
    pause_s: float = 1.0  # before the first retry; doubles with each
    max_pause_s: float = 60.0  # whatever Retry-After asks for


class Unavailable(Error):
    """The server or the network is down, after all retries: what is in the cache may serve."""


class Broken(Exception):
    """This attempt failed; the next one may not."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass(frozen=True)
class Answer:
    """An answer that is no redirect: its header, and the way to its body."""

    status: int
    headers: Mapping[str, str]  # names in any case; repeated ones are joined by ", "
    response: requests.Response
    shown: str  # where it is from, in words for messages
    options: Options

    def block(self) -> bytes:
        """Return the next BLOCK_BYTES of the body; b"" at its end, which may be too early."""
        with _bounded(self.shown, self.options, self.options.read_timeout_s):
            try:
                data: bytes = self.response.raw.read(BLOCK_BYTES, decode_content=False)
            except ValueError as error:  # http.client takes -5 for the size of a chunk
                raise Broken("a chunk of the body is malformed") from error
        return data

    def failure(self) -> Exception:
        """Return what a status that brings no body means: a definite no, or try again."""
        words = f"answered {self.status} {log.printable(self.response.reason or '', 60)}".rstrip()
        if self.status in TRANSIENT:
            return Broken(words, _retry_after(self.headers.get("Retry-After", "")))
        if self.status >= 500:
            return Unavailable(f"{self.shown}: {words}", UNAVAILABLE_HINT)
        return Error(f"{self.shown}: {words}", REFUSED.get(self.status, "check the URL"))


@dataclass(frozen=True)
class Session:
    """The way to servers: requests' transport and how to use it."""

    options: Options
    adapter: HTTPAdapter

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """Send a GET and follow redirects; raises Broken, or Error when another try is useless.

        The credentials of the URL, else of ~/.netrc, are for its scheme, host and port alone.
        """
        shown = first = log.redact(url)
        at = parse(url)
        auth = at.credentials or _netrc(at)
        for _hop in range(MAX_REDIRECTS + 1):
            with closing(self._send(at.bare, headers, auth, shown)) as response:
                status, header = response.status_code, response.headers
                if status not in REDIRECTS:
                    yield Answer(status, header, response, shown, self.options)
                    return
                target = _redirected(at, header.get("Location", ""), shown)
            if target.origin != at.origin:
                auth = None
            at, shown = target, f"{first} -> {log.redact(target.bare)}"
        raise Error(f"{first}: more than {MAX_REDIRECTS} redirects", "check the URL")

    def _send(
        self, url: str, headers: Mapping[str, str], auth: Optional[Credentials], shown: str
    ) -> requests.Response:
        import requests

        options = self.options
        with _bounded(shown, options, options.connect_timeout_s + options.read_timeout_s):
            request = requests.Request("GET", url, {**HEADERS, **headers}, auth=auth).prepare()
            response = self.adapter.send(
                request,
                stream=True,
                timeout=(options.connect_timeout_s, options.read_timeout_s),
                verify=str(options.ca_bundle) if options.ca_bundle else True,
                proxies=self._proxies(url),
            )
        # urllib3 2 would count the bytes, 1.26 does not: fetch does
        response.raw.enforce_content_length = False
        return response

    def _proxies(self, url: str) -> dict[str, str]:
        from requests.utils import should_bypass_proxies

        proxy = self.options.proxy
        # "" and not None: that would be the environment's own no_proxy
        if proxy is None or should_bypass_proxies(url, self.options.no_proxy):
            return {}
        return {"http": proxy, "https": proxy}


@contextmanager
def session(options: Options) -> Iterator[Session]:
    """Hand out a Session. Importing requests costs 130 ms, so only who needs it pays."""
    try:
        from requests.adapters import HTTPAdapter
    except ImportError as error:
        raise Error("requests: not installed", "install the package python3-requests") from error
    if os.getenv("RES_OPTIONS") is None:
        # resolv.conf(5): a look-up cannot be broken off, and 2 silent servers would take 20 s; for
        # the C library of this process only, which reads it at the first look-up
        os.putenv("RES_OPTIONS", "timeout:2 attempts:1")
    if options.proxy is not None:
        try:
            parse(options.proxy)
        except Error as error:
            raise Error(f"proxy {error.message}", error.hint) from error
    if options.ca_bundle is not None:
        try:
            ssl.create_default_context(cafile=options.ca_bundle)
        except OSError as error:
            raise Error(f"ca_bundle {options.ca_bundle}: {describe(error)}") from error
    with closing(HTTPAdapter()) as adapter:
        yield Session(options, adapter)


def _netrc(url: Url) -> Optional[Credentials]:
    """Return the host's own entry in ~/.netrc; ~ is root's home, HOME set or not (expanduser).

    Never the `default` one: it would go to whatever host an OS parameter names.
    """
    path = os.path.expanduser("~/.netrc")
    try:
        hosts = netrc.netrc(path).hosts if os.path.exists(path) else {}
    except NetrcParseError as error:  # its text may quote a password
        raise Error(f"~/.netrc: line {error.lineno} is malformed", "correct it") from error
    except OSError as error:
        raise Error(f"~/.netrc: {describe(error)}") from error
    found = hosts.get(url.host) if url.host != "default" else None
    return (found[0].encode(), (found[2] or "").encode()) if found else None


def _redirected(url: Url, location: str, shown: str) -> Url:
    """Return where a redirect leads; the credentials that it may name are not for use."""
    # http.client reads headers as latin-1, servers write UTF-8, and spaces that everybody encodes
    location = location.encode("latin-1").decode("utf-8", "replace").replace(" ", "%20")
    try:
        joined = urljoin(url.bare, location)
    except ValueError as error:
        raise Error(f"{shown}: redirects to a malformed URL", "check the URL") from error
    try:
        target = parse(joined)
    except Error as error:
        raise Error(f"{shown} -> {error.message}", error.hint) from error
    if (url.scheme, target.scheme) == ("https", "http"):
        raise Error(
            f"{shown}: redirects from https to {log.redact(target.bare)}",
            "if the unencrypted URL is trusted, name it",
        )
    return target


@contextmanager
def _bounded(shown: str, options: Options, wait_s: float) -> Iterator[None]:
    """Allow `wait_s` for what is inside; what fails there becomes an Error or Broken.

    A socket's timeout begins anew with every byte that drops in, in the header too; the kernel's
    timer is the clock that breaks off a call through all its layers, without a thread.
    """
    import requests
    import urllib3  # type: ignore[import-untyped,unused-ignore]

    def expire(_number: int, _frame: Optional[FrameType]) -> None:
        raise Broken(f"too slow or silent for {wait_s:g} s")

    if options.deadline is not None:
        wait_s = min(wait_s, options.deadline - time.monotonic())
        if wait_s <= 0:
            raise Broken("there was no time left to ask")
    before = sys.exc_info()[1]
    previous = signal.signal(signal.SIGALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_REAL, wait_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        new = takewhile(lambda each: each is not before, causes(error))
        raise _translated(list(new), shown, options) from error
    finally:
        signal.signal(signal.SIGALRM, previous)


def _translated(causes: Sequence[BaseException], shown: str, options: Options) -> Exception:
    """Return what an exception of requests, with what led to it, means to us."""
    import requests
    import urllib3  # type: ignore[import-untyped,unused-ignore]

    # the kernel's or http.client's own words; those of the layers above quote the URL's query
    inner = [each for each in causes if isinstance(each, (OSError, HTTPException))]
    inner = [each for each in inner if not isinstance(each, requests.RequestException)]
    words = _words(inner[-1] if inner else causes[-1])
    unknown = (socket.EAI_NONAME, socket.EAI_NODATA)
    if any(isinstance(each, socket.gaierror) and each.errno in unknown for each in causes):
        whose = "proxy" if options.proxy else "host"
        # to a download a server that is down, to size() a definite no
        return Unavailable(f"{shown}: the name of the {whose} does not exist", "check the URL")
    if isinstance(causes[0], requests.exceptions.SSLError):
        # both ssl's exception for a bad certificate and urllib3 1.26's own for a wrong name
        if any(isinstance(each, ValueError) for each in causes):
            return Error(
                f"{shown}: the certificate is not trusted: {words}",
                "set ca_bundle in section [http] of cloudimage.conf",
            )
    elif isinstance(causes[0], (ValueError, urllib3.exceptions.InvalidHeader)):
        # a URL, a proxy or a header that no retry mends
        return Error(f"{shown}: {words}", "check the URL and proxy in cloudimage.conf")
    return Broken(words)


def _words(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        text = getattr(error, "verify_message", text)  # Python's own check of the name has none
    elif isinstance(error, OSError):
        text = error.strerror or text
    elif isinstance(error, IncompleteRead):
        text = "the connection ended within a chunk"
    elif isinstance(error, HTTPException):
        text = f"{type(error).__name__} {text}"
    return log.printable(log.redact(text.strip() or type(error).__name__), 200)


def _retry_after(value: str) -> float:
    """Return the seconds that Retry-After (seconds or a date, RFC 9110 10.2.3) asks for."""
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError):
        return 0.0
