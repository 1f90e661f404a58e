"""Texts from outside never come to a traceback: checksum lists, configuration, variables, keys.

FUZZ_EXAMPLES sets how many inputs each test tries; 25000 make 10^5 in all.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.environment import Environment
from lib.errors import Error
from lib.guest import keys, network
from lib.settings import config, params
from lib.source import checksum

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
HEX = "0123456789abcdef" * 4
LINES = st.sampled_from(
    [
        f"{HEX}  image.qcow2",
        f"{HEX} *image.qcow2",
        f"{HEX}{HEX} image.qcow2",
        f"SHA256 (image.qcow2) = {HEX}",
        "# image.qcow2: 5 bytes",
        "-----BEGIN PGP SIGNED MESSAGE-----",
        HEX,
        "",
    ]
)
VARIABLES = {
    **{f"OSP_{parameter.field.upper()}": parameter.default for parameter in params.TABLE},
    "OS_VARIANT": "default",
    "INSTANCE_NAME": "vm1.example.com",
    "DISK_COUNT": "1",
    "DISK_0_PATH": "/dev/x",
    "DISK_0_URI": "rbd:a/b",
    "NIC_COUNT": "1",
    "NIC_0_MAC": "aa:00:00:12:34:01",
    "NIC_0_IP": "192.0.2.1",
    "NIC_0_NETWORK_SUBNET": "192.0.2.0/24",
    "NIC_0_NETWORK_GATEWAY": "192.0.2.254",
    "NIC_0_NETWORK_SUBNET6": "2001:db8::/64",
    "EXP_SIZE_FD": "5",
}
SPICE = st.text(max_size=30) | st.sampled_from(
    ["http://", "@/", "base64:", "sha256:", "file:///", "::", "1.2.3.4/33", "\0", "\udcff", "{x}"]
)
MUTATED = st.builds(
    lambda parts, at, text: "".join(parts)[:at] + text + "".join(parts)[at:],
    st.lists(LINES | st.sampled_from(["\n", " ", "\r\n"]), max_size=8),
    st.integers(0, 200),
    st.text(max_size=10),
)
CONFIG = st.sampled_from(
    ["[cache]", "[defaults]", "dir = /x", "max_size = 1G", "=", "[", "seed", " = x", "#", "%(x)s"]
)


def one_line(error: Error) -> None:
    assert error.lines
    for line in error.lines:
        assert "\n" not in line


@FUZZ
@given(st.binary(max_size=300) | MUTATED.map(lambda text: text.encode("utf-8", "surrogateescape")))
def test_checksum_lists(text: bytes) -> None:
    try:
        algorithm, digest = checksum.find(text, "image.qcow2")
    except Error as error:
        one_line(error)
    else:
        assert len(bytes.fromhex(digest)) * 8 == int(algorithm[3:])


@FUZZ
@given(st.lists(CONFIG | st.text(max_size=20), max_size=10).map("\n".join))
def test_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cloudimage.conf"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config.load(tmp_path, params.NAMES)
    except Error as error:
        one_line(error)


@FUZZ
@given(st.dictionaries(st.sampled_from(sorted(VARIABLES)), SPICE, max_size=4))
def test_variables(tmp_path: Path, changes: dict[str, str]) -> None:
    try:
        env = Environment.from_environ(
            {**VARIABLES, **changes, "CLOUDIMAGE_CONFDIR": str(tmp_path)}
        )
        params.parse(env)
        network.config(env.nics, 1, "auto", ["192.0.2.53"], [])
        network.config(env.nics, 2, "auto", [], [])
    except Error as error:
        one_line(error)


@FUZZ
@given(
    st.binary(max_size=200) | SPICE.map(lambda text: f"ssh-rsa {text}".encode("utf-8", "replace"))
)
def test_keys(data: bytes) -> None:
    try:
        keys.parse(data)
    except Error as error:
        one_line(error)
