"""What ``commfuse generate`` shows: text as it comes, then a table or JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from commfuse import ops
from commfuse.generation import Generation, GenerationStatistics
from commfuse.generation.floors import Floors
from commfuse.generation.statistics import bubble
from commfuse.models.llama import Llama
from commfuse.models.stages import Stage, StageCosts
from commfuse.models.tokenizer import Tokenizer
from commfuse.runtime.mesh import Mesh
from commfuse.runtime.transports import TORCH_DISTRIBUTED

USED_OPS = {
    "vocab_parallel_embedding": True,
    "transformer_blocks": True,
    "matmul": True,
    "vocab_parallel_sample": None,
    "verify_chain": None,
}
WITH_MODELS_BACKEND = ("vocab_parallel_embedding", "transformer_blocks")  # Llama.backend
USED_BETWEEN_STAGES = ("send", "recv")


class Report:
    """Follows a generation on rank 0. As a context manager it shows the text while it grows.

    On a terminal a status line stands below the text; elsewhere one prompt's text is written as it
    comes, and several prompts' texts at the end, one after the other.

    Args:
        mesh, model, tokenizer: of this rank.
        stages: of the model.
        costs: by which it was cut; None: by hand, or not at all.
        prompts: token ids of each.
        quiet: show nothing.
    """

    def __init__(
        self,
        mesh: Mesh,
        model: Llama,
        stages: Sequence[Stage],
        costs: StageCosts | None,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        quiet: bool,
    ):
        self.mesh, self.comm, self.model, self.stages = mesh, mesh.tp, model, stages
        self.costs, self.tokenizer, self.prompts = costs, tokenizer, prompts
        self.quiet = quiet
        self.console = Console(highlight=False, markup=False)
        self.streams = [tokenizer.stream() for _ in prompts]
        self.texts = ["" for _ in prompts]
        self.count = 0
        self.begin = 0.0
        self.live = None

    def __enter__(self) -> Report:
        self.begin = time.perf_counter()
        if not self.quiet and self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, vertical_overflow="visible")
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for index, stream in enumerate(self.streams):
            self._append(index, stream.flush())
        if self.live is not None:
            self.live.update(self._body(), refresh=True)
            self.live.stop()
        elif not self.quiet:
            if len(self.texts) > 1:
                for text in self._titled():
                    self.console.print(text, soft_wrap=True)
            elif self.count:
                self.console.print()

    def add(self, prompt: int, tokens: list[int]) -> None:
        """New tokens of a prompt."""
        self.count += len(tokens)
        self._append(prompt, self.streams[prompt].push(*tokens))
        if self.live is not None:
            rate = self.count / (time.perf_counter() - self.begin)
            status = Text(f"{self.count} tokens, {rate:.0f} tokens/s", style="dim")
            self.live.update(Group(self._body(), status), refresh=True)

    def _append(self, prompt: int, text: str) -> None:
        self.texts[prompt] += text
        if not self.quiet and self.live is None and len(self.texts) == 1:
            self.console.file.write(text)
            self.console.file.flush()

    def _titled(self) -> list[Text]:
        return [Text(f"[{index}] {text}") for index, text in enumerate(self.texts)]

    def _body(self) -> Group | Text:
        return Group(*self._titled()) if len(self.texts) > 1 else Text(self.texts[0])

    def backends(self) -> dict[str, str | None]:
        """The backend of every op that a generation uses."""
        device = self.comm.device.type
        used = {name: (self.comm, packed and device == "cpu") for name, packed in USED_OPS.items()}
        if len(self.stages) > 1:
            used |= dict.fromkeys(USED_BETWEEN_STAGES, (self.mesh.pp, None))
        asked = dict.fromkeys(WITH_MODELS_BACKEND, self.model.backend)
        return {
            name: ops.explain(
                name,
                comm,
                device=device,
                dtype=self.model.dtype,
                packed=packed,
                backend=asked.get(name, "auto"),
            ).backend
            for name, (comm, packed) in used.items()
        }

    def pipeline(self, statistics: GenerationStatistics) -> dict:
        """What the stages did, beside what equal ones would."""
        count = len(self.stages)
        return {
            "layers": [len(stage.layers) for stage in self.stages],
            "costs": None if self.costs is None else asdict(self.costs),
            "transport": TORCH_DISTRIBUTED if self.mesh.pp.hierarchy else self.mesh.pp.transport,
            "groups": statistics.groups,
            "prefill_passes": statistics.prefill_passes,
            "prefill_idle": statistics.prefill_idle,
            "prefill_bubble": bubble(count, statistics.prefill_passes),
            "decode_idle": statistics.decode_idle,
            "decode_bubble": bubble(count, statistics.groups),
        }

    def as_json(
        self,
        result: Generation,
        floors: Floors | None,
    ) -> dict:
        """``outputs`` and ``stats``, as documented in the README."""
        statistics = result.statistics
        stats = {
            "tokens_per_second": statistics.tokens_per_second,
            "ttft_ms": statistics.ttft_seconds * 1e3,
            "steps": statistics.steps,
            "accepted_per_step": statistics.accepted_per_step,
            "compute_ms_per_token": statistics.compute_ms_per_token,
            "communication_ms_per_token": statistics.communication_ms_per_token,
            "all_reduces_per_token": statistics.per_token(statistics.collective_calls),
            "bytes_per_token": statistics.per_token(statistics.bytes_sent),
            "tp": self.comm.world_size,
            "pp": len(self.stages),
            "device": str(self.comm.device),
            "transport": self.comm.transport,
            "backends": self.backends(),
            "emulated": self.comm.emulated or self.mesh.pp.emulated,
        }
        if len(self.stages) > 1:
            stats["pipeline"] = self.pipeline(statistics)
        if floors is not None:
            stats["floors"] = asdict(floors)
        outputs = [
            {
                "text": self.tokenizer.decode(output),
                "token_ids": output,
                "prompt_tokens": len(prompt),
            }
            for prompt, output in zip(self.prompts, result.outputs, strict=True)
        ]
        if result.log_probabilities is not None:
            for output, logs in zip(outputs, result.log_probabilities, strict=True):
                output["logprobs"] = logs
        return {"outputs": outputs, "stats": stats}

    def print_summary(self, statistics: GenerationStatistics, floors: Floors | None) -> None:
        """The table below the text."""
        table = Table(show_header=False)
        emulated = f", emulated {self.comm.link.name}" if self.comm.link else ""
        rows = [
            ("ranks", f"{self.comm.world_size} ({self.comm.transport}{emulated})"),
            *self._stage_rows(statistics),
            ("tokens/s (decoding)", f"{statistics.tokens_per_second:.1f}"),
            ("time to first token", f"{statistics.ttft_seconds * 1e3:.0f} ms"),
            *self._communication_rows(statistics),
            ("decoding steps", f"{statistics.steps}"),
            ("accepted tokens per step", f"{statistics.accepted_per_step:.2f}"),
        ]
        if floors is not None:
            rows += [(f"floor: {name}", f"{ms:.2f} ms per step") for name, ms in floors.items()]
        for name, value in rows:
            table.add_row(name, value)
        self.console.print(table)

    @staticmethod
    def _communication_rows(statistics: GenerationStatistics) -> list[tuple[str, str]]:
        if statistics.communication_ms_per_token is None:  # on a GPU
            return []
        return [
            ("compute per token", f"{statistics.compute_ms_per_token:.2f} ms"),
            ("communication per token", f"{statistics.communication_ms_per_token:.2f} ms"),
        ]

    def _stage_rows(self, statistics: GenerationStatistics) -> list[tuple[str, str]]:
        if len(self.stages) == 1:
            return []
        link = self.mesh.pp.link
        emulated = f", emulated {link.name}" if link else ""
        found = self.pipeline(statistics)
        layers = " + ".join(map(str, found["layers"]))
        rows = [("stages", f"{layers} layers ({found['transport']}{emulated})")]
        for phase, what, count in (
            ("prefill", "passes", found["prefill_passes"]),
            ("decode", "groups", found["groups"]),
        ):
            idle = ", ".join(f"{part:.0%}" for part in found[f"{phase}_idle"])
            equal = f"{found[f'{phase}_bubble']:.0%}"
            rows.append((f"{phase}: idle", f"{idle} (equal stages, {count} {what}: {equal})"))
        return rows
