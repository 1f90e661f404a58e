"""lib/disk/target.py on files and on URIs, read back with cmp-like reads and qemu's own tools."""

from __future__ import annotations

import os
import random
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest

from lib import run
from lib.disk import nbd
from lib.disk import target as disk
from lib.environment import Disk
from lib.errors import Error, causes
from tests.conftest import require

MIB = disk.MIB
OLD = b"\xff"
KINDS = ("file", "link", "file-uri", "nbd-uri")


class Place(NamedTuple):
    """A disk as Ganeti names it, and the file behind it."""

    disk: Disk
    file: Path


Make = Callable[[str, int], Place]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Return a function that makes a disk of one of KINDS, full of old bytes."""
    with ExitStack() as servers:

        def place(kind: str, size_bytes: int) -> Place:
            file = tmp_path / "disk"
            file.write_bytes(OLD * size_bytes)
            if kind == "file":
                return Place(Disk(0, file), file)
            if kind == "link":
                (tmp_path / "link").symlink_to(file)
                return Place(Disk(0, tmp_path / "link"), file)
            require("qemu-nbd", "qemu-img")
            if kind == "file-uri":
                return Place(Disk(0, uri=f"file:{file}"), file)
            socket = servers.enter_context(served(file, tmp_path / "socket"))
            return Place(Disk(0, uri=f"nbd+unix:///?socket={socket}"), file)

        yield place


@contextmanager
def served(file: Path, socket: Path) -> Iterator[Path]:
    """Serve a file by qemu, which then has it open as a guest's disk is."""
    command = ["qemu-nbd", "--format=raw", "--persistent", f"--socket={socket}", str(file)]
    with run.process(command):
        while not socket.exists():
            time.sleep(0.01)
        run.run(["qemu-img", "info", "-f", "raw", f"nbd+unix:///?socket={socket}"])
        yield socket


def image_of(path: Path, size_bytes: int, pieces: dict[int, bytes]) -> Path:
    with open(path, "wb") as file:
        file.truncate(size_bytes)
        for offset, data in pieces.items():
            os.pwrite(file.fileno(), data, offset)
    return path


def noise(size_bytes: int) -> bytes:
    return random.Random(size_bytes).randbytes(size_bytes)


IMAGES = {
    "two stretches of data": (6 * MIB, {0: noise(MIB + 4096), 3 * MIB + 512: noise(700_000)}),
    "data up to an odd end": (2 * MIB + 512, {MIB: noise(MIB + 512)}),
    "less than a MiB": (300_000, {0: noise(100), 200_000: noise(100_000)}),
    "zeroes that are data": (3 * MIB, {0: noise(10) + bytes(2 * MIB) + noise(10)}),
    "nothing but a hole": (2 * MIB, {}),
    "as large as the disk": (10 * MIB, {0: noise(4096), 10 * MIB - 33 * 512: noise(33 * 512)}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image", IMAGES)
def test_write(make: Make, tmp_path: Path, kind: str, image: str) -> None:
    place = make(kind, 10 * MIB)
    size_bytes, pieces = IMAGES[image]
    source = image_of(tmp_path / "image", size_bytes, pieces)
    with open(source, "rb") as file:
        target = disk.open_target(place.disk)
        disk.require(target, size_bytes)
        with disk.claim(target):
            disk.write(file, target)
        disk.sync(target)
    content = place.file.read_bytes()
    behind = min(10 * MIB, -(-size_bytes // MIB) * MIB + MIB)
    assert content[:size_bytes] == source.read_bytes()
    assert content[size_bytes:behind] == bytes(behind - size_bytes)
    assert not any(content[max(size_bytes, 9 * MIB) :])
    assert len(content) == target.size_bytes == 10 * MIB


@pytest.mark.parametrize("kind", ["file", "file-uri"])
def test_holes(make: Make, tmp_path: Path, kind: str) -> None:
    place = make(kind, 64 * MIB)
    source = image_of(tmp_path / "image", 64 * MIB, {0: noise(4096), 40 * MIB: noise(MIB)})
    with open(source, "rb") as file:
        target = disk.open_target(place.disk)
        assert kind != "file" or target.used_bytes() == 64 * MIB
        disk.write(file, target)
        disk.sync(target)
    assert place.file.stat().st_blocks * 512 <= 3 * MIB
    assert place.file.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_splice(make: Make, kind: str) -> None:
    place = make(kind, 2 * MIB)
    target = disk.open_target(place.disk)
    target.write(3 * 512, b"a" * 512)
    target.write(2 * MIB - 512, b"b" * 512)
    disk.sync(target)
    content = place.file.read_bytes()
    assert content[3 * 512 : 4 * 512] == target.read(3 * 512, 512) == b"a" * 512
    assert content[-512:] == target.read(2 * MIB - 512, 512) == b"b" * 512
    assert content.count(OLD) == 2 * MIB - 1024


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_mib_is_written_last(make: Make, kind: str) -> None:
    place = make(kind, 4 * MIB)
    target = disk.open_target(place.disk)
    seen = []

    def content() -> disk.Blocks:
        yield b"h" * 1000
        yield b"h" * (2 * MIB)
        seen.append(place.file.read_bytes()[:MIB])

    assert target.fill(content()) == 2 * MIB + 1000
    disk.sync(target)
    assert seen == [bytes(MIB)]
    assert place.file.read_bytes() == (b"h" * (2 * MIB + 1000)).ljust(4 * MIB, b"\0")


def test_content_that_fails_at_once_leaves_the_disk_alone(make: Make) -> None:
    place = make("file", MIB)
    target = disk.open_target(place.disk)

    def content() -> disk.Blocks:
        raise Error("the dump is empty")
        yield b""

    with pytest.raises(Error, match="the dump is empty"), disk.unbootable_on_failure(target):
        target.fill(content())
    assert place.file.read_bytes() == OLD * MIB


@pytest.mark.parametrize("kind", ["file", "nbd-uri"])
@pytest.mark.parametrize("failure", [Error("first"), KeyboardInterrupt("first")], ids=repr)
def test_unbootable_on_failure(make: Make, kind: str, failure: BaseException) -> None:
    place = make(kind, 4 * MIB)
    target = disk.open_target(place.disk)
    with pytest.raises(type(failure), match="first"), disk.unbootable_on_failure(target):
        target.write(2 * MIB, b"x" * 512)
        raise failure
    content = place.file.read_bytes()
    assert not any(content[:MIB]) and not any(content[-MIB:])
    assert content[2 * MIB : 2 * MIB + 512] == b"x" * 512


def test_failure_before_the_first_byte_leaves_the_disk_alone(make: Make) -> None:
    place = make("file", MIB)
    target = disk.open_target(place.disk)
    with disk.claim(target), pytest.raises(Error, match="in use"):
        with disk.unbootable_on_failure(target), disk.claim(target):
            pytest.fail("claimed twice")
    assert place.file.read_bytes() == OLD * MIB


def test_wipe_that_fails_is_a_warning(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    place = make("file", MIB)
    target = disk.open_target(place.disk)
    with pytest.raises(Error, match="first"), disk.unbootable_on_failure(target):
        target.write(0, b"x")
        place.file.unlink()
        raise Error("first")
    assert capsys.readouterr().err == (
        "failed: first\n"
        f"WARNING: {place.file}: its head could not be wiped, it may boot: {place.file}: no such "
        "disk; activate it with gnt-instance activate-disks\n"
    )


def test_running_instance_keeps_its_file(make: Make, tmp_path: Path) -> None:
    """qemu locks an image in use; our claim sees that lock, and qemu sees ours."""
    require("qemu-nbd", "qemu-img", "qemu-io")
    place = make("file", MIB)
    target = disk.open_target(place.disk)
    with served(place.file, tmp_path / "guest"), pytest.raises(Error) as caught, disk.claim(target):
        pytest.fail("claimed a disk in use")
    assert str(caught.value) == (
        f"{place.file}: in use: by a running instance or another create; "
        "release it and run this again"
    )
    look = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(place.file)]
    with disk.claim(target), pytest.raises(Error, match="qemu-io failed with status 1"):
        run.run(look)
    run.run(look)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            Disk(0, Path("/nowhere/disk")),
            "/nowhere/disk: no such disk; activate it with gnt-instance activate-disks",
        ),
        (Disk(0, Path("/")), "/: neither a block device nor a regular file"),
        (Disk(0, Path("/dev/null")), "/dev/null: neither a block device nor a regular file"),
        (Disk(0, Path("/dev/null/x")), "/dev/null/x: Not a directory: /dev/null/x"),
        (Disk(3), "disk 3: neither a path nor a URI is known"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unreachable(given: Disk, message: str) -> None:
    with pytest.raises(Error) as caught:
        disk.open_target(given)
    assert str(caught.value) == message


def test_disk_without_bytes(tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    with pytest.raises(Error) as caught:
        disk.open_target(Disk(0, tmp_path / "disk"))
    assert str(caught.value) == (
        f"{tmp_path}/disk: the disk has no bytes; activate it with gnt-instance activate-disks"
    )


def test_unreachable_uri() -> None:
    require("qemu-nbd")
    with pytest.raises(Error) as caught:
        disk.open_target(Disk(0, uri="nbd+unix:///?socket=/nowhere"))
    assert caught.value.message.startswith("nbd+unix:///?socket=/nowhere: qemu-nbd: ")
    assert caught.value.message.endswith("No such file or directory")
    assert caught.value.hint is None


@pytest.mark.parametrize(
    ("size_bytes", "words", "option"),
    [
        (10 * MIB + 1, "10.0 MiB (10485761 bytes)", "--disk 2:size=11M"),
        (1 << 30, "1 GiB (1073741824 bytes)", "--disk 2:size=1G"),
        ((2 << 30) + 512, "2.0 GiB (2147484160 bytes)", "--disk 2:size=3G"),
    ],
)
def test_image_larger_than_the_disk(
    tmp_path: Path, size_bytes: int, words: str, option: str
) -> None:
    file = image_of(tmp_path / "disk", MIB, {0: OLD * MIB})
    source = image_of(tmp_path / "image", size_bytes, {0: b"image"})
    message = f"{file}: {words} do not fit on a disk of 1 MiB (1048576 bytes); use {option}"
    with pytest.raises(Error) as caught:
        disk.require(disk.open_target(Disk(2, file)), size_bytes)
    assert str(caught.value) == message
    with open(source, "rb") as image, pytest.raises(Error) as caught:
        disk.write(image, disk.open_target(Disk(2, file)))
    assert str(caught.value) == message
    assert file.read_bytes() == OLD * MIB


def test_content_longer_than_the_disk(make: Make) -> None:
    place = make("file", 3 * MIB)
    target = disk.open_target(place.disk)
    blocks: list[disk.Block] = [b"x" * MIB, b"x" * MIB, 2 * MIB, b"x" * MIB]
    with pytest.raises(Error) as caught, disk.unbootable_on_failure(target):
        target.fill(block for block in blocks)
    assert str(caught.value) == (
        f"{place.file}: the dump's bytes do not fit on a disk of 3 MiB (3145728 bytes); "
        "use --disk 0:size= with the size of the dumped disk"
    )
    assert not any(place.file.read_bytes()[:MIB])


def test_content_without_an_end_is_refused_at_once(make: Make) -> None:
    target = disk.open_target(make("file", 3 * MIB).disk)

    def endless() -> disk.Blocks:
        while True:
            yield b"x" * MIB

    with pytest.raises(Error, match="do not fit"), disk.unbootable_on_failure(target):
        target.fill(endless())


def test_the_head_comes_last(make: Make) -> None:
    """What is killed before the end of a door has written all does not boot."""
    place = make("file", 4 * MIB)
    target = disk.open_target(place.disk)
    with disk.hold(target):
        target.fill(block for block in [b"x" * MIB, b"y" * MIB])
        target.write(MIB - 512, b"seed" * 256)
        assert target.read(MIB - 512, 1024) == b"seed" * 256
        assert not any(place.file.read_bytes()[:MIB])
        disk.sync(target)
    content = place.file.read_bytes()
    assert content[: MIB - 512] == b"x" * (MIB - 512)
    assert content[MIB - 512 : MIB + 512] == b"seed" * 256


def test_one_run_at_a_time(make: Make) -> None:
    """The whole door, its hooks and the wipe after them included."""
    target = disk.open_target(make("file", 4 * MIB).disk)
    other = disk.open_target(target.disk)
    with disk.hold(target), pytest.raises(Error, match="in use"):
        with disk.hold(other):
            pass
    with disk.hold(other):
        pass


def test_file_cut_while_it_is_read(make: Make) -> None:
    place = make("file", MIB)
    target = disk.open_target(place.disk)
    os.truncate(place.file, 1000)
    with pytest.raises(Error) as caught:
        target.read(512, 1024)
    assert str(caught.value) == f"{place.file}: it ends at 1000 bytes, within what is read"


@pytest.mark.parametrize("kind", ["file", "nbd-uri"])
def test_write_that_fails_names_the_disk(make: Make, kind: str) -> None:
    place = make(kind, MIB)
    target = disk.open_target(place.disk)
    with pytest.raises((Error, OSError)) as caught:
        target.write(1 << 62, b"x" * 512)
    assert place.disk.label in str(caught.value)


def test_a_write_that_fails_is_told_of_later(make: Make) -> None:
    place = make("nbd-uri", 4 * MIB)
    target = disk.open_target(place.disk)
    with target.opened(writable=True) as handle:
        handle.write(1 << 62, b"x" * 512)
        with pytest.raises(Error, match=re.escape(place.disk.label)):
            handle.sync()
        handle.write(MIB, b"y" * 512)
    assert place.file.read_bytes() == OLD * MIB + b"y" * 512 + OLD * (3 * MIB - 512)


def last_come_first_served(server: socket.socket, content: bytearray) -> None:
    """Be an NBD server that does what came at once from its end on, as any server may."""
    server.sendall(b"NBDMAGICIHAVEOPT\0\1")
    server.recv(20, socket.MSG_WAITALL)
    server.sendall(struct.pack(">QH", len(content), 1))
    waiting: list[tuple[int, int, bytes]] = []
    while True:
        if select.select([server], [], [], 0.05 if waiting else None)[0]:
            request = server.recv(28, socket.MSG_WAITALL)
            if not request:
                return
            _magic, kind, cookie, offset, length = struct.unpack(">IIQQI", request)
            data = server.recv(length, socket.MSG_WAITALL) if kind == 1 else b""
            waiting.append((cookie, offset, data))
            continue
        for cookie, offset, data in waiting[::-1]:
            content[offset : offset + len(data)] = data
            server.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie))
        waiting.clear()


def test_writes_that_overlap_keep_their_order() -> None:
    ours, theirs = socket.socketpair()
    content = bytearray(4096)
    with ours, theirs, ThreadPoolExecutor() as pool:
        serving = pool.submit(last_come_first_served, theirs, content)
        connection = nbd.Connection(ours, "nbd:", lambda: "")
        for number in range(40):
            connection.write(number * 64, bytes([number + 1]) * 128)
        connection.write(0, b"z" * 64)
        connection.sync()
        ours.shutdown(socket.SHUT_WR)
        serving.result()
    expected = b"z" * 64 + b"".join(bytes([number + 1]) * 64 for number in range(1, 40))
    assert content[: len(expected)] == expected


def test_server_that_ends_is_an_error(make: Make, tool: Callable[[str, str], Path]) -> None:
    place = make("file-uri", MIB)
    target = disk.open_target(place.disk)
    tool("qemu-nbd", 'timeout 1 /usr/bin/qemu-nbd "$@" ; echo was killed >&2')
    with pytest.raises(Error) as caught, target.opened(writable=True) as handle:
        time.sleep(1.1)
        handle.write(0, b"x" * 512)
    assert caught.value.message == f"file:{place.file}: was killed"


def test_an_error_of_the_protocol_has_no_cause() -> None:
    """Least of all itself: the trace of DEBUG_LEVEL=1 would not end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"NBDMAGIC" + bytes(10))
        with pytest.raises(Error, match="does not speak NBD's newstyle") as caught:
            nbd.Connection(ours, "nbd:", lambda: "")
    assert list(islice(causes(caught.value), 9)) == [caught.value]
