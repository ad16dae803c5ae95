"""edgetube: export a trained sparse-tube video transformer to a device, with measured proof that it answers the same.

>>> import edgetube
>>> bundle = edgetube.export_model("onnx-fp32")          # checkpoint -> bundle, proven   (needs edgetube[export])
>>> rt = edgetube.Runtime(bundle.path)                   # bundle -> predictions          (needs nothing more)
>>> rt.predict("clip.mp4").label
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgetube.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    EdgetubeError,
    InputError,
    InputWarning,
    MissingPackageError,
    ParityError,
    SpecError,
)

if TYPE_CHECKING:
    from edgetube.contract import InputContract
    from edgetube.export.pipeline import export_model
    from edgetube.live.cameras import Cameras
    from edgetube.live.source import FrameSource
    from edgetube.live.window import Window
    from edgetube.runtime import Runtime
    from edgetube.spec import ModelSpec, Prediction, TubeSpec

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BundleError",
    "Cameras",
    "CheckpointError",
    "EdgetubeError",
    "FrameSource",
    "InputContract",
    "InputError",
    "InputWarning",
    "MissingPackageError",
    "ModelSpec",
    "ParityError",
    "Prediction",
    "Runtime",
    "SpecError",
    "TubeSpec",
    "Window",
    "__version__",
    "export_model",
]

_LAZY = {
    "Runtime": "edgetube.runtime",
    "Cameras": "edgetube.live.cameras",
    "FrameSource": "edgetube.live.source",
    "InputContract": "edgetube.contract",
    "ModelSpec": "edgetube.spec",
    "Prediction": "edgetube.spec",
    "TubeSpec": "edgetube.spec",
    "Window": "edgetube.live.window",
    "export_model": "edgetube.export.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that a camera app never loads torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'edgetube' has no attribute {name!r}")
    from edgetube.targets import need

    value = getattr(need(_LAZY[name], "export"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
