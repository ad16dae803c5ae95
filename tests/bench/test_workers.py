"""The same answers wherever they are worked out, and nothing lost when a process is killed."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube.bench import model_set, parity, workers
from edgetube.bundle import Bundle
from edgetube.contract import InputContract
from edgetube.datasets import ClipSet, Item
from edgetube.errors import BackendError, InputError
from edgetube.video import Clip


def make(index: int, folder: str, times: int, parent: int, contract: InputContract) -> Clip:
    """Clip number `index`; the process that reads it is killed `times` times, counted by files in `folder`."""
    for attempt in range(times):
        try:
            (Path(folder) / f"{index}.{attempt}").touch(exist_ok=False)
        except FileExistsError:
            continue
        assert os.getpid() != parent, "the test itself would be killed"
        os.kill(os.getpid(), signal.SIGKILL)
    frames = np.random.default_rng(index).integers(0, 256, contract.shape, np.uint8)
    return Clip(f"clip {index}", frames)


def clip_set(folder: Path, count: int, deadly: Any = None) -> ClipSet:
    deaths = deadly or {}
    items = [
        Item(f"clip {i}", None, partial(make, i, str(folder), deaths.get(i, 0), os.getpid())) for i in range(count)
    ]
    return ClipSet("made up", tuple(items))


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return bundles.load(tiny_bundle)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_set, "CHUNK", 2)


def expected(bundle: Bundle, tmp_path: Path, count: int) -> dict[str, Any]:
    return parity.measure([bundle], clip_set(tmp_path, count), threads=1).to_json()


@pytest.mark.slow
def test_processes_answer_as_one_does_and_a_killed_one_loses_nothing(
    bundle: Bundle, tmp_path: Path, small_chunks: Any
) -> None:
    run = partial(workers.in_processes, workers=2)
    before = dict(os.environ)
    got = parity.measure([bundle], clip_set(tmp_path, 9, {3: 1, 6: 2}), run=run, threads=1)
    assert got.to_json() == expected(bundle, tmp_path / "none", 9)
    assert len(list(tmp_path.iterdir())) == 3, "the processes were not killed"
    assert dict(os.environ) == before


@pytest.mark.slow
def test_a_clip_that_kills_every_process_is_named(bundle: Bundle, tmp_path: Path, small_chunks: Any) -> None:
    run = partial(workers.in_processes, workers=2)
    with pytest.raises(BackendError, match="the clip clip 2 ends the process that asks 2 models about it"):
        parity.measure([bundle], clip_set(tmp_path, 4, {2: 99}), run=run, threads=1)
    killed = {path.name.partition(".")[0] for path in tmp_path.iterdir()}
    assert killed == {"2"}


@pytest.mark.slow
def test_an_error_of_ours_comes_back_as_it_is(bundle: Bundle) -> None:
    source = ClipSet("x", (Item("gone", None, _gone),))
    with pytest.raises(InputError, match="gone is not there any more"):
        parity.measure([bundle], source, run=partial(workers.in_processes, workers=1))


def _gone(contract: InputContract) -> NoReturn:
    raise InputError("gone is not there any more")


def test_no_workers_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="workers is 0; expected >= 1"):
        parity.measure([bundle], clip_set(tmp_path, 1), run=partial(workers.in_processes, workers=0))


@pytest.mark.slow
def test_no_cluster_is_one_line() -> None:  # before there is one
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'edgetube[ray]'")
    with pytest.raises(InputError, match=r"no Ray cluster at 127\.0\.0\.1:1: "):
        list(workers.on_cluster(model_set.ModelSet((), InputContract(1, 8, 8), ()), [], address="127.0.0.1:1"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray of two workers on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'edgetube[ray]'")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
class TestRay:
    def test_a_cluster_answers_as_one_process_does_and_a_killed_worker_loses_nothing(
        self, bundle: Bundle, tmp_path: Path, small_chunks: Any, cluster: str
    ) -> None:
        run = partial(workers.on_cluster, address=cluster)
        got = parity.measure([bundle], clip_set(tmp_path, 9, {3: 1, 6: 2}), run=run, threads=1)
        assert got.to_json() == expected(bundle, tmp_path / "none", 9)
        assert len(list(tmp_path.iterdir())) == 3, "the workers were not killed"

    def test_a_clip_that_kills_every_worker_is_named(
        self, bundle: Bundle, tmp_path: Path, small_chunks: Any, cluster: str
    ) -> None:
        run = partial(workers.on_cluster, address=cluster)
        with pytest.raises(BackendError, match="the clip clip 2 ends the process"):
            parity.measure([bundle], clip_set(tmp_path, 4, {2: 99}), run=run, threads=1)

    def test_an_error_of_ours_comes_back_as_it_is(self, bundle: Bundle, cluster: str) -> None:
        source = ClipSet("x", (Item("gone", None, _gone),))
        with pytest.raises(InputError, match="gone is not there any more"):
            parity.measure([bundle], source, run=partial(workers.on_cluster, address=cluster))
