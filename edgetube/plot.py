"""One picture of a model: where its tubes sample a clip, and the kernels that they learned.

Drawing needs matplotlib, and uses its `Figure` directly, so no window system and no global state are involved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgetube.errors import InputError
from edgetube.files import replacing
from edgetube.spec import ModelSpec, Triple, TubeSpec
from edgetube.targets import need
from edgetube.video import Frames
from edgetube.voxels import boxes, mask, placed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Affine2D

Array = npt.NDArray[Any]
Point = tuple[float, float]

COLOURS = ("#2f6fde", "#f76707", "#2b9348", "#c2255c", "#7048e8", "#0c8599")
"""One per tube, in every panel; they repeat after six."""

INK, SOFT, LINE, PALE = "#18222d", "#5c6b7a", "#b4bfca", "#e9edf1"

# The page, in inches. Columns: what the tube is, the clip as a solid, its frames, the kernels.
WIDTH, MARGIN, HEADER, ROW, FOOTER = 19.0, 0.45, 2.05, 2.85, 0.55
FACTS_X, SOLID_X, STRIP_X, KERNELS_X = MARGIN, 2.55, 7.85, 14.35
SOLID_W, STRIP_W, KERNELS_W = 5.0, 6.1, WIDTH - MARGIN - 14.35
DPI = 110

LEGEND = (
    "Bright pixels are read, dark ones never reach the model.   Kernels: one film strip a filter, time to the right, "
    "each scaled to its own largest |weight|; mid-grey is zero.   S2D: space-to-depth."
)

SHOWN = 4  # frames in the strip
SLICES = 4  # at most, in the solid


def strongest(weight: Array, count: int, by: Array | None = None) -> Array:
    """The `count` filters of most energy among (D, C, kt, kh, kw), as pictures (count, kt, kh, kw, 3) in 0..1.

    Energy is the variance over a filter's weights, or over those of the same filter of `by`. Each filter is divided by
    its own largest |weight|; mid-grey is a weight of zero. Colours are those of the input when C is 3, else the mean
    over the channels.
    """
    weight, judged = np.asarray(weight, np.float64), np.asarray(weight if by is None else by, np.float64)
    order = np.argsort(-judged.reshape(len(judged), -1).var(axis=1), kind="stable")[:count]
    best = np.moveaxis(weight[order], 1, -1)
    if best.shape[-1] != 3:
        best = best.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    peak = np.abs(best).max(axis=(1, 2, 3, 4), keepdims=True)
    return np.asarray(0.5 + 0.5 * best / np.where(peak > 0, peak, 1))


def tubes(path: Path, spec: ModelSpec, clip: Frames, kernels: Mapping[int, Array] | None, title: str) -> Path:
    """Draw the tubes of `spec` on `clip` and write one PNG, a row per active tube.

    Args:
        path: where to write; ends in .png, an existing file is replaced.
        clip: (T, H, W, 3) uint8, of the spec's frames and size.
        kernels: the learned kernel of each tube, (D, C, kt, kh, kw) by its index in `spec.tubes`; None, or no entry
            for a tube, leaves that panel empty and says so.
        title: the heading.

    Returns:
        `path`.

    Raises:
        InputError: a clip or kernel of another shape, or a path that does not end in .png or has no folder.
        MissingPackageError: matplotlib is not installed.
    """
    need("matplotlib", "plot")
    from matplotlib import style
    from matplotlib.figure import Figure

    _check(path, spec, clip, kernels or {})
    height = HEADER + ROW * len(spec.active) + FOOTER
    with style.context("default"):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        _header(figure, spec, title)
        for row, index in enumerate(spec.active):
            tube, colour, top = placed(spec, index), COLOURS[row % len(COLOURS)], HEADER + ROW * row
            _facts(figure, top, spec, index, colour)
            _solid(_axes(figure, SOLID_X, top + 0.2, SOLID_W, ROW - 0.3), tube, clip, colour)
            _strip(figure, top, tube, clip, colour)
            _kernels(figure, top, tube, (kernels or {}).get(index), kernels is not None)
        _text(figure, MARGIN, height - 0.3, LEGEND, size=10, color=SOFT)
        with replacing(path) as part:
            figure.savefig(part, format="png")
    return path


def training(path: Path, spec: ModelSpec, before: Mapping[int, Array], after: Mapping[int, Array], title: str) -> Path:
    """Draw filters of each tube before and after training, those that changed most, and write one PNG.

    Args:
        before, after: the kernel of each tube, (D, C, kt, kh, kw) by its index in `spec.tubes`.

    Raises:
        InputError: kernels of other shapes, or a path that does not end in .png or has no folder.
        MissingPackageError: matplotlib is not installed.
    """
    need("matplotlib", "plot")
    from matplotlib import style
    from matplotlib.figure import Figure

    check_file(path)
    for index, kernel in [*before.items(), *after.items()]:
        _check_kernel(spec, index, kernel)
    with style.context("default"):
        figure = Figure(figsize=(WIDTH, 1.1 + PAIR * len(spec.active)), dpi=DPI, facecolor="white")
        _text(figure, MARGIN, 0.4, title, size=18, weight="bold")
        said = "The filters that changed most, each scaled to its own largest |weight|; time to the right"
        _text(figure, MARGIN, 0.75, said, size=10, color=SOFT)
        for row, index in enumerate(spec.active):
            _pair(figure, 1.1 + PAIR * row, spec.tubes[index], before[index], after[index], COLOURS[row % len(COLOURS)])
        with replacing(path) as part:
            figure.savefig(part, format="png")
    return path


PAIR, STRIP_H = 1.7, 0.62
"""Heights of a tube's row before and after training, and of one strip, in inches."""


def _pair(figure: Figure, top: float, tube: TubeSpec, before: Array, after: Array, colour: str) -> None:
    """One tube: a row of filters before training, and below it the same after."""
    change = after - before
    share = float(np.square(change).sum() / max(float(np.square(before).sum()), 1e-30)) ** 0.5
    _text(figure, MARGIN, top + 0.35, _times(tube.kernel), size=14, weight="bold", color=colour)
    _text(figure, MARGIN, top + 0.65, f"changed by {share:.1%}", size=10, color=SOFT)
    kt, kh, kw = tube.kernel
    high = min(STRIP_H, (WIDTH - 4) * kh / (kt * kw))
    count = max(1, int((WIDTH - 4) / (high * (kt * kw / kh + 0.4))))
    for line, (name, kernels) in enumerate((("before", before), ("after", after))):
        sheet, _ = contact_sheet(strongest(kernels, count, by=change), count, 0.4, 0.25)
        y = top + 0.1 + line * (STRIP_H + 0.1)
        _text(figure, 2.4, y + high / 2, name, size=11, color=SOFT)
        axes = _axes(figure, 3.2, y, high * sheet.shape[1] / sheet.shape[0], high)
        axes.imshow(sheet, interpolation="antialiased", aspect="auto")


def check_file(path: Path) -> None:
    """Check where a picture goes.

    Raises:
        InputError: the path does not end in .png or has no folder.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"the picture is a PNG; given {path.name}, expected a name that ends in .png")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")


def _check_kernel(spec: ModelSpec, index: int, kernel: Array) -> None:
    if not 0 <= index < len(spec.tubes):
        raise InputError(f"there is a kernel for tube {index}; the model has tubes 0 to {len(spec.tubes) - 1}")
    if kernel.ndim != 5 or kernel.shape[2:] != spec.tubes[index].kernel:
        raise InputError(f"the kernel of tube {index} is {kernel.shape}; expected (D, C, *{spec.tubes[index].kernel})")


def _check(path: Path, spec: ModelSpec, clip: Frames, kernels: Mapping[int, Array]) -> None:
    check_file(path)
    if clip.shape != (*spec.clip, 3) or clip.dtype != np.uint8:
        raise InputError(f"the clip is {clip.shape} {clip.dtype}; the model takes {(*spec.clip, 3)} uint8")
    for index, kernel in kernels.items():
        _check_kernel(spec, index, kernel)


# The page ---------------------------------------------------------------------------------------------------------


def _axes(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Bare axes at (x, y) inches from the top left of the page."""
    page = figure.get_figheight()
    axes = figure.add_axes((x / WIDTH, 1 - (y + height) / page, width / WIDTH, height / page))
    axes.set_axis_off()
    return axes


def _text(figure: Figure, x: float, y: float, text: str, **look: Any) -> None:
    """Text whose first line is centred at (x, y) inches from the top left of the page."""
    look = {"color": INK, "size": 11, "va": "center"} | look
    figure.text(x / WIDTH, 1 - y / figure.get_figheight(), text, None, parse_math=False, **look)


def _header(figure: Figure, spec: ModelSpec, title: str) -> None:
    """Title, the numbers that describe the model, and a bar of tokens per tube."""
    read = mask([placed(spec, i) for i in spec.active], spec.clip)
    prefix, where = (f" + {spec.prefix}" if spec.prefix else ""), (" a frame" if spec.per_frame else "")
    _text(figure, MARGIN, 0.5, title, size=min(22, 1600 / len(title or " ")), weight="bold")
    numbers = [
        (_times(spec.clip), "frames × height × width"),
        (f"{spec.tokens:,}{prefix}", f"tokens {'+ prefix' if prefix else '(N)'}{where}"),
        (f"{100 * read.mean():.1f} %", "of the voxels read"),
        (f"{read.any(axis=(1, 2)).sum()} of {spec.frames}", "frames read"),
        (_macs(spec.macs()), "MACs a clip" if not spec.is_image else "MACs an image"),
        (_macs(spec.tokenizer_macs()), "of them in the tubes"),
    ]
    for i, (value, name) in enumerate(numbers):
        _text(figure, MARGIN + 1.95 * i + (0.35 if i else 0), 1.05, value, size=16, weight="bold")
        _text(figure, MARGIN + 1.95 * i + (0.35 if i else 0), 1.33, name, size=10, color=SOFT)
    axes = _axes(figure, STRIP_X + 4.9, 0.98, WIDTH - MARGIN - STRIP_X - 4.9, 0.2)
    left = 0
    for row, (i, grid) in enumerate(zip(spec.active, spec.grids, strict=True)):
        n = math.prod(grid)
        axes.barh(0, n, left=left, height=1, color=COLOURS[row % len(COLOURS)], edgecolor="white", linewidth=1.5)
        if n > 0.05 * spec.tokens:
            axes.text(
                left + n / 2, 0, f"{n:,}", color="white", weight="bold", size=10, ha="center", va="center_baseline"
            )
            axes.text(left + n / 2, -1.15, f"tube {i}", color=SOFT, size=10, ha="center", va="center_baseline")
        left += n
    axes.set(xlim=(0, left), ylim=(-0.5, 0.5))
    for x, heading in (
        (SOLID_X, "Where the tubes are in the clip"),
        (STRIP_X, "What they read"),
        (KERNELS_X, "What they learned: the strongest filters"),
    ):
        _text(figure, x, HEADER - 0.22, heading, size=12, weight="bold", color=SOFT)


def _facts(figure: Figure, top: float, spec: ModelSpec, index: int, colour: str) -> None:
    """The left column: kernel, stride, offset, space-to-depth, tokens, share of voxels."""
    tube = spec.tubes[index]
    grid, read = tube.grid(spec.encoded), mask([placed(spec, index)], spec.clip)
    made = f"{_times(grid[1:] if spec.per_frame else grid)} = {math.prod(grid)}{' a frame' if spec.per_frame else ''}"
    axes = _axes(figure, FACTS_X, top + 0.1, WIDTH - 2 * MARGIN, 0.001)
    axes.axhline(0, color=PALE, linewidth=1.5, clip_on=False)
    badge = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": "none"}
    _text(figure, FACTS_X + 0.07, top + 0.47, f"tube {index}", size=11, weight="bold", color="white", bbox=badge)
    _text(figure, FACTS_X, top + 0.86, _times(tube.kernel), size=18, weight="bold", color=colour)
    lines = [
        ("stride", _times(tube.stride)),
        ("offset", ", ".join(map(str, tube.offset))),
        ("S2D", "none" if tube.merge == 1 else _times(tube.space_to_depth)),
        ("tokens", made),
        ("voxels", f"{100 * read.mean():.1f} % read"),
        ("frames", f"{read.any(axis=(1, 2)).sum()} of {spec.frames} read"),
    ]
    for i, (name, value) in enumerate(lines):
        _text(figure, FACTS_X, top + 1.2 + 0.235 * i, name, size=10, color=SOFT)
        _text(figure, FACTS_X + 0.58, top + 1.2 + 0.235 * i, value, size=10)


def _times(values: Sequence[int]) -> str:
    return "×".join(map(str, values))


def _macs(macs: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if macs >= size:
            return f"{macs / size:.3g} {unit}"
    return f"{macs:,}"


# The clip as a solid ----------------------------------------------------------------------------------------------


class _Oblique:
    """Parallel projection of (t, h, w) voxels: seen from the front, above and the right; time runs to the right."""

    def __init__(self, clip: Triple) -> None:
        side = max(clip[1:])
        length = min(2.3, 0.14 * clip[0]) / clip[0]  # of one frame, in sides
        self.t, self.h, self.w = np.array([[length, 0.1 * length], [0, -1 / side], [0.6 / side, -0.2 / side]])

    def __call__(self, t: float, h: float, w: float) -> Point:
        x, y = self.t * t + self.h * h + self.w * w
        return float(x), float(y)

    def onto(self, t: float) -> Affine2D:
        """The transform that lays an image, in pixels, on frame t."""
        from matplotlib.transforms import Affine2D

        return Affine2D([[self.w[0], self.h[0], self.t[0] * t], [self.w[1], self.h[1], self.t[1] * t], [0, 0, 1]])

    def faces(self, box: Sequence[Sequence[int]] | Array) -> list[list[Point]]:
        """The front, the top and the right side of a box (3, 2)."""
        (t0, t1), (h0, h1), (w0, w1) = box
        front = [self(t0, h0, w0), self(t0, h0, w1), self(t0, h1, w1), self(t0, h1, w0)]
        top = [self(t0, h0, w0), self(t0, h0, w1), self(t1, h0, w1), self(t1, h0, w0)]
        side = [self(t0, h0, w1), self(t1, h0, w1), self(t1, h1, w1), self(t0, h1, w1)]
        return [front, top, side]


def _solid(axes: Axes, tube: TubeSpec, clip: Frames, colour: str) -> None:
    """The clip as a stack of frames with the tubes through it, drawn from the back to the front."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgb

    shape, base = clip.shape[:3], np.array(to_rgb(colour))
    view, all_boxes = _Oblique(shape), boxes(tube, shape)
    shades = [base, base + 0.5 * (1 - base), base * 0.8]  # front, top, side
    look: dict[str, Any] = {"edgecolors": base * 0.45, "linewidths": 0.3}
    cuts = [*range(0, shape[0], math.ceil(shape[0] / SLICES)), shape[0]]
    for order, (start, stop) in enumerate(reversed(list(itertools.pairwise(cuts)))):
        part = all_boxes[(all_boxes[:, 0, 0] < stop) & (all_boxes[:, 0, 1] > start)].copy()
        part[:, 0] = part[:, 0].clip(start, stop)
        part = np.unique(part, axis=0)
        part = part[np.lexsort((part[:, 2, 0], -part[:, 1, 0], -part[:, 0, 0]))]
        behind = PolyCollection([face for box in part for face in view.faces(box)], facecolors=shades, **look)
        image = axes.imshow(clip[start], extent=(0, shape[2], shape[1], 0), alpha=0.62, interpolation="bilinear")
        image.set_transform(view.onto(start) + axes.transData)
        edge = PolyCollection(
            [view.faces(((start, stop), (0, shape[1]), (0, shape[2])))[0]],
            facecolors="none",
            edgecolors=SOFT,
            linewidths=0.7,
        )
        # Where a tube goes through the frame it shows in full colour.
        holes = PolyCollection(
            [view.faces(box)[0] for box in part if box[0, 0] == start], facecolors=[base], alpha=0.55, **look
        )
        layers = (axes.add_collection(behind), image, axes.add_collection(edge), axes.add_collection(holes))
        for layer, artist in enumerate(layers):
            artist.set_zorder(1 + order + layer / len(layers))
        x, y = view(start, 0, 0)
        axes.text(x + 0.01, y + 0.02, f"{start}", size=9, color=SOFT, va="bottom", zorder=SLICES + 2)
    _frame(axes, view, shape)


def _frame(axes: Axes, view: _Oblique, shape: Triple) -> None:
    """The outline of the whole clip, its three axes, and the limits of the drawing."""
    t, h, w = shape
    for a, b in (((0, 0, 0), (t, 0, 0)), ((0, 0, w), (t, 0, w)), ((0, h, w), (t, h, w)),
                 ((t, 0, 0), (t, 0, w)), ((t, 0, w), (t, h, w))):  # fmt: skip
        axes.plot(*zip(view(*a), view(*b), strict=True), color=LINE, linewidth=0.8, zorder=SLICES + 2)
    label: dict[str, Any] = {"size": 9, "color": SOFT, "zorder": SLICES + 2}
    (x, y), (u, v) = view(0, h, w), view(t, h, w)
    axes.annotate("", (u, v - 0.09), (x, y - 0.09), arrowprops={"arrowstyle": "-|>", "color": SOFT, "lw": 1.0})
    axes.text((x + u) / 2, (y + v) / 2 - 0.17, f"time, {t} frame{'s' * (t > 1)}", ha="center", va="top", **label)
    x, y = view(0, h, w / 2)
    axes.text(x - 0.02, y - 0.07, f"{w}", ha="right", va="top", **label)
    x, y = view(0, h / 2, 0)
    axes.text(x - 0.04, y, f"{h}", ha="right", va="center", **label)
    points = np.array([view(i, j, k) for i in (0, t) for j in (0, h) for k in (0, w)])
    (left, bottom), (right, top) = points.min(axis=0), points.max(axis=0)
    axes.set(xlim=(left - 0.18, right + 0.03), ylim=(bottom - 0.32, top + 0.08), aspect="equal", anchor="W")


# The frames -------------------------------------------------------------------------------------------------------


def shown(tube: TubeSpec, clip: Triple, count: int = SHOWN) -> list[int]:
    """Frames to show: of each of `count` equal parts of the clip, the first frame that most boxes read."""
    time = boxes(tube, clip)[:, 0]
    reads = np.array([((time[:, 0] <= t) & (t < time[:, 1])).sum() for t in range(clip[0])])
    parts = np.array_split(np.arange(clip[0]), min(count, clip[0]))
    return [int(part[reads[part].argmax()]) for part in parts]


def lanes(windows: Array) -> list[list[tuple[int, int]]]:
    """Intervals (n, 2) sorted into as few lanes as keep those of one lane apart."""
    out: list[list[tuple[int, int]]] = []
    for start, stop in sorted((int(a), int(b)) for a, b in windows):
        free = next((lane for lane in out if lane[-1][1] <= start), None)
        if free is None:
            out.append(free := [])
        free.append((start, stop))
    return out


def _strip(figure: Figure, top: float, tube: TubeSpec, clip: Frames, colour: str) -> None:
    """Frames with what is read of them, above the time axis with the tubes' windows."""
    shape = clip.shape[:3]
    read, all_boxes, frames = mask([tube], shape), boxes(tube, shape), shown(tube, shape)
    pitch = STRIP_W / SHOWN
    width = ROW - 0.7 if len(clip) == 1 else pitch - 0.1
    height = width * min(1, shape[1] / shape[2])
    for i, t in enumerate(frames):
        axes = _axes(figure, STRIP_X + pitch * i, top + 0.45, width, height)
        dark = clip[t].mean(axis=-1, keepdims=True) * 0.33 + 20
        axes.imshow(np.where(read[t][..., None], clip[t], dark).astype(np.uint8), extent=(0, shape[2], shape[1], 0))
        on = np.unique(all_boxes[(all_boxes[:, 0, 0] <= t) & (t < all_boxes[:, 0, 1])][:, 1:], axis=0)
        _outline(axes, on, colour)
        axes.set_anchor("W")
        note = "" if len(on) else "  not read"
        _text(figure, STRIP_X + pitch * i, top + 0.32, f"frame {t}{note}", size=10, color=INK if len(on) else SOFT)
    if len(clip) > 1:
        axes = _axes(figure, STRIP_X, top + 0.5 + height, STRIP_W - 0.1, 0.55)
        _time_axis(axes, np.unique(all_boxes[:, 0], axis=0), frames, shape[0], colour)


def _outline(axes: Axes, on: Array, colour: str) -> None:
    """Rectangles (n, 2, 2) of (height, width) around pixels."""
    from matplotlib.collections import PolyCollection

    corners = [[(w0, h0), (w1, h0), (w1, h1), (w0, h1)] for (h0, h1), (w0, w1) in on]
    width = 1.3 if len(on) <= 100 else 0.7
    axes.add_collection(PolyCollection(corners, facecolors="none", edgecolors=colour, linewidths=width))


def _time_axis(axes: Axes, windows: Array, frames: list[int], length: int, colour: str) -> None:
    """Every window of time that a tube reads, as a bar; the shown frames are marked."""
    from matplotlib.ticker import MaxNLocator

    rows = lanes(windows)
    for y, lane in enumerate(rows):
        axes.barh(y, length, height=0.8, color=PALE)
        starts = np.array([start for start, _ in lane])
        stops = np.array([stop for _, stop in lane])
        axes.barh(
            y, stops - starts, left=starts, height=0.8, color=colour, edgecolor="white", linewidth=0.8, align="center"
        )
    marks = np.array(frames) + 0.5
    axes.plot(marks, np.full(len(marks), -0.8), "v", color=INK, markersize=5, clip_on=False)
    axes.set_axis_on()
    axes.set(xlim=(0, length), ylim=(max(len(rows), 2) - 0.5, -1.1), yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.tick_params(colors=SOFT, labelsize=9, length=3)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)


# The kernels ------------------------------------------------------------------------------------------------------


def _kernels(figure: Figure, top: float, tube: TubeSpec, weight: Array | None, given: bool) -> None:
    """Film strips of the strongest filters, as many as fit."""
    height = ROW - 0.75
    if weight is None:
        axes = _axes(figure, KERNELS_X, top + 0.45, KERNELS_W, height)
        axes.add_patch(_panel())
        text = "no kernel of this tube was given" if given else "no weights were given: geometry only"
        axes.text(0.5, 0.5, text, size=11, color=SOFT, ha="center", va="center")
        return
    kt, kh, kw = tube.kernel
    gap, lead = (0.2, 0.2) if kt == 1 else (0.4, 0.25)  # in heights of one picture, like `wide`
    wide = kt * kw / kh + gap
    across = max(1, round((KERNELS_W / (0.42 if kt == 1 else 0.3) + gap) / wide))
    cell = min(0.45, KERNELS_W / (across * wide - gap))  # inches
    down = max(1, int((height / cell + lead) / (1 + lead)))
    pictures = strongest(weight, across * down)
    sheet = contact_sheet(pictures, across, gap, lead)
    scale = cell / sheet[1]
    rows, columns = sheet[0].shape[:2]
    axes = _axes(figure, KERNELS_X, top + 0.45, columns * scale, rows * scale)
    axes.imshow(sheet[0], interpolation="antialiased", aspect="auto")
    _text(figure, KERNELS_X, top + 0.32, f"{len(pictures)} of {len(weight)} filters", size=10, color=INK)


def _panel() -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((0, 0), 1, 1, facecolor="#f6f8fa", edgecolor=PALE)


def contact_sheet(pictures: Array, across: int, gap: float, lead: float) -> tuple[Array, int]:
    """Film strips (n, kt, kh, kw, 3) laid out in rows of `across` on white; gaps in heights of one picture.

    Returns:
        The sheet (rows, columns, 3) and how many of its rows make the height of one picture.
    """
    zoom = max(1, round(48 / pictures.shape[2]))  # so that gaps can be narrower than one weight
    pictures = pictures.repeat(zoom, axis=2).repeat(zoom, axis=3)
    n, kt, kh, kw, _ = pictures.shape
    step_x, step_y = kt * kw + round(gap * kh), kh + round(lead * kh)
    down = math.ceil(n / across)
    sheet = np.ones((down * step_y, min(n, across) * step_x, 3))
    for i, picture in enumerate(pictures):
        y, x = i // across * step_y, i % across * step_x
        sheet[y : y + kh, x : x + kt * kw] = picture.transpose(1, 0, 2, 3).reshape(kh, kt * kw, 3)
    return sheet[: -round(lead * kh) or None, : -round(gap * kh) or None], kh
