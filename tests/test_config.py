"""cloudimage.conf, who may have written a file, and what lies on top of what."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib import hooks
from lib.errors import Error
from lib.settings import config, params


def load(folder: Path, text: str) -> config.Config:
    (folder / "cloudimage.conf").write_text(text)
    return config.load(folder, params.NAMES)


def test_the_file_may_be_missing(tmp_path: Path) -> None:
    settings = config.load(tmp_path, params.NAMES)
    assert settings.cache_dir == Path("/var/cache/ganeti-instance-cloudimage")
    assert settings.cache_max_size == 20 << 30
    assert settings.cache_max_age == 30 * 86400
    assert (settings.http_connect_timeout, settings.http_read_timeout) == (10, 60)
    assert settings.http_retries == 5
    assert settings.image_require_checksum is False
    assert settings.export_compression == "zstd"


def test_the_shipped_example_is_the_defaults(tmp_path: Path) -> None:
    lines = (config.BUNDLE / "doc/cloudimage.conf").read_text().split("[defaults]")[0].split("\n")
    text = "\n".join(
        line[1:] if line.startswith("#") and line[1] != " " else line for line in lines
    )
    given, default = load(tmp_path, text), config.load(tmp_path / "none", params.NAMES)
    for field in config.Config.__dataclass_fields__:
        if field not in ("source", "mirrors"):  # a mirror has no default, its line is an example
            assert getattr(given, field) == getattr(default, field), field


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[cache]\nmax_size = lots", "[cache] max_size=lots: must be a size such as 20G"),
        ("[cache]\nmax_age = -1", "[cache] max_age=-1: must be a duration such as 60s, 12h or 30d"),
        ("[cache]\nmax_age = 1month", "[cache] max_age=1month: must be a duration such as 60s"),
        ("[http]\nno_proxy = 10.0.0.0/99", "[http] no_proxy=10.0.0.0/99: must be hosts, .domains"),
        ("[http]\nno_proxy = a.example/8", "[http] no_proxy=a.example/8: must be hosts, .domains"),
        ("[cache]\ndir = cache", "[cache] dir=cache: must be an absolute path"),
        ("[http]\nproxy = proxy:3128", "[http] proxy=proxy:3128: must be a URL such as"),
        ("[http]\nretries = many", "[http] retries=many: must be a number below 1000"),
        ("[image]\nrequire_checksum = 1", "[image] require_checksum=1: must be yes or no"),
        ("[export]\ncompression = lzo", "[export] compression=lzo: must be zstd or none"),
        ("[cash]\n", "unknown section [cash]; did you mean cache?"),
        ("[http]\nno_proxy = a b c/", "[http] no_proxy=a b c/: must be hosts, .domains or net"),
        ("[mirror]\ncloud.debian.org = http://m/", "[mirror] cloud.debian.org: is not an http"),
        ("[mirror]\nhttps://a = mirror", "[mirror] mirror: is not an http or https URL; write"),
        ("[http]\nproxi = x", "unknown key proxi in [http]; did you mean proxy?"),
        ("[defaults]\nuserdata = x", "unknown key userdata in [defaults]; did you mean user_data?"),
        ("# ours\npassword: secret", ": line 2 is before any [section]"),
        (
            "[defaults]\nuser_data = #cloud-config\npassword: secret\nssh_pwauth: true",
            ": line 3 is no KEY = VALUE; indent all lines of a text but its first",
        ),
        ("[cache]\ndir = /", "[cache] dir=/: must be a folder for the cache alone, such as /"),
        ("[cache]\ndir = /etc", "[cache] dir=/etc: must be a folder for the cache alone"),
        ("[cache]\ndir = /bin/cache", "[cache] dir=/bin/cache: must be a folder for the cache"),
        ("[cache]\ndir = /tmp/../var/", "[cache] dir=/tmp/../var/: must be a folder for the"),
        ("[cache]\ndir = /x\ndir = /y", "option 'dir' in section 'cache' already exists"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(Error) as caught:
        load(tmp_path, text)
    assert words in str(caught.value) and "secret" not in str(caught.value)
    assert str(tmp_path / "cloudimage.conf") in str(caught.value)


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "cloudimage.conf").write_bytes(b"\xff\xfe")
    with pytest.raises(Error, match="is not UTF-8 text"):
        config.load(tmp_path, params.NAMES)


def test_what_is_no_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cloudimage.conf")
    with pytest.raises(Error, match=r"/cloudimage\.conf: is not a regular file"):
        config.load(tmp_path, params.NAMES)


def test_a_link_that_leads_nowhere_is_no_missing_file(tmp_path: Path) -> None:
    (tmp_path / "cloudimage.conf").symlink_to("nowhere")
    with pytest.raises(Error, match="reading the configuration: No such file or directory: "):
        config.load(tmp_path, params.NAMES)


def test_folders_that_are_none_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "variants.d").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        params.variant_files(tmp_path)
    (tmp_path / "hooks.d").mkdir()
    (tmp_path / "hooks.d/pre").touch()
    with pytest.raises(NotADirectoryError):
        hooks.find(tmp_path, "pre")


@pytest.mark.parametrize("mode", [0o666, 0o664])
def test_a_file_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "cloudimage.conf"
    path.write_text("")
    path.chmod(mode)
    with pytest.raises(Error, match=f"others than root can write this file .* mode {mode:04o}"):
        config.load(tmp_path, params.NAMES)


@pytest.mark.root
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cloudimage.conf"
    path.write_text("")
    os.chown(path, 1, 1)
    with pytest.raises(Error, match=r"owner 1, mode .*; chown root "):
        config.load(tmp_path, params.NAMES)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0),
        ("512", 512),
        ("1k", 1024),
        ("20G", 20 << 30),
        ("3 GiB", 3 << 30),
        ("1.5G", 3 << 29),
        ("1T", 1 << 40),
    ],
)
def test_sizes(value: str, expected: int) -> None:
    assert config.size_bytes(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("10", 10),
        ("60s", 60),
        ("5 min", 300),
        ("1.5 hours", 5400),
        ("12h", 43200),
        ("30 days", 30 * 86400),
        ("2w", 1209600),
    ],
)
def test_durations(value: str, expected: float) -> None:
    assert config.duration_s(value) == expected
