"""The command cloudimage, run as an administrator would."""

from __future__ import annotations

import hashlib
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from lib.environment import Environment
from lib.settings import params
from lib.source import obtain
from tests import httpd
from tests.conftest import ROOT, SYSTEM_PATH, require
from tests.images import MIB, convert, disk_image

Done = subprocess.CompletedProcess[str]


class Command:
    """Calls cloudimage, with a configuration and a cache of its own."""

    def __init__(self, folder: Path, program: Path = ROOT / "lib/cloudimage") -> None:
        self.folder, self.program, self.cache = folder, program, folder / "cache"
        (folder / "variants.d").mkdir(parents=True, exist_ok=True)
        (folder / "cloudimage.conf").write_text(f"[cache]\ndir = {self.cache}\n[http]\nretries=0\n")
        self.environment = {"PATH": SYSTEM_PATH, "CLOUDIMAGE_CONFDIR": str(folder)}

    def __call__(self, *arguments: object) -> Done:
        argv = [str(self.program), *map(str, arguments)]
        return subprocess.run(argv, env=self.environment, capture_output=True, text=True)

    def variant(self, name: str, text: str) -> None:
        (self.folder / f"variants.d/{name}.conf").write_text(f"[variant]\n{text}\n")


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "conf")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a raw image, and the same as qcow2 beside it."""
    require("sfdisk", "qemu-img", "bwrap", "prlimit")
    path = disk_image(tmp_path_factory.mktemp("images") / "image.raw", "gpt", 12)
    convert(path, "qcow2")
    return path


def name_of(command: Command) -> str:
    (note,) = command.cache.glob("*.json")
    return note.name[:12]


# --- the commands ----------------------------------------------------------------------------


def test_the_life_of_an_entry(command: Command, image: Path) -> None:
    data = image.with_suffix(".qcow2").read_bytes()
    with httpd.serve({"/image": httpd.content(data)}) as server:
        url = server.url("/image")
        checksum = f"checksum=sha256:{hashlib.sha256(data).hexdigest()}"
        done = command("fetch", "-O", checksum, url)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.splitlines()[-1] == f"fetch: {url} is ready, 12 MiB once on a disk"
        assert "WARNING" not in done.stderr
        done = command("fetch", "-O", checksum, url)
        assert done.returncode == 0, done.stderr
        assert f"image: {url} is in the cache (sha256 as expected)" in done.stderr
        assert server.count("/image") == 1
    name = name_of(command)
    done = command("cache")
    assert (done.returncode, done.stderr) == (0, "")
    entry, total = done.stdout.splitlines()
    row = rf"{name} +[0-9.]+ MiB +0h00 ago +used 0h00 ago  {re.escape(url)}"
    assert re.fullmatch(row, entry)
    assert re.fullmatch(rf"1 images, [0-9.]+ MiB of 20 GiB in {command.cache}", total)
    done = command("prune")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = command("prune", "--all")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"removed {name} +[0-9.]+ MiB  {re.escape(url)}\n", done.stdout)
    assert list(command.cache.iterdir()) == []
    assert command("cache").stdout == f"0 images, 0 bytes of 20 GiB in {command.cache}\n"


def test_fetch_takes_variants_urls_and_paths(command: Command, image: Path) -> None:
    data = image.with_suffix(".qcow2").read_bytes()
    with httpd.serve({"/a": httpd.content(data), "/b": httpd.content(data)}) as server:
        command.variant("mine", f"image = {server.url('/a')}")
        path = image.with_suffix(".qcow2")
        done = command("fetch", "mine", server.url("/b"), path)
        assert done.returncode == 0, done.stderr
    ready = [line for line in done.stderr.splitlines() if line.endswith("12 MiB once on a disk")]
    assert [line.split()[1] for line in ready] == ["mine", server.url("/b"), str(path)]
    assert len(list(command.cache.glob("*.raw"))) == 3


def test_every_failure_is_told_and_the_rest_is_fetched(command: Command, image: Path) -> None:
    with httpd.serve({"/image": httpd.content(image.read_bytes())}) as server:
        missing, good = server.url("/missing", user="me:s3cret"), server.url("/image")
        done = command("fetch", "debain-12", missing, "relative/path", good, "/nonexistent")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    shown = missing.replace("me:s3cret", "***")
    assert errors == [
        "ERROR: debain-12: OS_VARIANT=debain-12: there is no variants.d/debain-12.conf;"
        " did you mean debian-12?",
        f"ERROR: {shown}: answered 404 Not Found; check the URL; vendors remove old builds",
        "ERROR: relative/path: image=relative/path (OS parameter): must be an absolute path,"
        " or a file://, http:// or https:// URL",
        "ERROR: /nonexistent: No such file or directory",
    ]
    assert f"fetch: {good} is ready, 12 MiB once on a disk" in done.stderr
    assert "s3cret" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("checksum", "-O checksum: has no value; write NAME=VALUE; a comma in a value is \\,"),
        ("checksum=no", "checksum=no (OS parameter): must be none, sha256: with 64"),
        ("chksum=none", "OSP_CHKSUM: unknown OS parameter; did you mean checksum?"),
        ("checksum=sha256:" + "0" * 64, "and should be " + "0" * 64),
    ],
)
def test_bad_settings(command: Command, image: Path, setting: str, words: str) -> None:
    done = command("fetch", "-O", setting, image)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]


def test_what_is_in_use_is_kept(command: Command, image: Path) -> None:
    variables = {**command.environment, "OSP_IMAGE": str(image.with_suffix(".qcow2"))}
    with obtain.raw_image(params.parse(Environment.from_environ(variables))):
        assert "in use  file://" in command("cache").stdout
        assert command("prune", "--all").stdout == ""
    assert command("prune", "--all").stdout.startswith("removed ")


def test_variants(command: Command) -> None:
    command.variant(
        "mine",
        "description = ours\nimage = https://user:s3cret@example.com/{arch}.qcow2?token=s3cret\n"
        "checksum = https://example.com/SUMS\nsignature = inline\nkeyring = /etc/keys.gpg",
    )
    done = command("variants")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    at = lines.index("mine: ours  (not in variants.list: Ganeti does not offer it)")
    assert lines[at + 1 : at + 4] == [
        f"  image      https://***@example.com/{os.uname().machine}.qcow2?***",
        "  checksum   https://example.com/SUMS",
        "  signature  inline",
    ]
    assert "default: " in done.stdout
    assert "  image      (from -O image=)" in lines
    texts = [path.read_text() for path in (ROOT / "variants.d").glob("*.conf")]
    named = [re.search("^architecture = (.*)$", text, re.MULTILINE) for text in texts]
    here = [each for each in named if not each or os.uname().machine in each[1].split()]
    assert len(lines) == 4 * len([*here, "mine"])


def test_a_variant_for_other_machines(command: Command) -> None:
    """It is no fault of this node, but an answer to who asks for it."""
    command.variant("theirs", "architecture = s390x\nimage = https://example.com/a.qcow2")
    for words in (["variants"], ["variants", "--json"]):
        done = command(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert "theirs" not in done.stdout
    assert "theirs" not in command("check").stdout
    done = command("variants", "theirs")
    assert done.returncode == 1
    assert f"architecture=s390x: this node is {os.uname().machine}" in done.stderr


def test_a_broken_variant_hides_no_other(command: Command) -> None:
    command.variant("broken", "imgae = /a")
    command.variant("mine", "image = relative")
    done = command("variants")
    assert done.returncode == 1
    assert "debian-12: " in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 2
    assert "unknown key imgae in [variant]; did you mean image?" in errors[0]
    assert "mine.conf): must be an absolute path" in errors[1]


def test_a_broken_configuration(command: Command) -> None:
    (command.folder / "cloudimage.conf").write_text("[cache]\nmax_size = much\n")
    for words in (["cache"], ["prune"], ["fetch", "default"]):
        done = command(*words)
        assert done.returncode == 1
        assert "[cache] max_size=much: must be a size such as 20G" in done.stderr
        assert "Traceback" not in done.stderr


def test_an_unsafe_cache(command: Command) -> None:
    command.cache.mkdir()
    command.cache.chmod(0o777)
    for word in ("cache", "prune"):
        done = command(word)
        assert done.returncode == 1
        assert done.stderr.startswith(f"ERROR: cache {command.cache}: ")


def test_nothing_is_fetched_that_would_not_be_kept(command: Command) -> None:
    command.cache.touch()
    with httpd.serve({}) as server:
        done = command("fetch", server.url("/image"))
        assert server.seen == []
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"ERROR: cache {command.cache}: is a symbolic link or no dir")


def test_only_names_are_variants(command: Command, image: Path) -> None:
    for words in (["variants"], ["fetch"]):
        assert "the variant's name is empty; cloudimage" in command(*words, "").stderr
    for name in (str(image), "a/b", "-x", "a\nb"):
        assert command("variants", "--", name).stderr.startswith("ERROR: OS_VARIANT='")
        done = command("variants", "--check", "--", name)
        assert (done.returncode, len(done.stdout.splitlines())) == (1, 1)


@pytest.mark.parametrize("words", [[], ["cache"], ["fetch"], ["prune"], ["variants"]])
def test_help(command: Command, words: list[str]) -> None:
    done = command(*words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: cloudimage{''.join(f' {word}' for word in words)} [-h]")
    if not words:
        for name in ("fetch", "cache", "prune", "variants"):
            assert re.search(rf"^ +{name} +\w", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("words", [[], ["fetch"], ["fech"], ["cache", "x"], ["prune", "--none"]])
def test_wrong_arguments(command: Command, words: list[str]) -> None:
    done = command(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: cloudimage")


def test_a_reader_that_goes_away(command: Command) -> None:
    argv = ["bash", "-c", f"set -o pipefail; {command.program} variants | head -n 0"]
    done = subprocess.run(argv, env=command.environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("words", ["cache", "variants", "variants nonexistent", "--help"])
def test_an_output_that_cannot_be_written_is_one_line(command: Command, words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    argv = [str(command.program), *words.split()]
    with open(writing, "wb") as broken, open("/dev/full", "wb") as full:
        for output, said in ((broken, "the reader of the output went"), (full, "No space left")):
            done = subprocess.run(
                argv, env=command.environment, stdout=output, stderr=subprocess.PIPE, text=True
            )
            assert done.returncode == 1
            (line,) = done.stderr.splitlines()
            assert said in line or words == "variants nonexistent"


@pytest.mark.parametrize("words", ["cache", "cache --json", "variants debian-12"])
def test_nobody_wants_to_read(command: Command, words: str) -> None:
    argv = ["sh", "-c", f"exec {command.program} {words} >&-"]
    done = subprocess.run(argv, env=command.environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- progress --------------------------------------------------------------------------------


def slowly(data: bytes) -> httpd.Behaviour:
    """Send a MiB, wait for longer than a terminal's line stands, and send the rest."""

    def behave(exchange: httpd.Exchange) -> None:
        exchange.head(200, {"Content-Length": str(len(data))})
        exchange.write(data[:MIB])
        exchange.pause(0.4)
        exchange.write(data[MIB:])

    return behave


def test_progress_on_a_terminal_only(command: Command, image: Path) -> None:
    with httpd.serve({"/image": slowly(image.read_bytes())}) as server:
        url = server.url("/image")
        argv = [str(command.program), "fetch", url]
        terminal, ours = pty.openpty()
        with open(terminal, "rb", buffering=0) as reader:
            subprocess.run(argv, env=command.environment, stderr=ours, check=True)
            os.close(ours)
            seen = b""
            try:
                while block := reader.read(4096):
                    seen += block
            except OSError:
                pass  # a terminal ends with EIO
        assert re.search(
            rf"\rfetch: {re.escape(url)}: \d+ % of 12 MiB, \d+ s left\r".encode(), seen
        )
        assert seen.endswith(f"fetch: {url} is ready, 12 MiB once on a disk\r\n".encode())
        command("prune", "--all")
        done = command("fetch", url)
    assert done.returncode == 0
    assert "\r" not in done.stderr
    assert "%" not in done.stderr
