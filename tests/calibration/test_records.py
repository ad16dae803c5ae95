"""The records of a calibration are frozen."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest

from edgetube.calibration import clips, equalize, graphs, layerwise, numeric, search, table


@pytest.mark.parametrize("module", [clips, equalize, graphs, layerwise, numeric, search, table])
def test_records_are_frozen(module: ModuleType) -> None:
    """All but the state, which the calibrator fills."""
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    records = [value for value in own if dataclasses.is_dataclass(value) and value is not layerwise.CalibrationState]
    assert records
    for record in records:
        assert vars(record)["__dataclass_params__"].frozen, record
