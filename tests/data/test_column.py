import numpy as np
import pytest

from lm.config import InputError
from lm.data.column import BLOCK, Column, SortedColumn, write_index


@pytest.mark.parametrize("size", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7])
def test_searches_are_numpys(tmp_path, size):
    """Values repeat, so that equal ones run over the edges of blocks."""
    random = np.random.default_rng(size)
    values = np.sort(random.integers(0, size, size))
    values.tofile(tmp_path / "sorted")
    write_index(tmp_path / "sorted", size)
    column = SortedColumn(tmp_path / "sorted", size)
    np.testing.assert_array_equal(column[:], values)
    for low in [-1, 0, int(values[-1]), int(values[-1]) + 1, *random.integers(0, size, 50).tolist()]:
        assert column.before(low) == np.searchsorted(values, low)
        high = low + int(random.integers(0, 2 * BLOCK))
        before, found = column.between(low, high)
        assert before == np.searchsorted(values, low)
        np.testing.assert_array_equal(found, values[(values >= low) & (values <= high)])


def test_slices_are_an_arrays(tmp_path):
    values = np.arange(100, dtype=np.uint16)
    (tmp_path / "a").write_bytes(b"head" + values.tobytes())
    column = Column(tmp_path / "a", np.uint16, 100, offset=4)
    for part in (slice(None), slice(3, 9), slice(9, 3), slice(-5, None), slice(90, 200)):
        np.testing.assert_array_equal(column[part], values[part])
    assert (column[7], column[-1], len(column)) == (7, 99, 100)
    with pytest.raises(IndexError):
        column[100]


def test_what_is_cut_off_is_found_out(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(80))
    with pytest.raises(InputError, match=r"a is damaged: it has 80 bytes, not the 88"):
        Column(path, np.int64, 11)
    column = Column(path, np.int64, 10)
    path.write_bytes(bytes(40))
    assert column[4] == 0
    with pytest.raises(InputError, match="a is damaged: it has 40 bytes, not the 80"):
        column[2:6]
    with pytest.raises(InputError, match="can't be read: No such file"):
        Column(tmp_path / "b", np.int64, 1)
