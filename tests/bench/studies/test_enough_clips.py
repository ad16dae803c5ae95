"""What an export would draw, in smaller numbers; models with fewer blocks and with outliers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetube.bench.studies import enough_clips
from edgetube.calibration.clips import Clips
from edgetube.model import checkpoints


def test_one_row_for_each_number(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = checkpoints.load(tiny_checkpoint).select("motion")
    rows = enough_clips.measure(checkpoint, [2, 4], 6, tmp_path)
    assert [row["clips"] for row in rows] == [2, 4]
    spec = checkpoint.spec
    assert rows[1]["rows_per_channel"] == 4 * spec.sequence / spec.hidden
    assert all(20 < row["sqnr_db"] < 80 and 20 < row["linears_db"] < 80 for row in rows)
    assert rows[0]["sqnr_db"] != rows[1]["sqnr_db"]
    shown = enough_clips.text({"machine": "m", "checkpoint": "c", "depth": 2, "judging": 6, "rows": rows})
    assert f"| 4 | {rows[1]['rows_per_channel']:.1f} | {rows[1]['sqnr_db']:.2f} |" in shown


def test_fewer_blocks_and_outliers(tiny_checkpoint: Path) -> None:
    checkpoint = checkpoints.load(tiny_checkpoint).select("motion")
    short = enough_clips.shortened(checkpoint, 1)
    assert short.spec == replace(checkpoint.spec, depth=1)
    assert len(checkpoint.model.state_dict()) > len(short.model.state_dict())
    blocks: Any = short.model.blocks
    before = blocks[0].attn.qkv.weight.detach().clone()
    enough_clips.plant_outliers(short)
    gains, width = blocks[0].norm1.weight.detach(), short.spec.width
    large = torch.zeros(width, dtype=torch.bool)
    large[[5, width // 2]] = True
    assert gains[large].min() > 5 > 2 > gains[~large].max()
    assert torch.equal(blocks[0].attn.qkv.weight[:, 5], before[:, 5] / 20)
    assert torch.equal(blocks[0].attn.qkv.weight[:, 0], before[:, 0])


def test_clips_by_their_names() -> None:
    frames = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1, 1)
    clips = enough_clips.some(Clips("x", frames, np.arange(4), tuple("abcd"), ""), {"d", "b"})
    assert (clips.names, list(clips.labels), [int(clip.flat[0]) for clip in clips.frames]) == (
        ("b", "d"),
        [1, 3],
        [1, 3],
    )
