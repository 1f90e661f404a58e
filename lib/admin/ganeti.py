"""What Ganeti knows of an instance, asked on the master with Ganeti's own commands.

Their fields are those of gnt-instance list-fields; the ones it calls Custom are printed as Python
literals (ganeti/cli.py, FormatQueryResult).
"""

from __future__ import annotations

import ast
import json
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lib import run
from lib.admin import common
from lib.errors import Error
from lib.settings import config, params

ANSWER_S = 120.0
_FIELDS = (
    *("name", "uuid", "os", "pnode", "oper_state", "admin_state"),
    *("nic.ips", "nic.macs", "nic.modes", "nic.names", "nic.networks.names"),
    *("disk.names", "osparams"),
)
_NETWORK_FIELDS = ("name", "network", "gateway", "network6", "gateway6")
_NAME = re.compile(r"[^\W-][\w.:@+-]*", re.ASCII)  # neither an option nor a filter
_VARIABLES = ("SUBNET", "GATEWAY", "SUBNET6", "GATEWAY6")


@dataclass(frozen=True)
class Instance:
    """An instance as Ganeti has it; `variables` are those that it would give to our scripts."""

    name: str
    node: str
    is_running: bool
    is_offline: bool
    variables: Mapping[str, str]

    @property
    def is_here(self) -> bool:
        """Whether its disks are on this node."""
        return _is_this_node(self.node)

    def disks(self) -> list[Path]:
        """Return the paths that its disks have on its node whether active or not, in order."""
        count = int(self.variables["DISK_COUNT"])
        keys = (f"DISK_{index}_PATH" for index in range(count))
        return [Path(self.variables[key]) for key in keys if key in self.variables]


def call(*argv: str, timeout_s: float = ANSWER_S) -> str:
    """Run a command of Ganeti's; Error with its last words if it fails."""
    try:
        return run.run(argv, timeout_s=timeout_s)
    except run.Failed as error:
        words = error.words.strip().splitlines()
        raise Error(
            f"{' '.join(argv[:2])}: {words[-1] if words else error.message}",
            "gnt-* commands work on the master, look with gnt-cluster getmaster"
            if "not the master" in error.words
            else None,
        ) from error


def checked(kind: str, name: str) -> str:
    """Return the name of an instance, a network or a node; Error if it can be none."""
    if not _NAME.fullmatch(name):
        raise Error(f"{name[:80]!r} is no {kind}'s name", f"gnt-{kind} list shows them")
    return name


def instance(name: str) -> Instance:
    """Ask for one instance; Error if Ganeti knows none of this name, or it is another OS's."""
    name = checked("instance", name)
    options = ("--no-headers", "--separator=|", "-o", ",".join(_FIELDS))
    line = call("gnt-instance", "list", *options, name).strip("\n")
    values = dict(zip(_FIELDS, line.split("|", len(_FIELDS) - 1)))
    base, _plus, variant = values["os"].partition("+")
    if base not in ("cloudimage", config.BUNDLE.name):
        raise Error(f"{values['name']}: its OS is {values['os']}, not cloudimage")
    variables = {"INSTANCE_NAME": values["name"], "INSTANCE_UUID": values["uuid"]}
    if variant:
        variables["OS_VARIANT"] = variant
    # --static asks no node and waits for no lock: hooks of a job may call this while it runs
    info = call("gnt-instance", "info", "--static", values["name"])
    parameters = {**_of_the_cluster(info), **_literal(values["osparams"])}
    variables.update({common.variable(key): str(value) for key, value in parameters.items()})
    variables.update(_nics(values))
    variables.update(_disks(info, _literal(values["disk.names"])))
    if values["oper_state"] not in ("Y", "N"):
        raise Error(f"{values['name']}: node {values['pnode']} does not tell its state")
    # one that is marked up and has crashed is Ganeti's to stop, too
    running = values["oper_state"] == "Y" or values["admin_state"] == "up"
    offline = values["admin_state"] == "offline"
    return Instance(values["name"], values["pnode"], running, offline, variables)


def _nics(values: Mapping[str, str]) -> dict[str, str]:
    networks = _literal(values["nic.networks.names"])
    columns: dict[str, list[Optional[str]]] = {
        "IP": [None if ip in ("None", "-") else ip for ip in _comma(values["nic.ips"])],
        "MAC": list(_comma(values["nic.macs"])),
        "MODE": list(_comma(values["nic.modes"])),
        "NAME": _literal(values["nic.names"]),
    }
    variables = {"NIC_COUNT": str(len(columns["MAC"]))}
    for key, column in columns.items():
        variables.update({f"NIC_{n}_{key}": value for n, value in enumerate(column) if value})
    known = {name: network(name) for name in set(networks) - {None}}
    for index, name in enumerate(networks):
        for key, value in known.get(name, {}).items():
            variables[f"NIC_{index}_NETWORK_{key}"] = value
    return variables


def network(name: str) -> dict[str, str]:
    """Return a network's SUBNET, GATEWAY, SUBNET6 and GATEWAY6, as far as it has them."""
    name = checked("network", name)
    options = ("--no-headers", "--separator=|", "-o", ",".join(_NETWORK_FIELDS))
    row = call("gnt-network", "list", *options, name).strip("\n").split("|")
    return {key: value for key, value in zip(_VARIABLES, row[1:]) if value not in ("", "-")}


def defaults(os_name: str) -> tuple[str, dict[str, str]]:
    """Return the mode of a NIC that says none, and the OS parameters that gnt-os modify set."""
    info = call("gnt-cluster", "info")
    nics = info.partition("\nDefault nic parameters: \n")[2]
    mode = re.search("^    mode: (.+)$", nics, re.MULTILINE)
    part = info.partition("\nOS parameters: \n")[2].partition("\nHidden OSes: ")[0] + "\n"
    blocks = re.split(r"^  (\S+): \n", part, flags=re.MULTILINE)  # "", name, text, name, text...
    own = dict(zip(blocks[1::2], blocks[2::2])).get(os_name, "")
    pairs = re.split(rf"^    ({'|'.join(params.NAMES)}): ", own, flags=re.MULTILINE)
    values = (value.removesuffix("\n") for value in pairs[2::2])
    return mode[1] if mode else "bridged", dict(zip(pairs[1::2], values))


def _of_the_cluster(info: str) -> dict[str, str]:
    """Return the OS parameters that gnt-os modify set and the instance has not.

    list has them for an OS without variants only (Ganeti's Query/Instance.hs), info for all.
    """
    part = info.partition("\n  Operating system parameters: \n")[2].partition("\n  Allocated ")[0]
    return dict(re.findall(r"^    ([a-z_-]+): default \((.*?)\)$", part, re.MULTILINE | re.DOTALL))


def _disks(info: str, names: list[Optional[str]]) -> dict[str, str]:
    """Return the disks, with their paths where these do not depend on their being active."""
    variables = {"DISK_COUNT": str(len(names))}
    for index, own in enumerate(names):
        if own is not None:
            variables[f"DISK_{index}_NAME"] = own
        # what a DRBD disk is made of is indented further
        part = info.partition(f"\n    - disk/{index}: ")[2].partition("\n    - disk/")[0]
        found = re.search(r"^      logical_id: (.+)$", part, re.MULTILINE)
        path = _path(found[1]) if found else None
        if path is not None:
            variables[f"DISK_{index}_PATH"] = path
    return variables


def _path(logical_id: str) -> Optional[str]:
    """Return the path of a volume (VG/LV) or a file (['loop', PATH]); None for anything else."""
    if not logical_id.startswith("["):
        return f"/dev/{logical_id}"
    last = str(_literal(logical_id)[-1])
    return last if last.startswith("/") else None


def other_nodes() -> list[str]:
    """Return the names of the online nodes but this one."""
    lines = call("gnt-node", "list", "--no-headers", "--separator=|", "-o", "name,offline")
    names = [name for name, state in (line.split("|") for line in lines.split()) if state == "N"]
    return [name for name in names if not _is_this_node(name)]


def _is_this_node(name: str) -> bool:
    return name in (socket.gethostname(), socket.getfqdn())


def on_node(node: str, *argv: str) -> Any:
    """Run our own command on another node, over Ganeti's ssh set-up; return the JSON it prints."""
    words = (str(config.BUNDLE / "lib/cloudimage"), *argv)
    text = call("gnt-cluster", "command", "-M", "-n", node, *words)
    lines = re.findall(rf"^{re.escape(node)}: (.*)$", text, re.MULTILINE)
    if "return code = 0" not in text:
        said = next((line for line in reversed(lines) if line), "no answer")
        raise Error(f"on {node}: {said.replace('ERROR: ', '')}")
    try:
        return json.loads("\n".join(lines))
    except ValueError:
        raise Error(f"on {node}: cloudimage did not answer; is it this version?") from None


def _comma(text: str) -> list[str]:
    return text.split(",") if text not in ("", "-") else []


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise Error(f"Ganeti's answer {text[:80]!r} is not understood") from None
