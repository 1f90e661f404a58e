"""The program that understands images, for the sandbox: bytes in, a raw file and one line out.

Standard input is the image, a file or a pipe; a file also has the name INPUT, for qemu-img. The
line is a JSON object: either `error` and `hint`, or `format`, `size_bytes`, `layers` and `where`
the raw image is: "input" (it is one), "scratch", "output", or "copy": nothing was done, as INPUT
cannot be opened.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # -I leaves it out

from lib.compression import HEAD_BYTES, detect
from lib.decoder import image, unpack
from lib.errors import Error, describe

INPUT, SCRATCH, OUTPUT = "/input", "/scratch", "/output"


def decode(declared: str, limit_bytes: int) -> dict[str, Any]:
    """Decode the input; return the verdict."""
    source: BinaryIO = sys.stdin.buffer
    head = source.read(HEAD_BYTES)
    layers: list[str] = []
    in_place = detect(head) is None
    if not in_place:
        with open(SCRATCH, "r+b") as unpacked:
            layers = unpack.unpack(source, head, unpacked, limit_bytes)
        source = open(SCRATCH, "rb")
    found = image.inspect(source, declared, limit_bytes)
    where = "input" if in_place else "scratch"
    if found.format != "raw" and in_place and not os.access(INPUT, os.R_OK):
        where = "copy"
    elif found.format != "raw":
        where = "output"
        with open(INPUT if in_place else SCRATCH, "rb") as named, open(OUTPUT, "r+b") as output:
            image.decode(named, found, output)
    return {
        "format": found.format,
        "size_bytes": found.virtual_size_bytes,
        "layers": layers,
        "where": where,
    }


def main() -> int:
    """Print the verdict; 0 whatever it is."""
    try:
        verdict = decode(sys.argv[1], int(sys.argv[2]))
    except Error as error:
        verdict = {"error": error.message[:1000], "hint": (error.hint or "")[:1000]}
    except OSError as error:
        verdict = {"error": describe(error)[:1000], "hint": ""}
    except MemoryError:
        verdict = {"error": "decoding it needs more memory than is allowed", "hint": ""}
    sys.stdout.write(json.dumps(verdict) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
