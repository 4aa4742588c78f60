"""What stages add to a single request's latency: the arithmetic, and a run of it."""

import pytest

from commfuse.bench.latency import added_by_stages, measure
from commfuse.models.smollm2 import ensure_smollm2


def test_a_stage_s_part_of_a_token_counts_at_the_pace_of_its_own_core():
    assert added_by_stages([[20, 20]], [22], [[0.5, 0.5]]) == pytest.approx([0.1])
    # The second core takes twice as long: two thirds of the time go into its half of the work.
    assert added_by_stages([[20, 40]], [30], [[2 / 3, 1 / 3]]) == pytest.approx([0])
    assert added_by_stages([[20, 40]], [33], [[2 / 3, 1 / 3]]) == pytest.approx([0.1])
    assert added_by_stages([[20, 40]], [20], [[0, 1]]) == pytest.approx([0])
    # Rounds are compared within themselves, so that a machine that slows down adds nothing.
    assert added_by_stages([[20, 20], [40, 40]], [20, 40], [[0.5] * 2] * 2) == pytest.approx([0, 0])


@pytest.mark.long
def test_a_request_in_two_stages_and_on_one_rank():
    row = measure(2, ensure_smollm2(), "float32", None)
    assert sum(row["layers"]) == 30 and len(row["one_rank_token_ms"]) == 2
    assert min(row["token_ms"], *row["one_rank_token_ms"]) > 0
    low, high = row["added_p20_p80"]
    assert -1 < low <= row["added"] <= high
