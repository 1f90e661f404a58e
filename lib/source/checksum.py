"""Digests, checksum lists, and OpenPGP signatures over either, which gpgv checks in the sandbox."""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Optional, Union
from urllib.parse import unquote

from lib import run, workspace
from lib.errors import Error, describe
from lib.files import open_regular
from lib.sandbox import Limits, Sandbox
from lib.settings.config import require_trusted
from lib.settings.values import Digest

_ALGORITHMS = {64: "sha256", 128: "sha512"}  # by the number of hex digits
_BLOCK_BYTES = 1 << 20
# BSD's, and openssl's: SHA256(name)= HEX, with openssl 3 SHA2-256(name)= HEX
_BSD = re.compile(rb"SHA(?:2-)?(256|512) ?\((.+)\) ?= ?([0-9A-Fa-f]+)")
_LIST_SUFFIX = re.compile(r"\.(sha256|sha512)(sum|sums)?(\.txt)?\Z", re.IGNORECASE)
_GNU = re.compile(rb"([0-9A-Fa-f]+)(?: [ *]?(.+))?")  # without a name: a bare hash

# gpgv hashes an image of any size: minutes are in order
_LIMITS = Limits(address_space_bytes=1 << 30, cpu_s=3600, wall_s=3600)

# Status words of gpgv (GnuPG's doc/DETAILS) that refuse a document, whatever else is signed well
_REFUSALS = {
    "BADSIG": "does not match: what it signs was changed",
    "REVKEYSIG": "was made with a revoked key",
    "EXPKEYSIG": "was made with a key that has expired",
    "EXPSIG": "has expired",
    "ERROR": "is not the only one: several documents follow each other",
}
_BROKEN_HASHES = ("1", "2", "3")  # MD5, SHA-1, RIPEMD-160: RFC 9580, section 9.5


class Mismatch(Error):
    """List and image are not of the same build: what was let in before may serve meanwhile."""


def find(text: bytes, name: str, list_name: str = "") -> Digest:
    """Return the digest of the file `name` in a checksum list.

    The list has GNU lines ("HEX  name", "HEX name", "HEX *name"), BSD lines ("SHA256 (name) = HEX")
    or openssl's, or is one bare hash; other lines (comments, the frame of a clearsigned document)
    are passed over, which can only make a name missing. The name is matched as a whole, a leading
    "./" apart: by its last component alone, a signed list of a tree would vouch for an older image
    of the same name. Percent-encoded names of URLs stand for what they encode. A list with one
    entry that is itself called after the image (NAME.sha256: `list_name`) speaks of it whatever it
    calls it: vendors name the build there that an alias stands for. With both digests the longer
    one counts.
    """
    entries = list(_entries(text.removeprefix(b"\xef\xbb\xbf")))
    if not entries:
        raise Error(f"the checksum list {_kind(text)}", "check its address")
    if len(entries) == 1 and (entries[0][1] is None or _is_called_after(list_name, name)):
        return entries[0][0]
    names = {each.encode("utf-8", "surrogateescape") for each in (name, unquote(name))}
    names |= {b"./" + each for each in names}
    found = {digest for digest, listed in entries if listed in names}
    if not found:
        known = sorted((listed or b"").decode("utf-8", "backslashreplace") for _, listed in entries)
        near = difflib.get_close_matches(name, known[:1000], 1) or known
        raise Mismatch(
            f"the checksum list does not name {name or 'the image'}",
            f"it names {near[0][:120]!r}; if that is it, write checksum=LIST#NAME",
        )
    if len(found) > len({algorithm for algorithm, _ in found}):
        raise Error(f"the checksum list has two different digests of {name}")
    return max(found)


def _is_called_after(list_name: str, name: str) -> bool:
    stem = _LIST_SUFFIX.sub("", list_name)
    return stem not in ("", list_name) and stem in (name, name.rpartition(".")[0])


def _entries(text: bytes) -> Iterator[tuple[Digest, Optional[bytes]]]:
    """Yield the digest and the name of every line that has the form of one."""
    for line in text.splitlines():
        line = line.rstrip()
        if bsd := _BSD.fullmatch(line):
            tag, name, digits = bsd.groups()
        elif gnu := _GNU.fullmatch(line):
            tag, digits, name = None, *gnu.groups()
        else:
            continue
        algorithm = _ALGORITHMS.get(len(digits))
        if algorithm is not None and tag in (None, algorithm[3:].encode()):
            yield (algorithm, digits.decode().lower()), name


def _kind(text: bytes) -> str:
    if not text.strip():
        return "is empty"
    if text.lstrip().startswith(b"<"):
        return "is an HTML or XML page"
    return "has no SHA-256 or SHA-512 digest in it"


def digest(file: BinaryIO, algorithm: str) -> str:
    """Return the digest in lower-case hex of the whole file, from offset 0."""
    state = hashlib.new(algorithm)
    buffer = bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    file.seek(0)
    # TODO: hashlib.file_digest, with Python 3.11
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        state.update(view[:count])
    return state.hexdigest()


def check(expected: Digest, actual_hex: str, what: str) -> None:
    """Raise an Error with both digests unless they are the same."""
    algorithm, expected_hex = expected
    if actual_hex != expected_hex:
        raise Mismatch(f"{what}: its {algorithm} is {actual_hex} and should be {expected_hex}")


def clearsigned(document: bytes, keyring: Path) -> bytes:
    """Return the payload of a document that has its signature inside, and nothing but that.

    It is what gpgv wrote while it verified, so text around the signed part is never in it. Error
    unless a key of the keyring (armored, binary or keybox) made a good signature.
    """
    return _verify(document, None, keyring)


def verify_detached(data: Union[bytes, int], signature: bytes, keyring: Path) -> None:
    """Raise an Error unless a key of the keyring made this signature over the data.

    data: the bytes, or the descriptor of an open file, which is then read from offset 0.
    """
    if isinstance(data, int):
        os.lseek(data, 0, os.SEEK_SET)
    _verify(data, signature, keyring)


def _verify(data: Union[bytes, int], signature: Optional[bytes], keyring: Path) -> bytes:
    """Let gpgv check the data, in itself or by the signature; return what it wrote out."""
    files = {"keyring": _keys(keyring), "signature": signature or b"", "payload": b""}
    with workspace.folder() as work:
        paths = {f"/{key}": work / key for key in files}
        for path in paths.values():
            path.write_bytes(files[path.name])
            path.chmod(0o644)  # for the sandbox; the folder is private
        payload = paths.pop("/payload")
        status = run.run(
            [
                "gpgv",
                *("--homedir", "/tmp"),
                *("--keyring", "/keyring"),
                *("--status-fd", "1"),
                *(("--output", "/payload") if signature is None else ("/signature", "-")),
            ],
            input=b"" if isinstance(data, int) else data,
            stdin=data if isinstance(data, int) else None,
            sandbox=Sandbox(read=paths, write={"/payload": payload}, limits=_LIMITS),
            accept=(0, 1, 2),
        )
        _judge(status, keyring)
        return payload.read_bytes()


def _judge(status: str, keyring: Path) -> None:
    """Raise an Error unless gpgv's status lines speak for the signature.

    Its exit status will not do: it is 0 for expired and revoked keys, and 2 where a second
    signature, as vendors make it while they change keys, is by a key that the keyring lacks.
    """
    lines = [line.split() for line in status.split("\n") if line.startswith("[GNUPG:] ")]
    said = {words[1]: words[2:] for words in lines}
    for word, complaint in _REFUSALS.items():
        if word in said:
            raise Error(f"the signature {complaint}")
    if "GOODSIG" in said and "VALIDSIG" in said:
        if said["VALIDSIG"][7] in _BROKEN_HASHES:
            raise Error("the signature is over a hash that is broken (MD5, SHA-1 or RIPEMD-160)")
        return
    if "NO_PUBKEY" in said:
        raise Error(
            f"the signature is by key {said['NO_PUBKEY'][0]}, which {keyring} does not hold",
            "add the vendor's key, if it is his",
        )
    raise Error("there is no OpenPGP signature", "check its address")


def _keys(keyring: Path) -> bytes:
    """Return the keyring as gpgv reads it: without the ASCII armor in which vendors hand out keys.

    gpg --dearmor takes the first block alone and would be one more package. The checksum line is
    passed over, as RFC 9580 (section 6.1) has it: a damaged key verifies nothing.
    """
    try:
        require_trusted(keyring)
        with open_regular(keyring) as file:
            data = file.read()
    except OSError as error:
        raise Error(f"the keyring cannot be read: {describe(error)}") from error
    text = b"\n".join(line.rstrip() for line in data.splitlines())
    blocks = re.findall(rb"-----BEGIN PGP PUBLIC KEY BLOCK-----(\n.*?)\n-----END", text, re.DOTALL)
    # headers, an empty line, base64, and the checksum after "="
    bodies = [block.partition(b"\n\n")[2].split() for block in blocks]
    try:
        keys = [
            base64.b64decode(b"".join(line for line in body if line[:1] != b"="), validate=True)
            for body in bodies
        ]
    except binascii.Error as error:
        raise Error(f"{keyring}: its ASCII armor is damaged", "export the key again") from error
    return b"".join(keys) or data
