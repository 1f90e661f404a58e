"""README's first instance: its commands as they are printed, on a node as it is described."""

from __future__ import annotations

import configparser
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import ROOT
from tests.images import assert_image
from tests.storage.machine import Machine, readme_commands
from tests.storage.test_plain import told

pytestmark = pytest.mark.storage
SERVER = """
import http.server, ssl
server = http.server.ThreadingHTTPServer(("127.0.0.1", 443), http.server.SimpleHTTPRequestHandler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/srv/web.pem", "/srv/web.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


@pytest.fixture
def vendor(node: Machine) -> Iterator[None]:
    """Let the machine play the vendor of debian-12: name, certificate, image, list of digests."""
    variant = configparser.ConfigParser()
    variant.read(ROOT / "variants.d/debian-12.conf")
    image, sums = (urlsplit(variant["variant"][key]) for key in ("image", "checksum"))
    path = Path("/srv/vendor" + image.path.format(deb_arch="amd64"))
    node.run(
        f"mkdir -p {path.parent} && cd {path.parent} && cp /srv/small.qcow2 {path.name} &&"
        f" sha512sum {path.name} > /srv/vendor{sums.path}"
    )
    node.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=vendor"
        f" -addext subjectAltName=DNS:{image.hostname} -keyout /srv/web.key -out /srv/web.pem &&"
        " cp /srv/web.pem /usr/local/share/ca-certificates/web.crt && update-ca-certificates"
    )
    node.run(f"echo 127.0.0.1 {image.hostname} >> /etc/hosts")
    node.run(
        f"cd /srv/vendor; python3 -c '{SERVER}' > /srv/web.log 2>&1 & echo $! > /run/web;"
        " until (: < /dev/tcp/127.0.0.1/443) 2> /dev/null; do sleep 1; done"
    )
    yield
    node.run("kill $(cat /run/web)")


def test_the_first_instance(node: Machine, vendor: None, images: Path) -> None:
    command = readme_commands()[-1]
    assert command.startswith("gnt-instance add ")
    assert command.endswith(" vm1.example.com")
    # what README says of a cluster of one node
    command = command.replace(" vm1.", " -n node1.example.com vm1.")
    try:
        out = node.run(command)
        assert "WARNING" not in out, out
        copy = node.copy(node.disk("vm1"))
        assert copy.stat().st_size == 10 << 30
        assert_image(copy, images / "small.raw")
        address = node.run("getent hosts vm1.example.com").split()[0]
        assert told(copy)[1:] == ("vm1.example.com", f"{address}/24")
        log = node.run("cat /var/log/ganeti/os/add-*-vm1.example.com-*.log")
        assert "WARNING" not in log, log
        assert "/SHA512SUMS" in node.run("cat /srv/web.log")
        state = node.run("gnt-instance list --no-headers -o oper_state vm1.example.com")
        assert state == "Y\n"
    finally:
        node.run("gnt-instance remove -f --shutdown-timeout=0 vm1.example.com")
