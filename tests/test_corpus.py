"""Every image of the corpus meets its verdict, and none leaks, hangs or speaks unprintably."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Optional

import pytest

from lib import run
from lib.errors import Error
from lib.source import decode
from tests import corpus
from tests.conftest import ROOT, require

SECONDS = 20.0  # of a busy machine; what hangs, hangs for ever


def meet(directory: Path, item: corpus.Item) -> Optional[str]:
    """Give the image to the decoder as create does; return what the refusal says."""
    with open(directory / "image", "rb") as file:
        (directory / "image").chmod(0o644)
        try:
            found = decode.decode(file, item.declared, corpus.LIMIT_BYTES, directory)
        except Error as error:
            return str(error)
    return corpus.RAW if found.path is None else None


def assert_no_leak(directory: Path, *texts: str) -> None:
    """The secret of the node is neither in the decoded disk nor in what anybody reads."""
    output = directory / "output"
    if output.stat().st_size <= 64 * corpus.MIB:
        assert corpus.MARKER not in output.read_bytes()
    for text in texts:
        assert corpus.MARKER.decode() not in text
        assert text.isascii()
        assert all(line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize("item", corpus.GOOD, ids=lambda item: item.name)
def test_good(item: corpus.Item, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    require("qemu-img", "bwrap", "mke2fs")
    corpus.prepare(tmp_path)
    item.build(tmp_path)
    assert meet(tmp_path, item) == item.verdict
    if item.verdict is None:
        assert (tmp_path / "output").read_bytes() == corpus.base()
        assert (tmp_path / "output").stat().st_blocks * 512 < 2 * corpus.MIB
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("item", corpus.HOSTILE, ids=lambda item: item.name)
def test_hostile(item: corpus.Item, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    require("qemu-img", "qemu-io", "bwrap")
    corpus.prepare(tmp_path)
    item.build(tmp_path)
    started = time.monotonic()
    said = meet(tmp_path, item)
    assert time.monotonic() - started < SECONDS
    assert said is not None and item.verdict is not None
    assert item.verdict in said
    assert "\n" not in said
    assert_no_leak(tmp_path, said, *capfd.readouterr())


LEAKING = [item for item in corpus.HOSTILE if item.leaks]


@pytest.mark.parametrize("item", LEAKING, ids=lambda item: item.name)
def test_sandbox_alone_leaks_nothing(item: corpus.Item, tmp_path: Path) -> None:
    """The second layer holds when the first, our own look, is passed by."""
    require("qemu-img", "bwrap")
    assert item.leaks is not None
    corpus.prepare(tmp_path)
    item.build(tmp_path)
    corpus.qemu_img(tmp_path, "convert", "-f", item.leaks, "-O", "raw", "image", "stock")
    assert corpus.MARKER in (tmp_path / "stock").read_bytes(), "the attack is none"
    (tmp_path / "image").chmod(0o644)
    (tmp_path / "output").touch()
    program = (
        "import sys; sys.path.insert(0, '/tmp')\n"
        "from lib.decoder import image\n"
        "with open('/image', 'rb') as file, open('/output', 'r+b') as output:\n"
        f"    image.decode(file, image.Image({item.leaks!r}, {4 * corpus.MIB}), output)\n"
    )
    sandbox = run.Sandbox(
        {"/tmp/lib": ROOT / "lib", "/image": tmp_path / "image"}, {"/output": tmp_path / "output"}
    )
    with pytest.raises(Error):
        run.run(["python3", "-I", "-c", program], sandbox=sandbox)
    assert_no_leak(tmp_path)
