"""From a Job to an open, verified, raw image: the one page where fetch, check and cache meet."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Optional

from lib import log, run, workspace
from lib.errors import Error, context
from lib.settings import url
from lib.settings.config import Config
from lib.settings.params import Job
from lib.settings.values import Digest, Location
from lib.source import cache, checksum, decode, fetch, index, locations
from lib.source.stored import Note, Stored

LIST_LIMIT_BYTES = 1 << 20


class _RawAlready(Exception):
    """A local image is a raw one: it is used as it is, and nothing is kept of it."""


def store(settings: Config) -> cache.Cache:
    """Return the node's cache of decoded images."""
    return cache.Cache(settings.cache_dir, settings.cache_max_size, settings.cache_max_age)


@contextmanager
def raw_image(job: Job, room_bytes: Optional[int] = None) -> Iterator[cache.Entry]:
    """Hand out the raw image of the job; for as long as the block lasts, the cache keeps it.

    room_bytes: the size of the disk that it is for. What is announced larger is not fetched.
    """
    source = job.source()
    job.require_checksum()
    _warn_unverified(job)
    with ExitStack() as stack:
        refresh: cache.Refresh
        if source.path is None:
            if not isinstance(job.checksum, tuple):  # a pinned digest may need no server
                fetch.prepare(locations.options(job.config))
            key, refresh = _remote_key(job), partial(_refresh, job, room_bytes)
        else:
            file = stack.enter_context(locations.open_image(job, source.path))
            is_roots = _is_roots(file)
            if not is_roots:
                file = stack.enter_context(_private_copy(job, file))
            _check_local(job, file)
            key, refresh = _local_key(job, file, is_roots), partial(_refresh_local, job, file)
        try:
            entry = stack.enter_context(store(job.config).entry(key, refresh))
        except _RawAlready:
            entry = cache.Entry(file, os.fstat(file.fileno()).st_size, {})
        yield entry


def cached(job: Job) -> Optional[Stored]:
    """Return what the cache has for the job now; nobody is asked whether it is still good."""
    source = job.source()
    if source.path is None:
        return store(job.config).peek(_remote_key(job))
    with locations.open_image(job, source.path) as file:
        return store(job.config).peek(_local_key(job, file, _is_roots(file)))


# --- what is expected ------------------------------------------------------------------------


def expected_digest(job: Job) -> Optional[Digest]:
    """Return the digest that the image must have: pinned, or from the (verified) list."""
    if job.checksum is None or isinstance(job.checksum, tuple):
        return job.checksum
    with context("reading the checksum list", str(job.checksum)):
        listing = locations.read(job.checksum, job.config, LIST_LIMIT_BYTES)
        if job.signature == "inline":
            listing = checksum.clearsigned(listing, job.keys())
        elif isinstance(job.signature, Location):
            signature = locations.read(job.signature, job.config, LIST_LIMIT_BYTES)
            checksum.verify_detached(listing, signature, job.keys())
        return checksum.find(
            listing, job.checksum.fragment or job.source().file_name, job.checksum.file_name
        )


def _check_signature(job: Job, file: BinaryIO) -> None:
    """Check a detached signature over the image itself: there is no list then."""
    if job.checksum is None and isinstance(job.signature, Location):
        with context(f"checking the signature {job.signature} of {job.source()}"):
            signature = locations.read(job.signature, job.config, LIST_LIMIT_BYTES)
            checksum.verify_detached(file.fileno(), signature, job.keys())


def _warn_unverified(job: Job) -> None:
    if job.checksum is None and job.signature is None:
        log.warning(f"{job.source()}: no checksum= is given, so nothing proves that it is genuine")


# --- http(s) ---------------------------------------------------------------------------------


def _remote_key(job: Job) -> str:
    """Return what the entry is known by: the URL, and who vouches for what comes from there.

    While a list cannot be had, only what that list named, under the same signature and keys, may
    take its place. A pinned digest is compared with the entry's own, whoever asked for it first.
    """
    key = {"url": _whole(job.source()), "format": job.format}
    if isinstance(job.checksum, Location):
        key["checksum"] = _whole(job.checksum)
        key["name"] = job.checksum.fragment
    if job.signature is not None:
        signature = job.signature
        key["signature"] = _whole(signature) if isinstance(signature, Location) else signature
        with context("reading the keyring"), locations.open_file(job.keys()) as file:
            key["keyring"] = hashlib.sha256(file.read()).hexdigest()
    return json.dumps(key, sort_keys=True)


def _whole(location: Location) -> str:
    """Return the path, or the whole URL but for user and password: the key is never in clear."""
    return str(location.path) if location.url is None else url.parse(location.url).bare


def _refresh(
    job: Job, room_bytes: Optional[int], old: Optional[Note], work: Path
) -> Optional[tuple[Path, Note]]:
    """Ask the server in the cheapest way whether the entry is good; else fetch and decode."""
    try:
        job = index.resolved(job)
        expected = expected_digest(job)
        if old and expected and old["digests"].get(expected[0]) == expected[1]:
            log.step(f"image: {job.source()} is in the cache ({expected[0]} as expected)")
            return None
        known = old if expected is None else None
        address = str(job.source().url)
        return locations.first(
            job.config, address, lambda place: _fetch(job, place, expected, known, work, room_bytes)
        )
    except (fetch.Unavailable, checksum.Mismatch) as error:
        if old is None or isinstance(job.checksum, tuple):
            raise
        log.warning(f"{error.message}; using the copy in the cache, fetched {old['fetched']}")
        return None


def _fetch(
    job: Job,
    place: str,
    expected: Optional[Digest],
    known: Optional[Note],
    work: Path,
    room_bytes: Optional[int],
) -> Optional[tuple[Path, Note]]:
    """Download, verify and decode; None if the server says that the known entry is current.

    place: the image's URL, or its mirror's. What one server's ETag stands for no other may confirm.
    """
    server = hashlib.sha256(url.parse(place).bare.encode()).hexdigest()
    if known is None or known.get("server") != server:
        known = {}
    algorithm = expected[0] if expected else "sha256"
    path = work / "download"
    with path.open("w+b") as file, _Decoding(job, file, work) as decoding:
        response = fetch.download(
            place,
            file,
            _options(job.config, room_bytes),
            algorithms=(algorithm,),
            etag=known.get("etag"),
            last_modified=known.get("last_modified"),
            need_framing=expected is None,
            begun=decoding.begun,
        )
        if response is None:
            log.step(f"image: {job.source()} is in the cache (not modified)")
            return None
        decoder = decoding.complete()
        if expected is not None:
            actual = response.digests[algorithm]
            if actual != expected[1] and isinstance(job.checksum, Location):
                # the list and the image of a "latest" URL change one after the other
                expected = expected_digest(job) or expected
            checksum.check(expected, actual, str(job.source()))
        _check_signature(job, file)
        if known.get("digests") == response.digests:
            return None  # a server without validators sent the same again
        with context(f"decoding {job.source()}"):
            raw = decoder.result().path
    if raw is None:  # the download is it, with its zeroes written out
        raw = path
        run.run(["fallocate", "--dig-holes", os.fspath(raw)])
    return raw, {
        "url": log.redact(_whole(job.source())),
        "server": server,
        "digests": dict(response.digests),
        "etag": response.etag,
        "last_modified": response.last_modified,
        "download_bytes": response.size_bytes,
        "fetched": _now(),
    }


def _options(settings: Config, room_bytes: Optional[int]) -> fetch.Options:
    """Return how to download: with the disk may come snapshots, and 8 GiB beside it in an archive.

    The decoder has the limits that count; this one is for what can only be a mistake.
    """
    options = locations.options(settings)
    if room_bytes is None:
        return options
    limit = 2 * room_bytes + (8 << 30)  # archive.BESIDE_BYTES
    if limit >= options.max_size_bytes:
        return options
    hint = "it cannot fit on the disk; make that larger (--disk 0:size=...)"
    return replace(options, max_size_bytes=limit, max_size_hint=hint)


# --- files of the node -----------------------------------------------------------------------


def _check_local(job: Job, file: BinaryIO) -> None:
    """Check digest and signature of a local image, at every use."""
    expected = expected_digest(job)
    if expected is not None:
        checksum.check(expected, checksum.digest(file, expected[0]), str(job.source()))
    _check_signature(job, file)


def _local_key(job: Job, file: BinaryIO, is_roots: bool) -> str:
    """Return what the entry is known by: what others can change, by its content."""
    identity: dict[str, Any] = {"path": str(job.source().path), "format": job.format}
    if is_roots:
        status = os.fstat(file.fileno())
        identity |= {"size": status.st_size, "mtime": status.st_mtime_ns, "inode": status.st_ino}
    else:
        identity["sha256"] = checksum.digest(file, "sha256")
    return json.dumps(identity, sort_keys=True)


def _refresh_local(
    job: Job, file: BinaryIO, old: Optional[Note], work: Path
) -> Optional[tuple[Path, Note]]:
    """Decode a local image; its key says all that could make an entry stale."""
    if old is not None:
        return None
    with _Decoding(job, file, work) as decoding:
        decoder = decoding.complete()
        with context(f"decoding {job.source()}"):
            raw = decoder.result()
    if raw.path is None:
        raise _RawAlready
    return raw.path, {"url": f"file://{job.source().path}", "digests": {}, "fetched": _now()}


def _is_roots(file: BinaryIO) -> bool:
    """Whether nobody but root can change the file between the look at it and its use."""
    status = os.fstat(file.fileno())
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


@contextmanager
def _private_copy(job: Job, file: BinaryIO) -> Iterator[BinaryIO]:
    """Hand out a copy that only root can change, for as long as the block lasts."""
    with ExitStack() as stack:
        try:
            work = stack.enter_context(store(job.config).workspace())
        except Error:  # entry() will say so
            work = stack.enter_context(workspace.folder(cache.FALLBACK))
        with (work / "copy").open("xb") as copy:
            names = [f"/proc/self/fd/{each.fileno()}" for each in (file, copy)]
            run.run(
                ["cp", "--reflink=auto", "--sparse=always", *names],
                descriptors=[file.fileno(), copy.fileno()],
            )
        yield stack.enter_context((work / "copy").open("rb"))


# --- decoding --------------------------------------------------------------------------------


class _Decoding(ExitStack):
    """The decoding of a file, which may begin while the file is still coming."""

    def __init__(self, job: Job, file: BinaryIO, work: Path) -> None:
        super().__init__()
        limit = job.config.image_max_virtual_size
        self._started = partial(decode.started, file, job.format, limit, work)
        self._decoder: Optional[decode.Decoder] = None

    def begun(self, total_bytes: Optional[int]) -> None:
        """Take note that the file begins, maybe anew; only with a length can it be decoded yet."""
        self.close()
        self._decoder = self.enter_context(self._started(total_bytes)) if total_bytes else None

    def complete(self) -> decode.Decoder:
        """Take note that all of the file is there; return the decoder, at work on it."""
        if self._decoder is None:
            return self.enter_context(self._started())
        self._decoder.complete()
        return self._decoder


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
