"""The shipped variants: which image an index in its vendor's form leads to, and those for arm64."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lib.environment import Environment
from lib.settings import config, params, values
from lib.source import index

FOR_ARM64 = sorted((config.BUNDLE / "variants.d").glob("*-arm64.conf"))
OLD, NEW = "0" * 64, "a1" * 32
FREEBSD = "".join(
    f'<tr><td><a href="{name}-RELEASE/">{name}-RELEASE/</a></td></tr>\n'
    for name in ("13.5", "14.2", "14.10", "14.3", "15.0", "15.1")
)
ORACLE = """{{
  "base_url": "/templates/OracleLinux/OL{n}/u{u}/{arch}",
  "kvm": {{"image": "OL{n}U{u}_{arch}-kvm{cloud}-b182.qcow2", "sha256": "{new}"}},
  "ova": {{"image": "OL{n}U{u}_{arch}-ova-b99.ova", "sha256": "{old}"}}
}}"""
CASES: dict[str, tuple[str, str]] = {
    "freebsd-14": (FREEBSD, "14.10-RELEASE/amd64/Latest/FreeBSD-14.10-RELEASE-amd64-BASIC-"),
    "freebsd-15": (FREEBSD, "15.1-RELEASE/amd64/Latest/FreeBSD-15.1-RELEASE-amd64-BASIC-"),
    "freebsd-14-arm64": (
        FREEBSD,
        "14.10-RELEASE/aarch64/Latest/FreeBSD-14.10-RELEASE-arm64-aarch64-BASIC-",
    ),
    "freebsd-15-arm64": (
        FREEBSD,
        "15.1-RELEASE/aarch64/Latest/FreeBSD-15.1-RELEASE-arm64-aarch64-BASIC-",
    ),
    "oracle-9": (
        ORACLE.format(n=9, u=8, arch="x86_64", cloud="", old=OLD, new=NEW),
        "OL9/u8/x86_64/OL9U8_x86_64-kvm-b182.qcow2",
    ),
    "oracle-9-arm64": (
        ORACLE.format(n=9, u=8, arch="aarch64", cloud="-cloud", old=OLD, new=NEW),
        "OL9/u8/aarch64/OL9U8_aarch64-kvm-cloud-b182.qcow2",
    ),
    "oracle-10": (
        ORACLE.format(n=10, u=1, arch="x86_64", cloud="", old=OLD, new=NEW),
        "OL10/u1/x86_64/OL10U1_x86_64-kvm-b182.qcow2",
    ),
    "oracle-10-arm64": (
        ORACLE.format(n=10, u=1, arch="aarch64", cloud="-cloud", old=OLD, new=NEW),
        "OL10/u1/aarch64/OL10U1_aarch64-kvm-cloud-b182.qcow2",
    ),
}


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], params.Job]:
    """Return what reads a shipped variant on a node that it is for."""

    def parsed(name: str) -> params.Job:
        machine = "aarch64" if name.endswith("-arm64") else "x86_64"
        monkeypatch.setattr(platform, "machine", lambda: machine)
        variables = {"CLOUDIMAGE_CONFDIR": str(tmp_path), "OS_VARIANT": name}
        return params.parse(Environment.from_environ(variables))

    return parsed


@pytest.mark.parametrize("name", CASES)
def test_the_newest_image(name: str, parse: Callable[[str], params.Job]) -> None:
    text, ends = CASES[name]
    job = index.resolved(replace(parse(name), index=values.Document(data=text.encode())))
    assert ends in str(job.image)
    if name.startswith("oracle"):
        assert job.checksum == ("sha256", NEW)
    else:
        assert str(job.checksum).rpartition("/")[0] == str(job.image).rpartition("/")[0]


@pytest.mark.parametrize("path", FOR_ARM64, ids=str)
def test_one_for_arm64_differs_in_its_urls_only(
    path: Path, parse: Callable[[str], params.Job]
) -> None:
    text = path.read_text()
    assert "architecture = aarch64\n" in text
    assert "x86_64" not in text
    assert "amd64" not in text
    arm, amd = vars(parse(path.stem)), vars(parse(path.stem.replace("-arm64", "")))
    assert arm["description"].replace(" for arm64", "") == amd["description"]
    differing = {key for key in arm if arm[key] != amd[key]}
    assert differing <= {"variant", "description", "image", "checksum", "index", "index_match"}
