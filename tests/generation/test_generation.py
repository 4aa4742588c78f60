"""Greedy generation equals transformers': SmolLM2 in float32, 8 prompts, 64 tokens, TP 1 to 3."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from commfuse.models import smollm2
from commfuse.models.checkpoint import open_checkpoint
from commfuse.models.smollm2 import ensure_smollm2
from commfuse.testing import run_ranks

GENERATION = str(Path(__file__).parents[1] / "workers" / "generation.py")
NEW_TOKENS = 64
STOPS = ((0, 9), (3, 30), (4, 20))  # (prompt, place in its output) of tokens that end requests
GAP = 1e-4  # between two logits that float32 cannot be asked to tell apart
PASSAGE = (
    "The ferry leaves the harbour at seven in the morning and comes back at nine in the evening. "
    "Tickets are sold on board. Dogs travel free of charge, bicycles cost two crowns, and whoever "
    "misses the last boat may sleep in the waiting room, where the stove is lit until midnight. "
)
STORY = "Nobody in the village remembered who had built the clock tower, nor why it had no hands. "


@pytest.fixture(scope="module")
def prompts():
    tokenizer = open_checkpoint(ensure_smollm2()).tokenizer()

    def chat(text):
        return tokenizer.encode_chat([{"role": "user", "content": text}])

    return [
        tokenizer.encode(STORY),
        chat("What is the capital of France?"),
        chat(f"Copy this text, and change crowns to euros:\n\n{PASSAGE}"),
        tokenizer.encode("def fibonacci(n):\n    if n < 2:\n        return n\n"),
        tokenizer.encode("1, 1, 2, 3, 5, 8, 13,"),
        tokenizer.encode("Der Zug nach München fährt um"),
        tokenizer.encode("I"),
        tokenizer.encode(f"{PASSAGE}{STORY * 2}\nSummary:"),  # 120 tokens
    ]


def context_of(prompts: list[list[int]]) -> int:
    """One in which some requests have less room than they ask for."""
    return len(prompts[7]) + 25


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request, prompts):
    alone = {None: (0, 6) if request.param == 2 else (6,), 5: (2, 6)}
    length = 3 if request.param == 2 else 5
    args = (str(ensure_smollm2()), prompts, NEW_TOKENS, length, alone, STOPS, context_of(prompts))
    return alone, run_ranks(f"{GENERATION}:run", request.param, args=args, timeout=280)


@pytest.fixture(scope="module")
def transformers_model():
    return AutoModelForCausalLM.from_pretrained(ensure_smollm2(), dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(prompts, ranks, transformers_model):
    """(tokens of each prompt, how far the best logit is ahead at each), by transformers.

    Each is its choice after the prompt and our tokens before, so that one pass gives all of a
    prompt: as long as ours are the same, they are what it generates.
    """
    tokens, gaps = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that spin get in each other's way wherever a core is taken
    for prompt, output in zip(prompts, ranks[1][0]["batch"], strict=True):
        with torch.inference_mode():
            inputs = torch.tensor([prompt + output[:-1]])
            logits = transformers_model(inputs, logits_to_keep=NEW_TOKENS).logits[0]
        best = logits.topk(2)
        tokens.append(best.indices[:, 0].tolist())
        gaps.append((best.values[:, 0] - best.values[:, 1]).tolist())
    torch.set_num_threads(threads)
    assert all(len(output) == NEW_TOKENS for output in tokens)
    return tokens, gaps


@pytest.fixture(scope="module")
def ends(prompts, ranks, reference):
    """What is due of requests that end at different times."""
    tokens, _ = reference
    batch = ranks[1][0]["batch"]
    stop_ids = {batch[prompt][place] for prompt, place in STOPS}
    expected = []
    for prompt, output in zip(prompts, tokens, strict=True):
        count = min(NEW_TOKENS, context_of(prompts) - len(prompt))
        stops = [i + 1 for i, token in enumerate(output) if token in stop_ids]
        expected.append(output[: min([count, *stops])])
    assert len({len(output) for output in expected}) >= 4
    return expected


def compare(outputs, expected, gaps, record) -> None:
    """Equal, or different from where the reference itself could not tell two tokens apart."""
    ties = 0
    for index, (output, tokens) in enumerate(zip(outputs, expected, strict=True)):
        for place, (ours, theirs) in enumerate(zip(output, tokens, strict=False)):
            if ours != theirs:
                assert gaps[index][place] < GAP, f"prompt {index}, token {place}"
                print(f"prompt {index}: a tie of {gaps[index][place]:.1e} at token {place}")
                ties += 1
                break
        else:
            assert len(output) == len(tokens), f"prompt {index}"
    record("ties", ties)
    assert ties <= 1  # of 8 x 64: or this would show nothing


@pytest.mark.parametrize("how", ["batch", "streamed", "drafted"])
def test_a_ragged_batch_equals_transformers(ranks, reference, how, record_property):
    for rank in ranks[1]:
        compare(rank[how], *reference, record_property)


@pytest.mark.parametrize("drafts", [None, 5])
def test_single_prompts_equal_transformers(ranks, reference, drafts, record_property):
    alone, results = ranks
    tokens, gaps = ([of[i] for i in alone[drafts]] for of in reference)
    for rank in results:
        compare(rank[f"alone {drafts}"], tokens, gaps, record_property)


@pytest.mark.parametrize("drafts", [None, 5])
def test_requests_that_end_at_different_times(ranks, reference, ends, drafts, record_property):
    for rank in ranks[1]:
        compare(rank[f"ends {drafts}"], ends, reference[1], record_property)


def test_neither_batch_nor_drafts_change_a_token(ranks):
    alone, results = ranks
    for rank in results:
        assert rank["batch"] == rank["streamed"] == rank["drafted"]
        assert rank["ends None"] == rank["ends 5"]
        for drafts, indices in alone.items():
            assert rank[f"alone {drafts}"] == [rank["batch"][i] for i in indices]
        assert rank["batch"] == results[0]["batch"]


def test_statistics_of_a_batch(ranks, prompts):
    for rank in ranks[1]:
        plain, drafted = (rank["statistics"][name] for name in ("batch", "drafted"))
        assert plain["steps"] == NEW_TOKENS - 1
        assert plain["decode_tokens"] == plain["request_steps"] == 8 * (NEW_TOKENS - 1)
        assert drafted["decode_tokens"] == plain["decode_tokens"]
        assert drafted["request_steps"] < plain["request_steps"]
        # Two all-reduces a layer, the embedding and the choice of the token.
        assert plain["collective_calls"] == (2 * 30 + 2) * plain["steps"]
        assert plain["ttft_seconds"] > 0
        assert 0 < plain["communication_seconds"] < plain["decode_seconds"]
        assert (plain["bytes_sent"] > 0) == (len(ranks[1]) > 1)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model"
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def unusual(small_model):
    return run_ranks(f"{GENERATION}:unusual", 2, args=(small_model,))


def test_prompts_may_be_cut_anywhere(unusual):
    for rank in unusual:
        assert all(rank[f"passes of {rows}"] == rank["whole"] for rows in (1, 2, 7, 19, 49))


def test_a_callback_that_fails_leaves_nothing_behind(unusual):
    for rank in unusual:
        for rows in (1, 2, 7, 19, 49):
            assert rank[f"after a failed callback, passes of {rows}"] == rank["whole"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no prompts", "there is no prompt"),
        ("an empty prompt", "prompt 1 is empty"),
        ("a full context", "prompt 0 has 64 tokens and the model's context 64: use at most 63"),
        ("an unknown id", "outside the vocabulary of 300"),
        ("a negative id", "outside the vocabulary of 300"),
        ("no new tokens", "max_new_tokens is 0"),
    ],
)
def test_requests_that_cannot_be_served(unusual, case, message):
    for rank in unusual:
        kind, text = rank[case]
        assert kind == "UsageError" and message in text
        assert rank["afterwards"] == rank["whole"]


def test_a_rank_that_leaves_in_mid_generation_is_named(unusual):
    assert unusual[1]["leaves"] == ("Leave", "")
    kind, text = unusual[0]["leaves"]
    assert kind == "CommunicatorClosed" and "rank 1 has closed" in text


@pytest.mark.long
def test_straight_from_the_gguf_file(prompts, tmp_path):
    """In bfloat16, to which the conversion rounds, file and directory are the same model."""
    paths = [str(smollm2._download(tmp_path)), str(ensure_smollm2())]
    args = (paths, prompts[1:5], 24)
    for rank in run_ranks(f"{GENERATION}:half_precision", 2, args=args, timeout=280):
        assert rank[0] == rank[1]
