"""The gather that splits bf16 words on the way, against gather and split one after the other; its kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gather import VIEWS, each_engine, native_core, random_bits, rows_ref, using
from test_gather_cuda import BLOCKS, ROOT, device, edited, native_cuda, ptxsim  # noqa: F401 (fixtures)

from actcache.errors import InputError
from actcache.models.gather import gather_planes
from actcache.store.planes import encode, encode_planes

KERNEL = "actcache_gather_planes"
# PlanesParams of csrc/planes.h, field by field.
PARAMS = np.dtype(
    [(name, "u8") for name in ("src", "row_ids", "exponents")]
    + [(name, "i8") for name in ("n_src_rows", "n_rows", "n_cols", "row_stride", "col_stride", "elem_bytes")]
    + [("rests", "u8")]
)


def planes_ref(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bit by bit: s eeeeeeee mmmmmmm."""
    bits = np.unpackbits(words.astype(">u2").view(np.uint8).reshape(*words.shape, 2), axis=-1)
    rests = np.concatenate([bits[..., :1], bits[..., 9:]], axis=-1)
    return np.packbits(bits[..., 1:9], axis=-1)[..., 0], np.packbits(rests, axis=-1)[..., 0]


def rows_of(src: torch.Tensor, ids: list[int]) -> np.ndarray:
    """Words of the gathered rows."""
    return np.ascontiguousarray(rows_ref(src, ids)).view("<u2")[..., 0]


@st.composite
def words_and_ids(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    """A view of any two strides at any offset and ids."""
    n_rows, n_cols = draw(st.integers(1, 9)), draw(st.sampled_from([0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 130]))
    strides, offset = (draw(st.integers(0, 140)), draw(st.sampled_from([0, 1, 1, 1, 2, 5]))), draw(st.integers(0, 17))
    flat = random_bits(offset + (n_rows - 1) * strides[0] + max(n_cols - 1, 0) * strides[1] + 1, torch.bfloat16, n_cols)
    ids = draw(st.lists(st.integers(0, n_rows - 1), max_size=12))
    return flat.as_strided((n_rows, n_cols), strides, offset), ids


@each_engine
@settings(max_examples=200, deadline=None)
@given(case=words_and_ids(), own_out=st.booleans(), isa=st.integers(0, 2))
def test_any_layout_equals_gather_then_split(
    name: str, case: tuple[torch.Tensor, list[int]], own_out: bool, isa: int
) -> None:
    src, ids = case
    shape = (len(ids), src.shape[1])
    out = (torch.full(shape, 7, dtype=torch.uint8), torch.full(shape, 7, dtype=torch.uint8)) if own_out else None
    core = native_core()
    try:
        core.limit_isa(isa)
        with using(name):
            exponents, rests = gather_planes(src, torch.tensor(ids, dtype=torch.int64), out)
    finally:
        core.limit_isa(2)
    if out is not None:
        assert exponents is out[0]
        assert rests is out[1]
    expected = planes_ref(rows_of(src, ids))
    assert np.array_equal(exponents.numpy(), expected[0])
    assert np.array_equal(rests.numpy(), expected[1])


@each_engine
def test_every_bfloat16(name: str) -> None:
    words = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(256, 256)
    ids = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    expected = planes_ref(words.numpy()[ids.numpy()])
    with using(name):
        for dtype in (torch.bfloat16, torch.int16, torch.uint16):
            exponents, rests = gather_planes(words.view(dtype), ids)
            assert np.array_equal(exponents.numpy(), expected[0])
            assert np.array_equal(rests.numpy(), expected[1])
        chunk = encode(words.numpy()[ids.numpy()], 256)
        assert encode_planes(exponents.numpy(), rests.numpy(), 256) == chunk


@pytest.mark.parametrize("columns", [slice(None), slice(None, None, 2)], ids=["runs", "strided"])
def test_threads_agree(columns: slice) -> None:
    core = native_core()
    src = random_bits(500 * 6000, torch.int16).view(500, 6000)[:, columns]
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 500, 1381))
    expected = planes_ref(src.numpy().view(np.uint16)[ids.numpy()])
    geometry = (src.data_ptr(), *src.shape, 2, src.stride(0) * 2, src.stride(1) * 2, ids.data_ptr(), len(ids))
    for n_threads in (1, 3, 7, 5000):
        planes = [np.zeros(expected[0].shape, np.uint8) for _ in range(2)]
        core.gather_planes(*geometry, *planes, n_threads)
        assert np.array_equal(planes[0], expected[0]), n_threads
        assert np.array_equal(planes[1], expected[1]), n_threads


def planes(n: int, d: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(n, d, dtype=torch.uint8, **options), torch.zeros(n, d, dtype=torch.uint8, **options)


WORDS = torch.zeros(5, 4, dtype=torch.bfloat16)


@each_engine
@pytest.mark.parametrize(
    ("src", "ids", "out", "says"),
    [
        (torch.zeros(5, 4), [0], None, "src is torch.float32, expected words of bfloat16"),
        (torch.zeros(5, 4).half(), [0], None, "src is torch.float16, expected words of bfloat16"),
        (torch.zeros(5).bfloat16(), [0], None, r"shape \(5,\)"),
        (WORDS, [0, 5], None, r"row_ids\[1\] is 5, expected 0 <= id < 5"),
        (WORDS, [0, 1], planes(2, 3), r"out is contiguous torch.uint8 \(2, 3\)"),
        (WORDS, [0, 1], planes(2, 4, device="meta"), "on meta"),
        (WORDS, [0, 1], (torch.zeros(2, 4, dtype=torch.uint8),) * 2, r"out\[0\] shares memory with out\[1\]"),
        (WORDS, [0, 1], (WORDS[:2].view(torch.uint8)[0].view(2, 4), planes(2, 4)[1]), "out shares memory with src"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(name: str, src: torch.Tensor, ids: list[int], out: Any, says: str) -> None:
    with using(name), pytest.raises(InputError, match=says):
        gather_planes(src, torch.tensor(ids), out)


def test_the_core_checks_before_it_writes() -> None:
    core = native_core()
    src, ids, out = np.zeros((5, 3), np.int16), np.array([4, 5], np.int64), np.full((2, 2, 3), 8, np.uint8)
    right = {"src_ptr": src.ctypes.data, "n_src_rows": 5, "n_cols": 3, "elem_bytes": 2, "row_stride_bytes": 6}
    right |= {"col_stride_bytes": 2, "row_ids_ptr": ids.ctypes.data, "n_rows": 2, "n_threads": 1}
    right |= {"exponents": out[0], "rests": out[1]}
    with pytest.raises(IndexError, match=r"row_ids\[1\] is 5"):
        core.gather_planes(**right)
    for changed, says in (
        ({"elem_bytes": 4}, "elem_bytes must be 2"),
        ({"n_cols": -1}, "must not be negative"),
        ({"n_threads": 0}, "n_threads is 0"),
    ):
        with pytest.raises(ValueError, match=says):
            core.gather_planes(**{**right, **changed})
    assert (out == 8).all()


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def ptx(request: pytest.FixtureRequest, ptxsim: ModuleType) -> str:  # noqa: F811
    """The kernel's PTX."""
    return ptxsim.compile_cu(str(ROOT / "csrc" / "planes_cuda.cu"), request.param)


def launch(
    module: ModuleType,
    sim: Any,
    *,
    n_cols: int = 64,
    strides: tuple[int, int] | None = None,
    ids: Any = (3, 0, 8, 8, 5),
    words: np.ndarray | None = None,
    align_off: tuple[int, int, int] = (0, 0, 0),
    block: tuple[int, int] = BLOCKS[0],
    n_blocks: int = 3,
    **options: Any,
) -> Any:
    """One gather in the simulator, checked against NumPy: every byte of both planes is written, and right."""
    (row, col), row_ids = strides or (n_cols, 1), np.asarray(ids, np.int64)
    flat = np.random.default_rng(0).integers(0, 65536, 8 * row + (n_cols - 1) * col + 1).astype("<u2")
    if words is not None:
        flat[: len(words)] = words
    out = np.zeros((len(row_ids), n_cols), np.uint8), np.zeros((len(row_ids), n_cols), np.uint8)
    targets = [module.Out(plane, align_off=offset) for plane, offset in zip(out, align_off[1:], strict=True)]
    source = module.Buf(flat, "in", align_off=align_off[0])
    fields = np.array((0, 0, 0, 9, len(row_ids), n_cols, row * 2, col * 2, 2, 0), PARAMS)[()]
    params = (fields, source, 0, module.In(row_ids), 8, targets[0], 16, targets[1], 72)
    stats = sim.launch(KERNEL, n_blocks, block, [params], racecheck=True, race_global=True, **options)
    assert all(len(target.unwritten) == 0 for target in targets)
    expected = planes_ref(flat[row_ids[:, None] * row + np.arange(n_cols) * col])
    assert np.array_equal(out[0], expected[0])
    assert np.array_equal(out[1], expected[1])
    return stats


CASES: list[dict[str, Any]] = [
    {"n_cols": 64},
    {"n_cols": 2048, "ids": [1, 0], "n_blocks": 1},
    {"n_cols": 72},  # rows of words on 16, rows of bytes on 8: every second one wide
    {"n_cols": 67},
    {"n_cols": 67, "strides": (72, 1)},
    {"n_cols": 80, "strides": (88, 1)},  # wide, with gaps in the source
    {"n_cols": 15},
    {"n_cols": 16},
    {"n_cols": 17},
    {"n_cols": 1},
    {"n_cols": 64, "align_off": (8, 0, 0)},
    {"n_cols": 64, "align_off": (0, 8, 0)},
    {"n_cols": 64, "align_off": (0, 0, 1)},
    {"n_cols": 64, "align_off": (2, 3, 5)},
    {"n_cols": 40, "strides": (120, 3)},
    {"n_cols": 30, "strides": (1, 9)},  # transposed
    {"n_cols": 31, "strides": (0, 0)},
    {"n_cols": 24, "ids": [4] * 40},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_equals_numpy(ptxsim: ModuleType, ptx: str, case: dict[str, Any]) -> None:  # noqa: F811
    sim = ptxsim.PTX(ptx)
    for block in BLOCKS:
        launch(ptxsim, sim, block=block, **case)


@pytest.mark.parametrize("strides", [(8192, 1), (8193, 1)], ids=["wide", "by words"])
def test_the_kernel_on_all_words(ptxsim: ModuleType, ptx: str, strides: tuple[int, int]) -> None:  # noqa: F811
    words = np.zeros((8, strides[0]), np.uint16)
    words[:, :8192] = np.arange(65536).reshape(8, 8192)
    launch(ptxsim, ptxsim.PTX(ptx), n_cols=8192, strides=strides, ids=range(8), words=words.reshape(-1), n_blocks=8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[14]], ids=str)
def test_the_order_of_warps_does_not_matter(
    ptxsim: ModuleType,  # noqa: F811
    ptx: str,
    case: dict[str, Any],
    seed: int,
) -> None:
    sim = ptxsim.PTX(ptx)
    for block in BLOCKS[:4]:
        launch(ptxsim, sim, block=block, n_blocks=5, schedule="random", seed=seed, **case)


def test_aligned_rows_move_in_16_bytes(ptxsim: ModuleType, ptx: str) -> None:  # noqa: F811
    sim = ptxsim.PTX(ptx)
    wide = r"\.global(\.\w+)*\.(v4\.[bu]32|v2\.[bu]64)"
    mix = launch(ptxsim, sim, n_cols=2048, ids=[1, 0], n_blocks=1, mix=True).mix
    assert sum(n for op, n in mix.items() if re.match(f"ld{wide}", op)) == 2 * 4096 // 16
    assert sum(n for op, n in mix.items() if re.match(r"st\.global", op)) == 2 * 4096 // 16
    assert sum(n for op, n in mix.items() if re.match(f"st{wide}", op)) == 2 * 4096 // 16
    for align_off in ((8, 0, 0), (0, 8, 0), (0, 0, 8)):
        mix = launch(ptxsim, sim, n_cols=64, ids=[1], n_blocks=1, align_off=align_off, mix=True).mix
        assert not any(re.match(f"st{wide}", op) for op in mix)


@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        ("planes_cuda.cu", "access_bytes(from, rests) == kWidestAccess", "true", "misaligned"),
        ("planes_cuda.cu", "n_steps = n_cols /", "n_steps = (n_cols + 15) /", "out-of-bounds|race|different"),
        ("planes.h", "(low >> 8 & 0x00800080u)", "(low >> 8 & 0x00800000u)", None),
    ],
    ids=["alignment is ignored", "the tail is rounded up", "a sign is lost"],
)
def test_planted_faults_are_caught(
    ptxsim: ModuleType,  # noqa: F811
    edited: Callable[..., Any],  # noqa: F811
    file: str,
    old: str,
    new: str,
    fault: str | None,
) -> None:
    sim = edited(file, old, new, "planes_cuda.cu")
    align_off = (0, 0, 8 if fault == "misaligned" else 0)
    with pytest.raises(ptxsim.PTXError if fault else AssertionError, match=fault):
        launch(ptxsim, sim, n_cols=72, block=(32, 4), n_blocks=5, align_off=align_off)


def test_a_launch_that_would_fault_is_refused() -> None:
    module = native_cuda()
    for changed, says in (
        ((4097, 5, 3, 2, 6, 2), "multiples of elem_bytes"),
        ((4096, 5, 3, 2, 7, 2), "multiples of elem_bytes"),
        ((4096, 5, 3, 4, 12, 4), "elem_bytes must be 2"),
    ):
        with pytest.raises(ValueError, match=says):
            module.gather_planes(*changed, 4096, 2, 4096, 8192, 0)
    module.gather_planes(0, 5, 3, 2, 6, 2, 0, 0, 0, 0, 0)  # nothing to do, nothing launched


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS)
def test_views_on_the_device(device: torch.device, view: str) -> None:  # noqa: F811
    plain = random_bits(20 * 46, torch.bfloat16).view(20, 46)
    on_device = VIEWS[view](plain.to(device))
    ids = np.random.default_rng(1).integers(0, len(on_device), 13)
    expected = planes_ref(rows_of(VIEWS[view](plain), ids.tolist()))
    for out in (None, planes(*expected[0].shape, pin_memory=True)):
        exponents, rests = gather_planes(on_device, torch.from_numpy(ids), out)
        torch.cuda.synchronize()
        assert np.array_equal(exponents.cpu().numpy(), expected[0])
        assert np.array_equal(rests.cpu().numpy(), expected[1])
