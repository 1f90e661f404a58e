"""The seed: the documents that cloud-init's NoCloud reads, and the FAT volume that holds them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from lib import log, run
from lib.errors import Error
from lib.sandbox import Limits, Sandbox

FILES = ("meta-data", "user-data", "vendor-data", "network-config")
LABEL = "cidata"  # lower case: the one spelling that every reader takes
SECTOR_BYTES = 512
# FAT16 with clusters of one sector ends here. A larger disk gets no larger volume: it would cost
# time and hold nothing.
MAX_VOLUME_BYTES = 32 << 20
MAX_META_DATA_BYTES = 256 << 10
MAX_FILES = 64
_GZIP = b"\x1f\x8b"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_FAT_EPOCH_S = 315532800  # 1980-01-01, the first day that FAT knows
_LIMITS = Limits(address_space_bytes=256 << 20, cpu_s=5, wall_s=10.0)

# FreeBSD's nuageinit breaks on a network-config without "ethernets", cloudbase-init on one without
# a version.
_NO_NETWORK = {"version": 1, "config": "disabled", "ethernets": {}}

# cloud-init leaves the machine-id alone, so a copy shares it with its original, and with it, under
# systemd-networkd, the DHCP identity. A boothook, for user data cannot replace it as it would
# replace a bootcmd.
_MACHINE_ID = b"""\
Content-Type: text/cloud-boothook

#cloud-boothook
#!/bin/sh
# A clone of an instance gets a machine-id of its own, once.
[ "$1" = first-boot ] || exec cloud-init-per instance ganeti_machine_id "$0" first-boot
id=$(tr -d - < /proc/sys/kernel/random/uuid)
for file in /etc/machine-id /var/lib/dbus/machine-id; do
    [ ! -s "$file" ] || echo "$id" > "$file"
done
systemctl --no-block try-restart systemd-networkd 2> /dev/null || true
"""


# The first lines that say what user data is: those of cloud-init (cloudinit/handlers, in any case,
# after blanks), and of cloudbase-init for Windows.
_KINDS = (
    *(b"#!", b"#cloud-config", b"#include", b"#cloud-boothook", b"#part-handler", b"## template:"),
    *(b"#upstart-job", b"#ps1", b"rem cmd", b"<powershell>", b"<script>"),
)


def warn_unless_known(parameter: str, text: bytes) -> None:
    """Say it if no reader of the seed will know what this user data or vendor data is."""
    head = text[:4096].lower().lstrip(b" \t\r\n\v\f")
    if text and not (text[:2] == _GZIP or head.startswith(_KINDS) or b"mime-version:" in head):
        log.warning(
            f"{parameter}: its first line is none that cloud-init knows, so it will be ignored;"
            " begin it with #cloud-config or #!"
        )


def document(data: Any) -> bytes:
    """Return `data` as JSON, which is YAML: no value can add a key, a MAC stays a string."""
    return (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode()


def include_once(url: str) -> bytes:
    """Return user data or vendor data that the guest fetches at its first boot, and keeps."""
    return f"#include-once\n{url}\n".encode()


def texts(
    *,
    name: str,
    uuid: str,
    ssh_keys: Sequence[str],
    user_data: bytes,
    vendor_data: bytes,
    network: Optional[bytes],
    password_hash: str = "",
) -> dict[str, bytes]:
    """Return the four documents by their file names; network None: the guest keeps its own.

    Without a network-config cloud-init would write its fallback, DHCP on the first NIC (stages.py,
    _find_networking_config); only "disabled" leaves the image's network alone.
    """
    meta: dict[str, Any] = {
        "instance-id": uuid,
        "local-hostname": name,
        "ganeti": {"uuid": uuid, "name": name},
    }
    if ssh_keys:
        meta["public-keys"] = meta["public_keys"] = list(ssh_keys)  # the second is nuageinit's
    return {
        "meta-data": document(meta),
        "user-data": user_data,
        "vendor-data": _vendor_data(vendor_data, password_hash),
        "network-config": _network_config(network),
    }


def _network_config(network: Optional[bytes]) -> bytes:
    return document(_NO_NETWORK) if network is None else network


def _vendor_data(theirs: bytes, password_hash: str) -> bytes:
    """Return our vendor data with the user's behind it, which so wins where both speak.

    Ours: a rewritten network-config is applied at the next boot, not only for a new instance-id;
    and the password of the default user, for the console (sshd is left as the image has it).
    """
    config: dict[str, Any] = {"updates": {"network": {"when": ["boot"]}}}
    if password_hash:
        config.update({"password": password_hash, "chpasswd": {"expire": False}})
    ours = b"#cloud-config\n" + document(config)
    return _after(_part(ours), theirs) if theirs else ours


def _after(part: bytes, vendor_data: bytes) -> bytes:
    """Return vendor data with a part before it, if it is not there; what came packed stays so."""
    is_packed = vendor_data[:2] == _GZIP
    text = _gunzip(vendor_data) if is_packed else vendor_data
    if part in text:
        return vendor_data
    text = _multipart(part, _part(text))
    if not is_packed:
        return text
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    return packer.compress(text) + packer.flush()


def _part(text: bytes) -> bytes:
    """Return any vendor data as a part of a MIME message.

    A part marked text/plain is known by its first line, as it is without a MIME message around it
    (cloudinit/user_data.py, TYPE_NEEDED); a MIME message is a part as it stands.
    """
    if b"mime-version:" in text[:4096].lower():
        return text
    encoded = base64.encodebytes(text)
    return b"Content-Type: text/plain\nContent-Transfer-Encoding: base64\n\n" + encoded


def _multipart(*parts: bytes) -> bytes:
    boundary = b"==" + hashlib.sha256(b"".join(parts)).hexdigest()[:32].encode() + b"=="
    head = b'Content-Type: multipart/mixed; boundary="' + boundary + b'"\nMIME-Version: 1.0\n\n'
    body = b"".join(b"--" + boundary + b"\n" + part + b"\n" for part in parts)
    return head + body + b"--" + boundary + b"--\n"


def _gunzip(data: bytes) -> bytes:
    """Unpack what the user gave compressed: the bytes are the administrator's own."""
    text = bytearray()
    while data[:2] == _GZIP:  # a file may have several members
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            text += unpacker.decompress(data, MAX_VOLUME_BYTES + 1 - len(text))
        except zlib.error as error:
            words = f"vendor_data is damaged gzip data: {error}"
            raise Error(words, "compress it again") from error
        if len(text) > MAX_VOLUME_BYTES:
            raise Error(
                f"vendor_data is more than {log.size(MAX_VOLUME_BYTES)} when unpacked",
                "let it fetch what is large",
            )
        if not unpacker.eof:
            raise Error("vendor_data is damaged gzip data: it is cut short", "compress it again")
        data = unpacker.unused_data
    return bytes(text)


def volume(directory: Path, size_bytes: int, output: Path) -> None:
    """Make a FAT volume of at most `size_bytes` with the directory's files in a new file `output`.

    The same files make the same bytes. Error, with both sizes, if they do not fit.
    """
    files = _regular_files(directory)
    output.touch(0o600, exist_ok=False)
    os.truncate(output, min(size_bytes, MAX_VOLUME_BYTES))
    # FAT12 or FAT16, whichever the size makes it; the label goes to the boot sector and the root
    run.run(["mkfs.vfat", "--invariant", "-n", LABEL, "-s", "1", os.fspath(output)])
    need = sum(-(-path.stat().st_size // SECTOR_BYTES) * SECTOR_BYTES for path in files)
    room = _room_bytes(output)
    if need > room:
        raise Error(
            f"the seed's files need {need} bytes, but its place holds {room}",
            "give the seed a disk of its own with --disk 1:size=32m,name=cidata and seed=disk",
        )
    for path in files:
        os.utime(path, (_FAT_EPOCH_S, _FAT_EPOCH_S))
        path.chmod(0o644)  # for mcopy in the sandbox; the folder is private
    # in the sandbox no mtools.conf of the node and no MTOOLS_ variable can change what is written
    inside = {f"/tmp/{path.name}": path for path in files}
    sandbox = Sandbox(read=inside, write={"/volume": output}, limits=_LIMITS)
    run.run(["mcopy", "-m", "-i", "/volume", *inside, "::/"], sandbox=sandbox)


def _regular_files(directory: Path) -> list[Path]:
    """Return the files; Error for what pre hooks left there that cannot be copied."""
    files = sorted(directory.iterdir())
    for path in files:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Error(
                f"{path.name} in CLOUDIMAGE_SEED_DIR is no regular file",
                "let the pre hooks write regular files only",
            )
        if not _FILE_NAME.fullmatch(path.name):
            raise Error(
                f"{path.name!r} in CLOUDIMAGE_SEED_DIR is no name for a file of the seed",
                "let the pre hooks use letters, digits, dots, - and _, at most 64",
            )
    missing = sorted({*FILES} - {path.name for path in files})
    if missing:  # a guest takes nothing of a seed without meta-data, and rename needs all
        raise Error(
            f"{missing[0]} is gone from CLOUDIMAGE_SEED_DIR",
            "let the pre hooks change the seed's files, or empty them, but not take them away",
        )
    if len(files) > MAX_FILES:
        raise Error(
            f"CLOUDIMAGE_SEED_DIR holds {len(files)} files, the seed takes {MAX_FILES}",
            "let the pre hooks write fewer",
        )
    return files


def _room_bytes(volume: Path) -> int:
    """Return how much the volume's clusters hold, by its BIOS parameter block."""
    with open(volume, "rb") as file:
        head = file.read(SECTOR_BYTES)
    reserved, fats, roots, small, fat_sectors, large = struct.unpack_from("<HBHHxH8xL", head, 14)
    used = reserved + fats * fat_sectors + roots * 32 // SECTOR_BYTES
    return int((small or large) - used) * SECTOR_BYTES


def read_volume(volume: Path) -> dict[str, bytes]:
    """Return the files in the root directory of a volume that its guest may have tampered with.

    mtools reads it in the sandbox; number and sizes are bounded by what volume() writes. Folders
    and names that volume() would not write are left out.
    """
    run.require("bwrap", "mcopy", "mdir")
    volume.chmod(0o644)  # for the sandbox; its folder is private
    sandbox = Sandbox(read={"/volume": volume}, limits=_LIMITS)
    files: dict[str, bytes] = {}
    room = MAX_VOLUME_BYTES
    try:
        # in the C locale mdir writes "_" for what is not ASCII: a name that is no file's
        argv = ["env", "LC_ALL=C.UTF-8", "mdir", "-b", "-i", "/volume", "::/"]
        lines = run.run(argv, sandbox=sandbox, accept=(0, 1)).splitlines()
        names = [line[3:] for line in lines if _FILE_NAME.fullmatch(line[3:])]
        missing = [name for name in FILES if name not in names]
        if missing:
            raise Error(f"it holds no {missing[0]}")
        for name in names[:MAX_FILES]:
            argv = ["mcopy", "-i", "/volume", f"::/{name}", "-"]
            with run.reader(argv, sandbox=sandbox) as output:
                files[name] = output.read(room + 1)
                room -= len(files[name])
                if room < 0:
                    raise Error(f"its files are larger than {log.size(MAX_VOLUME_BYTES)}")
    except Error as error:
        raise Error(
            f"the seed cannot be read: {error.message}",
            "mend it in the guest, or write a new one with gnt-instance reinstall",
        ) from error
    return files


def renamed(
    files: Mapping[str, bytes], *, name: str, uuid: str, network: Optional[bytes]
) -> dict[str, bytes]:
    """Return the seed's files for the instance that this disk belongs to now.

    The seed remembers which instance it was last written for, apart from the instance-id, which a
    restored instance keeps: so a later rename of that one is not taken for a clone. Another uuid
    and another name is a clone, which gets a new instance-id and machine-id; in all other cases
    they stay, and so does everything that the user gave.
    """
    try:
        meta = json.loads(files["meta-data"][:MAX_META_DATA_BYTES])
        first = {"uuid": meta["instance-id"], "name": meta["local-hostname"]}
        owner = meta.get("ganeti", first)  # a hook may have written the seed without
        is_clone = uuid != owner["uuid"] and name != owner["name"]
        meta["instance-id"] = uuid if is_clone else meta["instance-id"]
        meta.update({"local-hostname": name, "ganeti": {"uuid": uuid, "name": name}})
        changed = {"meta-data": document(meta), "network-config": _network_config(network)}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise Error(
            "the seed's meta-data is none that cloudimage wrote",
            "set instance-id, local-hostname and the addresses in it by hand",
        ) from error
    if is_clone:
        changed["vendor-data"] = _after(_MACHINE_ID, files.get("vendor-data", b""))
    return {**files, **changed}
