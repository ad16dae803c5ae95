"""The figures of the report: SVG with the fonts and colours of the page around it.

Each figure is drawn for a wide and for a narrow page, so that its text does not shrink. Colours are variables of the
page's style sheet (`style.css`), for light and dark mode.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetube.targets import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Colours that stand for those of the page: matplotlib writes them as they are, `_inline` puts the variables in.
INK, SOFT, LINE, PANEL, HEAT = "#000001", "#000002", "#000003", "#000004", "#000005"
SERIES = tuple(f"#0000{index:02x}" for index in range(0x10, 0x17))
VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", PANEL: "panel", HEAT: "heat"} | {
    colour: f"c{index}" for index, colour in enumerate(SERIES)
}

MARKERS = {"fp32": "o", "fp16": "s", "int8": "^", "w8a16": "v", "w8": "D", "w4": "p"}
SIGNS = {"fp32": "●", "fp16": "■", "int8": "▲", "w8a16": "▼", "w8": "◆", "w4": "⬟"}
"""The markers as letters."""
DASHES = {
    "fp32": "-",
    "fp16": (0, (5, 1.5)),
    "int8": (0, (2, 1)),
    "w8a16": (0, (3, 1, 1, 1)),
    "w8": (0, (1, 1)),
    "w4": (0, (4, 1, 1, 1)),
}

WIDE, NARROW = 10.2, 3.7
"""Width of a figure in inches; the page shows about 100 pixels per inch."""

ABOVE = 0.42
"""Inches above the axes of quality over latency, for the names of points that are near 100 %."""

DIGITS = 2.4
"""Widths of `99.9` in the size of its letters, with room at both sides."""

NAMED = 8
"""So many points of a sweep all have their names in its figure. Of more, those that were found and those of the trained
model have them; the others are faint and without intervals, which would hide the rest."""

Draw = Callable[["Figure", bool], None]


@dataclass(frozen=True)
class Style:
    """The style of one bundle in all figures: a colour for its runtime, a marker and a dash for its precision."""

    colour: str
    marker: str
    dash: Any


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """By the rows' names; the part of a target's name before the dash is its runtime."""
    families = list(dict.fromkeys(family(row) for row in rows))
    return {
        row["name"]: Style(
            SERIES[families.index(family(row)) % len(SERIES)],
            MARKERS.get(row["precision"], "o"),
            DASHES.get(row["precision"], "-"),
        )
        for row in rows
    }


def family(row: Row) -> str:
    """The runtime of a row: `onnx` of `onnx-int8`; the row's name where it has no target."""
    return str(row["target"] or row["name"]).partition("-")[0]


def pareto(rows: Sequence[Row], quality: str, title: str) -> str:
    """Quality over latency; a line joins the Pareto-optimal bundles."""
    return both(_over_latency(rows, front(rows, quality), quality, title), 3.6, 3.6, f"{title} over latency")


def operating_points(rows: Sequence[Row], quality: str, title: str) -> str:
    """The same of the points of a sweep, as a file of its own: with intervals, and a line through those on `front`."""
    best = sorted((row["p50_ms"], 100 * row[quality]) for row in rows if row["front"])
    named = [row for row in rows if row["front"] or row["winner"] or row["macs_ratio"] == 1]
    draw = _over_latency(rows, best, quality, title, {row["name"] for row in (rows if len(rows) <= NAMED else named)})
    return alone(_svg(draw, WIDE, 5.2, True, f"{title} over latency"))


def alone(svg: str) -> str:
    """A figure as a file: with the colours and fonts of the page."""
    style = (Path(__file__).parent / "style.css").read_text("utf-8")
    colours = style[style.index(":root {") : style.index("* {")]
    start, _, rest = svg.partition(">")
    root = start.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{root}><style>{colours}svg {{ background: var(--panel); }}</style>{rest}"


def _over_latency(
    rows: Sequence[Row],
    best: Sequence[tuple[float, float]],
    quality: str,
    title: str,
    intervals: Collection[str] = (),
) -> Draw:
    """Draws quality over latency; a line joins `best`.

    Args:
        intervals: names of rows that are shown with intervals, `{quality}_low` and `_high`; others are then faint and
            have no name, and a legend says what colours and markers are. Empty: all are named, without intervals.
    """
    look = styles(rows)
    points = [row for row in rows if row["p50_ms"] is not None and row[quality] is not None]
    told = [row for row in points if row["name"] in intervals] if intervals else points

    def draw(figure: Figure, wide: bool) -> None:
        axes = _axes(figure, (0.78 if intervals else 0.62, 0.52, 0.15, ABOVE))
        times, values = [row["p50_ms"] for row in points], [100 * row[quality] for row in points]
        ends = [100 * row[f"{quality}_{end}"] for row in told for end in ("low", "high")] if intervals else []
        low, high = min(values + ends), max(values + ends)
        room = (0.05 if intervals else 0.3) * max(high - low, 1.0)
        # Shares end at 100 %: the names of the best points stand above the axes.
        axes.set(xscale="log", ylim=(max(0.0, low - room), min(100.0, high + room)))
        axes.set_xlim(min(times) / 1.35, max(times) * 1.35)
        if len(best) > 1:
            axes.step(*zip(*best, strict=True), where="post", color=SOFT, lw=1.2, linestyle=(0, (2, 2)), zorder=1)
        for row in points:
            style, named = look[row["name"]], row in told
            x, y = row["p50_ms"], 100 * row[quality]
            if named:
                across = [[x - row["p10_ms"]], [row["p90_ms"] - x]]
                up = [[y - 100 * row[f"{quality}_low"]], [100 * row[f"{quality}_high"] - y]] if intervals else None
                bars = axes.errorbar(x, y, xerr=across, yerr=up, color=style.colour, lw=1)
                for part in bars.get_children():
                    part.set(alpha=0.45)  # cut at the axes, which very noisy times would leave
            axes.plot(
                x, y, style.marker, color=style.colour, markersize=8 if named else 6, alpha=1 if named else 0.4,
                markeredgecolor=PANEL, zorder=3 if named else 2, clip_on=False,
            )  # fmt: skip
        _label(axes, [(row["p50_ms"], 100 * row[quality], row["short"]) for row in told])
        _log_ticks(axes, times)
        axes.set_xlabel("latency of one call, median, ms")
        axes.set_ylabel(title)
        if intervals:
            _legend(figure, points, look)

    return draw


def _legend(figure: Figure, rows: Sequence[Row], look: Mapping[str, Style]) -> None:
    """What colours and markers are, in one line at the bottom."""
    from matplotlib.lines import Line2D

    colours = {family(row): look[row["name"]].colour for row in rows}
    markers = {row["precision"]: look[row["name"]].marker for row in rows}
    handles = [Line2D([], [], linewidth=4, color=colour, label=name) for name, colour in colours.items()]
    handles += [
        Line2D([], [], linestyle="", marker=marker, color=SOFT, label=name)
        for name, marker in markers.items() if len(markers) > 1
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="lower right", ncols=len(handles), frameon=False, labelcolor=INK, fontsize=9,
        handlelength=1, columnspacing=1.2,
    )  # fmt: skip


def front(rows: Sequence[Row], quality: str) -> list[tuple[float, float]]:
    """(milliseconds, per cent) of the Pareto-optimal rows, fastest first."""
    known = [row for row in rows if row["p50_ms"] is not None and row[quality] is not None]
    return sorted({(row["p50_ms"], 100 * row[quality]) for row in known if _unbeaten(row, known, quality)})


def _unbeaten(row: Row, rows: Sequence[Row], quality: str) -> bool:
    def beats(other: Row) -> bool:
        better = other["p50_ms"] <= row["p50_ms"] and other[quality] >= row[quality]
        return better and (other["p50_ms"], other[quality]) != (row["p50_ms"], row[quality])

    return not any(map(beats, rows))


def sizes(rows: Sequence[Row]) -> str:
    """The size of every artifact, MB."""
    look = styles(rows)
    known = [row for row in rows if row["target"] and row["size_mb"] is not None]

    def draw(figure: Figure, wide: bool) -> None:
        axes = _axes(figure, (1.3, 0.1, 0.55, 0.05))
        axes.barh(
            range(len(known)), [row["size_mb"] for row in known], color=[look[row["name"]].colour for row in known],
            height=0.62,
        )  # fmt: skip
        for y, row in enumerate(known):
            axes.text(row["size_mb"], y, f"  {row['size_mb']:.3g}", va="center", color=INK, size=9)
        axes.set_yticks(range(len(known)), [row["short"] for row in known])
        axes.tick_params(axis="y", colors=INK, length=0)
        axes.set_xticks([])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()

    height = 0.27 * len(known) + 0.15
    return both(draw, height, height, "size of the artifacts in MB")


def heat(names: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
    """Agreement of every pair; the less they agree, the stronger the colour."""
    reach = max(1 - min(map(min, matrix)), 0.02)
    strengths = [[(1 - share) / reach for share in line] for line in matrix]
    texts = [["100" if share == 1 else f"{100 * share:.1f}" for share in line] for line in matrix]
    return _matrix(names, strengths, texts, "agreement between targets in per cent")


def distances(names: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> str:
    """Difference of every pair, see `edgetube.bench.agree`; the more they differ, the stronger the colour."""
    reach = max([value for line in matrix for value in line if value is not None] + [0.02])
    strengths = [[1.0 if value is None else value / reach for value in line] for line in matrix]
    texts = [["–" if value is None else _share(value) for value in line] for line in matrix]
    return _matrix(names, strengths, texts, "difference between targets in per cent of the largest logit")


def _share(value: float) -> str:
    """Per cent in at most four letters."""
    percent = 100 * value
    if 0 < percent < 0.01:
        return "<.01"
    return f"{percent:.2f}" if 0 < percent < 1 else f"{percent:.3g}"


def _matrix(
    names: Sequence[str], strengths: Sequence[Sequence[float]], texts: Sequence[Sequence[str]], label: str
) -> str:
    """A coloured table of every pair, strengths from 0 to 1; what is on its diagonal has no text."""
    count = len(names)
    left = 0.078 * max(map(len, names)) + 0.1
    cell = (NARROW - left - 0.05) / count

    def draw(figure: Figure, wide: bool) -> None:
        from matplotlib.patches import Rectangle

        axes = _axes(figure, (1.35, 0.05, 0.05, 1.15) if wide else (left, 0.05, 0.05, left))
        size = 8.0 if wide else min(8.0, 72 * cell / DIGITS)
        for y, line in enumerate(strengths):
            for x, strength in enumerate(line):
                alpha = 0.04 + 0.9 * strength
                axes.add_patch(Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, facecolor=HEAT, alpha=alpha, lw=0))
                if x != y:
                    axes.text(x + 0.5, y + 0.52, texts[y][x], ha="center", va="center", color=INK, size=size)
        axes.set(xlim=(0, count), ylim=(count, 0), xticks=[i + 0.5 for i in range(count)])
        axes.set_xticklabels(names, rotation=55 if wide else 90, ha="left", rotation_mode="anchor")
        axes.set_yticks([i + 0.5 for i in range(count)], names)
        axes.xaxis.tick_top()
        axes.tick_params(colors=INK, length=0, pad=2)
        axes.grid(False)
        axes.spines[:].set_visible(False)

    high = count * max(cell, 0.18) + left + 0.05
    return both(draw, 0.32 * count + 1.2, high, label, min(WIDE, 1.4 + 0.6 * count))


def layers(rows: Sequence[Row], curves: Sequence[Row]) -> str:
    """SQNR of every layer against the reference; a ring marks the first layer where the error jumps."""
    look, short = styles(rows), {row["name"]: row["short"] for row in rows}
    shown = [curve for curve in curves if curve["curve"] and curve["name"] in look]
    longest = max(shown, key=lambda curve: len(curve["curve"]))
    order = [point["layer"] for point in longest["curve"]]
    place = {layer: index for index, layer in enumerate(order)}

    def draw(figure: Figure, wide: bool) -> None:
        lines = math.ceil(len(shown) / (5 if wide else 2))
        axes = _axes(figure, (0.62, 0.75 + 0.2 * lines, 0.15, 0.15))
        for curve in shown:
            style = look[curve["name"]]
            points = [(place[p["layer"]], p["sqnr_db"]) for p in curve["curve"] if p["layer"] in place]
            points = [(x, y) for x, y in points if y is not None]
            if not points:
                continue
            axes.plot(
                *zip(*points, strict=True), color=style.colour, linestyle=style.dash, linewidth=1.5,
                label=short[curve["name"]],
            )  # fmt: skip
            jump = place.get(curve["first_jump"])
            for x, y in points:
                if x == jump:
                    axes.plot(x, y, "o", color=style.colour, markerfacecolor="none", markersize=9, markeredgewidth=1.6)
        blocks = [(i, name) for i, name in enumerate(order) if _group(name) != _group(order[i - 1]) or i == 0]
        step = math.ceil(len(blocks) / (14 if wide else 5))
        axes.set_xticks([i for i, _ in blocks[::step]], [_group(name) for _, name in blocks[::step]])
        axes.set_xticklabels(axes.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
        axes.set_ylabel("SQNR, dB")
        axes.set_xlim(-0.5, len(order) - 0.5)
        figure.legend(
            loc="lower center", ncols=min(len(shown), 5 if wide else 2), frameon=False, labelcolor=INK, fontsize=9,
            handlelength=2.6,
        )  # fmt: skip

    lines = math.ceil(len(shown) / 2)
    return both(draw, 4.0, 3.4 + 0.2 * lines, "signal to error of every layer in dB")


def _group(layer: str) -> str:
    """The name of a layer as far as its first number, `blocks.3` of `blocks.3.mlp.fc1`; the first word of others."""
    found = re.match(r"\w+(?:\.\w+)*?\.\d+|\w+", layer)
    return found[0] if found else layer


# ------------------------------------------------------------------------------------------------------------ the paper


def both(draw: Draw, high: float, high_narrow: float, label: str, width: float = WIDE) -> str:
    """The figure for wide and for narrow pages; the style sheet shows one of them."""
    wide, narrow = _svg(draw, width, high, True, label), _svg(draw, NARROW, high_narrow, False, label)
    return f'<div class="wide" style="max-width: {100 * width:.0f}px">{wide}</div><div class="narrow">{narrow}</div>'


def _svg(draw: Draw, width: float, height: float, wide: bool, label: str) -> str:
    matplotlib = need("matplotlib", "report")
    figures = need("matplotlib.figure", "report")
    # Letters stay letters; names of clip paths differ between the drawings of a page, and repeat between runs.
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{label} {wide}",
        "font.size": 9.5,
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(settings):
        figure = figures.Figure((width, height))
        draw(figure, wide)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), label)


def _inline(text: str, label: str) -> str:
    """Convert matplotlib's SVG to a part of an HTML page with the page's fonts and colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px; font-family: var(--font)", text)
    text = re.sub(r"font-family: '[^;\"]+", "font-family: var(--font)", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    width, height = (float(value) for value in re.findall(r' (?:width|height)="([\d.]+)pt"', text)[:2])
    head = f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}"'
    return re.sub(r"<svg[^>]*>", head + ' xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1)


def _axes(figure: Figure, margins: tuple[float, float, float, float]) -> Axes:
    """Axes with margins (left, bottom, right, top) in inches."""
    width, height = figure.get_size_inches()
    left, bottom, right, top = margins
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=SOFT, which="both")
    axes.xaxis.label.set_color(SOFT)
    axes.yaxis.label.set_color(SOFT)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """1, 2, 5, 10, 20, 50, ... where there are values."""
    low, high = axes.get_xlim()
    marks = [m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)]
    axes.set_xticks(shown := [m for m in marks if low <= m <= high], [f"{m:g}" for m in shown])
    axes.minorticks_off()


def _label(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Label points; labels move up or down until none overlaps another or a point; a line joins a moved one.

    There is room for them `ABOVE` the axes.
    """
    scale = 72 / axes.figure.dpi  # from pixels to points, which is what the letters are measured in
    corners = axes.transAxes.transform([(0, 0), (1, 1)]) * scale
    (left, bottom), (right, top) = corners.tolist()
    places = [(float(x) * scale, float(y) * scale) for x, y in axes.transData.transform([(x, y) for x, y, _ in points])]
    high, taken = 11.5, [(x - 7, x + 7, y) for x, y in places]
    for (x, y), (value, height, name) in sorted(zip(places, points, strict=True)):
        half = 2.75 * len(name)
        middle = min(max(x, left + half), right - half)
        moves = [sign * (high + step * high / 2) for step in range(30) for sign in (1, -1)]
        free = (
            y + move for move in moves
            if bottom + 8 < y + move < top + 72 * ABOVE - 5
            and all(abs(y + move - at) >= high - 1 or middle + half < start or end < middle - half
                    for start, end, at in taken)
        )  # fmt: skip
        at = next(free, y + high)
        taken.append((middle - half, middle + half, at))
        axes.annotate(
            name, (value, height), (middle - x, at - y), textcoords="offset points", color=INK, size=9,
            va="center", ha="center",
            arrowprops={"arrowstyle": "-", "color": SOFT, "lw": 0.6} if abs(at - y) > 1.6 * high else None,
        )  # fmt: skip
