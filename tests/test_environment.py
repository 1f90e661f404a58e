"""What Ganeti's variables become, and which values are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.environment import Disk, Environment
from lib.errors import Error

UUID = "7eb7a864-32d5-4cce-a37f-4dfde4aaf87e"


def test_a_whole_instance() -> None:
    env = Environment.from_environ(
        {
            "INSTANCE_NAME": "vm1.example.com",
            "INSTANCE_UUID": UUID,
            "OS_VARIANT": "debian-12",
            "DEBUG_LEVEL": "1",
            "DISK_COUNT": "3",
            "DISK_0_PATH": "/dev/vg/a",
            "DISK_1_URI": "rbd:pool/image",
            "DISK_1_NAME": "cidata",
            "NIC_COUNT": "1",
            "NIC_0_MAC": "AA:00:00:12:34:01",
            "NIC_0_IP": "192.0.2.5",
            "NIC_0_NAME": "ganeti:communication:vm1",
            "NIC_0_NETWORK_SUBNET": "192.0.2.0/24",
            "OSP_USER_DATA": "x",
        }
    )
    assert env.identity() == ("vm1.example.com", UUID)
    assert env.first_disk() == Disk(0, Path("/dev/vg/a"))
    assert env.disk_named("cidata") == Disk(1, None, "rbd:pool/image", "cidata")
    assert env.disk_named("other") is None
    assert env.nics[0].mac == "aa:00:00:12:34:01"
    assert env.nics[0].is_communication
    assert env.parameters == {"USER_DATA": "x"}
    assert env.variant == "debian-12"


def test_transfer() -> None:
    env = Environment.from_environ(
        {"EXPORT_DEVICE": "/dev/x", "EXPORT_INDEX": "1", "EXP_SIZE_FD": "7"}
    )
    assert env.transfer_disk("EXPORT_DEVICE") == Disk(1, Path("/dev/x"))
    assert env.exp_size_fd == 7


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"INSTANCE_NAME": "vm1\n"}, r"INSTANCE_NAME='vm1\\n' is not of the form"),
        ({"INSTANCE_NAME": "-rf"}, "INSTANCE_NAME='-rf' is not of the form"),
        ({"INSTANCE_NAME": "a/b"}, "INSTANCE_NAME='a/b' is not of the form"),
        ({"INSTANCE_UUID": "1"}, "INSTANCE_UUID='1' is not of the form"),
        ({"OS_VARIANT": "../x"}, r"OS_VARIANT='../x' is not of the form"),
        ({"DISK_COUNT": "x"}, "DISK_COUNT='x' is not a number"),
        (
            {"DISK_COUNT": "1", "DISK_0_PATH": "dev/x"},
            "DISK_0_PATH='dev/x' is not an absolute path",
        ),
        (
            {"DISK_COUNT": "1", "DISK_0_URI": "json:{}"},
            "DISK_0_URI='json:{}': json: is not accepted",
        ),
        ({"DISK_COUNT": "1", "DISK_0_URI": "a b"}, "DISK_0_URI='a b' is not a URI"),
        ({"NIC_COUNT": "1"}, "NIC_0_MAC='' is not a MAC address"),
    ],
)
def test_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(Error, match=words):
        Environment.from_environ(variables)


def test_missing_disks() -> None:
    with pytest.raises(Error, match=r"DISK_COUNT=0: the instance has no disk .*--disk 0:size=3G"):
        Environment.from_environ({}).first_disk()
    with pytest.raises(Error, match="DISK_0_PATH is not set and neither is its URI"):
        Environment.from_environ({"DISK_COUNT": "1"}).first_disk()
    with pytest.raises(Error, match="INSTANCE_NAME is not set"):
        Environment.from_environ({}).identity()
    with pytest.raises(Error, match="IMPORT_DEVICE is not set"):
        Environment.from_environ({}).transfer_disk("IMPORT_DEVICE")


NAMES = ["INSTANCE_NAME", "INSTANCE_UUID", "DISK_COUNT", "DISK_0_PATH", "DISK_0_URI", "NIC_COUNT"]
NAMES += ["NIC_0_MAC", "NIC_0_IP", "OS_VARIANT", "EXP_SIZE_FD", "IMPORT_INDEX", "IMPORT_DEVICE"]


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=20) | st.sampled_from(["1", "2"])))
def test_fuzz(variables: dict[str, str]) -> None:
    try:
        env = Environment.from_environ(variables)
        env.identity()
        env.first_disk()
    except Error as error:
        assert "\n" not in str(error)
