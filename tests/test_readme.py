"""The README does what it says: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from edgetube import cli, demo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.+?)```", README, re.DOTALL)
COMMANDS = [c for _, code in BLOCKS for c in re.findall(r"^edgetube (.+?)(?:\s+#.*)?$", code, re.MULTILINE)]

VIDEOS = "edgetube/demo/videos"

BRIEFLY = {
    "parity": ["--clips", "9"],
    "bench": ["--seconds", "0.2", "--starts", "1"],
    "report": ["--clips", "9", "--seconds", "0.2"],
}
"""Options that make a command of the README quicker."""


def test_it_is_short_enough_to_be_read() -> None:
    assert len(README.splitlines()) < 150


@pytest.mark.slow
def test_the_commands_then_the_python_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that has what a clone has where the README looks for it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo.videos()["pan-left"].parent, VIDEOS)
    assert len(COMMANDS) == 9
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command.split(), *BRIEFLY.get(command.split()[0], [])])
        assert not stopped.value.code, capsys.readouterr().err
    (code,) = [code for language, code in BLOCKS if language == "python"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # `edgetube` here holds videos alone
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "pan-left"
    assert sum("pan-left" in line for line in lines[1:]) > len(lines[1:]) / 2 > 0


def test_what_it_names_is_in_a_clone() -> None:
    assert (ROOT / VIDEOS / "pan-left.mp4").is_file()
    assert VIDEOS in README
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_install_lines_name_what_the_commands_need_and_no_index_that_has_no_edgetube() -> None:
    """Every extra that a line or the table names exists, and the first line brings what all the commands import."""
    known = metadata.metadata("edgetube").get_all("Provides-Extra") or []
    (line,) = re.findall(r'^pip install -e "\.\[([\w,]+)\]" -c constraints\.txt$', README, re.MULTILINE)
    asked = line.split(",")
    table = re.findall(r"extra `(\w+)`", README)
    assert len(table) >= 5
    assert set(asked) | set(table) <= set(known)
    assert "report" in asked  # the page, and the plot of `inspect`
    assert "export" in asked
    assert not re.search(r"pip install '?\"?edgetube", README)
    assert "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" in README  # PyTorch's own


PAGES = [Path("README.md"), *sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))]


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What links to a page's headings end with, as GitHub makes it of their words."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", title.lower())).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", prose(ROOT / page)):
        if not target.startswith("http"):
            there = (ROOT / page.parent / target) if target else ROOT / page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), f"{target}#{anchor}"
