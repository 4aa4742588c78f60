"""The answer in words: what to run, what the time goes into, where the wall is, and why."""

from __future__ import annotations

from dataclasses import replace

from commfuse.planner.names import figure
from commfuse.planner.plan import Plan, Point
from commfuse.planner.search import Candidate
from commfuse.planner.speculation import Acceptance, speculate
from commfuse.planner.step import FUSED_ROWS, Terms
from commfuse.planner.uncertainty import around

NAMES = {
    "weights": "reading weights",
    "kv": "reading the KV cache",
    "gemm": "arithmetic",
    "all_reduce": "all-reduce",
    "send_recv": "send/recv between stages",
    "bubble": "stages waiting for each other",
    "launch": "small kernels and ranks waiting for each other",
    "host": "the host: scheduling and sampling",
    "prefill": "prefills of other requests",
    "draft": "drafting",
}
_REMEDIES = {
    "weights": "more ranks (TP) each read fewer of them; fp8 or int4 weights halve or quarter "
    "them; more requests in flight share each reading",
    "kv": "an fp8 KV cache halves it; more ranks share it; shorter contexts need less",
    "gemm": "only faster or more devices help: there are enough requests to keep them busy",
    "all_reduce": "fewer ranks, a faster link between them, or stages (PP) instead of ranks",
    "send_recv": "fewer stages, or a faster link between them",
    "bubble": "more requests in flight, or fewer stages",
    "launch": "more devices do not shorten it: it is the same on each",
    "host": "more devices do not shorten it",
    "prefill": "fewer requests in flight, shorter prompts, or a replica that only prefills",
    "draft": "a smaller draft model, or n-grams",
}
MS = 1e3


def explain(plan: Plan) -> list[str]:
    """Sentences, the most important first."""
    said = [_verdict(plan), _dominant(plan), _wall(plan), _rule(plan), _memory(plan), _fusion(plan)]
    return [text for text in [*said, _speculation(plan)] if text]


def _verdict(plan: Plan) -> str:
    best, question = plan.best, plan.question
    layout, count = best.layout, question.cluster.count
    off = plan.spread(best)
    what = (
        f"{around(best.service.tpot * MS, off.tpot)} ms per token, "
        f"{around(best.service.throughput, off.throughput)} tokens/s"
    )
    if layout.tp == layout.pp == 1:
        if layout.replicas == 1:
            rest = f"; the other {count - 1} bring nothing here" if count > 1 else ""
            return f"Do not distribute: one device does it best ({what}){rest}."
        return (
            f"Do not split the model: {layout.replicas} replicas of one device each ({what}). "
            "They exchange nothing, so nothing is lost."
        )
    free = question.cluster.free_count
    devices = f"the fewest that hold it, {layout.devices}" if free else f"{layout.devices}"
    idle = "" if free or layout.devices == count else f"; {count - layout.devices} stay idle"
    return f"Run {layout} on {devices} device{'s' * (layout.devices > 1)}: {what}{idle}."


def _largest(terms: Terms) -> tuple[str, float]:
    found = terms.as_dict()
    name = max(found, key=found.get)
    return name, found[name] / terms.total


def _dominant(plan: Plan) -> str:
    terms = plan.best.service.per_token
    name, part = _largest(terms)
    text = f"{part:.0%} of a token's time is {NAMES[name]}: {_REMEDIES[name]}."
    if name != "all_reduce" and terms.communication > 0.1 * terms.total:
        text += f" Communication takes {terms.communication / terms.total:.0%}."
    return text


def _wall(plan: Plan) -> str:
    spot, curve = plan.sweet_spot, plan.curve
    if len(curve) < 2:
        return ""
    later = [point for point in curve if point.devices > spot.devices]
    first = curve[0]
    if not later:
        if spot.devices == first.devices:
            return ""
        return (
            f"No wall up to {spot.devices} devices: {plan.ratio(spot.best, first.best)} times the "
            f"speed of {_devices(first.devices)}."
        )
    most = max(later, key=lambda point: point.speed)
    change = most.speed / spot.speed
    head = f"The sweet spot is {_devices(spot.devices)} ({spot.best.layout}). "
    if change <= 1.0:
        return head + f"The wall stands behind it: nothing on more is faster. {_why(spot, most)}"
    return head + (
        f"Beyond it, {most.devices} devices ({most.best.layout}) bring "
        f"{plan.ratio(most.best, spot.best)} times the speed for "
        f"{most.devices / spot.devices:.3g} times the devices. {_why(spot, most)}"
    )


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count > 1)}"


def _why(fewer: Point, more: Point) -> str:
    """Which terms of a token shrink and which grow from one point to the other."""
    before, after = (_resolved(p.best).as_dict() for p in (fewer, more))
    changes = {name: (after[name] - before[name]) * MS for name in before}
    least = min(changes, key=changes.get)
    grown = max(changes, key=changes.get)
    parts = []
    if changes[least] < 0:
        parts.append(f"{NAMES[least]} falls by {-changes[least]:.2g} ms a token")
    if changes[grown] > 0.005:
        parts.append(f"{NAMES[grown]} grows by {changes[grown]:.2g} ms")
    fixed = before["launch"] + before["host"]
    if fixed > 0.25 * sum(before.values()):
        parts.append(f"{fixed * MS:.2g} ms (small kernels, host) stay whatever is added")
    return ", ".join(parts)[:1].upper() + ", ".join(parts)[1:] + "." if parts else ""


def _resolved(candidate: Candidate) -> Terms:
    """A token's time, with the prefills of others counted as what they consist of."""
    service = candidate.service
    per_token, prompt = service.per_token, service.first_token
    return replace(per_token, prefill=0.0) + prompt.scaled(per_token.prefill / prompt.total)


def _rule(plan: Plan) -> str:
    """Whether 'TP inside the host, PP across' holds."""
    cluster, host = plan.question.cluster, plan.question.cluster.host_size
    if cluster.count <= host:
        return ""
    across = _first(plan, lambda layout: layout.tp > host)
    inside = _first(plan, lambda layout: layout.tp <= host < layout.tp * layout.pp)
    alone = _first(plan, lambda layout: layout.tp * layout.pp <= host)
    rule = "'TP inside the host, PP across hosts'"
    if alone is not None and plan.best.layout.tp * plan.best.layout.pp <= host:
        return (
            f"{rule} is not needed: a replica inside one host ({alone.layout.single}) is better "
            "than one that spans hosts."
        )
    if across is None or inside is None:
        return ""
    a, b = across.service.per_token, inside.service.per_token
    compared = (
        f"{across.layout} takes {a.total * MS:.3g} ms a token, {a.all_reduce * MS:.2g} of it "
        f"all-reduce; {inside.layout} {b.total * MS:.3g} ms, {b.all_reduce * MS:.2g} of it"
    )
    if plan.speed(inside) >= plan.speed(across):
        return f"{rule} holds: {compared}."
    few = across.service.running / across.layout.replicas < inside.layout.pp
    reason = (
        "with so few requests, stages wait for each other and shorten nothing, while every rank "
        "of a wider TP reads its part of the weights at the same time"
        if few
        else "the weights and the cache that more ranks read at once outweigh the slower all-reduce"
    )
    return f"{rule} does not hold here: {compared}. The reason: {reason}."


def _first(plan: Plan, wanted) -> Candidate | None:
    return next((c for c in plan.candidates if wanted(c.layout)), None)


def _memory(plan: Plan) -> str:
    question, best, fewest = plan.question, plan.best, plan.fewest
    cluster, host = question.cluster, question.cluster.device.host
    memory = best.service.memory
    weights = question.model.weight_bytes(question.precision.weights) / 1e9
    text = (
        f"Memory: {weights:.0f} GB of weights in all, {memory.weights / 1e9:.1f} GB on the fullest "
        f"device, which leaves room for {_room(plan, best)} tokens of KV cache in a replica."
    )
    if fewest.devices == 1:
        return text
    least = plan.search.memory(fewest, 512)
    text += f" The fewest devices that hold it are {fewest.devices}, as {fewest}"
    text += f", with room for {least.kv_tokens:,} tokens"
    hosts = -(-fewest.devices // host)
    if fewest.devices % host and cluster.count >= hosts * host and hosts > 1:
        whole = next((p for p in plan.curve if p.devices == hosts * host), None)
        part = next((p for p in plan.curve if p.devices == fewest.devices), None)
        text += f"; hosts come with {host}, so people buy {hosts * host}"
        if whole and part:
            text += f", which are {plan.ratio(whole.best, part.best)} times as fast"
            text += f" ({whole.best.layout}, {_room(plan, whole.best)} tokens of room)"
    return text + "."


def _room(plan: Plan, candidate: Candidate) -> str:
    """Tokens of KV cache, in words."""
    found = plan.spread(candidate).kv_tokens(candidate.service.memory)
    return f"{found.value:,} ({figure(found.low)} to {figure(found.high)})"


def _fusion(plan: Plan) -> str:
    best, question = plan.best, plan.question
    layout = best.layout
    if layout.tp == 1:
        return ""
    if not question.fused:
        return "Fused kernels are off."
    if best.fused:
        plain = plan.search.setting
        return (
            f"Fusing pays: a step has few rows, and part of each all-reduce hides behind its GEMM "
            f"({plain.cluster.levels[0].link.name})."
        )
    if not plan.search.setting.cluster.mapped(0, layout.tp):
        return "Fusing does not pay: ranks cannot write to each other's memory over this link."
    rows = best.service.running / layout.replicas / best.service.groups
    if rows > FUSED_ROWS:
        return (
            f"Fusing does not pay: with {rows:.0f} rows a step the GEMM is long, and sending tiles "
            f"costs it more than is hidden (measured up to {FUSED_ROWS} rows as a gain)."
        )
    return "Fusing does not pay: the messages are so small that an all-reduce is all latency."


def _speculation(plan: Plan) -> str:
    question, best = plan.question, plan.best
    service, layout = best.service, best.layout.single
    each = service.running / best.layout.replicas
    context = question.work.context
    off = plan.spread(best)
    if question.acceptance is None:
        found = speculate(plan.search.setting, layout, each, context, Acceptance(rate=0.7), 4)
        if found.break_even >= 1:
            return "Speculation cannot pay here: verifying 4 drafts costs more than 5 plain steps."
        return (
            f"Speculation with 4 n-gram drafts pays if more than {found.break_even:.0%} of them "
            f"are accepted; at 70% it would be {around(found.speedup, off.ratio)} times as fast "
            "(--acceptance)."
        )
    if service.speculation is None:
        one = speculate(plan.search.setting, layout, each, context, question.acceptance, 1)
        return (
            "Speculation does not pay: already one draft needs an acceptance of "
            f"{one.break_even:.0%}."
        )
    found = service.speculation
    return (
        f"Speculate with {found.drafts} drafts: {found.tokens:.3g} tokens a step, "
        f"{around(found.speedup, off.ratio)} times as fast; it pays from {found.break_even:.0%} "
        "acceptance on."
    )
