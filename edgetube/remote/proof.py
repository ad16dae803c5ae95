"""The proof of a finished export on the device that it is for: `edgetube export --prove-on`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgetube import bundle as bundles
from edgetube import datasets
from edgetube.bench import parity
from edgetube.bundle import Bundle
from edgetube.errors import DeviceError, EdgetubeError, ParityError
from edgetube.progress import Progress, silent
from edgetube.remote.commands import Place, Reach, device_of

CLIPS = 63
"""Built-in clips of the proof: seven of each class of the built-in model."""


def prove(address: str, made: Sequence[Bundle], progress: Progress = silent) -> list[Bundle]:
    """Compare bundles on a device with PyTorch here, by the gates of `edgetube parity`; then their manifests say so.

    The status becomes `executed`, and `parity.device` has the device and what was measured there.

    Raises:
        DeviceError: the device cannot be reached, or has no runtime for a target.
        ParityError: a gate failed; that bundle and those after it stay as they were exported.
    """
    with device_of(address, made, progress) as device:
        return [_proven(Place(device), bundle, progress) for bundle in made]


def prove_chosen(reach: Reach, made: Sequence[Bundle], progress: Progress = silent) -> list[str]:
    """The same for bundles that a sweep chose by another rule: why some stay as they were exported.

    Args:
        reach: see `edgetube.remote.commands.reach`.
    """
    reasons: list[str] = []
    if not made:
        return reasons
    try:
        with reach(progress) as place:
            for bundle in made:
                try:
                    _proven(place, bundle, progress)
                except ParityError as error:
                    reasons.append(str(error))
    except EdgetubeError as error:
        reasons.append(f"{error}; the proof was not made there")
    return reasons


def _proven(place: Place, bundle: Bundle, progress: Progress) -> Bundle:
    device = place.device
    if (status := place.artifact(bundle).status) != "executed":
        raise DeviceError(f"{device.name}: {bundle.name} would be {status} there: its runtime is missing")
    source = datasets.built_in(CLIPS, bundle.labels)
    comparison = parity.measure([bundle], source, artifact=place.artifact, progress=progress)
    if failed := [str(verdict) for verdict in parity.DEFAULTS.judge(comparison) if not verdict.passed]:
        raise ParityError(f"{device.name}: {'; '.join(failed)}; the bundle stays {bundle.status}")
    (measured,) = comparison.measured
    there = {"name": device.name, "machine": device.facts["machine"]}
    record = parity.plain_json({**there, **measured.parity.to_json()})
    return bundles.seal(replace(bundle, status="executed", parity={**bundle.parity, "device": record}))
