"""A booted guest that gets its user data from Ganeti's unmodified metadata daemon."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, require

# what the cluster and the image need beside the doors' own tools
TOOLS = ("gnt-cluster", "qemu-system-x86_64", "dnsmasq", "ethtool", "socat", "curl", "mmdebstrap")


@pytest.mark.root
@pytest.mark.cluster
@pytest.mark.boot
def test_user_data_from_a_file_of_the_node_and_a_reboot_without_metad(tmp_path: Path) -> None:
    """One boot and one reboot; tests/metad/guest says what it looks for."""
    require(*TOOLS)
    image = os.fspath(tmp_path / "image.raw")
    subprocess.run([ROOT / "tests/build-image", image], check=True)
    cluster = f"{ROOT}/tests/cluster -x kvm -o {ROOT}:cloudimage --".split()
    guest = subprocess.run(
        [*cluster, f"{ROOT}/tests/metad/guest", "stock", image],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert guest.returncode == 0, guest.stdout
    assert guest.stdout.endswith("guest: stock: ok\n")


def test_metad_check_says_what_it_needs() -> None:
    check = subprocess.run([ROOT / "tests/metad/check"], stderr=subprocess.PIPE, text=True)
    assert check.returncode == 1
    assert check.stderr.startswith("metad-check: GANETI_SOURCE is not set; say where a clone")
