"""Tests of lib.checksum: lists in every form seen in the wild, and gpgv with real keys."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.errors import Error
from lib.source import checksum
from tests.conftest import gpg_home

A, B = "0123456789abcdef" * 4, "fedcba9876543210" * 4
LONG = A + B
NAME = "debian-12-genericcloud-amd64.qcow2"

FOUND = {
    "gnu": f"{B}  other.qcow2\n{A}  {NAME}\n",
    "byte-order-mark": f"\ufeff{A}  {NAME}\n",
    "openssl": f"SHA256({NAME})= {A}\n",
    "openssl-3": f"SHA2-256({NAME})= {A}\n",
    "gnu-one-space": f"{A} {NAME}\n",
    "gnu-binary": f"{A} *{NAME}\n",
    "gnu-crlf": f"{A}  {NAME}\r\n",
    "gnu-no-newline": f"{A}  {NAME}",
    "gnu-upper-case": f"{A.upper()}  {NAME}\n",
    "gnu-dot-slash": f"{A}  ./{NAME}\n",
    "gnu-among-weak": f"{A[:32]}  {NAME}\n{A[:40]}  {NAME}\n{A}  {NAME}\n",
    "gnu-twice-the-same": f"{A}  {NAME}\n{A}  ./{NAME}\n",
    "bsd": f"# {NAME}: 345 bytes\nSHA256 ({NAME}) = {A}\n",
    "bsd-among-weak": f"MD5 ({NAME}) = {A[:32]}\nSHA1 ({NAME}) = {A[:40]}\nSHA256 ({NAME}) = {A}\n",
    "bare": f"{A}\n",
    "bare-padded": f"\n{A}  \n\n",
    "clearsigned-frame": "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n"
    f"# {NAME}: 345 bytes\nSHA256 ({NAME}) = {A}\n"
    "-----BEGIN PGP SIGNATURE-----\n\niQEzBAEBCAAdFiEE\n=abcd\n-----END PGP SIGNATURE-----\n",
}


@pytest.mark.parametrize("text", FOUND.values(), ids=FOUND.keys())
def test_find(text: str) -> None:
    assert checksum.find(text.encode(), NAME) == ("sha256", A)


@pytest.mark.parametrize(
    "text",
    [
        f"{LONG}  {NAME}\n",
        f"SHA512 ({NAME}) = {LONG}\n",
        f"{LONG}\n",
        f"{A}  {NAME}\n{LONG}  {NAME}\n",
        f"SHA512 ({NAME}) = {LONG}\nSHA256 ({NAME}) = {A}\n",
    ],
    ids=["gnu", "bsd", "bare", "gnu-beside-sha256", "bsd-beside-sha256"],
)
def test_find_sha512(text: str) -> None:
    assert checksum.find(text.encode(), NAME) == ("sha512", LONG)


NOT_NAMED = f"the checksum list does not name {NAME}; it names "
NO_DIGEST = "the checksum list has no SHA-256 or SHA-512 digest in it; check its address"
REFUSED = {
    "empty": ("", "the checksum list is empty; check its address"),
    "blank": (" \n\n", "the checksum list is empty; check its address"),
    "html": ("\n<!DOCTYPE html><html>", "the checksum list is an HTML or XML page; check its"),
    "json": ('{"sha256": "' + A + '"}', NO_DIGEST),
    "comments-only": (f"# {A}\n", NO_DIGEST),
    "weak": (f"{A[:32]}  {NAME}\nSHA1 ({NAME}) = {A[:40]}\n", NO_DIGEST),
    "cut": (f"{A[:63]}  {NAME}\n", NO_DIGEST),
    "too-long": (f"{A}0  {NAME}\n", NO_DIGEST),
    "tag-and-length-differ": (f"SHA512 ({NAME}) = {A}\n", NO_DIGEST),
    "sha512-256": (f"SHA512/256 ({NAME}) = {A}\n", NO_DIGEST),
    "binary": ("\x1f\x8b\x08\x00", NO_DIGEST),
    "other-name": (f"{A}  x\n{A}  {NAME}.xz\n", NOT_NAMED + f"'{NAME}.xz'"),
    "prefix": (f"{A}  x-{NAME}\n", NOT_NAMED + f"'x-{NAME}'"),
    "in-a-folder": (f"{A}  old/{NAME}\n", NOT_NAMED + f"'old/{NAME}'"),
    "folded-case": (f"{A}  {NAME.upper()}\n", NOT_NAMED),
    "control-character": (f"{A}  \x1b[2J\n", NOT_NAMED + r"'\x1b[2J'"),
    "two-bare": (f"{A}\n{A}\n", NOT_NAMED),
    "ambiguous": (
        f"{A}  {NAME}\n{B}  {NAME}\n",
        f"the checksum list has two different digests of {NAME}",
    ),
    "ambiguous-beside-sha512": (
        f"{A}  {NAME}\n{LONG}  {NAME}\nSHA256 ({NAME}) = {B}\n",
        f"the checksum list has two different digests of {NAME}",
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_find_refuses(text: str, message: str) -> None:
    with pytest.raises(Error) as raised:
        checksum.find(text.encode(), NAME)
    assert str(raised.value).startswith(message)


def test_digest_and_check(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom((2 << 20) + 17))
    for algorithm in ("sha256", "sha512"):
        said = subprocess.run([f"{algorithm}sum", path], capture_output=True, check=True).stdout
        expected = said.split()[0].decode()
        with open(path, "rb") as file:
            file.seek(5)
            assert checksum.digest(file, algorithm) == expected
    assert checksum.digest(io.BytesIO(), "sha256") == hashlib.sha256().hexdigest()
    checksum.check(("sha256", A), A, "the image")
    with pytest.raises(Error, match=f"^the image: its sha256 is {B} and should be {A}$"):
        checksum.check(("sha256", A), B, "the image")


LIST = f"# a comment\n- dashes\n{A}  {NAME}\n".encode()
IN_2020 = "20200301T000000!"


class Gpg:
    """Keys of every sort, in a home of their own, and what they sign."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for key in ("good", "second", "stranger", "revoked"):
            self("--quick-generate-key", key, "ed25519", "sign", "never")
        self("--quick-generate-key", "expired", "ed25519", "sign", "1y", time="20200101T000000!")
        self("--quick-generate-key", "old", "ed25519", "sign", "never", time="20200101T000000!")
        self.by_revoked = {
            keys: self.sign("--clear-sign", *keys.split(" and "), data=LIST)
            for keys in ("revoked", "good and revoked")
        }
        listed = self("--with-colons", "--list-keys", "revoked").decode().splitlines()
        fingerprint = next(line.split(":")[9] for line in listed if line.startswith("fpr:"))
        revocation = home / "openpgp-revocs.d" / f"{fingerprint}.rev"
        # gpg guards the file against an accident with a colon
        self("--import", data=revocation.read_bytes().replace(b":-----", b"-----"))
        trusted = ("good", "second", "revoked", "expired", "old")
        self.binary = home / "keys.gpg"
        self.binary.write_bytes(self("--export", *trusted))
        self.armored = home / "keys.asc"
        self.armored.write_bytes(b"".join(self("--armor", "--export", key) for key in trusted))

    def __call__(self, *arguments: str, data: bytes = b"", time: str = "") -> bytes:
        argv = ["gpg", "--batch", "--quiet", "--passphrase=", "--pinentry-mode=loopback"]
        argv += [f"--homedir={self.home}", *([f"--faked-system-time={time}"] if time else [])]
        return subprocess.run(
            [*argv, *arguments], input=data, capture_output=True, check=True
        ).stdout

    def sign(self, how: str, *keys: str, data: bytes, time: str = "", expire: str = "0") -> bytes:
        users = [word for key in keys for word in ("--local-user", key)]
        return self(*users, f"--default-sig-expire={expire}", how, data=data, time=time)


@pytest.fixture(scope="module")
def gpg() -> Iterator[Gpg]:
    with gpg_home() as home:
        yield Gpg(home)


@pytest.mark.parametrize("form", ["binary", "armored"])
def test_good_signatures(gpg: Gpg, tmp_path: Path, form: str) -> None:
    keyring: Path = getattr(gpg, form)
    document = gpg.sign("--clear-sign", "good", data=LIST)
    assert checksum.clearsigned(document, keyring) == LIST
    image = tmp_path / "image"
    image.write_bytes(os.urandom(3 << 20))
    for how in ("--detach-sign", "--armor --detach-sign"):
        users = ["--local-user", "second"]
        checksum.verify_detached(LIST, gpg(*users, *how.split(), data=LIST), keyring)
        signature = gpg(*users, *how.split(), data=image.read_bytes())
        with open(image, "rb") as file:
            file.seek(1000)
            checksum.verify_detached(file.fileno(), signature, keyring)


def test_signature_by_a_known_and_an_unknown_key(gpg: Gpg) -> None:
    document = gpg.sign("--clear-sign", "stranger", "good", data=LIST)
    assert checksum.clearsigned(document, gpg.binary) == LIST
    signature = gpg.sign("--detach-sign", "good", "stranger", data=LIST)
    checksum.verify_detached(LIST, signature, gpg.binary)


def test_keyring_as_keybox(gpg: Gpg) -> None:
    document = gpg.sign("--clear-sign", "good", data=LIST)
    assert checksum.clearsigned(document, gpg.home / "pubring.kbx") == LIST


def test_text_around_the_signed_part_is_not_payload(gpg: Gpg) -> None:
    document = gpg.sign("--clear-sign", "good", data=LIST)
    evil = f"{B}  {NAME}\n".encode()
    assert checksum.clearsigned(evil + b"\n" + document + b"\n" + evil, gpg.binary) == LIST


CHANGED = "the signature does not match: what it signs was changed"
SEVERAL = "the signature is not the only one: several documents follow each other"
NONE = "there is no OpenPGP signature; check its address"


def hostile(gpg: Gpg, case: str) -> bytes:
    """Return the clearsigned document of this name."""
    good = gpg.sign("--clear-sign", "good", data=LIST)
    if case in gpg.by_revoked:
        return gpg.by_revoked[case]
    if case == "stranger":
        return gpg.sign("--clear-sign", "stranger", data=LIST)
    if case == "expired key":
        return gpg.sign("--clear-sign", "expired", data=LIST, time=IN_2020)
    if case == "expired signature":
        return gpg.sign("--clear-sign", "old", data=LIST, time=IN_2020, expire="1d")
    if case == "sha1":
        return gpg("--local-user=good", "--digest-algo=SHA1", "--clear-sign", data=LIST)
    return {
        "tampered": good.replace(A.encode(), B.encode()),
        "good twice": good + good,
        "good, then stranger": good + gpg.sign("--clear-sign", "stranger", data=LIST),
        "stranger, then good": gpg.sign("--clear-sign", "stranger", data=LIST) + good,
        "no signature": LIST,
        "empty": b"",
        "html": b"<html>",
        "cut": good[: len(good) // 2],
        "key instead": gpg.armored.read_bytes(),
    }[case]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("tampered", CHANGED),
        ("stranger", "the signature is by key "),
        ("revoked", "the signature was made with a revoked key"),
        ("good and revoked", "the signature was made with a revoked key"),
        ("expired key", "the signature was made with a key that has expired"),
        ("expired signature", "the signature has expired"),
        ("sha1", "the signature is over a hash that is broken (MD5, SHA-1 or RIPEMD-160)"),
        ("good twice", SEVERAL),
        ("good, then stranger", SEVERAL),
        ("stranger, then good", SEVERAL),
        ("no signature", NONE),
        ("empty", NONE),
        ("html", NONE),
        ("cut", NONE),
        ("key instead", NONE),
    ],
)
def test_clearsigned_refuses(gpg: Gpg, case: str, message: str) -> None:
    with pytest.raises(Error) as raised:
        checksum.clearsigned(hostile(gpg, case), gpg.binary)
    assert str(raised.value).startswith(message)


def test_detached_refuses(gpg: Gpg) -> None:
    signature = gpg.sign("--detach-sign", "good", data=LIST)
    with pytest.raises(Error, match=CHANGED):
        checksum.verify_detached(LIST + b"x", signature, gpg.binary)
    # a document with its own data in it says nothing of ours
    for how in ("--sign", "--clear-sign"):
        with pytest.raises(Error, match="there is no OpenPGP signature"):
            checksum.verify_detached(LIST, gpg.sign(how, "good", data=LIST), gpg.binary)
    for garbage in (b"", b"<html>", signature[:20]):
        with pytest.raises(Error, match="there is no OpenPGP signature"):
            checksum.verify_detached(LIST, garbage, gpg.binary)


def test_bad_keyrings(gpg: Gpg, tmp_path: Path) -> None:
    document = gpg.sign("--clear-sign", "good", data=LIST)
    missing = tmp_path / "missing.gpg"
    with pytest.raises(Error, match=f"^the keyring cannot be read: No such file .*: {missing}$"):
        checksum.clearsigned(document, missing)
    damaged = tmp_path / "damaged.asc"
    damaged.write_bytes(gpg.armored.read_bytes().replace(b"\nm", b"\nm*", 1))
    with pytest.raises(Error, match=f"^{damaged}: its ASCII armor is damaged; export the key"):
        checksum.clearsigned(document, damaged)
    empty = tmp_path / "empty.gpg"
    empty.touch()
    with pytest.raises(Error, match=f"which {empty} does not hold; add the vendor's key"):
        checksum.clearsigned(document, empty)


def test_nothing_is_left_behind(gpg: Gpg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    checksum.clearsigned(gpg.sign("--clear-sign", "good", data=LIST), gpg.binary)
    with pytest.raises(Error):
        checksum.clearsigned(LIST, gpg.binary)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_a_url_encodes() -> None:
    text = f"{A}  my image.qcow2\n{B}  other\n".encode()
    assert checksum.find(text, "my%20image.qcow2") == ("sha256", A)


@pytest.mark.parametrize("suffix", [".sha256", ".SHA256SUM", ".sha256.txt"])
def test_a_list_called_after_the_image_names_the_build(suffix: str) -> None:
    text = f"{A}  Leap-15.6-Build19.75.qcow2\n".encode()
    assert checksum.find(text, "Leap-15.6.qcow2", f"Leap-15.6.qcow2{suffix}") == ("sha256", A)
    assert checksum.find(text, "Leap-15.6.qcow2", f"Leap-15.6{suffix}") == ("sha256", A)
    for other in ("SHA256SUMS", f"Leap-15.7.qcow2{suffix}", "Leap-15.6.qcow2.asc"):
        with pytest.raises(Error, match="does not name"):
            checksum.find(text, "Leap-15.6.qcow2", other)


def test_a_keyring_that_is_no_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keyring.gpg")
    with pytest.raises(Error, match=r"/keyring\.gpg: is not a regular file$"):
        checksum.clearsigned(b"x", tmp_path / "keyring.gpg")


def test_a_keyring_that_others_can_write_is_refused(tmp_path: Path) -> None:
    keyring = tmp_path / "keyring.gpg"
    keyring.write_bytes(b"x")
    keyring.chmod(0o666)
    with pytest.raises(Error, match="others than root can write this file"):
        checksum.verify_detached(b"data", b"signature", keyring)
