"""Answers that are kept in a file while they are made, so that a run that is cut off goes on where it was.

A row is what one model said about one clip. The model is known by what its answers depend on (hashes of its files,
versions, processor: `edgetube.bench.panel.Panel.keys`), the clip by its name, its file's size and time of last change,
and the input that it was made for. Whatever changes is asked again; nothing has to be cleaned up by hand.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from edgetube.datasets import Item
from edgetube.errors import InputError
from edgetube.spec import InputContract

Logits = npt.NDArray[np.float32]

TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    model TEXT NOT NULL, clip TEXT NOT NULL, label TEXT, logits BLOB NOT NULL, PRIMARY KEY (model, clip)
) WITHOUT ROWID
"""

MANY = 500
"""Clips that are looked up in one query; SQLite allows 999 parameters at least."""


class Journal:
    """A file of answers: a SQLite database, because that survives being killed at any moment.

    Args:
        path: of the file; it is made if it is not there.

    Raises:
        InputError: the file is something else, or cannot be written.
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
        """Keep (clip, label, logits (classes,)) of a model; they are on the disk when this returns."""
        rows = [(model, clip, label, logits.astype("<f4").tobytes()) for clip, label, logits in answers]
        with self._errors(), self.database:
            self.database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", rows)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise InputError(
                f"{self.path} cannot be used as a journal: {error}; give --resume a new file in a folder that exists"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clip_key(item: Item, contract: InputContract) -> str:
    """What a clip is known by: name, version and the input that it is made for."""
    return hashlib.sha256(
        json.dumps([item.name, item.version, contract.to_json()], sort_keys=True).encode()
    ).hexdigest()
