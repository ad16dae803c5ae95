"""All forms compute the same attention, but for what 8 bits round."""

from __future__ import annotations

from pathlib import Path

from edgetube import metrics
from edgetube.bench.studies import integer_attention as study


def test_every_form_computes_the_same_attention(tmp_path: Path) -> None:
    calls = dict(study.candidates(tokens=20, heads=2, threads=1, folder=tmp_path))
    assert len(calls) == len(study.FORMS) + 2 * len(study.PAIRS)
    exact = calls["ONNX Runtime", "fused"]()
    for (runtime, form), call in calls.items():
        found = metrics.sqnr(exact, call())
        rounded = "integers" in form or form.endswith("pairs")
        exactly = not rounded and "defaults" not in runtime  # which may be bfloat16
        assert (100 if exactly else 25) < found, (runtime, form)
        assert exactly or found < 200
