"""Every op, every backend: shared cases and uneven splits against the float64 reference."""

from pathlib import Path

import pytest

from commfuse.testing import run_ranks

CORRIDOR = str(Path(__file__).parents[1] / "workers" / "corridor.py")
ALL = ["bfloat16", "float16", "float32"]


def instruction_sets() -> list[str]:
    """Those that this processor has besides the one it would choose."""
    with open("/proc/cpuinfo") as file:
        flags = file.read().split()
    found = ["plain", *(["avx2"] if {"avx2", "fma", "f16c"} <= set(flags) else [])]
    return [
        *found,
        *(["avx512_bf16"] if "avx512_bf16" in flags and "amx_bf16" not in flags else []),
    ]


def judge(results):
    failures, digests = zip(*results, strict=True)
    assert list(failures) == [[]] * len(failures)
    assert digests[0]
    assert all(rank == digests[0] for rank in digests)


JOBS = [
    (1, ALL, ""),
    (2, ALL, ""),
    (3, ["bfloat16", "float32"], ""),
    (4, ["bfloat16"], ""),
    # Their kernels, in every dtype: test_kernels.py.
    *((2, ["bfloat16"], isa) for isa in instruction_sets()),
]


@pytest.fixture(scope="module", params=JOBS, ids=lambda job: f"{job[0]} {job[2]}".strip())
def results(request):
    world_size, dtypes, isa = request.param
    env = {"COMMFUSE_CPU_ISA": isa}
    args = (dtypes, ["edge"], world_size <= 2 and not isa)
    return run_ranks(f"{CORRIDOR}:run", world_size, args=args, env=env, timeout=120)


def test_shared_cases(results):
    judge([rank["shared"] for rank in results])


def test_matmul_all_reduce_with_uneven_parts(results):
    judge([rank["uneven"] for rank in results])


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shared_cases_of_real_sizes(world_size):
    args = (ALL, ["quick", "more"])
    judge(run_ranks(f"{CORRIDOR}:shared_cases", world_size, args=args, timeout=280))
