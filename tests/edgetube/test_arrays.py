"""Arrays in files give back what NumPy reads, row by row; what is damaged is an error."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgetube.arrays import DiskArray, NpyArray, open_arrays, read_arrays
from edgetube.errors import FormatError


class TestDiskArray:
    """An array in a file is the array that was put into it."""

    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    def test_rows_come_back_in_any_order(self, tmp_path: Path, rng: np.random.Generator, dtype: type[Any]) -> None:
        expected = (100 * rng.random((7, 3, 5))).astype(dtype)
        array = DiskArray(tmp_path, expected.shape, dtype)
        for index in rng.permutation(7):
            array[index] = expected[index]
        assert (array.shape, len(array)) == ((7, 3, 5), 7)
        assert array.dtype == dtype
        np.testing.assert_array_equal(np.stack(list(array)), expected)
        for index in (3, 0, 6, -1):
            np.testing.assert_array_equal(array[index], expected[index])

    def test_rows_are_converted_and_made_contiguous(self, tmp_path: Path, rng: np.random.Generator) -> None:
        row = rng.random((5, 3)).T
        array = DiskArray(tmp_path, (1, 3, 5), np.float32)
        array[0] = row
        np.testing.assert_array_equal(array[0], row.astype(np.float32))

    def test_a_row_is_a_copy(self, tmp_path: Path) -> None:
        array = DiskArray(tmp_path, (2, 4), np.float32)
        array[1] = np.ones(4)
        array[1][:] = 7
        np.testing.assert_array_equal(np.stack(list(array)), [[0] * 4, [1] * 4])

    def test_there_is_no_row_beyond_the_end(self, tmp_path: Path) -> None:
        array = DiskArray(tmp_path, (2, 4), np.float32)
        with pytest.raises(IndexError):
            array[2]
        with pytest.raises(IndexError):
            array[2] = np.ones(4)

    def test_the_file_has_no_name(self, tmp_path: Path) -> None:
        array = DiskArray(tmp_path, (2, 4), np.float32)
        assert list(tmp_path.iterdir()) == []
        del array

    @pytest.mark.skipif(sys.platform == "win32", reason="has no limit of the size of files")
    def test_a_disk_that_refuses_is_an_error_and_no_crash(self, tmp_path: Path) -> None:
        script = (
            "import resource, sys, numpy as np\nfrom pathlib import Path\n"
            "from edgetube.arrays import DiskArray\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "try:\n    DiskArray(Path(sys.argv[1]), (2, 4096), np.uint8)[1] = np.ones(4096, np.uint8)\n"
            "except OSError as error:\n    print(error.strerror)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, "File too large")


@given(array=arrays.arrays(st.sampled_from(["<u1", "<f4", ">i2", "<U5"]), arrays.array_shapes(max_dims=4)))
def test_what_numpy_saves_is_read_row_by_row(
    tmp_path_factory: pytest.TempPathFactory, array: npt.NDArray[np.uint8]
) -> None:
    folder = tmp_path_factory.mktemp("arrays")
    np.save(folder / "a.npy", array)
    np.savez(folder / "b.npz", other=np.arange(5), frames=array)
    np.savez_compressed(folder / "c.npz", frames=array)
    alone, beside, packed = (
        open_arrays(folder / "a.npy")[""],
        open_arrays(folder / "b.npz")["frames"],
        open_arrays(folder / "c.npz"),
    )
    assert isinstance(alone, NpyArray)
    assert isinstance(beside, NpyArray)
    for found in (alone, beside, packed["frames"]):
        assert (found.shape, found.dtype, len(found)) == (array.shape, array.dtype, len(array))
        np.testing.assert_array_equal(np.array(list(found)), array)
        np.testing.assert_array_equal(found[-1], array[-1])


@pytest.mark.parametrize("array", [np.asfortranarray(np.arange(12.0).reshape(3, 4)), np.array("label")])
def test_what_has_no_rows_in_the_file_is_read_at_once(tmp_path: Path, array: npt.NDArray[Any]) -> None:
    np.savez(tmp_path / "a.npz", a=array)
    found = open_arrays(tmp_path / "a.npz")["a"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, array)


class TestDamaged:
    @pytest.fixture
    def array(self, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        return rng.integers(0, 256, (4, 8, 8), np.uint8)

    def test_truncated(self, tmp_path: Path, array: npt.NDArray[np.uint8]) -> None:
        np.save(tmp_path / "a.npy", array)
        (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-7])
        with pytest.raises(ValueError, match="7 bytes too short"):
            open_arrays(tmp_path / "a.npy")

    def test_a_flipped_bit_in_an_archive(self, tmp_path: Path, array: npt.NDArray[np.uint8]) -> None:
        np.savez(tmp_path / "a.npz", frames=array)
        data = bytearray((tmp_path / "a.npz").read_bytes())
        data[250] ^= 1
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(FormatError, match=r"frames\.npy in it is damaged"):
            open_arrays(tmp_path / "a.npz")

    @pytest.mark.parametrize("name", ["a.npy", "a.npz"])
    def test_no_array_at_all(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"no array, whatever its name says")
        with pytest.raises(FormatError, match=f"{name} is damaged"):
            open_arrays(tmp_path / name)

    def test_python_objects_are_not_loaded(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.array([{}, None]))
        with pytest.raises(ValueError, match=r"a\.npy: it holds object of shape \(2,\); expected numbers"):
            open_arrays(tmp_path / "a.npy")

    def test_a_file_that_shrank_meanwhile(self, tmp_path: Path, array: npt.NDArray[np.uint8]) -> None:
        np.save(tmp_path / "a.npy", array)
        found = open_arrays(tmp_path / "a.npy")[""]
        (tmp_path / "a.npy").write_bytes(b"")
        with pytest.raises((OSError, ValueError)):
            found[3]

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,), }", "999999999744 bytes too short"),
            ("{'descr': '|u1', 'fortran_order': False, 'shape': (255,), }", "longer than its header says"),
            ("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 256), }", "expected numbers"),
            ("{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (256,), }", "expected numbers"),
            ("{'descr': ('|u1', (256,)), 'fortran_order': False, 'shape': (1,), }", "expected numbers"),
            ("{'descr': '|S0', 'fortran_order': False, 'shape': (256,), }", "expected numbers"),
            ("{'descr': '|u1', 'fortran_order': False, 'shape': 256, }", "damaged"),
            ("{'descr': 7, 'fortran_order': False, 'shape': (256,), }", "damaged"),
            ("(" * 300, "damaged"),
            ("[" * 9000, "damaged"),
            ("{" + "'a': 1, " * 2000 + "}", "damaged"),
            ("{", "damaged"),
            ("", "damaged"),
        ],
    )
    @pytest.mark.parametrize("suffix", [".npy", ".npz"])
    def test_a_header_that_is_none(self, tmp_path: Path, header: str, message: str, suffix: str) -> None:
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(256)
        path = tmp_path / f"a{suffix}"
        if suffix == ".npy":
            path.write_bytes(data)
        else:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("a.npy", data)
        with pytest.raises(FormatError, match=message):
            open_arrays(path)

    def test_a_version_of_the_format_that_is_not_known(self, tmp_path: Path) -> None:
        (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x07\x00" + bytes(100))
        with pytest.raises(FormatError, match=r"version \(7, 0\) of NumPy's format"):
            open_arrays(tmp_path / "a.npy")

    def test_one_name_twice_is_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("a.npy", b"x")
            archive.writestr("a", b"y")
        with pytest.raises(FormatError, match="it has 'a' twice"):
            open_arrays(tmp_path / "a.npz")

    def test_other_compressions_are_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("a.npy", b"x")
        with pytest.raises(FormatError, match="'a' in it is encrypted, or compressed in another way"):
            open_arrays(tmp_path / "a.npz")


class TestReadArrays:
    """Exactly the arrays that were asked for."""

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_they_come_back_and_can_be_written_to(self, tmp_path: Path, save: Callable[..., None]) -> None:
        a, b = np.arange(12, dtype=np.uint8).reshape(3, 4), np.array([1.5, -2], np.float32)
        save(tmp_path / "x.npz", a=np.asfortranarray(a), b=b, empty=np.empty((0, 3), np.float32))
        wanted: dict[str, Any] = {"a": ((3, 4), np.uint8), "b": ((2,), np.float32), "empty": ((0, 3), "<f4")}
        found = read_arrays(tmp_path / "x.npz", wanted)
        np.testing.assert_array_equal(found["a"], a)
        np.testing.assert_array_equal(found["b"], b)
        assert found["empty"].shape == (0, 3)
        assert all(array.flags.writeable for array in found.values())

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({}, "it holds nothing; expected a"),
            ({"b": np.zeros(3, np.uint8)}, "it holds b; expected a"),
            ({"a": np.zeros(3, np.uint8), "b": np.zeros(3, np.uint8)}, "it holds a, b; expected a"),
            ({"a": np.zeros(4, np.uint8)}, r"a.npy is \(4,\) uint8; expected \(3,\) uint8"),
            ({"a": np.zeros(3, np.int8)}, r"a.npy is \(3,\) int8; expected \(3,\) uint8"),
        ],
    )
    def test_others_are_refused(self, tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
        np.savez(tmp_path / "x.npz", **{name: np.asarray(array) for name, array in arrays.items()})  # type: ignore[arg-type]
        with pytest.raises(FormatError, match=message):
            read_arrays(tmp_path / "x.npz", {"a": ((3,), np.uint8)})

    def test_no_more_is_decompressed_than_was_asked_for(self, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "x.npz", a=np.zeros(50_000_000, np.uint8))
        tracemalloc.start()
        with pytest.raises(FormatError, match=r"\(50000000,\) uint8; expected \(3,\) uint8"):
            read_arrays(tmp_path / "x.npz", {"a": ((3,), np.uint8)})
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()
