"""On GPUs, 1, 2 and 3 ranks: generation gives the CPU's tokens, with CUDA graphs and without.

Without a GPU these fail; `make test` leaves them out, `make gpu-test` runs them.
"""

from pathlib import Path

import pytest

from commfuse.testing import run_ranks

pytestmark = pytest.mark.gpu
WORKER = str(Path(__file__).parents[1] / "workers" / "gpu_generation.py")
CHECKS = {
    "attention": "attention over long caches and of long prompts",
    "tokens": "the CPU's tokens in float32",
    "graphs": "graphs change no bit",
    "company": "neither batch nor drafts change a token",
    "recipe": "a block of one's own in a graph",
    "memory": "a graph's memory goes with it",
}


@pytest.fixture(scope="module", params=[1, 2, 3])
def found(request, lab):
    return run_ranks(f"{WORKER}:run", request.param, timeout=200, lab=lab)


@pytest.mark.parametrize("check", [pytest.param(name, id=text) for name, text in CHECKS.items()])
def test_results(found, check):
    assert [rank[check] for rank in found] == [[]] * len(found)
