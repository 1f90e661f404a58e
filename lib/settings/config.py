"""The administrator's files: where they are, who may have written them, what they say.

The bundle ships variants and hooks; the configuration directory comes on top of them.
"""

from __future__ import annotations

import configparser
import difflib
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lib.errors import Error, describe, several
from lib.files import open_regular
from lib.log import printable
from lib.settings import url

BUNDLE = Path(__file__).resolve().parent.parent.parent
DIRECTORY = Path("/etc/ganeti/instance-cloudimage")
FILE_LIMIT_BYTES = 1 << 20

# where the cache may not be: in these folders, or as one of those
_SYSTEM = set(
    map(Path, ["/bin", "/boot", "/dev", "/etc", "/lib", "/proc", "/sbin", "/sys", "/usr"])
)
_SHARED = {
    *map(Path, ["/", "/home", "/media", "/mnt", "/opt", "/root", "/run", "/srv", "/tmp", "/var"]),
    *map(Path("/var").joinpath, ["cache", "lib", "log", "mail", "opt", "spool", "tmp"]),
}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_NO_PROXY = re.compile(
    r"\*|[0-9A-Fa-f:]+|\.?[A-Za-z0-9_.-]+(:[0-9]{1,5})?|[0-9.]{7,15}/([1-9]|[12][0-9]|3[0-2])"
)
_SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 7 * 86400}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint for an unknown name: the known one nearest to it, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"


def require_trusted(path: Path) -> None:
    """Raise an Error if others than root (or whoever runs this) can write the file or folder."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "file"
        raise Error(
            f"{path}: others than root can write this {kind} (owner {status.st_uid},"
            f" mode {stat.S_IMODE(status.st_mode):04o})",
            f"chown root {path} && chmod go-w {path}",
        )


def read_ini(
    path: Path, sections: Mapping[str, Optional[Collection[str]]]
) -> dict[str, dict[str, str]]:
    """Read an INI file whose sections and keys must all be known; Error lists every problem.

    sections: the keys of each; None for a section whose keys may be any.
    """
    try:
        require_trusted(path)
        with open_regular(path) as file:
            text = file.read(FILE_LIMIT_BYTES + 1).decode("utf-8")
    except UnicodeDecodeError:
        raise Error(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise Error(f"reading the configuration: {describe(error)}") from error
    if len(text) > FILE_LIMIT_BYTES:
        raise Error(f"{path}: is larger than 1 MiB")
    parser = configparser.ConfigParser(
        delimiters=("=",), comment_prefixes=("#", ";"), interpolation=None, default_section=""
    )
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    try:
        parser.read_string(text, os.fspath(path))
    # the words of these two quote a line, which may be one of user data
    except configparser.MissingSectionHeaderError as error:
        raise Error(f"{path}: line {error.lineno} is before any [section]") from error
    except configparser.ParsingError as error:
        words = f"line {error.errors[0][0]} is no KEY = VALUE"
        raise Error(f"{path}: {words}", "indent all lines of a text but its first") from error
    except configparser.Error as error:
        raise Error(f"{path}: {printable(' '.join(str(error).split()), 200)}") from error
    problems = []
    for section in parser.sections():
        if section not in sections:
            problems.append(
                f"{path}: unknown section [{section}]; {nearest(section, sections)}",
            )
            continue
        keys = sections[section]
        if keys is None:
            continue
        for key in parser[section]:
            if key not in keys:
                problems.append(f"{path}: unknown key {key} in [{section}]; {nearest(key, keys)}")
    if problems:
        raise several(problems)
    return {name: dict(parser[name]) for name in parser.sections()}


def overlay(directory: Path, folder: str, accept: Callable[[Path], bool]) -> list[Path]:
    """Return the accepted files of the bundle's `folder`, then of the configuration's.

    Each in name order; a file of the configuration takes the place of the bundle's of its name.
    """
    names: dict[str, Path] = {}
    for base in (BUNDLE, directory):
        if os.path.lexists(base / folder):  # a link may lead nowhere
            require_trusted(base / folder)
            for path in sorted((base / folder).iterdir()):
                if accept(path):
                    names[path.name] = path
    return list(names.values())


# --- cloudimage.conf -----------------------------------------------------------------------


def _cache_dir(value: str) -> Path:
    """Parse the cache's folder: never one that the system or others have files in."""
    path = absolute_path(value)
    real = Path(os.path.realpath(path))
    if real in _SHARED or _SYSTEM & {real, *real.parents}:
        raise ValueError("a folder for the cache alone, such as /srv/cloudimage-cache")
    return path


def size_bytes(value: str) -> int:
    """Parse a size: a number with K, M, G or T (binary, as for gnt-instance --disk)."""
    number = r"([0-9]{1,15}(?:\.[0-9]{1,9})?)"
    match = re.fullmatch(rf"{number}\s*([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
    if not match:
        raise ValueError("a size such as 20G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def duration_s(value: str) -> float:
    """Parse a duration: seconds, or a number with s, m, h, d or w (or more of the word)."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)\s*([a-z]*)", value.strip())
    units = [seconds for word, seconds in _SECONDS.items() if match and word.startswith(match[2])]
    if not match or not units:
        raise ValueError("a duration such as 60s, 12h or 30d")
    return float(match[1]) * units[0]


def _timeout_s(value: str) -> float:
    seconds = duration_s(value)
    if not 0.1 <= seconds <= 3600:
        raise ValueError("a duration from 0.1s to 1h, such as 60s")
    return seconds


def _age_s(value: str) -> float:
    return duration_s(value + "d" if value.isdecimal() else value)


def yes_no(value: str) -> bool:
    """Parse yes or no."""
    if value not in ("yes", "no"):
        raise ValueError("yes or no")
    return value == "yes"


def absolute_path(value: str) -> Path:
    """Parse an absolute path."""
    if not value.startswith("/"):
        raise ValueError("an absolute path")
    return Path(value)


def _paths(value: str) -> tuple[Path, ...]:
    return tuple(absolute_path(part) for part in re.split(r"[\s,:]+", value) if part)


def _optional_path(value: str) -> Optional[Path]:
    return absolute_path(value) if value else None


def _proxy(value: str) -> Optional[str]:
    if not value:
        return None
    try:
        url.parse(value)
    except Error:
        raise ValueError(
            "a URL such as http://proxy.example.com:3128 (in a password write @ as %40)"
        ) from None
    return value


def _no_proxy(value: str) -> str:
    """Parse proxy exceptions: hosts, domains and their subdomains, IPv4 networks, or *."""
    words = [word for word in re.split(r"[\s,]+", value) if word]
    if not all(map(_NO_PROXY.fullmatch, words)):
        raise ValueError("hosts, .domains or networks such as 10.0.0.0/8, separated by commas")
    return ",".join(words)


def _count(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", value):
        raise ValueError("a number below 1000")
    return int(value)


def _compression(value: str) -> str:
    if value not in ("zstd", "none"):
        raise ValueError("zstd or none")
    return value


# section, key, parser, default: what the settings mean is told in the README
_SETTINGS: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
    ("cache", "dir", _cache_dir, "/var/cache/ganeti-instance-cloudimage"),
    ("cache", "max_size", size_bytes, "20G"),
    ("cache", "max_age", _age_s, "30d"),
    ("http", "proxy", _proxy, ""),
    ("http", "no_proxy", _no_proxy, ""),
    ("http", "ca_bundle", _optional_path, ""),
    ("http", "connect_timeout", _timeout_s, "10s"),
    ("http", "read_timeout", _timeout_s, "60s"),
    ("http", "retries", _count, "5"),
    ("image", "require_checksum", yes_no, "no"),
    ("image", "max_virtual_size", size_bytes, "256G"),
    ("image", "local_paths", _paths, ""),
    ("export", "compression", _compression, "zstd"),
)


@dataclass(frozen=True)
class Config:
    """cloudimage.conf, parsed; `defaults` is its section of OS parameters, as text."""

    cache_dir: Path
    cache_max_size: int  # bytes
    cache_max_age: float  # seconds since the last use
    http_proxy: Optional[str]
    http_no_proxy: str  # separated by commas
    http_ca_bundle: Optional[Path]
    http_connect_timeout: float  # seconds
    http_read_timeout: float  # seconds
    http_retries: int
    image_require_checksum: bool
    image_max_virtual_size: int  # bytes
    image_local_paths: tuple[Path, ...]  # empty: every path
    export_compression: str
    defaults: Mapping[str, str]
    deadline: Optional[float]  # of time.monotonic(): for the whole of a door's questions
    mirrors: Mapping[str, str]  # the beginning of a URL -> what a mirror has in its place
    source: Path

    def places(self, address: str) -> list[str]:
        """Return where to ask for a URL: the mirror of the longest beginning first, then itself."""
        bare = url.parse(address).bare
        found = [each for each in self.mirrors if bare.startswith(each)]
        longest = max(found, key=len, default=None)
        if longest is None:
            return [address]
        return [self.mirrors[longest] + bare[len(longest) :], address]


def load(directory: Path, parameters: Collection[str]) -> Config:
    """Read cloudimage.conf; `parameters` are the keys that [defaults] may have.

    The file may be missing and so may every key.
    """
    path = directory / "cloudimage.conf"
    known: dict[str, Optional[list[str]]] = {"defaults": list(parameters), "mirror": None}
    for section, key, _parse, _default in _SETTINGS:
        keys = known.setdefault(section, [])
        assert keys is not None  # only mirror has keys of any name
        keys.append(key)
    given = read_ini(path, known) if os.path.lexists(path) else {}  # a link may lead nowhere
    values: dict[str, Any] = {}
    problems = []
    for section, key, parse, default in _SETTINGS:
        value = given.get(section, {}).get(key, default)
        try:
            values[f"{section}_{key}"] = parse(value)
        except ValueError as error:
            problems.append(f"{path}: [{section}] {key}={url.shown(value)}: must be {error}")
    mirrors = {}
    for pair in given.get("mirror", {}).items():
        try:
            origin, _mirror = (url.parse(each).bare.rstrip("/") + "/" for each in pair)
            mirrors[origin] = pair[1].rstrip("/") + "/"  # with user and password, if it has them
        except Error as error:
            problems.append(f"{path}: [mirror] {error.message}; write https://ORIGIN = URL")
    if problems:
        raise several(problems)
    return Config(
        **values, defaults=given.get("defaults", {}), deadline=None, mirrors=mirrors, source=path
    )
