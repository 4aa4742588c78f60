"""Column- and row-parallel modules and the embedding: pieces put together equal the whole."""

from pathlib import Path

import pytest

from commfuse.testing import run_ranks

MODULES = str(Path(__file__).parents[1] / "workers" / "modules.py")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_pieces_make_the_whole(world_size):
    assert run_ranks(f"{MODULES}:run", world_size) == [[]] * world_size
