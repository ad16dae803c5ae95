"""Products of the largest bytes with int8 weights in every runtime that is here, against exact integers.

    python tests/runtimes/overflow.py                  # also under qemu-x86_64-static -cpu Haswell

Prints a JSON object: runtime -> whether weights that fill int8 (`free`), and those that edgetube writes (`safe`), are
multiplied exactly, and what the runtime's own probe says (`saturates`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube.calibration import numeric

SIZE = 128
Weights = npt.NDArray[np.int8]
Product = Callable[[npt.NDArray[np.uint8], Weights], npt.NDArray[Any]]


def weights(safe: bool) -> Weights:
    """(SIZE, SIZE) int8: columns of the largest, of the smallest, of alternating, and of random numbers."""
    rng = np.random.default_rng(0)
    exact = np.clip(rng.normal(0, 80, (SIZE, SIZE)), -127, 127)
    exact[:, :8], exact[:, 8:16] = 127, -127
    exact[:, 16:24] = np.where(np.arange(SIZE) % 2, 127, -127)[:, None]
    exact[:, 24:32] = np.where(np.arange(SIZE) % 2, 120, 20)[:, None]
    rows = rng.standard_normal((300, SIZE)).astype(np.float32)
    return numeric.gptq_quantize(exact.astype(np.float32), np.ones(SIZE, np.float32), rows.T @ rows, safe)


def onnxruntime(frames: npt.NDArray[np.uint8], weight: Weights) -> npt.NDArray[Any]:
    from edgetube.runtimes import onnxruntime as backend

    session = backend._open(
        backend._integers(weight), backend.session_options(1), backend.PROVIDERS["cpu"], "cannot multiply"
    )
    return np.asarray(session.run(None, {"a": frames})[0])


def openvino(frames: npt.NDArray[np.uint8], weight: Weights) -> npt.NDArray[Any]:
    from edgetube.runtimes import openvino as backend

    compiled = backend.compile_model(backend._integers(SIZE, weight), ["f32"], threads=1)
    return np.array(compiled([frames.astype(np.float32)])[0])


def is_exact(multiply: Product, weight: Weights) -> bool:
    """Of the largest frames, and of random ones."""
    rng = np.random.default_rng(1)
    clips = np.full((SIZE, SIZE), 255, np.uint8), rng.integers(0, 256, (SIZE, SIZE), np.uint8)
    return all(np.array_equal(multiply(x, weight), x.astype(np.int64) @ weight.astype(np.int64)) for x in clips)


def main() -> None:
    from edgetube.runtimes import onnxruntime as ort
    from edgetube.targets import installed

    found = {"onnxruntime": {"saturates": ort._saturates(""), "exact_form": not ort._saturates(ort.EXACT)}}
    runtimes: dict[str, Product] = {"onnxruntime": onnxruntime}
    if installed("openvino"):
        from edgetube.runtimes import openvino as vino

        found["openvino"], runtimes["openvino"] = {"saturates": vino._saturates()}, openvino
    for name, multiply in runtimes.items():
        found[name] |= {kind: is_exact(multiply, weights(kind == "safe")) for kind in ("free", "safe")}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
