"""The program that Triton's Python backend runs; a copy of it is beside the bundle in the model repository.

Triton imports it in a Python of its own, which needs edgetube and the packages of the bundle's runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from edgetube.runtime import Runtime


class TritonPythonModel:
    """A bundle. Requests that Triton has put together are answered by one call.

    Tensors come and go as DLPack: Triton's own conversions know the layout of NumPy 1, and with NumPy 2 some versions
    (2.51 of the server) send empty tensors without an error.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle, which is in the folder of this file.

        Raises:
            EdgetubeError: the bundle is damaged, or does not run here; Triton shows the text.
        """
        self.server: Any = import_module("triton_python_backend_utils")
        self.runtime = Runtime(Path(__file__).parent / "bundle")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Logits (B, classes) float32 of the frames (B, T, H, W, 3) uint8 of each request."""
        clips = [np.from_dlpack(self.server.get_input_tensor_by_name(request, "frames")) for request in requests]
        logits = self.runtime(np.concatenate(clips))
        ends = np.cumsum([len(each) for each in clips])[:-1]
        return [
            self.server.InferenceResponse([self.server.Tensor.from_dlpack("logits", np.array(answers, order="C"))])
            for answers in np.split(logits, ends)
        ]

    def finalize(self) -> None:
        """Close the bundle."""
        self.runtime.close()
