"""Failure in the model: mismatch, time-out, death of a process, and the abort words that carry the
news.

The control part of a state holds, per agent, where it has left its program and what it is
diagnosing; per rank, its abort word; the abort stores under way to peers, each delivered on its own
and in any order; and how many time-outs and deaths may still happen. An agent that leaves performs
no operation behind the place where it left; what it had issued before may still arrive. A killed
rank performs nothing any more, and the abort stores it had under way are lost; the host of every
other rank sees its socket close and sets its own abort word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .model import ENTRY, WAIT, WRONG_DESCRIPTOR, Operation, System

RUNNING = -1
MISMATCHED, TIMED_OUT, DIED = "mismatch", "time-out", "peer died"


class Control(NamedTuple):
    left: tuple[int, ...]  # per agent: the position where it left, or RUNNING
    diagnosing: tuple[int, ...]  # per agent: number of the wait that found another tag, or RUNNING
    aborts: tuple[str, ...]  # per rank: its abort word; empty while alive; the first writer wins
    mail: frozenset[tuple[int, int, str]]  # abort stores under way: (sender, destination, reason)
    timeouts: int
    deaths: int
    killed: int  # the rank that was killed, or RUNNING


@dataclass(frozen=True)
class Failures:
    """Which failures may happen, and which reports (one per rank) are right at the end of a run."""

    permitted: Callable[[tuple[str, ...]], bool]
    timeouts: int = 0
    deaths: int = 0
    validated: bool = (
        True  # a reader polls the descriptor until its flags are those of the generation
    )

    def start(self, system: System) -> Control:
        running = (RUNNING,) * len(system.agents)
        words = ("",) * system.world_size
        return Control(running, running, words, frozenset(), self.timeouts, self.deaths, RUNNING)

    def may_go_on(self, operation: Operation, control: Control) -> bool:
        if operation.rank == control.killed:
            return False
        left = control.left[operation.agent]
        if left != RUNNING:
            return operation.position < left and operation.kind != WAIT
        return operation.kind != ENTRY or not control.aborts[operation.rank]

    def diagnose(self, operation: Operation, state: tuple) -> tuple:
        """The agent stops at the wait and will read the peer's descriptor in a step of its own."""
        performed, memory, control = state
        control = control._replace(
            left=_put(control.left, operation.agent, operation.position),
            diagnosing=_put(control.diagnosing, operation.agent, operation.number),
        )
        return performed, memory, control

    def moves(self, system: System, state: tuple) -> list[tuple]:
        performed, memory, control = state
        found = []

        def go(label: str, after: Control) -> None:
            found.append((label, (performed, memory, after), None))

        for letter in control.mail:
            _, destination, reason = letter
            label = f"abort word of rank {destination}: {reason!r} arrives"
            mail = control.mail - {letter}
            aborts = control.aborts
            if not aborts[destination]:
                aborts = _put(aborts, destination, reason)
            go(label, control._replace(mail=mail, aborts=aborts))
        for agent, program in enumerate(system.agents):
            rank = system.agent_rank[agent]
            if rank == control.killed:
                continue
            number = control.diagnosing[agent]
            if number != RUNNING:
                label = (
                    f"rank {rank} reads the descriptor of rank {system.operations[number].source}"
                )
                place, expected = system.operations[number].descriptor
                if memory[place] != expected:
                    if self.validated and memory[place] < expected:
                        continue
                    fault = (WRONG_DESCRIPTOR, "it holds " + system.seen(memory[place]))
                    found.append((label, None, fault))
                    continue
                done = control._replace(diagnosing=_put(control.diagnosing, agent, RUNNING))
                go(label, self._fail(done, rank, MISMATCHED))
            elif control.left[agent] == RUNNING and control.aborts[rank]:
                for operation in program:
                    if not performed & operation.bit and operation.kind in (WAIT, ENTRY):
                        label = f"rank {rank} block {operation.block} leaves: its abort word is set"
                        left = _put(control.left, agent, operation.position)
                        go(label, control._replace(left=left))
                        break
        if control.timeouts:
            for operation in system.ready(performed):
                # The last poll past the deadline: a word that has arrived by then is accepted.
                late = operation.kind == WAIT and memory[operation.place] not in operation.verdicts
                if late and self.may_go_on(operation, control):
                    after = control._replace(
                        timeouts=control.timeouts - 1,
                        left=_put(control.left, operation.agent, operation.position),
                    )
                    go(f"{operation}: deadline", self._fail(after, operation.rank, TIMED_OUT))
        if control.deaths:
            for rank in range(system.world_size):
                others = {(p, p, DIED) for p in range(system.world_size) if p != rank}
                lost = {letter for letter in control.mail if letter[0] == rank}
                after = control._replace(
                    deaths=control.deaths - 1, killed=rank, mail=control.mail - lost | others
                )
                go(f"rank {rank} is killed", after)
        return found

    def _fail(self, control: Control, rank: int, reason: str) -> Control:
        """First writer wins; only the winner tells the peers."""
        if control.aborts[rank]:
            return control
        peers = {(rank, peer, reason) for peer in range(len(control.aborts)) if peer != rank}
        return control._replace(
            aborts=_put(control.aborts, rank, reason), mail=control.mail | peers
        )

    def stuck(self, system: System, state: tuple) -> bool:
        performed, _, control = state
        return bool(control.mail) or any(
            control.left[agent] == RUNNING
            and rank != control.killed
            and performed & system.agent_mask[agent] != system.agent_mask[agent]
            for agent, rank in enumerate(system.agent_rank)
        )

    def outcome(self, system: System, state: tuple) -> tuple[str, ...]:
        control = state[2]
        return tuple(
            "killed" if rank == control.killed else control.aborts[rank] or "done"
            for rank in range(system.world_size)
        )


def _put(values: tuple, index: int, value) -> tuple:
    return (*values[:index], value, *values[index + 1 :])
