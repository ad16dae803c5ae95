"""The model's geometry, and what it answers.

All types are frozen, validated on construction, and survive a round trip through JSON
(`X.from_json(x.to_json()) == x`). Only the standard library is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from edgetube import strict
from edgetube.contract import LARGEST, MOST_VOXELS
from edgetube.errors import FormatError, SpecError
from edgetube.reduction import Reduction

Triple = tuple[int, int, int]
"""(time, height, width), in voxels of the input clip."""

AXES = ("time", "height", "width")

Positions = Literal["fixed", "stored", "rotary", "anchored"]
PositionResize = Literal["none", "bilinear", "bicubic", "bicubic-antialias", "nearest"]
SpaceTime = Literal["joint", "divided"]
Activation = Literal["gelu", "gelu-tanh", "quick-gelu", "silu"]
FinalNorm = Literal["tokens", "readout", "none"]

LATER = ("projection", "attention", "reduction", "left_out")
"""Fields that older bundles lack. JSON leaves them out where they have their defaults, so that the digests of older
bundles, which are made of it, stay what they were."""

MOST_BLOCKS = 1 << 10
MOST_TOKENS = 1 << 16
MOST_CLASSES = 1 << 20
MOST_TUBES = 64
MOST_PARAMETERS = 1 << 28
"""Largest number of parameters of a tube: a gigabyte of float32."""


def _integers(value: Any, where: str, count: int, low: int, high: int = LARGEST) -> tuple[int, ...]:
    return tuple(strict.integer(v, where, low, high) for v in strict.items(value, where, count, count))


def _triple(value: Any, where: str, low: int) -> Triple:
    """Three integers: 8.5 is refused, not truncated to 8."""
    try:
        t, h, w = _integers(value, where, 3, low)
    except FormatError as error:
        raise SpecError(
            f"{where} is {value!r:.60}; expected three integers >= {low} (time, height, width), at most {LARGEST}"
        ) from error
    return t, h, w


@dataclass(frozen=True)
class TubeSpec:
    """One sparse tube: a strided 3-D convolution that makes tokens (TubeViT, section 3.1).

    `kernel`, `stride` and `offset` are (time, height, width) in voxels. `space_to_depth` is S per axis
    (section 3.2): the convolution emits `width / prod(S)` channels on a stride that is S times finer, and the
    S neighbours are concatenated on the channels, in row-major order of (dt, dh, dw), neighbour outermost.
    The paper does not fix that order; this is ours.
    """

    kernel: Triple
    stride: Triple
    offset: Triple = (0, 0, 0)
    space_to_depth: Triple = (1, 1, 1)

    def __post_init__(self) -> None:
        for name in ("kernel", "stride", "offset", "space_to_depth"):
            low = 0 if name == "offset" else 1
            object.__setattr__(self, name, _triple(getattr(self, name), f"tube {name}", low))
        for axis, stride, s in zip(AXES, self.stride, self.space_to_depth, strict=True):
            if stride % s:
                raise SpecError(f"tube {self}: the {axis} stride {stride} is not divisible by space_to_depth {s}")

    def __str__(self) -> str:
        return "x".join(map(str, self.kernel))

    @property
    def is_2d(self) -> bool:
        """True for a tube that fits on one frame, the first: such tubes also make the tokens of an image."""
        return self.minimum()[0] == 1

    @property
    def merge(self) -> int:
        """How many convolution outputs make one token: prod(space_to_depth)."""
        return math.prod(self.space_to_depth)

    @property
    def conv_stride(self) -> Triple:
        """The stride of the convolution itself: `stride / space_to_depth`."""
        t, h, w = (s // m for s, m in zip(self.stride, self.space_to_depth, strict=True))
        return t, h, w

    @property
    def extent(self) -> Triple:
        """Voxels that one token spans per axis: the kernel, and with space-to-depth its neighbours too."""
        t, h, w = (k + s * (m - 1) for k, s, m in zip(self.kernel, self.conv_stride, self.space_to_depth, strict=True))
        return t, h, w

    def minimum(self) -> Triple:
        """The smallest clip (frames, height, width) on which this tube yields one token."""
        t, h, w = (o + e for o, e in zip(self.offset, self.extent, strict=True))
        return t, h, w

    def grid(self, clip: Triple) -> Triple:
        """Tokens per axis on a clip of (frames, height, width); 0 where the tube does not fit.

        floor((L - offset - kernel) / stride) + 1 for a plain tube.
        """
        t, h, w = (
            max(0, (size - o - e) // s + 1)
            for size, o, e, s in zip(clip, self.offset, self.extent, self.stride, strict=True)
        )
        return t, h, w

    def tokens(self, clip: Triple) -> int:
        """Number of tokens on a clip of (frames, height, width)."""
        return math.prod(self.grid(clip))

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TubeSpec:
        with strict.spec_errors():
            return cls(**strict.fields_of(cls, data))


PAPER_TUBES = (
    TubeSpec((8, 8, 8), (16, 32, 32)),
    TubeSpec((16, 4, 4), (6, 32, 32), (4, 8, 8)),
    TubeSpec((4, 12, 12), (16, 32, 32), (0, 16, 16)),
    TubeSpec((1, 16, 16), (32, 16, 16)),
)
"""The four tubes of the paper (section 4): 539 tokens at 32x224x224."""

PAPER_TUBES_S2D = (
    replace(PAPER_TUBES[0], space_to_depth=(2, 1, 1)),
    replace(PAPER_TUBES[1], space_to_depth=(1, 2, 2)),
    *PAPER_TUBES[2:],
)
"""The same with space-to-depth on the first two: the same number of tokens, 17.5 % of the voxels."""


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: queries and keys are turned by angles that depend on their token's place in the grid.

    The channels of a head form pairs, partners half a head apart; `head // 2 // len(axes)` pairs belong to each axis,
    in the order of `axes`, and the pairs that are left over are not turned. Pair j of an axis turns by
    `c * base ** (-j / pairs)` at coordinate c. Prefix tokens are not turned.

    Attributes:
        axes: of `AXES`.
        base: "theta".
        coordinates: "index" (the place in the token grid), or "centred": 2 pi ((i + 0.5) / n * 2 - 1).
        frequencies: "pairs": both partners turn by the same angle. "channels": the frequencies run over the channels
            (2j for the first partner of pair j, 2j + 1 for the second, both modulo the number of pairs), as V-JEPA 2
            was trained with.
    """

    axes: tuple[str, ...]
    base: float = 10000.0
    coordinates: Literal["index", "centred"] = "index"
    frequencies: Literal["pairs", "channels"] = "pairs"

    def __post_init__(self) -> None:
        with strict.spec_errors():
            given = strict.items(self.axes, "the axes of rotary positions", 1, len(AXES))
            axes = tuple(strict.text(axis, "an axis of rotary positions", most=20) for axis in given)
            object.__setattr__(self, "axes", axes)
            object.__setattr__(self, "base", strict.number(self.base, "the base of rotary positions", 1, 1e12))
        if not set(axes) <= set(AXES) or len(set(axes)) < len(axes):
            raise SpecError(f"rotary axes {axes}; expected some of {', '.join(AXES)}, each once")
        _check_choices(self, "rotary ", coordinates=("index", "centred"), frequencies=("pairs", "channels"))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rotary:
        with strict.spec_errors():
            return cls(**strict.fields_of(cls, data))


@dataclass(frozen=True)
class QueryPool:
    """A readout by attention of one learned query, with an MLP behind it (V-JEPA 2's pooler, SigLIP's MAP head).

    The query is a constant, so queries times keys is one product of the tokens by a constant (width, heads), and the
    values are projected after they were weighted. What is added to the attended value (biases, the query itself) is
    one bias.

    Attributes:
        heads: of the attention, and of the blocks before it.
        hidden: width of the MLP behind it, x + mlp(norm(x)), and of those in the blocks.
        depth: encoder blocks between the final norm and the attention, without positions.
        norm: whether the tokens pass a LayerNorm of the pool's own first.
        projection: whether the attended values pass a linear.
        norm_eps: epsilon of the pool's LayerNorms; 0, the default, is that of the model.
    """

    heads: int
    hidden: int
    depth: int = 0
    norm: bool = False
    projection: bool = True
    norm_eps: float = 0.0

    def __post_init__(self) -> None:
        with strict.spec_errors():
            for name, low, most in (("heads", 1, LARGEST), ("hidden", 1, 16 * LARGEST), ("depth", 0, MOST_BLOCKS)):
                value = strict.integer(getattr(self, name), f"{name} of the query pool", low, most)
                object.__setattr__(self, name, value)
            eps = strict.number(self.norm_eps, "norm_eps of the query pool", 0, LARGEST)
            object.__setattr__(self, "norm_eps", eps)
        for name in ("norm", "projection"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name} of the query pool is {getattr(self, name)!r:.60}; expected true or false")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QueryPool:
        with strict.spec_errors():
            return cls(**strict.fields_of(cls, data))


QUERY = "query"
"""The readout by a `QueryPool`."""


@dataclass(frozen=True)
class ModelSpec:
    """A video or image transformer fed by tubes, everything but its weights.

    A ViT with dense patches is the case of one tube whose stride is its kernel. `frames == 1` means image input: only
    the 2-D tubes make tokens then (section 3.1), with the same encoder and the positions of time 0.

    Attributes:
        tubes: the tubes, in the order of their tokens.
        frames, size: the clip, T and (H, W) in voxels.
        width, depth, heads: the ViT encoder; `width` is d.
        classifiers: (name, classes) of each linear head (one per data set in the paper).
        hidden: width of the MLP's hidden layer; 0, the default, becomes 4 * width.
        channels: colour channels of the clip.
        kernel: the shape of the one shared kernel that is resized trilinearly to every tube
            ("interpolated kernels", section 3.1), or None when each tube has its own.
        prefix: number of learned tokens before those of the tubes (class, distillation, register tokens); each is one
            constant row, its position included.
        readout: what the classifiers read, one vector of `width` each, concatenated: "attention" (of all tokens:
            softmax over Linear(d, 1) scores, weighted sum), "mean" (of the tubes' tokens), "prefix.I" (prefix token I),
            or "query" alone (see `query_pool`).
        query_pool: of the readout "query".
        projection: length E of the embedding that cosine classifiers compare, as in CLIP: the readout goes through a
            linear to E, and is divided by its length; 0, the default: classifiers read the readout itself.
        final_norm: where the last LayerNorm is: over the "tokens", over the "readout" (one vector), or "none".
        final_norm_eps: its epsilon; 0, the default, becomes `norm_eps`.
        activation: of the MLPs: "gelu" (exact), "gelu-tanh" (its tanh approximation), "quick-gelu"
            (x sigmoid(1.702 x)), "silu".
        gated_mlp: the MLP is down(activation(gate(x)) * up(x)), gate and up in one linear, in this order.
        positions: "fixed" (equations 3-7 at the tubes' centres), "stored" (a table in the checkpoint), "rotary", or
            "anchored": a learned grid with a row for each place of the 2-D tube, which every other token takes
            bilinearly at its centre, plus a learned number times p(t) - p(0), the time channels of equations 3-7. So an
            image has the rows of the grid, whatever that number is.
        position_resize: how a stored table is taken to another size: this filter over height and width, linear in time;
            "nearest" is that in time, too; "none": the table belongs to one clip shape. Of an anchored one's grid.
        rotary: of the positions "rotary".
        embedding_norm: a LayerNorm follows the embedding (prefix tokens, tubes, positions).
        attention: of a block: "joint", of all tokens to all; or "divided" (Bertasius et al., ICML 2021): first over
            time, of the tubes' tokens at one place, then over space, of the tokens of one time and a copy of each
            prefix token, what is added to the copies being averaged over time. Each has a LayerNorm and linears of its
            own.
        gates: indices of the blocks that add tanh(alpha) * z_0 (section 3.6), alpha learned per block.
        norm_eps: epsilon of every other LayerNorm.
        per_frame: an image model over video: each frame is a sequence of its own, and the logits are the mean over the
            frames.
        reduction: of the tokens, in the blocks; None keeps all.
        left_out: indices of the tubes that make no tokens; the checkpoint has their weights all the same.
    """

    tubes: tuple[TubeSpec, ...]
    frames: int
    size: tuple[int, int]
    width: int
    depth: int
    heads: int
    classifiers: tuple[tuple[str, int], ...]
    hidden: int = 0
    channels: int = 3
    kernel: Triple | None = None
    prefix: int = 0
    readout: tuple[str, ...] = ("attention",)
    query_pool: QueryPool | None = None
    projection: int = 0
    final_norm: FinalNorm = "tokens"
    final_norm_eps: float = 0.0
    activation: Activation = "gelu"
    gated_mlp: bool = False
    positions: Positions = "fixed"
    position_resize: PositionResize = "none"
    rotary: Rotary | None = None
    embedding_norm: bool = False
    attention: SpaceTime = "joint"
    gates: tuple[int, ...] = ()
    norm_eps: float = 1e-6
    per_frame: bool = False
    reduction: Reduction | None = None
    left_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.tubes:
            raise SpecError("a model needs at least one tube; given none")
        with strict.spec_errors():
            self._normalise()
        if self.width % self.heads:
            raise SpecError(f"width {self.width} is not divisible by {self.heads} attention heads")
        if not self.norm_eps > 0:
            raise SpecError(f"norm_eps is {self.norm_eps}; expected > 0")
        _check_choices(
            self,
            positions=get_args(Positions),
            position_resize=get_args(PositionResize),
            activation=get_args(Activation),
            final_norm=get_args(FinalNorm),
            attention=get_args(SpaceTime),
        )
        self._check_readout()
        self._check_rotary()
        self._check_anchor()
        self._check_attention()
        self._check_classifiers()
        for tube in self.tubes:
            if self.width % tube.merge:
                raise SpecError(f"width {self.width} is not divisible by the {tube.merge} neighbours of tube {tube}")
        if bad := [g for g in self.gates if not 0 <= g < self.depth]:
            raise SpecError(f"gates {bad} are outside the {self.depth} blocks")
        if len(set(self.gates)) < len(self.gates):
            raise SpecError(f"gates {self.gates} name a block twice")
        if len(self.left_out) == len(self.tubes):
            raise SpecError(f"all {len(self.tubes)} tubes are left out; keep one at least")
        if not self.active:
            tubes = ", ".join(map(str, self.chosen.values()))
            raise SpecError(f"an image needs a 2-D tube (1, h, w); the tubes are {tubes}")
        for index in self.active:
            self._must_fit(index)
        self._check_amount()
        if self.reduction is not None:
            self.reduction.check(self.tokens, self.depth)

    def _normalise(self) -> None:
        """Convert every field to its type and check its bounds."""
        tubes = strict.items(self.tubes, "tubes", 1, MOST_TUBES)
        if not all(isinstance(tube, TubeSpec) for tube in tubes):
            raise SpecError("tubes holds something else than a TubeSpec")
        found: dict[str, Any] = {"tubes": tuple(tubes)}
        for name in ("frames", "width", "depth", "heads", "channels"):
            most = MOST_BLOCKS if name == "depth" else LARGEST
            found[name] = strict.integer(getattr(self, name), name, 1, most)
        found["prefix"] = strict.integer(self.prefix, "prefix", 0, LARGEST)
        found["projection"] = strict.integer(self.projection, "projection", 0, LARGEST)
        found["hidden"] = strict.integer(self.hidden, "hidden", 0, 1 << 40) or 4 * found["width"]
        left_out = strict.items(self.left_out, "left_out", 0, MOST_TUBES)
        found["left_out"] = tuple(strict.integer(tube, "left_out", 0, len(tubes) - 1) for tube in left_out)
        if sorted(set(found["left_out"])) != list(found["left_out"]):
            raise SpecError(f"left_out is {found['left_out']}; expected indices of tubes, each once and in order")
        found["size"] = _integers(self.size, "size (height, width)", 2, 1)
        found["norm_eps"] = strict.number(self.norm_eps, "norm_eps", 0, LARGEST)
        found["final_norm_eps"] = strict.number(self.final_norm_eps, "final_norm_eps", 0, LARGEST) or found["norm_eps"]
        if self.kernel is not None:
            found["kernel"] = _triple(self.kernel, "the shared kernel", 1)
        gates = strict.items(self.gates, "gates", 0, MOST_BLOCKS)
        found["gates"] = tuple(strict.integer(gate, "gates", -LARGEST, LARGEST) for gate in gates)
        found["readout"] = tuple(
            strict.text(part, "readout", most=20) for part in strict.items(self.readout, "readout", 1, 8)
        )
        for name in ("gated_mlp", "embedding_norm", "per_frame"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name} is {getattr(self, name)!r:.60}; expected true or false")
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def _check_readout(self) -> None:
        known = ["attention", "mean", QUERY, *(f"prefix.{i}" for i in range(self.prefix))]
        if bad := [part for part in self.readout if part not in known]:
            raise SpecError(f"readout {bad[0]!r:.60}; this model can read {', '.join(known)}")
        if len(set(self.readout)) < len(self.readout):
            raise SpecError(f"readout {self.readout} names a part twice")
        if (QUERY in self.readout) != (self.query_pool is not None) or (self.query_pool and len(self.readout) > 1):
            raise SpecError(f"readout {self.readout} with query_pool {self.query_pool}; they go together, and alone")
        if self.query_pool is not None and self.width % self.query_pool.heads:
            raise SpecError(f"width {self.width} is not divisible by {self.query_pool.heads} heads of the query pool")
        if self.final_norm == "readout" and len(self.readout) > 1:
            raise SpecError(f"final_norm 'readout' is over one vector; the readout is {', '.join(self.readout)}")

    def _check_rotary(self) -> None:
        if (self.positions == "rotary") != (self.rotary is not None):
            raise SpecError(f"positions are {self.positions!r} and rotary is {self.rotary}; they go together")
        if self.rotary is None:
            return
        if len(self.tubes) > 1:
            raise SpecError(f"rotary positions need one grid of tokens; the model has {len(self.tubes)} tubes")
        head = self.width // self.heads
        if head % 2 or head < 2 * len(self.rotary.axes):
            raise SpecError(f"heads of {head} channels have no pair for each of the {len(self.rotary.axes)} axes")

    def _check_anchor(self) -> None:
        flat = [tube for tube in self.tubes if tube.is_2d]
        if self.positions == "anchored" and (len(flat) != 1 or flat[0].merge > 1):
            raise SpecError(
                f"anchored positions are those of one 2-D tube without space-to-depth; the model has {len(flat)} 2-D "
                f"tubes among {', '.join(map(str, self.tubes))}"
            )

    def _check_attention(self) -> None:
        """Divided attention needs a time and a place for each token, and is for models of that kind alone."""
        if self.attention == "joint":
            return
        against = {
            f"{len(self.tubes)} tubes": len(self.tubes) > 1,
            "rotary positions": self.rotary is not None,
            "a query pool": self.query_pool is not None,
            "gates": bool(self.gates),
            "frames that are sequences of their own": self.per_frame,
            "a reduction of tokens": self.reduction is not None,
        }
        if found := [what for what, there in against.items() if there]:
            raise SpecError(
                f"divided attention is for one grid of tokens over time and space; the model has {', '.join(found)}: "
                "leave that out, or make its attention joint"
            )

    def _check_classifiers(self) -> None:
        with strict.spec_errors():
            pairs = [strict.items(p, "a classifier", 2, 2) for p in strict.items(self.classifiers, "classifiers")]
            # The names are part of the weights' tensor names, where a dot separates modules.
            found = tuple(
                (
                    strict.text(name, "name of a classifier", r"\w[\w-]*", most=200),
                    strict.integer(n, f"classes of {name}", 1, MOST_CLASSES),
                )
                for name, n in pairs
            )
        if not found:
            raise SpecError("classifiers is empty; expected at least one (name, classes >= 1)")
        names = [name for name, _ in found]
        if len(set(names)) < len(names):
            raise SpecError(f"classifiers {names} do not have distinct names")
        object.__setattr__(self, "classifiers", found)

    def _check_amount(self) -> None:
        """Check that the sizes that follow from the geometry are within bounds."""
        kernels = [tube.kernel for tube in self.tubes] + ([self.kernel] if self.kernel else [])
        amounts = {
            "voxels of a clip": (math.prod(self.clip) * self.channels, MOST_VOXELS),
            "tokens": (self.sequence, MOST_TOKENS),
            "channels of the MLP": (self.hidden, 16 * LARGEST),
            "parameters of a tube": (self.width * self.channels * max(map(math.prod, kernels)), MOST_PARAMETERS),
        }
        for what, (amount, most) in amounts.items():
            if amount > most:
                raise SpecError(f"the model has {amount} {what}; this version goes up to {most}")

    def _must_fit(self, index: int) -> None:
        tube = self.tubes[index]
        for axis, size, low in zip(AXES, self.encoded, tube.minimum(), strict=True):
            if size < low:
                raise SpecError(
                    f"tube {index} ({tube}, offset {tube.offset}) does not fit: {axis} is {size}, minimum {low}"
                )

    @property
    def clip(self) -> Triple:
        """(frames, height, width) of the input."""
        return self.frames, *self.size

    @property
    def encoded(self) -> Triple:
        """(frames, height, width) of what becomes one sequence of tokens: the clip, or one frame of it."""
        return 1 if self.per_frame else self.frames, *self.size

    @property
    def is_image(self) -> bool:
        return self.frames == 1

    @property
    def accepts_images(self) -> bool:
        """Whether the model has a 2-D tube, so that the same weights also classify one image."""
        return any(tube.is_2d for tube in self.chosen.values())

    @property
    def chosen(self) -> dict[int, TubeSpec]:
        """The tubes that are not left out, by their index."""
        return {i: tube for i, tube in enumerate(self.tubes) if i not in self.left_out}

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the tubes that make tokens: the chosen ones for a clip, of these the 2-D ones for an image."""
        return tuple(i for i, tube in self.chosen.items() if self.encoded[0] > 1 or tube.is_2d)

    @property
    def anchor(self) -> TubeSpec:
        """The 2-D tube whose places the grid of anchored positions is for."""
        return next(tube for tube in self.tubes if tube.is_2d)

    @property
    def places(self) -> tuple[int, int]:
        """Height and width of the grid of anchored positions."""
        _, rows, columns = self.anchor.grid(self.encoded)
        return rows, columns

    @property
    def grids(self) -> tuple[Triple, ...]:
        """Token grid (time, height, width) of each active tube."""
        return tuple(self.tubes[i].grid(self.encoded) for i in self.active)

    @property
    def tokens(self) -> int:
        """N, the number of tokens that the tubes make."""
        return sum(math.prod(grid) for grid in self.grids)

    @property
    def sequence(self) -> int:
        """Length of the encoder's sequence: prefix tokens, then those of the tubes."""
        return self.prefix + self.tokens

    @property
    def entering(self) -> tuple[int, ...]:
        """Number of the tubes' tokens that enter each block."""
        return (self.tokens,) * self.depth if self.reduction is None else self.reduction.entering(self.tokens)

    @property
    def left(self) -> int:
        """Number of the tubes' tokens behind the last block."""
        return self.tokens if self.reduction is None else self.reduction.keep[-1]

    @property
    def attended(self) -> tuple[tuple[int, int], ...]:
        """Of each attention of a block, in order: the number of its sequences, and of the tokens of each."""
        if self.attention == "joint":
            return ((1, self.sequence),)
        ((times, rows, columns),) = self.grids
        return (rows * columns, times), (times, self.prefix + rows * columns)

    @property
    def features(self) -> int:
        """Length of the readout."""
        return self.width * len(self.readout)

    @property
    def embedding(self) -> int:
        """Length of the vector that the classifiers read: the readout, or its projection."""
        return self.projection or self.features

    def with_clip(
        self,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        tubes: Mapping[int, TubeSpec] | None = None,
    ) -> ModelSpec:
        """The same model for another clip shape, or with some of its tubes.

        Args:
            tubes: those that make tokens, see `check_tubes`; None leaves them as they are.

        Raises:
            SpecError: a tube does not fit, or stored positions have no rule for another clip. (An image takes the rows
                of its own tubes at time 0.)
        """
        changed: dict[str, Any] = {"frames": self.frames if frames is None else frames, "size": size or self.size}
        if tubes is not None:
            self.check_tubes(tubes)
            changed["tubes"] = tuple(tubes.get(i, tube) for i, tube in enumerate(self.tubes))
            changed["left_out"] = tuple(i for i in range(len(self.tubes)) if i not in tubes)
        new = replace(self, reduction=None, **changed)
        if self.reduction is not None:
            new = replace(new, reduction=self.reduction.scaled(self.tokens, new.tokens))
        if self.position_resize == "none" and new.encoded != self.encoded:
            image = new.size == self.size and new.is_image
            moved = (
                new.places != self.places if self.positions == "anchored" else self.positions == "stored" and not image
            )
            if moved:
                raise SpecError(
                    f"this checkpoint stores its positions for clip {self.clip}; it cannot run on {new.clip}"
                )
        return new

    def same_tubes(self, other: ModelSpec) -> bool:
        """Whether the same tubes make tokens, at the same strides and offsets."""
        return (self.tubes, self.left_out) == (other.tubes, other.left_out)

    def tubes_label(self, trained: ModelSpec | None) -> str:
        """For names of files: `tubes0.2.3`, with `-98` for the tokens where some were moved; empty where all are there
        as they were trained."""
        if trained is None or self.same_tubes(trained):
            return ""
        moved = "" if self.tubes == trained.tubes else f"-{self.tokens}"
        return f"tubes{'.'.join(map(str, self.chosen))}{moved}"

    def check_tubes(self, tubes: Mapping[int, TubeSpec]) -> None:
        """Check that the model's weights and positions allow tubes, by their index: some of its own, or moved.

        A moved tube has another stride or offset. Fixed and anchored positions are functions of where a token is, so it
        has one wherever it is moved; a stored or rotary one belongs to a place in the grid of the trained tube, as does
        the learned grid of anchored ones to the places of the 2-D tube.

        Raises:
            SpecError: they do not.
        """
        for index, tube in tubes.items():
            own = self.tubes[index] if 0 <= index < len(self.tubes) else None
            if own is None:
                raise SpecError(f"there is no tube {index}; the model has tubes 0 to {len(self.tubes) - 1}")
            if (tube.kernel, tube.space_to_depth) != (own.kernel, own.space_to_depth):
                raise SpecError(
                    f"tube {index} has weights for the kernel {own} with space_to_depth {own.space_to_depth}; {tube} "
                    f"with {tube.space_to_depth} would need others"
                )
            anchor = self.positions == "anchored" and own.is_2d and own.stride[1:] + own.offset[1:]
            if tube != own and (
                self.positions in ("stored", "rotary") or (anchor and anchor != tube.stride[1:] + tube.offset[1:])
            ):
                raise SpecError(
                    f"tube {index} cannot have another stride or offset: the {self.positions} positions of this model "
                    "belong to the places in its grid; it can only be left out"
                )
            for axis, old, new, joined in zip(AXES, own.stride, tube.stride, own.space_to_depth, strict=True):
                if joined > 1 and old != new:
                    raise SpecError(
                        f"tube {index} joins {joined} neighbours that are 1 / {joined} of its {axis} stride apart; "
                        f"that stride is {old} and cannot be {new}"
                    )

    def tokenizer_macs(self) -> int:
        """Multiply-accumulates of the tube GEMMs alone."""
        return self._sequences * sum(
            math.prod(grid) * self.width * self.channels * math.prod(self.tubes[i].kernel)
            for i, grid in zip(self.active, self.grids, strict=True)
        )

    @property
    def _sequences(self) -> int:
        return self.frames if self.per_frame else 1

    def macs(self) -> int:
        """Multiply-accumulates of one forward pass: tube GEMMs, linears, attention matmuls, pooling, head.

        Matrix products alone: means and rotations are not counted.
        """
        encoder = self._blocks_macs() + self._readout_macs()
        both = 2 if self.projection else 1  # an exported graph projects to [y, -y], see `edgetube.export.static`
        projected = self._sequences * self.features * both * self.projection
        head = both * self.embedding * self.classifiers[0][1]
        return self.tokenizer_macs() + self._sequences * encoder + projected + head

    def _blocks_macs(self) -> int:
        """Of all blocks: linears and products of each attention, linears of the MLP, and products that merge tokens."""
        d, linears = self.width, (3 if self.gated_mlp else 2) * self.hidden
        if self.reduction is None:
            attention = sum(count * (4 * n * d * d + 2 * n * n * d) for count, n in self.attended)
            return self.depth * (attention + self.sequence * d * linears)
        total, last_gate = 0, max(self.gates, default=-1)
        for block, (before, after) in enumerate(zip(self.entering, self.reduction.keep, strict=True)):
            n, pairs = self.prefix + before, before // 2
            total += 4 * n * d * d + 2 * n * n * d + (self.prefix + after) * d * linears
            if self.reduction.kind == "merge" and after < before:  # gates add bare tokens, which are merged, too
                merged = d * (2 if block <= last_gate else 1) + 1
                total += (before - pairs) * pairs * (2 * d // self.heads) + (before - after) * pairs * merged
        return total

    def _readout_macs(self) -> int:
        n, d = self.prefix + self.left, self.width
        if (pool := self.query_pool) is not None:
            block = n * d * (4 * d + 2 * pool.hidden) + 2 * n * n * d
            return pool.depth * block + 2 * n * d * pool.heads + d * d * (1 + pool.projection) + 2 * d * pool.hidden
        merged = self.reduction is not None and self.reduction.kind == "merge" and "mean" in self.readout
        return (2 * n * d if "attention" in self.readout else 0) + (self.left * d if merged else 0)

    def to_json(self) -> dict[str, Any]:
        data = strict.stated(self, LATER)
        data["tubes"] = [tube.to_json() for tube in self.tubes]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Read a spec of this version, or of the first one, which had `mlp_ratio` and `pool`."""
        with strict.spec_errors():
            data = strict.fields_of(cls, _second_version(data))
            tubes = strict.items(data["tubes"], "tubes", 1, MOST_TUBES)
            data |= {"tubes": tuple(TubeSpec.from_json(tube) for tube in tubes)}
            for name, part in (("rotary", Rotary), ("query_pool", QueryPool), ("reduction", Reduction)):
                if data.get(name) is not None:
                    data[name] = part.from_json(data[name])
            return cls(**data)


def _second_version(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A spec of the first version with its two fields that are called otherwise now; any other unchanged."""
    if not isinstance(data, Mapping) or not {"pool", "mlp_ratio"} & data.keys():
        return data
    new = {key: value for key, value in data.items() if key not in ("pool", "mlp_ratio")}
    if "pool" in data:
        pool = strict.text(data["pool"], "pool", most=60)
        if pool not in ("attention", "mean"):
            raise SpecError(f"pool is {pool!r}; this version knows attention, mean")
        new["readout"] = (pool,)
    if "mlp_ratio" in data:
        width = strict.integer(data.get("width"), "width", 1, LARGEST)
        new["hidden"] = int(width * strict.number(data["mlp_ratio"], "mlp_ratio", 0, LARGEST))
        if new["hidden"] < 1:
            raise SpecError(f"mlp_ratio is {data['mlp_ratio']}; expected > 0")
    return new


def _check_choices(spec: Any, prefix: str = "", **choices: tuple[str, ...]) -> None:
    """Check that each field has one of its values."""
    for name, allowed in choices.items():
        if getattr(spec, name) not in allowed:
            raise SpecError(f"{prefix}{name} is {getattr(spec, name)!r:.60}; this version knows {', '.join(allowed)}")


SIZES: dict[str, tuple[int, int, int]] = {
    "tubevit-ti": (192, 12, 3),
    "tubevit-s": (384, 12, 6),
    "tubevit-b": (768, 12, 12),
    "tubevit-l": (1024, 24, 16),
    "tubevit-h": (1280, 32, 16),
}
"""(width, depth, heads) of the named architectures."""


def named(name: str, frames: int = 32, size: tuple[int, int] = (224, 224), classes: int = 400) -> ModelSpec:
    """One of `SIZES` with the paper's tubes; `-s2d` at the end of the name adds space-to-depth.

    Raises:
        SpecError: an unknown name, or a clip that a tube does not fit on.
    """
    base = name.removesuffix("-s2d")
    if base not in SIZES:
        raise SpecError(f"no architecture is called {name!r}; there are {', '.join(SIZES)} (add -s2d)")
    width, depth, heads = SIZES[base]
    return ModelSpec(
        tubes=PAPER_TUBES if base == name else PAPER_TUBES_S2D,
        frames=frames,
        size=size,
        width=width,
        depth=depth,
        heads=heads,
        classifiers=(("kinetics", classes),),
    )


@dataclass(frozen=True)
class Prediction:
    """The classification of one clip.

    Attributes:
        label, score: the most probable class and its softmax probability.
        scores: label -> probability of the top k classes, best first.
        logits: one per class, in the order of the bundle's labels.
        start, end: seconds of the source that the clip covers; None for arrays without a clock.
        latency_ms: milliseconds of work for this answer: preprocessing (of a stream: of the newest frame) and the call
            of the model, without waiting.
        source: name of the source; None for arrays.
        captured_at: of a stream: seconds of `time.monotonic()` at which the newest frame arrived.
        age_ms: of a stream: milliseconds from the arrival of the newest frame to the answer, with all waiting.
        dropped: of a stream: frames that were lost since the prediction before this one. What sampling leaves out is
            not lost.
        restarted: of a stream: why the window began again since the prediction before this one; None where it did not.
        skipped: of a stream with `skip_still`: the model did not run, and the answer is that of the last clip that it
            answered.
    """

    label: str
    score: float
    scores: dict[str, float]
    logits: tuple[float, ...] = field(repr=False)
    start: float | None = None
    end: float | None = None
    latency_ms: float = 0.0
    source: str | None = None
    captured_at: float | None = None
    age_ms: float | None = None
    dropped: int = 0
    restarted: str | None = None
    skipped: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prediction:
        with strict.spec_errors():
            data = strict.fields_of(cls, data)
            logits = strict.items(data["logits"], "logits", 1, MOST_CLASSES)
            return cls(**data | {"logits": tuple(strict.number(value, "logits") for value in logits)})
