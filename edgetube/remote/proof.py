"""The proof of a finished export on the device that it is for: `edgetube export --prove-on`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgetube import bundle as bundles
from edgetube import datasets
from edgetube.bench import parity
from edgetube.bundle import Bundle
from edgetube.errors import DeviceError, ParityError
from edgetube.progress import Progress, silent
from edgetube.remote.commands import Artifacts, device_of

CLIPS = 63
"""Built-in clips of the proof: seven of each class of the built-in model."""


def prove(address: str, made: Sequence[Bundle], progress: Progress = silent) -> list[Bundle]:
    """Compare bundles on a device with PyTorch here, by the gates of `edgetube parity`; then their manifests say so.

    The status becomes `executed`, and `parity.device` has the device and what was measured there.

    Raises:
        DeviceError: the device cannot be reached, or has no runtime for a target.
        ParityError: a gate failed; that bundle and those after it stay as they were exported.
    """
    proven = []
    with device_of(address, made, progress) as device:
        artifact = Artifacts(device)
        for bundle in made:
            if (status := artifact(bundle).status) != "executed":
                raise DeviceError(f"{device.name}: {bundle.name} would be {status} there: its runtime is missing")
            source = datasets.built_in(CLIPS, bundle.labels)
            comparison = parity.measure([bundle], source, artifact=artifact, progress=progress)
            if failed := [str(verdict) for verdict in parity.DEFAULTS.judge(comparison) if not verdict.passed]:
                raise ParityError(f"{device.name}: {'; '.join(failed)}; the bundle stays {bundle.status}")
            (measured,) = comparison.measured
            there = {"name": device.name, "machine": device.facts["machine"]}
            record = parity.plain_json({**there, **measured.parity.to_json()})
            found = replace(bundle, status="executed", parity={**bundle.parity, "device": record})
            proven.append(bundles.seal(found))
    return proven
