"""Scatter against its definition and against the gather that it undoes; every engine, dtype and layout; its kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from engines import BLOCKS, each_engine, native_core, native_cuda, using
from hypothesis import given, settings
from hypothesis import strategies as st
from twins.rows import DTYPES, random_bits, raw, rows_ref

from actcache.errors import InputError
from actcache.models.gather import gather_rows, scatter_rows

ROOT = Path(__file__).resolve().parents[1]
KERNEL = "actcache_scatter_rows"
# ScatterParams of csrc/scatter.h, field by field.
PARAMS = np.dtype(
    [(name, "u8") for name in ("src", "row_ids", "dst")]
    + [(name, "i8") for name in ("n_dst_rows", "n_rows", "n_cols", "row_stride", "col_stride", "elem_bytes")]
)


def memory(tensor: torch.Tensor) -> np.ndarray:
    """All bytes of the storage that a view lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def scatter_ref(src: torch.Tensor, row_ids: list[int], dst: torch.Tensor) -> np.ndarray:
    """The storage of dst afterwards: element (r, c) lies offset + r * stride[0] + c * stride[1] elements in."""
    storage, size, elements = memory(dst).copy(), dst.element_size(), raw(src)
    for i, r in enumerate(row_ids):
        for c in range(dst.shape[1]):
            first = (dst.storage_offset() + r * dst.stride(0) + c * dst.stride(1)) * size
            storage[first : first + size] = elements[i, c]
    return storage


@st.composite
def targets_and_ids(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Rows, a view of any strides that keep elements apart (transposed, misaligned, with gaps) and distinct ids."""
    dtype = draw(st.sampled_from(DTYPES))
    n_rows, n_cols = draw(st.integers(1, 9)), draw(st.sampled_from([0, 1, 2, 3, 7, 8, 16, 31, 64, 65]))
    inner, gap, offset = draw(st.integers(1, 3)), draw(st.integers(0, 9)), draw(st.integers(0, 17))
    strides = (inner * max(n_cols, 1) + gap, inner) if draw(st.booleans()) else (inner, inner * n_rows + gap)
    flat = random_bits(offset + (n_rows - 1) * strides[0] + max(n_cols - 1, 0) * strides[1] + 1, dtype, n_cols)
    ids = draw(st.permutations(range(n_rows)))[: draw(st.integers(0, n_rows))]
    src = random_bits(len(ids) * n_cols, dtype, 1).view(len(ids), n_cols)
    return src, flat.as_strided((n_rows, n_cols), strides, offset), ids


@each_engine
@settings(max_examples=200, deadline=None)
@given(case=targets_and_ids())
def test_any_layout_equals_the_definition(name: str, case: tuple[torch.Tensor, torch.Tensor, list[int]]) -> None:
    src, dst, ids = case
    expected = scatter_ref(src, ids, dst)
    row_ids = torch.tensor(ids, dtype=torch.int64)
    with using(name):
        assert scatter_rows(src, row_ids, dst) is dst
        assert np.array_equal(memory(dst), expected), "rows in their places, all other bytes as they were"
        assert np.array_equal(raw(gather_rows(dst, row_ids)), raw(src)), "the gather undoes it"


@each_engine
def test_every_bfloat16_keeps_its_bits(name: str) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(256, 256)
    ids = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    dst = torch.zeros(256, 256, dtype=torch.bfloat16)
    with using(name):
        scatter_rows(bits.view(torch.bfloat16), ids, dst)
    assert np.array_equal(dst.view(torch.uint16).numpy()[ids.numpy()], bits.numpy())


@pytest.mark.parametrize("columns", [slice(None), slice(None, None, 2)], ids=["runs", "strided"])
def test_threads_agree(columns: slice) -> None:
    core = native_core()
    ids = torch.from_numpy(np.random.default_rng(0).permutation(1500)[:1381])
    src = random_bits(1381 * 6000, torch.int16).view(1381, 6000)[:, columns].contiguous()
    for n_threads in (1, 3, 7, 5000):
        whole = torch.zeros(1500, 6000, dtype=torch.int16)
        dst = whole[:, columns]
        strides = [stride * 2 for stride in dst.stride()]
        core.scatter_rows(dst.numpy(), *dst.shape, 2, *strides, ids.data_ptr(), len(ids), src.data_ptr(), n_threads)
        assert torch.equal(dst[ids], src), n_threads
        assert torch.count_nonzero(whole) == torch.count_nonzero(src)


@each_engine
@pytest.mark.parametrize(
    ("src", "ids", "dst", "says"),
    [
        (torch.zeros(2, 3), [4, 5], torch.zeros(5, 3), r"row_ids\[1\] is 5, expected 0 <= id < 5"),
        (torch.zeros(2, 3), [-1, 5], torch.zeros(5, 3), r"row_ids\[0\] is -1"),
        (torch.zeros(4, 3), [1, 2, 2, 1], torch.zeros(5, 3), r"row_ids\[2\] is 2 again"),
        (torch.zeros(1, 3), [0], torch.zeros(1, 3).expand(5, 3), "a place of its own"),
        (torch.zeros(1, 3), [0], torch.zeros(9).unfold(0, 3, 2), "a place of its own"),
        (torch.zeros(1, 3), [0], torch.complex(torch.ones(2, 3), torch.ones(2, 3)).conj().imag, "negated"),
        (torch.zeros(2, 3), [0], torch.zeros(5, 3), r"src is contiguous torch.float32 \(2, 3\)"),
        (torch.zeros(1, 4), [0], torch.zeros(5, 3), r"src is contiguous torch.float32 \(1, 4\)"),
        (torch.zeros(1, 3).bfloat16(), [0], torch.zeros(5, 3), "src is contiguous torch.bfloat16"),
        (torch.zeros(3, 2).t(), [0, 1], torch.zeros(5, 3), "src is strided"),
        (torch.zeros(1, 3, device="meta"), [0], torch.zeros(5, 3), "on meta"),
        (torch.zeros(1, 3), [0], torch.zeros(5), r"dst is torch.strided of shape \(5,\)"),
        (torch.zeros(1, 3), [0], torch.zeros(5, 3, dtype=torch.complex64), "dst is torch.complex64"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(name: str, src: torch.Tensor, ids: list[int], dst: torch.Tensor, says: str) -> None:
    before = dst.clone()
    with using(name), pytest.raises(InputError, match=says):
        scatter_rows(src, torch.tensor(ids), dst)
    assert torch.equal(dst, before)


@each_engine
def test_nothing_is_shared(name: str) -> None:
    both = torch.arange(30, dtype=torch.int64)
    with using(name):
        with pytest.raises(InputError, match="src shares memory with dst"):
            scatter_rows(both[14:20].view(2, 3), torch.tensor([4, 0]), both[:15].view(5, 3))
        with pytest.raises(InputError, match="src shares memory with row_ids"):
            scatter_rows(both[27:].view(1, 3), both[29:], torch.zeros(50, 3, dtype=torch.int64))


def test_the_core_checks_before_it_writes() -> None:
    core = native_core()
    src, ids, dst = np.zeros((2, 3), np.int32), np.array([4, 5], np.int64), np.full((5, 3), 8, np.int32)
    sizes = {"n_dst_rows": 5, "n_cols": 3, "elem_bytes": 4, "row_stride_bytes": 12, "col_stride_bytes": 4, "n_rows": 2}
    given_ = {"dst": dst, "row_ids_ptr": ids.ctypes.data, "src_ptr": src.ctypes.data, "n_threads": 1}
    with pytest.raises(IndexError, match=r"row_ids\[1\] is 5, expected 0 <= id < 5"):
        core.scatter_rows(**sizes, **given_)
    for changed, says in (
        ({"n_rows": -1}, "scatter_rows: counts must not be negative"),
        ({"elem_bytes": 3}, "elem_bytes must be"),
        ({"row_stride_bytes": 2**62}, r"must not span.*n_dst_rows 5"),
        ({"src_ptr": 0}, "must not be null"),
        ({"n_threads": 0}, "n_threads is 0"),
    ):
        with pytest.raises(ValueError, match=says):
            core.scatter_rows(**{**sizes, **given_, **changed})
    assert (dst == 8).all()


@pytest.fixture(scope="module", params=["sm_80", pytest.param("sm_90", marks=pytest.mark.deep)])
def ptx(request: pytest.FixtureRequest, ptxsim: ModuleType) -> str:
    """The kernel's PTX."""
    return ptxsim.compile_cu(str(ROOT / "csrc" / "scatter_cuda.cu"), request.param)


def launch(
    module: ModuleType,
    sim: Any,
    *,
    n_cols: int = 64,
    elem_bytes: int = 2,
    strides: tuple[int, int] | None = None,
    ids: Any = (3, 0, 8, 5),
    align_off: tuple[int, int] = (0, 0),
    block: tuple[int, int] = BLOCKS[0],
    n_blocks: int = 3,
    **options: Any,
) -> Any:
    """One scatter in the simulator, checked against NumPy: every byte that should be written is, and no other."""
    rng = np.random.default_rng(0)
    n_dst_rows, (row, col), element = 9, strides or (n_cols, 1), np.dtype(f"u{elem_bytes}")
    row_ids = np.asarray(ids, np.int64)
    src = rng.integers(1, 256, len(row_ids) * n_cols * elem_bytes, np.uint8).view(element).reshape(-1, n_cols)
    flat = np.zeros((n_dst_rows - 1) * row + (n_cols - 1) * col + 1, element)
    out = module.Out(flat, align_off=align_off[1])
    sizes = (n_dst_rows, len(row_ids), n_cols, row * elem_bytes, col * elem_bytes, elem_bytes)
    source = module.Buf(src, "in", align_off=align_off[0])
    params = (np.array((0, 0, 0, *sizes), PARAMS)[()], source, 0, module.In(row_ids), 8, out, 16)
    stats = sim.launch(KERNEL, n_blocks, block, [params], racecheck=True, race_global=True, **options)
    expected = np.zeros_like(flat)
    for i, r in enumerate(row_ids):
        expected[r * row + np.arange(n_cols) * col] = src[i]
    assert np.array_equal(flat, expected)
    assert len(out.unwritten) == flat.nbytes - src.nbytes
    return stats


CASES: list[dict[str, Any]] = [
    {"n_cols": 64},
    {"n_cols": 2048, "ids": [1, 0], "n_blocks": 1},
    {"n_cols": 100},
    {"n_cols": 67},
    {"n_cols": 67, "strides": (72, 1)},
    {"n_cols": 7},
    {"n_cols": 1},
    {"n_cols": 37, "elem_bytes": 1},
    {"n_cols": 50, "elem_bytes": 4},
    {"n_cols": 33, "elem_bytes": 8},
    {"n_cols": 64, "align_off": (8, 0)},
    {"n_cols": 64, "align_off": (0, 4)},
    {"n_cols": 64, "align_off": (6, 10)},
    {"n_cols": 40, "strides": (120, 3)},
    {"n_cols": 40, "strides": (120, 3), "elem_bytes": 8},
    {"n_cols": 30, "strides": (1, 9)},  # transposed
    {"n_cols": 24, "ids": list(range(9))[::-1]},
    {"n_cols": 24, "ids": [8]},
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_equals_numpy(ptxsim: ModuleType, ptx: str, case: dict[str, Any]) -> None:
    sim = ptxsim.PTX(ptx)
    for block in BLOCKS:
        launch(ptxsim, sim, block=block, **case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[13]], ids=str)
def test_the_order_of_warps_does_not_matter(
    ptxsim: ModuleType,
    ptx: str,
    case: dict[str, Any],
    seed: int,
) -> None:
    sim = ptxsim.PTX(ptx)
    for block in BLOCKS[:4]:
        launch(ptxsim, sim, **{**case, "block": block, "n_blocks": 5}, schedule="random", seed=seed)


def test_aligned_rows_move_in_16_bytes(ptxsim: ModuleType, ptx: str) -> None:
    sim = ptxsim.PTX(ptx)
    for align_off, width in (((0, 0), 16), ((8, 0), 8), ((0, 4), 4), ((2, 2), 2)):
        mix = launch(ptxsim, sim, n_cols=2048, ids=[1, 0], n_blocks=1, align_off=align_off, mix=True).mix
        assert sum(n for op, n in mix.items() if re.match(r"st\.global", op)) == 2 * 4096 // width
        assert (width == 16) == any(re.match(r"st\.global(\.\w+)*\.(v4\.[bu]32|v2\.[bu]64)", op) for op in mix)


def test_the_simulator_catches_one_row_written_twice(ptxsim: ModuleType, ptx: str) -> None:
    with pytest.raises(ptxsim.PTXError, match=r"race|different values"):
        launch(ptxsim, ptxsim.PTX(ptx), ids=[3, 3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        ("scatter.h", "p.dst + p.row_ids[i] * p.row_stride", "p.dst + i * p.row_stride", None),
        ("row_kernel.cuh", "switch (access_bytes(from, to))", "switch (kWidestAccess)", "misaligned"),
    ],
    ids=["ids are ignored", "alignment is ignored"],
)
def test_planted_faults_are_caught(
    ptxsim: ModuleType,
    edited: Callable[..., Any],
    file: str,
    old: str,
    new: str,
    fault: str | None,
) -> None:
    sim = edited(file, old, new, "scatter_cuda.cu")
    with pytest.raises(ptxsim.PTXError if fault else AssertionError, match=fault):
        launch(ptxsim, sim, n_cols=100, block=(32, 4), n_blocks=5)


def test_a_launch_that_would_fault_is_refused() -> None:
    module = native_cuda()
    for dst, row_stride, says in ((4098, 12, "multiples of elem_bytes"), (4096, 2**62, "must not span")):
        with pytest.raises(ValueError, match=says):
            module.scatter_rows(dst, 5, 3, 4, row_stride, 4, 4096, 2, 4096, 0)
    module.scatter_rows(0, 5, 3, 4, 12, 4, 0, 0, 0, 0)  # nothing to do, nothing launched


@pytest.mark.gpu
def test_scatter_on_the_device(device: torch.device) -> None:
    for dtype in DTYPES:
        whole = random_bits(20 * 46, dtype).view(20, 46)
        for columns in (slice(None), slice(1, 40, 3)):
            ids = torch.randperm(20)[:13]
            src = random_bits(13 * whole[:, columns].shape[1], dtype, 1).view(13, -1)
            for rows in (src.to(device), src.pin_memory()):
                dst = whole.clone().to(device)
                scatter_rows(rows, ids, dst[:, columns])
                torch.cuda.synchronize()
                expected = whole.clone()
                scatter_rows(src, ids, expected[:, columns])
                assert np.array_equal(raw(dst.cpu()), raw(expected)), dtype
                assert np.array_equal(raw(src), rows_ref(expected[:, columns], ids.tolist()))
