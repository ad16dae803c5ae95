"""docs/checkpoints.md lists what there is: options, and fields of the file of --spec."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import typer

from edgetube import cli
from edgetube.formats.reading.files import ReadOptions
from edgetube.formats.reading.said import INPUT, MODEL

PAGE = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text("utf-8")


def rows(after: str) -> set[str]:
    """Names in the first column of the first table after a text."""
    table = PAGE.partition(after)[2].split("|---|---|\n", 1)[1].split("\n\n")[0]
    return {name for line in table.splitlines() for name in re.findall(r"`([^`]+)`", line.split("|")[1])}


def test_every_option_of_reading() -> None:
    options = {name.split()[0].removeprefix("--").replace("-", "_") for name in rows("## What the options say")}
    assert options - {"no_ema"} == {field.name for field in fields(ReadOptions)}


def test_every_field_of_the_model_and_the_input() -> None:
    assert rows("Fields of `model`") == set(MODEL)
    assert rows("Fields of `input`") == set(INPUT)


def test_the_options_that_it_names_are_those_of_export() -> None:
    (export,) = (one for name, one in typer.main.get_command(cli.app).commands.items() if name == "export")  # type: ignore[attr-defined]
    known = {option for parameter in export.params for option in (*parameter.opts, *parameter.secondary_opts)}
    used = set(re.findall(r"--[a-z][a-z-]*", PAGE))
    assert used <= known | {"--json"}
    assert "--pool-frames" in used
