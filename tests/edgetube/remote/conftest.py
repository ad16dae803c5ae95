"""A device to test with: a real sshd on loopback, with keys, configuration and known hosts of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest


@dataclass
class Sshd:
    """A running sshd.

    Attributes:
        folder: its configuration, keys, and files of the device.
        process: the server.
    """

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def cache(self) -> Path:
        """`EDGETUBE_CACHE` of the device."""
        return self.folder / "device"

    @property
    def command(self) -> str:
        """What `EDGETUBE_SSH` has to be."""
        return f"ssh -F {self.folder}/config"

    def address(self, python: str | None = sys.executable, host: str = "device") -> str:
        """The address of the device; its own edgetube is the one that is tested."""
        return f"ssh://{host}" + (f"?python={quote(python)}" if python else "")

    def processes(self) -> list[int]:
        """Processes below the server: those of logins, and all that they started."""
        found, waiting = list[int](), [self.process.pid]
        while waiting:
            children = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(waiting.pop())], capture_output=True, text=True
            )
            waiting += (some := [int(line) for line in children.stdout.split()])
            found += some
        return found

    def wait_quiet(self, seconds: float = 60.0) -> None:
        """Wait until no login is left."""
        end = time.monotonic() + seconds
        while self.processes() and time.monotonic() < end:
            time.sleep(0.05)
        assert self.processes() == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(folder: Path) -> Sshd:
    """Start an sshd with files in a folder."""
    path = shutil.which("sshd", path=f"/usr/sbin:/sbin:{os.environ['PATH']}")
    if path is None or shutil.which("ssh") is None:
        pytest.skip("no sshd here; on Debian: apt-get install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "key", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    port = free_port()
    public = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {public}")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/key.pub\n"
        f"UsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n"
        f"SetEnv EDGETUBE_CACHE={folder}/device OMP_NUM_THREADS=1\n"
    )
    user = f"HostName 127.0.0.1\nPort {port}\nIdentitiesOnly yes\nIdentityAgent none\n"
    (folder / "config").write_text(
        f"Host device twin\n{user}IdentityFile {folder}/key\nUserKnownHostsFile {folder}/known\n"
        f"Host stranger\n{user}IdentityFile {folder}/other\nUserKnownHostsFile {folder}/known\n"
        f"Host unknown\n{user}IdentityFile {folder}/key\nUserKnownHostsFile {folder}/nothing\n"
        f"Host off\nHostName 127.0.0.1\nPort {free_port()}\n"
    )
    log = folder / "log"
    with log.open("wb") as words:
        process = subprocess.Popen([path, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=words)
    end = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return Sshd(folder, port, process)
        time.sleep(0.05)
    process.kill()
    process.wait()
    pytest.fail(f"sshd does not start: {log.read_text().strip()}")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder for what is collected here, and for a device that is this machine."""
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """One sshd for all tests of a process."""
    made = start(tmp_path_factory.mktemp("sshd"))
    yield made
    made.process.send_signal(signal.SIGTERM)
    made.process.wait()


@pytest.fixture
def sshd(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """The server as a test sees it: reached by `EDGETUBE_SSH`, and left without a process."""
    monkeypatch.setenv("EDGETUBE_SSH", server.command)
    yield server
    server.wait_quiet()
