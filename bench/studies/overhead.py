"""What `--on` adds to the time of a call: a bundle timed here and through the line, in pairs of short turns.

    python bench/studies/overhead.py BUNDLE [--on local://] [--starts 24] [--pairs 20] [--json FILE]

`--on` has to lead to this machine: `local://`, or an sshd on loopback. The bundle is opened in three processes, as
`edgetube bench` opens it: two of this one, and one of a process at the other end of a line, which serves orders and
says that it is there as `edgetube.remote.far` does. All are warm and take turns of a few calls, in an order that is
drawn anew for each pair, so that what slows the machine for longer than a turn slows them alike. The times are taken in
these processes. The ratio of a pair is that of its medians, there over here; the other process of this machine over the
first one is the control, whose ratio is 1 but for what the method cannot see. Processes differ, too (where their memory
lies), so all three are started anew several times.

Printed are the medians of the ratios of all pairs, with 95 % intervals by the bootstrap: starts are drawn, and then the
pairs of each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from typing_extensions import Self

from edgetube import bundle as bundles
from edgetube import wire
from edgetube.bench import latency, machine
from edgetube.bundle import Bundle
from edgetube.errors import DeviceError
from edgetube.files import atomic_write
from edgetube.remote import stage, transport
from edgetube.remote.device import PATIENCE_S

TURN_S = 0.12
"""Seconds of counted calls of a turn."""

WARM_S = 2.0
"""Seconds that a warm-up may take."""

DRAWS = 4000
"""Of the bootstrap."""


class Side(Protocol):
    """Where a bundle is opened and timed."""

    def start(self, path: str) -> None:
        """Open it in a fresh process, and warm it up; the process before ends."""

    def turn(self) -> float:
        """Median time of a few calls, ms."""


class Here:
    """Processes of this one; a context manager."""

    def __init__(self) -> None:
        self._opened = ExitStack()

    def start(self, path: str) -> None:
        self._opened.close()
        given = {"path": path, "threads": 1, "device": None, "camera": (480, 640)}
        candidate = latency.Candidate(Path(path).name, "edgetube.bench.worker:bundle", given, 1)
        self._process = self._opened.enter_context(candidate.start())
        self._process.ask("warm", seconds=WARM_S)

    def turn(self) -> float:
        return float(statistics.median(self._process.ask("turn", seconds=TURN_S, least=latency.BLOCK)["ms"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


class There:
    """The same at the other end of a line; a context manager.

    Raises:
        DeviceError: the line ended.
    """

    def __init__(self, address: str) -> None:
        reached = transport.parse(address)
        words = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self._line = reached.run(f"exec {shlex.join(words)}", sys.stderr.fileno())
        assert self._line.stdin is not None
        assert self._line.stdout is not None
        patience = wire.Patience(PATIENCE_S, self._line.kill)
        read, write = wire.Reader(self._line.stdout, patience), wire.Writer(self._line.stdin, patience)
        self._asker = wire.Asker(read, write, lambda: DeviceError(f"{reached.name}: the line ended"))
        while line := read.line():
            if line.startswith(stage.HELLO.encode()):
                break
        self._closed = threading.Event()
        threading.Thread(target=wire.beat_until, args=(self._closed, write), daemon=True).start()

    def start(self, path: str) -> None:
        self._asker.ask("start", path=path)

    def turn(self) -> float:
        return float(self._asker.ask("turn"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        assert self._line.stdin is not None
        self._line.stdin.close()
        self._line.wait()


def serve() -> None:
    """Be the other end of a line until it is closed, as `edgetube.remote.far` is."""
    os.environ["EDGETUBE_CACHE"] = str(stage.folder("").parent)
    server, _ = stage.serve()
    server.hello(stage.HELLO, {})
    with Here() as here:
        server.serve({"start": here.start, "turn": here.turn})


def interval(starts: Sequence[Sequence[float]], draws: int = DRAWS, seed: int = 0) -> dict[str, float]:
    """The median of ratios, and its 95 % interval.

    Args:
        starts: the ratios of the pairs of each start, which are as many for each.
    """
    generator, ratios = np.random.default_rng(seed), np.asarray(starts)
    size = (draws, *ratios.shape)
    drawn = ratios[generator.integers(len(ratios), size=(*size[:2], 1)), generator.integers(size[2], size=size)]
    low, high = np.percentile(np.median(drawn.reshape(draws, -1), axis=1), [2.5, 97.5])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}


def measure(bundle: Bundle, address: str, starts: int, pairs: int, seed: int = 0) -> dict[str, Any]:
    """The pairs, and the ratios of the line and of the control."""
    order, path = random.Random(seed), str(bundle.path.resolve())
    found: list[list[dict[str, float]]] = []
    with Here() as here, Here() as control, There(address) as there:
        sides: dict[str, Side] = {"here": here, "control": control, "there": there}
        for _ in range(starts):
            for side in order.sample(list(sides.values()), len(sides)):
                side.start(path)
            found.append([{name: sides[name].turn() for name in order.sample(list(sides), 3)} for _ in range(pairs)])
            told = ", ".join(f"{name} {statistics.median(one[name] for one in found[-1]):.2f} ms" for name in sides)
            print(f"{len(found)}/{starts}: {told}", file=sys.stderr, flush=True)

    def ratio(of: str) -> dict[str, float]:
        return interval([[one[of] / one["here"] for one in pairs] for pairs in found])

    return {
        "machine": machine.describe(),
        "date": machine.date(),
        "bundle": bundle.name,
        "on": address.partition("?")[0],
        "load": os.getloadavg()[1],
        "starts": [{name: [round(one[name], 4) for one in pairs] for name in sides} for pairs in found],
        "line": ratio("there"),
        "control": ratio("control"),
    }


def main() -> int:
    if sys.argv[1:] == ["--serve"]:
        serve()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--on", default="local://")
    parser.add_argument("--starts", type=int, default=24, help="of the three processes")
    parser.add_argument("--pairs", type=int, default=20, help="of each start")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    document = measure(bundles.load(options.bundle), options.on, options.starts, options.pairs)
    if options.json:
        atomic_write(options.json, json.dumps(document, indent=1) + "\n")
    for name in ("line", "control"):
        found = document[name]
        print(f"{name}: {found['ratio']:.4f} ({found['low']:.4f} to {found['high']:.4f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
