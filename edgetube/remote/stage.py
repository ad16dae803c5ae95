"""The first program on a device: it says what is there, takes files, makes an environment, and starts edgetube in it.

It is sent as text and needs Python and its standard library only. Files are stored by their sha256, so what is there
once is not sent again, and what broke off goes on where it ended.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from edgetube import wire
from edgetube.errors import DeviceError

PROTOCOL = 3
"""Of the orders of this module and of `edgetube.remote.far`."""

PATIENCE_S = 40.0
"""Seconds without a sign of the other side after which the device ends its processes, see `edgetube.wire.BEAT_S`."""

HELLO = "edgetube-hello"
"""Begins the first line of this program; lines before it are a login's."""

EDGETUBE = (
    "from edgetube.remote import stage; server, _ = stage.serve(); from edgetube.remote.far import main; main(server)"
)
"""Becomes edgetube. The other side is told that this one is there while it is imported: a slow disk takes long."""

KEEP_S = 60 * 86400
"""Seconds for which an unused file is kept; an eighth of it for clips, and for parts of files."""

CLIPS = 512 << 20
"""Most bytes of clips that are kept; and at most half of what would be free without them."""

LEAST_FREE = 1 << 20
"""Bytes that stay free on the disk behind a file that is sent."""

TEMPORARY = (Path("/var/tmp"), Path("/tmp"))
"""Where a user without a home has a folder."""


def main(elsewhere: str) -> None:
    """Say hello, then carry out orders until the line ends.

    Args:
        elsewhere: what helps if the folder cannot be written, or its disk is full, for messages.
    """
    server, private = serve()
    try:
        store = Store(folder(elsewhere), elsewhere)
    except DeviceError as error:
        server.hello(HELLO, {"error": str(error)})
        return
    os.chdir(store.root)
    server.hello(HELLO, facts())
    server.serve({**orders(store), "start": lambda python: start(python, store, private.fileno())})


def serve() -> tuple[wire.Server, IO[bytes]]:
    """A server on the pipes of this process, and where its results go; it says from now on that this side is there."""
    private = wire.private_stdout()
    return wire.Server(wire.Inbox(patience=PATIENCE_S), private, beats=True), private


def orders(store: Store) -> dict[str, Callable[..., Any]]:
    """The orders by their names."""
    return {"have": store.have, "put": store.put, "tree": store.tree, "environment": store.environment}


def folder(elsewhere: str) -> Path:
    """Where files stay: edgetube's cache folder if it can be written, else one of this user's in /var/tmp or /tmp.

    Args:
        elsewhere: what helps if there is none, for messages.

    Raises:
        DeviceError: none can be written; says why.
    """
    chosen = os.environ.get("EDGETUBE_CACHE")
    tried = [Path(chosen).absolute()] if chosen else [*_home(), *(at / f"edgetube-{os.getuid()}" for at in TEMPORARY)]
    reasons = []
    for place in tried:
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not chosen and {place.lstat().st_uid, place.stat().st_uid} != {os.getuid()}:  # of a link, and its end
                raise PermissionError(errno.EPERM, "it belongs to another user")
            with tempfile.TemporaryFile(dir=place) as probe:
                probe.write(b"\0" * 4096)
        except OSError as error:
            reasons.append(f"{place}: {error.strerror}")
        else:
            return place / "device"
    raise DeviceError(f"no folder there can be written ({'; '.join(reasons)}); {elsewhere}")


def _home() -> Iterator[Path]:
    """The user's cache folder; none for a user without a home."""
    try:
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "edgetube"
    except RuntimeError:
        return


def facts() -> dict[str, Any]:
    """What decides which environment fits."""
    return {
        "protocol": PROTOCOL,
        "python": platform.python_version(),
        "executable": sys.executable,
        "implementation": sys.implementation.name,
        "system": platform.system(),
        "machine": platform.machine(),
        "platform": sysconfig.get_platform(),
        "libc": list(platform.libc_ver()),
        "macos": platform.mac_ver()[0],
        "pointer": 64 if sys.maxsize > 1 << 32 else 32,
        "own": own(),
    }


def own() -> dict[str, str] | None:
    """The version and code of the edgetube that is installed there; None without one."""
    script = (
        "import json, pathlib, edgetube; from edgetube.remote import stage; "
        "code = stage.code(pathlib.Path(edgetube.__file__).parent); "
        "print(json.dumps({'version': edgetube.__version__, 'code': code}))"
    )
    try:
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
        found = json.loads(ran.stdout) if ran.returncode == 0 else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return found if isinstance(found, dict) else None


def code(package: Path) -> str:
    """A digest of the Python files of an installed package."""
    return digest_of({path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*.py")})


def digest_of(files: dict[str, bytes]) -> str:
    """A digest of files: of their names, and of what is in them."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0".encode() + hashlib.sha256(data).digest())
    return digest.hexdigest()


def start(python: str, store: Store, stdout: int) -> None:
    """Become edgetube on the same pipes; until it says hello, nothing but signs comes, and some may be lost."""
    os.environ["EDGETUBE_CACHE"] = str(store.root.parent)
    if Path(python).is_relative_to(store.root):  # packages of the user would come into an environment that was made
        os.environ["PYTHONNOUSERSITE"] = "1"
    os.dup2(stdout, 1)
    try:
        os.execv(python, [python, "-c", EDGETUBE, store.elsewhere])
    except OSError as error:
        os.dup2(2, 1)
        raise DeviceError(f"{python} cannot be started: {error.strerror}") from error


class Store:
    """Files by their sha256, folders of them, and environments; every one is complete or not there.

    Clips are files, too, in a folder of their own: they are many, and few are asked for again.

    Args:
        root: its folder.
        elsewhere: what helps if the disk is full or refuses, for messages.

    Attributes:
        id: of this folder, and so of this device; made by the first program that ever came here.
    """

    def __init__(self, root: Path, elsewhere: str) -> None:
        self.root, self.elsewhere = root, elsewhere
        for name in ("files", "clips", "parts", "trees", "environments"):
            (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._forget()
        self.id = self._identity(root / "identity")

    def _identity(self, place: Path) -> str:
        """A random number in a folder, which is made the first time; of two programs at that time both get the same."""

        def known() -> str:
            return (place / "id").read_text("ascii") if (place / "id").is_file() else ""

        def name(made: Path) -> None:
            (made / "id").write_text(uuid.uuid4().hex, "ascii")

        self._make(place, lambda: len(known()) == len(uuid.uuid4().hex), name)
        return known()

    def have(self, digests: list[str], *, clips: bool = False) -> dict[str, int]:
        """The bytes that are there of each file; -1 for a whole one, which is hashed again: cards and disks decay.

        Args:
            clips: these are clips; of others the oldest are removed that are too many.
        """
        if clips:
            self._make_room({*digests})
        found = {}
        for digest in digests:
            whole, part = self._file(digest, clips=clips), self._part(digest)
            if whole.is_file() and _sha256(whole) != digest:
                whole.unlink()
            if whole.is_file():
                os.utime(whole)
                found[digest] = -1
            else:
                found[digest] = part.stat().st_size if part.is_file() else 0
        return found

    def put(
        self, digest: str, offset: int, size: int, pieces: tuple[bytes, ...] = (b"",), *, clips: bool = False
    ) -> None:
        """Write bytes of a file from `offset` on; the last ones complete it.

        Raises:
            DeviceError: the disk is full, or the whole is not what was promised.
        """
        part = self._part(digest)
        try:
            free = shutil.disk_usage(self.root).free
            if free < size - offset + LEAST_FREE:
                raise OSError(errno.ENOSPC, "")
            with part.open("r+b" if part.is_file() else "w+b") as file:
                file.truncate(offset)
                file.seek(offset)
                for piece in pieces:
                    file.write(piece)
                file.flush()
                if file.tell() < size:
                    return
                os.fsync(file.fileno())
        except OSError as error:
            raise self._full(error, size - offset) from error
        if _sha256(part) != digest:
            part.unlink()
            raise DeviceError("a file arrived damaged, its sha256 differs; run the command again")
        part.replace(self._file(digest, clips=clips))

    def read(self, digest: str, *, clips: bool = False) -> bytes:
        """The bytes of a file, or of a clip."""
        return self._file(digest, clips=clips).read_bytes()

    def _make_room(self, needed: set[str]) -> None:
        """Remove the clips that were not used for the longest time, until no more are left than may be."""
        found = []
        for path in (self.root / "clips").iterdir():
            with suppress(FileNotFoundError):  # another line makes room, too
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in found)
        most = min(CLIPS, (shutil.disk_usage(self.root).free + total) // 2)
        for _, size, path in sorted(found):
            if total > most and path.name not in needed:
                path.unlink(missing_ok=True)
                total -= size

    def tree(self, files: dict[str, str]) -> str:
        """A folder with files of the store: relative POSIX path -> sha256; returns its path.

        Raises:
            DeviceError: the disk is full.
        """
        place = self.root / "trees" / hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

        def fill(made: Path) -> None:
            for path, digest in files.items():
                target = made / path
                if not target.resolve().is_relative_to(made.resolve()):
                    raise DeviceError(f"{path!r} leaves its folder")
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(self._file(digest), target)
                except OSError:  # a file system without links
                    shutil.copyfile(self._file(digest), target)

        self._make(place, lambda: all(self._same(place / path, digest) for path, digest in files.items()), fill)
        return str(place)

    def _same(self, path: Path, digest: str) -> bool:
        """Whether a file of a folder is that of the store, which `have` hashed, or has its content."""
        try:
            return path.samefile(self._file(digest)) or _sha256(path) == digest
        except OSError:
            return False

    def environment(self, key: str, wheels: list[str] | None = None) -> str | None:
        """The path of the Python of a virtual environment, which is made if it is not there.

        The device's own packages can be imported in it, too; those of the wheels come first.

        Args:
            key: a digest of what the environment has.
            wheels: files of the store that it is made from; None makes none, and None is returned if it is not there.

        Raises:
            DeviceError: the disk is full, or no environment can be made.
        """
        version = json.dumps([_checked(key), sys.version, sys.executable])
        place = self.root / "environments" / hashlib.sha256(version.encode()).hexdigest()[:24]
        python = place / "bin" / "python"

        def is_whole() -> bool:
            return (place / "made").is_file() and python.exists()

        if wheels is None and not is_whole():
            return None
        self._make(place, is_whole, lambda made: self._environment(made, wheels or []))
        return str(python)

    def _make(self, place: Path, is_whole: Callable[[], bool], fill: Callable[[Path], None]) -> None:
        """Fill a folder and move it to its place, if it is not whole there; another client may be faster."""
        try:
            if is_whole():
                os.utime(place)
                return
            made = Path(tempfile.mkdtemp(dir=self.root / "parts"))
            try:
                fill(made)
                try:
                    made.replace(place)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    if not is_whole():
                        shutil.rmtree(place)
                        made.replace(place)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        except OSError as error:
            raise self._full(error, 0) from error

    def _environment(self, made: Path, wheels: list[str]) -> None:
        command = [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(made)]
        ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if ran.returncode:
            said = (ran.stderr or ran.stdout).strip().splitlines() or ["it said nothing"]
            raise DeviceError(
                f"{sys.executable} makes no virtual environment: {said[-1]}; on Debian: apt-get install python3-venv"
            )
        (site,) = made.glob("lib/python3*/site-packages")
        for digest in wheels:
            with zipfile.ZipFile(self._file(digest)) as wheel:
                wheel.extractall(site)
            for data in site.glob("*.data"):  # PEP 427: its folders belong elsewhere; scripts are not needed
                for part in ("purelib", "platlib"):
                    if (data / part).is_dir():
                        shutil.copytree(data / part, site, dirs_exist_ok=True)
                shutil.rmtree(data)
            os.utime(self._file(digest))
        (made / "made").touch()

    def _forget(self) -> None:
        """Remove what has not been used for a long time. A clock that was set back keeps things longer."""
        now = time.time()
        long, short = ("files", "trees", "environments"), ("clips", "parts")
        for kind, limit in (dict.fromkeys(long, KEEP_S) | dict.fromkeys(short, KEEP_S / 8)).items():
            for path in (self.root / kind).iterdir():
                try:
                    if now - path.lstat().st_mtime > limit:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                except OSError:
                    continue

    def _full(self, error: OSError, wanted: int) -> DeviceError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.root).free
            need = f"{wanted / 1e6:.0f} MB more are needed, " if wanted else ""
            return DeviceError(
                f"its disk is full: {need}{free / 1e6:.0f} MB are free in {self.root}; free some, or {self.elsewhere}"
            )
        return DeviceError(f"{self.root} cannot be written: {error.strerror}; see to that disk, or {self.elsewhere}")

    def _file(self, digest: str, *, clips: bool = False) -> Path:
        return self.root / ("clips" if clips else "files") / _checked(digest)

    def _part(self, digest: str) -> Path:
        return self.root / "parts" / _checked(digest)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checked(digest: str) -> str:
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise DeviceError(f"{digest[:80]!r} is no sha256")
    return digest
