"""The README does what it says: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgetube import cli, demo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.+?)```", README, re.DOTALL)
COMMANDS = [c for _, code in BLOCKS for c in re.findall(r"^edgetube (.+?)(?:\s+#.*)?$", code, re.MULTILINE)]

BRIEFLY = {
    "parity": ["--clips", "9"],
    "bench": ["--seconds", "0.2", "--starts", "1"],
    "report": ["--clips", "9", "--seconds", "0.2"],
}
"""Options that make a command of the README quicker."""


def test_it_is_short_enough_to_be_read() -> None:
    assert len(README.splitlines()) < 150


def test_the_commands_then_the_python_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(demo.videos()["pan-left"], "clip.mp4")
    assert len(COMMANDS) == 8
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command.split(), *BRIEFLY.get(command.split()[0], [])])
        assert not stopped.value.code, capsys.readouterr().err
    (code,) = [code for language, code in BLOCKS if language == "python"]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "pan-left"
    assert sum("pan-left" in line for line in lines[1:]) > len(lines[1:]) / 2 > 0


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
