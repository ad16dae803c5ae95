"""Arrays in files give back what NumPy reads, row by row; what is damaged is an error."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgetube.rows import Spool, Stored, stored


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
            "from edgetube.rows import Spool\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "try:\n    Spool(Path(sys.argv[1]), (2, 4096), np.uint8)[1] = np.ones(4096, np.uint8)\n"
            "except OSError as error:\n    print(error.strerror)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, "File too large")


@given(array=arrays.arrays(st.sampled_from(["<u1", "<f4", ">i2", "<U5"]), arrays.array_shapes(max_dims=4)))
def test_what_numpy_saves_is_read_row_by_row(tmp_path_factory, array):
    folder = tmp_path_factory.mktemp("arrays")
    np.save(folder / "a.npy", array)
    np.savez(folder / "b.npz", other=np.arange(5), frames=array)
    np.savez_compressed(folder / "c.npz", frames=array)
    alone, beside, packed = stored(folder / "a.npy")[""], stored(folder / "b.npz")["frames"], stored(folder / "c.npz")
    assert isinstance(alone, Stored)
    assert isinstance(beside, Stored)
    for found in (alone, beside, packed["frames"]):
        assert (found.shape, found.dtype, len(found)) == (array.shape, array.dtype, len(array))
        np.testing.assert_array_equal(np.array(list(found)), array)
        np.testing.assert_array_equal(found[-1], array[-1])


@pytest.mark.parametrize("array", [np.asfortranarray(np.arange(12.0).reshape(3, 4)), np.array("label")])
def test_what_has_no_rows_in_the_file_is_read_at_once(tmp_path, array):
    np.savez(tmp_path / "a.npz", a=array)
    found = stored(tmp_path / "a.npz")["a"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, array)


class TestDamaged:
    @pytest.fixture
    def array(self, rng):
        return rng.integers(0, 256, (4, 8, 8), np.uint8)

    def test_truncated(self, tmp_path, array):
        np.save(tmp_path / "a.npy", array)
        (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-7])
        with pytest.raises(ValueError, match="7 bytes too short"):
            stored(tmp_path / "a.npy")

    def test_a_flipped_bit_in_an_archive(self, tmp_path, array):
        np.savez(tmp_path / "a.npz", frames=array)
        data = bytearray((tmp_path / "a.npz").read_bytes())
        data[250] ^= 1
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(zipfile.BadZipFile, match=r"frames\.npy in it is damaged"):
            stored(tmp_path / "a.npz")

    @pytest.mark.parametrize("name", ["a.npy", "a.npz"])
    def test_no_array_at_all(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"no array, whatever its name says")
        with pytest.raises((ValueError, zipfile.BadZipFile)):
            stored(tmp_path / name)

    def test_python_objects_are_not_loaded(self, tmp_path):
        np.save(tmp_path / "a.npy", np.array([{}, None]))
        with pytest.raises(ValueError, match="allow_pickle=False"):
            stored(tmp_path / "a.npy")

    def test_a_file_that_shrank_meanwhile(self, tmp_path, array):
        np.save(tmp_path / "a.npy", array)
        found = stored(tmp_path / "a.npy")[""]
        (tmp_path / "a.npy").write_bytes(b"")
        with pytest.raises((OSError, ValueError)):
            found[3]
