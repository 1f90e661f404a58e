"""What the user reads: ASCII lines on standard error, a line a step.

Ganeti shows the last 20 lines, at most the last 4096 bytes, of the log of a failed script, and
breaks on a cut UTF-8 character (ganeti lib/utils/io.py, TailFile). Hence no carriage returns, no
bytes above 127, no line above LINE_LIMIT characters.
"""

from __future__ import annotations

import re
import sys
import time
from typing import Optional

LINE_LIMIT = 400
PROGRESS_INTERVAL_S = 15.0

_debug = False


def enable_debug() -> None:
    """Print debug() lines too (DEBUG_LEVEL=1)."""
    global _debug
    _debug = True


def is_debugging() -> bool:
    """Say whether enable_debug() was called."""
    return _debug


def printable(text: str, limit: int = LINE_LIMIT) -> str:
    """Return `text` as one line of printable ASCII, cut to `limit` characters."""
    escaped = text.encode("ascii", "backslashreplace").decode("ascii")
    line = re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\x{ord(m[0]):02x}", escaped)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def redact(text: str) -> str:
    """Return `text` with the credentials and the query taken out of every URL in it."""
    text = re.sub(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#]*@", r"\1***@", text)
    # what follows a URL in a sentence stays
    query = r"(\bhttps?://[^\s?#'\"]*)\?[^\s#'\"]*?([:;,]?(?=[\s#'\"]|$))"
    return re.sub(query, r"\1?***\2", text, flags=re.IGNORECASE)


def _write(prefix: str, text: str) -> None:
    sys.stderr.write(prefix + printable(redact(text)) + "\n")
    sys.stderr.flush()


def step(text: str) -> None:
    """Say what starts now, or what a long step came to."""
    _write("", text)


def warning(text: str) -> None:
    """Say what is wrong but does not stop the action."""
    _write("WARNING: ", text)


def error(text: str) -> None:
    """Say why the action failed; entry.run prints these last."""
    _write("ERROR: ", text)


def debug(text: str) -> None:
    """Say what helps to replay a failure; only with DEBUG_LEVEL=1."""
    if _debug:
        _write("+ ", text)


def size(count: int) -> str:
    """Return bytes as a person reads them (binary units, as in Ganeti's --disk 0:size=3G)."""
    if count < 1024:
        return f"{count} bytes"
    amount = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        amount /= 1024
        if amount < 1024 or unit == "PiB":
            break
    return f"{amount:.1f} {unit}" if amount < 100 and amount % 1 else f"{amount:.0f} {unit}"


class Progress:
    """How far a long step is and how long it will take, in a line every PROGRESS_INTERVAL_S.

    On a terminal (the cloudimage command) one line is rewritten in place instead.
    """

    def __init__(self, what: str, total_bytes: Optional[int]) -> None:
        self.what = what
        self.total_bytes = total_bytes
        self.started = self.printed = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.width = 0  # of what stands on the terminal's line

    def update(self, done_bytes: int) -> None:
        """Tell how many bytes are done; prints when a line is due."""
        now = time.monotonic()
        if now - self.printed < (0.2 if self.terminal else PROGRESS_INTERVAL_S):
            return
        self.printed = now
        line = printable(redact(self._line(done_bytes, now - self.started)))
        if self.terminal:
            self._rewrite(line if len(line) < 79 else f"...{line[-75:]}")  # the end says more
        else:
            step(line)

    def end(self) -> float:
        """Clear the terminal's line; return the seconds since the start."""
        if self.width:
            self._rewrite("")
            sys.stderr.write("\r")
        return time.monotonic() - self.started

    def _rewrite(self, line: str) -> None:
        """Write over the line; blanks only where the old one was longer."""
        sys.stderr.write(f"\r{line:<{self.width}}")
        sys.stderr.flush()
        self.width = len(line)

    def _line(self, done_bytes: int, seconds: float) -> str:
        if not self.total_bytes:
            return f"{self.what}: {size(done_bytes)} so far"
        percent = done_bytes * 100 // self.total_bytes
        left_s = seconds * (self.total_bytes - done_bytes) / max(1, done_bytes)
        how_long = f"{left_s:.0f} s" if left_s < 100 else f"{left_s / 60:.0f} min"
        return f"{self.what}: {percent} % of {size(self.total_bytes)}, {how_long} left"
