"""Public keys for the default user, in the grammar of authorized_keys."""

from __future__ import annotations

import base64
import binascii
import re

from lib.errors import Error, several


def parse(data: bytes) -> list[str]:
    """Return the public keys in `data`, a line each, in the grammar of authorized_keys in sshd(8).

    The Error has a line for each of the first lines that are none, and repeats none of them: they
    may come from a private parameter.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise Error("ssh_keys: is not text", "write OpenSSH public keys, a line each") from None
    keys, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            try:
                keys.append(_key(line))
            except Error as error:
                problems.append(f"ssh_keys line {number}: {error}")
    if problems:
        raise several(problems[:5])
    return keys


_SECOND_KEY = re.compile(r"(^|[\s,;])(ssh|ecdsa|sk)-[a-z0-9@.-]+\s+AAAA")


def _key(line: str) -> str:
    """Return one key with single spaces between options, type, key and comment."""
    if "PRIVATE KEY" in line:
        raise Error("a private key", "give the public one, from the file that ends in .pub")
    if not line.replace("\t", " ").isprintable():
        raise Error("bytes that are no text", "give one public key a line")
    options, rest = _split_options(line)
    # an option begins with a letter; sshd takes no key behind anything else, a list's "- " say
    for front, key in ([], line), ([options], rest if options[:1].isalpha() else ""):
        words = key.split(None, 2)
        kind = words[0] if words else ""
        if re.fullmatch(r"(ssh|ecdsa|sk)-[a-z0-9@.-]+", kind):
            if len(words) < 2 or not _is_blob(kind, words[1]):
                raise Error(f"the {kind[:50]} key is damaged or cut", "copy the whole line again")
            if len(words) > 2 and _SECOND_KEY.search(words[2]):
                raise Error("a second key behind the first", "give one public key a line")
            return " ".join([*front, *words])
    raise Error("no OpenSSH public key", "write it as ssh-ed25519 AAAA... comment")


def _split_options(line: str) -> tuple[str, str]:
    """Split at the first blank outside double quotes, within which only \\" is an escape."""
    quoted = False
    for match in re.finditer(r'\\"|"|[ \t]', line):
        if match[0] == '"':
            quoted = not quoted
        elif match[0] != '\\"' and not quoted:
            return line[: match.start()], line[match.end() :]
    return line, ""


def _is_blob(kind: str, encoded: str) -> bool:
    """Whether this is the base64 of a key of this type, and the whole of it (RFC 4253, 6.6)."""
    try:
        blob = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return False
    name, at = kind.encode(), 0
    while at + 4 <= len(blob):
        at += 4 + int.from_bytes(blob[at : at + 4], "big")
    # a certificate has numbers between its strings
    is_whole = at == len(blob) or "-cert-" in kind
    return is_whole and blob.startswith(len(name).to_bytes(4, "big") + name)
