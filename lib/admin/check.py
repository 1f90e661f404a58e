"""cloudimage check: is this node fit to run the product, line by line."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lib import hooks, log, sandbox, tools
from lib.admin import common, variants
from lib.disk.local import BLOCK_BYTES, Local
from lib.errors import Error, describe
from lib.settings import params
from lib.source import locations, obtain

LOW_BYTES = 2 << 30  # a vendor's image with its download, while an entry is made


class Row(NamedTuple):
    """One finding: "ok", "warning" (it works, but look) or "error" (something will fail)."""

    state: str
    what: str


def add(commands: common.Subparsers) -> None:
    """Add check."""
    words = "say whether this node is fit: tools, sandbox, cache, variants, keyrings, hooks"
    parser = common.subcommand(commands, "check", words)
    common.add_json(parser)
    parser.set_defaults(action=_check)


def _check(args: argparse.Namespace) -> int:
    rows = [row for part in (_programs, _configuration, _variants, _hooks) for row in _part(part)]
    if args.json:
        common.show_json([row._asdict() for row in rows])
    else:
        for row in rows:
            common.show(f"{row.state:<8} {log.printable(row.what, 1000)}")
    return int(any(row.state == "error" for row in rows))


def _part(part: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Go through one part; what keeps it from going on is a finding too."""
    try:
        yield from part()
    except Error as error:
        for line in error.lines:
            yield Row("error", line)
    except OSError as error:
        yield Row("error", describe(error))


def _programs() -> Iterator[Row]:
    yield Row("ok", f"Python {platform.python_version()}")
    for tool in sorted(tools.NEEDED):
        problem = tools.problem(tool)
        yield Row("error", problem) if problem else Row("ok", f"{tool} {tools.version(tool)}")
    try:
        yield Row("ok", f"requests {importlib.metadata.version('requests')}")
    except importlib.metadata.PackageNotFoundError:
        yield Row("error", "requests: not installed; install the package python3-requests")
    tools.try_sandbox()
    bound = "all that it runs" if sandbox.has_groups() else "each process: no cgroups v2 here"
    yield Row("ok", f"the sandbox starts; its memory is bounded for {bound}")


def _configuration() -> Iterator[Row]:
    settings = params.load_config(common.environment())
    present = settings.source if settings.source.exists() else f"no {settings.source}, defaults"
    yield Row("ok", f"configuration: {present}")
    store = obtain.store(settings)
    with store.workspace() as work:
        yield Row("ok", f"cache {store.directory}: safe, can be written")
        clones = "reflinks: a local raw image costs no copy" if _can_clone(work) else "no reflinks"
        yield Row("ok", f"cache {store.directory}: {clones}")
    free_bytes = shutil.disk_usage(store.directory).free
    words = f"cache {store.directory}: {log.size(free_bytes)} free, limit of the cache"
    words += f" {log.size(store.max_size_bytes)}"
    yield Row("warning" if free_bytes < LOW_BYTES else "ok", words)


def _can_clone(work: Path) -> bool:
    with tempfile.TemporaryFile(dir=work) as source, tempfile.TemporaryFile(dir=work) as copy:
        source.truncate(BLOCK_BYTES)
        trial = Local(copy.fileno(), "trial")
        return trial.clone(Local(source.fileno(), "trial"), 0) > 0


def _variants() -> Iterator[Row]:
    directory = common.directory()
    params.load_config(common.environment())  # once: what is wrong there is not each variant's
    files = params.variant_files(directory)
    offered = variants.listed(directory)
    good = 0
    for name in sorted(files):
        try:
            if not variants.read(name).is_for_this_machine:
                continue
            job = variants.job(name)
            if job.keyring is not None:
                locations.open_file(job.keyring).close()
            good += 1
        except Error as error:
            state = "error" if name in offered else "warning"
            yield from (Row(state, f"variant {name}: {line}") for line in error.lines)
        if name not in offered:
            yield Row("warning", f"variant {name}: not in variants.list, Ganeti does not offer it")
    for name in sorted(offered - set(files)):
        yield Row("error", f"variants.list names {name}, but there is no variants.d/{name}.conf")
    yield Row("ok", f"{good} of {len(files)} variants can be used on this node")


def _hooks() -> Iterator[Row]:
    directory = common.directory()
    for phase in hooks.PHASES:
        for script in hooks.find(directory, phase):
            yield Row("ok", f"hook {phase}: {script} runs")
    for problem in hooks.skipped(directory):
        yield Row("warning", problem)
