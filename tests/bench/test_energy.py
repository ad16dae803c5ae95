"""Energy meters, on counters that the tests turn."""

from __future__ import annotations

import stat
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from edgetube.bench import energy


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    zone = tmp_path / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "max_energy_range_uj").write_text("1000000\n")
    (zone / "energy_uj").write_text("900000\n")
    core = zone.parent / "intel-rapl:0:0"  # a part of the package: counted twice if it were read
    core.mkdir()
    (core / "energy_uj").write_text("1\n")
    monkeypatch.setattr(energy, "POWERCAP", zone.parent)
    return zone / "energy_uj"


def test_rapl_counts_joules_also_when_the_counter_starts_again(package: Path) -> None:
    assert energy.source() == {"source": "RAPL, 1 package(s)", "reason": None}
    with energy.meter() as meter:
        assert meter.joules() == 0
        package.write_text("950000\n")
        assert meter.joules() == pytest.approx(0.05)
        package.write_text("20000\n")
        assert meter.joules() == pytest.approx(0.12)


def test_a_counter_that_may_not_be_read_is_a_reason(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> NoReturn:
        raise PermissionError

    monkeypatch.setattr(type(package), "read_text", refuse)
    found = energy.source()
    assert found["source"] is None
    assert "root" in found["reason"]
    assert type(energy.meter()) is energy.Meter


def test_a_machine_without_counters_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    monkeypatch.setattr(energy, "HWMON", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert energy.source()["source"] is None
    assert "no tegrastats" in energy.source()["reason"]
    with energy.meter() as meter:
        assert meter.joules() == 0


@pytest.mark.parametrize(
    "line",
    [
        "RAM 2103/7471MB CPU [4%@729] VDD_IN 5000mW/4182mW VDD_CPU_GPU_CV 538mW/538mW",
        "RAM 1903/3964MB GR3D_FREQ 0% POM_5V_IN 5000/2104 POM_5V_GPU 0/0",
    ],
)
def test_tegrastats_is_power_times_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    command = tmp_path / "tegrastats"
    command.write_text(f"#!/bin/sh\nwhile :; do echo '{line}'; sleep 0.02; done\n")
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert energy.source()["source"] == "tegrastats"
    integrated(5.0)


def integrated(watts: float) -> None:
    """The machine's meter counts so many joules a second."""
    with energy.meter() as meter:
        deadline = time.perf_counter() + 10
        while meter.joules() == 0 and time.perf_counter() < deadline:
            time.sleep(0.02)
        start, before = time.perf_counter(), meter.joules()
        time.sleep(0.2)
        used, seconds = meter.joules() - before, time.perf_counter() - start
    assert used == pytest.approx(watts * seconds, rel=0.05)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without counters; the folder is in its PATH."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    monkeypatch.setattr(energy, "HWMON", tmp_path / "hwmon")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


PI_5 = """     3V7_WL_SW_A current(0)=0.10000000A
     VDD_CORE_A current(7)=2.00000000A
     3V7_WL_SW_V volt(8)=3.70000000V
     VDD_CORE_V volt(15)=0.90000000V
     EXT5V_V volt(24)=5.15000000V
     BATT_V volt(25)=0.00000000V
"""


def test_the_rails_of_a_raspberry_pi_5_add_up(bare: Path) -> None:
    """Rails without a current (the 5 V that come in) have no power of their own."""
    command = bare / "vcgencmd"
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{PI_5}END\n")
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    assert energy.source() == {"source": "vcgencmd pmic_read_adc", "reason": None}
    integrated(0.1 * 3.7 + 2 * 0.9)


def test_an_older_raspberry_pi_has_no_rails(bare: Path) -> None:
    command = bare / "vcgencmd"
    command.write_text("#!/bin/sh\necho 'error=1 error_msg=\"Command not registered\"'\n")
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    assert energy.source()["source"] is None


def test_sensors_in_the_supply_add_up_and_others_do_not_count(bare: Path) -> None:
    for index, (name, microwatts) in enumerate([("ina226", 1_500_000), ("ina238", 500_000), ("amdgpu", 9_000_000)]):
        device = bare / "hwmon" / f"hwmon{index}"
        device.mkdir(parents=True)
        (device / "name").write_text(f"{name}\n")
        (device / "power1_input").write_text(f"{microwatts}\n")
    assert energy.source() == {"source": "hwmon, 2 INA sensor(s)", "reason": None}
    integrated(2.0)
