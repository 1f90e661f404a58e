"""The OS parameters: one table with name, meaning, check and default, and the Job they make.

A value given to Ganeti (-O, also private and secret ones) beats the variant's, which beats that of
[defaults] in cloudimage.conf, which beats the table's own.
"""

from __future__ import annotations

import datetime
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from lib import log
from lib.environment import Environment
from lib.errors import Error, several
from lib.settings import config, url, values
from lib.settings.config import Config
from lib.settings.values import FORMATS, Checksum, Document, Location

DOCUMENT_LIMIT_BYTES = 1 << 20
VALUE_LIMIT = 4096
OS_PARAMETER = "OS parameter"  # where a value is from, unless from a file
VARIANT_KEYS = ("description", "architecture", "keyring", "end_of_life", "index", "index_match")


@dataclass(frozen=True)
class Job:
    """What to do, wholly checked: the OS parameters, typed, and the node's configuration."""

    config: Config
    variant: Optional[str]
    description: str
    keyring: Optional[Path]
    end_of_life: Optional[datetime.date]
    index: Optional[Location]
    index_match: str
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

    @property
    def is_past_end(self) -> bool:
        """Whether the vendor's support of the variant's images has ended."""
        return self.end_of_life is not None and self.end_of_life < datetime.date.today()

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
        return log.printable(url.shown(self.text), 80)


class Variant(NamedTuple):
    """A variant's file and its keys; no variant has none."""

    source: str
    keys: Mapping[str, str]

    @property
    def is_for_this_machine(self) -> bool:
        """Whether its images are for this node's architecture."""
        named = self.keys.get("architecture", "").replace(",", " ").split()
        return not named or platform.machine() in named


def read_variant(env: Environment) -> Variant:
    """Return the variant that the environment names; Error with a hint for an unknown one."""
    if env.variant is None:
        return Variant("variant", {})
    files = variant_files(config_directory(env))
    if env.variant not in files:
        raise Error(
            f"OS_VARIANT={env.variant}: there is no variants.d/{env.variant}.conf",
            _nearest(env.variant, files),
        )
    source = files[env.variant]
    return Variant(str(source), _keys(source))


def _keys(path: Path) -> Mapping[str, str]:
    return config.read_ini(path, {"variant": [*NAMES, *VARIANT_KEYS]}).get("variant", {})


def _nearest(name: str, files: Mapping[str, Path]) -> str:
    """Return the hint for an unknown variant; code names are in the descriptions."""
    asked = set(re.findall(r"[a-z]+|[0-9.]+", name.lower()))
    for known, path in files.items():
        with suppress(Error):  # a broken one is not what was asked for
            words = f"{known} {_keys(path).get('description', '')}".lower()
            if asked and asked <= set(re.findall(r"[a-z]+|[0-9.]+", words)):
                return f"did you mean {known}?"
    return config.nearest(name, files)


def given(env: Environment) -> list[Given]:
    """Return what each parameter is given as, in the table's order."""
    return _given(env, read_variant(env), load_config(env))


def _given(env: Environment, variant: Variant, settings: Config) -> list[Given]:
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
    variant = read_variant(env)
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
    if not variant.is_for_this_machine:
        words = f"architecture={variant.keys['architecture']}: this node is {platform.machine()}"
        problems.append(f"{variant.source}: {words}; use another variant")
    keyring = variant.keys.get("keyring", "")
    if keyring and not keyring.startswith("/"):
        problems.append(f"{variant.source}: keyring={keyring}: must be an absolute path")
    own = _own_keys(variant, found, problems)
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
        **own,
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


def _own_keys(variant: Variant, found: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the keys that only a variant has, and add what is wrong with them to `problems`."""
    keys, where = variant.keys, variant.source
    index, match, end_of_life = None, keys.get("index_match", ""), None
    groups: set[str] = set()
    if bool(match) != bool(keys.get("index")):
        words = "index" if match else "index_match"
        problems.append(f"{where}: {words} is missing; index and index_match need each other")
    try:
        if keys.get("index"):
            index = values.location(keys["index"])
            match = re.sub(r"\{(deb_)?arch\}", lambda each: values.filled(each[0]), match)
            groups = set(re.compile(match).groupindex)
        if keys.get("end_of_life"):
            end_of_life = datetime.date.fromisoformat(keys["end_of_life"])
    except (ValueError, re.error) as error:
        problems.append(f"{where}: index, index_match or end_of_life (YYYY-MM-DD): {error}")
    for name in ("image", "checksum", "signature"):
        if values.names(found.get(name)) - groups:
            shown = log.printable(str(found[name]), 80)
            problems.append(
                f"{name}={shown}: must be without other {{names}} than {{arch}} and {{deb_arch}}"
                f" and the named groups of index_match in {where}"
            )
    return {"index": index, "index_match": match, "end_of_life": end_of_life}


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
