"""Where a Job's files and documents are: paths of the node, opened with care, and URLs.

fetch, and with it Python's HTTP and TLS, is imported only where a URL is asked for: verify has to
answer at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Optional, TypeVar

from lib import log
from lib.errors import Error
from lib.files import open_regular
from lib.settings.config import Config
from lib.settings.params import Job
from lib.settings.values import Document, Location

if TYPE_CHECKING:
    from lib.source import fetch

T = TypeVar("T")


def open_file(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a file of the node that has something in it; Error for any other."""
    try:
        file = open_regular(path, follow=follow)
    except OSError as error:
        raise Error(f"{path}: {error.strerror}") from error
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise Error(f"{path}: is empty")
    return file


def options(settings: Config) -> fetch.Options:
    """Return how to talk to HTTP servers, from cloudimage.conf."""
    from lib.source import fetch

    return fetch.Options(
        proxy=settings.http_proxy,
        no_proxy=settings.http_no_proxy,
        ca_bundle=settings.http_ca_bundle,
        connect_timeout_s=settings.http_connect_timeout,
        read_timeout_s=settings.http_read_timeout,
        retries=settings.http_retries,
        max_size_bytes=settings.image_max_virtual_size,
        deadline=settings.deadline,
    )


def first(settings: Config, url: str, ask: Callable[[str], T]) -> T:
    """Return what the first place has for a URL: its mirror, or where that fails the URL itself."""
    *mirrors, origin = settings.places(url)
    for mirror in mirrors:
        try:
            return ask(mirror)
        except Error as error:
            log.warning(f"the mirror fails, trying {log.redact(origin)}: {error.message}")
    return ask(origin)


def size(url: str, settings: Config) -> Optional[int]:
    """Return the bytes at a URL, or its mirror; None if nothing tells; Error for a definite no."""
    from lib.source import fetch

    return first(settings, url, lambda place: fetch.size(place, options(settings)))


def read(location: Location, settings: Config, limit_bytes: int) -> bytes:
    """Read a small file of the node or of a server."""
    if isinstance(location, Document) and location.data is not None:
        data = location.data
    elif location.url is not None:
        from lib.source import fetch

        return first(
            settings, location.url, lambda url: fetch.read(url, options(settings), limit_bytes)
        )
    else:
        assert location.path is not None
        # a text that ends up in the guest must not be another file of the node's
        with open_file(location.path, follow=not isinstance(location, Document)) as file:
            data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise Error(f"{location}: is larger than {log.size(limit_bytes)}")
    return data


def open_image(job: Job, path: Path) -> BinaryIO:
    """Open an image of the node; Error if it is outside the allowed folders."""
    allowed = job.config.image_local_paths
    file = open_file(path)
    # the name of what was opened, not of what the path stands for by now
    real = Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    if allowed and not any(base.resolve() in real.parents for base in allowed):
        file.close()
        raise Error(
            f"image={path}: is outside [image] local_paths of cloudimage.conf",
            f"move it below {allowed[0]}",
        )
    return file
