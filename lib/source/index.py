"""Images without a "latest" name: the newest build's name is looked up in an index of the vendor.

A variant says `index`, the URL of a small text (a directory's listing, JSON), and `index_match`, a
regular expression with named groups; {GROUP} in image, checksum and signature becomes what the
group matched, of the newest match. So no vendor's format needs code, and no index can lead to
another host: only the places in braces are its.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Optional

from lib.errors import Error, context
from lib.settings.params import Job
from lib.settings.values import Location, names
from lib.source import locations
from lib.source.checksum import Mismatch

LIMIT_BYTES = 4 << 20
_VALUE = re.compile(r"[A-Za-z0-9._-]{1,80}")


def resolved(job: Job) -> Job:
    """Return the job with the names of the newest build; as it is if it has no index.

    Mismatch if the index has none of the kind: what is in the cache may serve meanwhile.
    """
    parts = {name: getattr(job, name) for name in ("image", "checksum", "signature")}
    if job.index is None or not any(map(names, parts.values())):
        return job
    with context("reading the index", str(job.index)):
        text = locations.read(job.index, job.config, LIMIT_BYTES).decode("utf-8", "replace")
        values = _newest(text, job.index_match)
    return replace(job, **{name: _filled(each, values) for name, each in parts.items()})


def _newest(text: str, pattern: str) -> dict[str, str]:
    found = [match.groupdict() for match in re.finditer(pattern, text)]
    sound = [each for each in found if all(_VALUE.fullmatch(v or "") for v in each.values())]
    if not sound:
        raise Mismatch(f"nothing in it matches index_match {pattern[:120]!r}", "see the variant")
    return max(sound, key=_version)


def _version(groups: dict[str, str]) -> list[tuple[int, str]]:
    """Return what orders builds: numbers in them count as such, digests do not."""
    words = re.findall(r"[0-9]+|[a-z]+", " ".join(groups[k] for k in groups if k != "digest"))
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in words]


def _filled(value: Any, values: dict[str, str]) -> Any:
    def fill(text: Optional[str]) -> Optional[str]:
        return text and re.sub(r"\{(\w+)\}", lambda each: values[each[1]], text)

    if isinstance(value, Location) and value.url is not None:
        return Location(url=fill(value.url))
    if isinstance(value, tuple):
        algorithm, digest = value[0], fill(value[1]) or ""
        if not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{128}", digest):
            raise Error(f"{digest[:80]!r} is not a {algorithm} digest")
        return algorithm, digest
    return value
