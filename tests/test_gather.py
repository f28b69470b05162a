"""Gather against its definition, byte by byte; every engine, dtype and layout."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from engines import each_engine, native_core, using
from hypothesis import given, settings
from hypothesis import strategies as st
from twins.rows import DTYPES, VIEWS, random_bits, raw, rows_ref

from actcache.errors import InputError, KernelError
from actcache.models.gather import describe_engines, engine, gather_rows


@st.composite
def sources_and_ids(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    """A view of any two strides at any offset (so also overlapping, transposed, expanded and misaligned) and ids."""
    dtype = draw(st.sampled_from(DTYPES))
    n_rows, n_cols = draw(st.integers(1, 9)), draw(st.sampled_from([0, 1, 2, 3, 7, 8, 16, 31, 64, 65]))
    strides = draw(st.integers(0, 70)), draw(st.sampled_from([0, 1, 1, 1, 2, 5, 9]))
    offset = draw(st.integers(0, 17))
    flat = random_bits(offset + (n_rows - 1) * strides[0] + max(n_cols - 1, 0) * strides[1] + 1, dtype, n_cols)
    ids = draw(st.lists(st.integers(0, n_rows - 1), max_size=12))
    return flat.as_strided((n_rows, n_cols), strides, offset), ids


@each_engine
@settings(max_examples=200, deadline=None)
@given(case=sources_and_ids(), own_out=st.booleans())
def test_any_layout_equals_the_definition(name: str, case: tuple[torch.Tensor, list[int]], own_out: bool) -> None:
    src, ids = case
    out = random_bits(len(ids) * src.shape[1], src.dtype, 1).view(len(ids), src.shape[1]) if own_out else None
    with using(name):
        result = gather_rows(src, torch.tensor(ids, dtype=torch.int64), out)
    assert out is None or result is out
    assert result.is_contiguous()
    assert result.dtype == src.dtype
    assert np.array_equal(raw(result), rows_ref(src, ids))


@each_engine
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_views_that_people_make(name: str, view: str, dtype: torch.dtype) -> None:
    src = VIEWS[view](random_bits(20 * 46, dtype).view(20, 46))
    ids = np.random.default_rng(1).integers(0, len(src), 13).tolist()
    with using(name):
        assert np.array_equal(raw(gather_rows(src, torch.tensor(ids))), rows_ref(src, ids))


@each_engine
def test_every_bfloat16_keeps_its_bits(name: str) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(256, 256)
    ids = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    with using(name):
        rows = gather_rows(bits.view(torch.bfloat16), ids).view(torch.uint16)
    assert np.array_equal(rows.numpy(), bits.numpy()[ids.numpy()])


@each_engine
@pytest.mark.parametrize(("n_rows", "n_cols", "ids"), [(0, 5, []), (4, 0, [3, 3, 0]), (4, 5, []), (0, 0, [])])
def test_nothing_to_copy(name: str, n_rows: int, n_cols: int, ids: list[int]) -> None:
    with using(name):
        result = gather_rows(torch.zeros(n_rows, n_cols), torch.tensor(ids, dtype=torch.int64))
    assert result.shape == (len(ids), n_cols)


@each_engine
def test_ids_of_any_stride(name: str) -> None:
    src = random_bits(60, torch.int16).view(10, 6)
    every_third = torch.arange(10).flip(0)[::3]
    with using(name):
        assert np.array_equal(raw(gather_rows(src, every_third)), rows_ref(src, [9, 6, 3, 0]))


@each_engine
def test_bools(name: str) -> None:
    src = torch.tensor([[True, False, True], [False, False, True]])
    with using(name):
        assert gather_rows(src, torch.tensor([1, 0, 1])).tolist() == [src.tolist()[i] for i in (1, 0, 1)]


@each_engine
def test_elements_off_their_own_alignment(name: str) -> None:
    src = torch.frombuffer(bytearray(range(1, 42)), dtype=torch.float32, offset=1).view(2, 5)
    assert src.data_ptr() % 4 != 0
    with using(name):
        assert np.array_equal(raw(gather_rows(src, torch.tensor([1, 0, 1]))), rows_ref(src, [1, 0, 1]))


@each_engine
def test_a_pending_negation_is_carried_out(name: str) -> None:
    src = torch.complex(torch.ones(3, 4), torch.arange(12.0).view(3, 4)).conj().imag
    assert src.is_neg()
    with using(name):
        assert gather_rows(src, torch.tensor([2, 0])).tolist() == [[-8.0, -9.0, -10.0, -11.0], [-0.0, -1.0, -2.0, -3.0]]


@each_engine
def test_autograd_is_left_alone(name: str) -> None:
    src, out = torch.ones(3, 4, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    with using(name):
        assert not gather_rows(src, torch.tensor([2, 0])).requires_grad
        gather_rows(src, torch.tensor([2, 0]), out)
    assert out.tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("columns", [slice(None), slice(None, None, 2)], ids=["runs", "strided"])
def test_threads_agree(columns: slice) -> None:
    core = native_core()
    whole = random_bits(500 * 6000, torch.int16).view(500, 6000)
    src = whole[:, columns]
    # Seven threads' worth of work, and a number of rows that none of the counts divides.
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 500, 1381))
    expected = whole.numpy()[ids.numpy()][:, columns]
    for n_threads in (1, 2, 3, 7, 5000):
        out = torch.full(expected.shape, -1, dtype=torch.int16)
        core.gather_rows(
            src.data_ptr(),
            *src.shape,
            2,
            src.stride(0) * 2,
            src.stride(1) * 2,
            ids.data_ptr(),
            len(ids),
            out.numpy(),
            n_threads,
        )
        assert np.array_equal(out.numpy(), expected), n_threads


@pytest.mark.parametrize(
    "view", [np.s_[::-1], np.s_[:, ::-1], np.s_[::-2, ::-3]], ids=["rows", "columns", "rows and columns"]
)
def test_negative_strides(view: Any) -> None:
    core = native_core()
    src = np.arange(99, dtype=np.int32).reshape(9, 11)[view]
    ids = np.array([2, 0, 4, 4], np.int64)
    out = np.zeros((len(ids), src.shape[1]), np.int32)
    core.gather_rows(src.ctypes.data, *src.shape, 4, *src.strides, ids.ctypes.data, len(ids), out, 1)
    assert np.array_equal(out, src[ids])


@each_engine
@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("at", [0, 3])
def test_a_bad_id_is_named_and_nothing_is_written(name: str, wrong: int, at: int) -> None:
    ids = torch.tensor([0, 4, 1, 2])
    ids[at] = wrong
    ids = torch.cat([ids, torch.tensor([-7])])  # a later one is not the one to name
    out = torch.full((5, 3), 8.0)
    with using(name), pytest.raises(InputError) as caught:
        gather_rows(torch.zeros(5, 3), ids, out)
    assert str(caught.value) == f"row_ids[{at}] is {wrong}, expected 0 <= id < 5"
    assert (out == 8.0).all()


@each_engine
def test_an_id_into_no_rows(name: str) -> None:
    with using(name), pytest.raises(InputError, match=r"row_ids\[0\] is 0, expected 0 <= id < 0"):
        gather_rows(torch.zeros(0, 3), torch.tensor([0]))


@each_engine
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.zeros(4), torch.tensor([0])), r"shape \(4,\)"),
        ((torch.zeros(2, 3, 4), torch.tensor([0])), r"shape \(2, 3, 4\)"),
        ((torch.zeros(4, 3).to_sparse(), torch.tensor([0])), "sparse_coo"),
        ((torch.zeros(4, 3, dtype=torch.complex64), torch.tensor([0])), "complex64"),
        ((torch.zeros(4, 3, dtype=torch.complex128), torch.tensor([0])), "complex128"),
        ((torch.zeros(4, 3), torch.tensor([0], dtype=torch.int32)), "int32"),
        ((torch.zeros(4, 3), torch.tensor([[0]])), r"row_ids are torch.int64 \(1, 1\)"),
        ((torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64, device="meta")), "on meta"),
        ((torch.zeros(4, 3), torch.tensor([0]), torch.zeros(1, 4)), r"out is contiguous torch.float32 \(1, 4\)"),
        ((torch.zeros(4, 3), torch.tensor([0]), torch.zeros(3)), r"out is contiguous torch.float32 \(3,\)"),
        ((torch.zeros(4, 3), torch.tensor([0]), torch.zeros(1, 3, dtype=torch.float64)), "torch.float64"),
        ((torch.zeros(4, 3), torch.tensor([0, 1]), torch.zeros(3, 2).t()), "out is strided"),
        ((torch.zeros(4, 3), torch.tensor([0]), torch.zeros(1, 3, device="meta")), "on meta"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(name: str, arguments: tuple[torch.Tensor, ...], says: str) -> None:
    with using(name), pytest.raises(InputError, match=says):
        gather_rows(*arguments)


@each_engine
def test_out_shares_no_memory(name: str) -> None:
    both = torch.arange(30, dtype=torch.int64)
    src, ids = both[:15].view(5, 3), torch.tensor([4, 0])
    with using(name):
        with pytest.raises(InputError, match="shares memory with src"):
            gather_rows(src, ids, both[14:20].view(2, 3))
        with pytest.raises(InputError, match="shares memory with row_ids"):
            gather_rows(src, both[29:], both[27:].view(1, 3))
        assert both.tolist() == list(range(30))
        gather_rows(src, ids, both[15:21].view(2, 3))
    assert both[15:21].tolist() == [12, 13, 14, 0, 1, 2]


FITTING = {
    "n_src_rows": 5,
    "n_cols": 3,
    "elem_bytes": 4,
    "row_stride_bytes": 12,
    "col_stride_bytes": 4,
    "n_rows": 2,
    "n_threads": 1,
}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"n_cols": 2**61, "n_rows": 0}, "must not exceed"),
        ({"n_cols": 2**62, "elem_bytes": 8}, "must not exceed"),
        ({"n_cols": 2**31, "n_rows": 2**31, "elem_bytes": 8}, "must not exceed"),
        ({"n_rows": 2**63 - 1}, "must not exceed"),
        ({"n_src_rows": 2**40, "row_stride_bytes": 2**40}, "must not span"),
        ({"n_src_rows": 2**40, "row_stride_bytes": -(2**40)}, "must not span"),
        ({"row_stride_bytes": -(2**63)}, "must not span"),
        ({"col_stride_bytes": 2**62}, "must not span"),
        ({"n_rows": -1}, "negative"),
        ({"n_cols": -1}, "negative"),
        ({"n_src_rows": -1}, "negative"),
        ({"elem_bytes": 3}, "elem_bytes must be .* elem_bytes 3"),
        ({"elem_bytes": 0}, "elem_bytes must be"),
        ({"elem_bytes": 16}, "elem_bytes must be"),
        ({"src_ptr": 0}, "must not be null"),
        ({"row_ids_ptr": 0}, "row_ids must not be null"),
        ({"row_ids_ptr": 0, "n_cols": 0}, "row_ids must not be null"),
        ({"n_threads": 0}, "n_threads is 0"),
    ],
    ids=str,
)
def test_the_core_refuses_what_it_cannot_address(changed: dict[str, int], says: str) -> None:
    core = native_core()
    src, ids, dst = np.zeros((5, 3), np.int32), np.array([4, 0], np.int64), np.full((2, 3), 8, np.int32)
    pointers = {"src_ptr": src.ctypes.data, "row_ids_ptr": ids.ctypes.data, "dst": dst}
    with pytest.raises(ValueError, match=says):
        core.gather_rows(**{**pointers, **FITTING, **changed})
    assert (dst == 8).all()
    core.gather_rows(**{**pointers, **FITTING})
    assert (dst == 0).all()


def test_the_core_checks_ids_before_it_writes() -> None:
    core = native_core()
    src, ids, dst = np.zeros((5, 3), np.int32), np.array([4, 5], np.int64), np.full((2, 3), 8, np.int32)
    with pytest.raises(IndexError, match=r"row_ids\[1\] is 5, expected 0 <= id < 5"):
        core.gather_rows(src_ptr=src.ctypes.data, row_ids_ptr=ids.ctypes.data, dst=dst, **FITTING)
    assert (dst == 8).all()


def test_the_engine_is_chosen_and_described() -> None:
    core = native_core()
    with using("cpu"):
        assert engine("cpu") == "cpu"
        assert engine("meta") == "torch"
        cpu, cuda = describe_engines()
    assert cpu.startswith(f"cpu: cpu (actcache._core {core.version()}")
    assert cuda.startswith(("cuda: cuda (actcache._cuda", "cuda: torch (actcache._cuda is not built"))
    with using("torch"):
        assert engine("cpu") == engine("cuda") == "torch"
        assert describe_engines() == ["cpu: torch (ACTCACHE_ENGINE=torch)", "cuda: torch (ACTCACHE_ENGINE=torch)"]


def test_an_engine_of_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with using("native"):
        monkeypatch.setenv("ACTCACHE_ENGINE", "fast")
        with pytest.raises(InputError, match="ACTCACHE_ENGINE is 'fast', expected torch"):
            gather_rows(torch.zeros(4, 3), torch.tensor([0]))


def test_torch_serves_where_the_core_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    with using("native"):
        monkeypatch.setitem(sys.modules, "actcache._core", None)
        assert engine("cpu") == "torch"
        assert describe_engines()[0].startswith("cpu: torch (actcache._core is not built: ")
        assert gather_rows(torch.eye(3), torch.tensor([2])).tolist() == [[0, 0, 1]]


def test_a_core_that_does_not_load_is_no_reason_to_serve_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError(f"{name}.so: undefined symbol: memcpy")

    with using("native"):
        monkeypatch.setattr("actcache.native.importlib.import_module", broken)
        with pytest.raises(KernelError, match=r"actcache\._core does not load \(.*undefined symbol"):
            gather_rows(torch.eye(3), torch.tensor([2]))
