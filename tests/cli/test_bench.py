"""``commfuse bench``: what its rows hold, that it checks before it times, what bad input gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from commfuse import Communicator, ops
from commfuse.bench import generate, runner, timing
from commfuse.bench.generate_worker import Task
from commfuse.bench.provenance import provenance
from commfuse.bench.table import print_table
from commfuse.cli import main
from commfuse.errors import CommfuseError, UsageError
from commfuse.testing import run_ranks
from commfuse.testing.adapters import ADAPTERS, adapter_of
from commfuse.testing.cases import CASES, cases_of

WORKER = Path(__file__).resolve().parent.parent / "workers" / "benchmark.py"
PROMISED = ["op", "backend", "device", "gpus", "ranks", "emulated", "dtype", "shape", "bytes"]
PROMISED += ["p20_us", "p50_us", "p80_us", "exposed", "date_utc", "commfuse", "torch", "python"]
PROMISED += ["git_commit", "triton", "cpu_model", "cpu_isa", "cores", "load_average_1min"]


def commfuse(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "commfuse", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def _run_here(capsys, *arguments: str, status: int = 0):
    """Runs ``commfuse bench`` in this process; what it wrote."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["commfuse", "bench", *arguments])
        main()
    assert (end.value.code or 0) == status
    return capsys.readouterr()


def json_rows(done: subprocess.CompletedProcess) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def of_worker() -> list[tuple[list[dict], str, str]]:
    """What each of two ranks of the runner came to."""
    return run_ranks(f"{WORKER}:everything", 2)


class TestOps:
    def test_rows_of_all_reduce_over_an_emulated_link(self):
        arguments = ["--device", "cpu", "--ranks", 2, "--backends", "cpu,torch", "--json"]
        arguments += ["--iterations", 10, "--link", "tp=100:10"]
        rows = json_rows(commfuse("bench", "all_reduce", *arguments))
        assert [(row["backend"], row["bytes"]) for row in rows] == [
            (backend, size << 10) for size in (8, 64, 256, 1024) for backend in ("cpu", "torch")
        ]
        for row in rows:
            assert set(PROMISED) <= set(row)
            assert row["op"] == "all_reduce" and row["dtype"] == "bfloat16"
            assert row["ranks"] == 2 and row["gpus"] == 0 and row["emulated"] == "100:10"
            assert 100 <= row["p20_us"] <= row["p50_us"] <= row["p80_us"]
            assert row["exposed"] is None and row["iterations"] == 10
            if row["backend"] == "cpu":
                # A link of 10 GB/s: the op cannot be faster than what hands its bytes over.
                link_us = 100 + row["bytes"] / 10e3
                assert link_us <= row["floor_us"] <= 2 * row["p50_us"]
                assert 0 < row["dispatch_us"] < link_us
            else:
                assert row["floor_us"] is None and row["dispatch_us"] is None

    def test_rows_of_matmul_all_reduce(self, of_worker):
        (rows, *_), (others, *_) = of_worker
        assert [row["p50_us"] for row in rows] == [row["p50_us"] for row in others]
        by_name = {row["backend"]: row for row in rows}
        # The two that `exposed` is relative to come along.
        assert list(by_name) == ["cpu", "torch", "gemm", "gemm+all_reduce"]
        cpu, gemm, unfused = (by_name[name] for name in ("cpu", "gemm", "gemm+all_reduce"))
        assert cpu["emulated"] == "20000:10"
        assert cpu["bytes"] == 96 * 2 and cpu["streamed_bytes"] == 96 * 64 * 2
        assert cpu["rotated_bytes"] > 1 << 16
        assert cpu["fraction_of_read"] == pytest.approx(
            cpu["streamed_bytes"] / cpu["p50_us"] / 1e3 / cpu["read_gb_per_s"], rel=1e-3
        )
        assert cpu["floor_us"] > cpu["streamed_bytes"] / cpu["read_gb_per_s"] / 1e3
        assert cpu["iterations"] == gemm["iterations"] == unfused["iterations"]
        # Both wait for the link, next to which the product takes no time: nothing is hidden.
        assert cpu["exposed"] == pytest.approx(1, abs=0.5)
        assert all(by_name[name]["exposed"] is None for name in by_name if name != "cpu")
        assert gemm["times_faster_than_torch"] is None
        assert cpu["times_faster_than_torch"] == pytest.approx(
            by_name["torch"]["p50_us"] / cpu["p50_us"], rel=1e-3
        )

    def test_a_wrong_result_is_not_timed(self, of_worker):
        for _, complaint, _ in of_worker:
            assert "cpu, rank 1: error" in complaint
            assert "small integers are not exact" in complaint

    def test_ranks_that_differ_slightly_are_not_timed(self, of_worker):
        for _, _, complaint in of_worker:
            assert "the ranks' results differ" in complaint

    def test_one_rank_needs_no_peer(self, capsys):
        said = _run_here(capsys, "all_gather", "--ranks", "1", "--json", "--iterations", "1")
        rows = [json.loads(row) for row in said.out.splitlines()]
        assert {(row["transport"], row["emulated"]) for row in rows} == {("local", False)}

    def test_numbers_of_ranks_are_measured_one_after_the_other(self, monkeypatch, capsys):
        counts, command = [], sys.modules["commfuse.cli.bench"]
        monkeypatch.setattr(command, "run_again_as_ranks", lambda count, env: counts.append(count))
        _run_here(capsys, "all_reduce", "--ranks", "1,2,4")
        assert counts == [1, 2, 4]

    def test_auto_is_a_backend(self, capsys):
        arguments = ["--ranks", "1", "--json", "--iterations", "1", "--backends", "auto,cpu"]
        rows = _run_here(capsys, "all_gather", *arguments).out.splitlines()
        assert [json.loads(row)["backend"] for row in rows[:2]] == ["auto", "cpu"]

    def test_a_set_of_ops_leaves_out_aloud_what_cannot_run(self, capsys):
        arguments = ["--ranks", "1", "--json", "--iterations", "1", "--only", "m=1 +logs"]
        arguments += ["--backends", "cpu,triton,gather+torch"]
        said = _run_here(capsys, "verify", *arguments)
        rows = [json.loads(row) for row in said.out.splitlines()]
        assert {(row["op"], row["backend"]) for row in rows} == {
            ("vocab_parallel_sample", backend) for backend in ("cpu", "gather+torch")
        }
        assert {tuple(row["shape"]) for row in rows} == {("m", "vocabulary", "sampled", "logs")}
        assert said.err == "vocab_parallel_sample: triton left out: needs two ranks or more\n"

    def test_without_a_gpu_cuda_is_refused(self, monkeypatch, capsys):
        monkeypatch.setattr("commfuse.testing.gpu_lab.gpu_count", lambda: 0)
        said = _run_here(capsys, "all_reduce", "--device", "cuda", status=2)
        assert said.err == "error: --device cuda: there is no GPU here: torch finds none\n"

    def test_the_table_marks_what_loses(self, of_worker, capsys):
        rows = [dict(row, emulated="pcie4") for row in of_worker[0][0]]
        rows[0] |= {"times_faster_than_torch": 0.5, "exposed": 1.5}
        print_table(rows)
        shown = " ".join(capsys.readouterr().out.split())
        assert "emulated link pcie4" in shown
        assert "0.50x loses" in shown and "1.50 loses" in shown


class TestTiming:
    def test_cells_take_turns_and_calls_rotate(self):
        order: list[str] = []
        cells = [
            timing.Cell(name, [lambda name=name, i=i: order.append(f"{name}{i}") for i in range(2)])
            for name in "ab"
        ]
        with Communicator(None) as comm:
            times = timing.measure(cells, comm, iterations=20)
        assert times["a"].iterations == 20
        timed = order[-40:]
        for turn in range(10):
            names = [call[0] for call in timed[4 * turn : 4 * turn + 4]]
            assert sorted(names) == ["a", "a", "b", "b"] and names[0] == names[1]
        for name in "ab":
            assert len({call for call in timed[:4] if call[0] == name}) == 2  # 0 and 1

    def test_interleaved_cells_take_turns_call_by_call_on_different_inputs(self):
        order: list[str] = []
        cells = [
            timing.Cell(name, [lambda name=name, i=i: order.append(f"{name}{i}") for i in range(4)])
            for name in "ab"
        ]
        with Communicator(None) as comm:
            times = timing.measure(cells, comm, iterations=20, interleaved=True)
        assert times["a"].iterations == times["b"].iterations == 20
        timed = order[-40:]
        turns = [sorted(timed[i : i + 2]) for i in range(0, 40, 2)]
        assert turns == [[f"a{i % 4}", f"b{(i + 2) % 4}"] for i in range(20)]
        assert len({timed[i][0] for i in range(0, 40, 2)}) == 2  # not always the same one first

    def test_interleaved_cells_are_compared_round_by_round(self):
        """The machine drifts by more, and jumps by much more, than the cells differ."""
        noise = np.random.default_rng(0)
        machine = 1e3 * (1 + np.linspace(0, 0.5, 300)) + 500 * (noise.random(300) < 0.1)

        def cell(us: float, in_order: bool = True) -> timing.Times:
            moments = machine if in_order else noise.permutation(machine)
            return timing.Times.of(moments + us + noise.normal(0, 10, 300), 1)

        times = {"gemm": cell(0), "cpu": cell(20), "gemm+all_reduce": cell(40)}
        exposed = runner.visible(times, "cpu", "gemm", ["gemm+all_reduce"])
        assert exposed == pytest.approx(0.5, abs=0.05)
        # Samples that belong to different rounds do not show it.
        medians = [cell(20, False).longer_us(cell(0, False)) for _ in range(20)]
        assert max(abs(median - 20) for median in medians) > 10

    def test_cells_that_did_not_take_turns_are_not_compared(self):
        one, other = (timing.Times.of(np.ones(count), 1) for count in (20, 21))
        with pytest.raises(ValueError, match="20 and 21 times cannot be paired"):
            one.longer_us(other)

    def test_no_exposed_communication_where_it_costs_nothing(self):
        times = {name: timing.Times.of(np.ones(20), 1) for name in ("gemm", "cpu", "both")}
        assert runner.visible(times, "cpu", "gemm", ["both"]) is None
        assert runner.visible(times, "cpu", "gemm", ["missing"]) is None


class TestCases:
    def test_every_op_can_be_measured(self):
        assert set(ADAPTERS) == set(ops.OP_NAMES)
        assert all(cases_of(name) for name in ops.OP_NAMES)

    @pytest.mark.parametrize("op", ops.OP_NAMES)
    def test_compositions_are_near_the_references(self, op):
        for case in (case for case in CASES if case.op == op and case.kind == "edge"):
            if "n" in case.shape and case["n"] > 100_000:
                continue
            adapter = adapter_of(case, torch.float32, 3)
            inputs = adapter.inputs()
            assert len(inputs) == 3
            composed, exact = adapter.composition(inputs), adapter.reference(inputs)
            for one, other in zip(composed, exact, strict=True):
                torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4)


BAD = {
    "unknown op 'all_reduse'": ["all_reduse"],
    "unknown backend 'nccl' for all_reduce: use cpu": ["all_reduce", "--backends", "cpu,nccl"],
    "unknown backend 'vllm' for generate: use cpu": ["generate", "--backends", "vllm"],
    "--backends is empty": ["all_reduce", "--backends", ","],
    "--dtype int8: use bfloat16": ["all_reduce", "--dtype", "int8"],
    "--ranks 0: at least 1": ["all_reduce", "--ranks", "0"],
    "--ranks 2,two: a number, or several, as in 2,4,8": ["all_reduce", "--ranks", "2,two"],
    "--ranks 2,0: at least 1": ["all_reduce", "--ranks", "2,0"],
    "--device tpu: use cpu or cuda": ["all_reduce", "--device", "tpu"],
    "attention is not measured on GPUs: use one of all_reduce, ": [
        *("attention", "--device", "cuda"),
    ],
    "unknown backend 'cpu' for all_reduce: use cuda": [
        *("all_reduce", "--device", "cuda", "--backends", "cpu"),
    ],
    "--link: links are emulated between ranks on the CPU": [
        *("all_reduce", "--device", "cuda", "--link", "pcie4"),
    ],
    "--configurations belongs to bench generate": ["all_reduce", "--configurations", "tp2"],
    "--cases some: use quick or all": ["all_reduce", "--cases", "some"],
    "--only: no case of all_gather has all of the words 'batch=3'": [
        *("all_gather", "--only", "batch=3"),
    ],
    "--only: for the cases of an op, not for generate": ["generate", "--only", "m=1"],
    "--launch eager: graphs are of GPUs": ["all_reduce", "--launch", "eager"],
    "--launch now: use graph or eager": ["all_reduce", "--launch", "now"],
    "--iterations 0: at least 1": ["all_reduce", "--iterations", "0"],
    "unknown link 'warp'": ["all_reduce", "--link", "warp"],
    "backend 'triton' cannot run all_reduce here: needs two ranks": [
        *("all_reduce", "--ranks", "1", "--backends", "triton"),
    ],
    "/nowhere": ["generate", "--model", "/nowhere"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_in_one_line(message, capsys):
    said = _run_here(capsys, *BAD[message], status=2)
    assert said.out == ""
    assert message in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1


def tiny_model(path: Path) -> Path:
    """A random Llama of bytes, as a Hugging Face directory."""
    hidden, features, layers, vocabulary = 32, 48, 2, 256
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}self_attn.{name}.weight"] = (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{prefix}mlp.{name}.weight"] = (features, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, features)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).bfloat16() * 0.3 + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    path.mkdir()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": features,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": 0,
        "hidden_act": "silu",
    }
    (path / "config.json").write_text(json.dumps(config))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary_of = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary_of, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


class TestGenerate:
    def test_rows_of_a_real_run(self, tmp_path):
        model = tiny_model(tmp_path / "model")
        arguments = ["--model", model, "--backends", "cpu", "--iterations", 1, "--json"]
        rows = json_rows(commfuse("bench", "generate", *arguments))
        found = {(row["configuration"], row["task"]): row for row in rows}
        tasks = ["plain", "edit", "edit_ngram", "summarise", "summarise_ngram"]
        assert [task for name, task in found if name == "tp2"] == tasks
        assert ("tp1_1t", "plain") in found
        for row in rows:
            assert set(PROMISED) <= set(row)
        row = found["tp2", "plain"]
        assert row["shape"]["new_tokens"] == generate.NEW_TOKENS and row["bytes"] > 0
        assert row["weight_bytes_per_token"] == 2 * (256 * 32 + 2 * (4 * 32 * 32 + 3 * 48 * 32))
        assert row["memory_rss_bytes"] > 0 and row["memory_ratio_rss"] > 0
        assert row["vs_transformers"] is None and row["vs_tp1_one_thread"] > 0
        assert found["tp2", "edit_ngram"]["speculation_gain"] > 0

    def report(self, *speeds: float, task: str = "plain", tokens=(1, 2, 3)) -> list[dict]:
        """One round's report of an engine."""
        run = {"tokens": list(tokens), "ttft_ms": 1.0, "accepted_per_step": 1.0}
        run |= {"communication_ms_per_token": 0.0, "bytes_per_token": 8.0}
        ranks = [
            dict.fromkeys(("idle_rss_bytes", "rss_bytes", "pss_bytes", "peak_bytes"), size)
            for size in (100, 120)
        ]
        return [
            {
                "tasks": {task: [{**run, "tokens_per_second": speed} for speed in speeds]},
                "memory": ranks,
                "read_bytes_per_second": [2e9, 3e9],
                "weight_bytes_per_token": 1_000_000,
            }
        ]

    def test_ratios_are_of_medians_and_against_the_best_peer(self):
        chosen = generate.engines(2, "bfloat16", ("cpu", "transformers"), cores=2)
        names = [engine.name for engine in chosen]
        speeds = dict.fromkeys(names, (10.0, 30.0, 20.0))
        speeds["tp2"], speeds["transformers_float32_1t"] = (100.0, 90.0, 400.0), (25.0, 25.0, 24.0)
        reports = {name: self.report(*speeds[name]) for name in names}
        rows = generate.make_rows(chosen, reports, [Task("plain", [1], 3, [], None)], {})
        row = next(row for row in rows if row["configuration"] == "tp2")
        assert row["tokens_per_second"] == 100
        assert row["vs_transformers"] == 4 and row["vs_tp1_one_thread"] == 5
        assert row["of_floor"] == pytest.approx(100 / 5000)
        assert row["memory_ratio_rss"] == 1 and row["memory_rss_bytes"] == 120

    def test_speculation_that_changes_the_answer_is_an_error(self):
        (engine,) = generate.engines(1, "bfloat16", ("cpu",), cores=1)
        (plain,), (other,) = (
            self.report(10.0, task="edit"),
            self.report(20.0, task="edit_ngram", tokens=(1, 2, 4)),
        )
        plain["tasks"] |= other["tasks"]
        tasks = [Task("edit", [1], 3, [], None), Task("edit_ngram", [1], 3, [], 5)]
        with pytest.raises(CommfuseError, match="edit_ngram: the answer differs"):
            generate.make_rows([engine], {engine.name: [plain]}, tasks, {})

    def test_configurations_are_chosen_by_name(self):
        chosen = generate.engines(2, "bfloat16", ("cpu", "torch"), 2, ("pp2", "tp1_1t"))
        assert [(engine.name, engine.ranks, engine.stages) for engine in chosen] == [
            ("tp1_1t", 1, 1),
            ("pp2", 2, 2),
        ]
        with pytest.raises(UsageError, match="unknown configuration tp3: use tp1_1t, tp1_2t, tp2"):
            generate.engines(2, "bfloat16", ("cpu",), 2, ("tp3",))


def test_provenance_is_json():
    assert json.loads(json.dumps(provenance()))["cores"] >= 1
