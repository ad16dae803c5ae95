"""What `--on` adds to the time of a call: the same bundle timed here and through the line, in turns.

    python bench/studies/overhead.py BUNDLE [--on local://] [--rounds 5] [--json bench/results/overhead.json]

`--on` has to lead to this machine: `local://`, or an sshd on loopback. Each round times the bundle here, there, there
and here again, so that a slow drift of the machine counts for both. A round's ratio is that of its sums of medians; the
median of all rounds is printed, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from edgetube import bundle as bundles
from edgetube.bench import latency, machine
from edgetube.bundle import Bundle
from edgetube.files import atomic_write
from edgetube.remote import commands


def here(bundle: Bundle, address: str, options: latency.Options) -> float:
    """Median time of a call, ms, measured on this machine."""
    return float(latency.measure([bundle], options)["bundles"][0]["p50_ms"])


def there(bundle: Bundle, address: str, options: latency.Options) -> float:
    """The same through the line."""
    return float(commands.bench([address], [bundle], options)["bundles"][0]["p50_ms"])


def measure(bundle: Bundle, address: str, rounds: int, seconds: float) -> dict[str, Any]:
    """The rounds, and the median of their ratios with the smallest and the largest."""
    options = latency.Options((1,), seconds=seconds, starts=1)
    found: list[dict[str, Any]] = []
    for _ in range(rounds):
        times = [ask(bundle, address, options) for ask in (here, there, there, here)]
        found.append({"here_ms": times[::3], "there_ms": times[1:3], "ratio": sum(times[1:3]) / sum(times[::3])})
        print(f"{found[-1]['ratio']:.4f}", file=sys.stderr, flush=True)
    ratios = [one["ratio"] for one in found]
    return {
        "machine": machine.describe(),
        "date": machine.date(),
        "bundle": bundle.name,
        "on": address.partition("?")[0],
        "rounds": found,
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--on", default="local://")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed calls")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    document = measure(bundles.load(options.bundle), options.on, options.rounds, options.seconds)
    if options.json:
        atomic_write(options.json, json.dumps(document, indent=1) + "\n")
    print(f"{document['ratio']:.4f} ({document['least']:.4f} to {document['most']:.4f}) of {options.rounds} rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
