"""A device to test with: a real sshd on loopback, with keys, configuration and known hosts of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from urllib.parse import quote

import pytest

SLACK_S = 10.0
"""Seconds between two looks at the other side, and those that a busy machine takes to end a process."""

SUBNETS = ip_network("198.18.0.0/15")


@dataclass
class Network:
    """A network namespace with a device's end of a cable, whose other end is this machine's.

    Attributes:
        number: of a process: those of two that run have other names and addresses.
    """

    number: int

    @property
    def name(self) -> str:
        """Of the namespace; begins the names of the cable's ends."""
        return f"et{self.number}"

    @property
    def here(self) -> str:
        """The address of this machine's end, in a subnet of four; 198.18.0.0/15 is for tests (RFC 2544)."""
        return str(SUBNETS[4 * self.number % SUBNETS.num_addresses + 1])

    @property
    def there(self) -> str:
        """That of the device's end."""
        return str(SUBNETS[4 * self.number % SUBNETS.num_addresses + 2])

    @property
    def inside(self) -> tuple[str, ...]:
        """Begins a command that runs there."""
        return ("ip", "netns", "exec", self.name)

    def make(self) -> None:
        """Make the namespace and the cable; skips the test where that cannot be."""
        if shutil.which("ip") is None:
            pytest.skip("no `ip` here; on Debian: apt-get install iproute2")
        if os.geteuid() != 0:
            pytest.skip("network namespaces are made by root only")
        made = subprocess.run(["ip", "netns", "add", self.name], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
        try:
            self._ip(*self.inside, "ip", "link", "set", "lo", "up")
            self.plug()
        except BaseException:
            self.remove()
            raise

    def plug(self) -> None:
        """Put the cable in."""
        here, there = f"{self.name}-a", f"{self.name}-b"
        self._ip("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", self.name)
        self._ip("ip", "address", "add", f"{self.here}/30", "dev", here)
        self._ip("ip", "link", "set", here, "up")
        self._ip(*self.inside, "ip", "address", "add", f"{self.there}/30", "dev", there)
        self.up()

    def pull(self) -> None:
        """Take the cable away: both ends are gone."""
        self._ip("ip", "link", "delete", f"{self.name}-a")

    def up(self) -> None:
        """Switch on the device's end."""
        self._ip(*self.inside, "ip", "link", "set", f"{self.name}-b", "up")

    def down(self) -> None:
        """Switch off the device's end."""
        self._ip(*self.inside, "ip", "link", "set", f"{self.name}-b", "down")

    def remove(self) -> None:
        """Remove it all; the cable goes with its end."""
        self._ip("ip", "netns", "delete", self.name)

    def _ip(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)


@dataclass
class Sshd:
    """A running sshd.

    Attributes:
        folder: its configuration, keys, and files of the device.
        process: the server.
        network: where it is, if it has one of its own.
    """

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    network: Network | None = None

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
        return below(self.process.pid)

    def programs(self) -> list[int]:
        """Those of `processes` that are not of the server itself: a shell, edgetube, and what they started."""
        return [number for number in self.processes() if not _name(number).startswith("sshd")]

    def end(self) -> None:
        """End the server, and its logins, which may wait for an answer of a network that is no more."""
        logins = self.processes()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        for number in logins:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def wait_quiet(self, seconds: float = 60.0) -> None:
        """Wait until no login is left."""
        end = time.monotonic() + seconds
        while self.processes() and time.monotonic() < end:
            time.sleep(0.05)
        assert self.processes() == []


def below(process: int) -> list[int]:
    """The processes that one started, and those that they started."""
    found, waiting = list[int](), [process]
    while waiting:
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(waiting.pop())], capture_output=True, text=True)
        waiting += (some := [int(line) for line in children.stdout.split()])
        found += some
    return found


def _name(process: int) -> str:
    """What a process runs; nothing if it has ended."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_running(process: int) -> bool:
    """Whether it runs, and is not only waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(processes: Sequence[int], by: float) -> bool:
    """Whether they all end until a time of `time.monotonic`; returns as soon as they have."""
    while any(map(is_running, processes)) and time.monotonic() < by:
        time.sleep(0.1)
    return not any(map(is_running, processes))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(folder: Path, network: Network | None = None) -> Sshd:
    """Start an sshd with files in a folder, on loopback or in a network of its own."""
    host = network.there if network else "127.0.0.1"
    path = shutil.which("sshd", path=f"/usr/sbin:/sbin:{os.environ['PATH']}")
    if path is None or shutil.which("ssh") is None:
        pytest.skip("no sshd here; on Debian: apt-get install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "key", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    port = free_port()
    public = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[{host}]:{port} {public}")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress {host}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/key.pub\n"
        f"UsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n"
        f"SetEnv EDGETUBE_CACHE={folder}/device OMP_NUM_THREADS=1\n"
    )
    user = f"HostName {host}\nPort {port}\nIdentitiesOnly yes\nIdentityAgent none\n"
    (folder / "config").write_text(
        f"Host device twin\n{user}IdentityFile {folder}/key\nUserKnownHostsFile {folder}/known\n"
        f"Host stranger\n{user}IdentityFile {folder}/other\nUserKnownHostsFile {folder}/known\n"
        f"Host unknown\n{user}IdentityFile {folder}/key\nUserKnownHostsFile {folder}/nothing\n"
        f"Host off\nHostName 127.0.0.1\nPort {free_port()}\n"
    )
    log = folder / "log"
    with log.open("wb") as words:
        command = [*(network.inside if network else ()), path, "-D", "-e", "-f", str(folder / "sshd_config")]
        process = subprocess.Popen(command, stderr=words)
    end = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return Sshd(folder, port, process, network)
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


@pytest.fixture
def network() -> Iterator[Network]:
    """A network with a device's end of a cable that can be pulled."""
    made = Network(os.getpid())
    made.make()
    yield made
    made.remove()


@pytest.fixture
def distant(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """A server at the other end of a cable that can be pulled."""
    (folder := tmp_path / "sshd").mkdir()
    made = start(folder, network)
    monkeypatch.setenv("EDGETUBE_SSH", made.command)
    yield made
    made.end()
