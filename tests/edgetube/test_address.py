"""What a message calls a source holds no credentials."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetube import address
from edgetube.errors import InputError


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://camera/live", "rtsp://camera/live"),
        ("rtsp://me:secret@camera:554/live", "rtsp://***@camera:554/live"),
        ("rtsp://me:se@cr/et@camera/live", "rtsp://***@camera/live"),
        ("http://me:se%40cret@camera/video?key=secret&user=me", "http://***@camera/video?***"),
        ("http://camera/video?secret", "http://camera/video?***"),
        ("http://me:secret@camera/a\nb?secret\nc", "http://***@camera/a\nb?***"),
        ("srt://camera:9000?passphrase=secret&mode=caller", "srt://camera:9000?***"),
        ("http://me:secret@[::1]:80/x", "http://***@[::1]:80/x"),
        ("http://me:secret?x@camera/live", "http://***@camera/live"),
    ],
)
def test_a_url_is_shown_without_password_and_query(url: str, shown: str) -> None:
    assert address.plain(url) == address.shown(url) == address.of(url).name == shown
    assert "secret" not in repr(address.of(url))
    assert address.of(url).file == url


def test_a_file_and_a_camera_are_shown_as_they_are() -> None:
    assert address.shown(Path("a@b?c.mp4")) == "a@b?c.mp4"
    assert address.shown(3) == "camera 3"


@pytest.mark.parametrize("source", ["", "  ", -1])
def test_no_source_is_not_the_current_folder(source: address.Source) -> None:
    with pytest.raises(InputError, match="the source is"):
        address.parse(source)
