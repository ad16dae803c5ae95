"""What a live stream costs beside the model: preprocessing and window of each frame, and two streams on two cores.

    python bench/studies/live.py BUNDLE [--size 480x640] [--fps 30] [--hop 8] [--seconds 10] [--json FILE]

The costs of frames and calls are processor time of one thread, so that other work on the machine changes them little.
How two streams share the cores is measured in time: it wants a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import edgetube
from edgetube.bench.camera import enlarge
from edgetube.bench.machine import describe, versions
from edgetube.files import atomic_write
from edgetube.live.frame import Frame
from edgetube.live.window import LiveClip, Window
from edgetube.resize import Frames


def frames_of(pictures: Frames, fps: float) -> Iterator[Frame]:
    """Frames of a camera for ever, as fast as they are taken."""
    number = 0
    while True:
        yield Frame(pictures[number % len(pictures)], number, number / fps, number / fps)
        number += 1


def cost_of_frames(
    rt: edgetube.Runtime, pictures: Frames, fps: float, hop: int, seconds: float
) -> tuple[float, float, list[LiveClip]]:
    """Milliseconds of processor time that a frame costs on average, that a prediction's frames cost, and some clips."""
    kept: list[LiveClip] = []
    window, clips = Window(rt.contract, hop), 0
    source = frames_of(pictures, fps)
    for _ in range(2 * len(pictures)):
        window.push(next(source))
    count, began = 0, time.thread_time()
    while time.thread_time() - began < seconds:
        clip = window.push(next(source))
        count += 1
        if clip is not None:
            clips += 1
            kept = [*kept[-3:], clip]
    spent = 1e3 * (time.thread_time() - began)
    return spent / count, spent / max(1, clips), kept


def processor_ms(call: Callable[[], object], times: int) -> float:
    """Median milliseconds of processor time of a call, all threads together."""
    call()
    spent = []
    for _ in range(times):
        began = time.process_time()
        call()
        spent.append(1e3 * (time.process_time() - began))
    return float(np.median(spent))


def rate(rt: edgetube.Runtime, pictures: Frames, fps: float, hop: int, streams: int, seconds: float) -> float:
    """Predictions per second of so many endless sources, as fast as the model answers."""
    done = threading.Event()

    def endless() -> Iterator[tuple[float, Frames]]:
        for frame in frames_of(pictures, fps):
            if done.is_set():
                return
            yield frame.seconds, frame.pixels

    counted: list[float] = []
    sources = {str(i): endless() for i in range(streams)}
    with edgetube.Cameras(rt, sources, hop=hop, on_prediction=lambda _: counted.append(time.monotonic())):
        time.sleep(seconds)
        done.set()
    begin = counted[0] + 0.1 * seconds
    inside = [at for at in counted if begin <= at <= begin + 0.8 * seconds]
    return len(inside) / (0.8 * seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--size", default="480x640", help="height and width of the frames")
    parser.add_argument("--fps", type=float, default=30.0)
    parser.add_argument("--hop", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3, help="of one stream and two, in turns")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    with edgetube.Runtime(options.bundle, threads=1) as rt:
        pictures = enlarge(rt.bundle.golden()[0][0], (height, width))
        frame_ms, clip_ms, clips = cost_of_frames(rt, pictures, options.fps, options.hop, options.seconds)
        copy_ms = processor_ms(clips[-1].frames.copy, 50)
        call_ms = processor_ms(lambda: rt(clips[-1].frames[None]), 7)
        found: dict[str, Any] = {
            "bundle": rt.bundle.name,
            "frame_ms": frame_ms,
            "frames_of_a_prediction_ms": clip_ms,
            "copy_of_a_clip_ms": copy_ms,
            "call_ms": call_ms,
            "share_of_call": clip_ms / call_ms,
            "machine": describe(),
            "versions": versions(),
        }
        if options.turns:
            arguments = rt, pictures, options.fps, options.hop
            turns = [[rate(*arguments, n, options.seconds) for n in (1, 2)] for _ in range(options.turns)]
            found["calls_at_once"] = rt.parallel_calls
            found["rates"] = turns
            found["two_to_one"] = float(np.median([two / one for one, two in turns]))
    text = json.dumps(found, indent=2)
    print(text)
    if options.json:
        atomic_write(options.json, text + "\n")


if __name__ == "__main__":
    main()
