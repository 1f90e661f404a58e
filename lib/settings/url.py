"""What an http(s) URL says: the one reader of them (RFC 3986; what is ambiguous is refused)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Optional
from urllib.parse import unquote, urlsplit, urlunsplit

from lib import log
from lib.errors import Error

# an authority ends at the first of / ? #; a backslash is one of them to some readers only
_URL = re.compile(
    r"https?://([^/?#\\]*@)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?([/?#]|$)", re.I
)
Credentials = tuple[bytes, bytes]  # user and password, not encoded


@dataclass(frozen=True)
class Url:
    """A URL taken apart, once."""

    bare: str  # as it is sent: without user, password and fragment
    scheme: str
    host: str
    port: int
    path: str
    fragment: str
    credentials: Optional[Credentials] = field(repr=False)

    @property
    def origin(self) -> tuple[str, str, int]:
        """What credentials are for."""
        return self.scheme, self.host, self.port


def shown(text: str) -> str:
    """Return what a log may show of a text that may be a URL, a malformed one too.

    There a password may hold what ends a host name: nothing before the last @ is shown, and
    nothing behind it that may be the query's.
    """
    if not _URL.match(text):
        text = re.sub(r"//[^?]*@(?!.*@)|//.*@.*", "//***@", text)
    return log.redact(text)


def parse(text: str) -> Url:
    """Return what the URL says; Error, without a password in it, if it is none."""
    if not re.match(r"https?://[^/?#]", text, re.IGNORECASE):
        raise Error(f"{shown(text)}: is not an http or https URL")
    malformed = Error(
        f"{shown(text)}: is malformed", "write % in a password as %25, / as %2F, @ as %40"
    )
    if not _URL.match(text) or re.search(r"[\x00-\x20\x7f\\]", text):
        raise malformed
    try:
        parts = urlsplit(text)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise malformed from error
    authority = parts.netloc.rpartition("@")[2]
    credentials = None
    if parts.username:
        credentials = (unquote(parts.username).encode(), unquote(parts.password or "").encode())
    return Url(
        bare=urlunsplit((parts.scheme, authority, parts.path, parts.query, "")),
        scheme=parts.scheme,
        host=(parts.hostname or "").lower(),
        port=port,
        path=parts.path,
        fragment=parts.fragment,
        credentials=credentials,
    )
