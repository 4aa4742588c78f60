"""The CPU kernels of every instruction set that this processor has, in a process of their own."""

from pathlib import Path

import pytest

from commfuse.testing import RanksFailed, run_ranks

KERNELS = str(Path(__file__).parents[1] / "workers" / "kernels.py")


def instruction_sets() -> list[str]:
    with open("/proc/cpuinfo") as file:
        flags = set(file.read().split())
    found = ["plain"]
    if {"avx2", "fma", "f16c"} <= flags:
        found.append("avx2")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            found.append("avx512")
            if "avx512_bf16" in flags:
                found += ["avx512_fma", "avx512_bf16"]
                if {"amx_tile", "amx_bf16"} <= flags:
                    found.append("amx")
    return found


@pytest.fixture(scope="module", params=instruction_sets())
def results(request):
    env = {"COMMFUSE_CPU_ISA": request.param}
    (found,) = run_ranks(f"{KERNELS}:run", 1, env=env, timeout=120)
    assert found["isa"] == request.param
    return found


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("sums", id="sums are rounded to nearest even"),
        pytest.param("products", id="products are rounded to nearest even"),
        pytest.param("rows", id="a row does not depend on its batch"),
        pytest.param("threads", id="nor on the number of threads"),
        pytest.param("attention", id="attention of ragged batches and head shards"),
        pytest.param("argmax", id="argmax takes the first and finds NaN"),
    ],
)
def test_results(results, kind):
    assert results[kind] == []


def test_the_best_is_chosen():
    (found,) = run_ranks(f"{KERNELS}:chosen", 1, env={"COMMFUSE_CPU_ISA": ""})
    best = instruction_sets()[-1]
    with open("/proc/cpuinfo") as file:
        intel = "GenuineIntel" in file.read()
    assert found == ("avx512_fma" if intel and best == "avx512_bf16" else best)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(RanksFailed, match=r"COMMFUSE_CPU_ISA=sse9: this processor cannot run it"):
        run_ranks(f"{KERNELS}:chosen", 1, env={"COMMFUSE_CPU_ISA": "sse9"})
