"""What is sent to a device: into a real store, without a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetube.remote import store
from edgetube.remote.stage import Store


@pytest.fixture
def there(tmp_path: Path) -> Store:
    return Store(tmp_path / "device", "")


def asker(there: Store) -> store.Ask:
    """Gives orders to a store as a device does."""

    def ask(do: str, *pieces: bytes, **request: Any) -> Any:
        return getattr(there, do)(**request, **({"pieces": pieces} if pieces else {}))

    return ask


def test_clips_are_not_among_the_files(there: Store, tmp_path: Path) -> None:
    clips = [b"one" * 100, b"", b"three" * store.PIECE]
    sent = store.send_clips(asker(there), clips)
    assert [there.read(digest, clips=True) for digest in sent] == clips
    assert list((there.root / "files").iterdir()) == []
    (tmp_path / "file").write_bytes(clips[0])
    place = store.send_file(asker(there), tmp_path / "file")
    assert Path(place).read_bytes() == clips[0]
    assert [path.name for path in (there.root / "files").iterdir()] == sent[:1]
