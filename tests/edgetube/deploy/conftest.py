"""A real Triton Inference Server. `make build/triton/stamp` lays out the one that the package nvidia-pytriton has."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[3] / "build" / "triton"
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Server:
    """A started server.

    Attributes:
        url: of its HTTP interface.
        log: what it writes.
    """

    url: str
    log: Path

    def ask(self, path: str, body: object = None) -> Any:
        """The JSON that a request is answered with; a body makes it a POST."""
        return json.loads(self.ask_bytes(path, body)[0])

    def ask_bytes(self, path: str, body: object = None) -> tuple[bytes, bytes]:
        """The JSON of an answer, and the tensors that were asked for as bytes."""
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self.url}/{path}", data), timeout=60) as answer:
                found, length = answer.read(), answer.headers["Inference-Header-Content-Length"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}\n{self.log.read_text()[-2000:]}") from error
        end = int(length) if length else len(found)
        return found[:end], found[end:]

    def states(self) -> dict[str, tuple[str, str]]:
        """The state of each model, and the reason."""
        found = self.ask("v2/repository/index", {})
        return {model["name"]: (model.get("state", ""), model.get("reason", "")) for model in found}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Path], Server]]:
    """Starts a server of a repository; it has the Python backend alone."""
    program = HERE / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = program / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        pytest.skip(f"no Triton server for Python {version} in {HERE}: make build/triton/stamp")
    backends = tmp_path / "backends"
    shutil.copytree(program / "backends", backends)
    shutil.copy(stub, backends / "python")
    started = []

    def start(repository: Path) -> Server:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        log = tmp_path / "server.log"
        libraries = [HERE / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR"))]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # whose packages the stub finds
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "PYTHONPATH": ":".join(path for path in sys.path if path.endswith("site-packages")),
        }
        options = {
            "model-repository": repository, "backend-directory": backends, "http-address": "127.0.0.1",
            "http-port": port, "allow-grpc": "false", "allow-metrics": "false", "exit-on-error": "false",
        }  # fmt: skip
        command = [str(program / "bin" / "tritonserver"), "--disable-auto-complete-config"]
        command += [f"--{key}={value}" for key, value in options.items()]
        with log.open("w") as written:
            started.append(subprocess.Popen(command, env=environment, stdout=written, stderr=subprocess.STDOUT))
        server, until = Server(f"http://127.0.0.1:{port}", log), time.monotonic() + PATIENCE_S
        while time.monotonic() < until and started[-1].poll() is None:
            try:
                server.ask("v2")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
            else:
                return server
        pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
