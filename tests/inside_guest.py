"""Runs cloud-init's own code in a sandbox: test_renderers.py and test_stages.py judge.

Started with PYTHONPATH set to one version of cloud-init; reads and writes JSON.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLOUD = Path("/var/lib/cloud")
RENDERERS = {
    "eni": ("eni", {"eni_path": "etc/network/interfaces"}),
    "netplan": ("netplan", {"netplan_path": "etc/netplan/cloud-init.yaml"}),
    "networkd": ("networkd", {}),
    "NetworkManager": ("network_manager", {}),
}


def load(name: str) -> Any:
    return importlib.import_module(f"cloudinit.{name}")


def render(config: Any, renderer: Any) -> dict[str, Any]:
    """Return the files that one renderer makes of a network-config, by path."""
    state = load("net.network_state")
    try:
        parsed = state.parse_net_config_data(config, renderer=renderer)
    except TypeError:  # before 22.4
        parsed = state.parse_net_config_data(config)
    with tempfile.TemporaryDirectory() as target:
        renderer.render_network_state(parsed, target=target)
        return {
            os.fspath(path.relative_to(target)): importlib.import_module("yaml").safe_load(
                path.read_text()
            )
            if path.suffix == ".yaml"
            else path.read_text()
            for path in Path(target).rglob("*")
            if path.is_file()
        }


def render_all(configs: dict[str, Any]) -> dict[str, Any]:
    """Return {case: {renderer: files}} for every renderer that this version has."""
    distros = load("distros")  # first: later versions import in a circle else
    load("util").chownbyname = lambda *_arguments: None  # there is no user systemd-network
    result: dict[str, Any] = {case: {} for case in configs}
    for name, (module, options) in RENDERERS.items():
        try:
            renderer = load(f"net.{module}").Renderer
        except ImportError:
            continue
        for case, config in configs.items():
            result[case][name] = render(config, renderer(options))
    for name, distro in ("sysconfig", "rhel"), ("wicked", "opensuse"):
        options = distros.fetch(distro).renderer_configs["sysconfig"]
        for case, config in configs.items():
            result[case][name] = render(config, load("net.sysconfig").Renderer(options))
    return result


def boot(files: dict[str, str]) -> dict[str, Any]:
    """Go through a boot's early stages with this seed; return what cloud-init made of it."""
    stages, sources, settings = load("stages"), load("sources"), load("settings")
    seed = CLOUD / "seed/nocloud"
    shutil.rmtree(seed, ignore_errors=True)
    seed.mkdir(parents=True)
    for name, text in files.items():
        (seed / name).write_bytes(base64.b64decode(text))
    for cache in CLOUD.glob("instances/*/obj.pkl"):
        cache.unlink()  # a seed on a volume is read anew at every boot, one in a folder is not
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    init = stages.Init(ds_deps=[sources.DEP_FILESYSTEM])
    init.read_cfg()
    init.initialize()
    init.fetch(existing="check")
    instance_id = init.instancify()
    init.update()
    network = init._find_networking_config()[0]
    init.consume_data(settings.PER_ALWAYS)
    init.cfg  # noqa: B018 -- reads what has just been stored
    later = stages.Init(ds_deps=[sources.DEP_FILESYSTEM])
    later.read_cfg()
    source = later.fetch(existing="check")
    logging.getLogger().removeHandler(handler)
    updates = None
    if hasattr(stages, "update_event_enabled"):  # since 21.3
        event = load("event")
        updates = stages.update_event_enabled(
            source, later.cfg, event.EventType.BOOT, event.EventScope.NETWORK
        )
    return {
        "instance-id": instance_id,
        "hostname": source.get_hostname(fqdn=True),
        "keys": source.get_public_ssh_keys(),
        "network": network,
        "network at boot": updates,
        "packages": later.cfg.get("packages"),
        "cfg": {key: later.cfg.get(key) for key in ("password", "chpasswd", "apt", "mounts")},
        "scripts": sorted(path.read_text() for path in CLOUD.glob("instance/scripts/*/*")),
        "machine-id": Path("/etc/machine-id").read_text(),
        "log": log.getvalue(),
    }


def judge(texts: dict[str, str]) -> dict[str, str]:
    """Return what this version's schema says against each cloud-config; "" for nothing."""
    module, yaml = load("config.schema"), importlib.import_module("yaml")
    found = {}
    for name, text in texts.items():
        try:
            config, schema = yaml.safe_load(text), module.get_schema()
            module.validate_cloudconfig_schema(config, schema, strict=True)
            found[name] = ""
        except module.SchemaValidationError as error:
            found[name] = str(error)
    return found


def main() -> None:
    """Read the task and its input from standard input, write the result to standard output."""
    task, given = json.load(sys.stdin)
    answer = sys.stdout
    sys.stdout = sys.stderr
    tasks: dict[str, Callable[[Any], Any]] = {
        "render": render_all,
        "schema": judge,
        "boot": lambda seeds: [boot(each) for each in seeds],
    }
    json.dump(tasks[task](given), answer)


if __name__ == "__main__":
    main()
