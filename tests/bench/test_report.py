"""The page: what it says is what the documents say, it needs nothing but itself, and a real browser shows it well."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube import cli
from edgetube.bench import figures, report
from edgetube.errors import InputError
from edgetube.video import Frames

ROOT = Path(__file__).parents[2]


def strip(name: str, count: int) -> Frames:
    rng = np.random.default_rng(len(name))
    return rng.integers(0, 256, (6, 8, 3), np.uint8).repeat(20, axis=0).repeat(20, axis=1)[None].repeat(count, axis=0)


@pytest.fixture(scope="module")
def made(example: ModuleType) -> report.Report:
    return report.assemble(example.parity(), example.bench(), strip, ["edgetube report out"], example.agree())


@pytest.fixture(scope="module")
def page(made: report.Report) -> str:
    return report.html(made)


class TestRows:
    def test_the_order_is_pytorch_then_the_fastest_then_the_untimed(
        self, made: report.Report, example: ModuleType
    ) -> None:
        timed = sorted((ms, name) for name, (_, ms, *_) in example.TARGETS.items() if ms)
        untimed = sorted(name for name, (_, ms, *_) in example.TARGETS.items() if not ms)
        assert [row["short"] for row in made.rows] == ["PyTorch", *(name for _, name in timed), *untimed]

    def test_every_key_is_documented(self, made: report.Report) -> None:
        section = (ROOT / "docs" / "report.md").read_text("utf-8").split("### `bundles[]`")[1]
        names = {n for line in section.splitlines() if line[:3] == "| `" for n in re.findall(r"`(\w+)`", line[: line.rindex(" | ")])}  # fmt: skip  # noqa: E501
        assert all(set(row) == names for row in made.rows)

    def test_a_missed_gate_is_the_verdict(self, made: report.Report) -> None:
        assert [row["short"] for row in made.rows if row["verdict"] == "differs"] == ["coreml-w4"]
        assert made.rows[0]["verdict"] == "reference"

    def test_the_reference_has_its_own_top1_where_it_was_timed(self, made: report.Report, example: ModuleType) -> None:
        parity, bench = example.parity(), example.bench()
        assert made.rows[0]["top1"] == parity["bundles"][0]["top1_reference"]
        parity["reference"]["runtime"] = "another"
        assert report.assemble(parity, bench, strip).rows[0]["top1"] is None

    def test_the_headline_counts(self, made: report.Report) -> None:
        assert report.headline(made) == (
            "10 of 11 targets answer like PyTorch; openvino-int8 is the fastest of the 6 that run here, 2.4 ms a call, "
            "7.3 times as fast as PyTorch."
        )

    @pytest.mark.parametrize(
        ("noises", "speedup", "said"),
        [
            ({}, 17.5 / 2.4, "2.4 ms a call, 7.3 times as fast as PyTorch."),
            ({"demo.openvino-int8": 0.06}, None, "2.4 ms a call."),
            ({"PyTorch": 0.3}, None, "2.4 ms a call."),
        ],
    )
    def test_a_ratio_is_withheld_while_noise_is_larger_than_it_can_bear(
        self, example: ModuleType, noises: dict[str, float], speedup: float | None, said: str
    ) -> None:
        bench = example.bench()
        for row in bench["bundles"]:
            row["noise"] = noises.get(row["name"], row["noise"])
        found = report.assemble(example.parity(), bench, strip)
        best = next(row for row in found.rows if row["short"] == "openvino-int8")
        assert best["speedup"] == (speedup if speedup is None else pytest.approx(speedup))
        assert report.headline(found).endswith(said)
        assert (">7.3x<" in report.html(found)) == (speedup is not None)

    @pytest.mark.parametrize(("factor", "kept"), [(1.03, False), (0.97, False), (1.05, True), (0.95, True)])
    def test_a_ratio_that_noise_makes_or_breaks_is_none(self, example: ModuleType, factor: float, kept: bool) -> None:
        """Both medians are known to 2 %."""
        bench = example.bench()
        for row in bench["bundles"]:
            if row["p50_ms"] and row["target"]:
                row["p50_ms"] = 17.5 / factor
        rows = report.assemble(example.parity(), bench, strip).rows
        ratios = {row["speedup"] and round(row["speedup"], 6) for row in rows if row["p50_ms"] and row["target"]}
        assert ratios == {factor if kept else None}

    def test_the_headline_names_no_fastest_that_noise_hides(self, example: ModuleType) -> None:
        bench = example.bench()
        for row in bench["bundles"]:
            if row["name"] == "demo.openvino-fp16":
                row["p50_ms"] = 2.45
        found = report.headline(report.assemble(example.parity(), bench, strip))
        assert "of the 6 that run here openvino-int8 and openvino-fp16 are the fastest, too close to tell" in found

    def test_the_worst_clips_are_those_where_a_target_differs(self, made: report.Report) -> None:
        assert list(made.strips) == ["evaluation/coffee/0003"]  # the others of the example answer the same

    @pytest.mark.parametrize(("score", "shown"), [(0.61, False), (0.602, False), (0.6, True), (0.9, True)])
    def test_a_clip_differs_when_its_class_or_its_percentage_does(
        self, example: ModuleType, score: float, shown: bool
    ) -> None:
        parity = example.parity()
        for row in parity["bundles"]:
            for clip in row["worst"]:
                clip |= {"flipped": False, "bundle": {"label": "zoom-in", "score": score}}
        found = report.assemble(parity, example.bench(), strip)
        assert bool(found.strips) == shown
        assert ("The worst clips" in report.html(found)) == shown

    def test_the_worst_clips_are_frames(self, made: report.Report) -> None:
        assert all(frames.shape == (report.FRAMES, 120, 160, 3) for frames in made.strips.values())

    def test_the_markdown_has_a_line_a_row(self, made: report.Report) -> None:
        lines = [line for line in report.markdown(made).splitlines() if line.startswith("|")]
        assert len(lines) == 2 + len(made.rows)
        assert "| coreml-w4 | differs (emulated) | 93.0 % |" in report.markdown(made)
        assert {line.count("|") for line in lines} == {10}

    def test_the_json_is_json(self, made: report.Report) -> None:
        assert json.loads(json.dumps(made.to_json()))["bundles"][0]["name"] == "PyTorch"

    def test_documents_without_labels_layers_or_times_also_make_a_page(self, example: ModuleType) -> None:
        parity, bench = example.parity(), example.bench()
        parity["layers"], parity["data"]["labelled"] = [], 0
        bench["bundles"] = [row for row in bench["bundles"] if row["p50_ms"] is None]
        for row in parity["bundles"]:
            row |= {"top1": None, "top1_reference": None, "drop": None, "worst": []}
        text = report.html(report.assemble(parity, bench, strip))
        assert "Accuracy and latency" not in text
        assert "Where the error comes from" not in text
        assert "The worst clips" not in text
        assert "Agreement between targets" in text


class TestPage:
    def test_it_needs_nothing_but_itself(self, page: str) -> None:
        """No address but names of XML, no script; every image is in the page."""
        addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
        assert addresses == {"http://www.w3.org/1999/xlink"}
        assert "<script" not in page
        assert set(re.findall(r'src="(\w+:)', page)) == {"data:"}
        assert not re.search(r"url\((?!#)|@import", page)

    def test_drawings_take_the_colours_of_the_page(self, page: str) -> None:
        for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
            assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000"}
            assert "DejaVu" not in svg
        assert all(f"--{name}:" in page for name in figures.VARIABLES.values())
        assert all(page.count(f"--{name}:") == 2 for name in figures.VARIABLES.values())

    def test_identifiers_are_unique(self, page: str) -> None:
        inside = re.findall(r'<clipPath id="([^"]+)"', page)
        assert len(set(inside)) == len(inside) > 0

    def test_what_comes_from_outside_is_escaped(self, example: ModuleType) -> None:
        parity = example.parity()
        parity["reference"]["name"] = parity["bundles"][0]["worst"][0]["label"] = "<script>alert(1)</script>"
        text = report.html(report.assemble(parity, example.bench(), strip))
        assert "<script>" not in text
        assert "&lt;script&gt;" in text

    def test_it_is_the_same_every_time(self, made: report.Report, page: str) -> None:
        assert report.html(made) == page

    def test_the_narrow_matrix_has_all_its_numbers(self, example: ModuleType) -> None:
        agreement = example.parity()["agreement"]
        wide, narrow = re.findall(r"<svg.*?</svg>", figures.heat(**agreement), re.DOTALL)
        expected = sorted(
            "100" if share == 1 else f"{100 * share:.1f}"
            for y, line in enumerate(agreement["matrix"])
            for x, share in enumerate(line)
            if x != y
        )
        for drawing in (wide, narrow):
            assert sorted(re.findall(r">([\d.]+)</text>", drawing)) == expected

    def test_one_clip_through_every_runtime(self, made: report.Report, page: str) -> None:
        """11 answered, 10 of them show layers; one departs from the 9 others."""
        assert made.agree is not None
        section = page.split("One clip, every runtime")[1].split("</section>")[0]
        wide, narrow = re.findall(r"<svg.*?</svg>", section, re.DOTALL)
        values = [100 * pair["difference"] for pair in made.agree["pairs"] for _ in range(2)]  # of both orders
        assert len(values) == 11 * 10
        for drawing in (wide, narrow):
            texts = re.findall(r">(&lt;)?([\d.]+)</text>", drawing)
            assert len(texts) == len(values)
            for value, (below, text) in zip(
                sorted(values), sorted(texts, key=lambda t: (not t[0], float(t[1]))), strict=True
            ):
                assert value < 0.01 if below else float(text) == pytest.approx(value, abs=0.0051, rel=0.006)
            assert "trt-fp16" not in drawing
        assert "on evaluation/coffee/0003" in section
        assert "<b>coreml-w4</b> departs from all others that show layers, at blocks.2.mlp.fc2" in section
        assert "they depart at" not in section
        assert "evaluation/coffee/0003 (zoom-in), one of" in " ".join(section.split())
        assert "36 of 55 pairs depart at no layer" in section
        assert "trt-fp16: no GPU" in section

    def test_pairs_of_no_outlier_are_listed(self, example: ModuleType) -> None:
        agree = example.agree() | {"outliers": []}
        text = report.html(report.assemble(example.parity(), example.bench(), strip, [], agree))
        assert text.count("they depart at blocks.2.mlp.fc2, 11 dB below") == 9
        assert "onnx-fp32 / coreml-w4: they depart" in text

    def test_a_page_without_that_clip(self, example: ModuleType) -> None:
        found = report.assemble(example.parity(), example.bench(), strip)
        assert found.to_json()["agree"] is None
        assert "One clip, every runtime" not in report.html(found)

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.0, "0"),
            (1e-9, "<.01"),
            (0.00012, "0.01"),
            (0.0045, "0.45"),
            (0.031, "3.1"),
            (0.314, "31.4"),
            (2.0, "200"),
        ],
    )
    def test_a_difference_has_four_letters_at_most(self, value: float, text: str) -> None:
        assert figures._share(value) == text

    def test_the_clip_is_the_one_that_differs_most(self, example: ModuleType) -> None:
        parity = example.parity()
        assert report.worst_clip(parity) == "evaluation/coffee/0003"  # flipped
        for row in parity["bundles"]:
            row["worst"] = [clip | {"flipped": False} for clip in row["worst"]]
        largest = max((clip for row in parity["bundles"] for clip in row["worst"]), key=lambda clip: clip["kl"])
        assert report.worst_clip(parity) == largest["name"]
        for row in parity["bundles"]:
            row["worst"] = []
        assert report.worst_clip(parity) is None

    @pytest.mark.parametrize("lowest", [0.2, 0.97, 0.995, 1.0])
    def test_no_axis_runs_past_a_share_of_all(self, made: report.Report, lowest: float) -> None:
        rows = [row | {"top1": share} for row, share in zip(made.rows, (1.0, lowest), strict=False)]
        for drawing in re.findall(r"<svg.*?</svg>", figures.pareto(rows, "top1", "top-1, %"), re.DOTALL):
            vertical = drawing[drawing.index('id="matplotlib.axis_2"') :]
            marks = [float(mark) for mark in re.findall(r">(−?[\d.]+)</text>", vertical)]
            assert len(marks) > 1
            assert 0 <= min(marks) < 100 * lowest
            assert max(marks) <= 100

    @pytest.mark.parametrize(("slower", "line"), [(1.0, True), (0.98, False)])
    def test_a_line_is_named_only_where_it_is_drawn(self, example: ModuleType, slower: float, line: bool) -> None:
        """Two that run here: the slower one is better, or is beaten in both."""
        parity, bench = example.parity(), example.bench()
        best = {"demo.openvino-int8": 0.99, "demo.openvino-fp16": slower}
        parity["bundles"] = [row | {"top1": best[row["name"]]} for row in parity["bundles"] if row["name"] in best]
        bench["bundles"] = [row for row in bench["bundles"] if row["name"] in best]
        found = report.assemble(parity, bench, strip)
        text = report.html(found)
        assert ("The dashed line joins" in text) == line
        assert ("stroke-dasharray" in figures.pareto(found.rows, "top1", "top-1, %")) == line
        assert "▲ int8" in text
        assert "● fp32" not in text

    def test_rings_are_named_only_where_there_are_some(self, example: ModuleType) -> None:
        parity = example.parity()
        assert "A ring" in report.html(report.assemble(parity, example.bench(), strip))
        parity["layers"] = [curve | {"first_jump": None} for curve in parity["layers"]]
        assert "A ring" not in report.html(report.assemble(parity, example.bench(), strip))

    def test_the_front_is_what_nothing_beats(self) -> None:
        rng = np.random.default_rng(0)
        rows = [{"p50_ms": float(a), "top1": float(b)} for a, b in rng.integers(0, 6, (40, 2))]
        for row in rows:
            worse = [o for o in rows if o["p50_ms"] <= row["p50_ms"] and o["top1"] >= row["top1"]]
            alone = all(o["p50_ms"] == row["p50_ms"] and o["top1"] == row["top1"] for o in worse)
            assert figures._unbeaten(row, rows, "top1") == alone


@pytest.mark.slow
def test_a_browser_shows_it_well(page: str, browser: ModuleType, tmp_path: Path) -> None:
    """At both widths, light and dark: nothing sticks out, nothing is loaded, no message, and text can be read."""
    file = report.save(page, tmp_path / "report.html")
    with browser.Browser(tmp_path / "profile") as chromium:
        for width in (1280, 400):
            shots = []
            for scheme in ("light", "dark"):
                chromium.open(file, width, scheme)
                assert chromium.evaluate("document.documentElement.scrollWidth") == width
                sticking = chromium.evaluate(
                    "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > "
                    f"{width} + 1).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"
                )
                assert sticking == []
                shown = "wide" if width > 900 else "narrow"
                visible = "[...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width > 0)"
                assert chromium.evaluate(f"{visible}.length") == 5
                assert chromium.evaluate(f"{visible}.every(e => e.parentElement.className == '{shown}')")
                smallest = chromium.evaluate(
                    f"Math.min(...{visible}.flatMap(s => [...s.querySelectorAll('text')]).map("
                    "t => t.getBoundingClientRect()).map(r => Math.min(r.width, r.height)).filter(x => x > 0))"
                )
                assert smallest >= 6  # pixels: of the narrowest single letter or digit
                asked = [
                    event["params"]["request"]["url"]
                    for event in chromium.events
                    if event["method"] == "Network.requestWillBeSent"
                ]
                assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
                told = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
                assert [event for event in chromium.events if event["method"] in told] == []
                assert contrast(chromium) >= 4.5
                shots.append(chromium.screenshot(tmp_path / f"{width}-{scheme}.png").read_bytes())
            assert shots[0] != shots[1]


def contrast(chromium: Any) -> float:
    """The smallest contrast of letters and their ground (WCAG 2, 1.4.3) in the table, the chips and the text."""
    colours = chromium.evaluate(
        "[...document.querySelectorAll('h1, h2, p, td, .chip, dt, dd, small, figcaption')].map(e => { let g = e;"
        " while (getComputedStyle(g).backgroundColor == 'rgba(0, 0, 0, 0)' && g.parentElement) g = g.parentElement;"
        " return [getComputedStyle(e).color, getComputedStyle(g).backgroundColor]; })"
    )

    def luminance(colour: str) -> float:
        levels = np.array([int(v) for v in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    pairs = {tuple(map(luminance, pair)) for pair in colours}
    return min((max(pair) + 0.05) / (min(pair) + 0.05) for pair in pairs)


class TestFolders:
    def test_what_is_no_folder_of_bundles(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is not a folder"):
            report.find(tmp_path / "none")
        with pytest.raises(InputError, match="holds no bundles; make some with: edgetube export"):
            report.find(tmp_path)

    def test_bundles_of_two_checkpoints_are_not_compared(self, tiny_bundle: Path, tmp_path: Path) -> None:
        for name, digest in (("one.onnx-fp32", "1"), ("two.onnx-fp32", "2")):
            shutil.copytree(tiny_bundle, tmp_path / name)
            manifest = json.loads((tiny_bundle / "edgetube.json").read_text())
            manifest |= {"checkpoint": manifest["checkpoint"] | {"sha256": digest * 64}}
            (tmp_path / name / "edgetube.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="different checkpoints or inputs"):
            report.find(tmp_path)

    def test_a_document_is_used_again_only_while_it_is_true(
        self, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = [bundles.load(tiny_bundle)]
        made: list[int] = []

        def make() -> dict[str, Any]:
            made.append(len(made))
            return {"number": made[-1]}

        def ask(bundles_: Any, **how: Any) -> Any:
            return report.kept(tmp_path, "bench", bundles_, how, make)["number"]

        assert [ask(found, seconds=1.0), ask(found, seconds=1.0)] == [0, 0]
        assert [ask(found, seconds=2.0), ask(found, seconds=2.0)] == [1, 1]
        other = bundles.Bundle(**{**vars(found[0]), "files": {"model.onnx": bundles.FileRecord(1, "0" * 64)}})
        assert ask([other], seconds=2.0) == 2
        assert ask([other, *found], seconds=2.0) == 3
        monkeypatch.setattr("edgetube.bench.report.machine.processor", lambda: "another one")
        assert ask([other, *found], seconds=2.0) == 4


@pytest.mark.slow
def test_a_folder_becomes_a_page(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the bundle to the page by the command, and again from what was kept."""
    out = tmp_path / "out"
    shutil.copytree(tiny_bundle, out / "tiny.onnx-fp32")
    line = ["report", str(out), "--clips", "9", "--seconds", "0.2"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*line, "--json"])
    first = capsys.readouterr()
    assert (stopped.value.code or 0) == 0
    document = json.loads(first.out)
    assert [row["verdict"] for row in document["bundles"]] == ["reference", "agrees"]
    assert document["agree"]["difference"]["names"] == ["reference", "tiny.onnx-fp32"]
    assert document["agree"]["difference"]["matrix"][0][1] < 1e-5
    assert "turns: done" in first.err
    page = (out / "report.html").read_text("utf-8")
    assert "tiny.onnx-fp32" in page or ">onnx-fp32" in page
    assert "The worst clips" not in page  # it answers the same everywhere

    with pytest.raises(SystemExit):
        cli.main([*line, "--markdown", "--out", str(tmp_path / "other.html")])
    again = capsys.readouterr()
    assert "turns: done" not in again.err
    assert again.out.count("\n| ") == 3
    assert (tmp_path / "other.html").read_text("utf-8").count("<svg") == page.count("<svg")

    with pytest.raises(SystemExit):
        cli.main(line)
    table = capsys.readouterr().out
    assert all(f"{column}" in table for column in report.COLUMNS)
    assert re.search(r"onnx-fp32 +agrees +100\.0 %", table)
    assert "1 of 1 targets answer like PyTorch" in table
