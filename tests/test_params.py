"""Settings: every parameter's good and bad values, the layers, and what must not be combined."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest

from lib.environment import Environment
from lib.errors import Error
from lib.settings import config, params, values

HEX = {"sha256": "ab" * 32, "sha512": "cd" * 64}


@pytest.fixture
def confdir(tmp_path: Path) -> Path:
    (tmp_path / "variants.d").mkdir()
    return tmp_path


def parse(confdir: Path, variant: str = "default", **osp: str) -> params.Job:
    variables = {"CLOUDIMAGE_CONFDIR": str(confdir), "OS_VARIANT": variant}
    variables.update({f"OSP_{name.upper()}": value for name, value in osp.items()})
    return params.parse(Environment.from_environ(variables))


def problems(confdir: Path, **osp: str) -> tuple[str, ...]:
    with pytest.raises(Error) as caught:
        parse(confdir, **osp)
    return caught.value.lines


KEY = "ssh-ed25519 AAAA me"
ACCENT = "#cloud-config\nx: \u00e9"


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("image", "/srv/a.qcow2", "image", values.Location(path=Path("/srv/a.qcow2"))),
        ("image", "file:///srv/a.raw", "image", values.Location(path=Path("/srv/a.raw"))),
        ("image", "http://h/a.img", "image", values.Location(url="http://h/a.img")),
        ("image", "HTTPS://h:8/a", "image", values.Location(url="https://h:8/a")),
        ("image", "http://u:p@h/a", "image", values.Location(url="http://u:p@h/a")),
        ("image", "http://[::1]:80/a", "image", values.Location(url="http://[::1]:80/a")),
        ("format", "vhdx", "format", "vhdx"),
        ("checksum", "none", "checksum", None),
        ("checksum", f"sha256:{HEX['sha256'].upper()}", "checksum", ("sha256", HEX["sha256"])),
        ("checksum", f"sha512:{HEX['sha512']}", "checksum", ("sha512", HEX["sha512"])),
        ("checksum", "/srv/SUMS", "checksum", values.Location(path=Path("/srv/SUMS"))),
        ("ssh_keys", KEY, "ssh_keys", values.Document(data=KEY.encode())),
        ("user_data", "@/srv/ud", "user_data", values.Document(path=Path("/srv/ud"))),
        ("user_data", "http://h/ud", "user_data", values.Document(url="http://h/ud")),
        ("user_data", "base64:w6k=", "user_data", values.Document(data=b"\xc3\xa9")),
        ("user_data", ACCENT, "user_data", values.Document(data=ACCENT.encode())),
        ("network", "dhcp", "network", "dhcp"),
        ("network", '{"version": 1}', "network", values.Document(data=b'{"version": 1}')),
        ("network_version", "2", "network_version", 2),
        ("dns_servers", "192.0.2.1, 2001:DB8::1", "dns_servers", ("192.0.2.1", "2001:db8::1")),
        ("dns_search", "example.com b.example", "dns_search", ("example.com", "b.example")),
        ("seed", "tail", "seed", "tail"),
        ("metad", "yes", "metad", True),
    ],
)  # fmt: skip
def test_good_values(confdir: Path, name: str, value: str, field: str, expected: Any) -> None:
    assert getattr(parse(confdir, **{name: value}), field) == expected


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("image", "srv/a.qcow2", "must be an absolute path, or a file://, http:// or https:// URL"),
        ("image", "ftp://h/a", "must be an absolute path, or a file://"),
        ("image", "json:{}", "must be an absolute path"),
        ("image", "file://host/a", "file:///absolute/path"),
        ("image", "http:///a", "a URL with a host name"),
        ("image", "/srv/caf\u00e9", "must be ASCII"),
        ("image", "/srv/a b", "printable ASCII without spaces"),
        ("image", "/srv/a\x07", "without control characters"),
        ("image", "/srv/{release}", "without other {names} than {arch} and {deb_arch}"),
        ("image", "/" + "a" * 5000, "at most 4096 characters"),
        ("format", "qcow", "did you mean qcow2?"),
        ("format", "", "must be one of auto raw"),
        ("checksum", "", "must be none, sha256: with 64"),
        ("checksum", "sha256:abcd", "must be none, sha256: with 64"),
        ("checksum", "md5:abcd", "must be none, sha256: with 64"),
        ("checksum", HEX["sha256"], "must be none, sha256: with 64"),
        ("signature", "SUMS.gpg", "must be none, inline, or path or URL"),
        ("ssh_keys", "@keys", "must be @ and an absolute path"),
        ("user_data", "base64:%%%", "must be base64: and valid base64 data"),
        ("user_data", "a\udcffb", "must be UTF-8 text"),
        ("user_data", "a\x00b", "without control characters"),
        ("network", "static", "must be auto, dhcp, none, or a network-config document"),
        ("network_version", "3", "must be one of 1 2"),
        ("dns_servers", "192.0.2", "must be IP addresses separated by spaces or commas"),
        ("dns_search", "-x", "must be domain names"),
        ("seed", "front", "must be one of auto gap tail disk none"),
        ("metad", "true", "must be yes or no"),
        ("os_package", "pkg", "must be an absolute path"),
    ],
)
def test_bad_values(confdir: Path, name: str, value: str, words: str) -> None:
    (line,) = problems(confdir, **{name: value})
    assert line.startswith(f"{name.replace('os_package', 'os-package')}=")
    assert words in line
    assert "\n" not in line


def test_all_problems_at_once(confdir: Path) -> None:
    lines = problems(confdir, image="x", seed="y", dns_servers="z", sead="auto")
    assert len(lines) == 4
    assert lines[0] == "OSP_SEAD: unknown OS parameter; did you mean seed?"


def test_a_secret_is_not_shown(confdir: Path) -> None:
    (line,) = problems(confdir, user_data="base64:s3cret%")
    assert "s3cret" not in line
    assert "user_data=(not shown)" in line


def test_a_password_is_not_shown(confdir: Path) -> None:
    (line,) = problems(confdir, image="ftp://user:s3cret@host/a")
    assert "s3cret" not in line


@pytest.mark.parametrize(
    ("osp", "words"),
    [
        ({"signature": "inline", "checksum": "none"}, "signature=inline: there is no list"),
        ({"signature": "/s", "checksum": f"sha256:{HEX['sha256']}"}, "is a pinned digest"),
        ({"signature": "/s"}, "the variant names no keyring"),
        ({"os_package": "/srv/p"}, "os-package: is served by metad only; add metad=yes"),
        (
            {"metad": "yes", "os_package": "/srv/p", "user_data": "x"},
            "user_data: os-package is the user data then",
        ),
        ({"metad": "yes", "user_data": "@/x"}, "user_data: metad serves the parameter itself"),
    ],
)
def test_what_must_not_be_combined(confdir: Path, osp: dict[str, str], words: str) -> None:
    assert any(words in line for line in problems(confdir, **osp))


def test_metad_knows_os_parameters_only(confdir: Path) -> None:
    (confdir / "cloudimage.conf").write_text("[defaults]\nuser_data = #!/bin/sh\n")
    (line,) = problems(confdir, metad="yes")
    assert line == (
        f"user_data ({confdir}/cloudimage.conf): metad knows OS parameters only; give it with -O"
    )
    assert parse(confdir, metad="yes", user_data="#!/bin/true").metad


def test_layers(confdir: Path) -> None:
    (confdir / "cloudimage.conf").write_text(
        "[defaults]\nseed = tail\nformat = raw\ndns_search = d\n"
    )
    (confdir / "variants.d/mine.conf").write_text("[variant]\nformat = vdi\ndns_search = v\n")
    job = parse(confdir, "mine", dns_search="p")
    assert (job.seed, job.format, job.dns_search) == ("tail", "vdi", ("p",))


def test_an_empty_parameter_beats_the_variant(confdir: Path) -> None:
    (confdir / "variants.d/mine.conf").write_text("[variant]\ndns_search = v\n")
    assert parse(confdir, "mine", dns_search="").dns_search == ()


def test_the_configuration_replaces_a_variant(confdir: Path) -> None:
    (confdir / "variants.d/debian-12.conf").write_text("[variant]\nimage = /srv/own.qcow2\n")
    job = parse(confdir, "debian-12")
    assert job.image == values.Location(path=Path("/srv/own.qcow2"))
    assert job.checksum is None


def test_unknown_variant(confdir: Path) -> None:
    with pytest.raises(Error, match=r"OS_VARIANT=debian-21: .*did you mean debian-1[123]\?"):
        parse(confdir, "debian-21")


def test_unknown_keys(confdir: Path) -> None:
    path = confdir / "variants.d/mine.conf"
    path.write_text("[variant]\nimmage = /x\n")
    with pytest.raises(Error, match=f"{path}: unknown key immage in .variant.; did you mean image"):
        parse(confdir, "mine")


def test_architecture(confdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = confdir / "variants.d/mine.conf"
    path.write_text("[variant]\nimage = http://h/{arch}/{deb_arch}\n")
    machine = platform.machine()
    debian = {"x86_64": "amd64", "aarch64": "arm64"}[machine]
    assert parse(confdir, "mine").source().url == f"http://h/{machine}/{debian}"
    path.write_text("[variant]\narchitecture = s390x\n")
    with pytest.raises(Error, match=f"architecture=s390x: this node is {machine}"):
        parse(confdir, "mine")


def test_no_image_is_an_error_only_where_one_is_needed(confdir: Path) -> None:
    job = parse(confdir)
    with pytest.raises(Error, match="image: variant default has no image of its own; give -O"):
        job.source()


def test_require_checksum(confdir: Path) -> None:
    (confdir / "cloudimage.conf").write_text("[image]\nrequire_checksum = yes\n")
    words = "checksum=none: require_checksum is set in cloudimage.conf; give sha256:HEX or a list"
    with pytest.raises(Error, match=words):
        parse(confdir, image="/x").require_checksum()
    parse(confdir, image="/x", checksum="/sums").require_checksum()


@pytest.mark.parametrize("path", sorted((config.BUNDLE / "variants.d").glob("*.conf")), ids=str)
def test_every_shipped_variant_parses(
    confdir: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.stem.endswith("-arm64"):
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    job = parse(confdir, path.stem)
    assert job.description
    if path.stem != "default":
        assert job.source().url is not None
        assert job.source().url.startswith("https://")  # type: ignore[union-attr]
        assert job.checksum == ("sha256", "{digest}") or isinstance(job.checksum, values.Location)
