"""The CUDA gather: nvcc's PTX run on the CPU by ptxsim against NumPy, and gather_rows on a device where there is one.

ptxsim is looked for in the folder that PTXSIM names, or in ../shared/ptxsim beside the repository.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from engines import BLOCKS, native_cuda
from twins.rows import DTYPES, VIEWS, random_bits, raw, rows_ref

from actcache.errors import InputError, KernelError
from actcache.models import gather
from actcache.models.gather import gather_rows, scatter_rows

ROOT = Path(__file__).resolve().parents[1]
KERNEL = "actcache_gather_rows"
# GatherParams of csrc/gather.h, field by field.
PARAMS = np.dtype(
    [(name, "u8") for name in ("src", "row_ids", "dst")]
    + [(name, "i8") for name in ("n_src_rows", "n_rows", "n_cols", "row_stride", "col_stride", "elem_bytes")]
)


@pytest.fixture(scope="module", params=["sm_80", pytest.param("sm_90", marks=pytest.mark.deep)])
def ptx(request: pytest.FixtureRequest, ptxsim: ModuleType) -> str:
    """The kernel's PTX."""
    return ptxsim.compile_cu(str(ROOT / "csrc" / "gather_cuda.cu"), request.param)


class Launch:
    """One gather in the simulator: random elements in, the result beside what NumPy says it should be."""

    def __init__(
        self,
        module: ModuleType,
        sim: Any,
        *,
        n_src_rows: int = 9,
        n_cols: int = 64,
        elem_bytes: int = 2,
        strides: tuple[int, int] | None = None,
        first: int | None = None,
        ids: Any = None,
        n_rows: int | None = None,
        align_off: tuple[int, int] = (0, 0),
        block: tuple[int, int] = BLOCKS[0],
        n_blocks: int = 3,
        **options: Any,
    ) -> None:
        rng = np.random.default_rng(0)
        row, col = strides or (n_cols, 1)
        spans = [(n_src_rows - 1) * row, (n_cols - 1) * col]
        before, behind = -sum(min(s, 0) for s in spans), sum(max(s, 0) for s in spans)
        element = np.dtype(f"u{elem_bytes}")
        flat = rng.integers(0, 256, (before + behind + 1) * elem_bytes, np.uint8).view(element)
        ids = np.asarray(rng.integers(0, n_src_rows, 17) if ids is None else ids, np.int64)
        source = np.lib.stride_tricks.as_strided(
            flat[before:], (n_src_rows, n_cols), (row * elem_bytes, col * elem_bytes), writeable=False
        )
        self.result = np.zeros((len(ids), n_cols), element)
        self.expected = source[np.clip(ids, 0, n_src_rows - 1)]
        out = module.Out(self.result, align_off=align_off[1])
        n_rows = len(ids) if n_rows is None else n_rows
        fields = (
            0,
            0,
            0,
            n_src_rows if first is None else first * elem_bytes,
            n_rows,
            n_cols,
            row * elem_bytes,
            col * elem_bytes,
            elem_bytes,
        )
        src = module.Buf(flat, "in", align_off=align_off[0])
        params = (np.array(fields, PARAMS)[()], src, 0, module.In(ids), 8, out, 16)
        self.stats = sim.launch(KERNEL, n_blocks, block, [params], racecheck=True, race_global=True, **options)
        self.n_unwritten = len(out.unwritten)

    def check(self) -> None:
        """Every byte written, and right."""
        assert self.n_unwritten == 0
        assert np.array_equal(self.result, self.expected)


RUNS = [
    {"n_cols": 64},  # whole 16-byte words
    {"n_cols": 4096, "ids": [3, 0, 3], "n_blocks": 2},
    {"n_cols": 100},  # rows on multiples of 8: every second one begins on 16
    {"n_cols": 67},  # rows on multiples of 2
    {"n_cols": 67, "strides": (72, 1)},  # source rows on 16, destination rows on 2
    {"n_cols": 7},  # less than one word
    {"n_cols": 1},
    {"n_cols": 37, "elem_bytes": 1},
    {"n_cols": 50, "elem_bytes": 4},
    {"n_cols": 33, "elem_bytes": 8},
    {"n_cols": 1, "elem_bytes": 8},
    {"n_cols": 64, "align_off": (8, 0)},
    {"n_cols": 64, "align_off": (0, 8)},
    {"n_cols": 64, "align_off": (4, 4)},
    {"n_cols": 64, "align_off": (2, 0)},
    {"n_cols": 64, "align_off": (6, 10)},
    {"n_cols": 64, "elem_bytes": 1, "align_off": (1, 3)},
    {"n_cols": 64, "strides": (0, 1)},  # one row, repeated
    {"n_cols": 64, "strides": (5, 1)},  # overlapping windows
    {"n_cols": 64, "ids": [8]},
    {"n_cols": 24, "ids": [4] * 40},
    {"n_cols": 24, "ids": list(range(9))[::-1]},
    {"n_cols": 24, "n_src_rows": 1, "ids": [0, 0]},
]
STRIDED = [{"n_cols": 40, "strides": (120, 3), "elem_bytes": elem_bytes} for elem_bytes in (1, 2, 4, 8)] + [
    {"n_cols": 130, "strides": (1, 9)},  # transposed
    {"n_cols": 31, "strides": (31, 0)},  # a column, repeated
    {"n_cols": 31, "strides": (0, 0)},
    {"n_cols": 1, "strides": (5, 7)},
    {"n_cols": 40, "strides": (80, 2), "align_off": (2, 6)},
]


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS + STRIDED, ids=str)
def test_the_kernel_equals_numpy(ptxsim: ModuleType, ptx: str, case: dict[str, Any]) -> None:
    sim = ptxsim.PTX(ptx)
    for block in BLOCKS:
        Launch(ptxsim, sim, block=block, **case).check()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", [RUNS[2], RUNS[4], STRIDED[1]], ids=str)
def test_the_order_of_warps_does_not_matter(ptxsim: ModuleType, ptx: str, case: dict[str, Any], seed: int) -> None:
    sim = ptxsim.PTX(ptx)
    for block in BLOCKS[:4]:
        Launch(ptxsim, sim, block=block, n_blocks=5, schedule="random", seed=seed, **case).check()


def test_aligned_rows_move_in_16_bytes(ptxsim: ModuleType, ptx: str) -> None:
    assert re.search(r"ld\.global(\.\w+)*\.(v4\.[bu]32|v2\.[bu]64)", ptx)
    assert re.search(r"st\.global(\.\w+)*\.(v4\.[bu]32|v2\.[bu]64)", ptx)
    sim = ptxsim.PTX(ptx)

    def accesses(**case: Any) -> int:
        mix = Launch(ptxsim, sim, ids=[1, 0], n_blocks=1, mix=True, **case).stats.mix
        return sum(n for op, n in mix.items() if re.match(r"st\.global", op))

    # Thread by thread: two rows of 4096 bytes, in the widest access that their addresses allow.
    for align_off, width in (((0, 0), 16), ((8, 0), 8), ((0, 4), 4), ((2, 2), 2)):
        assert accesses(n_cols=2048, align_off=align_off) == 2 * 4096 // width


@pytest.mark.slow
@pytest.mark.parametrize("strides", [(-64, 1), (64, -1), (-130, -2), (-1, -9)], ids=str)
def test_negative_strides(ptxsim: ModuleType, edited: Callable[..., Any], strides: tuple[int, int]) -> None:
    # A simulated pointer is the start of a buffer; with negative strides the first element lies inside one, as many
    # bytes in as is said by the one parameter that the kernel does not read.
    head = "actcache_gather_rows(const GatherParams p) {"
    sim = edited("gather_cuda.cu", head, "actcache_gather_rows(GatherParams p) { p.src += p.n_src_rows;")
    first = -sum(min(s, 0) * (n - 1) for s, n in zip(strides, (9, 64), strict=True))
    for block in BLOCKS:
        Launch(ptxsim, sim, strides=strides, first=first, block=block).check()


@pytest.mark.parametrize(
    "case",
    [{"ids": [0, 9]}, {"ids": [-1]}, {"ids": [2**40]}, {"n_rows": 18}, {"ids": [9], "strides": (128, 2)}],
    ids=str,
)
def test_the_simulator_catches_an_access_out_of_range(ptxsim: ModuleType, ptx: str, case: dict[str, Any]) -> None:
    with pytest.raises(ptxsim.PTXError, match="out-of-bounds"):
        Launch(ptxsim, ptxsim.PTX(ptx), **case)


def test_the_simulator_catches_a_row_left_out(ptxsim: ModuleType, ptx: str) -> None:
    assert Launch(ptxsim, ptxsim.PTX(ptx), n_rows=16).n_unwritten == 64 * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        ("gather.h", "p.dst + i * row_bytes(p)", "p.dst + i * (row_bytes(p) / 32) * 16", "race|different values"),
        ("row_kernel.cuh", "switch (access_bytes(from, to))", "switch (kWidestAccess)", "misaligned"),
        ("row_kernel.cuh", "n_bytes / size;", "(n_bytes + size - 1) / size;", "out-of-bounds|race|different values"),
    ],
    ids=["rows overlap", "alignment is ignored", "the tail is rounded up"],
)
def test_the_simulator_catches_planted_faults(
    ptxsim: ModuleType, edited: Callable[..., Any], file: str, old: str, new: str, fault: str
) -> None:
    with pytest.raises(ptxsim.PTXError, match=fault):
        Launch(ptxsim, edited(file, old, new), n_cols=100, block=(32, 4), n_blocks=5)


@pytest.mark.deep  # where there is nvcc, the build of the package compiled the same with the same flags
@pytest.mark.parametrize("kernel", ["gather", "scatter"])
def test_every_generation_compiles_without_a_warning(tmp_path: Path, kernel: str) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    strict = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Wconversion,-Werror", "-std=c++17"]
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 86, 89, 90, 100)]
    source, built = ROOT / "csrc" / f"{kernel}_cuda.cu", tmp_path / "kernel.o"
    ran = subprocess.run(["nvcc", "-c", *strict, *targets, source, "-o", built], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def has_device() -> bool:
    try:
        return native_cuda().device_count() > 0
    except RuntimeError:
        return False


def test_without_a_device_the_module_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = native_cuda()
    if has_device():
        pytest.skip("there is a CUDA device")
    with pytest.raises(RuntimeError, match=r"device_count: CUDA error \d+ \(cudaError\w+\): "):
        module.device_count()

    class OnTheHost:
        """The module behind tensors of the CPU, whose outputs come as arrays and not as pointers."""

        def __getattr__(self, name: str) -> Any:
            return lambda *given: getattr(module, name)(
                *(one.ctypes.data if isinstance(one, np.ndarray) else one for one in given)
            )

    monkeypatch.setattr(gather, "native", lambda kind: (OnTheHost(), ""))
    src, ids, says = torch.zeros(5, 3), torch.tensor([1]), r": CUDA error \d+ \(cudaError\w+\): .*ACTCACHE_ENGINE=torch"
    with pytest.raises(KernelError, match=f"{KERNEL}{says}"):
        gather_rows(src, ids)
    with pytest.raises(KernelError, match=f"actcache_scatter_rows{says}"):
        scatter_rows(torch.zeros(1, 3), ids, src)


@pytest.mark.parametrize(("n_rows", "n_cols"), [(0, 3), (1, 0), (0, 0)])
def test_an_empty_gather_launches_nothing(n_rows: int, n_cols: int) -> None:
    ids = torch.zeros(1, dtype=torch.int64)
    native_cuda().gather_rows(0, 5, n_cols, 4, 12, 4, ids.data_ptr(), n_rows, 0, 0)


@pytest.mark.parametrize(
    ("pointers_and_strides", "says"),
    [
        ((4098, 12, 4, 4096, 4096), "multiples of elem_bytes"),
        ((4096, 12, 4, 4096, 4097), "multiples of elem_bytes"),
        ((4096, 14, 4, 4096, 4096), "multiples of elem_bytes"),
        ((4096, 12, 6, 4096, 4096), "multiples of elem_bytes"),
        ((4096, 2**62, 4, 4096, 4096), "must not span"),
        ((0, 12, 4, 4096, 4096), "must not be null"),
    ],
    ids=str,
)
def test_a_launch_that_would_fault_is_refused(pointers_and_strides: tuple[int, ...], says: str) -> None:
    src, row_stride, col_stride, ids, dst = pointers_and_strides
    with pytest.raises(ValueError, match=says):
        native_cuda().gather_rows(src, 5, 3, 4, row_stride, col_stride, ids, 2, dst, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS)
def test_views_on_the_device(device: torch.device, view: str) -> None:
    for dtype in DTYPES:
        plain = random_bits(20 * 46, dtype).view(20, 46)
        on_device = VIEWS[view](plain.to(device))
        ids = np.random.default_rng(1).integers(0, len(on_device), 13)
        expected = rows_ref(VIEWS[view](plain), ids.tolist())
        assert np.array_equal(raw(gather_rows(on_device, torch.from_numpy(ids)).cpu()), expected), dtype
        pinned = torch.empty(expected.shape[:2], dtype=dtype, pin_memory=True)
        assert gather_rows(on_device, torch.from_numpy(ids), pinned) is pinned
        torch.cuda.synchronize()
        assert np.array_equal(raw(pinned), expected), dtype


@pytest.mark.gpu
def test_ids_may_be_changed_at_once(device: torch.device) -> None:
    src = torch.randn(4096, 1024, device=device)
    ids = torch.randperm(4096).pin_memory()
    expected, stream = src[ids.to(device)], torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        rows = gather_rows(src, ids)
        ids.zero_()
    stream.synchronize()
    assert torch.equal(rows, expected)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device: torch.device) -> None:
    n_rows, n_cols = 70_000, 65_536
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("less than 6 GiB of device memory free")
    src = torch.zeros(n_rows, n_cols, dtype=torch.uint8, device=device)
    src[-1] = torch.arange(n_cols, device=device).to(torch.uint8)
    assert torch.equal(gather_rows(src, torch.tensor([0, n_rows - 1])), src[[0, n_rows - 1]])


@pytest.mark.gpu
def test_a_bad_id_is_found_before_the_launch(device: torch.device) -> None:
    out = torch.full((2, 3), 8.0, device=device)
    with pytest.raises(InputError, match=r"row_ids\[1\] is 5, expected 0 <= id < 5"):
        gather_rows(torch.zeros(5, 3, device=device), torch.tensor([0, 5]), out)
    assert (out == 8.0).all()
    with pytest.raises(InputError, match="page-locked"):
        gather_rows(torch.zeros(5, 3, device=device), torch.tensor([0]), torch.empty(1, 3))
