"""``commfuse generate``: the options of sampling, and what bad ones get."""

from __future__ import annotations

import json
import sys

import pytest

from commfuse.cli import main

PROMPT = "A list of fruit: apple, pear, apple, pear,"


def generate(capsys, *arguments: str, status: int = 0):
    """Runs ``commfuse generate`` in this process; what it wrote."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["commfuse", "generate", "--threads", "1", *arguments])
        main()
    assert (end.value.code or 0) == status
    return capsys.readouterr()


def outputs(capsys, *arguments: str) -> list[dict]:
    options = ("--json", "--max-new-tokens", "8", "--ignore-eos", "--dtype", "float32")
    return json.loads(generate(capsys, *options, *arguments).out)["outputs"]


def test_sampling_options_are_of_a_prompt_and_hold_with_drafts(capsys):
    prompts = ("--prompt", PROMPT) * 4
    temperatures = [x for t in ("0", "0.9", "1.5", "1.5") for x in ("--temperature", t)]
    top_k = [x for k in ("0", "1", "0", "0") for x in ("--top-k", k)]
    greedy, only_one, drawn, other = outputs(
        capsys, *prompts, *temperatures, *top_k, "--seed", "3", "--logprobs"
    )
    assert greedy["token_ids"] == only_one["token_ids"]
    assert drawn["token_ids"] != other["token_ids"]  # prompt i has the seed 3 + i
    assert len(drawn["logprobs"]) == 8 and all(x <= 0 for x in drawn["logprobs"])
    # By itself, with its seed, drafted by n-grams: the same tokens.
    (again,) = outputs(
        capsys, "--prompt", PROMPT, "--temperature", "1.5", "--top-p", "1", "--seed", "5",
        "--speculate", "ngram:3", "--logprobs",
    )  # fmt: skip
    assert again["token_ids"] == drawn["token_ids"]
    assert again["logprobs"] == pytest.approx(drawn["logprobs"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--logprobs",), "--logprobs: they are part of what --json prints; add --json"),
        (("--seed", "1", "--seed", "2"), "--seed is given 2 times for 1 prompts: once, or once"),
        (("--temperature", "1", "--temperature", "2"), "--temperature is given 2 times"),
        (("--device", "tpu"), "--device tpu: use cpu or cuda"),
        (("--device", "cuda", "--pp", "2"), "--pp 2: stages run on the CPU"),
        (("--device", "cuda", "--link", "pcie4"), "between ranks on the CPU only"),
        (("--device", "cuda", "--floors"), "see commfuse bench generate --device cuda"),
        (("--device", "cuda", "--trace", "steps.json"), "--trace: drawn for ranks on the CPU"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, arguments, message):
    said = generate(capsys, "--prompt", PROMPT, *arguments, status=2)
    assert message in said.err


@pytest.fixture
def plan(capsys, tmp_path):
    """Writes what ``commfuse plan --json`` says about SmolLM2; its path."""

    def write(*arguments: str) -> str:
        command = ["commfuse", "plan", "--model", "smollm2-135m", "--json", *arguments]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(sys, "argv", command)
            main()
        path = tmp_path / "plan.json"
        path.write_text(capsys.readouterr().out)
        return str(path)

    return write


def test_a_plan_is_run(capsys, plan):
    given = plan("--cluster", "1:cpu", "--acceptance", "0.8")
    options = ("--json", "--max-new-tokens", "8", "--ignore-eos", "--prompt", PROMPT)
    planned = json.loads(generate(capsys, *options, "--plan", given).out)
    plain = json.loads(generate(capsys, *options, "--dtype", "bfloat16").out)
    assert planned["outputs"][0]["token_ids"] == plain["outputs"][0]["token_ids"]
    assert planned["stats"]["steps"] < plain["stats"]["steps"]  # by the plan's drafts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cluster", "2:cpu", "--replicas", "2", "--requests", "2"), "the plan has 2 replicas"),
        (("--cluster", "1:cpu", "--weights", "fp8"), "for fp8 (--weights), which generate does"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(capsys, plan, arguments, message):
    said = generate(capsys, "--prompt", PROMPT, "--plan", plan(*arguments), status=2)
    assert message in said.err
