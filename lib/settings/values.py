"""What the text of an OS parameter may be: text -> value; a ValueError says what it must be."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union
from urllib.parse import unquote

from lib import log
from lib.errors import Error
from lib.settings import config, url

FORMATS = ("auto", "raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")
DEBIAN_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64el"}


@dataclass(frozen=True)
class Location:
    """A file on the node, or a URL of an HTTP server: exactly one of them is set."""

    path: Optional[Path] = None
    url: Optional[str] = None

    def __str__(self) -> str:
        return log.redact(str(self.path or self.url))

    @property
    def file_name(self) -> str:
        """The last component, which a checksum list calls the file by."""
        return (str(self.path) if self.url is None else url.parse(self.url).path).rpartition("/")[2]

    @property
    def fragment(self) -> str:
        """What stands behind a URL's #: for a checksum list, the name to look for in it."""
        return "" if self.url is None else unquote(url.parse(self.url).fragment)


@dataclass(frozen=True)
class Document(Location):
    """A text of the user's: given in place, or where to read it."""

    data: Optional[bytes] = None


Digest = tuple[str, str]  # ("sha256" or "sha512", lower-case hex)
Checksum = Union[Digest, Location, None]


def choice(*known: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in known:
            raise ValueError(f"one of {' '.join(known)}; {config.nearest(value, known)}")
        return value

    return parse


def filled(value: str) -> str:
    """Fill in the node's architecture."""
    machine = platform.machine()
    value = value.replace("{arch}", machine)
    return value.replace("{deb_arch}", DEBIAN_ARCHITECTURES.get(machine, machine))


def names(value: object) -> set[str]:
    """Return the {names} in a value that the vendor's index must fill in."""
    text = str(value.url or value.path) if isinstance(value, Location) else str(value)
    return set(re.findall(r"\{(\w+)\}", text))


def location(value: str) -> Location:
    value = filled(value)
    if re.search(r"[^\x21-\x7e]", value):
        raise ValueError("printable ASCII without spaces (percent-encode a URL, rename a file)")
    scheme, colon, rest = value.partition("://")
    if value.startswith("/"):
        return Location(path=Path(value))
    if colon and scheme.lower() == "file":
        if not rest.startswith("/"):
            raise ValueError("file:///absolute/path (a file on this node)")
        return Location(path=Path(unquote(rest)))
    if colon and scheme.lower() in ("http", "https"):
        try:
            url.parse(value)
        except Error:
            raise ValueError("a URL with a host name, https://HOST/PATH") from None
        return Location(url=f"{scheme.lower()}://{rest}")
    raise ValueError("an absolute path, or a file://, http:// or https:// URL")


def image(value: str) -> Optional[Location]:
    return location(value) if value else None


def checksum(value: str) -> Checksum:
    if value == "none":
        return None
    if value in ("sha256:{digest}", "sha512:{digest}"):
        return value[:6], value[7:]
    match = re.fullmatch(r"(sha256|sha512):([0-9a-fA-F]+)", value)
    if match and len(match[2]) == int(match[1][3:]) // 4:
        return match[1], match[2].lower()
    if match or not value.startswith(("/", "file:", "http:", "https:")):
        raise ValueError(
            "none, sha256: with 64 or sha512: with 128 hex digits, or path or URL of a list"
        )
    return location(value)


def signature(value: str) -> Union[str, Location, None]:
    if value in ("none", "inline"):
        return None if value == "none" else value
    if not value.startswith(("/", "file:", "http:", "https:")):
        raise ValueError("none, inline, or path or URL of a detached signature")
    return location(value)


def document(value: str) -> Document:
    if value.startswith("@"):
        if not value.startswith("@/") or "\n" in value:
            raise ValueError("@ and an absolute path on the node, as in @/etc/ganeti/user-data")
        return Document(path=Path(value[1:]))
    if re.fullmatch(r"https?://[\x21-\x7e]+", value):
        return Document(url=location(value).url)
    if value.startswith("base64:"):
        try:
            return Document(data=base64.b64decode(re.sub(r"\s", "", value[7:]), validate=True))
        except (binascii.Error, ValueError):
            raise ValueError("base64: and valid base64 data") from None
    try:
        return Document(data=value.encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError("UTF-8 text (use base64: for binary data)") from None


def password_hash(value: str) -> str:
    """Parse a hash that cloud-init knows from a plain password (cc_set_passwords.py)."""
    if value and not re.fullmatch(r"\$(2a|2y|5|6)(\$[A-Za-z0-9./=,]+){2,3}", value):
        raise ValueError("a hash, not a password: let openssl passwd -6 make one")
    return value


def network(value: str) -> Union[str, Document]:
    if value in ("auto", "dhcp", "none"):
        return value
    own = document(value)
    if own.data is not None and not re.search(rb"version|network", own.data):
        raise ValueError("auto, dhcp, none, or a network-config document (with a version in it)")
    return own


def addresses(value: str) -> tuple[str, ...]:
    try:
        return tuple(str(ipaddress.ip_address(word)) for word in _words(value))
    except ValueError as error:
        raise ValueError(f"IP addresses separated by spaces or commas ({error})") from None


def domains(value: str) -> tuple[str, ...]:
    for word in _words(value):
        if not re.fullmatch(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?", word):
            raise ValueError("domain names separated by spaces or commas")
    return tuple(_words(value))


def _words(value: str) -> list[str]:
    return [word for word in re.split(r"[\s,]+", value) if word]


def file(value: str) -> Optional[Path]:
    return config.absolute_path(value) if value else None
