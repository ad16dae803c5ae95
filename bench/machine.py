"""The machine and the versions that a measurement was made on."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any


def date() -> str:
    """Now, in UTC, as ISO 8601 has it, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def dated(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document that is printed or kept, with the moment as `date`."""
    return {**document, "date": date()}


def describe() -> str:
    """Processor, cores, system, and installed versions; one line."""
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; {installed}"


def processor() -> str:
    """The processor's name, and those of its vector extensions that matter for speed."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    flags = found.get("flags", found.get("Features", "")).split()
    extensions = [f for f in ("amx_int8", "avx512_vnni", "avx512_bf16", "avx_vnni", "avx2", "asimddp") if f in flags]
    return f"{found.get('model name', platform.machine())} ({' '.join(extensions)})"


def versions() -> dict[str, str]:
    """Versions of edgetube, of Python, and of every package that edgetube's extras name and that is installed."""
    wanted = [r for r in metadata.requires("edgetube") or [] if "dev" not in r]
    names = sorted({re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in wanted} - {"edgetube"})
    found = {"edgetube": metadata.version("edgetube"), "python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
