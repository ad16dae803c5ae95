"""A reference evaluator of ML programs: runs a saved `.mlpackage` on any machine, slowly.

It reads the files on disk (`edgetube.mlpackage`: protobuf and weight file, no vendor code) and computes every operation
in numpy. float16 operations are computed in float32 and rounded to float16 once; the hardware is documented to
accumulate like that, but sums in another order, so the results are labelled `emulated`. An overflow of float16 is an
error that names the operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import mlpackage
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, BundleError, InputError, ParityError
from edgetube.mlpackage import Function, Operation, Package, Ref, TensorType
from edgetube.runtimes.base import Backend, Interface, LayerOutputs, Logits, Tap
from edgetube.targets import Status
from edgetube.video import Frames

Array = npt.NDArray[Any]
Inputs = Mapping[str, Any]

DTYPES = {"fp16": np.float32, "fp32": np.float32, "int8": np.int8, "uint8": np.uint8, "int32": np.int32}
"""numpy types that hold a program's types: float16 is held in float32 arrays, which BLAS multiplies."""


class Session(Backend):
    """A saved ML program, evaluated operation by operation.

    Args:
        bundle: a bundle whose artifact is a `.mlpackage`; of several functions, the one that takes its clips runs.
        threads, device: ignored; numpy uses its own threads on the CPU.

    Raises:
        BundleError: the package cannot be read, or has an operation that is not known here.
    """

    thread_safe = True
    status: Status = "emulated"

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> None:
        if device is not None:
            raise InputError(f"the evaluator has no device {device!r}; leave it out")
        super().__init__(bundle.contract, bundle.batch)
        self.package = mlpackage.load(bundle.artifact_path)
        shape = (bundle.batch, *bundle.contract.shape)
        self.program = Program(self.package, function_for(self.package, shape))

    def infer(self, clips: Frames) -> Logits:
        (name,) = self.program.function.inputs
        answers = self.program({name: clips})
        (output,) = (answers[key] for key in ("logits", "tokens") if key in answers)
        return np.asarray(output, np.float32)

    def interface(self) -> Interface:
        return interface_of(self.program.function)

    def layers(self, names: Sequence[str]) -> tuple[str, ...]:
        made = {name for operation in self.program.steps for name, _ in operation.outputs}
        return tuple(name for name in names if mlpackage.label(name) in made)

    def tap(self, names: Sequence[str]) -> Tap:
        """Tokens, (B, D, 1, N) in the program, are returned as (B, N, D)."""
        (given,) = self.program.function.inputs
        wanted = {mlpackage.label(name): name for name in names}

        def show(clips: Frames) -> LayerOutputs:
            values = self.program({given: clips}, keep=wanted)
            return {wanted[name]: _as_rows(_float(values[name])) for name in wanted}

        return show

    def describe(self) -> dict[str, Any]:
        return {
            "evaluator": f"numpy {np.__version__}",
            "function": self.program.name,
            "specification": self.package.version,
            "operations": len(self.program.steps),
        }

    def release(self) -> None:
        del self.program


def function_for(package: Package, shape: tuple[int, ...]) -> str:
    """The function whose input has a shape.

    Raises:
        BundleError: there is none.
    """
    shapes = {name: [t.shape for t in f.inputs.values()] for name, f in package.functions.items()}
    found = [name for name, inputs in shapes.items() if inputs == [shape]]
    if not found:
        raise BundleError(f"{package.path} has no function for an input of {shape}; it has {shapes}: export it again")
    return package.default if package.default in found else found[0]


def interface_of(function: mlpackage.Function) -> Interface:
    """The shapes of a function's input and of its logits; its other output is the label of the best class."""
    types = {name: kind for operation in function.operations for name, kind in operation.outputs}
    answers = [types[name].shape for name in ("logits", "tokens") if name in function.outputs and name in types]
    return Interface(tuple(kind.shape for kind in function.inputs.values()), tuple(answers))


class Program:
    """One function of a package, with its constants computed.

    Args:
        package: a package that was read.
        name: of the function; the default one when left out.

    Raises:
        BundleError: an operation that is not known here, named.
    """

    def __init__(self, package: Package, name: str | None = None) -> None:
        self.name = name or package.default
        self.function: Function = package.functions[self.name]
        kinds = {operation.kind for operation in self.function.operations}
        if unknown := sorted(kinds - set(OPERATIONS) - {"const"}):
            raise BundleError(
                f"{package.path} has the operation {', '.join(unknown)}, which this edgetube cannot evaluate"
            )
        self.constants: dict[str, Any] = {}
        self.steps: list[Operation] = []
        for operation in self.function.operations:
            if operation.kind == "const" or operation.kind.startswith("constexpr_"):
                self.constants.update(self.evaluate(operation, self.constants))
            else:
                self.steps.append(operation)
        self.last = self._last_uses()

    def _last_uses(self) -> dict[str, int]:
        """Value -> the last step that uses it."""
        last: dict[str, int] = {}
        for step, operation in enumerate(self.steps):
            last.update((ref.name, step) for refs in operation.inputs.values() for ref in refs if isinstance(ref, Ref))
        return {name: step for name, step in last.items() if name not in self.function.outputs}

    def __call__(self, inputs: Mapping[str, Array], keep: Collection[str] = ()) -> dict[str, Any]:
        """The function's outputs by name, and the values called `keep`.

        Raises:
            ParityError: a float16 operation overflowed; names it and the remedy.
        """
        values: dict[str, Any] = {}
        for name, kind in self.function.inputs.items():
            if inputs[name].shape != kind.shape:
                raise InputError(f"{name} is {inputs[name].shape}; the program takes {kind.shape}")
            values[name] = inputs[name]  # pixels: whole numbers up to 255 are exact in every type
        for step, operation in enumerate(self.steps):
            made = self.evaluate(operation, values)
            values.update(made)
            for name in {ref.name for refs in operation.inputs.values() for ref in refs if isinstance(ref, Ref)}:
                if self.last.get(name) == step and name not in keep:
                    values.pop(name, None)
        return {name: values[name] for name in (*self.function.outputs, *keep)}

    def evaluate(self, operation: Operation, values: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs of one operation, rounded to their types."""
        arguments = {key: self._argument(key, value, values) for key, value in operation.inputs.items()}
        if operation.kind == "const":
            return {operation.outputs[0][0]: arguments["val"]}
        try:
            result = OPERATIONS[operation.kind](arguments)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            name = operation.outputs[0][0]
            raise BackendError(f"{operation.kind} {name} cannot be evaluated: {error}; export it again") from error
        results = result if isinstance(result, tuple) else (result,)
        return {
            name: self._settle(operation, name, kind, value)
            for (name, kind), value in zip(operation.outputs, results, strict=True)
        }

    def _argument(self, key: str, items: tuple[Any, ...], values: Mapping[str, Any]) -> Any:
        found = [
            (values[item.name] if item.name in values else self.constants[item.name]) if isinstance(item, Ref) else item
            for item in items
        ]
        found = [item.astype(np.float32) if _is_half(item) else item for item in found]
        return found if key == "values" else found[0]

    def _settle(self, operation: Operation, name: str, kind: TensorType, value: Any) -> Any:
        if kind.dtype in ("string", "dictionary", "list"):
            return value
        if value.shape != kind.shape:
            raise BackendError(f"{operation.kind} {name} is {value.shape}; the program says {kind.shape}")
        if kind.dtype != "fp16" or operation.kind in MOVES:
            return value
        rounded = round_to_fp16(value)
        if not np.isfinite(rounded).all():
            raise ParityError(
                f"{operation.kind} {name} overflows float16 (its largest number is {np.abs(value).max():.3g}); "
                f"keep it in float32 with --set fp32={name.replace('_', '?')}"
            )
        return rounded


def _is_half(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float16


def round_to_fp16(x: Array) -> Array:
    """Numbers rounded to the nearest float16, ties to even; held in float32.

    The same as a cast there and back, ten times as fast: a float32 loses 13 bits of its mantissa. Below the normal
    range of float16 the steps are 2^-24, which is the step of float32 between 0.5 and 1.
    """
    x = np.ascontiguousarray(x, np.float32)
    rounded = np.empty_like(x)
    flat, out = x.reshape(-1), rounded.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        out[start : start + CHUNK] = _round(flat[start : start + CHUNK])
    return rounded


CHUNK = 1 << 15
"""Numbers that are rounded at a time: they fit in a core's cache."""

HALF_MAX, HALF_TINY = np.float32(65504), np.float32(2.0**-14)


def _round(x: Array) -> Array:
    bits = x.view(np.uint32)
    rounded = ((bits + (((bits >> 13) & 1) + np.uint32(0xFFF))) & np.uint32(0xFFFFE000)).view(np.float32)
    size = np.abs(x)
    if not size.max() <= HALF_MAX:  # too large, or not a number
        return _slow_half(x)
    small = size < HALF_TINY
    if small.any():
        rounded = np.where(small, (x + np.float32(0.75)) - np.float32(0.75), rounded)
    return rounded


def _slow_half(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def _as_rows(x: Array) -> Array:
    """(B, D, 1, N) as (B, N, D); any other shape as it is."""
    return x[:, :, 0].swapaxes(1, 2) if x.ndim == 4 and x.shape[2] == 1 else x


def _float(x: Array) -> Array:
    return x.astype(np.float32, copy=False)


# operations: arguments by name -> value, or a tuple of values


def _reshape(a: Inputs) -> Array:
    return np.reshape(a["x"], [int(n) for n in a["shape"]])


def _slice(a: Inputs) -> Array:
    """Only explicit positive ranges: masks and negative indices are refused."""
    if extra := sorted(set(a) - {"x", "begin", "end", "stride"}):
        raise ValueError(f"{', '.join(extra)} is not evaluated")
    ranges = zip(a["begin"], a["end"], a.get("stride", [1] * len(a["begin"])), strict=True)
    return a["x"][tuple(slice(int(b), int(e), int(s)) for b, e, s in ranges)]


def _split(a: Inputs) -> tuple[Array, ...]:
    """Into equal parts, or parts of `split_sizes`."""
    parts = np.cumsum([int(n) for n in a["split_sizes"]])[:-1] if "split_sizes" in a else int(a["num_splits"])
    return tuple(np.split(a["x"], parts, int(a["axis"])))


def _cast(a: Inputs) -> Array:
    """To integers as C does, towards zero."""
    dtype = DTYPES[str(a["dtype"])]
    return a["x"].astype(dtype)


def _linear(a: Inputs) -> Array:
    """x (..., K) times weight (N, K) transposed, plus bias (N,)."""
    x, weight = _float(a["x"]), _float(a["weight"])
    y = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], len(weight))
    return y + _float(a["bias"]) if "bias" in a else y


def _matmul(a: Inputs) -> Array:
    x, y = _float(a["x"]), _float(a["y"])
    if a.get("transpose_x", False):
        x = x.swapaxes(-1, -2)
    if a.get("transpose_y", False):
        y = y.swapaxes(-1, -2)
    return np.matmul(x, y)


def _einsum(a: Inputs) -> Array:
    """The one equation that ML programs have: the last axis of one by the third last of the other."""
    if str(a["equation"]) != "nchw,nwhu->nchu":
        raise ValueError(f"the equation {a['equation']} is not evaluated")
    x, y = (_float(value) for value in a["values"])
    return np.matmul(x.transpose(0, 2, 1, 3), y.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def _conv(a: Inputs) -> Array:
    """x (B, C, H, W), weight (O, C, kh, kw), without padding: one matrix product over the windows."""
    if str(a.get("pad_type", "valid")) != "valid" or int(a.get("groups", 1)) != 1:
        raise ValueError("padding and groups are not evaluated")
    if any(int(d) != 1 for d in a.get("dilations", [1])):
        raise ValueError("dilations are not evaluated")
    x, weight = _float(a["x"]), _float(a["weight"])
    sh, sw = (int(s) for s in a.get("strides", (1, 1)))
    out, _, kh, kw = weight.shape
    if (kh, kw, sh, sw) == (1, 1, 1, 1):
        y = np.matmul(weight.reshape(out, -1), x.reshape(*x.shape[:2], -1)).reshape(-1, out, *x.shape[2:])
    else:
        windows = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(2, 3))[:, :, ::sh, ::sw]
        rows = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, weight[0].size)
        y = (rows @ weight.reshape(out, -1).T).reshape(len(x), *windows.shape[2:4], out).transpose(0, 3, 1, 2)
    return y + _float(a["bias"])[:, None, None] if "bias" in a else y


def _layer_norm(a: Inputs) -> Array:
    """Mean and variance in float64's stead in float32, as a library with wide accumulators has them."""
    x = _float(a["x"])
    axes = tuple(int(i) % x.ndim for i in np.atleast_1d(a["axes"]))
    mean = x.mean(axis=axes, keepdims=True)
    centred = x - mean
    variance = np.square(centred).mean(axis=axes, keepdims=True)
    y = centred / np.sqrt(variance + np.float32(a.get("epsilon", 1e-5)))
    shape = [n if i in axes else 1 for i, n in enumerate(x.shape)]
    if "gamma" in a:
        y *= _float(a["gamma"]).reshape(shape)
    if "beta" in a:
        y += _float(a["beta"]).reshape(shape)
    return y


def _softmax(a: Inputs) -> Array:
    x, axis = _float(a["x"]), int(a.get("axis", -1))
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _gelu(a: Inputs) -> Array:
    mode, x = str(a.get("mode", "EXACT")), _float(a["x"])
    if mode == "TANH_APPROXIMATION":
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
        return np.float32(0.5) * x * (1 + np.tanh(inner))
    if mode != "EXACT":
        raise ValueError(f"mode {mode} is not evaluated")
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(x).astype(np.float16)
    if (narrow == x).all():  # float16 has 65536 numbers: all of their answers are in a table
        return gelu_of_half()[narrow.view(np.uint16)]
    return _exact_gelu(x)


def _exact_gelu(x: Array) -> Array:
    erf = np.frompyfunc(lambda v: 1 + math.erf(v / math.sqrt(2)), 1, 1)
    return (0.5 * x.astype(np.float64) * erf(x.astype(np.float64)).astype(np.float64)).astype(np.float32)


@cache
def gelu_of_half() -> Array:
    """x (1 + erf(x / sqrt 2)) / 2 of every float16, by its bits; not a number for what is not one."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    table = np.full(1 << 16, np.nan, np.float32)
    finite = np.isfinite(numbers)
    table[finite] = _exact_gelu(numbers[finite])
    return table


def _sigmoid(a: Inputs) -> Array:
    with np.errstate(over="ignore"):
        y: Array = 1 / (1 + np.exp(-_float(a["x"])))
    return y


def _reduce(function: Callable[..., Array], a: Inputs) -> Array:
    """Integers in their own type, all else in float32."""
    axes = tuple(int(i) for i in np.atleast_1d(a["axes"]))
    return function(_number(a["x"]), axis=axes, keepdims=bool(a.get("keep_dims", False)))


def _sum(x: Array, **options: Any) -> Array:
    """In the type of x; numpy would sum int32 in int64."""
    return np.sum(x, dtype=x.dtype, **options)


def _binary(function: Callable[[Array, Array], Array], a: Inputs) -> Array:
    """Integers in their own type, all else in float32."""
    return function(_number(a["x"]), _number(a["y"]))


def _number(x: Any) -> Array:
    x = np.asarray(x)
    return x if x.dtype == np.int32 else _float(x)


def _log(a: Inputs) -> Array:
    return np.log(_float(a["x"]) + np.float32(a.get("epsilon", 1e-45)))


def _logical(function: Callable[[Array, Array], Array], a: Inputs) -> Array:
    return function(np.asarray(a["x"], np.bool_), np.asarray(a["y"], np.bool_))


def _classify(a: Inputs) -> tuple[str, dict[str, float]]:
    labels = [str(label) for label in a["classes"]]
    scores = [float(score) for score in np.reshape(a["probabilities"], -1)]
    best = max(range(len(scores)), key=scores.__getitem__)
    return labels[best], dict(zip(labels, scores, strict=True))


def _along(values: Any, data: Array, axis: Any) -> Array:
    """A scalar, or a vector that lies along one axis of `data`."""
    values = np.asarray(values, np.float32)
    if values.ndim == 0:
        return values
    shape = [1] * data.ndim
    shape[int(axis)] = -1
    return values.reshape(shape)


def _quantize(a: Inputs) -> Array:
    """clip(round(x / scale) + zero point); halves round to even."""
    x, dtype = _float(a["input"]), DTYPES[str(a["output_dtype"])]
    axis = a.get("axis", 0)
    q = np.rint(x / _along(a["scale"], x, axis)) + _along(a.get("zero_point", 0), x, axis)
    limits = np.iinfo(dtype)  # type: ignore[type-var]
    return np.clip(q, limits.min, limits.max).astype(dtype)


def _dequantize(a: Inputs) -> Array:
    """scale (x - zero point)."""
    x = a["input"]
    axis = a.get("axis", 0)
    return (_float(x) - _along(a.get("zero_point", 0), x, axis)) * _along(a["scale"], x, axis)


def _affine_dequantize(a: Inputs) -> Array:
    return _dequantize({**a, "input": a["quantized_data"]})


def _shift_scale(a: Inputs) -> Array:
    """scale (data - offset), scales and offsets repeated over the blocks of each axis."""
    data = _float(a["data"])
    scale = _spread(_float(a["scale"]), data.shape)
    return (data - _spread(_float(a["offset"]), data.shape) if "offset" in a else data) * scale


def _spread(blocks: Array, shape: Sequence[int]) -> Array:
    for axis, size in enumerate(shape):
        blocks = np.repeat(blocks, size // blocks.shape[axis], axis)
    return blocks


def _lut_to_dense(a: Inputs) -> Array:
    """A palette: one for the tensor with packed indices (iOS 16), or one a block of each axis (iOS 18)."""
    lut, indices = _float(a["lut"]), a["indices"]
    if "shape" in a:
        shape = [int(n) for n in a["shape"]]
        bits = int(math.log2(len(lut)))
        return lut[mlpackage.unpack(indices, bits, math.prod(shape))].reshape(shape)
    if lut.shape[-1] != 1:
        raise ValueError("palettes of vectors are not evaluated")
    blocks = np.indices(indices.shape, sparse=True)
    where = [i // (size // count) for i, size, count in zip(blocks, indices.shape, lut.shape, strict=False)]
    index = (*where, indices, 0)
    return lut[index]


def _transpose(a: Inputs) -> Array:
    return np.transpose(a["x"], [int(i) for i in a["perm"]])


def _expand(a: Inputs) -> Array:
    return np.expand_dims(a["x"], tuple(int(i) for i in np.atleast_1d(a["axes"])))


def _squeeze(a: Inputs) -> Array:
    return np.squeeze(a["x"], tuple(int(i) for i in np.atleast_1d(a["axes"])))


def _gather(a: Inputs) -> Array:
    return np.take(a["x"], a["indices"], axis=int(a.get("axis", 0)))


def _concat(a: Inputs) -> Array:
    return np.concatenate(a["values"], axis=int(a["axis"]))


MOVES: dict[str, Callable[[Inputs], Any]] = {
    "concat": _concat,
    "expand_dims": _expand,
    "gather": _gather,
    "reshape": _reshape,
    "select": lambda a: np.where(a["cond"], a["a"], a["b"]),
    "slice_by_index": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
"""Operations that only move data: their outputs need no rounding."""

OPERATIONS: dict[str, Callable[[Inputs], Any]] = {
    **MOVES,
    "add": partial(_binary, np.add),
    "cast": _cast,
    "classify": _classify,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_lut_to_dense": _lut_to_dense,
    "conv": _conv,
    "dequantize": _dequantize,
    "einsum": _einsum,
    "equal": partial(_binary, np.equal),
    "gelu": _gelu,
    "greater": partial(_binary, np.greater),
    "layer_norm": _layer_norm,
    "less": partial(_binary, np.less),
    "linear": _linear,
    "log": _log,
    "logical_and": partial(_logical, np.logical_and),
    "logical_or": partial(_logical, np.logical_or),
    "matmul": _matmul,
    "mul": partial(_binary, np.multiply),
    "quantize": _quantize,
    "real_div": lambda a: _float(a["x"]) / _float(a["y"]),
    "reduce_max": partial(_reduce, np.max),
    "reduce_mean": partial(_reduce, np.mean),
    "reduce_min": partial(_reduce, np.min),
    "reduce_sum": partial(_reduce, _sum),
    "sigmoid": _sigmoid,
    "silu": lambda a: _float(a["x"]) * _sigmoid(a),
    "softmax": _softmax,
    "sub": partial(_binary, np.subtract),
}
