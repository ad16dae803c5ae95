"""The environment in which edgetube runs on a device: its own, or one that is made there from wheels that are sent.

The wheel of edgetube is made from the modules that run here, so both sides are the same. The packages that it needs are
collected here, for the device's Python and processor, so the device needs no network. They are unpacked there into a
virtual environment, so it needs no pip.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from edgetube import __version__, cache
from edgetube.bundle import sha256
from edgetube.errors import DeviceError
from edgetube.files import atomic_write
from edgetube.progress import Progress
from edgetube.remote import stage

PARTS = ("edgetube", "edgetube.bench", "edgetube.calibration", "edgetube.export", "edgetube.runtimes")
"""Packages that may lie in folders of their own, as in a clone of the repository."""

WHEEL = f"edgetube-{__version__}-py3-none-any.whl"

OLDEST_LIBC = 17
"""manylinux_2_17 is the oldest that packages are built for."""


def modules() -> dict[str, bytes]:
    """The files of edgetube as it runs here, by their paths in a wheel; without the demo's pictures and weights."""
    found: dict[str, bytes] = {}
    for part in PARTS:
        spec = importlib.util.find_spec(part)
        assert spec is not None
        assert spec.submodule_search_locations
        place = Path(next(iter(spec.submodule_search_locations)))
        for path in _files(place):
            found[f"{part.replace('.', '/')}/{path.relative_to(place).as_posix()}"] = path.read_bytes()
    return dict(sorted(found.items()))


def _files(folder: Path) -> Iterator[Path]:
    """Files of a package and of the packages in it."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / "__init__.py").is_file():
            yield from _files(path)
        elif path.is_file() and path.suffix in (".py", ".typed", ".j2", ".html"):
            yield path


def code() -> str:
    """A digest of the modules, as `edgetube.remote.stage.code` has it of what is installed on a device."""
    return stage.digest_of(
        {name.removeprefix("edgetube/"): data for name, data in modules().items() if name.endswith(".py")}
    )


def wheel() -> bytes:
    """A wheel (PEP 427) of the modules that run here; the same bytes from the same modules."""
    files = modules()
    info = f"edgetube-{__version__}.dist-info"
    found = metadata.distribution("edgetube")  # in a folder where a package was built, that of its egg-info comes first
    files[f"{info}/METADATA"] = (found.read_text("METADATA") or found.read_text("PKG-INFO") or "").encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: edgetube\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={_record(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return made.getvalue()


def _record(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def extras_of(backends: Iterable[str]) -> list[str]:
    """The extras that backends need to run: those of their names."""
    known = set(metadata.metadata("edgetube").get_all("Provides-Extra") or ())
    return sorted(known.intersection(backends))


def platforms(device: Mapping[str, Any]) -> list[str]:
    """The platform tags of wheels for a device (PEP 425, 600), best first.

    Raises:
        DeviceError: there are none.
    """
    processor = str(device["platform"]).rpartition("-")[2]
    if device["system"] == "Linux" and device["pointer"] == 64:
        libc, version = device["libc"]
        if libc == "glibc":
            minor = int(version.split(".")[1])
            return [f"manylinux_2_{n}_{processor}" for n in range(minor, OLDEST_LIBC - 1, -1)] + [
                f"manylinux2014_{processor}", f"linux_{processor}",
            ]  # fmt: skip
        return [f"musllinux_1_{n}_{processor}" for n in range(2, -1, -1)]
    if device["system"] == "Darwin":
        major, minor = (int(part) for part in f"{device['macos']}.0".split(".")[:2])
        if (major, minor) == (10, 16):  # what macOS 11 and later call themselves to a Python that was built on 10
            major = 11
        return [f"macosx_{major}_{minor if major == 10 else 0}_{device['machine']}"]  # pip knows the older ones
    raise DeviceError(
        f"packages for {device['system']} on {processor}, {device['pointer']} bits, cannot be collected here; install "
        "edgetube there and give ?python=/path/of/its/python3"
    )


def environment(device: Mapping[str, Any], extras: Sequence[str]) -> str:
    """A digest of what an environment there has: edgetube as it runs here, and what it needs.

    Args:
        device: `edgetube.remote.stage.facts`.
    """
    key = json.dumps([stage.digest_of(modules()), _needs(device, extras)], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()


def _needs(device: Mapping[str, Any], extras: Sequence[str]) -> dict[str, str]:
    return {
        "needs": "; ".join(sorted(metadata.requires("edgetube") or ())), "extras": ",".join(extras),
        "python": ".".join(str(device["python"]).split(".")[:2]), "platforms": " ".join(platforms(device)),
    }  # fmt: skip


_left_out: dict[tuple[str, str], str] = {}
"""(kind of device, extra) -> why its packages could not be collected; pip is asked for them once in a process."""


def left_out(device: Mapping[str, Any], extras: Iterable[str]) -> dict[str, str]:
    """Those of some extras whose packages could not be collected for such a device, and why."""
    kind = _kind(device)
    return {extra: _left_out[kind, extra] for extra in extras if (kind, extra) in _left_out}


def _kind(device: Mapping[str, Any]) -> str:
    return json.dumps(_needs(device, []), sort_keys=True)


def collect(device: Mapping[str, Any], extras: Sequence[str], progress: Progress) -> dict[str, Path] | None:
    """The wheels of edgetube and of all that it needs on a device, by their file names; kept in the cache folder.

    Args:
        device: `edgetube.remote.stage.facts`.

    Returns:
        The wheels; None if there are none for some of the extras, which `left_out` has from now on: what else is asked
        of the device may still be done without them.

    Raises:
        DeviceError: there is no such wheel, or no package index and nothing in the cache.
        OSError, BackendError: the cache folder cannot be written.
    """
    own = wheel()
    mine = cache.folder() / "wheels" / hashlib.sha256(own).hexdigest()[:16] / WHEEL
    if not mine.is_file():
        mine.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(mine, own)
    try:
        found = _packages(mine, extras, _needs(device, extras), progress)
    except DeviceError as error:
        if not extras:
            raise
        reasons = _reasons(mine, device, extras, progress) or dict.fromkeys(extras, str(error))
        _left_out.update({(_kind(device), extra): why for extra, why in reasons.items()})
        return None
    return {path.name: path for path in (mine, *found)}


def _reasons(own: Path, device: Mapping[str, Any], extras: Sequence[str], progress: Progress) -> dict[str, str]:
    """Those of several extras whose packages cannot be collected alone, and why."""
    found = {}
    for extra in extras if len(extras) > 1 else ():
        try:
            _packages(own, [extra], _needs(device, [extra]), progress)
        except DeviceError as error:
            found[extra] = str(error)
    return found


def _packages(own: Path, extras: Sequence[str], needs: Mapping[str, str], progress: Progress) -> list[Path]:
    """Wheels of packages in the cache; they are collected if one is missing."""
    tags, place = needs["platforms"].split(), own.parent.parent
    told = f"collect packages for Python {needs['python']}, {tags[0]}"

    def make(path: Path, reason: str) -> None:
        progress(told, 0, 1)
        path.write_text(json.dumps(_download(own, extras, needs["python"], tags, place)), "utf-8")
        progress(told, 1, 1)

    refused = ""
    while True:
        listed = cache.make_once("packages", ".json", needs, make, refused).path
        found = [place / name for name in json.loads(listed.read_text("utf-8"))]
        if refused or all(path.is_file() for path in found):
            return found
        refused = sha256(listed)


def _download(own: Path, extras: Sequence[str], python: str, tags: Sequence[str], place: Path) -> list[str]:
    abi = f"cp{python.replace('.', '')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    command += [option for name in (abi, "abi3", "none") for option in ("--abi", name)]
    command += [option for tag in tags for option in ("--platform", tag)]
    with tempfile.TemporaryDirectory(dir=place) as folder:
        asked = f"{own}[{','.join(extras)}]" if extras else str(own)
        ran = subprocess.run([*command, "--dest", folder, asked], capture_output=True, text=True)
        if ran.returncode:
            lines = (ran.stderr or ran.stdout).splitlines()
            said = [line for line in lines if "ERROR" in line or "No module" in line]
            said = lines if said and said[-1].endswith("Exception:") else said  # a fault of pip's own: what it was
            raise DeviceError(
                f"its packages (Python {python}, {tags[0]}) cannot be collected here: "
                f"{(said or ['pip said nothing'])[-1].strip()}; connect this machine to a package index, or install "
                "edgetube on the device and give ?python=/path/of/its/python3"
            )
        found = [path for path in sorted(Path(folder).glob("*.whl")) if path.name != WHEEL]
        for path in found:
            path.replace(place / path.name)
    return [path.name for path in found]
