"""Layer-wise calibration: chooses equalisations, activation ranges and int8 weights, then corrects biases.

The graph runs stage by stage (tokenizer, blocks, classifier): once in float32 to choose equalisations, ranges and
weight scales, once with fake quantisation to correct biases. Between stages only the tensors that later stages read are
kept, in files, so memory does not grow with the number of clips.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from threadpoolctl import threadpool_limits

from edgetube import processes
from edgetube.arrays import DiskArray, RowArray
from edgetube.calibration import equalize, graphs, numeric, observers
from edgetube.calibration.clips import Clips
from edgetube.calibration.equalize import ChannelRanges, Equalization, Half, Halves
from edgetube.calibration.graphs import Linear, OpenGraph, Stage
from edgetube.calibration.numeric import Gram, GramAccumulator
from edgetube.calibration.observers import Histogram
from edgetube.calibration.side_by_side import in_order
from edgetube.calibration.table import (
    FLOAT32_SCALES,
    ActivationScheme,
    IntegerFormat,
    Range,
    shortest_float32,
    stored_scales,
)
from edgetube.errors import InputError
from edgetube.progress import Progress, silent, track
from edgetube.roles import FoldSite, GraphRoles
from edgetube.video import Frames

Array = npt.NDArray[np.float32]

ROWS, ROW_VALUES = (512, 2048), 1_500_000
"""Fewest and most rows that are sampled of an activation to measure output errors on, and values in between."""

GROUPS = 8
"""Groups of neighbouring clips, often of one scene; alternate groups form the halves for cross-validation."""

PIXELS = Range(0.0, 255.0, "min-max")
"""The range of what a linear reads that reads pixels, whatever the clips are."""

CORRECTION_CLIPS = 32
"""Clips for bias correction: means converge with fewer clips than ranges."""

KEPT_BYTES = 1 << 30
"""Most bytes of what flows between stages that is kept of a bias correction, so that the next one begins where other
linears are quantised."""

FOLD_TOLERANCE = 1e-3
"""Largest change of a stage's output by folding, relative to its largest value; float32 rounding stays below 1e-5."""


@dataclass(frozen=True)
class Choice:
    """The quantisation parameters of one linear, and its output error.

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
class CalibrationState:
    """The results of the stages that are done.

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


@dataclass(frozen=True)
class CorrectedStage:
    """A stage of a bias correction.

    Attributes:
        state: of the calibration, without its biases.
        quantised: linears of the stage.
        biases: corrected ones of the stage, by initializer.
        streams: what later stages read, on the correction clips.
    """

    state: CalibrationState
    quantised: frozenset[str]
    biases: Mapping[str, Array]
    streams: dict[str, RowArray]

    @property
    def size(self) -> int:
        """Bytes of the streams."""
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in self.streams.values())


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for NumPy's work on the linears of a stage, one for each core; BLAS has one in each of them.

    BLAS's own threads would wait for their next product by spinning, on cores that the runtime or another linear needs.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(processes.cores()) as pool:
        yield pool


class StaleStateError(Exception):
    """Cached stages whose output differs from the model's; they have to be calibrated again."""


@dataclass(frozen=True)
class ClipStats:
    """What `ActivationStats` keeps of the activation of one clip.

    Attributes:
        index: of the clip.
        channels: minima and maxima.
        means: of the channels (K,).
        rows: sampled ones (R, K).
        histogram, gram: of every token; None without `whole`.
    """

    index: int
    channels: ChannelRanges
    means: npt.NDArray[np.float64]
    rows: Array
    histogram: Histogram | None
    gram: Gram | None


class ActivationStats:
    """Streaming statistics of one activation: minima, maxima and means of its channels, and sampled rows.

    The seed of the rows is the tensor's name and the clip's number, so every pass samples the same ones.

    Args:
        whole: also keep a histogram of all values, and the Gram matrix of all rows.

    Attributes:
        histogram, gram: of every token of every clip; None without `whole`.
    """

    def __init__(self, name: str, clips: int, whole: bool = False) -> None:
        self.name, self.seed, self.clips = name, zlib.crc32(name.encode()), clips
        self.whole = whole
        self.histogram = Histogram() if whole else None
        self.gram: GramAccumulator | None = None
        self.means: npt.NDArray[np.float64] = np.empty((clips, 0))
        self._channels: list[ChannelRanges] = []
        self._rows: list[Array] = []

    def add(self, index: int, values: Array) -> None:
        """Add the activation (1, ..., K) of clip number `index`.

        Raises:
            InputError: a value is NaN or infinite.
        """
        self.take(self.measure(index, values))

    def measure(self, index: int, values: Array) -> ClipStats:
        """What `take` adds of the activation (1, ..., K) of clip number `index`; threads may ask for several clips.

        Raises:
            InputError: a value is NaN or infinite.
        """
        rows = values.reshape(-1, values.shape[-1])
        channels = ChannelRanges(rows.min(axis=0), rows.max(axis=0))
        if not (np.isfinite(channels.low).all() and np.isfinite(channels.high).all()):
            raise InputError(
                f"the model gives NaN or infinite values in {self.name} on calibration clip {index}; check weights "
                "and clips"
            )
        sums = rows.sum(axis=0, dtype=np.float64)
        wanted = min(max(ROW_VALUES // rows.shape[1], ROWS[0]), ROWS[1])
        count = min(len(rows), -(-wanted // self.clips))
        drawn = np.random.default_rng([self.seed, index]).choice(len(rows), count, replace=False)
        histogram, gram = (Histogram.of(rows), Gram.of(rows, sums)) if self.whole else (None, None)
        return ClipStats(index, channels, sums / len(rows), rows[np.sort(drawn)], histogram, gram)

    def take(self, part: ClipStats) -> None:
        """Add what was measured of a clip, in the order of the clips."""
        if not self._channels:
            self.means = np.empty((self.clips, len(part.means)))
            self.gram = GramAccumulator(len(part.means)) if self.whole else None
        self._channels.append(part.channels)
        self.means[part.index] = part.means
        self._rows.append(part.rows)
        if self.histogram is not None and part.histogram is not None:
            self.histogram.merge(part.histogram)
        if self.gram is not None and part.gram is not None:
            self.gram.take(part.gram)

    @property
    def rows(self) -> Array:
        """The sampled rows (R, K)."""
        return np.concatenate(self._rows)

    @property
    def channels(self) -> ChannelRanges:
        """Channel ranges over all clips."""
        return ChannelRanges.of(self._channels)

    @property
    def halves(self) -> Halves:
        """Statistics of two halves of the clips, alternate groups of neighbours; a single clip is both halves."""
        group = max(1, -(-len(self._rows) // GROUPS))
        first = [i for i in range(len(self._rows)) if i // group % 2 == 0]
        second = [i for i in range(len(self._rows)) if i // group % 2] or first
        one, other = (
            Half(ChannelRanges.of(self._channels[i] for i in some), np.concatenate([self._rows[i] for i in some]))
            for some in (first, second)
        )
        return one, other


class LayerwiseCalibrator:
    """Calibrates one graph on one set of clips under one activation scheme.

    Args:
        model: canonical graph with batch 1; an activation that has no `graphs.EqualizationSite` is not equalised.
        roles: of the graph.
        open_graph: opens any graph for running.
        activations: the activation scheme.
        form: how the target stores integers; scales are rounded to its type before weights are.
        held_out: clips (N, T, H, W, 3) that are used only to measure errors.

    Attributes:
        held_out_errors: relative output error on those clips, by linear; empty when there are none.

    Raises:
        SpecError: the graph has not what its roles name.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        roles: GraphRoles,
        clips: Clips,
        open_graph: OpenGraph,
        activations: ActivationScheme,
        workspace: Path,
        progress: Progress = silent,
        held_out: Sequence[Frames] = (),
        form: IntegerFormat = FLOAT32_SCALES,
    ) -> None:
        self.form = form
        self.held_out, self.held_out_errors = held_out, dict[str, float]()
        self.model, self.clips, self.open, self.activations = model, clips, open_graph, activations
        self.workspace, self.progress = workspace, progress
        graphs.check_fold_sites(model, roles)
        self.roles, self.fold_sites = roles, {site.linear: site for site in roles.fold_sites}
        self.stages = graphs.stages(model, roles)
        self.linears = graphs.linears(model)
        self.sites = graphs.equalization_sites(model)
        self.initializers = graphs.initializers(model)
        self.input = model.graph.input[0].name
        step = max(1, len(clips) // CORRECTION_CLIPS)
        self.correction = range(0, len(clips), step)[:CORRECTION_CLIPS]
        self._corrected: list[CorrectedStage] = []

    # ------------------------------------------------------------------------------------------------ choosing

    def calibrate(self, state: CalibrationState, done: Callable[[], None] = lambda: None) -> None:
        """Choose equalisation, range and weight scales of every linear, stage by stage; stages in `state` are only run.

        Raises:
            InputError: a value of an activation is NaN or infinite.
            StaleStateError: the output of a stage in `state` differs from the model's.
        """
        self._corrected.clear()
        streams: dict[str, RowArray] = {self.input: self.clips.frames}
        others: dict[str, RowArray] = {self.input: np.stack(self.held_out)} if len(self.held_out) else {}
        with threads() as pool:
            for stage in track(self.stages, "calibrate", len(self.stages), self.progress):
                linears = self._linears(stage)
                if any(linear.name not in state.choices for linear in linears):
                    streams = self._calibrate_stage(stage, linears, streams, state, pool)
                    done()
                else:
                    plain = self._run(stage, {}, streams, range(1), {})
                    streams = self._run(stage, state.values, streams, range(len(self.clips)), {})
                    if not self._relative_change(stage, plain, streams) <= FOLD_TOLERANCE:
                        raise StaleStateError(stage.name)
                others = self._measure_held_out(stage, linears, others, state)

    def _calibrate_stage(
        self,
        stage: Stage,
        linears: Sequence[Linear],
        streams: dict[str, RowArray],
        state: CalibrationState,
        pool: ThreadPoolExecutor,
    ) -> dict[str, RowArray]:
        everything, foldable = range(len(self.clips)), any(map(self._is_foldable, linears))
        read = dict.fromkeys(linear.activation for linear in linears)
        survey = {name: ActivationStats(name, len(everything), whole=not foldable) for name in read}
        outputs = self._run(stage, state.values, streams, everything, survey)
        seen = [survey[linear.activation] for linear in linears]
        plain = list(pool.map(self._plain_error, linears, seen))
        unfolded = dict(state.values)
        folded = list(pool.map(partial(self._choose_equalization, state=state), linears, seen))
        for linear, chosen in zip(linears, folded, strict=True):
            self._fold(linear, chosen, state)
        stats, again = survey, outputs
        if foldable:
            stats = {name: ActivationStats(name, len(everything), whole=True) for name in read}
            again = self._run(stage, state.values, streams, everything, stats)
        if not (change := self._relative_change(stage, outputs, again)) <= FOLD_TOLERANCE:
            state.values = unfolded
            reason = f"none: folding it changed {stage.name} by {change:.0e}"
            folded = [self._no_equalization(linear, reason) for linear in linears]
            stats = {name: ActivationStats(name, len(everything), whole=True) for name in read}
            again = self._run(stage, state.values, streams, everything, stats)
        seen = [stats[linear.activation] for linear in linears]
        quantised = pool.map(partial(self._quantize, state=state), linears, seen, folded, plain)
        for linear, (choice, integers) in zip(linears, quantised, strict=True):
            state.choices[linear.name], state.integers[linear.weight] = choice, integers
            state.means[linear.name] = stats[linear.activation].means[list(self.correction)].mean(axis=0)
        return again

    def _measure_held_out(
        self, stage: Stage, linears: Sequence[Linear], streams: dict[str, RowArray], state: CalibrationState
    ) -> dict[str, RowArray]:
        """Run a stage on the held-out clips and record the errors there; returns what later stages read."""
        if not streams:
            return {}
        stats = {linear.activation: ActivationStats(linear.activation, len(self.held_out)) for linear in linears}
        outputs = self._run(stage, state.values, streams, range(len(self.held_out)), stats)
        for linear in linears:
            choice, rows = state.choices[linear.name], stats[linear.activation].rows
            weight, quantised = self._value(linear.weight, state), self.dequantized_weight(linear, state)
            self.held_out_errors[linear.name] = self._error(rows, choice.range, weight, quantised)
        return outputs

    def _error(self, rows: Array, found: Range, weight: Array, quantised: Array) -> float:
        """Relative output error of a linear on rows (R, K) of its input, quantised with the range `found`."""
        return numeric.output_error(
            rows @ weight, numeric.fake_quantize_activations(rows, found, self.activations), quantised
        )

    def _plain_error(self, linear: Linear, stats: ActivationStats) -> float:
        """The error of the original linear with a min-max range and weights rounded to nearest."""
        weight, seen = np.asarray(self.initializers[linear.weight], np.float32), stats.channels
        low, high = min(0.0, float(seen.low.min())), max(0.0, float(seen.high.max()))
        found = PIXELS if linear.name in self.roles.pixels else Range(low, high, "min-max")
        return self._error(
            stats.rows, found, weight, numeric.fake_quantize_weights(weight, numeric.absmax_scales(weight))
        )

    def _is_foldable(self, linear: Linear) -> bool:
        """Whether an equalisation can be folded in before a linear."""
        site = self.fold_sites.get(linear.name)
        if site is None or linear.bias is None:
            return False
        return site.kind != "activation" or linear.activation in self.sites

    def _choose_equalization(self, linear: Linear, stats: ActivationStats, state: CalibrationState) -> Equalization:
        if not self._is_foldable(linear):
            return self._no_equalization(linear)
        weight, site = self._value(linear.weight, state), self.fold_sites[linear.name]
        choose = equalize.choose_behind_gelu if site.kind == "activation" else equalize.choose
        return choose(stats.halves, weight, self.activations, self.form.dtype)

    def _fold(self, linear: Linear, chosen: Equalization, state: CalibrationState) -> None:
        """Fold an equalisation into producer, weight and bias."""
        if chosen.identity:
            return
        assert linear.bias is not None
        site, weight, bias = (
            self.fold_sites[linear.name],
            self._value(linear.weight, state),
            self._value(linear.bias, state),
        )
        state.values[linear.bias] = chosen.bias(weight, bias)
        state.values[linear.weight] = chosen.weight(weight)
        fold = {"norm": self._fold_norm, "activation": self._fold_activation, "values": self._fold_values}
        fold[site.kind](site, linear, chosen, state)

    def _no_equalization(self, linear: Linear, name: str = "none") -> Equalization:
        size, _ = self.initializers.shape(linear.weight)
        return Equalization(name, np.ones(size, np.float32), np.zeros(size, np.float32))

    def _fold_norm(self, site: FoldSite, linear: Linear, chosen: Equalization, state: CalibrationState) -> None:
        """Fold an equalisation into gamma and beta of the LayerNorm before a linear."""
        _, gamma, beta = graphs.producers(self.model.graph.node)[site.producer].input
        state.values[beta] = (self._value(beta, state) - chosen.shift) / chosen.scale
        state.values[gamma] = self._value(gamma, state) / chosen.scale

    def _fold_activation(self, site: FoldSite, linear: Linear, chosen: Equalization, state: CalibrationState) -> None:
        """Put an equalisation into the operators between an activation and a linear."""
        inserted = self.sites[linear.activation]
        state.values[inserted.gain] = np.float32(1) / chosen.scale
        if inserted.centre:
            state.values[inserted.centre] = -(chosen.shift / chosen.scale)[:1]

    def _fold_values(self, site: FoldSite, linear: Linear, chosen: Equalization, state: CalibrationState) -> None:
        """Fold an equalisation into the columns of attention's values.

        Rows of softmax sum to 1: a shift of the values is a shift of the attention's output.
        """
        producer = next(each for each in self.linears if each.name == site.producer)
        assert producer.bias is not None
        assert site.columns is not None
        weight, bias = self._value(producer.weight, state).copy(), self._value(producer.bias, state).copy()
        own = slice(*site.columns)
        weight[:, own] /= chosen.scale
        bias[own] = (bias[own] - chosen.shift) / chosen.scale
        state.values[producer.weight], state.values[producer.bias] = weight, bias

    def _quantize(
        self, linear: Linear, stats: ActivationStats, folded: Equalization, plain_error: float, state: CalibrationState
    ) -> tuple[Choice, npt.NDArray[np.int8]]:
        """Round the weights by the Gram matrix of all tokens; choose the range by the output error on the rows.

        Returns:
            What is chosen, and the rounded weights (K, N).
        """
        assert stats.gram is not None
        weight, rows = self._value(linear.weight, state), stats.rows
        unit = self.form.pixels if linear.name in self.roles.pixels else 1.0
        scales = numeric.mse_scales(weight, stats.gram.power, self.form.safe_pairs)
        scales = stored_scales(scales * np.float32(unit), self.form.dtype, linear.weight) / np.float32(unit)
        integers = numeric.gptq_quantize(weight, scales, stats.gram.total, self.form.safe_pairs)
        quantised, exact = integers * scales, rows @ weight
        errors: dict[str, float] = {}
        best: Range | None = None
        candidates = [*self._ranges(linear, stats), *([folded.range] if folded.range else [])]
        for found in (each.stored(self.activations, self.form.dtype, unit) for each in candidates):
            errors[found.method] = numeric.output_error(
                exact, numeric.fake_quantize_activations(rows, found, self.activations), quantised
            )
            if errors[found.method] <= min(errors.values()):
                best = found
        assert best is not None
        best = Range(shortest_float32(best.low), shortest_float32(best.high), best.method)
        return Choice(best, scales, folded.name, errors[best.method], plain_error, errors), integers

    def _ranges(self, linear: Linear, stats: ActivationStats) -> list[Range]:
        if linear.name in self.roles.pixels:
            return [PIXELS]
        assert stats.histogram is not None
        return list(observers.candidates(stats.histogram, self.activations))

    def _relative_change(self, stage: Stage, before: dict[str, RowArray], after: dict[str, RowArray]) -> float:
        """Largest change of a stage's outputs on the clips in `before`, relative to the largest value of each."""
        changes = [0.0]
        for name in stage.outputs:
            first = before[name]
            scale = max(1e-6, max(float(np.abs(x).max()) for x in first))
            changes.append(max(float(np.abs(x - after[name][i]).max()) for i, x in enumerate(first)) / scale)
        return max(changes) if np.isfinite(changes).all() else np.inf

    def matches_model(self, state: CalibrationState) -> bool:
        """Whether a cached state belongs to this model: names, shapes, types, finite numbers."""
        linears = {linear.name: linear for linear in self.linears}
        shapes = {linear.name: self.initializers.shape(linear.weight) for linear in self.linears}
        if not {*state.choices, *state.means} <= {*linears} or state.choices.keys() != state.means.keys():
            return False
        if {linears[name].weight for name in state.choices} != {*state.integers}:
            return False
        wanted = [
            (value, self.initializers.shape(name)) for name, value in state.values.items() if name in self.initializers
        ]
        wanted += [(choice.scales, shapes[name][1:]) for name, choice in state.choices.items()]
        wanted += [(value, shapes[name][:1]) for name, value in state.means.items()]
        return (
            len(wanted) == len(state.values) + len(state.choices) + len(state.means)
            and all(value.shape == shape and np.isfinite(value).all() for value, shape in wanted)
            and all(state.integers[linears[name].weight].shape == shapes[name] for name in state.choices)
            and all(value.dtype == np.int8 for value in state.integers.values())
        )

    # -------------------------------------------------------------------------------------------- bias correction

    def correct_biases(self, state: CalibrationState, quantised: frozenset[str]) -> None:
        """Correct the biases of the linears in `quantised` so that their mean outputs equal those of the float graph.

        Linears are corrected in order; each reads the output of the corrected quantised graph before it. So the
        correction begins with the first stage whose linears in `quantised` are not those of the last correction.
        """
        del self._corrected[self._alike(state, quantised) :]
        state.biases = {name: bias for done in self._corrected for name, bias in done.biases.items()}
        with threads():
            self._correct_biases(state, quantised, self.stages[len(self._corrected) :])

    def _alike(self, state: CalibrationState, quantised: frozenset[str]) -> int:
        """The number of first stages that were corrected with the same linears."""
        for count, (done, stage) in enumerate(zip(self._corrected, self.stages, strict=False)):
            if done.state is not state or done.quantised != quantised & {each.name for each in self._linears(stage)}:
                return count
        return len(self._corrected)

    def _correct_biases(self, state: CalibrationState, quantised: frozenset[str], stages: Sequence[Stage]) -> None:
        """Correct the last stages, the ones before which are in `self._corrected`."""
        if self._corrected:
            streams = self._corrected[-1].streams
        else:
            streams = {self.input: np.stack([self.clips.frames[i] for i in self.correction])}
        every, left, known = range(len(self.correction)), KEPT_BYTES, {*state.biases}
        left -= sum(done.size for done in self._corrected)
        for stage in track(stages, "correct biases", len(stages), self.progress):
            linears = self._linears(stage)
            chosen = [each for each in linears if each.name in quantised and each.bias is not None]
            read = {linear.activation for linear in chosen}
            for linear in chosen:
                if linear.activation in streams:
                    self._correct_bias(linear, streams[linear.activation], state)
            parts = graphs.split_stage(self.model, stage, read)
            later = self._later(stage)
            for index, part in enumerate(parts):
                inside = {name for other in parts[index + 1 :] for name in other.inputs}
                streams = self._run(part, state.values, streams, every, {}, quantised, state, later=later | inside)
                for linear in chosen:
                    if linear.activation in part.outputs:
                        self._correct_bias(linear, streams[linear.activation], state)
            own = {name: bias for name, bias in state.biases.items() if name not in known}
            done = CorrectedStage(state, quantised & {each.name for each in linears}, own, streams)
            known |= own.keys()
            left -= done.size
            if left >= 0:
                self._corrected.append(done)

    def _correct_bias(self, linear: Linear, activation: RowArray, state: CalibrationState) -> None:
        """Correct one bias, by the activation of the quantised graph on the correction clips (N, ..., K)."""
        assert linear.bias is not None
        found = state.choices[linear.name].range
        fakes = (numeric.fake_quantize_activations(clip, found, self.activations) for clip in activation)
        means = [fake.reshape(-1, fake.shape[-1]).mean(axis=0, dtype=np.float64) for fake in fakes]
        weight, fake_weight = self._value(linear.weight, state), self.dequantized_weight(linear, state)
        drift = np.mean(means, axis=0) @ fake_weight.astype(np.float64) - state.means[linear.name] @ weight
        state.biases[linear.bias] = (self._value(linear.bias, state) - drift).astype(np.float32)

    def one_by_one(
        self, state: CalibrationState, names: frozenset[str], clips: Sequence[Frames]
    ) -> Iterator[tuple[str, Array]]:
        """Logits (n, classes) on clips (T, H, W, 3) with each of the linears `names` quantised alone, in order.

        Only the stage of the linear is quantised. What is before it does not change, and what is behind it is opened
        once for all linears of a stage.
        """
        streams: dict[str, RowArray] = {self.input: np.stack(clips)}
        every, logits = range(len(clips)), self.model.graph.output[0].name
        for index, stage in enumerate(self.stages):
            if chosen := [linear.name for linear in self._linears(stage) if linear.name in names]:
                rest = self._opened_rest(index + 1, state)
                for name in chosen:
                    made = self._run(stage, state.values, streams, every, {}, frozenset([name]), state)
                    answers = made[logits] if rest is None else in_order(partial(rest, made), every)
                    yield name, np.concatenate(list(answers))
            streams = self._run(stage, state.values, streams, every, {})

    def _opened_rest(
        self, index: int, state: CalibrationState
    ) -> Callable[[Mapping[str, RowArray], int], Array] | None:
        """What computes the logits (1, classes) of a clip from streams and the clip's number, from stage `index` on.

        None where no stage is left.
        """
        if index == len(self.stages):
            return None
        rest = graphs.join_stages(self.model, self.stages[index:])
        call = self.open(graphs.replace_initializers(graphs.extract_stage(self.model, rest), state.values))

        def run(streams: Mapping[str, RowArray], clip: int) -> Array:
            return call({name: streams[name][clip] for name in rest.inputs})[0]

        return run

    def fake_quantized(self, state: CalibrationState, quantised: frozenset[str]) -> onnx.ModelProto:
        """The whole graph with fake quantisation of the linears in `quantised`."""
        return self._fake_quantize(
            graphs.replace_initializers(self.model, state.values), self.linears, state, quantised
        )

    def dequantized_weight(self, linear: Linear, state: CalibrationState) -> Array:
        """The dequantised int8 weight of a linear (K, N); rounding it to nearest gives the same integers."""
        return np.asarray(state.integers[linear.weight] * state.choices[linear.name].scales, np.float32)

    def changed_initializers(self, state: CalibrationState, quantised: frozenset[str]) -> dict[str, Array]:
        """All initializers that differ from the graph's own when the linears in `quantised` are quantised."""
        chosen = (linear for linear in self.linears if linear.name in quantised)
        return {
            **state.values,
            **state.biases,
            **{linear.weight: self.dequantized_weight(linear, state) for linear in chosen},
        }

    def _fake_quantize(
        self, model: onnx.ModelProto, linears: Sequence[Linear], state: CalibrationState, quantised: frozenset[str]
    ) -> onnx.ModelProto:
        chosen = [linear for linear in linears if linear.name in quantised]
        values = {linear.weight: self.dequantized_weight(linear, state) for linear in chosen}
        values |= {linear.bias: state.biases[linear.bias] for linear in chosen if linear.bias in state.biases}
        ranges = {linear.activation: state.choices[linear.name].range for linear in chosen}
        nodes = [linear.node for linear in chosen]
        return graphs.quantize_activations(graphs.replace_initializers(model, values), ranges, nodes, self.activations)

    # ---------------------------------------------------------------------------------------------------- running

    def _run(
        self,
        stage: Stage,
        values: Mapping[str, Array],
        streams: dict[str, RowArray],
        clips: range,
        watched: Mapping[str, ActivationStats],
        quantised: frozenset[str] = frozenset(),
        state: CalibrationState | None = None,
        later: set[str] | None = None,
    ) -> dict[str, RowArray]:
        """Run one stage on every clip and update the statistics of `watched`; returns what later stages read.

        Args:
            later: tensors of `streams` to return besides the stage's outputs; None for those that later stages read.
        """
        kept = stage.outputs
        fetched = list(dict.fromkeys([*kept, *(name for name in watched if name not in stage.inputs)]))
        part = graphs.replace_initializers(graphs.extract_stage(self.model, stage), values)
        if state is not None:
            part = self._fake_quantize(part, self._linears(stage), state, quantised)
        part = graphs.extract_subgraph(part, fetched)
        call = self.open(part)
        needed = {value.name for value in part.graph.input}
        later = self._later(stage) if later is None else later
        carried = {name: array for name, array in streams.items() if name in later}

        def run(index: int) -> tuple[list[Array], list[ClipStats]]:
            feeds = {name: streams[name][index] for name in needed}
            if self.input in feeds:
                feeds[self.input] = feeds[self.input][None]
            results = dict(zip(fetched, call(feeds), strict=True))
            seen = [
                stats.measure(index, np.asarray(results[name] if name in results else feeds[name]))
                for name, stats in watched.items()
            ]
            return [results[name] for name in kept], seen

        made: dict[str, DiskArray] = {}
        for index, (outputs, seen) in zip(clips, in_order(run, clips), strict=True):
            for stats, one in zip(watched.values(), seen, strict=True):
                stats.take(one)
            for name, value in zip(kept, outputs, strict=True):
                if name not in made:
                    made[name] = DiskArray(self.workspace, (len(clips), *value.shape), np.float32)
                made[name][index] = value
        return carried | made

    def _later(self, stage: Stage) -> set[str]:
        after = self.stages[self.stages.index(stage) + 1 :]
        return {name for later in after for name in later.inputs}

    def _linears(self, stage: Stage) -> list[Linear]:
        inside = {node.name for node in stage.nodes}
        return [linear for linear in self.linears if linear.node in inside]

    def _value(self, name: str, state: CalibrationState) -> Array:
        return np.asarray(state.values[name] if name in state.values else self.initializers[name], np.float32)
