"""An entry of the cache on disk: the note, and the raw file that it names and must fit."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lib.errors import Error, describe
from lib.files import open_regular

# Raise this when the checks of downloads or images get stronger: what was let in by the weaker
# ones must not be used again.
CHECKS_VERSION = 2

NOTE_LIMIT_BYTES = 1 << 20
# a local image's has no validators
NOTE_KEYS: Mapping[str, Any] = {
    "url": str,
    "digests": dict,
    "fetched": str,
    "etag": (str, type(None)),
    "last_modified": (str, type(None)),
}

Note = Mapping[str, Any]  # JSON


@dataclass(frozen=True)
class Stored:
    """An entry as `cloudimage cache` lists it; times in seconds before now."""

    raw: Path
    note: Note
    allocated_bytes: int
    age_s: float
    idle_s: float  # since the last use

    @property
    def name(self) -> str:
        """The sha256 of the entry's key."""
        return self.raw.name.partition(".")[0]

    @property
    def in_use(self) -> bool:
        """Whether some process has the entry open right now."""
        try:
            with open(self.raw, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    @classmethod
    def read(cls, directory: Path, name: str) -> Optional[Stored]:
        """Read the note; None if there is none, ValueError if it is damaged or fits no raw file."""
        path = directory / f"{name}.json"
        try:
            with open_regular(path, follow=False) as file:
                used = os.fstat(file.fileno()).st_mtime
                note = json.loads(file.read(NOTE_LIMIT_BYTES))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(describe(error)) from error
        except Error as error:
            raise ValueError(error.message) from error
        except (ValueError, RecursionError) as error:
            raise ValueError("is not a JSON object") from error
        check_note(note)
        if note.get("version") != CHECKS_VERSION:
            raise ValueError(f"is of version {note.get('version')!r}, not {CHECKS_VERSION}")
        named = note.get("file")
        if not isinstance(named, str) or not re.fullmatch(rf"{name}\.[0-9a-f]{{16}}\.raw", named):
            raise ValueError(f"names the file {named!r}, which is none of this entry")
        raw = directory / named
        try:
            status = raw.lstat()
        except OSError as error:
            raise ValueError(describe(error)) from error
        found = (stat.S_ISREG(status.st_mode), status.st_size, status.st_mtime_ns)
        if found != (True, note.get("size"), note.get("mtime_ns")):
            raise ValueError(f"does not fit {named}, which was changed since")
        now = time.time()
        return cls(raw, note, status.st_blocks * 512, now - status.st_mtime, now - used)


def check_note(note: Any) -> None:
    """Raise a ValueError unless it is a note, with all that those who read one rely on."""
    if not isinstance(note, dict):
        raise ValueError("is not a JSON object")
    for key, kinds in NOTE_KEYS.items():
        if not isinstance(note.get(key), kinds):
            raise ValueError(f"has no {key} that makes sense")


def publish(directory: Path, name: str, work: Path, raw: Path, note: Note) -> None:
    """Put the raw file in place, then the note that names it: the second rename commits."""
    file = f"{name}.{secrets.token_hex(8)}.raw"
    with open(raw, "rb") as source:
        os.fsync(source)
        status = os.fstat(source.fileno())
    os.rename(raw, directory / file)
    identity = {"file": file, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    text = json.dumps({**note, **identity, "version": CHECKS_VERSION}, indent=2)
    with open(work / "note", "x") as output:
        output.write(text + "\n")
        output.flush()
        os.fsync(output)
    os.replace(work / "note", directory / f"{name}.json")
    # Should a crash keep the second rename and not the first, then the note fits no file.
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
