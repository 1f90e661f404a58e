"""The boundary of every door: usage, signals, and how an exception becomes lines and a status."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType
from typing import Optional

from lib import log
from lib.environment import Environment
from lib.errors import Error, causes, context, describe

STATUS_FAILED = 1
STATUS_BUG = 2
STATUS_USAGE = 2


class Interrupted(BaseException):
    """SIGTERM, SIGHUP or SIGINT arrived; unwinds every with block once."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number  # as a shell has it


def _interrupt(number: int, _frame: Optional[FrameType]) -> None:
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(number)


def guard(action: Callable[[], None]) -> int:
    """Run `action`; print what went wrong, the ERROR line last; return the exit status."""
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(each) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(each, _interrupt)
    try:
        with _written():
            action()
    except Error as error:
        if log.is_debugging():
            _trace(error)
        for line in error.lines:
            log.error(line)
        return STATUS_FAILED
    except Interrupted as interrupted:
        log.error(f"interrupted by {interrupted}; nothing is left behind, run it again")
        return interrupted.status
    except BrokenPipeError:
        log.error("the reader of the output went away; look for its own error")
        return STATUS_FAILED
    except OSError as error:
        if log.is_debugging():
            _trace(error)
        log.error(describe(error))
        return STATUS_FAILED
    except Exception as error:
        _trace(error)
        log.error(f"this is a bug: {type(error).__name__}: {error}")
        return STATUS_BUG
    return 0


@contextmanager
def _written() -> Iterator[None]:
    """Let what the block prints reach its reader; a failure comes now and not at the exit too.

    That of the block itself goes first.
    """
    failed = False
    try:
        yield
    except BaseException as error:
        failed = not isinstance(error, SystemExit)  # argparse's, after its help
        raise
    finally:
        try:
            with context("writing the output"):
                print(end="", flush=True)
        except (Error, OSError):
            sys.stdout = open(os.devnull, "w")
            if not failed:
                raise


def _trace(error: BaseException) -> None:
    """Print where the error and what led to it were raised, but not their texts.

    Those of the libraries quote URLs with what must not be seen.
    """
    sys.stderr.write("Traceback, the last failure first:\n")
    for each in causes(error):
        sys.stderr.write("".join(traceback.format_tb(each.__traceback__)))
        sys.stderr.write(f"{type(each).__name__}\n")


def quiet() -> None:
    """Say nothing on standard error: for processes whose findings are their answers."""
    sys.stderr = open(os.devnull, "w")


def prepare() -> None:
    """Make standard error safe for Ganeti's log, and new files private (seeds hold secrets)."""
    os.umask(0o077)
    if isinstance(sys.stderr, TextIOWrapper):
        sys.stderr.reconfigure(encoding="ascii", errors="backslashreplace")


def run(
    command: Callable[[Environment], None],
    arguments: Sequence[str] = (),
    argv: Optional[Sequence[str]] = None,
    environ: Optional[Mapping[str, str]] = None,
) -> int:
    """Run one door: `command`, called by Ganeti with exactly `arguments`; return the status."""
    prepare()
    given = list(sys.argv[1:] if argv is None else argv)
    environ = os.environ if environ is None else environ
    usage = f"usage: {' '.join([os.path.basename(sys.argv[0]), *arguments])}\n\n{command.__doc__}\n"
    if given in (["-h"], ["--help"]):
        sys.stdout.write(usage)
        return 0
    if given != list(arguments):
        sys.stderr.write(usage)
        words = log.printable(" ".join(given)) or "none"
        log.error(f"arguments {words!r}: expected {' '.join(arguments) or 'none'}")
        return STATUS_USAGE
    if environ.get("DEBUG_LEVEL", "0") not in ("", "0"):
        log.enable_debug()
    return guard(lambda: command(Environment.from_environ(environ)))
