"""The cache among real processes: shared fills, races on every step, kills, eviction, damage."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Callable, Optional

import pytest

from lib.entry import Interrupted, guard
from lib.errors import Error
from lib.source.cache import Cache, Refresh
from lib.source.stored import Note
from tests.conftest import ROOT, require

KEY = "https://example.com/image.qcow2"
NOTE = {"url": KEY, "digests": {}, "fetched": "2026-11-27T00:00:00Z"}
FORK = multiprocessing.get_context("fork")
# What a process does to the file system, as its profiler sees it
STEPS = {
    *("flock", "open", "mkdir", "chmod", "fsync", "rename", "replace", "unlink", "rmdir", "utime"),
    *("listdir", "scandir"),
}
Made = Optional[tuple[Path, Note]]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """Hand out a cache in memory: the tests call fsync thousands of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as directory:
        yield Cache(Path(directory) / "cache", 1 << 30, 3600.0)


def fill(content: str, size_bytes: int = 0) -> Refresh:
    """Return a refresh() that always makes the image anew."""

    def refresh(_old: Optional[Note], work: Path) -> Made:
        raw = work / "image"
        raw.write_text(content)
        if size_bytes:
            os.truncate(raw, size_bytes)
        return raw, {**NOTE, "content": content}

    return refresh


def keep(_old: Optional[Note], work: Path) -> Made:
    """Revalidate: what is there is good."""
    return None if _old else fill("refilled")(None, work)


def use(cache: Cache, refresh: Refresh, key: str = KEY) -> str:
    """Open the entry, check that image and note belong together, return the content."""
    with cache.entry(key, refresh) as entry:
        assert entry.size_bytes == entry.note.get("size", entry.size_bytes)
        content = entry.file.read(1 << 20).rstrip(b"\0").decode()
        assert content == entry.note["content"]
    return content


def kinds(cache: Cache) -> list[str]:
    """Return what is in the directory, without the names of the entries."""
    return sorted(name.rpartition(".")[2] for name in os.listdir(cache.directory))


def only(cache: Cache, kind: str) -> Path:
    (path,) = cache.directory.glob(f"*.{kind}")
    return path


def is_locked(path: Path) -> bool:
    """Ask flock(1)."""
    return subprocess.run(["flock", "--nonblock", path, "true"]).returncode != 0


@contextmanager
def child(action: Callable[[], object]) -> Iterator[multiprocessing.process.BaseProcess]:
    """Run `action` in a process of its own, which does not outlive the block."""
    process = FORK.Process(target=action)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def at_step(number: int, signal_number: int, action: Callable[[], object]) -> None:
    """Run `action`, and send this process a signal before its n-th step on the file system."""
    steps = itertools.count(1)

    def profile(frame: FrameType, event: str, function: object) -> None:
        called = getattr(function, "__name__", "") if event == "c_call" else ""
        python = frame.f_code.co_name if event == "call" else ""
        if (called in STEPS or python == "lstat") and next(steps) == number:
            os.kill(os.getpid(), signal_number)

    sys.setprofile(profile)
    action()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_blocked(pid: Optional[int], inode: object = "") -> bool:
    """Say whether the kernel has the process in the queue of a lock (on that inode)."""
    locks = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f" {pid} " in line and f":{inode} " in line for line in locks)


def act(cache: Cache, action: str) -> None:
    """What one of two racing processes does."""
    if action == "look":
        cache.entries()
    elif action == "list":
        assert len(cache.entries()) == 1
    elif action == "evict":
        cache.prune(everything=True)
    else:
        use(cache, keep if action == "use" else fill("filled"))


# --- one process -----------------------------------------------------------------------------


def test_second_use_finds_what_the_first_made(cache: Cache) -> None:
    seen: list[Optional[Note]] = []

    def refresh(old: Optional[Note], work: Path) -> Made:
        assert work.parent == cache.directory and not list(work.iterdir())
        assert stat.S_IMODE(work.stat().st_mode) == 0o700
        seen.append(old)
        return keep(old, work)

    assert [use(cache, refresh), use(cache, refresh)] == ["refilled", "refilled"]
    assert seen[0] is None
    assert seen[1] is not None and seen[1]["url"] == KEY
    assert kinds(cache) == ["json", "lock", "raw"]
    assert json.loads(only(cache, "json").read_text()) == seen[1]


def test_modes(tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        cache = Cache(tmp_path / "parent" / "cache", 1 << 30, 3600.0)
        use(cache, fill("one"))
    finally:
        os.umask(umask)
    modes = {
        path.name.rpartition(".")[2]: stat.S_IMODE(path.stat().st_mode)
        for path in (cache.directory.parent, cache.directory, *cache.directory.iterdir())
    }
    assert modes == {"parent": 0o755, "cache": 0o700, "json": 0o600, "lock": 0o600, "raw": 0o600}


@pytest.mark.parametrize("key", ["../x", "a" * 5000, "\x1b[31m\n", "\udcff", ""])
def test_any_key_is_a_name(cache: Cache, key: str) -> None:
    assert use(cache, fill("one"), key) == "one"
    assert kinds(cache) == ["json", "lock", "raw"]


def test_replaced_while_in_use(cache: Cache) -> None:
    with cache.entry(KEY, fill("old")) as old:
        assert use(cache, fill("new")) == "new"
        assert old.file.read() == b"old"
    assert kinds(cache) == ["json", "lock", "raw"]


@pytest.mark.parametrize(
    "failure",
    [
        Error("digest differs", "try"),
        OSError(5, "I/O error"),
        Interrupted(signal.SIGTERM),
        ValueError(),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_what_refresh_raises_passes_through(cache: Cache, failure: BaseException) -> None:
    def refresh(_old: Optional[Note], work: Path) -> Made:
        (work / "half").write_bytes(b"x")
        raise failure

    with pytest.raises(type(failure)) as caught:
        use(cache, refresh)
    assert caught.value is failure
    assert kinds(cache) == []
    use(cache, fill("old"))
    with pytest.raises(type(failure)):
        use(cache, refresh)
    assert kinds(cache) == ["json", "lock", "raw"]
    assert use(cache, keep) == "old"


def test_full_file_system_is_one_error(cache: Cache) -> None:
    def refresh(_old: Optional[Note], work: Path) -> Made:
        (work / "half").write_bytes(bytes(1 << 20))
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
        return None

    use(cache, fill("old"))
    with pytest.raises(Error) as caught:
        use(cache, refresh)
    assert str(caught.value) == (
        f"no space left in {cache.directory} after 1 MiB of the image (No space left on device);"
        " run cloudimage prune, or change dir or lower max_size in [cache] of cloudimage.conf"
    )
    assert use(cache, keep) == "old"


def test_nothing_to_keep_is_a_bug(cache: Cache) -> None:
    with pytest.raises(AssertionError):
        use(cache, lambda _old, _work: None)


def edited(**changes: object) -> Callable[[Path], object]:
    def damage(note: Path) -> None:
        note.write_text(json.dumps({**json.loads(note.read_text()), **changes}))

    return damage


def written(text: bytes) -> Callable[[Path], object]:
    return lambda note: note.write_bytes(text)


def on_raw(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda note: change(next(note.parent.glob("*.raw")))


def into_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def into_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def into_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda note: os.truncate(note, 40), "is not a JSON object"),
        (written(b""), "is not a JSON object"),
        (written(b"\xff\xfe"), "is not a JSON object"),
        (written(b"[" * 100000), "is not a JSON object"),
        (written(b'["url"]'), "is not a JSON object"),
        (edited(version=None), "is of version None, not 2"),
        (edited(version=0), "is of version 0, not 2"),
        (edited(file="../x"), "names the file '../x', which is none of this entry"),
        (edited(file=f"{'0' * 64}.{'0' * 16}.raw"), "which is none of this entry"),
        (edited(file=None), "names the file None"),
        (edited(size="5"), "which was changed since"),
        (edited(mtime_ns=None), "which was changed since"),
        (on_raw(lambda raw: os.truncate(raw, 2)), "which was changed since"),
        (on_raw(lambda raw: raw.write_text("OLD")), "which was changed since"),
        (on_raw(Path.unlink), "No such file or directory: "),
        (on_raw(into_directory), "which was changed since"),
        (into_directory, "is a directory"),
        (into_fifo, "is not a regular file"),
        (into_link, "is a symbolic link"),
        (edited(url=None), "has no url that makes sense"),
        (edited(digests="sha256"), "has no digests that makes sense"),
        (edited(fetched=5), "has no fetched that makes sense"),
        (edited(etag=["v1"]), "has no etag that makes sense"),
    ],
)
def test_damage_is_no_entry(
    cache: Cache,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    words: str,
) -> None:
    use(cache, fill("old"))
    note = only(cache, "json")
    damage(note)
    assert cache.entries() == []
    assert use(cache, keep) == "refilled"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: {note}: ") and line.endswith("; this entry is dropped")
    assert words in line
    assert kinds(cache) == ["json", "lock", "raw"]


def test_odd_lock_files_lead_nowhere_and_keep_nobody_waiting(cache: Cache) -> None:
    use(cache, fill("old"))
    lock = only(cache, "lock")
    for spoil in (into_fifo, into_link):
        spoil(lock)
        assert use(cache, keep) == "refilled"  # in /var/tmp, with a WARNING
    assert lock.with_suffix(".moved").stat().st_size == 0


def test_a_link_to_a_folder_is_swept_and_not_followed(cache: Cache) -> None:
    use(cache, fill("old"))
    folder = cache.directory.parent / "folder"
    folder.mkdir()
    only(cache, "json").with_suffix(".work").symlink_to(folder)
    assert use(cache, keep) == "old"
    assert kinds(cache) == ["json", "lock", "raw"]
    assert folder.exists()


def test_damage_is_pruned(cache: Cache) -> None:
    use(cache, fill("old"))
    only(cache, "json").write_text("")
    assert cache.prune() == []
    assert kinds(cache) == []


# --- the directory ---------------------------------------------------------------------------


def as_link(directory: Path) -> None:
    (directory.parent / "elsewhere").mkdir(0o700)
    directory.symlink_to("elsewhere")


def as_open(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o770)


def under_open(directory: Path) -> None:
    directory.mkdir(0o700)
    directory.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (as_link, "{}: is a symbolic link or no directory"),
        (Path.touch, "{}: is a symbolic link or no directory"),
        (as_open, "{}: {} can be written by others, mode 0770"),
        (under_open, "{}: {parent} can be written by others, mode 0777"),
    ],
)
def test_unusable_directory(
    cache: Cache,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    words: str,
) -> None:
    spoil(cache.directory)
    works = []

    def refresh(old: Optional[Note], work: Path) -> Made:
        works.append(work)
        return keep(old, work)

    assert use(cache, refresh) == use(cache, refresh) == "refilled"
    assert all(w.parent == Path("/var/tmp") and not w.exists() for w in works)
    message = "cache " + words.format(*[cache.directory] * 2, parent=cache.directory.parent)
    message += "; let nobody but root write there, or change dir in [cache] of cloudimage.conf"
    line = f"WARNING: {message}; this image goes to /var/tmp and is not kept\n"
    assert capsys.readouterr().err == 2 * line
    with pytest.raises(Error, match="cache "):
        cache.entries()
    with pytest.raises(Error, match="cache "):
        cache.prune()


def test_directory_that_cannot_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache(Path("/proc/nowhere/cache"), 1 << 30, 3600.0)
    assert use(cache, keep) == "refilled"
    assert "WARNING: cache /proc/nowhere/cache: " in capsys.readouterr().err
    assert cache.entries() == cache.prune() == []


def test_failure_in_a_temporary_directory_is_the_failure(cache: Cache) -> None:
    cache.directory.touch()
    works = []

    def refresh(_old: Optional[Note], work: Path) -> Made:
        works.append(work)
        raise Error("digest differs")

    with pytest.raises(Error, match="digest differs"):
        use(cache, refresh)
    assert not works[0].exists()


def test_foreign_files_are_left_alone(cache: Cache) -> None:
    use(cache, fill("old"))
    (cache.directory / "lost+found").mkdir()
    assert len(cache.prune(everything=True)) == 1
    assert os.listdir(cache.directory) == ["lost+found"]


# --- eviction --------------------------------------------------------------------------------


def idle(cache: Cache, key: str, seconds: float) -> None:
    """Make the entry, and let its last use be so long ago."""
    use(cache, fill(key, 1 << 40), key)
    age(cache, key, seconds)


def age(cache: Cache, key: str, seconds: float) -> None:
    note = cache.directory / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    os.utime(note, (time.time() - seconds,) * 2)


def keys(cache: Cache) -> list[str]:
    return [stored.note["content"] for stored in cache.entries()]


def test_least_recently_used_goes_first_by_allocated_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = Cache(tmp_path / "probe", 1 << 30, 3600.0)
    idle(probe, "x", 0)
    (stored,) = probe.entries()  # 1 TiB, of which one block is allocated
    assert 0 < stored.allocated_bytes <= 1 << 20
    cache = Cache(tmp_path / "cache", 3 * stored.allocated_bytes, 3600.0)
    for key, seconds in (("c", 10), ("a", 30), ("b", 20)):
        idle(cache, key, seconds)
    assert use(cache, keep, "a") == "a"
    assert keys(cache) == ["b", "c", "a"]
    with cache.entry("b", keep):
        age(cache, "b", 100)  # the first in the row, but in use
        idle(cache, "d", 0)
        assert keys(cache) == ["b", "a", "d"]
    size = stored.allocated_bytes >> 10
    assert f"cache: removed {KEY} ({size} KiB, unused for 0 days)\n" == capsys.readouterr().err


def test_the_one_just_filled_stays_however_large(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 0, 3600.0)
    for key in "ab":
        assert use(cache, fill(key), key) == key
        assert keys(cache) == [key]


def test_max_age_counts_from_the_last_use(cache: Cache) -> None:
    idle(cache, "young", 3500)
    idle(cache, "old", 3700)
    assert use(cache, keep, "old") == "old"  # never the one that is asked for
    assert keys(cache) == ["young", "old"]
    age(cache, "old", 3700)
    assert [stored.note["content"] for stored in cache.prune()] == ["old"]
    age(cache, "young", 3700)
    use(cache, fill("new"), "new")
    assert keys(cache) == ["new"]


def test_entries_tell(cache: Cache) -> None:
    require("flock")
    idle(cache, "a", 100)
    (stored,) = cache.entries()
    assert stored.name == only(cache, "raw").name[:64]
    assert stored.note["url"] == KEY and stored.note["size"] == 1 << 40
    assert 100 <= stored.idle_s < 120 and 0 <= stored.age_s < 20
    assert not stored.in_use and not is_locked(stored.raw)
    with cache.entry("a", keep):
        assert stored.in_use and is_locked(stored.raw)
        assert not is_locked(only(cache, "lock"))
        assert cache.prune(everything=True) == []
    assert cache.prune(everything=True) != []
    assert not stored.in_use
    assert os.listdir(cache.directory) == []


def test_a_child_that_reads_keeps_the_entry(cache: Cache) -> None:
    with cache.entry(KEY, fill("old")) as entry:
        reader = subprocess.Popen(["sleep", "60"], pass_fds=[entry.file.fileno()])
    try:
        assert cache.prune(everything=True) == []
    finally:
        reader.kill()
        reader.wait()
    assert len(cache.prune(everything=True)) == 1


# --- many processes --------------------------------------------------------------------------

ONE_OF_TEN = """
import sys, time
from pathlib import Path
from lib.source.cache import Cache

def refresh(old, work):
    with open(sys.argv[2], "a") as calls:
        print("keep" if old else "fill", file=calls)
    if old:
        return None
    time.sleep(0.3)
    (work / "image").write_text("content")
    return work / "image", {"url": "u", "digests": {}, "fetched": "now"}

with Cache(Path(sys.argv[1]), 1 << 30, 3600.0).entry("key", refresh) as entry:
    print("open", flush=True)
    sys.stdin.read()
    print(entry.file.read().decode())
"""


def test_ten_at_once_fill_once_and_use_in_parallel(cache: Cache, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    argv = [sys.executable, "-B", "-c", ONE_OF_TEN, *map(str, (cache.directory, calls))]
    with ExitStack() as stack:
        ten = []
        for _ in range(10):
            process = subprocess.Popen(
                argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            ten.append(process)
        # All ten have it open before any of them may close it.
        assert [process.stdout and process.stdout.readline() for process in ten] == ["open\n"] * 10
        assert [process.communicate()[0] for process in ten] == ["content\n"] * 10
    assert sorted(calls.read_text().split()) == ["fill"] + ["keep"] * 9
    assert kinds(cache) == ["json", "lock", "raw"]


def test_waiter_sleeps_says_so_once_and_sees_the_new_note(
    cache: Cache, capfd: pytest.CaptureFixture[str]
) -> None:
    begun, go_on = FORK.Event(), FORK.Event()

    def slow(old: Optional[Note], work: Path) -> Made:
        begun.set()
        assert go_on.wait(20)
        return fill("slow")(old, work)

    def wait() -> None:
        assert use(cache, keep) == "slow"

    with child(lambda: use(cache, slow)) as first:
        assert begun.wait(20)
        with child(wait) as second:
            wait_until(lambda: is_blocked(second.pid))
            assert cache.entries() == cache.prune(everything=True) == []
            go_on.set()
            second.join()
            first.join()
            assert (first.exitcode, second.exitcode) == (0, 0)
    waiting = "cache: waiting for another process that fetches this image\n"
    assert capfd.readouterr().err == waiting


def test_lock_that_was_removed_while_waited_for(
    cache: Cache, capfd: pytest.CaptureFixture[str]
) -> None:
    """The one who waited must not run beside the one who got the next lock of that name."""
    begun, go_on = FORK.Event(), FORK.Event()

    def fails(_old: Optional[Note], _work: Path) -> Made:
        begun.set()
        assert go_on.wait(20)
        raise Error("no such image")

    def slow(old: Optional[Note], work: Path) -> Made:
        begun.set()
        assert go_on.wait(20)
        return fill("slow")(old, work)

    with child(lambda: use(cache, fails)) as first:
        assert begun.wait(20)
        with child(lambda: use(cache, keep)) as waiter:
            wait_until(lambda: is_blocked(waiter.pid))
            os.kill(waiter.pid or 0, signal.SIGSTOP)
            go_on.set()
            first.join()
            assert kinds(cache) == []
            begun.clear()
            go_on.clear()
            with child(lambda: use(cache, slow)) as second:
                assert begun.wait(20)
                os.kill(waiter.pid or 0, signal.SIGCONT)
                inode = only(cache, "lock").stat().st_ino
                wait_until(lambda: is_blocked(waiter.pid, inode))
                go_on.set()
                second.join()
                waiter.join()
                assert (second.exitcode, waiter.exitcode) == (0, 0)
    assert use(cache, keep) == "slow"
    assert capfd.readouterr().err.count("cache: waiting for another process") == 1


def test_waiter_can_be_interrupted(cache: Cache, capfd: pytest.CaptureFixture[str]) -> None:
    with child(lambda: use(cache, lambda _old, _work: signal.pause())) as first:
        wait_until(lambda: cache.directory.is_dir() and "work" in kinds(cache))
        with child(lambda: sys.exit(guard(partial(act, cache, "use")))) as second:
            wait_until(lambda: is_blocked(second.pid))
            os.kill(second.pid or 0, signal.SIGTERM)
            second.join()
            assert second.exitcode == 128 + signal.SIGTERM and first.exitcode is None
    assert "ERROR: interrupted by SIGTERM" in capfd.readouterr().err


@pytest.mark.parametrize("before", [None, "old"])
def test_killed_before_every_step(cache: Cache, before: Optional[str]) -> None:
    replace = partial(use, cache, fill("new"))
    for number in itertools.count(1):
        cache.prune(everything=True)
        if before:
            use(cache, fill(before))
        with child(partial(at_step, number, signal.SIGKILL, replace)) as process:
            process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert use(cache, keep) in ("new", before or "refilled")
        assert kinds(cache) == ["json", "lock", "raw"]
    assert number > 20


def test_killed_at_random_moments(cache: Cache, tmp_path: Path) -> None:
    loop = (
        "import sys; from pathlib import Path; from lib.source.cache import Cache\n"
        "cache = Cache(Path(sys.argv[1]), 1 << 30, 3600.0)\n"
        "def refresh(old, work):\n"
        "    text = str(old['count'] + 1 if old else 0) * 100000\n"
        "    (work / 'image').write_text(text)\n"
        f"    return work / 'image', {{**{NOTE}, 'count': int(text[:1]) % 9, 'content': text}}\n"
        "while True:\n"
        "    with cache.entry('key', refresh):\n"
        "        print(end='.', flush=True)\n"
    )
    argv = [sys.executable, "-B", "-c", loop, str(cache.directory)]
    moments = random.Random(4)
    for _ in range(12):
        with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.read(1) == b"."
            time.sleep(moments.random() / 50)
            process.kill()
        assert use(cache, lambda _old, _work: None, "key")
        assert kinds(cache) == ["json", "lock", "raw"]


def test_leftovers_are_collected_by_the_use_of_another_entry(cache: Cache) -> None:
    def killed(_old: Optional[Note], work: Path) -> Made:
        (work / "half").write_bytes(bytes(1 << 20))
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    use(cache, fill("other"), "other")
    with child(lambda: use(cache, killed)) as process:
        process.join()
    assert kinds(cache) == ["json", "lock", "lock", "raw", "work"]
    use(cache, keep, "other")
    assert kinds(cache) == ["json", "lock", "raw"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fill", "fill"),
        ("fill", "evict"),
        ("evict", "fill"),
        ("use", "evict"),
        ("evict", "use"),
        ("evict", "evict"),
        ("list", "fill"),
        ("look", "evict"),
    ],
)
def test_race_on_every_step(cache: Cache, first: str, second: str) -> None:
    """Stop the first process before its n-th step, let the second run or block, then go on."""
    for number in itertools.count(1):
        use(cache, fill("before"))
        with child(partial(at_step, number, signal.SIGSTOP, partial(act, cache, first))) as one:
            assert one.pid is not None
            ended = os.waitid(os.P_PID, one.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if ended and ended.si_code == os.CLD_EXITED:
                break
            with child(partial(act, cache, second)) as two:
                wait_until(lambda: two.exitcode is not None or is_blocked(two.pid))
                os.kill(one.pid, signal.SIGCONT)
                one.join()
                two.join()
                assert (one.exitcode, two.exitcode) == (0, 0)
        assert use(cache, keep) in ("before", "filled", "refilled")
        assert kinds(cache) == ["json", "lock", "raw"]
    assert one.exitcode == 0 and number > 2
