"""The calls a program of the model is made of, and the rules of docs/protocol.md with a switch for
each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OneShot:
    """Everybody reads everybody's payload of `parts`; block b has parts b, b + grid, …"""

    parts: int = 1
    grid: int = 1
    name: str = "one_shot"


@dataclass(frozen=True)
class Sliced:
    """One agent publishes `slices` parts in turn, each with its own word.

    At most `ahead` slices are published before the first of them is awaited; None: all of them.
    """

    slices: int = 2
    ahead: int | None = None


@dataclass(frozen=True)
class TwoShot:
    """Phase 0: rank d reads slice d of everybody; phase 1: everybody reads all reduced slices.

    `empty` names ranks whose slice has no elements.
    """

    empty: tuple[int, ...] = ()
    grid: int = 1


@dataclass(frozen=True)
class Gather:
    """Everybody reads everybody's part; the ranks in `empty` have nothing to give."""

    empty: tuple[int, ...] = ()


@dataclass(frozen=True)
class Zero:
    """A call with no elements: words only."""


@dataclass(frozen=True)
class Flagged:
    """One-shot with flag-in-data lines (push only): data and flag are one atomic store."""

    lines: int = 1


@dataclass(frozen=True)
class Direct:
    """Peers read the user's own tensor, which the next call's caller may overwrite."""

    trailing_barrier: bool = True


@dataclass(frozen=True)
class Send:
    to: int
    blocks: int = 0  # of the message, each with a word in its slot; 0: one counter for all messages


@dataclass(frozen=True)
class Receive:
    source: int
    blocks: int = 0


@dataclass(frozen=True)
class Protocol:
    """The rules. The defaults are those of docs/protocol.md; each negative control breaks one."""

    push: bool = False  # payload and words lie with the reader (GPU), or with the writer (CPU)
    halves: int = 2
    swap_slots: bool = False  # two ranks: in every second pair of calls they write to each other's
    word_parity: bool = True
    word_phase: bool = True
    payload_phase: bool = True
    exact: bool = True
    acquire: bool = True
    release: bool = True
    skip_empty: bool = False
    block_generations: bool = False
    kernel_boundary: bool = True
    descriptor_halves: int = 2
    compare_descriptors: bool = False  # in every call, not only after a mismatch
    channel_slots: int = 2
    block_words: bool = True  # a word for each block of a slot, or one for all of them
    credit_slack: int | None = 0  # messages sent beyond the credit; None: no credit at all
    zero_lines: bool = True
    fence_after_zeroing: bool = True
    # "offset": 1 + g mod (2^bits - 1). "low bits": g mod 2^bits. "skip": the same, and generations
    # for which it is 0 are left out.
    flags: str = "offset"
    flag_bits: int = 2

    def flag(self, generation: int) -> int:
        period = 1 << self.flag_bits
        if self.flags == "offset":
            return 1 + generation % (period - 1)
        return generation % period

    def following(self, generation: int) -> int:
        following = generation + 1
        if self.flags == "skip" and following % (1 << self.flag_bits) == 0:
            following += 1
        return following


RULES = Protocol()
