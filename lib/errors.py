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


@contextmanager
def context(doing: str, what: str = "") -> Iterator[None]:
    """Prefix what fails inside with what was being done: a gerund and its object.

    `what` is an object that what fails inside may begin with, too: it is said once.
    An Error stays the one it is, so that a caller can still tell its kind.
    """
    doing = f"{doing} {what}".strip()
    try:
        yield
    except Error as error:
        error.message, *lines = (
            f"{doing}: {line.removeprefix(f'{what}: ')}" for line in (error.message, *error.lines)
        )
        error.lines = tuple(lines)
        raise
    except BrokenPipeError:
        raise  # who reads our output knows why it went away
    except OSError as error:
        raise Error(f"{doing}: {describe(error)}") from error
