"""On every rank: a model in stages, generating in batches, with drafts, sampled, and failing."""

import os
import random
import time
from pathlib import Path

import torch.distributed as dist

from commfuse.errors import CommfuseError
from commfuse.generation import Generator, Pipeline, engine
from commfuse.models.checkpoint import open_checkpoint
from commfuse.models.llama import Llama
from commfuse.models.stage_costs import measure_costs
from commfuse.models.stages import cut_stages
from commfuse.ops import Sampling
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.mesh import Mesh, init_mesh


def _load(path: str, mesh: Mesh, split: list[int] | None = None) -> tuple[Llama, list[str]]:
    """This rank's part of the model, and the names of the tensors that it has read."""
    names = []
    with open_checkpoint(Path(path)) as checkpoint:
        read = checkpoint.read

        def recording(name: str, **options):
            names.append(name)
            return read(name, **options)

        checkpoint.read = recording
        stage = cut_stages(checkpoint.config, mesh.pp.world_size, split)[mesh.pp.rank]
        return Llama(checkpoint, mesh.tp, stage=stage), names


def whole(path: str, prompts: list[list[int]], new_tokens: int) -> dict:
    """By one process: what every cut must give, log-probabilities included."""
    with init_mesh() as mesh:
        model, _ = _load(path, mesh)
        return _generations(Generator(model), prompts, new_tokens)


def _generations(generator: Generator, prompts: list[list[int]], new_tokens: int) -> dict:
    sampling = Sampling.of(len(prompts), temperature=0.8, top_k=40, seed=list(range(len(prompts))))
    results = {}
    for name, options in {
        "greedy": {},
        "drafts": {"draft_length": 3},
        "sampled": {"sampling": sampling},
        "sampled drafts": {"sampling": sampling, "draft_length": 2},
        "stop": {"stop_ids": list(range(0, 300, 9)), "draft_length": 3},
    }.items():
        found = generator.generate(prompts, new_tokens, log_probabilities=True, **options)
        results[name] = found.outputs, found.log_probabilities
    results["alone"] = [generator.generate([prompt], new_tokens)[0][0] for prompt in prompts[:2]]
    return results


def run(
    path: str, tp: int, pp: int, split: list[int] | None, prompts: list[list[int]], new_tokens: int
) -> dict:
    """Generations of a model on tp x pp ranks; what was read; statistics."""
    with init_mesh(tp=tp, pp=pp) as mesh:
        model, names = _load(path, mesh, split)
        generator = Generator(model, Pipeline(model, mesh.pp))
        results = _generations(generator, prompts, new_tokens)
        pieces: list[list[int]] = [[] for _ in prompts]
        found = generator.generate(
            prompts, new_tokens, on_tokens=lambda index, tokens: pieces[index].extend(tokens)
        )
        # Small messages: several passes of a prompt, more groups than stages.
        engine.FEWEST_ROWS = 3
        small = Generator(model, Pipeline(model, mesh.pp, rows=8))
        few, engine.PREFILL_ROWS = engine.PREFILL_ROWS, 8
        results["small messages"] = small.generate(prompts, new_tokens, draft_length=3)[0]
        passes = small.generate(prompts, new_tokens, draft_length=3).statistics
        engine.PREFILL_ROWS = few
        try:
            small.generate(prompts, new_tokens, draft_length=8)
            refused = ""
        except CommfuseError as error:
            refused = str(error)
        return {
            "results": results,
            "streamed": pieces == found.outputs,
            "statistics": vars(found.statistics),
            "small": vars(passes),
            "refused": refused,
            "layers": sorted({int(n.split(".")[2]) for n in names if ".layers." in n}),
            "names": names,
            "cache": len(model.new_cache(1, 16).layers),
        }


def over_torch(path: str, prompts: list[list[int]], new_tokens: int) -> dict:
    """Two stages whose messages go by torch.distributed; one that is asked for wrongly."""
    with init_mesh(pp=2, transport="torch.distributed") as mesh:
        model, _ = _load(path, mesh)
        generator = Generator(model, Pipeline(model, mesh.pp))
        found = generator.generate(prompts, new_tokens, draft_length=3).outputs
        try:
            Pipeline(model)
            refused = ""
        except CommfuseError as error:
            refused = str(error)
        dist.barrier()
    return {"outputs": found, "refused": refused}


def tensor_parallel_across_hosts(path: str, prompts: list[list[int]], new_tokens: int) -> dict:
    """Three ranks split each layer, two of them on one host."""
    with init_mesh(tp=3, host=str(dist.get_rank() // 2)) as mesh:
        model, _ = _load(path, mesh)
        found = Generator(model).generate(prompts, new_tokens, draft_length=3)
        return {"transport": mesh.tp.transport, "outputs": found.outputs}


def measured(path: str) -> dict:
    """Costs as two stages measure them; and stages that do not fit together."""
    with init_mesh(pp=2) as mesh, open_checkpoint(Path(path)) as checkpoint:
        costs = measure_costs(checkpoint.config, mesh, rows=3)
        cut = cut_stages(checkpoint.config, 2, costs=costs)
        splits = [[1, 4], [2, 3]]
        mine = cut_stages(checkpoint.config, 2, splits[mesh.pp.rank])[mesh.pp.rank]
        try:
            Pipeline(Llama(checkpoint, mesh.tp, stage=mine), mesh.pp)
            refused = ""
        except CommfuseError as error:
            refused = str(error)
    return {"costs": costs, "layers": [len(stage.layers) for stage in cut], "refused": refused}


def straggling(path: str, prompts: list[list[int]], new_tokens: int) -> dict:
    """Two stages, late at random before they signal and between passes; then one that is stuck."""
    pause = random.Random(dist.get_rank())
    with init_mesh(pp=2) as mesh:
        model, _ = _load(path, mesh)
        generator = Generator(model, Pipeline(model, mesh.pp))

        def on_tokens(index: int, tokens: list[int]) -> None:
            mesh.pp._native.set_publish_delay_us(pause.choice((0, 0, 0, 500)))
            if pause.random() < 0.1:
                time.sleep(pause.random() * 2e-3)

        found = generator.generate(prompts, new_tokens, draft_length=3, on_tokens=on_tokens).outputs
        mesh.pp._native.set_publish_delay_us(0)
    with init_mesh(pp=2, timeout=0.5) as mesh:
        model, _ = _load(path, mesh)
        generator, error = Generator(model, Pipeline(model, mesh.pp)), ("", "")
        if mesh.pp.rank == 0:
            try:
                generator.generate(prompts, new_tokens)
            except CommfuseError as raised:
                error = type(raised).__name__, str(raised)
        dist.barrier()
    return {"outputs": found, "stuck": error}


def soak(path: str, prompts: list[list[int]], new_tokens: int, steps: int) -> dict:
    """Generations until so many steps are done, with delays; what changes, and what is left."""

    def footprint() -> tuple[int, int, int]:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        maps = Path("/proc/self/maps").read_text().count("memfd:commfuse")
        return maps, len(os.listdir("/proc/self/fd")), resident

    pause, done, outputs, warm = random.Random(dist.get_rank()), 0, set(), None
    while done < steps:
        # torch's process groups, which init_mesh makes, would stay open until the job ends.
        with Mesh(None, Communicator(), Communicator(dist.group.WORLD)) as mesh:
            model, _ = _load(path, mesh)
            generator = Generator(model, Pipeline(model, mesh.pp))
            for _ in range(10):
                mesh.pp._native.set_publish_delay_us(pause.choice((0, 0, 200)))
                found = generator.generate(prompts, new_tokens)
                outputs.add(str(found.outputs))
                done += found.statistics.steps
            mesh.pp.barrier()
        del generator, model, mesh
        if warm is None and done >= steps // 5:
            warm = footprint()
    return {"steps": done, "outputs": len(outputs), "before": warm, "after": footprint()}


def dying(path: str, victim: int, folder: str) -> tuple[str, str, float]:
    """A stage is killed in the middle of a generation; what the others get."""
    mesh = init_mesh(pp=dist.get_world_size())
    model, _ = _load(path, mesh)
    generator = Generator(model, Pipeline(model, mesh.pp))
    killed_at = [0.0]

    def on_tokens(index: int, tokens: list[int]) -> None:
        if killed_at[0] == 0.0 and len(tokens_seen) == 6:
            killed_at[0] = time.monotonic()
            if mesh.pp.rank == victim:
                os.kill(os.getpid(), 9)
        tokens_seen.append(index)

    tokens_seen: list[int] = []
    try:
        generator.generate([[1, 2, 3], [4, 5]], 40, on_tokens=on_tokens)
        error = ("", "", 0.0)
    except CommfuseError as raised:
        error = type(raised).__name__, str(raised), time.monotonic() - killed_at[0]
    Path(folder, str(mesh.pp.rank)).touch()
    deadline = time.monotonic() + 10
    while len(os.listdir(folder)) < mesh.pp.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    mesh.close()
    return error
