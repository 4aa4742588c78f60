"""Stages give the tokens of one process, whatever the cut, and name a stage that is killed."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from commfuse.errors import UsageError
from commfuse.generation.statistics import bubble
from commfuse.models.checkpoint import open_checkpoint
from commfuse.models.smollm2 import ensure_smollm2
from commfuse.models.stages import StageCosts, cut_stages, parse_split
from commfuse.testing import run_ranks
from commfuse.testing.hosts import TwoHosts

PIPELINE = str(Path(__file__).parents[1] / "workers" / "pipeline.py")
LAYERS, NEW_TOKENS, GAP = 5, 12, 1e-4
PROMPTS = [list(range(1, 20)), [5], [7, 8, 9, 7, 8, 9, 7, 8], [9] * 7, [250, 3, 17]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(path, the model of transformers)."""
    path = tmp_path_factory.mktemp("pipeline") / "model"
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    found = LlamaForCausalLM(config).eval()
    found.save_pretrained(path)
    return str(path), found


@pytest.fixture(scope="module")
def whole(model):
    return run_ranks(f"{PIPELINE}:whole", 1, args=(model[0], PROMPTS, NEW_TOKENS))[0]


@pytest.fixture(
    scope="module",
    params=[(1, 2, None), (1, 3, [1, 3, 1]), (2, 2, [1, 4])],
    ids=lambda of: f"tp{of[0]} pp{of[1]}",
)
def job(request, model):
    tp, pp, split = request.param
    args = (model[0], tp, pp, split, PROMPTS, NEW_TOKENS)
    ranks = run_ranks(f"{PIPELINE}:run", tp * pp, args=args, timeout=120)
    counts = split or [len(s.layers) for s in cut_stages(_config(model[0]), pp)]
    return tp, counts, ranks


def _config(path):
    with open_checkpoint(Path(path)) as checkpoint:
        return checkpoint.config


@pytest.fixture(scope="module")
def reference(model):
    """By transformers, of each prompt: (greedy tokens, how far the best logit is ahead at each)."""
    found = []
    for prompt in PROMPTS:
        with torch.inference_mode():
            out = model[1].generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False,
                output_logits=True, return_dict_in_generate=True, pad_token_id=0,
            )  # fmt: skip
        best = torch.stack(out.logits)[:, 0].topk(2).values
        gaps = (best[:, 0] - best[:, 1]).tolist()
        found.append((out.sequences[0, len(prompt) :].tolist(), gaps))
    return found


def test_greedy_tokens_are_those_of_transformers(reference, whole, job):
    _, _, ranks = job
    for found in [whole, *(rank["results"] for rank in ranks)]:
        for name in ("greedy", "drafts"):
            for ours, (tokens, gaps) in zip(found[name][0], reference, strict=True):
                place = next((i for i in range(NEW_TOKENS) if ours[i] != tokens[i]), None)
                assert place is None or gaps[place] < GAP, name


def test_all_ranks_have_the_same_tokens_however_they_come(job):
    _, _, ranks = job
    for rank in ranks:
        found = rank["results"]
        assert found == ranks[0]["results"]
        assert found["greedy"][0] == found["drafts"][0] == found["small messages"]
        assert found["sampled"] == found["sampled drafts"]
        assert found["alone"] == found["greedy"][0][:2]
        assert rank["streamed"]


def test_stages_alone_do_not_change_a_bit(whole, job):
    tp, _, ranks = job
    if tp > 1:  # sums over ranks are rounded otherwise
        assert ranks[0]["results"]["greedy"][0] == whole["greedy"][0]
        return
    for name, found in whole.items():
        assert ranks[0]["results"][name] == found, name


def test_a_stage_reads_its_own_tensors_alone(job):
    tp, counts, ranks = job
    for index, rank in enumerate(ranks):
        stage = index // tp
        begin, last = sum(counts[:stage]), stage == len(counts) - 1
        own = list(range(begin, begin + counts[stage]))
        matrices = {int(n.split(".")[2]) for n in rank["names"] if "proj" in n}
        assert sorted(matrices) == own
        # The next stage's first norm comes along: the last block ends in it.
        assert rank["layers"] == (own if last else [*own, begin + counts[stage]])
        assert ("model.embed_tokens.weight" in rank["names"]) == (stage == 0 or last)
        assert ("model.norm.weight" in rank["names"]) == last
        assert rank["cache"] == counts[stage]


def test_statistics(job):
    _, counts, ranks = job
    stages = len(counts)
    for rank in ranks:
        found = rank["statistics"]
        assert found["groups"] == stages
        assert found["steps"] == stages * (NEW_TOKENS - 1)
        assert found["decode_tokens"] == len(PROMPTS) * (NEW_TOKENS - 1)
        assert found["prefill_passes"] == 2  # of 38 tokens, 32 and 6
        for phase in ("prefill_idle", "decode_idle"):
            assert len(found[phase]) == stages
            assert all(0 < part < 1 for part in found[phase])
        assert rank["small"]["prefill_passes"] == -(-38 // max(3, -(-38 // (4 * stages))))
        assert rank["small"]["groups"] == max(stages, 3)  # 2 requests of 4 rows each
        assert "so use at most 7" in rank["refused"]


def test_over_torch_distributed(model, whole):
    for rank in run_ranks(f"{PIPELINE}:over_torch", 2, args=(model[0], PROMPTS, NEW_TOKENS)):
        assert rank["outputs"] == whole["drafts"][0]
        assert "of 2, and the communicator's rank 0 of 1" in rank["refused"]


def test_layers_split_over_ranks_of_two_hosts(model, whole):
    args = (model[0], PROMPTS, NEW_TOKENS)
    for rank in run_ranks(f"{PIPELINE}:tensor_parallel_across_hosts", 3, args=args):
        assert rank["transport"] == "hierarchical"
        assert rank["outputs"] == whole["drafts"][0]


def test_stages_are_cut_by_what_one_rank_has_measured_for_all(model):
    first, second = run_ranks(f"{PIPELINE}:measured", 2, args=(model[0],))
    assert first["costs"] == second["costs"]
    costs = first["costs"]
    assert min(costs.embedding_ns, costs.layer_ns, costs.head_ns) > 0
    assert first["layers"] == second["layers"]
    for rank in (first, second):
        assert "hold layers 0 to 0, 2 to 4 of 5: each must begin where" in rank["refused"]


def test_a_straggling_stage_changes_no_token_and_a_stuck_one_is_named(model, whole):
    args = (model[0], PROMPTS, NEW_TOKENS)
    first, second = run_ranks(f"{PIPELINE}:straggling", 2, args=args)
    assert first["outputs"] == second["outputs"] == whole["drafts"][0]
    kind, text = first["stuck"]
    assert kind == "PeerTimeout"
    assert "among the stages, rank 0 waited 0.5 s for rank 1 in" in text


@pytest.mark.long
@pytest.mark.timeout(600)
def test_many_steps_with_delays_leave_nothing_behind(model):
    args = (model[0], PROMPTS, 40, 5000)
    for rank in run_ranks(f"{PIPELINE}:soak", 2, args=args, timeout=560):
        assert rank["steps"] >= 5000 and rank["outputs"] == 1
        assert rank["after"][:2] == rank["before"][:2]
        assert rank["after"][2] - rank["before"][2] < 16 << 20  # bytes


@pytest.mark.parametrize(("stages", "victim"), [(2, 1), (3, 1)])
def test_a_killed_stage_is_named_by_all_others(model, stages, victim, tmp_path):
    results = run_ranks(
        f"{PIPELINE}:dying", stages, args=(model[0], victim, str(tmp_path)), check=False
    )
    assert results[victim].status == -9
    for rank in set(range(stages)) - {victim}:
        kind, text, seconds = results[rank]
        assert kind == "PeerDied", text
        assert f"among the stages, rank {victim} is gone" in text
        assert seconds < 10


@pytest.mark.skipif(bool(TwoHosts.obstacle()), reason=f"two hosts: {TwoHosts.obstacle()}")
@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_stage_on_each_of_two_hosts(model, whole, tp, tmp_path):
    program = str(Path(__file__).parents[1] / "workers" / "two_hosts.py")
    arguments = [program, str(tmp_path), model[0], str(tp), json.dumps(PROMPTS), str(NEW_TOKENS)]
    with TwoHosts() as hosts:
        jobs = hosts.start_torchrun(arguments, tp)
        deadline = time.monotonic() + 90
        # torchrun itself waits for minutes for the one on the other host.
        while len(list(tmp_path.glob("*.json"))) < 2 * tp and time.monotonic() < deadline:
            time.sleep(0.1)
    said = [job.stdout.read() for job in jobs]
    found = {int(path.stem): json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(found) == list(range(2 * tp)), said
    for rank in found.values():
        assert rank["tp"] == ("local" if tp == 1 else "shared memory")
        assert rank["pp"] == "torch.distributed" and "2 hosts" in rank["why"]
        assert rank["outputs"] == whole["drafts"][0]
    for rank in range(tp):
        kind, text, seconds = found[rank]["killed"]
        assert kind == "PeerDied" and "among the stages, rank 1 is gone" in text, text
        assert seconds < 10


@pytest.mark.parametrize(
    ("costs", "layers"),
    [
        (StageCosts(0, 10, 0), [10, 10, 10]),
        (StageCosts(40, 10, 0), [8, 11, 11]),
        (StageCosts(0, 10, 85), [13, 13, 4]),
        (StageCosts(30, 10, 75), [11, 13, 6]),
        (StageCosts(0, 1, 1000), [15, 14, 1]),
    ],
)
def test_layers_are_cut_so_that_the_costliest_stage_costs_least(costs, layers):
    config = _config(ensure_smollm2())
    assert [len(stage.layers) for stage in cut_stages(config, 3, costs=costs)] == layers

    def largest(counts):
        loads = [count * costs.layer_ns for count in counts]
        loads[0] += costs.embedding_ns
        loads[-1] += costs.head_ns
        return max(loads)

    every = ((a, b, 30 - a - b) for a in range(1, 29) for b in range(1, 30 - a))
    assert largest(layers) == min(map(largest, every))


def test_layers_are_cut_by_weight():
    config = _config(ensure_smollm2())
    # The head weighs as much as eight of the thirty layers.
    assert [len(stage.layers) for stage in cut_stages(config, 2)] == [19, 11]
    assert [len(stage.layers) for stage in cut_stages(config, 3)] == [13, 13, 4]
    assert [len(stage.layers) for stage in cut_stages(config, 30)] == [1] * 30
    first, last = cut_stages(config, 2, [10, 20])
    assert (first.layers.end, last.layers.begin, last.layers.end) == (10, 10, 30)
    assert (first.first, first.last, last.first, last.last) == (True, False, False, True)


@pytest.mark.parametrize(
    ("pp", "split", "message"),
    [
        (31, None, "use 1 to 30"),
        (2, [10, 10], "10, 10 does not cut 30 layers into 2 stages"),
        (2, [30, 0], "1 at least"),
        (2, [10, 10, 10], "give 2 numbers"),
    ],
)
def test_cuts_that_cannot_be(pp, split, message):
    with pytest.raises(UsageError, match=message):
        cut_stages(_config(ensure_smollm2()), pp, split)


def test_a_split_on_the_command_line():
    assert parse_split("19,11") == (19, 11)
    assert parse_split(None) is None
    with pytest.raises(UsageError, match="as in 19,11"):
        parse_split("19;11")


def test_the_bubble():
    assert bubble(stages=1, passes=3) == 0
    assert bubble(stages=4, passes=1) == 0.75
