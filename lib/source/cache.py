"""The node's cache of decoded images: what is in its directory, and who may change it when.

An entry called NAME (the sha256 of its key) is made of

    NAME.json       the note; the entry exists if and only if this is whole and fits the raw file
    NAME.HEX.raw    the image, sparse; its mtime says when it was made
    NAME.lock       flock, exclusive: without it nobody changes or opens any file of NAME
    NAME.work/      where the holder of that lock fills the entry

and an open entry keeps a shared flock on its raw file, so that it is not evicted. Everything else
that begins with NAME was left by a killed process, or has just been replaced: one sweep under the
lock, before and after each fill, removes it. The note's mtime is the time of the last use.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Callable, Optional

from lib import log, workspace
from lib.errors import Error, causes, context, describe
from lib.source.stored import Note, Stored, publish

FALLBACK = Path("/var/tmp")
SAFE = "let nobody but root write there, or change dir in [cache] of cloudimage.conf"
Refresh = Callable[[Optional[Note], Path], Optional[tuple[Path, Note]]]


@dataclass(frozen=True)
class Entry:
    """An image in use: `file` is open, in a cache also locked, whatever happens to its name."""

    file: BinaryIO
    size_bytes: int
    note: Note


def entry_name(key: str) -> str:
    """Return what the files of this key's entry are called by."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class Cache:
    """The directory and its limits: bytes on disk (holes are free), seconds since the last use."""

    directory: Path
    max_size_bytes: int
    max_age_s: float

    def entry(self, key: str, refresh: Refresh) -> AbstractContextManager[Entry]:
        """Open the entry of `key`, made or revalidated by `refresh`; it is not evicted meanwhile.

        refresh(note, work) runs under the entry's lock; processes that want the same entry wait,
        and then their own refresh sees the new note. It gets the note of the entry, or None, and a
        private empty directory; it returns None if the entry is still good, or else the complete
        raw file (in that directory) and its note. What it raises passes through, and the old entry
        stays; only a full file system is put into words of our own. A directory that cannot be used
        is a WARNING, and the image is made in a temporary one, for this use only.
        """
        return self.adopt(entry_name(key), refresh)

    @contextmanager
    def adopt(self, name: str, refresh: Refresh) -> Iterator[Entry]:
        """Do what entry() does, for an entry that is known by its name only: another node's."""
        with ExitStack() as filling:
            try:
                with context(f"cache {self.directory}"):
                    self._make_directory()
                    work = filling.enter_context(self._filling(name))
            except Error as error:
                log.warning(f"{error}; this image goes to {FALLBACK} and is not kept")
                file, note = _uncached(refresh)
            else:
                file, note = self._refreshed(name, refresh, work)
        with file:
            yield Entry(file, os.fstat(file.fileno()).st_size, note)

    def peek(self, key: str) -> Optional[Stored]:
        """Return the entry of `key` as it is, asking nobody and changing nothing; None for none."""
        name = entry_name(key)
        return self._look(name) if self._names().get(name) else None

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """Make a private folder where the images are, for the block only."""
        with ExitStack() as stack:
            with context(f"cache {self.directory}"):
                self._make_directory()
                work = stack.enter_context(workspace.folder(self.directory))
            yield work

    def entries(self) -> list[Stored]:
        """List what is cached, the least recently used first; Error if the directory is unsafe."""
        # A second look finds the entry that was replaced between note and raw file at the first.
        found = (self._look(name) or self._look(name) for name in self._names())
        return sorted((each for each in found if each), key=lambda each: -each.idle_s)

    def prune(self, everything: bool = False) -> list[Stored]:
        """Remove leftovers and what is too old or too much, or all; never an entry in use.

        Returns the removed entries. Error if the directory is unsafe.
        """
        names = self._names()
        workspace.sweep(self.directory)
        for name, files in names.items():
            if files - _files(self._look(name)):
                with self._locked(name, wait=False) as locked:
                    if locked:
                        self._sweep(name)
        entries = self.entries()
        excess_bytes = sum(each.allocated_bytes for each in entries) - self.max_size_bytes
        removed = []
        for each in entries:
            due = everything or each.idle_s > self.max_age_s or excess_bytes > 0
            if due and self._remove(each.name):
                excess_bytes -= each.allocated_bytes
                removed.append(each)
        return removed

    def _tidy(self) -> None:
        for each in self.prune():
            words = f"{log.size(each.allocated_bytes)}, unused for {each.idle_s / 86400:.0f} days"
            log.step(f"cache: removed {each.note['url']} ({words})")

    def _make_directory(self) -> None:
        """Make the directory and its parents where they are missing; Error if it is unsafe."""
        for path in (*reversed(self.directory.parents), self.directory):
            with suppress(FileExistsError):
                path.mkdir(0o700)
                path.chmod(0o700 if path == self.directory else 0o755)  # whatever the umask
        self._check_directory()

    def _check_directory(self) -> None:
        """Raise an Error if others could put files into the directory, or another in its place."""
        if not stat.S_ISDIR(self.directory.lstat().st_mode):
            raise Error("is a symbolic link or no directory", SAFE)
        real = self.directory.resolve()
        # as it resolves now, and each name on the way, for whoever owns a link's folder can turn it
        for path in (real, *real.parents, *self.directory.parents):
            status = path.stat()
            if status.st_uid != os.geteuid() and (path == real or status.st_uid != 0):
                raise Error(f"{path} belongs to user {status.st_uid}", SAFE)
            sticky = path != real and status.st_mode & stat.S_ISVTX
            mode = stat.S_IMODE(status.st_mode)
            if mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
                raise Error(f"{path} can be written by others, mode {mode:04o}", SAFE)

    def _path(self, name: str, kind: str) -> Path:
        return self.directory / f"{name}.{kind}"

    def _names(self) -> dict[str, set[str]]:
        """Return the files of the directory by entry; what does not look like ours is not ours."""
        names: dict[str, set[str]] = {}
        if os.path.lexists(self.directory):
            with context(f"cache {self.directory}"):
                self._check_directory()
                for file in os.listdir(self.directory):
                    if re.fullmatch(r"[0-9a-f]{64}\..+", file):
                        names.setdefault(file[:64], set()).add(file)
        return names

    @contextmanager
    def _locked(self, name: str, wait: bool) -> Iterator[bool]:
        """Hold the entry's lock; without `wait` the block may run without it, and is told so.

        The lock file goes with the entry. So who gets the lock must look whether it still is the
        file of that name: if not, whoever removed it had the lock, and another may have it now.
        """
        path = self._path(name, "lock")
        told = False
        while True:
            with open(path, "ab", opener=_own) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        yield False
                        return
                    if not told:
                        log.step("cache: waiting for another process that fetches this image")
                        told = True
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_named(file, path):
                    continue
                try:
                    yield True
                finally:
                    if not self._path(name, "json").exists():
                        with suppress(OSError):
                            path.unlink()
                return

    @contextmanager
    def _filling(self, name: str) -> Iterator[Path]:
        """Hold the entry's lock, and make and remove its work directory."""
        with self._locked(name, wait=True):
            self._sweep(name)
            self._tidy()
            work = self._path(name, "work")
            work.mkdir(0o700)
            try:
                yield work
            finally:
                self._sweep(name)

    def _refreshed(self, name: str, refresh: Refresh, work: Path) -> tuple[BinaryIO, Note]:
        """Let `refresh` judge or make the entry, and open it; the lock must be held."""
        with _no_space_explained(self.directory, work):
            old = Stored.read(self.directory, name)
            made = refresh(None if old is None else old.note, work)
            if made is not None:
                publish(self.directory, name, work, *made)
        stored = Stored.read(self.directory, name)
        assert stored is not None  # refresh() keeps only what there is
        file = stored.raw.open("rb")
        fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(self._path(name, "json"))
        if made is not None:
            self._tidy()
        return file, stored.note

    def _look(self, name: str) -> Optional[Stored]:
        """Read the note without the lock: damaged may as well mean that it was just replaced."""
        with suppress(ValueError):
            return Stored.read(self.directory, name)
        return None

    def _remove(self, name: str) -> bool:
        """Remove the entry unless it is in use or being filled; say whether it is gone."""
        with self._locked(name, wait=False) as locked:
            stored = self._look(name) if locked else None
            if stored is None or stored.in_use:
                return False
            self._path(name, "json").unlink()
            self._sweep(name)
        return True

    def _sweep(self, name: str) -> None:
        """Delete what begins with the entry's name but does not belong to it; the lock is held."""
        keep = {f"{name}.lock"}
        try:
            keep |= _files(Stored.read(self.directory, name))
        except ValueError as error:
            log.warning(f"{self._path(name, 'json')}: {error}; this entry is dropped")
        for path in self.directory.glob(f"{name}.*"):
            if path.name not in keep:
                try:
                    is_folder = path.is_dir() and not path.is_symlink()
                    (shutil.rmtree if is_folder else os.unlink)(path)
                except OSError as error:
                    log.warning(f"cleaning the cache: {describe(error)}")


def _files(stored: Optional[Stored]) -> set[str]:
    """Return the names of the files that make up an entry, none for no entry."""
    if stored is None:
        return set()
    return {f"{stored.name}.json", f"{stored.name}.lock", stored.raw.name}


def _own(path: str, flags: int) -> int:
    """Open a lock file: what is none leads nowhere else and keeps nobody waiting."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def _is_named(file: IO[bytes], path: Path) -> bool:
    """Say whether the open file still is the one that the name stands for."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    return False


def _uncached(refresh: Refresh) -> tuple[BinaryIO, Note]:
    """Make the image in a temporary directory; it has no name any more when this returns."""
    with workspace.folder(FALLBACK) as work:
        with _no_space_explained(work.parent, work):
            made = refresh(None, work)
        assert made is not None  # refresh() keeps only what there is
        return open(made[0], "rb"), made[1]


@contextmanager
def _no_space_explained(directory: Path, work: Path) -> Iterator[None]:
    """Turn what fails in the block because the file system is full into an Error with the way out.

    A program that wrote for us tells why only in its own words, so the file system is asked too.
    """
    try:
        yield
    except (Error, OSError) as error:
        if not (any(map(_is_full, causes(error))) or _has_no_room(work)):
            raise
        words = describe(error) if isinstance(error, OSError) else error.message
        written = log.size(sum(path.lstat().st_blocks * 512 for path in work.rglob("*")))
        raise Error(
            f"no space left in {directory} after {written} of the image ({words})",
            "run cloudimage prune, or change dir or lower max_size in [cache] of cloudimage.conf",
        ) from error


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _has_no_room(directory: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, 4 << 20)
    except OSError as error:
        return _is_full(error)
    return False
