"""The predictions of one source, as an iterator."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from typing_extensions import Self

from edgetube.live.frame import Account
from edgetube.live.scheduler import Failed, Outcome, Over, Scheduler, Statistics
from edgetube.live.source import FrameSource
from edgetube.spec import Prediction

if TYPE_CHECKING:  # it takes as long to import as all of `edgetube`; most apps do without
    import asyncio


class Stream(Iterator[Prediction], AsyncIterator[Prediction]):
    """The predictions of one source: for `for`, for `async for`, and a context manager of both kinds.

    The source is read, and its frames are preprocessed, in threads of their own. The model is called in the thread that
    asks for the next prediction, so a live source's answer is made of what is newest then. It ends when the source
    ends, when it is closed, and with the first error, which is raised once.

    `close` may be called at any moment by any thread, and ends a `for` of another one; a stream that is not needed any
    more closes itself.

    Args:
        scheduler: without sources yet.
        source: whose frames are classified.
        owned: whether to close the source in the end.
    """

    def __init__(self, scheduler: Scheduler, source: FrameSource, owned: bool) -> None:
        self._scheduler = scheduler
        self._source = source
        self._ready: deque[Outcome] = deque()
        self._asked: asyncio.Future[Prediction | None] | None = None
        self._threads: list[threading.Thread] = []
        self._over = False
        try:
            scheduler.add(source.name, source, owned)
        except BaseException:
            if owned:
                source.close()
            raise

    @property
    def source(self) -> FrameSource:
        """Whose predictions these are; it knows its state."""
        return self._source

    @property
    def account(self) -> Account:
        """Where the source's frames went so far."""
        return self._source.ledger.account()

    def statistics(self) -> Statistics:
        """State, rates and percentiles of the source so far."""
        return self._scheduler.statistics()[self._source.name]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Prediction:
        found = self._next()
        if found is None:
            raise StopIteration
        return found

    def _next(self) -> Prediction | None:
        """The next prediction; None at the end."""
        while not self._over:
            if not self._ready and not self._scheduler.step(self._ready.append):
                break
            found = self._ready.popleft() if self._ready else None
            if isinstance(found, Prediction) and not self._over:
                return found
            if isinstance(found, Failed | Over):
                self.close()
                if found.error is not None:
                    raise found.error
        return None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Prediction:
        # A task that is cancelled while it waits takes nothing away: the next one gets what the first one asked for.
        import asyncio

        loop = asyncio.get_running_loop()
        if self._asked is None or self._asked.get_loop() is not loop:
            self._asked = loop.create_future()
            self._ask(self._asked)
        try:
            found = await asyncio.shield(self._asked)
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._asked = None
            raise
        self._asked = None
        if found is None:
            raise StopAsyncIteration
        return found

    def _ask(self, asked: asyncio.Future[Prediction | None]) -> None:
        """Ask for the next prediction in a thread of its own: the loop's own threads would keep the loop from ending
        while one of them waits for a camera."""
        loop = asked.get_loop()

        def settle(found: Prediction | None, error: BaseException | None) -> None:
            if asked.done():
                return
            if error is None:
                asked.set_result(found)
            else:
                asked.set_exception(error)

        def run() -> None:
            found, error = None, None
            try:
                found = self._next()
            except Exception as failure:  # noqa: BLE001 - raised where it is awaited
                error = failure
            try:
                loop.call_soon_threadsafe(settle, found, error)
            except RuntimeError:  # the loop is closed, and nobody waits any more
                if found is not None:
                    self._ready.appendleft(found)

        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=run, name=f"edgetube answers of {self._source.name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """End the stream at once: threads end, and the source is closed unless the caller opened it."""
        self._over = True
        self._scheduler.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    async def aclose(self) -> None:
        """`close`, without blocking the loop."""
        import asyncio

        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_over"):
            self.close()
