"""What a URL says, and what is none."""

from __future__ import annotations

import pytest

from lib.errors import Error
from lib.settings import url


@pytest.mark.parametrize(
    ("text", "bare", "host"),
    [
        ("http://evil?x=@good/img.raw", "http://evil?x=@good/img.raw", "evil"),
        ("http://evil#@good/img.raw", "http://evil", "evil"),
        ("http://user:pw@Good:8080/a?b=c", "http://Good:8080/a?b=c", "good"),
        ("https://[2001:db8::1]/a", "https://[2001:db8::1]/a", "2001:db8::1"),
        ("http://good/a@b", "http://good/a@b", "good"),
    ],
)
def test_parts(text: str, bare: str, host: str) -> None:
    found = url.parse(text)
    assert (found.bare, found.host) == (bare, host)
    assert "pw" not in repr(found)


def test_credentials_and_name() -> None:
    found = url.parse("https://me:p%40ss@host/SHA256SUMS?build=2#a.qcow2")
    assert found.credentials == (b"me", b"p@ss")
    assert found.fragment == "a.qcow2"
    assert found.origin == ("https", "host", 443)


@pytest.mark.parametrize(
    "text",
    [
        "http://good\\@evil/",
        "http://a b/",
        "http:///x",
        "ftp://h/",
        "http://h:99999/",
        "http://h\n/",
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(Error, match=r"is malformed|is not an http"):
        url.parse(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/a@2x.img?sig=1", "https://***@host/a@2x.img?***"),
        ("https://me:p/w@host/a?sig=1", "https://***@host/a?***"),
        ("https://me:p#w@host/a", "https://***@host/a"),
        ("https://me:p?w@host/a", "https://***@"),
        ("https://me:p/w@host/a?mail=me@host&sig=1", "https://***@"),
        ("proxy:3128", "proxy:3128"),
    ],
)
def test_what_a_log_may_show(text: str, shown: str) -> None:
    assert url.shown(text) == shown
