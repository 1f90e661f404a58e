"""The one exception for foreseen failures, and the words that say what was being done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Optional


class Error(Exception):
    """A foreseen failure: one line that names the object, and a hint with the way out.

    The message ends without a full stop; the hint is an imperative clause.
    """

    def __init__(self, message: str, hint: Optional[str] = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.lines: tuple[str, ...] = (message if hint is None else f"{message}; {hint}",)

    def __str__(self) -> str:
        return "; ".join(self.lines)


def several(problems: Sequence[str]) -> Error:
    """One Error that lists every problem, a line each."""
    error = Error("; ".join(problems))
    error.lines = tuple(problems)
    return error


def describe(error: OSError) -> str:
    """Return the kernel's words and the file, without Python's "[Errno 2]"."""
    words = error.strerror or str(error)
    return words if error.filename is None else f"{words}: {error.filename}"


def causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    """Yield `error` and what led to it, as a traceback would show them, the last one first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _prefixed(doing: str, line: str) -> str:
    """Say what was being done to what; what failed may name the same object, and once is enough."""
    what, colon, rest = line.partition(": ")
    return f"{doing}: {rest if colon and f' {doing}'.endswith(f' {what}') else line}"


@contextmanager
def context(doing: str) -> Iterator[None]:
    """Prefix what fails inside with what was being done: a gerund and its object.

    An Error stays the one it is, so that a caller can still tell its kind.
    """
    try:
        yield
    except Error as error:
        error.message = _prefixed(doing, error.message)
        error.lines = tuple(_prefixed(doing, line) for line in error.lines)
        raise
    except BrokenPipeError:
        raise  # who reads our output knows why it went away
    except OSError as error:
        raise Error(f"{doing}: {describe(error)}") from error
