"""The account of a source balances at every moment, whatever happens in whatever order."""

from __future__ import annotations

import random
import threading
from typing import Literal, TypeAlias

from hypothesis import given
from hypothesis import strategies as st

from edgetube.live.frame import Account
from edgetube.live.source import Ended, FrameSource
from edgetube.live.timeline import MAX_LATE
from tests.edgetube.live.test_source import picture

Step: TypeAlias = Literal["push", "late", "read", "close"]


def check(account: Account) -> None:
    assert account.captured == account.used + account.waiting + sum(account.dropped.values())
    assert min(account.used, account.waiting, *account.dropped.values(), 0) == 0


@given(
    steps=st.lists(st.sampled_from(["push", "push", "push", "late", "read", "read", "close"]), max_size=60),
    capacity=st.integers(1, 5),
)
def test_after_every_step_of_any_schedule(steps: list[Step], capacity: int) -> None:
    """Against a count by hand: what is in the queue, and what fell out of it."""
    with FrameSource.pushed("porch", capacity=capacity) as source:
        pushed, queue, overrun, late, closed, taken = 0, 0, 0, 0, 0, 0
        ended, row = False, 0  # frames in a row that are late
        for step in steps:
            if step in ("push", "late"):
                is_late = step == "late" and pushed > 0 and not ended and row < MAX_LATE
                if step == "late" and not is_late:
                    continue
                source.push(picture(), pushed - 1.5 if is_late else pushed)
                pushed += 0 if is_late else 1
                late += is_late
                row = row + 1 if is_late else 0
                closed += ended
                if not ended and not is_late:
                    overrun += queue == capacity
                    queue = min(queue + 1, capacity)
            elif step == "read" and not ended:
                frame = source.read(0)
                assert (frame is not None) == (queue > 0)
                if frame is not None:
                    queue -= 1
                    taken += 1
                    source.ledger.use()
            elif step == "close":
                source.close()
                closed, queue, ended = closed + queue, 0, True
            account = source.ledger.account()
            check(account)
            assert account.captured == pushed + late
            assert (account.used, account.waiting) == (taken, queue)
            wanted = {"overrun": overrun, "late": late, "closed": closed}
            assert account.dropped == {cause: count for cause, count in wanted.items() if count}


@given(seed=st.integers(0, 2**32 - 1), policy=st.sampled_from(["latest", "all"]))
def test_with_threads_that_push_read_look_and_close_at_once(seed: int, policy: Literal["latest", "all"]) -> None:
    draw = random.Random(seed)
    source = FrameSource.pushed("porch", policy=policy, capacity=draw.randint(1, 4))
    count, failures = draw.randint(1, 40), []
    last = draw.randrange(count + 1)  # after so many frames the reader closes it

    def push() -> None:
        for _ in range(count):
            source.push(picture())

    def read() -> None:
        try:
            for _ in range(last):
                if source.read(1.0 if policy == "all" else 0.001) is not None:
                    source.ledger.use()
            source.close()
            source.read(0)
        except Ended:
            pass

    def look() -> None:
        try:
            while source.state != "closed":
                check(source.ledger.account())
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for run in (push, read, look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    account = source.ledger.account()
    check(account)
    assert not failures
    assert account.captured == count
    assert account.waiting == 0
    if policy == "all":
        assert set(account.dropped) <= {"closed"}
        assert account.used == last
