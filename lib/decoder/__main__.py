"""The program that understands images, for the sandbox: bytes in, a raw file and one line out.

Standard input is the image, a file that may still grow. The line is a JSON object: either `error`
and `hint`, or `size_bytes` and `where` the raw image is: "input" (it is one),
"scratch" or "output".
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # -I leaves it out

from lib.compression import HEAD_BYTES, detect
from lib.decoder import image, unpack
from lib.decoder.source import Source
from lib.errors import Error, describe

SCRATCH, OUTPUT = Path("/scratch"), Path("/output")


def decode(source: Source, declared: str, limit_bytes: int) -> dict[str, Any]:
    """Decode the input; return the verdict."""
    with SCRATCH.open("r+b") as unpacked:
        inner, where, parts = source, "input", image.Parts()
        if detect(source.read(0, HEAD_BYTES)) is not None:
            unpack.unpack(source, unpacked, limit_bytes)
            source.wait()  # what reads a stream may have had enough before the end
            unpacked.flush()
            inner = Source(unpacked.fileno(), os.fstat(unpacked.fileno()).st_size)
            where = "scratch"
        elif not source.is_whole:
            parts = image.begun(source, declared, limit_bytes)
        if parts:
            whole = image.Image("qcow2", sum(size for _, size in parts))
            image.decode(source, whole, OUTPUT, parts)
        found = image.inspect(inner, declared, limit_bytes)
        if found.format != "raw":
            where = "output"
            if not parts:
                image.decode(inner, found, OUTPUT)
            image.look_inside(OUTPUT, found, declared)
    return {"size_bytes": found.virtual_size_bytes, "where": where}


def main(declared: str, limit_bytes: int, size_bytes: int, growing: int) -> None:
    """Print the verdict; growing is the pipe that tells when all of the input is there, or -1."""
    try:
        source = Source(0, size_bytes, None if growing < 0 else growing)
        verdict = decode(source, declared, limit_bytes)
    except Error as error:
        verdict = {"error": error.message[:1000], "hint": (error.hint or "")[:1000]}
    except OSError as error:
        words = "it is larger than max_virtual_size" if error.errno == errno.EFBIG else None
        verdict = {"error": (words or describe(error))[:1000], "hint": ""}
    except MemoryError:
        verdict = {"error": "decoding it needs more memory than is allowed", "hint": ""}
    sys.stdout.write(json.dumps(verdict) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a thread may still wait for the input


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
