"""The decoder's whole door: what it makes of images, whole or still coming, and who is believed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from lib.errors import Error
from lib.source import decode
from tests import corpus
from tests.conftest import require
from tests.decoding import coming, decoded
from tests.images import MIB, convert, disk_image

LIMIT = 1 << 30


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("sfdisk", "qemu-img", "bwrap", "prlimit", "unshare")
    return disk_image(tmp_path_factory.mktemp("disk") / "disk.raw")


def tarred(name: str, data: bytes) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return output.getvalue()


@pytest.fixture(scope="module")
def forms(disk: Path) -> dict[str, bytes]:
    """Return the disk in the forms that images come in."""
    raw, qcow2 = disk.read_bytes(), convert(disk, "qcow2").read_bytes()
    packed = disk.with_name("packed")
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", disk, packed], check=True)
    tools = {"gz": "gzip", "xz": "xz", "zst": "zstd", "lz4": "lz4"}
    made = {
        kind: subprocess.run([tool, "-1c"], input=raw, capture_output=True, check=True).stdout
        for kind, tool in tools.items()
    }
    made["qcow2.gz"] = subprocess.run(
        ["gzip", "-1c"], input=qcow2, capture_output=True, check=True
    ).stdout
    made |= {"raw": raw, "qcow2": qcow2, "compressed": packed.read_bytes()}
    made |= {"tar": tarred("disk.raw", raw), "ova": tarred("disk.qcow2", qcow2)}
    return made | {each: convert(disk, each).read_bytes() for each in ("vmdk", "vdi", "vhdx")}


def test_whole_or_still_coming(tmp_path: Path, disk: Path, forms: dict[str, bytes]) -> None:
    """All forms come out as the same disk, whichever way they came."""
    for name, data in forms.items():
        image = tmp_path / "image"
        image.write_bytes(data)
        for path in (decoded(image, limit_bytes=LIMIT), coming(image, data, limit_bytes=LIMIT)):
            assert (path or image).read_bytes() == disk.read_bytes(), name
            assert (path is None) == (name == "raw")


@pytest.mark.parametrize("kind", ["zst", "tar", "qcow2"])
def test_decoding_begins_before_the_end(
    tmp_path: Path, disk: Path, forms: dict[str, bytes], kind: str
) -> None:
    data = forms[kind]
    output = tmp_path / ("output" if kind == "qcow2" else "scratch")
    with (tmp_path / "image").open("w+b", buffering=0) as file:
        with decode.started(file, "auto", LIMIT, tmp_path, len(data)) as decoder:
            file.write(data[: -2 * MIB])
            deadline = time.monotonic() + 20
            while output.stat().st_blocks * 512 < MIB:
                assert time.monotonic() < deadline, "nothing was decoded yet"
                time.sleep(0.02)
            file.write(data[-2 * MIB :])
            decoder.complete()
            assert decoder.result().path == output
    assert output.read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("kind", ["qcow2", "tar", "zst", "vhdx"])
def test_what_does_not_come_is_an_error(tmp_path: Path, forms: dict[str, bytes], kind: str) -> None:
    data = forms[kind]
    with (tmp_path / "image").open("w+b", buffering=0) as file:
        with decode.started(file, "auto", LIMIT, tmp_path, len(data)) as decoder:
            file.write(data[:-1000])
            decoder.complete()
            with pytest.raises(Error):
                decoder.result()


@pytest.mark.parametrize(
    "item",
    [item for item in corpus.HOSTILE if item.name.startswith("qcow2")],
    ids=lambda item: item.name,
)
def test_hostile_and_still_coming(item: corpus.Item, tmp_path: Path) -> None:
    """What begins before the last look is refused all the same, and leaks nothing."""
    require("qemu-img", "bwrap")
    corpus.prepare(tmp_path)
    item.build(tmp_path)
    data = (tmp_path / "image").read_bytes()
    with pytest.raises(Error) as caught:
        coming(tmp_path / "image", data, item.declared, corpus.LIMIT_BYTES)
    assert corpus.MARKER.decode() not in str(caught.value)
    output = tmp_path / "decoded/output"
    if output.stat().st_size <= 64 * MIB:
        assert corpus.MARKER not in output.read_bytes()


def test_a_file_that_only_root_reads_is_left_as_it_is(
    tmp_path: Path, disk: Path, forms: dict[str, bytes]
) -> None:
    image = tmp_path / "image"
    image.write_bytes(forms["qcow2"])
    image.chmod(0o600)
    path = decoded(image, limit_bytes=LIMIT)
    assert path is not None
    assert path.read_bytes() == disk.read_bytes()
    for each in (image, path):
        status = each.stat()
        assert (status.st_uid, status.st_mode & 0o777) == (os.geteuid(), 0o600)


def test_an_empty_disk_is_refused_in_any_format(tmp_path: Path) -> None:
    require("qemu-img", "bwrap")
    (tmp_path / "empty").touch()
    os.truncate(tmp_path / "empty", 4 * MIB)
    for path in (tmp_path / "empty", convert(tmp_path / "empty", "qcow2")):
        with pytest.raises(Error, match="neither a partition table nor a known file system"):
            decoded(path)
    assert decoded(tmp_path / "empty.qcow2", "qcow2") is not None


def test_the_time_is_bounded(tmp_path: Path) -> None:
    require("qemu-img", "bwrap")
    with (tmp_path / "image").open("w+b") as file:
        with decode.started(file, "auto", LIMIT, tmp_path, MIB) as decoder:
            with pytest.raises(Error) as caught:
                dataclasses.replace(decoder, wall_s=0.3).result()
    assert str(caught.value).startswith("decoding took longer than the limit of 0 s; see")


SOUND = {"size_bytes": MIB, "where": "output"}


@pytest.mark.parametrize(
    "said",
    [
        "",
        "oops",
        "[]",
        "null",
        "9" * 4096,
        "[" * 4000,
        json.dumps({**SOUND, "size_bytes": "1048576"}),
        json.dumps({**SOUND, "size_bytes": True}),
        json.dumps({**SOUND, "size_bytes": -512}),
        json.dumps({**SOUND, "size_bytes": MIB + 1}),
        json.dumps({**SOUND, "size_bytes": 2 * LIMIT}),
        json.dumps({**SOUND, "where": "/etc/passwd"}),
        json.dumps({**SOUND, "where": {"a": 1}}),
        json.dumps(SOUND) + "x" * 5000,
        json.dumps({"error": "x"}),
        json.dumps(SOUND),  # the output is not that long
        json.dumps({**SOUND, "where": "input"}),
    ],
)
def test_a_verdict_is_not_believed(
    tmp_path: Path, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the program had been taken over by what it decodes."""
    require("qemu-img", "bwrap")
    monkeypatch.setattr(decode, "LIB", tmp_path / "lib")
    program = tmp_path / "lib/decoder/__main__.py"
    program.parent.mkdir(parents=True)
    program.write_text(f"print({said!r})\n")
    (tmp_path / "image").write_bytes(bytes(512))
    with pytest.raises(Error) as caught:
        decoded(tmp_path / "image", limit_bytes=LIMIT)
    assert str(caught.value).startswith("the decoder ")


def test_its_words_are_made_printable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("qemu-img", "bwrap")
    monkeypatch.setattr(decode, "LIB", tmp_path / "lib")
    program = tmp_path / "lib/decoder/__main__.py"
    program.parent.mkdir(parents=True)
    said = json.dumps({"error": "\x1b[2J\n" + "\u00e9" * 2000, "hint": "a\nb"}, ensure_ascii=True)
    program.write_text(f"print({said[:3900] + said[-20:]!r})\n")
    (tmp_path / "image").write_bytes(bytes(512))
    with pytest.raises(Error) as caught:
        decoded(tmp_path / "image", limit_bytes=LIMIT)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
