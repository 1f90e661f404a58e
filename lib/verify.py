"""The door verify: what is definitely wrong with the OS parameters, before anything is made."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from lib import hooks, tools
from lib.environment import Environment
from lib.errors import Error, several
from lib.guest import keys, seed
from lib.settings import params
from lib.settings.params import Job
from lib.settings.values import Document, Location
from lib.source import locations

NETWORK_S = 20.0  # for all questions together: what does not answer passes


def verify(env: Environment) -> None:
    """Check the OS parameters and the variant; every problem is a line.

    Called by Ganeti before it adds, reinstalls or modifies an instance.
    """
    job = params.parse(env)
    job = _resolved(replace(job, config=replace(job.config, deadline=time.monotonic() + NETWORK_S)))
    problems = [problem for tool in tools.CORE if (problem := tools.problem(tool))]
    if not problems:
        tools.try_sandbox()
    directory = params.config_directory(env)
    hooks.warn(directory)
    brought = bool(hooks.find(directory, "pre"))  # a pre hook may bring a local image
    if job.image is not None:
        try:
            job.require_checksum()
        except Error as error:
            problems += error.lines
    given: list[tuple[str, object]] = [
        ("image", job.image),
        ("checksum", job.checksum),
        ("signature", job.signature),
        ("keyring", Location(job.keyring) if job.keyring else None),
        ("os-package", Location(job.os_package) if job.os_package else None),
        *job.documents().items(),
    ]
    for parameter, value in given:
        if parameter == "image" and brought and job.image and _is_missing(job.image):
            continue
        try:
            if isinstance(value, Location):
                _check_location(job, parameter, value)
        except Error as error:
            for line in error.lines:  # some name the parameter themselves
                problems.append(line if line.startswith(parameter) else f"{parameter}: {line}")
    if problems:
        raise several(problems)


def _resolved(job: Job) -> Job:
    """Look up the newest build's name if that is possible now: create asks again."""
    if job.index is None:
        return job
    from lib.source import fetch, index

    try:
        return index.resolved(job)
    except fetch.Unavailable:
        return replace(job, image=None, checksum=None, signature=None)


def _is_missing(image: Location) -> bool:
    return image.path is not None and not os.path.lexists(image.path)


def _check_location(job: Job, parameter: str, location: Location) -> None:
    """Raise an Error if the file or document is definitely of no use."""
    if location.url is not None:
        locations.size(location.url, job.config)
    elif location.path is not None and parameter == "image":
        locations.open_image(job, location.path).close()
    elif isinstance(location, Document):
        text = locations.read(location, job.config, params.DOCUMENT_LIMIT_BYTES)
        if parameter == "ssh_keys":
            keys.parse(text)
        elif parameter in ("user_data", "vendor_data"):
            seed.warn_unless_known(parameter, text)
    elif location.path is not None:
        locations.open_file(location.path).close()
