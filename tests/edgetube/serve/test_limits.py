"""Rates and slots, against arithmetic done by hand."""

from __future__ import annotations

import pytest

from edgetube.errors import InputError
from edgetube.serve import limits
from edgetube.serve.limits import ClientRates, Limits, Rate, Slots


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_twice_as_many_at_once_then_so_many_a_second() -> None:
    clock = Clock()
    rate = Rate(10, clock)
    assert sum(rate.allows() for _ in range(100)) == 20
    clock.time = 0.55
    assert sum(rate.allows() for _ in range(100)) == 5
    clock.time = 1000.0
    assert sum(rate.allows() for _ in range(100)) == 20


def test_a_slow_rate_allows_one() -> None:
    clock = Clock()
    rate = Rate(0.1, clock)
    assert [rate.allows(), rate.allows()] == [True, False]
    clock.time = 10.01
    assert rate.allows()


def test_clients_do_not_take_from_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CLIENTS", 2)
    rates = ClientRates(1, Clock())
    assert [rates.allows(name) for name in "aaabbb"] == [True, True, False, True, True, False]
    rates.allows("c")  # the one that asked longest ago, a, is forgotten
    assert [rates.allows(name) for name in "ba"] == [False, True]


def test_slots() -> None:
    slots = Slots(1)
    assert [slots.take(), slots.take()] == [True, False]
    slots.give()
    assert slots.take()


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="the limit uploads is 0; expected more than 0"):
        Limits(uploads=0)
