"""lib/guest/keys.py: which lines are public keys."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest

from lib.errors import Error
from lib.guest import keys
from tests.conftest import require


def blob(*fields: bytes) -> str:
    joined = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return base64.b64encode(joined).decode()


ED25519 = "ssh-ed25519 " + blob(b"ssh-ed25519", bytes(32))
SK = "sk-ssh-ed25519@openssh.com " + blob(b"sk-ssh-ed25519@openssh.com", bytes(32), b"ssh:")
CERTIFICATE = "ssh-ed25519-cert-v01@openssh.com " + blob(
    b"ssh-ed25519-cert-v01@openssh.com", b"n" * 32, bytes(32) + bytes(12)
)
KEYS = {
    "plain": (ED25519, [ED25519]),
    "comment": (f"  {ED25519}\t me at home \r", [f"{ED25519} me at home"]),
    "security key": (SK, [SK]),
    "certificate": (CERTIFICATE, [CERTIFICATE]),
    "options": (
        f'restrict,command="echo \\"a b\\", c",from="10.0.0.0/8"   {ED25519} x',
        [f'restrict,command="echo \\"a b\\", c",from="10.0.0.0/8" {ED25519} x'],
    ),
    "several, blank and comment lines": (f"# mine\n\n{ED25519} a\n{SK}\n", [f"{ED25519} a", SK]),
    "none": ("\n# none\n", []),
}


@pytest.mark.parametrize("text, found", KEYS.values(), ids=KEYS)
def test_keys(text: str, found: list[str]) -> None:
    assert keys.parse(text.encode()) == found


@pytest.mark.parametrize("kind, bits", [("rsa", 2048), ("ecdsa", 256), ("ed25519", 256)])
def test_keys_that_ssh_keygen_makes(tmp_path: Path, kind: str, bits: int) -> None:
    require("ssh-keygen")
    argv = ["ssh-keygen", "-q", "-t", kind, "-b", str(bits), "-N", "", "-C", "me"]
    subprocess.run([*argv, "-f", str(tmp_path / "key")], check=True)
    made = (tmp_path / "key.pub").read_text().strip()
    assert keys.parse(made.encode()) == [made]
    sign = ["ssh-keygen", "-q", "-s", str(tmp_path / "key"), "-I", "id", str(tmp_path / "key.pub")]
    subprocess.run(sign, check=True)
    certificate = (tmp_path / "key-cert.pub").read_text().strip()
    assert keys.parse(certificate.encode()) == [certificate]


CUT = "ssh_keys line 1: the ssh-ed25519 key is damaged or cut; copy the whole line again"
NO_KEY = "ssh_keys line 1: no OpenSSH public key; write it as ssh-ed25519 AAAA... comment"
BAD_KEYS = {
    "a list of YAML": (f"- {ED25519}", NO_KEY),
    "cut": (ED25519[:-8], CUT),
    "cut inside base64": (ED25519[:-3], CUT),
    "no base64": ("ssh-ed25519 S3cret!", CUT),
    "type only": ("ssh-ed25519", CUT),
    "another type inside": ("ssh-ed25519 " + SK.split()[1], CUT),
    "cut behind options": (f"restrict {ED25519[:-8]}", CUT),
    "words": ("hello S3cret", NO_KEY),
    "open quote": (f'command="S3cret {ED25519}', NO_KEY),
    "private": (
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "ssh_keys line 1: a private key; give the public one, from the file that ends in .pub",
    ),
    "control character": (
        f"{ED25519} S3cret\x1b[2J",
        "ssh_keys line 1: bytes that are no text; give one public key a line",
    ),
}


@pytest.mark.parametrize("text, message", BAD_KEYS.values(), ids=BAD_KEYS)
def test_bad_keys(text: str, message: str) -> None:
    with pytest.raises(Error) as raised:
        keys.parse(text.encode())
    assert str(raised.value) == message


def test_every_bad_line_is_named() -> None:
    with pytest.raises(Error) as raised:
        keys.parse(f"hello\n{ED25519}\n\nssh-rsa AAAA".encode())
    assert [line.split(":")[0] for line in raised.value.lines] == [
        "ssh_keys line 1",
        "ssh_keys line 4",
    ]
    with pytest.raises(Error) as raised:
        keys.parse(b"hello\n" * 50)
    assert len(raised.value.lines) == 5


def test_not_text() -> None:
    with pytest.raises(Error, match="ssh_keys: is not text; write OpenSSH public keys"):
        keys.parse(b"\xff\xfe")


def test_two_keys_on_one_line_are_refused() -> None:
    """The second would be the first one's comment, and its owner locked out."""
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43
    for between in (" ", ",", ", "):
        with pytest.raises(Error):
            keys.parse(f"{key}{between}{key}".encode())
    assert keys.parse(f"{key} me, and no other".encode()) == [f"{key} me, and no other"]
