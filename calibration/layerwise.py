"""From a float graph and clips to an equalised, bias-corrected float graph and its table.

The graph is walked stage by stage (tokenizer, blocks, classifier), once in floating point to choose equalisations,
ranges and weight scales, once with quantisation in place to correct biases. Between stages only the tensors that
cross are kept, in files, so memory does not grow with the number of clips.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from edgetube.calibration import equalize, graphs, numeric, observers
from edgetube.calibration.clips import Clips
from edgetube.calibration.equalize import Channels, Equalisation, Half, Halves
from edgetube.calibration.graphs import Linear, Open, Stage
from edgetube.calibration.numeric import GramMatrix
from edgetube.calibration.observers import Histogram
from edgetube.calibration.table import FLOAT32_SCALES, Activations, IntegerFormat, Range, digits, stored_scales
from edgetube.errors import InputError
from edgetube.progress import Progress, silent, track
from edgetube.rows import Rows, Spool
from edgetube.video import Frames

Array = npt.NDArray[np.float32]

ROWS, ROW_VALUES = (512, 2048), 1_500_000
"""Fewest and most rows that are sampled of an activation to measure output errors on, and values in between."""

GROUPS = 8
"""Groups of neighbouring clips, which are often of one scene, that a set is cut into to judge one half by the other."""

PIXELS = Range(0.0, 255.0, "min-max")

CORRECTION_CLIPS = 32
"""Clips that biases are corrected on: their means settle long before ranges do."""

FOLD_TOLERANCE = 1e-3
"""Largest change of a stage's output by folding, relative to its largest value; float32 rounding stays below 1e-5."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for one linear, with how much its output suffers.

    Attributes:
        range: of its activation.
        scales: of its weight's columns (N,).
        equalisation: name of the equalisation folded in before it.
        error: relative output error as chosen, on sampled rows of the statistics clips.
        plain_error: the same without calibration: no equalisation, min-max, weights rounded to the nearest.
        errors: relative output error of each observer, on the rows of `error`.
    """

    range: Range
    scales: Array
    equalisation: str
    error: float
    plain_error: float
    errors: Mapping[str, float]


@dataclass
class State:
    """What is known so far; everything that a stage decides.

    Attributes:
        values: initializers that differ from the graph's own, before any bias correction.
        choices: by linear.
        integers: rounded weights by initializer (K, N).
        means: mean of each linear's activation on the correction clips (K,), in floating point.
        biases: corrected biases by initializer.
    """

    values: dict[str, Array] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    integers: dict[str, npt.NDArray[np.int8]] = field(default_factory=dict)
    means: dict[str, Array] = field(default_factory=dict)
    biases: dict[str, Array] = field(default_factory=dict)


class StaleStateError(Exception):
    """Kept stages that do not compute what the model computes; they have to be chosen again."""


class Sample:
    """What is kept of one activation while clips pass: extremes and means of its channels, and sampled rows.

    The rows are drawn by the tensor's name and the clip's number, so that every walk draws the same ones.

    Args:
        whole: also keep a histogram of all values, and the Gram matrix of all rows.

    Attributes:
        histogram, gram: of every token of every clip; None without `whole`.
    """

    def __init__(self, name: str, clips: int, whole: bool = False) -> None:
        self.name, self.seed, self.clips = name, zlib.crc32(name.encode()), clips
        self.whole = whole
        self.histogram = Histogram() if whole else None
        self.gram: GramMatrix | None = None
        self.means: npt.NDArray[np.float64] = np.empty((clips, 0))
        self._channels: list[Channels] = []
        self._rows: list[Array] = []

    def add(self, index: int, values: Array) -> None:
        """Take in the activation (1, ..., K) of clip number `index`.

        Raises:
            InputError: a value is NaN or infinite.
        """
        rows = values.reshape(-1, values.shape[-1])
        channels = Channels(rows.min(axis=0), rows.max(axis=0))
        if not (np.isfinite(channels.low).all() and np.isfinite(channels.high).all()):
            raise InputError(
                f"the model gives NaN or infinite values in {self.name} on calibration clip {index}; check weights "
                "and clips"
            )
        if not self._channels:
            self.means = np.empty((self.clips, rows.shape[1]))
            self.gram = GramMatrix(rows.shape[1]) if self.whole else None
        self._channels.append(channels)
        self.means[index] = rows.mean(axis=0, dtype=np.float64)
        wanted = min(max(ROW_VALUES // rows.shape[1], ROWS[0]), ROWS[1])
        count = min(len(rows), -(-wanted // self.clips))
        drawn = np.random.default_rng([self.seed, index]).choice(len(rows), count, replace=False)
        self._rows.append(rows[np.sort(drawn)])
        if self.histogram is not None:
            self.histogram.add(rows)
        if self.gram is not None:
            self.gram.add(rows)

    @property
    def rows(self) -> Array:
        """The sampled rows (R, K)."""
        return np.concatenate(self._rows)

    @property
    def channels(self) -> Channels:
        """Over all clips."""
        return Channels.of(self._channels)

    @property
    def halves(self) -> Halves:
        """What two halves of the clips know, each of neighbours in groups; of a single clip both know the same."""
        group = max(1, -(-len(self._rows) // GROUPS))
        first = [i for i in range(len(self._rows)) if i // group % 2 == 0]
        second = [i for i in range(len(self._rows)) if i // group % 2] or first
        one, other = (
            Half(Channels.of(self._channels[i] for i in some), np.concatenate([self._rows[i] for i in some]))
            for some in (first, second)
        )
        return one, other


class Walk:
    """One graph, one set of clips, one scheme.

    Args:
        model: canonical graph with batch 1.
        open_graph: opens any graph for running.
        activations: the scheme to choose ranges under.
        form: how the target stores integers; scales are rounded to its type before weights are.
        held_out: clips (N, T, H, W, 3) that nothing is chosen from, to measure errors on.

    Attributes:
        held_out_errors: by linear, the relative output error as chosen on those clips; empty when there are none.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        clips: Clips,
        open_graph: Open,
        activations: Activations,
        workspace: Path,
        progress: Progress = silent,
        held_out: Sequence[Frames] = (),
        form: IntegerFormat = FLOAT32_SCALES,
    ) -> None:
        self.form = form
        self.held_out, self.held_out_errors = held_out, dict[str, float]()
        self.model, self.clips, self.open, self.activations = model, clips, open_graph, activations
        self.workspace, self.progress = workspace, progress
        self.stages = graphs.stages(model)
        self.linears = graphs.linears(model)
        self.places = graphs.places(model)
        self.initial = {k: np.asarray(v) for k, v in graphs.weights(model).items()}
        self.input = model.graph.input[0].name
        step = max(1, len(clips) // CORRECTION_CLIPS)
        self.correction = range(0, len(clips), step)[:CORRECTION_CLIPS]

    # ------------------------------------------------------------------------------------------------ choosing

    def choose(self, state: State, done: Callable[[], None] = lambda: None) -> None:
        """Equalisations, ranges and weight scales of every linear, stage by stage; stages in `state` are only run.

        Raises:
            InputError: a value of an activation is NaN or infinite.
            StaleStateError: a stage in `state` does not compute what the model's does.
        """
        streams: dict[str, Rows] = {self.input: self.clips.frames}
        others: dict[str, Rows] = {self.input: np.stack(self.held_out)} if len(self.held_out) else {}
        for stage in track(self.stages, "calibrate", len(self.stages), self.progress):
            linears = self._linears(stage)
            if any(linear.name not in state.choices for linear in linears):
                streams = self._choose_stage(stage, linears, streams, state)
                done()
            else:
                plain = self._run(stage, {}, streams, range(1), {})
                streams = self._run(stage, state.values, streams, range(len(self.clips)), {})
                if not self._change(stage, plain, streams) <= FOLD_TOLERANCE:
                    raise StaleStateError(stage.name)
            others = self._hold_out(stage, linears, others, state)

    def _choose_stage(
        self, stage: Stage, linears: Sequence[Linear], streams: dict[str, Rows], state: State
    ) -> dict[str, Rows]:
        everything = range(len(self.clips))
        survey = {linear.activation: Sample(linear.activation, len(everything)) for linear in linears}
        outputs = self._run(stage, state.values, streams, everything, survey)
        plain = {linear.name: self._plain_error(linear, survey[linear.activation]) for linear in linears}
        unfolded = dict(state.values)
        folded = {linear.name: self._equalise(linear, survey[linear.activation], state) for linear in linears}
        samples = {name: Sample(name, len(everything), whole=True) for name in survey}
        again = self._run(stage, state.values, streams, everything, samples)
        if not (change := self._change(stage, outputs, again)) <= FOLD_TOLERANCE:
            state.values = unfolded
            reason = f"none: folding it changed {stage.name} by {change:.0e}"
            folded = {linear.name: self._no_equalisation(linear, reason) for linear in linears}
            samples = {name: Sample(name, len(everything), whole=True) for name in survey}
            again = self._run(stage, state.values, streams, everything, samples)
        for linear in linears:
            state.choices[linear.name] = self._quantise(
                linear, samples[linear.activation], folded[linear.name], plain[linear.name], state
            )
            state.means[linear.name] = samples[linear.activation].means[list(self.correction)].mean(axis=0)
        return again

    def _hold_out(
        self, stage: Stage, linears: Sequence[Linear], streams: dict[str, Rows], state: State
    ) -> dict[str, Rows]:
        """Run a stage on the held-out clips and note the errors there; what later stages read."""
        if not streams:
            return {}
        samples = {linear.activation: Sample(linear.activation, len(self.held_out)) for linear in linears}
        outputs = self._run(stage, state.values, streams, range(len(self.held_out)), samples)
        for linear in linears:
            choice, rows = state.choices[linear.name], samples[linear.activation].rows
            weight, quantised = self._value(linear.weight, state), self.rounded(linear, state)
            self.held_out_errors[linear.name] = self._error(rows, choice.range, weight, quantised)
        return outputs

    def _error(self, rows: Array, found: Range, weight: Array, quantised: Array) -> float:
        """Relative output error of a linear whose input has the range `found`, on rows (R, K) of it."""
        return numeric.output_error(rows @ weight, numeric.fake_activations(rows, found, self.activations), quantised)

    def _plain_error(self, linear: Linear, sample: Sample) -> float:
        """The error of a linear as it was given, under min-max, with weights rounded to the nearest."""
        weight, seen = np.asarray(self.initial[linear.weight], np.float32), sample.channels
        low, high = min(0.0, float(seen.low.min())), max(0.0, float(seen.high.max()))
        found = PIXELS if self._pixels(linear) else Range(low, high, "min-max")
        return self._error(sample.rows, found, weight, numeric.fake_weights(weight, numeric.full_scales(weight)))

    def _equalise(self, linear: Linear, sample: Sample, state: State) -> Equalisation:
        """Choose an equalisation and fold it into producer, weight and bias."""
        weight = self._value(linear.weight, state)
        producer = self._producer(linear)
        if producer is None or linear.bias is None:
            return self._no_equalisation(linear)
        choose = equalize.behind_gelu if linear.activation in self.places else equalize.choose
        chosen = choose(sample.halves, weight, self.activations, self.form.dtype)
        if not chosen.identity:
            bias = self._value(linear.bias, state)
            state.values[linear.bias] = chosen.bias(weight, bias)
            state.values[linear.weight] = chosen.weight(weight)
            producer(chosen, state)
        return chosen

    def _no_equalisation(self, linear: Linear, name: str = "none") -> Equalisation:
        size = len(self.initial[linear.weight])
        return Equalisation(name, np.ones(size, np.float32), np.zeros(size, np.float32))

    def _producer(self, linear: Linear) -> Callable[[Equalisation, State], None] | None:
        """How to fold an equalisation into what makes the linear's activation, if that is possible."""
        makers = {output: node for node in self.model.graph.node for output in node.output}
        readers = [node.name for node in self.model.graph.node if linear.activation in node.input]
        maker = makers.get(linear.activation)
        if maker is not None and maker.op_type == "LayerNormalization" and readers == [linear.node]:
            gamma, beta = maker.input[1], maker.input[2]

            def into_norm(chosen: Equalisation, state: State) -> None:
                state.values[beta] = (self._value(beta, state) - chosen.shift) / chosen.scale
                state.values[gamma] = self._value(gamma, state) / chosen.scale

            return into_norm
        if place := self.places.get(linear.activation):

            def into_place(chosen: Equalisation, state: State) -> None:
                state.values[place.gain] = np.float32(1) / chosen.scale
                if place.centre:
                    state.values[place.centre] = -(chosen.shift / chosen.scale)[:1]

            return into_place
        qkv = linear.name.removesuffix("proj") + "qkv.weight"
        if linear.name.endswith(".attn.proj") and qkv in self.initial:
            bias = qkv.removesuffix("weight") + "bias"

            def into_values(chosen: Equalisation, state: State) -> None:
                # Rows of softmax sum to 1: a shift of V is a shift of the attention's output.
                weight, offset = self._value(qkv, state).copy(), self._value(bias, state).copy()
                own = slice(2 * weight.shape[1] // 3, None)
                weight[:, own] /= chosen.scale
                offset[own] = (offset[own] - chosen.shift) / chosen.scale
                state.values[qkv], state.values[bias] = weight, offset

            return into_values
        return None

    def _quantise(
        self, linear: Linear, sample: Sample, folded: Equalisation, plain_error: float, state: State
    ) -> Choice:
        """Weights rounded for all tokens that were seen, and the range with the smallest output error on the rows."""
        assert sample.gram is not None
        weight, rows = self._value(linear.weight, state), sample.rows
        unit = self.form.pixels if self._pixels(linear) else 1.0
        scales = numeric.mse_scales(weight, sample.gram.power, self.form.safe_pairs)
        scales = stored_scales(scales * np.float32(unit), self.form.dtype, linear.weight) / np.float32(unit)
        integers = numeric.rounded_weights(weight, scales, sample.gram.total, self.form.safe_pairs)
        state.integers[linear.weight] = integers
        quantised, exact = integers * scales, rows @ weight
        errors: dict[str, float] = {}
        best: Range | None = None
        candidates = [*self._ranges(linear, sample), *([folded.range] if folded.range else [])]
        for found in (each.stored(self.activations, self.form.dtype, unit) for each in candidates):
            errors[found.method] = numeric.output_error(
                exact, numeric.fake_activations(rows, found, self.activations), quantised
            )
            if errors[found.method] <= min(errors.values()):
                best = found
        assert best is not None
        best = Range(digits(best.low), digits(best.high), best.method)
        return Choice(best, scales, folded.name, errors[best.method], plain_error, errors)

    def _ranges(self, linear: Linear, sample: Sample) -> list[Range]:
        if self._pixels(linear):
            return [PIXELS]
        assert sample.histogram is not None
        return list(observers.candidates(sample.histogram, self.activations))

    def _pixels(self, linear: Linear) -> bool:
        """Whether a linear reads pixels: their range is known."""
        maker = next((node for node in self.model.graph.node if linear.activation in node.output), None)
        return maker is not None and maker.op_type == "Cast" and not linear.in_block

    def _change(self, stage: Stage, before: dict[str, Rows], after: dict[str, Rows]) -> float:
        """How much a stage's outputs have changed on the clips in `before`, relative to the largest value of each."""
        changes = [0.0]
        for name in stage.outputs:
            first = before[name]
            scale = max(1e-6, max(float(np.abs(x).max()) for x in first))
            changes.append(max(float(np.abs(x - after[name][i]).max()) for i, x in enumerate(first)) / scale)
        return max(changes) if np.isfinite(changes).all() else np.inf

    def fits(self, state: State) -> bool:
        """Whether what was kept is of this model: names, shapes, types, finite numbers."""
        linears = {linear.name: linear for linear in self.linears}
        shapes = {linear.name: self.initial[linear.weight].shape for linear in self.linears}
        if not {*state.choices, *state.means} <= {*linears} or state.choices.keys() != state.means.keys():
            return False
        if {linears[name].weight for name in state.choices} != {*state.integers}:
            return False
        wanted = [(value, self.initial[name].shape) for name, value in state.values.items() if name in self.initial]
        wanted += [(choice.scales, shapes[name][1:]) for name, choice in state.choices.items()]
        wanted += [(value, shapes[name][:1]) for name, value in state.means.items()]
        return (
            len(wanted) == len(state.values) + len(state.choices) + len(state.means)
            and all(value.shape == shape and np.isfinite(value).all() for value, shape in wanted)
            and all(state.integers[linears[name].weight].shape == shapes[name] for name in state.choices)
            and all(value.dtype == np.int8 for value in state.integers.values())
        )

    # -------------------------------------------------------------------------------------------- bias correction

    def correct(self, state: State, quantised: frozenset[str]) -> None:
        """Biases of the linears in `quantised` so that their mean outputs are those of the float graph.

        Linear after linear, each seeing what the corrected quantised graph before it gives.
        """
        state.biases.clear()
        streams: dict[str, Rows] = {self.input: np.stack([self.clips.frames[i] for i in self.correction])}
        every = range(len(self.correction))
        for stage in track(self.stages, "correct biases", len(self.stages), self.progress):
            for linear in self._linears(stage):
                if linear.name not in quantised or linear.bias is None:
                    continue
                tensor = graphs.dequantised(linear.activation)
                sample = Sample(tensor, len(every))
                self._run(stage, state.values, streams, every, {tensor: sample}, quantised, state, keep=False)
                weight = self._value(linear.weight, state)
                fake = self.rounded(linear, state)
                drift = sample.means.mean(axis=0) @ fake.astype(np.float64) - state.means[linear.name] @ weight
                state.biases[linear.bias] = (self._value(linear.bias, state) - drift).astype(np.float32)
            streams = self._run(stage, state.values, streams, every, {}, quantised, state)

    def simulated(self, state: State, quantised: frozenset[str]) -> onnx.ModelProto:
        """The whole graph with the linears in `quantised` behaving as integers, in floating point."""
        return self._fake(graphs.replaced(self.model, state.values), self.linears, state, quantised)

    def rounded(self, linear: Linear, state: State) -> Array:
        """What the integers of a linear's weight stand for (K, N); rounding to the nearest gives them back."""
        return np.asarray(state.integers[linear.weight] * state.choices[linear.name].scales, np.float32)

    def decided(self, state: State, quantised: frozenset[str]) -> dict[str, Array]:
        """All initializers that differ from the graph's own when the linears in `quantised` are."""
        chosen = (linear for linear in self.linears if linear.name in quantised)
        return {**state.values, **state.biases, **{linear.weight: self.rounded(linear, state) for linear in chosen}}

    def _fake(
        self, model: onnx.ModelProto, linears: Sequence[Linear], state: State, quantised: frozenset[str]
    ) -> onnx.ModelProto:
        chosen = [linear for linear in linears if linear.name in quantised]
        values = {linear.weight: self.rounded(linear, state) for linear in chosen}
        values |= {linear.bias: state.biases[linear.bias] for linear in chosen if linear.bias in state.biases}
        ranges = {linear.activation: state.choices[linear.name].range for linear in chosen}
        nodes = [linear.node for linear in chosen]
        return graphs.quantise_activations(graphs.replaced(model, values), ranges, nodes, self.activations)

    # ---------------------------------------------------------------------------------------------------- running

    def _run(
        self,
        stage: Stage,
        values: Mapping[str, Array],
        streams: dict[str, Rows],
        clips: range,
        watched: Mapping[str, Sample],
        quantised: frozenset[str] = frozenset(),
        state: State | None = None,
        keep: bool = True,
    ) -> dict[str, Rows]:
        """Run one stage on every clip, show the watched tensors to their samples; what later stages read."""
        kept = stage.outputs if keep else ()
        fetched = list(dict.fromkeys([*kept, *(name for name in watched if name not in stage.inputs)]))
        part = graphs.replaced(graphs.part(self.model, stage), values)
        if state is not None:
            part = self._fake(part, self._linears(stage), state, quantised)
        part = graphs.only(part, fetched)
        call = self.open(part)
        needed = {value.name for value in part.graph.input}
        carried = {name: array for name, array in streams.items() if name in self._later(stage)}
        made: dict[str, Spool] = {}
        for index in clips:
            feeds = {name: streams[name][index][None] for name in needed}
            results = dict(zip(fetched, call(feeds), strict=True))
            for name, sample in watched.items():
                sample.add(index, np.asarray(results[name] if name in results else feeds[name]))
            for name in kept:
                if name not in made:
                    made[name] = Spool(self.workspace, (len(clips), *results[name].shape[1:]), np.float32)
                made[name][index] = results[name][0]
        return carried | made

    def _later(self, stage: Stage) -> set[str]:
        after = self.stages[self.stages.index(stage) + 1 :]
        return {name for later in after for name in later.inputs}

    def _linears(self, stage: Stage) -> list[Linear]:
        inside = {node.name for node in stage.nodes}
        return [linear for linear in self.linears if linear.node in inside]

    def _value(self, name: str, state: State) -> Array:
        return np.asarray(state.values.get(name, self.initial[name]), np.float32)
