"""The LiteRT backend: TFLite files on CPUs, by the XNNPACK delegate. For Android, Raspberry Pi and other ARM boards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert.interpreter import Interpreter

from edgetube import processes
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError
from edgetube.precision import Precision
from edgetube.runtimes.base import Backend, Interface, LayerOutputs, Logits, Tap
from edgetube.video import Frames

RUNS = ("litert",)
UNSEEN = "ARM kernels and their speed, delegates for GPUs and NPUs, heat"


class Session(Backend):
    """A TFLite file in one interpreter.

    Args:
        bundle: a bundle whose artifact is a TFLite file with one input and one output.
        threads: CPU threads of one call; None takes one for each core that the process may use.
        device: "cpu" (default), in any case; the only one.

    Raises:
        InputError: another device.
        BackendError: LiteRT refuses the file.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> None:
        super().__init__(bundle.contract, bundle.batch)
        if (device or "cpu").lower() != "cpu":
            raise InputError(f"no device is called {device!r} here; LiteRT runs these files on the cpu")
        self.path, self.threads = bundle.artifact_path, threads or processes.cores()
        self.interpreter = open_file(self.path, self.threads)
        self.inputs, self.outputs = self.interpreter.get_input_details(), self.interpreter.get_output_details()

    def interface(self) -> Interface:
        inputs, outputs = (
            tuple(tuple(map(int, value["shape"])) for value in values) for values in (self.inputs, self.outputs)
        )
        return Interface(inputs, outputs)

    def infer(self, clips: Frames) -> Logits:
        with _mapped("the interpreter failed"):
            return _run(self.interpreter, clips, [self.outputs[0]["index"]])[0]

    def describe(self) -> dict[str, Any]:
        return {
            "litert": metadata.version("ai-edge-litert"),
            "delegate": "XNNPACK" if partitions(self.interpreter) else "none",
            "threads": self.threads,
        }

    def layers(self, names: Sequence[str]) -> tuple[str, ...]:
        with _mapped(f"cannot read {self.path}"):
            made = {str(tensor["name"]) for tensor in open_file(self.path, 1).get_tensor_details()}
        return tuple(name for name in names if name in made)

    def tap(self, names: Sequence[str]) -> Tap:
        """Inner tensors become outputs of the graph, so that they are those of the delegate."""
        from edgetube.runtimes.litert.flatbuffer import with_outputs

        with _mapped(f"cannot open {self.path} with more outputs"):
            interpreter = open_file(with_outputs(self.path.read_bytes(), names), self.threads)
            indices = [tensor["index"] for tensor in interpreter.get_output_details()][-len(names) :]

        def show(clips: Frames) -> LayerOutputs:
            with _mapped("the interpreter failed"):
                return dict(zip(names, _run(interpreter, clips, indices), strict=True))

        return show

    def release_calls(self) -> None:
        del self.interpreter


def open_file(file: Path | bytes, threads: int) -> Interpreter:
    """An interpreter of a file or its content, ready to run.

    Raises:
        BackendError: LiteRT refuses it.
    """
    with _mapped(f"cannot open {file if isinstance(file, Path) else 'a file'}"):
        given = {"model_path": str(file)} if isinstance(file, Path) else {"model_content": file}
        interpreter = Interpreter(**given, num_threads=threads)
        interpreter.allocate_tensors()
    return interpreter


def partitions(interpreter: Interpreter) -> int:
    """Parts of the graph that a delegate runs."""
    return sum(operator["op_name"] == "DELEGATE" for operator in interpreter._get_ops_details())


def _run(interpreter: Interpreter, clips: npt.NDArray[Any], outputs: Sequence[int]) -> list[Logits]:
    (frames,) = interpreter.get_input_details()
    interpreter.set_tensor(frames["index"], clips)
    interpreter.invoke()
    return [np.array(interpreter.get_tensor(index), np.float32) for index in outputs]


def multiplies_integers() -> bool:
    """Whether a product of float32 rows by an int8 weight is computed in integers: one whose rows must round is run."""
    from edgetube.runtimes.litert.flatbuffer import hybrid_product

    rows = np.full((2, 64), 0.3, np.float32)
    rows[:, 0] = 127  # a step of its 8 bits is about 1/2, so that 0.3 cannot be exact
    weight = np.ones((8, 64), np.float32)
    interpreter = open_file(hybrid_product(rows, weight), 1)
    with _mapped("cannot multiply integers"):
        (found,) = _run(interpreter, rows, [interpreter.get_output_details()[0]["index"]])
    return bool((np.abs(found - rows @ weight.T) > 1).all())


def product(precision: Precision, size: int, threads: int | None) -> Callable[[], object] | None:
    """A call that multiplies two matrices (size, size) on the CPU, for `runtimes.products`; float32 and int8 only."""
    if precision not in (Precision.FP32, Precision.W8A8):
        return None
    from edgetube.runtimes.litert.flatbuffer import matrix_product

    interpreter = open_file(matrix_product(size, precision.quantises_activations), threads or processes.cores())
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    ones = np.ones((size, size), given["dtype"])
    return lambda: _run(interpreter, ones, [result["index"]])


@contextmanager
def _mapped(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # the types that LiteRT raises
        version = metadata.version("ai-edge-litert")
        raise BackendError(f"LiteRT {version}: {what}: {' '.join(str(error).split())}") from error
