"""The OS parameters: one table with name, meaning, check and default, and the Job they make.

A value given to Ganeti (-O, also private and secret ones) beats the variant's, which beats that of
[defaults] in cloudimage.conf, which beats the table's own.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from lib import config, log
from lib.config import Config
from lib.environment import Environment
from lib.errors import Error, several

DOCUMENT_LIMIT_BYTES = 1 << 20
VALUE_LIMIT = 4096
OS_PARAMETER = "OS parameter"  # where a value is from, unless from a file
VARIANT_KEYS = ("description", "architecture", "keyring")
DEBIAN_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64el"}
FORMATS = ("auto", "raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")


@dataclass(frozen=True)
class Location:
    """A file on the node, or a URL of an HTTP server: exactly one of them is set."""

    path: Optional[Path] = None
    url: Optional[str] = None

    def __str__(self) -> str:
        return log.redact(str(self.path or self.url))

    @property
    def file_name(self) -> str:
        """The last component, which a checksum list calls the file by."""
        return re.split(r"[?#]", str(self.path or self.url), maxsplit=1)[0].rpartition("/")[2]


@dataclass(frozen=True)
class Document(Location):
    """A text of the user's: given in place, or where to read it."""

    data: Optional[bytes] = None


Digest = tuple[str, str]
Checksum = Union[Digest, Location, None]


@dataclass(frozen=True)
class Job:
    """What to do, wholly checked: the OS parameters, typed, and the node's configuration."""

    config: Config
    variant: Optional[str]
    description: str
    keyring: Optional[Path]
    image: Optional[Location]  # an import needs none
    format: str
    checksum: Checksum
    signature: Union[str, Location, None]  # "inline", or where the detached one is
    ssh_keys: Document
    user_data: Document
    vendor_data: Document
    network: Union[str, Document]  # "auto", "dhcp", "none"
    network_version: int
    dns_servers: tuple[str, ...]
    dns_search: tuple[str, ...]
    seed: str
    metad: bool
    os_package: Optional[Path]

    def source(self) -> Location:
        """Return where the image is; Error if nothing names one."""
        if self.image is None:
            raise Error(
                f"image: variant {self.variant} has no image of its own",
                "give -O image=/path or a URL, or use another variant",
            )
        return self.image

    def keys(self) -> Path:
        """Return the keyring that signatures are checked with; parse() has asked for one."""
        if self.keyring is None:
            raise Error("signature: the variant names no keyring")
        return self.keyring

    def documents(self) -> dict[str, Document]:
        """Return the user's texts by the name of their parameter."""
        found = {"ssh_keys": self.ssh_keys, "user_data": self.user_data}
        found["vendor_data"] = self.vendor_data
        if isinstance(self.network, Document):
            found["network"] = self.network
        return found


# --- parsers: text -> value; ValueError says what the value must be --------------------------


def _choice(*known: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in known:
            raise ValueError(f"one of {' '.join(known)}; {config.nearest(value, known)}")
        return value

    return parse


def _fill(value: str) -> str:
    """Fill in the node's architecture."""
    machine = platform.machine()
    value = value.replace("{arch}", machine)
    value = value.replace("{deb_arch}", DEBIAN_ARCHITECTURES.get(machine, machine))
    if re.search(r"\{[a-z_]+\}", value):
        raise ValueError("without other {names} than {arch} and {deb_arch}")
    return value


def _location(value: str) -> Location:
    value = _fill(value)
    if re.search(r"[^\x21-\x7e]", value):
        raise ValueError("printable ASCII without spaces (percent-encode a URL, rename a file)")
    scheme, colon, rest = value.partition("://")
    if value.startswith("/"):
        return Location(path=Path(value))
    if colon and scheme.lower() == "file":
        if not rest.startswith("/"):
            raise ValueError("file:///absolute/path (a file on this node)")
        return Location(path=Path(rest))
    if colon and scheme.lower() in ("http", "https"):
        if not re.match(
            r"([^/?#]*@)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?([/?#]|$)", rest
        ):
            raise ValueError("a URL with a host name, https://HOST/PATH")
        return Location(url=f"{scheme.lower()}://{rest}")
    raise ValueError("an absolute path, or a file://, http:// or https:// URL")


def _image(value: str) -> Optional[Location]:
    return _location(value) if value else None


def _checksum(value: str) -> Checksum:
    if value == "none":
        return None
    match = re.fullmatch(r"(sha256|sha512):([0-9a-fA-F]+)", value)
    if match and len(match[2]) == int(match[1][3:]) // 4:
        return match[1], match[2].lower()
    if match or not value.startswith(("/", "file:", "http:", "https:")):
        raise ValueError(
            "none, sha256: with 64 or sha512: with 128 hex digits, or path or URL of a list"
        )
    return _location(value)


def _signature(value: str) -> Union[str, Location, None]:
    if value in ("none", "inline"):
        return None if value == "none" else value
    if not value.startswith(("/", "file:", "http:", "https:")):
        raise ValueError("none, inline, or path or URL of a detached signature")
    return _location(value)


def _document(value: str) -> Document:
    if value.startswith("@"):
        if not value.startswith("@/") or "\n" in value:
            raise ValueError("@ and an absolute path on the node, as in @/etc/ganeti/user-data")
        return Document(path=Path(value[1:]))
    if re.fullmatch(r"https?://[\x21-\x7e]+", value):
        return Document(url=_location(value).url)
    if value.startswith("base64:"):
        try:
            return Document(data=base64.b64decode(re.sub(r"\s", "", value[7:]), validate=True))
        except (binascii.Error, ValueError):
            raise ValueError("base64: and valid base64 data") from None
    try:
        return Document(data=value.encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError("UTF-8 text (use base64: for binary data)") from None


def _network(value: str) -> Union[str, Document]:
    if value in ("auto", "dhcp", "none"):
        return value
    document = _document(value)
    if document.data is not None and not re.search(rb"version|network", document.data):
        raise ValueError("auto, dhcp, none, or a network-config document (with a version in it)")
    return document


def _addresses(value: str) -> tuple[str, ...]:
    try:
        return tuple(str(ipaddress.ip_address(word)) for word in _words(value))
    except ValueError as error:
        raise ValueError(f"IP addresses separated by spaces or commas ({error})") from None


def _domains(value: str) -> tuple[str, ...]:
    for word in _words(value):
        if not re.fullmatch(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?", word):
            raise ValueError("domain names separated by spaces or commas")
    return tuple(_words(value))


def _words(value: str) -> list[str]:
    return [word for word in re.split(r"[\s,]+", value) if word]


def _file(value: str) -> Optional[Path]:
    return config.absolute_path(value) if value else None


class Parameter(NamedTuple):
    """One row of the table; `quiet` values are never printed, not even in an error."""

    name: str
    help: str
    default: str
    parse: Callable[[str], Any]
    quiet: bool = False

    @property
    def field(self) -> str:
        """Its name in Job, and in lower case in the environment."""
        return self.name.replace("-", "_")


TABLE = (
    Parameter("image", "absolute path, file:// or http(s):// URL of the image", "", _image),
    Parameter("format", f"format of the image: {' '.join(FORMATS)}", "auto", _choice(*FORMATS)),
    Parameter(
        "checksum",
        "none, sha256:HEX, sha512:HEX, or path/URL of a checksum list",
        "none",
        _checksum,
    ),
    Parameter(
        "signature",
        "none, inline, or path/URL of a detached signature over the list (or the image)",
        "none",
        _signature,
    ),
    Parameter(
        "ssh_keys", "keys of the default user: text, @/path, URL or base64:", "", _document, True
    ),
    Parameter(
        "user_data", "cloud-init user data: text, @/path, URL or base64:", "", _document, True
    ),
    Parameter(
        "vendor_data", "cloud-init vendor data: text, @/path, URL or base64:", "", _document, True
    ),
    Parameter("network", "auto, dhcp, none, or a network-config document", "auto", _network, True),
    Parameter("network_version", "version of network-config: 1 or 2", "1", _choice("1", "2")),
    Parameter("dns_servers", "name servers, separated by spaces or commas", "", _addresses),
    Parameter("dns_search", "search domains, separated by spaces or commas", "", _domains),
    Parameter(
        "seed",
        "where the seed goes: auto gap tail disk none",
        "auto",
        _choice("auto", "gap", "tail", "disk", "none"),
    ),
    Parameter("metad", "user data through ganeti-metad: no or yes", "no", config.yes_no),
    Parameter("os-package", "path of a file on the node that metad serves as user data", "", _file),
)
NAMES = tuple(parameter.name for parameter in TABLE)


def parameters_list() -> str:
    """Return the text of the file parameters.list (ganeti-os-interface: name, space, help)."""
    return "".join(f"{parameter.name} {parameter.help}\n" for parameter in TABLE)


# --- layers ----------------------------------------------------------------------------------


def config_directory(env: Environment) -> Path:
    """Return the folder of the administrator's files."""
    return env.config_directory or config.DIRECTORY


def variant_files(directory: Path) -> dict[str, Path]:
    """Return the file of every variant by name."""
    files = config.overlay(directory, "variants.d", lambda path: path.suffix == ".conf")
    return {path.stem: path for path in files}


def load_config(env: Environment) -> Config:
    """Read cloudimage.conf."""
    return config.load(config_directory(env), NAMES)


def parse(env: Environment) -> Job:
    """Return the Job; Error lists every problem of every layer, a line each."""
    problems: list[str] = []
    settings = load_config(env)
    variant: dict[str, str] = {}
    source = "variant"
    if env.variant is not None:
        files = variant_files(config_directory(env))
        if env.variant not in files:
            raise Error(
                f"OS_VARIANT={env.variant}: there is no variants.d/{env.variant}.conf",
                config.nearest(env.variant, files),
            )
        source = str(files[env.variant])
        variant = config.read_ini(files[env.variant], {"variant": [*NAMES, *VARIANT_KEYS]}).get(
            "variant", {}
        )
    by_variable = {parameter.field.upper(): parameter for parameter in TABLE}
    for variable in sorted(set(env.parameters) - set(by_variable)):
        names = [parameter.field for parameter in TABLE]
        problems.append(
            f"OSP_{variable}: unknown OS parameter; {config.nearest(variable.lower(), names)}"
        )
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for parameter in TABLE:
        layers = (
            (OS_PARAMETER, env.parameters, parameter.field.upper()),
            (source, variant, parameter.name),
            (str(settings.source), settings.defaults, parameter.name),
        )
        where, value = "default", parameter.default
        for name, layer, key in layers:
            if key in layer:
                where, value = name, layer[key]
                break
        origins[parameter.field] = where
        try:
            values[parameter.field] = _parsed(parameter, value)
        except ValueError as error:
            shown = "(not shown)" if parameter.quiet else log.printable(log.redact(value), 80)
            problems.append(f"{parameter.name}={shown} ({where}): must be {error}")
    problems += _architecture_problems(variant.get("architecture", ""), source)
    keyring = variant.get("keyring", "")
    if keyring and not keyring.startswith("/"):
        problems.append(f"{source}: keyring={keyring}: must be an absolute path")
    problems += _conflicts(values, settings, keyring)
    problems += _metad_conflicts(values, origins)
    if problems:
        raise several(problems)
    values["network_version"] = int(values["network_version"])
    return Job(
        config=settings,
        variant=env.variant,
        description=variant.get("description", ""),
        keyring=Path(keyring) if keyring else None,
        **values,
    )


def _parsed(parameter: Parameter, value: str) -> Any:
    if not parameter.quiet and len(value) > VALUE_LIMIT:
        raise ValueError(f"at most {VALUE_LIMIT} characters, is {len(value)}")
    if not parameter.quiet and not value.isascii():
        raise ValueError("ASCII")
    if re.search(
        r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]" if parameter.quiet else r"[\x00-\x1f\x7f]", value
    ):
        raise ValueError("without control characters (use base64: for binary data)")
    return parameter.parse(value)


def _architecture_problems(architectures: str, source: str) -> list[str]:
    machine = platform.machine()
    if not architectures or machine in architectures.replace(",", " ").split():
        return []
    return [f"{source}: architecture={architectures}: this node is {machine}; use another variant"]


def _conflicts(values: Mapping[str, Any], settings: Config, keyring: str) -> list[str]:
    """Return what is wrong with values that are each right."""
    problems = []
    checksum, signature = values.get("checksum"), values.get("signature")
    if signature == "inline" and "checksum" in values and not isinstance(checksum, Location):
        problems.append("signature=inline: there is no list; set checksum= to its path or URL")
    if isinstance(signature, Location) and isinstance(checksum, tuple):
        problems.append(
            "signature: checksum= is a pinned digest; give a list, or leave the checksum out"
            " for a signature over the image"
        )
    if signature and not keyring:
        problems.append(
            "signature: the variant names no keyring; set keyring= in its file in variants.d"
        )
    if settings.image_require_checksum and not checksum and not signature and "checksum" in values:
        problems.append(
            "checksum=none: require_checksum is set in cloudimage.conf; give sha256:HEX or a list"
        )
    return problems


def _metad_conflicts(values: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Return what metad cannot serve: doc/metad.md says what it can."""
    if not values.get("metad"):
        if values.get("os_package") and "metad" in values:
            return ["os-package: is served by metad only; add metad=yes"]
        return []
    problems = []
    for name in ("user_data", "vendor_data"):
        document = values.get(name)
        if document is None or document.data == b"":
            continue
        if values.get("os_package"):
            problems.append(f"{name}: os-package is the user data then; leave {name} out")
        elif origins[name] != OS_PARAMETER:
            problems.append(
                f"{name} ({origins[name]}): metad knows OS parameters only; give it with -O"
            )
        elif document.data is None:
            problems.append(f"{name}: metad serves the parameter itself; give text or base64:")
    return problems
