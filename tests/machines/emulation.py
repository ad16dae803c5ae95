"""Other processors, emulated by QEMU's user mode: x86 that lack instructions, and aarch64 with a root of its own."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetube.errors import EdgetubeError
from edgetube.remote import adb, portable

CACHE = Path(__file__).parents[2] / "build" / "machines"
MIRROR = [mirror] if (mirror := os.environ.get("DEBIAN_MIRROR")) else []
"""Where Debian's packages come from; debootstrap's own choice if the variable is not set."""
RELEASE, PYTHON = "bookworm", "3.11"
"""Debian's release that the root is made of, and the Python that it has."""

WHEELS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")

SITE = "/site"
"""Where the base install is, in the root."""


class Absent(Exception):
    """What emulates the processor is not here and cannot be made."""


@dataclass(frozen=True)
class Machine:
    """How Python is started on a processor, and the folder that is `/` there if it is not the one that is here."""

    command: tuple[str, ...]
    root: Path | None = None

    def run(self, script: Path, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
        """Run a script; the paths among the arguments are copied to where the machine can read them."""
        environment = {"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], "HOME": "/tmp"}
        with ExitStack() as stack:
            if self.root:
                given = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.root / "given")))
                arguments = tuple(_copied(a, given, self.root) if isinstance(a, Path) else a for a in arguments)
                script, environment["PYTHONPATH"] = _copied(script, given, self.root), SITE
            command = [*self.command, str(script), *map(str, arguments)]
            return subprocess.run(command, capture_output=True, text=True, env=environment)


def _copied(path: Path, folder: Path, root: Path) -> Path:
    target = folder / path.name
    shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    return Path("/") / target.relative_to(root)


def x86(cpu: str, python: Path | str = sys.executable) -> Machine:
    """This system on another x86 processor, by QEMU's name for it.

    Raises:
        Absent: there is no QEMU.
    """
    return Machine((_qemu("x86_64"), "-cpu", cpu, str(python)))


def aarch64(wheel: Path, extras: Sequence[str] = ()) -> Machine:
    """A Debian of its own with Python, and edgetube's wheel with what a base install and some extras bring.

    It has no /sys: the library by which ONNX Runtime looks for the processor would read the host's there and crash.

    Raises:
        Absent: there is no QEMU, or a root cannot be made.
    """
    root = _root()
    site = root / SITE.strip("/")
    shutil.rmtree(site / "edgetube", ignore_errors=True)
    platforms = [option for name in WHEELS for option in ("--platform", name)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    _call(
        [
            *pip,
            *platforms,
            "--python-version",
            PYTHON,
            "--only-binary=:all:",
            "--target",
            str(site),
            f"{wheel}[{','.join(extras)}]",
        ]
    )
    return Machine((*_into(root), "/qemu", f"/usr/bin/python{PYTHON}"), root)


def aarch64_device(folder: Path) -> Path:
    """A device that is reached by a command: the same Debian, with a shell and Python as a login finds them.

    Its shell is a static busybox of this machine; Python is aarch64's, started by a script of that shell.

    Args:
        folder: on the file system of `CACHE`, for the device's files.

    Returns:
        What `EDGETUBE_SSH` may be: a program whose last argument is the command.

    Raises:
        Absent: there is no QEMU or no static busybox, or a root cannot be made.
    """
    shell = shutil.which("busybox")
    if shell is None:
        raise Absent("no busybox here; on Debian: apt-get install busybox-static")
    root = folder / "root"
    shutil.copytree(_root(), root, symlinks=True, copy_function=os.link, ignore=lambda _, names: {"site"} & {*names})
    shutil.copy(shell, root / "busybox")
    (root / "xbin").mkdir()
    for name in ("sh", "echo", "uname", "cat"):
        (root / "xbin" / name).symlink_to("/busybox")
    python = root / "usr" / "bin" / f"python{PYTHON}"
    python.rename(python.with_name("python.real"))
    python.write_text('#!/busybox sh\nexec /qemu -0 "$0" /usr/bin/python.real "$@"\n')
    python.chmod(0o755)
    (root / "root").mkdir(exist_ok=True)
    environment = ["/usr/bin/env", "-i", "PATH=/xbin:/usr/bin", "HOME=/root", "OMP_NUM_THREADS=1", "LANG=C.UTF-8"]
    _call([*environment, *_into(root), "/xbin/sh", "-c", "echo"])
    program = folder / "ssh"
    enter = shlex.join([*environment, *_into(root), "/xbin/sh", "-c"])
    program.write_text(f'#!/bin/bash\nexec {enter} "cd /root; ${{@: -1}}"\n')
    program.chmod(0o755)
    return program


def portable_python(folder: Path) -> Path:
    """A copy of what `edgetube.remote.portable` makes, which is kept for as long as that stays as it is.

    Raises:
        Absent: what makes it is not here, or it cannot be downloaded.
    """
    code = hashlib.sha256(Path(portable.__file__).read_bytes()).hexdigest()[:12]
    kept = CACHE / f"portable-{code}"
    if not kept.is_dir():
        try:
            portable.make(kept, mirror=MIRROR[0] if MIRROR else portable.MIRROR)
        except EdgetubeError as error:
            raise Absent(str(error)) from error
    return Path(shutil.copytree(kept, folder / "python"))


def phone(folder: Path) -> dict[str, Any]:
    """An aarch64 system with a static shell and its tools, no C library and no Python: as little as an Android's shell.

    It is not Android: its kernel is this machine's, its shell busybox, and nothing there says no but its disk, of which
    /data alone can be written. Programs of aarch64 are started by the kernel, which calls QEMU for them in a namespace
    of the user.

    Args:
        folder: for the phone's files.

    Returns:
        It, as `tests/edgetube/remote/scripted_adb.py` takes one.

    Raises:
        Absent: there is no QEMU, no busybox can be downloaded, or the kernel is older than 6.7.
    """
    qemu, root = _qemu("aarch64"), folder / "phone"
    tools = root / "system" / "bin"
    for place in ("dev", f"{adb.TEMPORARY.strip('/')}", "system/bin"):
        (root / place).mkdir(parents=True)
    shutil.copy(_static_shell(), tools / "sh")
    for name in ("cat", "chmod", "cp", "echo", "ls", "mkdir", "rm", "uname"):
        (tools / name).symlink_to("sh")
    for name in ("null", "urandom", "zero"):
        (root / "dev" / name).touch()
    start = folder / "start"
    start.write_text(_PHONE.format(qemu=qemu, root=shlex.quote(str(root)), data=shlex.quote(str(root / "data"))))
    start.chmod(0o755)
    environment = [
        "/usr/bin/env", "-i", "PATH=/system/bin", "HOME=/", "SHELL=/system/bin/sh", "USER=shell",
        f"TMPDIR={adb.TEMPORARY}", "OMP_NUM_THREADS=1",
    ]  # fmt: skip
    shell = ["unshare", "--user", "--map-root-user", "--mount", str(start), *environment]
    shell += [_program("chroot"), str(root), "/system/bin/sh", "-c"]
    _call([*shell, "uname -m"])
    return {"state": "device", "shell": shell, "root": str(root)}


_PHONE = """#!/bin/sh -e
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
printf '%s' ':aarch64:M::\\x7fELF\\x02\\x01\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02\\x00\\xb7\\x00:\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x00\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xfe\\xff\\xff\\xff:{qemu}:PF' > /proc/sys/fs/binfmt_misc/register
mount --bind {root} {root}
mount --bind {data} {data}
for one in null urandom zero; do mount --bind /dev/$one {root}/dev/$one; done
mount -o remount,bind,ro {root}
exec "$@"
"""  # noqa: E501  # the magic of an ELF file, its mask, and who runs it: preserving its name, opened here


def _static_shell() -> Path:
    kept = CACHE / f"busybox-{RELEASE}-aarch64"
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            try:
                portable.fetch(["busybox-static"], work, MIRROR[0] if MIRROR else portable.MIRROR)
            except EdgetubeError as error:
                raise Absent(str(error)) from error
            (package,) = work.glob("*.deb")
            _call(["dpkg-deb", "--extract", str(package), str(work / "debian")])
            CACHE.mkdir(parents=True, exist_ok=True)
            shutil.move(work / "debian" / "bin" / "busybox", kept)
    return kept


def _root() -> Path:
    qemu, root = _qemu("aarch64"), CACHE / f"aarch64-{RELEASE}"
    if not (root / "made").is_file():
        _debian(root, Path(qemu))
    return root


def _into(root: Path) -> tuple[str, ...]:
    become_root = () if os.geteuid() == 0 else ("unshare", "--map-root-user")
    return (*become_root, _program("chroot"), str(root))


def _program(name: str) -> str:
    return shutil.which(name, path="/usr/sbin:/sbin:" + os.environ["PATH"]) or name


def _debian(root: Path, qemu: Path) -> None:
    """Unpack Debian's packages; none of their scripts is run."""
    debootstrap = shutil.which("debootstrap", path="/usr/sbin:/sbin:" + os.environ["PATH"])
    if debootstrap is None:
        raise Absent("no debootstrap here; on Debian: apt-get install debootstrap")
    shutil.rmtree(root, ignore_errors=True)
    fetched = root / "fetched"
    root.mkdir(parents=True)
    wanted = f"--include=python3,libstdc++6,python{PYTHON}"
    become_root = [] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
    options = ["--arch=arm64", "--variant=minbase", wanted, "--download-only"]
    _call([*become_root, debootstrap, *options, RELEASE, str(fetched), *MIRROR])
    for package in sorted(fetched.glob("var/cache/apt/archives/*.deb")):
        _call(["dpkg-deb", "--extract", str(package), str(root)])
    shutil.rmtree(fetched)
    for folder in ("tmp", "given"):
        (root / folder).mkdir(exist_ok=True)
    shutil.copy(qemu, root / "qemu")
    (root / "made").touch()


def _qemu(processor: str) -> str:
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise Absent("emulated processors are tried on x86-64 Linux")
    found = shutil.which(f"qemu-{processor}-static") or shutil.which(f"qemu-{processor}")
    if found is None:
        raise Absent(f"no qemu-{processor}-static here; on Debian: apt-get install qemu-user-static")
    return found


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Absent(f"{command[0]} failed: {' '.join((done.stderr or done.stdout).split())[-300:]}")
