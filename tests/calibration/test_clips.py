"""Clips for a calibration: bad ones are refused or named, and they lie in files."""

import subprocess
import sys

import numpy as np
import pytest

from edgetube.calibration.clips import Clips, Spool, collect
from edgetube.datasets import ClipSet, Item
from edgetube.errors import InputError
from edgetube.video import Clip


class TestBadClips:
    def collect(self, checkpoint, tmp_path, frames, labels=None):
        items = []
        for i, x in enumerate(frames):
            label = None if labels is None else labels[i]
            clip = Clip(f"{i}", x, label)
            items.append(Item(f"{i}", label, lambda _, clip=clip: clip))
        return collect(ClipSet("mine", tuple(items)), checkpoint.contract, checkpoint.labels, tmp_path)

    def test_no_clips(self, hard_checkpoint, tmp_path):
        with pytest.raises(InputError, match="no clips to calibrate on"):
            self.collect(hard_checkpoint, tmp_path, [])

    def test_all_black(self, hard_checkpoint, tmp_path, rng):
        black = np.zeros(hard_checkpoint.contract.shape, np.uint8)
        with pytest.raises(InputError, match="every clip of mine is one flat colour"):
            self.collect(hard_checkpoint, tmp_path, [black, black])
        noise = rng.integers(0, 255, black.shape, np.uint8)
        (note,) = self.collect(hard_checkpoint, tmp_path, [black, noise]).notes
        assert "1 of 2 clips are one flat colour" in note

    def test_one_clip_is_a_stated_warning(self, hard_checkpoint, tmp_path, rng):
        noise = rng.integers(0, 255, hard_checkpoint.contract.shape, np.uint8)
        (note,) = self.collect(hard_checkpoint, tmp_path, [noise]).notes
        assert "calibrated on one clip" in note

    def test_more_labels_than_the_head(self, hard_checkpoint, tmp_path, rng):
        noise = rng.integers(0, 255, (2, *hard_checkpoint.contract.shape), np.uint8)
        with pytest.raises(InputError, match="mine has 2 labels, among them jump, which the model does not know"):
            self.collect(hard_checkpoint, tmp_path, noise, ["static", "jump"])


class TestSpool:
    """An array in a file is the array that was put into it."""

    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    def test_rows_come_back_in_any_order(self, tmp_path, rng, dtype):
        expected = (100 * rng.random((7, 3, 5))).astype(dtype)
        spool = Spool(tmp_path, expected.shape, dtype)
        for index in rng.permutation(7):
            spool[index] = expected[index]
        assert (spool.shape, spool.dtype, len(spool)) == ((7, 3, 5), dtype, 7)
        np.testing.assert_array_equal(np.stack(list(spool)), expected)
        for index in (3, 0, 6, -1):
            np.testing.assert_array_equal(spool[index], expected[index])

    def test_rows_are_converted_and_made_contiguous(self, tmp_path, rng):
        row = rng.random((5, 3)).T
        spool = Spool(tmp_path, (1, 3, 5), np.float32)
        spool[0] = row
        np.testing.assert_array_equal(spool[0], row.astype(np.float32))

    def test_a_row_is_a_copy(self, tmp_path):
        spool = Spool(tmp_path, (2, 4), np.float32)
        spool[1] = np.ones(4)
        spool[1][:] = 7
        np.testing.assert_array_equal(np.stack(list(spool)), [[0] * 4, [1] * 4])

    def test_there_is_no_row_beyond_the_end(self, tmp_path):
        spool = Spool(tmp_path, (2, 4), np.float32)
        with pytest.raises(IndexError):
            spool[2]
        with pytest.raises(IndexError):
            spool[2] = np.ones(4)

    def test_the_file_has_no_name(self, tmp_path):
        spool = Spool(tmp_path, (2, 4), np.float32)
        assert list(tmp_path.iterdir()) == []
        del spool

    @pytest.mark.skipif(sys.platform == "win32", reason="has no limit of the size of files")
    def test_a_disk_that_refuses_is_an_error_and_no_crash(self, tmp_path):
        script = (
            "import resource, sys, numpy as np\nfrom pathlib import Path\n"
            "from edgetube.calibration.clips import Spool\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "try:\n    Spool(Path(sys.argv[1]), (2, 4096), np.uint8)[1] = np.ones(4096, np.uint8)\n"
            "except OSError as error:\n    print(error.strerror)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, "File too large")

    def test_the_first_clips_are_as_many_as_there_are(self, tmp_path, rng):
        frames = Spool(tmp_path, (3, 2, 4, 4, 3), np.uint8)
        clips = Clips("mine", frames, np.zeros(3, int), ("a", "b", "c"), "")
        assert clips.first(2).shape == (2, 2, 4, 4, 3)
        assert clips.first(9).shape == (3, 2, 4, 4, 3)
