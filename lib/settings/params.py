"""The OS parameters: one table with name, meaning, check and default, and the Job they make.

A value given to Ganeti (-O, also private and secret ones) beats the variant's, which beats that of
[defaults] in cloudimage.conf, which beats the table's own.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from lib import log
from lib.environment import Environment
from lib.errors import Error, several
from lib.settings import config, values
from lib.settings.config import Config
from lib.settings.values import FORMATS, Checksum, Document, Location

DOCUMENT_LIMIT_BYTES = 1 << 20
VALUE_LIMIT = 4096
OS_PARAMETER = "OS parameter"  # where a value is from, unless from a file
VARIANT_KEYS = ("description", "architecture", "keyring")


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
    password_hash: str  # of crypt(3); "" for none
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

    def require_checksum(self) -> None:
        """Raise an Error if the configuration asks for proof of the image and there is none."""
        if self.config.image_require_checksum and not self.checksum and not self.signature:
            raise Error(
                "checksum=none: require_checksum is set in cloudimage.conf",
                "give sha256:HEX or a list",
            )

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
    Parameter("image", "absolute path, file:// or http(s):// URL of the image", "", values.image),
    Parameter(
        "format", f"format of the image: {' '.join(FORMATS)}", "auto", values.choice(*FORMATS)
    ),
    Parameter(
        "checksum",
        "none, sha256:HEX, sha512:HEX, or path/URL of a checksum list",
        "none",
        values.checksum,
    ),
    Parameter(
        "signature",
        "none, inline, or path/URL of a detached signature over the list (or the image)",
        "none",
        values.signature,
    ),
    Parameter(
        "ssh_keys",
        "keys of the default user: text, @/path, URL or base64:",
        "",
        values.document,
        True,
    ),
    Parameter(
        "user_data", "cloud-init user data: text, @/path, URL or base64:", "", values.document, True
    ),
    Parameter(
        "vendor_data",
        "cloud-init vendor data: text, @/path, URL or base64:",
        "",
        values.document,
        True,
    ),
    Parameter(
        "password_hash",
        "crypt(3) hash of the default user's password, for the console",
        "",
        values.password_hash,
        True,
    ),
    Parameter(
        "network", "auto, dhcp, none, or a network-config document", "auto", values.network, True
    ),
    Parameter("network_version", "version of network-config: 1 or 2", "1", values.choice("1", "2")),
    Parameter("dns_servers", "name servers, separated by spaces or commas", "", values.addresses),
    Parameter("dns_search", "search domains, separated by spaces or commas", "", values.domains),
    Parameter(
        "seed",
        "where the seed goes: auto gap tail disk none",
        "auto",
        values.choice("auto", "gap", "tail", "disk", "none"),
    ),
    Parameter("metad", "user data through ganeti-metad: no or yes", "no", config.yes_no),
    Parameter(
        "os-package", "path of a file on the node that metad serves as user data", "", values.file
    ),
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


class Given(NamedTuple):
    """A parameter's text, and where it was given: OS_PARAMETER, a file, or "default"."""

    parameter: Parameter
    text: str
    origin: str

    @property
    def shown(self) -> str:
        """The text as a log may show it."""
        if self.parameter.quiet and self.origin != "default":
            return "(not shown)" if self.text else ""
        return log.printable(log.redact(self.text), 80)


class _Variant(NamedTuple):
    """A variant's file and its keys; no variant has none."""

    source: str
    keys: Mapping[str, str]


def _variant(env: Environment) -> _Variant:
    if env.variant is None:
        return _Variant("variant", {})
    files = variant_files(config_directory(env))
    if env.variant not in files:
        raise Error(
            f"OS_VARIANT={env.variant}: there is no variants.d/{env.variant}.conf",
            config.nearest(env.variant, files),
        )
    known = {"variant": [*NAMES, *VARIANT_KEYS]}
    source = files[env.variant]
    return _Variant(str(source), config.read_ini(source, known).get("variant", {}))


def given(env: Environment) -> list[Given]:
    """Return what each parameter is given as, in the table's order."""
    return _given(env, _variant(env), load_config(env))


def _given(env: Environment, variant: _Variant, settings: Config) -> list[Given]:
    result = []
    for parameter in TABLE:
        layers = (
            (OS_PARAMETER, env.parameters, parameter.field.upper()),
            (variant.source, variant.keys, parameter.name),
            (str(settings.source), settings.defaults, parameter.name),
        )
        found = ((layer[key], where) for where, layer, key in layers if key in layer)
        result.append(Given(parameter, *next(found, (parameter.default, "default"))))
    return result


def parse(env: Environment) -> Job:
    """Return the Job; Error lists every problem of every layer, a line each."""
    settings = load_config(env)
    variant = _variant(env)
    by_variable = {parameter.field.upper(): parameter for parameter in TABLE}
    names = [parameter.field for parameter in TABLE]
    problems = [
        f"OSP_{variable}: unknown OS parameter; {config.nearest(variable.lower(), names)}"
        for variable in sorted(set(env.parameters) - set(by_variable))
    ]
    found: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for each in _given(env, variant, settings):
        parameter = each.parameter
        origins[parameter.field] = each.origin
        try:
            found[parameter.field] = _parsed(parameter, each.text)
        except ValueError as error:
            problems.append(f"{parameter.name}={each.shown} ({each.origin}): must be {error}")
    problems += _architecture_problems(variant.keys.get("architecture", ""), variant.source)
    keyring = variant.keys.get("keyring", "")
    if keyring and not keyring.startswith("/"):
        problems.append(f"{variant.source}: keyring={keyring}: must be an absolute path")
    problems += _conflicts(found, settings, keyring)
    problems += _metad_conflicts(found, origins)
    if problems:
        raise several(problems)
    found["network_version"] = int(found["network_version"])
    return Job(
        config=settings,
        variant=env.variant,
        description=variant.keys.get("description", ""),
        keyring=Path(keyring) if keyring else None,
        **found,
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


def _conflicts(found: Mapping[str, Any], settings: Config, keyring: str) -> list[str]:
    """Return what is wrong with values that are each right."""
    problems = []
    checksum, signature = found.get("checksum"), found.get("signature")
    if signature == "inline" and "checksum" in found and not isinstance(checksum, Location):
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
    return problems


def _metad_conflicts(found: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Return what metad cannot serve: doc/metad.md says what it can."""
    if not found.get("metad"):
        if found.get("os_package") and "metad" in found:
            return ["os-package: is served by metad only; add metad=yes"]
        return []
    problems = []
    for name in ("user_data", "vendor_data"):
        document = found.get(name)
        if document is None or document.data == b"":
            continue
        if found.get("os_package"):
            problems.append(f"{name}: os-package is the user data then; leave {name} out")
        elif origins[name] != OS_PARAMETER:
            problems.append(
                f"{name} ({origins[name]}): metad knows OS parameters only; give it with -O"
            )
        elif document.data is None:
            problems.append(f"{name}: metad serves the parameter itself; give text or base64:")
    return problems
