"""What ``commfuse generate`` shows: text as it comes, then a table or JSON."""

from __future__ import annotations

import time
from dataclasses import asdict

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from commfuse import ops
from commfuse.generation import Generation, GenerationStatistics
from commfuse.generation.floors import Floors
from commfuse.models.llama import Llama
from commfuse.models.tokenizer import Tokenizer
from commfuse.runtime.communicator import Communicator

USED_OPS = {
    "vocab_parallel_embedding": True,
    "transformer_blocks": True,
    "matmul": True,
    "vocab_parallel_sample": None,
    "verify_chain": None,
}


class Report:
    """Follows a generation on rank 0. As a context manager it shows the text while it grows.

    On a terminal a status line stands below the text; elsewhere one prompt's text is written as it
    comes, and several prompts' texts at the end, one after the other.

    Args:
        comm, model, tokenizer: of this rank.
        prompts: token ids of each.
        quiet: show nothing.
    """

    def __init__(
        self,
        comm: Communicator,
        model: Llama,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        quiet: bool,
    ):
        self.comm, self.model, self.tokenizer, self.prompts = comm, model, tokenizer, prompts
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
        return {
            name: ops.explain(name, self.comm, dtype=self.model.dtype, packed=packed).backend
            for name, packed in USED_OPS.items()
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
            "transport": self.comm.transport,
            "backends": self.backends(),
            "emulated": self.comm.emulated,
        }
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
            ("tokens/s (decoding)", f"{statistics.tokens_per_second:.1f}"),
            ("time to first token", f"{statistics.ttft_seconds * 1e3:.0f} ms"),
            ("compute per token", f"{statistics.compute_ms_per_token:.2f} ms"),
            ("communication per token", f"{statistics.communication_ms_per_token:.2f} ms"),
            ("decoding steps", f"{statistics.steps}"),
            ("accepted tokens per step", f"{statistics.accepted_per_step:.2f}"),
        ]
        if floors is not None:
            rows += [(f"floor: {name}", f"{ms:.2f} ms per step") for name, ms in floors.items()]
        for name, value in rows:
            table.add_row(name, value)
        self.console.print(table)
