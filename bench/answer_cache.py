"""A cache of logits on disk, written while a comparison runs, so that an interrupted run can be resumed.

A row holds the logits of one model on one clip. The key of a model covers all that its logits depend on (hashes of its
files, versions, processor: `edgetube.bench.model_set.ModelSet.keys`), the key of a clip its name, its file's size and
modification time, the input contract, and the views. A change of either key is a miss; stale rows are never read.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from typing_extensions import Self

from edgetube.contract import InputContract
from edgetube.datasets import Item
from edgetube.errors import InputError
from edgetube.runtimes.base import Logits
from edgetube.views import SINGLE, Views

TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    model TEXT NOT NULL, clip TEXT NOT NULL, label TEXT, logits BLOB NOT NULL, PRIMARY KEY (model, clip)
) WITHOUT ROWID
"""

MANY = 500
"""Clips that are looked up in one query; SQLite allows 999 parameters at least."""


class AnswerCache:
    """A SQLite database of logits; a process may be killed at any moment without damage to it.

    Args:
        path: of the file; created if it does not exist.

    Raises:
        InputError: the file is no such database, or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._errors():
            self.database = sqlite3.connect(self.path)
            self.database.execute(TABLE)
            self.database.commit()

    def get(self, model: str, clips: Sequence[str]) -> dict[str, tuple[str | None, Logits]]:
        """(label, logits (classes,)) of those of `clips` that `model` has answered, by clip."""
        found: dict[str, tuple[str | None, Logits]] = {}
        with self._errors():
            for start in range(0, len(clips), MANY):
                some = clips[start : start + MANY]
                query = (
                    f"SELECT clip, label, logits FROM answers WHERE model = ? AND clip IN ({','.join('?' * len(some))})"
                )
                for clip, label, logits in self.database.execute(query, (model, *some)):
                    found[clip] = label, np.frombuffer(logits, "<f4").astype(np.float32)
        return found

    def put(self, model: str, answers: Iterable[tuple[str, str | None, Logits]]) -> None:
        """Store (clip, label, logits (classes,)) of a model; they are on disk when this returns."""
        rows = [(model, clip, label, logits.astype("<f4").tobytes()) for clip, label, logits in answers]
        with self._errors(), self.database:
            self.database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", rows)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise InputError(
                f"{self.path} cannot be used as an answer cache: {error}; give --resume a new file in a folder that "
                "exists"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clip_key(item: Item, contract: InputContract, views: Views = SINGLE) -> str:
    """The key of a clip: its name, its version, the input contract that it is decoded for, and its views.

    A single view adds nothing, so that it has the keys of older versions.
    """
    parts = [item.name, item.version, contract.to_json(), *([str(views)] if views.count > 1 else [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
