import numpy as np
import pytest

from lm.config import InputError
from lm.data import cache, plan
from lm.data.plan import plan_of
from lm.data.rows import make_rows

from .memory_store import store_of


def rows_of(store, packing, context):
    """The rows of a plan, each as a list of (start, length, ends)."""
    found = plan_of(store, context=context, packing=packing)
    rows = []
    for row in range(len(found)):
        _, pieces = found.pieces([row])
        rows.append(list(zip(*(pieces[name].tolist() for name in ("start", "length", "ends")), strict=True)))
    return rows


def corpora():
    draw = np.random.default_rng(0)
    yield [5], 5
    yield [0, 1, 0, 0, 1], 1
    yield [16, 32, 48, 17, 1], 16
    for _ in range(30):
        context = int(draw.integers(1, 20))
        yield draw.integers(0, 3 * context, draw.integers(2, 40)).tolist() + [1], context


@pytest.mark.parametrize("chunk", [3, 2**18])
def test_no_document_that_fits_is_cut_and_a_longer_one_only_into_full_rows_and_a_rest(chunk, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", chunk)  # few documents and rows at once, or all
    for sizes, context in corpora():
        store = store_of(sizes)
        for packing in ("best_fit", "padded"):
            pieces = sorted(piece for row in rows_of(store, packing, context) for piece in row)
            expected = []
            for start, size in zip(store.offsets.values.tolist(), sizes, strict=False):
                full = max(size - 1, 0) // context
                expected += [(start + n * context, context, False) for n in range(full)]
                if size:
                    expected.append((start + full * context, size - full * context, True))
            assert pieces == expected, (sizes, context, packing)


def test_padded_has_a_piece_a_row_and_best_fit_fills_them():
    store = store_of([10, 6, 6, 4, 3, 3, 16, 33])
    assert all(len(row) == 1 for row in rows_of(store, "padded", 16))
    packed = sorted([length for _, length, _ in row] for row in rows_of(store, "best_fit", 16))
    assert packed == [[1], [6, 4, 3, 3], [10, 6], [16], [16], [16]]


def test_a_small_store_is_a_row():
    for packing in ("best_fit", "padded"):
        assert len(make_rows(store_of([3]), context=100, packing=packing, prompt_loss=False)) == 1
    with pytest.raises(InputError, match="memory has no tokens"):
        make_rows(store_of([0, 0]), context=4, packing="padded", prompt_loss=False)


def test_a_plan_is_made_once_for_each_store_context_and_packing():
    said = []

    def plan(sizes, context, packing):
        plan_of(store_of(sizes), context=context, packing=packing, say=said.append)
        return len(said)

    assert plan([3, 4], 8, "best_fit") == 1
    assert said == ["packing    2 documents into rows of 8 tokens, once"]
    assert plan([3, 4], 8, "best_fit") == 1
    assert plan([4, 3], 8, "best_fit") == 2
    assert plan([3, 4], 9, "best_fit") == 3
    assert plan([3, 4], 8, "padded") == 4


DAMAGES = {
    "no JSON": ("plan.json", lambda data: b"{"),
    "no tokens": ("plan.json", lambda data: data.replace(b"tokens", b"others")),
    "cut": ("pieces.bin", lambda data: data[:-1]),
    "zero pieces": ("pieces.bin", lambda data: bytes(len(data))),
    "noise": ("pieces.bin", lambda data: b"\x7f" * len(data)),
    "zero rows": ("rows.bin", lambda data: bytes(len(data))),
    "gone": ("rows.bin", None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan_is_refused_with_the_folder_to_delete(damage):
    store = store_of([3, 4, 9])
    rows_of(store, "best_fit", 4)
    (folder,) = cache.directory("plans").iterdir()
    name, change = DAMAGES[damage]
    if change is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(InputError, match=str(folder)):
        rows_of(store, "best_fit", 4)
