"""The ExecuTorch backend: the runtime of phones and boards, here in ExecuTorch's Python package, on the CPU."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError
from edgetube.runtimes.base import FixedOutputs, Interface
from edgetube.video import Frames

LOG = re.compile(r"(?:\[|[DIEF] [\d:.]+ executorch:)\w+\.cpp:\d+\] (.*)")
"""A line that ExecuTorch's C++ code writes: `[program.cpp:168] Program identifier ...`."""

_stderr_lock = threading.Lock()


@contextmanager
def _log() -> Iterator[list[str]]:
    """Take what ExecuTorch writes to the standard error in the block; other lines are written there afterwards.

    It writes some to the file descriptor, and some to `sys.stderr`.

    Yields:
        a list that has its lines when the block has ended.
    """
    lines: list[str] = []
    with _stderr_lock, tempfile.TemporaryFile() as file:
        printed, shown = io.StringIO(), sys.stderr
        try:
            with _descriptor(file), redirect_stderr(printed):
                yield lines
        finally:
            file.seek(0)
            lines += _own(file.read().decode(errors="replace"), lambda line: os.write(2, f"{line}\n".encode()))
            lines += _own(printed.getvalue(), lambda line: shown and shown.write(f"{line}\n"))


@contextmanager
def _descriptor(file: IO[bytes]) -> Iterator[None]:
    """In the block, `file` is the standard error of the process, if it has one."""
    try:
        before = os.dup(2)
    except OSError:
        yield
        return
    try:
        os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _own(text: str, pass_on: Callable[[str], object]) -> list[str]:
    """The lines of a text that are ExecuTorch's, without where they come from."""
    found = []
    for line in text.splitlines():
        if match := LOG.fullmatch(line):
            found.append(match[1])
        else:
            pass_on(line)
    return found


@contextmanager
def no_warnings() -> Iterator[None]:
    """In the block, nobody is warned: of interfaces that are experimental, and of what ExecuTorch imports."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


with _log(), no_warnings():
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Method, Runtime
    from executorch.version import __version__ as VERSION

    DEFAULT_THREADS: int = portable_lib._threadpool_get_thread_count()
    """Threads that ExecuTorch takes by itself."""

__all__ = ["Runtime", "Session"]  # `Runtime`: ExecuTorch's, imported with its warnings silenced

RUNS = ("executorch",)
UNSEEN = "ARM kernels and their speed, delegates other than XNNPACK, heat"


class _Threads:
    """The threads that all programs of this process share; they can be replaced only while none is open."""

    def __init__(self) -> None:
        self.lock, self.users = threading.RLock(), 0  # a session may be collected while another one is opened

    @property
    def count(self) -> int:
        return int(portable_lib._threadpool_get_thread_count())

    def take(self, wanted: int | None) -> None:
        """Count a program that is about to be opened, with `wanted` threads, or whatever there are.

        Raises:
            BackendError: other programs are open with another number of threads.
        """
        with self.lock:
            if self.users and wanted not in (None, self.count):
                raise BackendError(
                    f"ExecuTorch {VERSION}: this process already runs it with {self.count} threads, which all its "
                    f"programs share; close the other bundles before one is opened with {wanted}"
                )
            if not self.users and (wanted or DEFAULT_THREADS) != self.count:
                with _log():
                    portable_lib._unsafe_reset_threadpool(wanted or DEFAULT_THREADS)
            self.users += 1

    def give(self) -> None:
        """The program is closed."""
        with self.lock:
            self.users -= 1


THREADS = _Threads()


class Session(FixedOutputs):
    """The method `forward` of a program (`model.pte`).

    Args:
        bundle: a bundle whose artifact has one input and one output, and those that it shows.
        threads: CPU threads of one call; None leaves it to ExecuTorch (the physical cores). All programs of a process
            have the same number.
        device: "cpu" (default).

    Raises:
        InputError: another device is asked for.
        BackendError: ExecuTorch refuses the file, or other programs are open with another number of threads.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> None:
        super().__init__(bundle)
        if (device or "cpu").lower() != "cpu":
            raise InputError(f"no device is called {device!r} here; ExecuTorch's Python package runs on cpu alone")
        THREADS.take(threads)
        self._give = weakref.finalize(self, THREADS.give)  # also where nobody closes the session
        try:
            self.method = _load(bundle)
        except BaseException:
            self._give()
            raise

    def interface(self) -> Interface:
        meta = self.method.metadata
        inputs = [meta.input_tensor_meta(i).sizes() for i in range(meta.num_inputs())]
        outputs = [meta.output_tensor_meta(i).sizes() for i in range(meta.num_outputs() - len(self.shown))]
        return Interface(tuple(map(tuple, inputs)), tuple(map(tuple, outputs)))

    def returned(self, clips: Frames) -> list[npt.NDArray[np.float32]]:
        # Of read-only frames PyTorch warns; what silences it, `warnings.catch_warnings`, is not for several threads.
        frames = torch.from_numpy(clips if clips.flags.writeable else clips.copy())
        try:
            values = self.method.execute([frames])
        except RuntimeError as error:  # the one type that the bindings raise
            raise _failure("the method failed", error) from error
        return [np.array(value.numpy(), np.float32) for value in values]

    def describe(self) -> dict[str, Any]:
        return {"executorch": VERSION, "device": "cpu", "threads": THREADS.count}

    def release_calls(self) -> None:
        del self.method
        self._give()


def _load(bundle: Bundle) -> Method:
    path = bundle.artifact_path
    lines: list[str] = []
    try:
        with _log() as lines:
            method = Runtime.get().load_program(path).load_method("forward")
    except (RuntimeError, KeyError) as error:  # KeyError: of a method that is not there
        raise _failure(f"cannot open {path}", error, lines) from error
    assert method is not None
    return method


def _failure(what: str, error: Exception, lines: list[str] | None = None) -> BackendError:
    """With the last words of its log: the error itself has only a number."""
    said = ": ".join([*(lines or [])[-1:], " ".join(str(error).split())])
    return BackendError(f"ExecuTorch {VERSION}: {what}: {said}")
