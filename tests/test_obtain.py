"""lib/source/obtain.py: when a server is asked, what is believed and kept; real servers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.environment import Environment
from lib.errors import Error
from lib.settings import config, params
from lib.settings.config import Config
from lib.source import obtain
from tests import httpd
from tests.conftest import ROOT, gpg_home, require
from tests.images import convert, disk_image
from tests.scripts.conftest import Door


class Node:
    """A node's configuration and cache."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        (folder / "variants.d").mkdir()
        self.variant = ""
        self.configure("")

    def configure(self, text: str, retries: int = 0) -> None:
        """Write cloudimage.conf; a second's pause between retries would be a second of the test."""
        conf = f"[cache]\ndir = {self.cache}\n[http]\nretries = {retries}\n{text}"
        (self.folder / "cloudimage.conf").write_text(conf)

    def trust(self, keyring: Path) -> None:
        """Let the instances have a variant with this keyring."""
        (self.folder / "variants.d/signed.conf").write_text(f"[variant]\nkeyring = {keyring}\n")
        self.variant = "signed"

    def job(self, image: object, **parameters: str) -> params.Job:
        variables = {"CLOUDIMAGE_CONFDIR": str(self.folder), "OS_VARIANT": self.variant}
        variables |= {f"OSP_{name.upper()}": value for name, value in parameters.items()}
        variables["OSP_IMAGE"] = str(image)
        return params.parse(Environment.from_environ(variables))

    def image(self, image: object, **parameters: str) -> bytes:
        """Return the raw image, as create would get it."""
        with obtain.raw_image(self.job(image, **parameters)) as raw:
            data = os.pread(raw.file.fileno(), raw.size_bytes + 1, 0)
        assert len(data) == raw.size_bytes
        return data

    def config(self) -> Config:
        return config.load(self.folder, params.NAMES)

    def notes(self) -> list[dict[str, object]]:
        return [json.loads(path.read_text()) for path in self.cache.glob("*.json")]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    (tmp_path / "node").mkdir()
    return Node(tmp_path / "node")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make two small raw images, of one size."""
    require("sfdisk", "qemu-img", "bwrap", "prlimit")
    folder = tmp_path_factory.mktemp("images")
    first, second = (disk_image(folder / f"{n}.raw", "mbr", 6, n) for n in (1, 2))
    return first, second


def prune_all(node: Node) -> None:
    obtain.store(node.config()).prune(everything=True)


def listed(data: bytes, algorithm: str = "sha256", name: str = "image") -> httpd.Behaviour:
    """Serve a checksum list that names the image with this content."""
    return httpd.content(
        f"{hashlib.new(algorithm, data).hexdigest()}  {name}\n".encode(), etag=None
    )


# --- asking again ----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_list_is_followed(node: Node, images: tuple[Path, Path], algorithm: str) -> None:
    old, new = (path.read_bytes() for path in images)
    with httpd.serve({"/image": httpd.content(old), "/list": listed(old, algorithm)}) as server:
        image, checksum = server.url("/image"), server.url("/list")
        for _time in range(3):
            assert node.image(image, checksum=checksum) == old
        assert (server.count("/image"), server.count("/list")) == (1, 3)
        server.routes |= {"/image": httpd.content(new), "/list": listed(new, algorithm)}
        for _time in range(2):
            assert node.image(image, checksum=checksum) == new
        assert server.count("/image") == 2
    (note,) = node.notes()
    assert note["digests"] == {algorithm: hashlib.new(algorithm, new).hexdigest()}


def test_a_pinned_digest_asks_nobody(node: Node, images: tuple[Path, Path]) -> None:
    data = images[0].read_bytes()
    checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
    with httpd.serve({"/image": httpd.content(data)}) as server:
        url = server.url("/image")
        assert node.image(url, checksum=checksum) == data
    assert node.image(url, checksum=checksum) == data
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("etag", "last_modified", "header"),
    [
        ('"v1"', None, "If-None-Match"),
        (None, "Mon, 05 Jan 2026 10:00:00 GMT", "If-Modified-Since"),
    ],
)
def test_not_modified(
    node: Node,
    images: tuple[Path, Path],
    etag: str,
    last_modified: str,
    header: str,
) -> None:
    data = images[0].read_bytes()
    behaviour = httpd.content(data, etag=etag, last_modified=last_modified)
    with httpd.serve({"/image": behaviour}) as server:
        for _time in range(2):
            assert node.image(server.url("/image")) == data
        first, second = server.seen
    assert first.headers[header] is None
    assert second.headers[header] == (etag or last_modified)


def test_a_server_without_validators(node: Node, images: tuple[Path, Path]) -> None:
    """It has to be asked for the whole again; what is the same is not decoded again."""
    data = images[0].read_bytes()
    with httpd.serve({"/image": httpd.content(data, etag=None)}) as server:
        assert node.image(server.url("/image")) == data
        before = sorted(node.cache.iterdir())
        assert node.image(server.url("/image")) == data
        assert server.count("/image") == 2
    assert sorted(node.cache.iterdir()) == before


def test_a_list_that_changes_meanwhile(node: Node, images: tuple[Path, Path]) -> None:
    old, new = (path.read_bytes() for path in images)
    routes = {"/image": httpd.content(new), "/list": httpd.sequence(listed(old), listed(new))}
    with httpd.serve(routes) as server:
        assert node.image(server.url("/image"), checksum=server.url("/list")) == new
        assert (server.count("/image"), server.count("/list")) == (1, 2)


def test_a_digest_that_stays_wrong(
    node: Node, images: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (path.read_bytes() for path in images)
    with httpd.serve({"/image": httpd.content(new), "/list": listed(old)}) as server:
        image, checksum = server.url("/image"), server.url("/list")
        with pytest.raises(Error) as raised:
            node.image(image, checksum=checksum)
        got, want = (hashlib.sha256(data).hexdigest() for data in (new, old))
        assert raised.value.message == f"{image}: its sha256 is {got} and should be {want}"
        # the last good one stays in use until list and image agree again
        server.routes["/list"] = listed(new)
        assert node.image(image, checksum=checksum) == new
        capsys.readouterr()
        for other in (listed(old), listed(old, name="another")):
            server.routes["/list"] = other
            assert node.image(image, checksum=checksum) == new
            (warning,) = re.findall("^WARNING: .*", capsys.readouterr().err, re.MULTILINE)
            assert "; using the copy in the cache, fetched 20" in warning
        # what is pinned is that very image
        with pytest.raises(Error, match="should be"):
            node.image(image, checksum=f"sha256:{want}")
    assert len(node.notes()) == 1


def test_a_mirror_serves_and_the_list_decides(
    node: Node, images: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (path.read_bytes() for path in images)
    origins = {"/pub/image": httpd.content(new), "/pub/list": listed(new)}
    mirrored = {"/debian/image": httpd.content(new)}
    with httpd.serve(origins) as origin, httpd.serve(mirrored) as mirror:
        node.configure(f"[mirror]\n{origin.url('/pub')} = {mirror.url('/debian/')}\n")
        image, checksum = origin.url("/pub/image"), origin.url("/pub/list")
        assert node.image(image, checksum=checksum) == new
        assert (mirror.count("/debian/image"), origin.count("/pub/image")) == (1, 0)
        assert "the mirror fails" in capsys.readouterr().err  # it has no list
        # behind the list, and gone: the origin itself is asked
        for behaviour in (httpd.content(old), httpd.reply(404)):
            mirror.routes["/debian/image"] = behaviour
            prune_all(node)
            assert node.image(image, checksum=checksum) == new
            assert "WARNING: the mirror fails, trying " in capsys.readouterr().err
        assert origin.count("/pub/image") == 2
        # a name that only begins alike is another's
        assert not node.config().places(origin.url("/public/image"))[1:]


def test_a_mirror_may_want_a_password(node: Node, images: tuple[Path, Path]) -> None:
    data = images[0].read_bytes()
    private = {"/image": httpd.protected("me", "s3cret", httpd.content(data))}
    with httpd.serve({}) as origin, httpd.serve(private) as mirror:
        node.configure(f"[mirror]\n{origin.url('')} = {mirror.url('', user='me:s3cret')}\n")
        assert node.image(origin.url("/image")) == data
        assert all("Authorization" not in seen.headers for seen in origin.seen)


def test_an_etag_is_for_the_server_that_gave_it(node: Node, images: tuple[Path, Path]) -> None:
    """Another server's 304 to it would vouch for an image that it never had."""
    old, new = (path.read_bytes() for path in images)
    routes = [{"/image": httpd.content(data, etag='"same"')} for data in (new, old)]
    with httpd.serve(routes[0]) as origin, httpd.serve(routes[1]) as mirror:
        node.configure(f"[mirror]\n{origin.url('')} = {mirror.url('')}\n")
        assert node.image(origin.url("/image")) == old
        assert node.image(origin.url("/image")) == old
        node.configure("")
        assert node.image(origin.url("/image")) == new


def test_lists_say_what_is_wrong_with_them(node: Node, images: tuple[Path, Path]) -> None:
    data = images[0].read_bytes()
    with httpd.serve({"/image": httpd.content(data), "/list": listed(data, name="x")}) as server:
        with pytest.raises(Error) as raised:
            node.image(server.url("/image"), checksum=server.url("/list"))
        words = "the checksum list does not name image"
        assert raised.value.message.startswith(
            f"reading the checksum list {server.url('/list')}: {words}"
        )
        with pytest.raises(Error, match="answered 404"):
            node.image(server.url("/image"), checksum=server.url("/missing"))
        assert server.count("/image") == 0


# --- servers that are down -------------------------------------------------------------------


@pytest.mark.parametrize("down", ["/list", "/image"])
def test_a_server_that_is_down(
    node: Node, images: tuple[Path, Path], capsys: pytest.CaptureFixture[str], down: str
) -> None:
    old, new = (path.read_bytes() for path in images)
    with httpd.serve({"/image": httpd.content(old), "/list": listed(old)}) as server:
        image, checksum = server.url("/image"), server.url("/list")
        assert node.image(image, checksum=checksum) == old
        server.routes["/list"] = listed(new)
        server.routes[down] = httpd.reply(503)
        capsys.readouterr()
        assert node.image(image, checksum=checksum) == old
    (warning,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("WARNING: "))
    assert f"{server.url(down)}: answered 503" in warning
    assert "; using the copy in the cache, fetched 20" in warning


def test_a_server_that_is_down_and_nothing_in_the_cache(node: Node) -> None:
    with httpd.serve({"/image": httpd.reply(503)}) as server, pytest.raises(Error) as raised:
        node.image(server.url("/image"))
    assert "answered 503" in str(raised.value)
    assert node.notes() == []


def test_a_pinned_digest_is_never_given_up(node: Node, images: tuple[Path, Path]) -> None:
    data = images[0].read_bytes()
    with httpd.serve({"/image": httpd.content(data)}) as server:
        assert node.image(server.url("/image")) == data
        server.routes["/image"] = httpd.reply(503)
        with pytest.raises(Error, match="answered 503"):
            node.image(server.url("/image"), checksum="sha256:" + "0" * 64)


def test_what_no_list_named_is_not_used_for_one_that_is_down(
    node: Node, images: tuple[Path, Path]
) -> None:
    """The copy in the cache must be as trustworthy as the one that cannot be had."""
    data = images[0].read_bytes()
    with httpd.serve({"/image": httpd.content(data), "/list": httpd.reply(503)}) as server:
        image, checksum = server.url("/image"), server.url("/list")
        assert node.image(image) == data
        with pytest.raises(Error, match="answered 503"):
            node.image(image, checksum=checksum)


# --- signatures ------------------------------------------------------------------------------


class Gpg:
    """Two keys, one of which is in the keyring."""

    def __init__(self, home: Path) -> None:
        self.home, self.keyring = home, home / "keys.gpg"
        for key in ("good", "stranger"):
            self("--quick-generate-key", key, "ed25519", "sign", "never")
        self.keyring.write_bytes(self("--export", "good"))

    def __call__(self, *arguments: str, data: bytes = b"") -> bytes:
        argv = ["gpg", "--batch", "--quiet", "--passphrase=", "--pinentry-mode=loopback"]
        argv += [f"--homedir={self.home}", *arguments]
        return subprocess.run(argv, input=data, capture_output=True, check=True).stdout

    def sign(self, how: str, data: bytes, key: str = "good") -> bytes:
        return self(f"--local-user={key}", how, data=data)


@pytest.fixture(scope="module")
def gpg() -> Iterator[Gpg]:
    with gpg_home() as home:
        yield Gpg(home)


@pytest.mark.parametrize("form", ["inline", "over the list", "over the image"])
def test_signatures(node: Node, gpg: Gpg, images: tuple[Path, Path], form: str) -> None:
    data = images[0].read_bytes()
    listing = f"{hashlib.sha256(data).hexdigest()}  image\n".encode()
    node.trust(gpg.keyring)

    def documents(key: str) -> dict[str, bytes]:
        if form == "inline":
            return {"/list": gpg.sign("--clear-sign", listing, key)}
        signed = listing if form == "over the list" else data
        return {"/list": listing, "/signature": gpg.sign("--detach-sign", signed, key)}

    def serve(key: str) -> dict[str, httpd.Behaviour]:
        return {path: httpd.content(text, etag=None) for path, text in documents(key).items()}

    with httpd.serve({"/image": httpd.content(data), **serve("stranger")}) as server:
        given = {
            "checksum": "none" if form == "over the image" else server.url("/list"),
            "signature": "inline" if form == "inline" else server.url("/signature"),
        }
        with pytest.raises(Error, match="the signature is by key "):
            node.image(server.url("/image"), **given)
        assert node.notes() == []
        server.routes |= serve("good")
        assert node.image(server.url("/image"), **given) == data
        count = server.count("/image")
        assert node.image(server.url("/image"), **given) == data
        assert server.count("/image") == count + (form == "over the image")  # a 304


def test_another_keyring_is_another_trust(
    node: Node, gpg: Gpg, images: tuple[Path, Path], tmp_path: Path
) -> None:
    """Keys that were taken out of the keyring vouch for nothing in the cache either."""
    data = images[0].read_bytes()
    listing = gpg.sign("--clear-sign", f"{hashlib.sha256(data).hexdigest()}  image\n".encode())
    keyring = tmp_path / "keyring"
    keyring.write_bytes(gpg.keyring.read_bytes())
    node.trust(keyring)
    with httpd.serve({"/image": httpd.content(data), "/list": httpd.content(listing)}) as server:
        given = {"checksum": server.url("/list"), "signature": "inline"}
        assert node.image(server.url("/image"), **given) == data
        keyring.write_bytes(gpg("--export", "stranger"))
        server.routes["/list"] = httpd.reply(503)
        with pytest.raises(Error, match="answered 503"):
            node.image(server.url("/image"), **given)


def test_a_keyring_that_is_not_there(node: Node, tmp_path: Path) -> None:
    node.trust(tmp_path / "missing")
    with pytest.raises(Error) as raised:
        node.image("http://127.0.0.1:1/image", checksum="http://127.0.0.1:1/l", signature="inline")
    missing = f"{tmp_path}/missing: No such file or directory"
    assert str(raised.value) == f"reading the keyring: {missing}"


def test_unsigned_and_unchecked(
    node: Node, images: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    node.image(images[0])
    words = "no checksum= is given, so nothing proves that it is genuine"
    assert capsys.readouterr().err == f"WARNING: {images[0]}: {words}\n"
    node.configure("[image]\nrequire_checksum = yes\n")
    with pytest.raises(Error, match=r"^checksum=none: require_checksum is set in "):
        node.image(images[0])


# --- images of the node ----------------------------------------------------------------------


def test_a_raw_image_is_used_in_place(node: Node, images: tuple[Path, Path]) -> None:
    assert node.image(images[0]) == images[0].read_bytes()
    assert not list(node.cache.iterdir())


def test_a_decoded_image_is_kept_until_the_file_changes(
    node: Node, images: tuple[Path, Path], tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(convert(images[0], "qcow2").read_bytes())
    for _time in range(2):
        assert node.image(image) == images[0].read_bytes()
        (note,) = node.notes()
    assert note["url"] == f"file://{image}"
    (raw,) = node.cache.glob("*.raw")
    image.write_bytes(convert(images[1], "qcow2").read_bytes())
    os.utime(image, (1, 1))
    assert node.image(image) == images[1].read_bytes()
    assert len(node.notes()) == 2
    assert raw.exists()


def test_what_others_can_change_is_copied_first(
    node: Node, images: tuple[Path, Path], tmp_path: Path
) -> None:
    image = tmp_path / "image"
    for number in (0, 1):
        image.write_bytes(convert(images[number], "qcow2").read_bytes())
        image.chmod(0o666)
        os.utime(image, (1, 1))  # they can do that too
        for _time in range(2):
            assert node.image(image) == images[number].read_bytes()
        assert len(node.notes()) == number + 1
    assert not list(node.cache.glob("cloudimage-*"))
    prune_all(node)
    node.cache.rmdir()
    node.cache.touch()  # of no use
    assert node.image(image) == images[1].read_bytes()


def test_a_local_image_is_checked_at_every_use(node: Node, images: tuple[Path, Path]) -> None:
    checksum = f"sha256:{hashlib.sha256(images[0].read_bytes()).hexdigest()}"
    assert node.image(images[0], checksum=checksum) == images[0].read_bytes()
    with pytest.raises(Error, match=f"^{images[1]}: its sha256 is "):
        node.image(images[1], checksum=checksum)


def test_local_paths(node: Node, images: tuple[Path, Path], tmp_path: Path) -> None:
    node.configure(f"[image]\nlocal_paths = /srv/a {images[0].parent}\n")
    node.image(images[0])
    outside = tmp_path / "image"
    outside.write_bytes(images[0].read_bytes())
    (tmp_path / "up").symlink_to(images[0].parent)
    for path in (outside, tmp_path / f"up/../{tmp_path.name}/image"):
        with pytest.raises(Error) as raised:
            node.image(path)
        assert str(raised.value) == (
            f"image={path}: is outside [image] local_paths of cloudimage.conf; move it below /srv/a"
        )
    # a folder that the administrator reaches by a link is meant where it leads
    (tmp_path / "link").symlink_to(tmp_path)
    node.configure(f"[image]\nlocal_paths = {tmp_path}/link\n")
    assert node.image(tmp_path / "link/image") == images[0].read_bytes()


# --- the cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["a file", "open to all"])
def test_an_unusable_cache(
    node: Node, images: tuple[Path, Path], capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    data = images[0].read_bytes()
    if trouble == "a file":
        node.cache.touch()
    else:
        node.cache.mkdir()
        node.cache.chmod(0o777)
    with httpd.serve({"/image": httpd.content(data)}) as server:
        assert node.image(server.url("/image")) == data
    assert f"WARNING: cache {node.cache}: " in capsys.readouterr().err
    assert node.notes() == []


def test_credentials_stay_out_of_the_note(node: Node, images: tuple[Path, Path]) -> None:
    behaviour = httpd.protected("user", "s3cret", httpd.content(images[0].read_bytes()))
    with httpd.serve({"/image": behaviour}) as server:
        url = server.url("/image", user="user:s3cret")
        assert node.image(f"{url}?token=s3cret") == images[0].read_bytes()
        assert all("s3cret" not in path.read_text() for path in node.cache.glob("*.json"))
        # the entry serves whoever gives the same URL with other credentials, or none
        with pytest.raises(Error, match="answered 401"):
            node.image(f"{server.url('/image')}?token=s3cret")
    assert node.notes()[0]["url"] == f"{server.url('/image')}?***"


def test_ten_at_once(tmp_path: Path, images: tuple[Path, Path]) -> None:
    require("mkfs.vfat", "mcopy")
    door = Door(tmp_path)
    packed = convert(images[0], "qcow2").read_bytes()
    disks = [tmp_path / f"disk{number}" for number in range(10)]
    with httpd.serve({"/image": httpd.content(packed), "/list": listed(packed)}) as server:
        given = {"OSP_IMAGE": server.url("/image"), "OSP_CHECKSUM": server.url("/list")}
        creates = []
        for disk in disks:
            disk.touch()
            os.truncate(disk, 8 << 20)
            environment = door.environment([disk], given)
            creates.append(subprocess.Popen([ROOT / "create"], env=environment))
        assert [create.wait() for create in creates] == [0] * 10
        assert server.count("/image") == 1
    assert len(list(door.cache.glob("*.raw"))) == 1
    data = images[0].read_bytes()
    assert all(disk.read_bytes()[1 << 20 : len(data)] == data[1 << 20 :] for disk in disks)


# --- decoding while the download comes -------------------------------------------------------


def test_a_restart_of_the_download_restarts_the_decoder(
    node: Node, images: tuple[Path, Path]
) -> None:
    """Another image comes at the second attempt, and nothing of the first is left in it."""
    old, new = (convert(path, "qcow2").read_bytes() for path in images)
    cut = httpd.content(old, etag=None, cut=len(old) // 2)
    with httpd.serve({"/image": httpd.sequence(cut, httpd.content(new, etag=None))}) as server:
        node.configure("", retries=2)
        assert node.image(server.url("/image")) == images[1].read_bytes()
        assert server.count("/image") == 2


def test_a_download_that_goes_on_is_decoded_on(node: Node, images: tuple[Path, Path]) -> None:
    data = convert(images[0], "qcow2").read_bytes()
    parts = httpd.sequence(httpd.content(data, cut=len(data) // 2), httpd.content(data))
    with httpd.serve({"/image": parts}) as server:
        node.configure("", retries=2)
        assert node.image(server.url("/image")) == images[0].read_bytes()
        assert [seen.headers["Range"] is None for seen in server.seen] == [True, False]


def test_what_was_decoded_is_not_kept_without_its_digest(
    node: Node, images: tuple[Path, Path]
) -> None:
    data = convert(images[0], "qcow2").read_bytes()
    with httpd.serve({"/image": httpd.content(data)}) as server:
        with pytest.raises(Error, match="its sha256 is "):
            node.image(server.url("/image"), checksum="sha256:" + "0" * 64)
    assert [path for path in node.cache.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"image": "http://evil?x=@good/img.raw"}, {"image": "http://good/img.raw"}),
        ({"image": "http://h/i?b=1"}, {"image": "http://h/i?b=2"}),
        (
            {"image": "http://h/i", "checksum": "http://h/list?b=1"},
            {"image": "http://h/i", "checksum": "http://h/list?b=2"},
        ),
        (
            {"image": "http://h/i", "checksum": "http://h/list#a"},
            {"image": "http://h/i", "checksum": "http://h/list#b"},
        ),
    ],
)
def test_two_urls_are_two_entries(first: dict[str, str], second: dict[str, str]) -> None:
    def key(parameters: dict[str, str]) -> str:
        variables = {f"OSP_{name.upper()}": value for name, value in parameters.items()}
        job = params.parse(Environment.from_environ(variables))
        return obtain._remote_key(job)

    assert key(first) != key(second)
    with_user = {name: value.replace("://", "://me:pw@") for name, value in first.items()}
    assert key(with_user) == key(first)


def test_what_lies_beside_the_disk_needs_no_room_on_it(
    node: Node, images: tuple[Path, Path], tmp_path: Path
) -> None:
    raw, size_bytes = images[0], images[0].stat().st_size
    (tmp_path / "tools.iso").write_bytes(os.urandom(size_bytes + (20 << 20)))
    members = ("-C", raw.parent, raw.name, "-C", tmp_path, "tools.iso")
    subprocess.run(["tar", "-cf", tmp_path / "tar", *members], check=True)
    with httpd.serve({"/image": httpd.content((tmp_path / "tar").read_bytes())}) as server:
        with obtain.raw_image(node.job(server.url("/image")), size_bytes) as got:
            assert got.file.read() == raw.read_bytes()


def test_what_is_announced_too_large_is_not_fetched(node: Node, images: tuple[Path, Path]) -> None:
    with httpd.serve(
        {"/image": httpd.content(b"", headers={"Content-Length": "200000000000"})}
    ) as server:
        job = node.job(server.url("/image"))
        with pytest.raises(Error) as caught, obtain.raw_image(job, 64 << 20):
            pass
    assert caught.value.message == f"{server.url('/image')}: is larger than the limit of 8.1 GiB"
    assert caught.value.hint is not None and "--disk 0:size=" in caught.value.hint
