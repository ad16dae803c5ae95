"""What the camera did, estimated from the frames alone: least squares on image gradients, nothing of the renderer."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from edgetube.demo.moves import TRAVEL


def smooth(grey: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Binomial blur of (T, H, W), so that moves of a few pixels are still within reach of a gradient."""
    for _ in range(6):
        for axis in (1, 2):
            grey = (np.roll(grey, 1, axis) + 2 * grey + np.roll(grey, -1, axis)) / 4
    return grey[:, 6:-6, 6:-6]


def travel(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Camera travel (x, y, zoom, roll) over frames (T, H, W, 3): the sum of what each pair of neighbours shows.

    The brightness of a point that moves does not change: I_t = -(I_x u + I_y v), with the flow (u, v) of a shift,
    a zoom and a roll about the middle; a fifth unknown takes up changes of exposure.
    """
    height, width = frames.shape[1:3]
    grey = smooth(frames.astype(np.float64).mean(axis=-1))
    y, x = np.mgrid[: grey.shape[1], : grey.shape[2]]
    y, x = y - (grey.shape[1] - 1) / 2, x - (grey.shape[2] - 1) / 2
    total = np.zeros(4)
    for before, after in itertools.pairwise(grey):
        middle = (before + after) / 2
        iy, ix = np.gradient(middle)
        flows = [-ix * width, -iy * height, ix * x + iy * y, ix * y - iy * x, -middle]
        system = np.stack([flow.ravel() for flow in flows], axis=1)
        total += np.linalg.lstsq(system, (before - after).ravel(), rcond=None)[0][:4]
    return total


def label(frames: npt.NDArray[np.uint8]) -> str:
    """The class that `travel` amounts to: its largest component against the smallest travel that has a label."""
    seen = travel(frames) / [low for low, _ in TRAVEL]
    axis = int(np.abs(seen).argmax())
    if abs(seen[axis]) < 0.5:
        return "static"
    return (("pan-left", "pan-right"), ("tilt-up", "tilt-down"), ("zoom-out", "zoom-in"), ("roll-ccw", "roll-cw"))[
        axis
    ][int(seen[axis] > 0)]
