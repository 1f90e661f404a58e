"""The words of refusals, the second opinion, and what goes wrong in decoding."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from lib.decoder import image
from lib.decoder.image import Image
from lib.decoder.source import Source
from lib.errors import Error
from tests import corpus
from tests.conftest import require

LIMIT = corpus.LIMIT_BYTES
SIZE = len(corpus.base())


def made(directory: Path, build: corpus.Build) -> Path:
    """Return the image that `build` makes."""
    require("qemu-img", "bwrap")
    corpus.prepare(directory)
    build(directory)
    return directory / "image"


def source(file: BinaryIO) -> Source:
    return Source(file.fileno(), os.fstat(file.fileno()).st_size)


def inspect(path: Path, declared: str = "auto", limit: int = LIMIT) -> Image:
    with open(path, "rb") as file:
        return image.inspect(source(file), declared, limit)


def decode(path: Path, found: Image, before: bytes = b"") -> bytes:
    """Decode into a file that holds `before`; return what it holds then."""
    output = path.with_name("output")
    output.write_bytes(before)
    with open(path, "rb") as file:
        image.decode(source(file), found, output)
    return output.read_bytes()


@pytest.mark.parametrize("declared", ["auto", "qcow2"])
def test_inspect_says_format_and_size(tmp_path: Path, declared: str) -> None:
    path = made(tmp_path, corpus.convert("qcow2"))
    assert inspect(path, declared) == Image("qcow2", SIZE)


def test_inspect_leaves_the_position_alone(tmp_path: Path) -> None:
    with open(made(tmp_path, corpus.convert("vdi")), "rb") as file:
        file.seek(7)
        image.inspect(source(file), "auto", LIMIT)
        assert file.tell() == 7


def test_the_limit_on_the_size_is_inclusive(tmp_path: Path) -> None:
    path = made(tmp_path, corpus.convert("qcow2"))
    assert inspect(path, limit=SIZE).virtual_size_bytes == SIZE
    with pytest.raises(
        Error, match=r"^the image is a disk of 4 MiB, and max_virtual_size is 4.0 MiB"
    ):
        inspect(path, limit=SIZE - 1)


@pytest.mark.parametrize(
    ("build", "declared", "lines"),
    [
        (
            corpus.convert("qcow2"),
            "vdi",
            "format=vdi, but the image is qcow2; set format=qcow2 or format=auto",
        ),
        (
            corpus.content(b"QED\0", size=corpus.MIB),
            "auto",
            "the image is a QED disk, none of raw, qcow2, vmdk, vdi, vpc, vhdx; make it one plain"
            " file, where you trust it, with qemu-img convert -O qcow2",
        ),
        (
            corpus.tagged(510, b"\x55\xaa", corpus.convert("vhdx")),
            "auto",
            "the image is several things at once: vhdx, an MBR; do not use it: a file like this"
            " is made to be read in two ways",
        ),
        (
            corpus.overlay("secret"),
            "auto",
            "the qcow2 image has a backing file; make it one plain file, where you trust it, with"
            " qemu-img convert -O qcow2",
        ),
        (
            corpus.content(b"", size=corpus.MIB),
            "auto",
            "the image has neither a partition table nor a known file system nor a known format;"
            " see whether it is a disk image, and set format=raw to write it as it is",
        ),
        (corpus.content(b"x"), "auto", "the image is too short: 1 bytes; fetch it again"),
    ],
    ids=["declared", "foreign", "several", "reference", "unknown", "short"],
)
def test_refusals_name_the_way_out(
    tmp_path: Path, build: corpus.Build, declared: str, lines: str
) -> None:
    with pytest.raises(Error) as caught:
        inspect(made(tmp_path, build), declared)
    assert str(caught.value) == lines


def test_decode_replaces_what_the_output_held(tmp_path: Path) -> None:
    path = made(tmp_path, corpus.convert("qcow2"))
    assert decode(path, Image("qcow2", SIZE), before=b"\xff" * 2 * SIZE) == corpus.base()


def test_decode_follows_the_descriptor_not_the_name(tmp_path: Path) -> None:
    path = made(tmp_path, corpus.convert("qcow2"))
    (tmp_path / "output").touch()
    with open(path, "rb") as file:
        path.rename(tmp_path / "moved")
        path.symlink_to("/etc/passwd")
        image.decode(source(file), Image("qcow2", SIZE), tmp_path / "output")
    assert (tmp_path / "output").read_bytes() == corpus.base()


@pytest.mark.parametrize(
    ("build", "claimed", "says"),
    [
        (corpus.convert("qcow2"), Image("qcow2", 512), f"sees a disk of {SIZE} bytes, in qcow2"),
        (corpus.convert("qcow2"), Image("vdi", SIZE), "qemu-img failed with status 1"),
        (corpus.overlay("secret"), Image("qcow2", SIZE), "must not be there: backing-filename"),
        (
            corpus.tagged(79, b"\2", corpus.convert("qcow2")),
            Image("qcow2", SIZE),
            "must not be there: corrupt",
        ),
    ],
    ids=["size", "format", "backing-file", "corrupt"],
)
def test_qemu_img_must_agree(
    tmp_path: Path, build: corpus.Build, claimed: Image, says: str
) -> None:
    """The second opinion refuses what a hole in inspect() would let pass."""
    with pytest.raises(Error, match=f"^decoding the {claimed.format} image: .*{says}"):
        decode(made(tmp_path, build), claimed)


def test_stock_qemu_img_lets_a_cut_compressed_image_pass(tmp_path: Path) -> None:
    """Why inspect() looks at every compressed cluster itself."""
    path = made(tmp_path, corpus.compressed_and_cut)
    for command in (["check", "-q"], ["map", "--output=json"], ["convert", "-O", "raw"]):
        output = ["decoded"] if command[0] == "convert" else []
        argv = ["qemu-img", *command, "-f", "qcow2", "image", *output]
        status = subprocess.run(argv, cwd=tmp_path, capture_output=True, timeout=60).returncode
        assert status in (0, 3), f"{command[0]} sees it now: one check of ours can go"
    assert (tmp_path / "decoded").read_bytes() != (tmp_path / "base.raw").read_bytes()
    with pytest.raises(Error, match="its last compressed cluster lies outside the file"):
        inspect(path)


def test_a_virtualbox_vhd_keeps_its_end(tmp_path: Path) -> None:
    """Up to qemu 8.2 at least, this creator means the CHS geometry unless it is told not to."""
    path = made(tmp_path, corpus.written(corpus.write_vhd_fixed))
    assert decode(path, inspect(path)) == corpus.base()


def test_a_scattered_image_has_a_map_of_any_size(tmp_path: Path) -> None:
    """As after years of use: every second cluster lies elsewhere."""
    path = made(tmp_path, corpus.create("-f", "qcow2", "-o", "cluster_size=512", "image", "4M"))
    writes = "".join(f"write -q -P {n % 251 + 1} {n * 1024} 512\n" for n in range(512))
    argv = ["qemu-io", "-t", "unsafe", "-f", "qcow2", os.fspath(path)]
    subprocess.run(argv, input=writes.encode(), check=True, capture_output=True, timeout=60)
    decoded = decode(path, inspect(path))
    assert [decoded[n * 1024] for n in range(512)] == [n % 251 + 1 for n in range(512)]


SHIM = """case "$1" in
{stage}) {action} ;;
*) exec /usr/bin/qemu-img "$@" ;;
esac"""


@pytest.mark.parametrize(
    ("stage", "action", "says"),
    [
        ("info", "echo '[]'", "qemu-img gave no answer that could be read"),
        ("info", "echo oops >&2", "qemu-img complained about its input"),
        ("check", "exit 2", "qemu-img failed with status 2"),
        ("map", 'echo \'[{"offset": "x"}]\'', "qemu-img gave no answer that could be read"),
        ("map", "head -c 100000 /dev/zero", "qemu-img gave no answer that could be read"),
        ("convert", "kill -SEGV $$", "qemu-img was ended by SIGSEGV"),
        (
            "convert",
            ": > {output}; exit 0",
            f"qemu-img wrote 0 bytes instead of {SIZE}; try again",
        ),
    ],
)
def test_a_qemu_img_gone_wrong_is_an_error(
    tmp_path: Path, tool: Callable[[str, str], Path], stage: str, action: str, says: str
) -> None:
    path = made(tmp_path, corpus.convert("qcow2"))
    action = action.replace("{output}", str(path.with_name("output")))
    tool("qemu-img", SHIM.replace("{stage}", stage).replace("{action}", action))
    with pytest.raises(Error) as caught:
        decode(path, Image("qcow2", SIZE))
    way_out = "; see its words above; fetch it again if it is cut"
    said = str(caught.value)
    assert said.replace(way_out, "") == f"decoding the qcow2 image: {says}"
    assert (way_out in said) == (
        stage == "check" or says.startswith(("qemu-img c", "qemu-img was"))
    )


def test_a_failed_check_ends_the_decoding(tmp_path: Path, tool: Callable[[str, str], Path]) -> None:
    """The error of the check is shown, and convert does not outlive it."""
    path = made(tmp_path, corpus.convert("qcow2"))
    shim = SHIM.replace("{stage}", "convert").replace(
        "{action}", f"echo $$ > {tmp_path}/pid; sleep 99"
    )
    tool("qemu-img", shim.replace("*) exec", "check) sleep 0.3; exit 1 ;;\n*) exec"))
    with pytest.raises(Error, match="qemu-img failed with status 1"):
        decode(path, Image("qcow2", SIZE))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
