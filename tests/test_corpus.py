"""Every image of the corpus meets its verdict, and none leaks, hangs or speaks unprintably."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Optional

import pytest

from lib import run
from lib.errors import Error
from lib.sandbox import Sandbox
from tests import corpus
from tests.conftest import ROOT, require
from tests.decoding import decoded

SECONDS = 20.0  # of a busy machine; what hangs, hangs for ever


def meet(directory: Path, item: corpus.Item) -> Optional[str]:
    """Decode the image as create does; return what the refusal says."""
    try:
        output = decoded(directory / "image", item.declared, corpus.LIMIT_BYTES)
    except Error as error:
        return str(error)
    return corpus.RAW if output is None else None


def assert_no_leak(directory: Path, *texts: str) -> None:
    """The secret of the node is neither in the decoded disk nor in what anybody reads."""
    output = directory / "decoded/output"
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
        assert (tmp_path / "decoded/output").read_bytes() == corpus.base()
        assert (tmp_path / "decoded/output").stat().st_blocks * 512 < 2 * corpus.MIB
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
    program = (
        "import sys; sys.path.insert(0, '/tmp')\n"
        "from pathlib import Path\n"
        "from lib.decoder import image, source\n"
        f"given = source.Source(0, {(tmp_path / 'image').stat().st_size})\n"
        f"found = image.Image({item.leaks!r}, {4 * corpus.MIB})\n"
        "image.decode(given, found, Path('/output'))\n"
    )
    (tmp_path / "decoded").mkdir()
    (tmp_path / "decoded/output").touch()
    sandbox = Sandbox({"/tmp/lib": ROOT / "lib"}, {"/output": tmp_path / "decoded/output"})
    with (tmp_path / "image").open("rb") as file, pytest.raises(Error):
        run.run(["python3", "-I", "-c", program], stdin=file, sandbox=sandbox)
    assert_no_leak(tmp_path)
