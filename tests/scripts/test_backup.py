"""export and import as Ganeti's impexpd runs them: in a pipe, with the daemon's environment."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Union

import pytest

from tests.conftest import ROOT, require
from tests.images import MIB, convert, disk_image
from tests.scripts.conftest import Door, Result

MIBS = 20
SIZE = MIBS * MIB
OLD = b"\xff"
Make = Callable[..., Path]
Place = Union[Path, str]
PACKERS = {
    "raw": ["cat"],
    "gzip": ["gzip", "-1"],
    "xz": ["xz", "-0"],
    "bzip2": ["bzip2", "-1"],
    "zstd": ["zstd", "-1"],
}


def pack(packer: str, source: Path, dump: Path) -> Path:
    """Pipe the disk through a tool, as other providers' export does."""
    require(PACKERS[packer][0])
    with source.open("rb") as disk, dump.open("wb") as output:
        subprocess.run(PACKERS[packer], stdin=disk, stdout=output, check=True)
    return dump


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a disk with a table, data and holes, of which the last is 8 MiB long."""
    require("sgdisk")
    path = disk_image(tmp_path_factory.mktemp("source") / "disk", size_mib=12)
    os.truncate(path, SIZE)
    subprocess.run(["sgdisk", "--move-second-header", path], check=True)
    return path


@pytest.fixture(scope="module")
def dumps(source: Path) -> dict[str, Path]:
    """Dump the disk as each of the other providers might."""
    return {packer: pack(packer, source, source.parent / packer) for packer in PACKERS}


def inherited(door: Door, disks: list[Path], **more: str) -> dict[str, str]:
    """Return the environment: the node daemon's, with what Ganeti sets for OS scripts on top."""
    return {**os.environ, "LC_ALL": "C", "HOME": "/", **door.environment(disks, more)}


def place(kind: str, disk: Place, index: int = 0) -> dict[str, str]:
    """Return what names the disk to export ("EXPORT") or to import to ("IMPORT")."""
    if isinstance(disk, str):
        return {f"{kind}_DISK_URI": disk, f"{kind}_INDEX": str(index)}
    named = {f"{kind}_DEVICE": str(disk), f"{kind}_DISK_PATH": str(disk)}
    return {**named, f"{kind}_INDEX": str(index)}


def export(door: Door, disk: Place, dump: Path, **more: str) -> Result:
    """Let bash run the pipe as impexpd has it; the dump goes to a file."""
    environment = inherited(door, [], **place("EXPORT", disk), **more)
    pipe = f"( cd {ROOT} && ./export; ) | cat > {dump}"
    return _run(pipe, environment)


def restore(door: Door, dump: Path, disk: Place, **more: str) -> Result:
    environment = inherited(door, [], **place("IMPORT", disk), **more)
    return _run(f"cat {dump} | ( cd {ROOT} && ./import; )", environment)


def _run(pipe: str, environment: dict[str, str]) -> Result:
    done = subprocess.run(
        ["bash", "-o", "errexit", "-o", "pipefail", "-c", pipe],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    assert done.stdout == b""
    log = done.stderr.decode("ascii")
    return Result(done.returncode, log, log)


def used(disk: Path) -> int:
    return disk.stat().st_blocks * 512


def head_is_zero(disk: Path) -> bool:
    with disk.open("rb") as file:
        return not any(file.read(MIB))


# --- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_round_trip(door: Door, disk: Make, source: Path, tmp_path: Path, compression: str) -> None:
    door.configure(f"[export]\ncompression = {compression}\n")
    target, dump = disk(MIBS), tmp_path / "dump"
    result = export(door, source, dump)
    assert (result.status, result.log) == (0, "")
    if compression == "none":
        assert dump.read_bytes() == source.read_bytes()
    else:
        unpacked = subprocess.run(["zstd", "-dc", dump], check=True, capture_output=True)
        assert unpacked.stdout == source.read_bytes()
        assert dump.stat().st_size < used(source) + MIB
    result = restore(door, dump, target)
    assert (result.status, result.log) == (0, "")
    assert target.read_bytes() == source.read_bytes()
    assert used(target) <= used(source) + 2 * MIB  # the first is written whole


def test_over_old_content(door: Door, disk: Make, source: Path, tmp_path: Path) -> None:
    target, dump = disk(MIBS), tmp_path / "dump"
    target.write_bytes(OLD * SIZE)
    assert export(door, source, dump).status == 0
    assert restore(door, dump, target).status == 0
    assert target.read_bytes() == source.read_bytes()
    assert used(target) <= used(source) + 2 * MIB  # the first is written whole


@pytest.mark.parametrize("kind", ["file", "nbd"])
def test_disks_without_a_path(
    door: Door,
    disk: Make,
    source: Path,
    tmp_path: Path,
    nbd: Callable[[Path], str],
    kind: str,
) -> None:
    copy, dump = disk(MIBS), tmp_path / "dump"
    copy.write_bytes(source.read_bytes())
    uri = nbd(copy) if kind == "nbd" else f"file:{copy}"
    assert export(door, uri, dump).status == 0
    copy.write_bytes(OLD * SIZE)
    result = restore(door, dump, uri)
    assert result.status == 0, result.log
    assert copy.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(("compression", "exact"), [("none", True), ("zstd", False)])
def test_size_estimate(
    door: Door, source: Path, tmp_path: Path, compression: str, exact: bool
) -> None:
    door.configure(f"[export]\ncompression = {compression}\n")
    reader, writer = os.pipe()
    with open(reader) as told, (tmp_path / "dump").open("wb") as dump:
        environment = inherited(door, [], **place("EXPORT", source), EXP_SIZE_FD=str(writer))
        argv = [str(ROOT / "export")]
        subprocess.run(argv, env=environment, stdout=dump, pass_fds=[writer], check=True)
        os.close(writer)
        line = told.read()
    assert line.endswith("\n")
    assert int(line) == SIZE if exact else 0 < int(line) <= used(source)


def test_one_of_several_disks(door: Door, disk: Make, source: Path, tmp_path: Path) -> None:
    """What is exported is said by EXPORT_ alone, whatever DISK_ says."""
    disks, dump = [disk(name="disk0"), disk(MIBS, "disk1")], tmp_path / "dump"
    environment = inherited(door, disks, **place("EXPORT", source, 1))
    assert _run(f"{ROOT}/export > {dump}", environment).status == 0
    environment = inherited(door, disks, **place("IMPORT", disks[1], 1))
    assert _run(f"{ROOT}/import < {dump}", environment).status == 0
    assert disks[1].read_bytes() == source.read_bytes()
    assert used(disks[0]) == 0


# --- what others exported --------------------------------------------------------------------


@pytest.mark.parametrize("packer", PACKERS)
def test_dumps_of_others(
    door: Door, disk: Make, source: Path, dumps: dict[str, Path], packer: str
) -> None:
    target = disk(MIBS)
    result = restore(door, dumps[packer], target)
    assert (result.status, result.log) == (0, "")
    assert target.read_bytes() == source.read_bytes()
    assert used(target) <= used(source) + 2 * MIB  # the first is written whole


# --- disks of another size -------------------------------------------------------------------


def test_a_larger_disk(door: Door, disk: Make, source: Path, tmp_path: Path) -> None:
    target, dump = disk(40), tmp_path / "dump"
    target.write_bytes(OLD * 40 * MIB)
    assert export(door, source, dump).status == 0
    result = restore(door, dump, target)
    assert result.status == 0, result.log
    checked = subprocess.run(["sgdisk", "-v", target], capture_output=True, text=True, check=True)
    assert "No problems found" in checked.stdout
    want, got = source.read_bytes(), target.read_bytes()
    assert got[MIB : SIZE - MIB] == want[MIB : SIZE - MIB]
    assert got[:458] + got[462:512] == want[:458] + want[462:512]
    listed = subprocess.run(["sfdisk", "-l", target], capture_output=True, text=True, check=True)
    assert "PMBR size mismatch" not in listed.stderr + listed.stdout
    assert got[-512:].startswith(b"EFI PART")


def test_a_larger_disk_for_an_mbr(door: Door, disk: Make, tmp_path: Path) -> None:
    source, target = disk_image(tmp_path / "mbr", "mbr", 12), disk(28)
    result = restore(door, pack("zstd", source, tmp_path / "dump"), target)
    assert (result.status, result.log) == (0, "")
    assert target.read_bytes() == source.read_bytes() + bytes(16 * MIB)


def test_a_larger_disk_without_a_table(door: Door, disk: Make, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3 * MIB)
    (tmp_path / "data").write_bytes(data)
    target = disk(8)
    result = restore(door, pack("zstd", tmp_path / "data", tmp_path / "dump"), target)
    assert (result.status, result.log) == (0, "")
    assert target.read_bytes() == data + bytes(5 * MIB)


def test_a_damaged_table_is_restored_as_it_was(
    door: Door, disk: Make, source: Path, tmp_path: Path
) -> None:
    data = bytearray(source.read_bytes())
    data[512 + 40] ^= 1  # in both copies, as far as the checksum goes
    data[-512 + 40] ^= 1
    (tmp_path / "data").write_bytes(data)
    target = disk(28)
    result = restore(door, pack("raw", tmp_path / "data", tmp_path / "dump"), target)
    assert result.status == 0, result.log
    assert result.error.startswith(f"WARNING: {target}: the partition table is left as it was: ")
    assert target.read_bytes() == bytes(data) + bytes(8 * MIB)


@pytest.mark.parametrize("packer", PACKERS)
def test_a_smaller_disk(door: Door, disk: Make, dumps: dict[str, Path], packer: str) -> None:
    target = disk(16)
    target.write_bytes(OLD * 16 * MIB)
    result = restore(door, dumps[packer], target)
    assert result.status == 1
    assert result.error == (
        f"ERROR: importing to {target}: {target}: the dump's bytes do not fit on a disk of"
        f" 16 MiB ({16 * MIB} bytes); use --disk 0:size= with the size of the dumped disk"
    )
    assert head_is_zero(target)


# --- damage ----------------------------------------------------------------------------------


def cut(dump: bytes) -> bytes:
    return dump[: len(dump) // 2]


def cut_at_the_end(dump: bytes) -> bytes:
    return dump[:-3]


def flipped(dump: bytes) -> bytes:
    middle = len(dump) // 2
    return dump[:middle] + bytes([dump[middle] ^ 0x10]) + dump[middle + 1 :]


def with_garbage(dump: bytes) -> bytes:
    return dump + b"garbage" * 100


@pytest.mark.parametrize("damage", [cut, cut_at_the_end, flipped, with_garbage])
@pytest.mark.parametrize("packer", ["gzip", "xz", "bzip2", "zstd"])
def test_damaged_dumps(
    door: Door,
    disk: Make,
    tmp_path: Path,
    dumps: dict[str, Path],
    packer: str,
    damage: Callable[[bytes], bytes],
) -> None:
    dump = tmp_path / "dump"
    dump.write_bytes(damage(dumps[packer].read_bytes()))
    target = disk(MIBS)
    target.write_bytes(OLD * SIZE)
    result = restore(door, dump, target)
    assert result.status == 1
    assert result.error.startswith(f"ERROR: importing to {target}: "), result.log
    assert head_is_zero(target)
    assert not any(target.read_bytes()[-MIB:])


@pytest.mark.parametrize("table", ["gpt", "mbr"])
@pytest.mark.parametrize("mib", [MIBS, 2 * MIBS])
def test_a_raw_dump_that_is_cut(
    door: Door, disk: Make, tmp_path: Path, table: str, mib: int
) -> None:
    """Its table is all that tells."""
    dump, target = disk_image(tmp_path / "dump", table, MIBS), disk(mib)
    end = 0
    for line in subprocess.check_output(["sfdisk", "--dump", dump], text=True).splitlines():
        if found := re.search(r"start= *([0-9]+), size= *([0-9]+)", line):
            end = max(end, 512 * (int(found[1]) + int(found[2])))
    os.truncate(dump, end - 512)
    target.write_bytes(OLD * mib * MIB)
    result = restore(door, dump, target)
    assert result.status == 1
    assert result.error == (
        f"ERROR: importing to {target}: the dump is cut short: it has {end - 512} bytes, and its"
        f" partitions {end}; export it again, or import it as it is to a disk of exactly its size"
    )
    assert head_is_zero(target)
    os.truncate(dump, end)  # without the second GPT: somebody took what counts
    assert restore(door, dump, target).status == 0


@pytest.mark.parametrize("fmt", ["qcow2", "vmdk", "vhdx"])
@pytest.mark.parametrize("packer", ["cat", "gzip"])
def test_an_image_is_no_dump(
    door: Door, disk: Make, source: Path, tmp_path: Path, fmt: str, packer: str
) -> None:
    """The bytes of another format would be a disk of garbage."""
    image, dump, target = tmp_path / "image", tmp_path / "dump", disk(40)
    shutil.copy(source, image)
    with convert(image, fmt).open("rb") as file, dump.open("wb") as output:
        subprocess.run([packer], stdin=file, stdout=output, check=True)
    before = target.read_bytes()
    result = restore(door, dump, target)
    assert result.status == 1
    assert result.error == (
        f"ERROR: importing to {target}: the dump is a {fmt} image and not the raw bytes of a disk;"
        " gnt-instance add -O image= takes it, or qemu-img convert -O raw first"
    )
    assert target.read_bytes() == before


def test_an_empty_dump(door: Door, disk: Make, tmp_path: Path) -> None:
    target = disk(2)
    target.write_bytes(OLD * 2 * MIB)
    (tmp_path / "dump").touch()
    result = restore(door, tmp_path / "dump", target)
    assert result.status == 1
    assert result.error == (
        f"ERROR: importing to {target}: the dump is empty; look for why the export wrote nothing"
    )
    assert target.read_bytes() == OLD * 2 * MIB


def test_a_dump_that_needs_too_much_memory(
    door: Door, disk: Make, source: Path, tmp_path: Path
) -> None:
    require("zstd")
    target, dump = disk(MIBS), tmp_path / "dump"
    with dump.open("wb") as output:  # of a pipe zstd does not know that it is small
        command = ["zstd", "-q", "--long=31"]
        subprocess.run(command, input=source.read_bytes(), stdout=output, check=True)
    before = target.read_bytes()
    result = restore(door, dump, target)
    assert result.status == 1
    assert result.error.startswith(
        f"ERROR: importing to {target}: unpacking zst: it needs more memory to unpack than is"
    )
    assert target.read_bytes() == before


def test_a_sender_that_dies(door: Door, disk: Make, source: Path, tmp_path: Path) -> None:
    target, dump = disk(MIBS), tmp_path / "dump"
    assert export(door, source, dump).status == 0
    environment = inherited(door, [], **place("IMPORT", target))
    result = _run(f"( head -c 100000 {dump}; exit 3 ) | {ROOT}/import", environment)
    assert result.status != 0
    assert head_is_zero(target)


# --- other failures --------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_closed_pipe(door: Door, source: Path, compression: str) -> None:
    door.configure(f"[export]\ncompression = {compression}\n")
    environment = inherited(door, [], **place("EXPORT", source))
    result = _run(f"{ROOT}/export | head -c 1000 > /dev/null", environment)
    assert result.status == 1
    (line,) = result.log.splitlines()
    assert "reader of the" in line
    assert "went away" in line


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_full_output(door: Door, source: Path, compression: str) -> None:
    door.configure(f"[export]\ncompression = {compression}\n")
    environment = inherited(door, [], **place("EXPORT", source))
    result = _run(f"{ROOT}/export > /dev/full", environment)
    assert result.status == 1
    assert result.error.startswith("ERROR: exporting ")
    assert "No space left on device" in result.error


@pytest.mark.parametrize(
    ("script", "more", "words"),
    [
        ("export", {}, "EXPORT_DEVICE is not set; let Ganeti call this script"),
        ("import", {}, "IMPORT_DEVICE is not set; let Ganeti call this script"),
        ("export", {"EXPORT_DEVICE": "/nonexistent"}, "/nonexistent: no such disk"),
        ("import", {"IMPORT_DEVICE": "/nonexistent"}, "/nonexistent: no such disk"),
        ("export", {"EXPORT_DEVICE": "/dev/null"}, "/dev/null: neither a block device nor a"),
        ("export", {"EXPORT_DISK_URI": "json:{}"}, "EXPORT_DISK_URI='json:{}'"),
        ("export", {"EXPORT_DISK_URI": "file:/nonexistent"}, "No such file or directory"),
        ("import", {"IMPORT_DISK_URI": "file:/nonexistent"}, "No such file or directory"),
        ("export", {"EXPORT_DEVICE": "/dev/null", "EXP_SIZE_FD": "x"}, "EXP_SIZE_FD='x' is not"),
    ],
)
def test_bad_variables(door: Door, script: str, more: dict[str, str], words: str) -> None:
    result = _run(f"{ROOT}/{script}", inherited(door, [], **more))
    assert result.status == 1
    assert result.error.startswith("ERROR: ")
    assert words in result.error


def test_bad_configuration(door: Door, source: Path, tmp_path: Path) -> None:
    door.configure("[export]\ncompression = lzo\n")
    result = export(door, source, tmp_path / "dump")
    assert result.status == 1
    assert result.error.endswith("[export] compression=lzo: must be zstd or none")


LARGEST = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def test_import_needs_little_memory(door: Door, disk: Make, tmp_path: Path) -> None:
    """The largest process in KiB; asked by a small one, as what forks counts as the child too."""
    data, target = tmp_path / "data", disk(400)
    data.write_bytes(random.Random(1).randbytes(40 * MIB))
    os.truncate(data, 400 * MIB)
    with pack("zstd", data, tmp_path / "dump").open("rb") as dump:
        done = subprocess.run(
            ["/usr/bin/python3", "-c", LARGEST, str(ROOT / "import")],
            env=inherited(door, [], **place("IMPORT", target)),
            stdin=dump,
            stdout=subprocess.PIPE,
            check=True,
        )
    assert int(done.stdout) < 60 << 10
    subprocess.run(["cmp", data, target], check=True)
