"""A causal LM of the transformers library, split over the ranks in place."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from commfuse.errors import UsageError
from commfuse.models.checkpoint import (
    StoredTensors,
    open_tensors,
    return_freed_memory,
)
from commfuse.models.config import DTYPES
from commfuse.models.run_plan import read_run_plan
from commfuse.models.skeleton import read_the_rest, skeleton_of
from commfuse.nn import (
    ColumnParallelLinear,
    RowParallelLinear,
    ShardedModule,
    Span,
    VocabParallelEmbedding,
    VocabParallelHead,
    shard_heads,
    split,
)
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.mesh import Mesh, init_mesh

COLUMNS, ROWS = "colwise", "rowwise"
# Of the plan: modules that every rank keeps whole, and heads, which are found without it.
_REPLICATED = ("replicated", "replicated_with_grad_allreduce")
_HEAD = ("colwise_rep", "colwise_gather_output")
_MOST_OBSTACLES = 8


class _QueryHeads(ColumnParallelLinear):
    """Queries of a rank, with heads of zeros around them that fill up the groups of its KV heads.

    The model's attention takes equally many query heads a KV head. The cut may go through a group:
    then what is missing of it is made up here, and dropped by :class:`_HeadsOutput`; no weight is
    read for it.
    """

    filling = (0, 0)  # features before and behind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(super().forward(x), self.filling)


class _HeadsOutput(RowParallelLinear):
    """The output layer behind :class:`_QueryHeads`."""

    filling = (0, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, behind = self.filling
        return super().forward(x[..., before : x.shape[-1] - behind])


@dataclass(frozen=True)
class _Change:
    """A module to be replaced.

    Attributes:
        name: of the module in the model.
        make: makes the module that takes its place.
    """

    name: str
    make: Callable[[], ShardedModule]


def parallelize(
    model: nn.Module | str | Path, mesh: Mesh | str | Path, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Splits a causal LM of the transformers library over the tensor-parallel ranks.

    Its linear layers, embedding and head are replaced by those of :mod:`commfuse.nn`; all else
    stays: ``generate()`` of the library works as before, on every rank at once, with its caches
    (a rank's holds the KV heads of that rank). Which layer is cut how is read from the model's own
    tensor-parallel plan. Any number of ranks from 1 to the number of query heads works. The model
    is for inference afterwards: in evaluation mode, without gradients.

    All ranks must make the same calls with the same inputs. Where tokens are drawn, they need the
    same seed: ``torch.manual_seed(0)`` on all of them.

    Args:
        model: the whole model on every rank, equal on all, on the CPU, in bfloat16, float16 or
            float32; changed in place. Or a directory with config.json and safetensors: every rank
            then reads its own slices, one tensor at a time.
        mesh: from :func:`commfuse.init_mesh`, of one pipeline stage, on the CPU. Or a file that
            ``commfuse plan --json`` wrote: its TP is the number of ranks, which must have been
            started. Their mesh is made here, and closed when the model is gone.
        dtype: of a model that is read; None: the plan's, or as in config.json, or else as stored.

    Returns:
        The model.

    Raises:
        UsageError: before anything is changed or read: tensor parallelism that this model does not
            allow (the message says what would work); layers that the plan does not mention or cuts
            in an unknown way (mixtures of experts, fused or quantised layers), named; a model that
            is split already; a mesh of several stages or on a GPU; a plan for several stages, for
            replicas or for quantised weights, or one that cannot be read.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(path)
        >>> with commfuse.init_mesh(tp=2) as mesh:      # under torchrun --nproc-per-node 2
        ...     tokens = commfuse.parallelize(model, mesh).generate(prompt, max_new_tokens=32)
        >>> model = commfuse.parallelize(path, "plan.json")    # on as many ranks as the plan says
    """
    if isinstance(mesh, Mesh):
        return _parallelize(model, mesh, dtype)
    plan = read_run_plan(mesh)
    planned = getattr(torch, plan.dtype_for("parallelize"))
    if plan.pp > 1:
        raise UsageError(
            f"the plan has {plan.pp} pipeline stages, and parallelize splits layers; plan with "
            "--pp 1"
        )
    reads = not isinstance(model, nn.Module)
    own = init_mesh(tp=plan.tp)
    try:
        result = _parallelize(model, own, dtype or planned if reads else dtype)
    except BaseException:
        own.close()
        raise
    weakref.finalize(result, own.close)
    return result


def _parallelize(model: nn.Module | str | Path, mesh: Mesh, dtype: torch.dtype | None) -> nn.Module:
    _check_mesh(mesh)
    if not isinstance(model, nn.Module):
        with open_tensors(model) as tensors:
            skeleton = skeleton_of(Path(model).expanduser(), tensors, dtype)
            _replace(skeleton, _changes(skeleton, mesh.tp), tensors)
            read_the_rest(skeleton, tensors)
        return _for_inference(skeleton)
    if dtype is not None:
        raise UsageError("dtype is for a model that is read; convert this one with model.to(dtype)")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError("the model has no weights (meta device); give the directory instead")
    _replace(model, _changes(model, mesh.tp), None)
    return _for_inference(model)


def _check_mesh(mesh: Mesh) -> None:
    if mesh.pp.world_size > 1:
        raise UsageError(
            f"parallelize splits layers, and the mesh has {mesh.pp.world_size} pipeline stages: "
            f"use init_mesh(tp={mesh.pp.world_size * mesh.tp.world_size})"
        )
    if mesh.tp.device.type != "cpu":
        raise UsageError(f"parallelize runs on the CPU; the mesh is on {mesh.tp.device}")


def _changes(model: nn.Module, comm: Communicator) -> list[_Change]:
    """What is to be replaced, by what; nothing is changed yet.

    Raises:
        UsageError: the model cannot be split.
    """
    _check_model(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    styles, obstacles = _styles(model, {embedding, head})
    changes = []
    for parent_name, children in _by_parent(styles).items():
        parent = model.get_submodule(parent_name)
        kinds = {child: type(parent.get_submodule(child)) for child in children}
        strange = {child: kind for child, kind in kinds.items() if kind is not nn.Linear}
        obstacles |= {
            _generic(f"{parent_name}.{child}"): f"a {kind.__name__}, not a torch.nn.Linear"
            for child, kind in strange.items()
        }
        if strange:
            continue
        cut = _attention if "o_proj" in children else _mlp
        try:
            changes += cut(parent_name, parent, children, comm)
        except _Obstacle as obstacle:
            obstacles[_generic(parent_name)] = str(obstacle)
    for module, kind in ((embedding, nn.Embedding), (head, nn.Linear)):
        if type(module) is not kind:
            obstacles[names[module]] = f"a {type(module).__name__}, not a torch.nn.{kind.__name__}"
    if obstacles:
        raise UsageError(_refusal(model, obstacles))

    def make_embedding() -> VocabParallelEmbedding:
        return VocabParallelEmbedding.from_embedding(embedding, comm)

    def make_head() -> VocabParallelHead:
        if head.weight is not embedding.weight:
            return VocabParallelHead.from_linear(head, comm)
        tied = model.get_input_embeddings()
        return VocabParallelHead(tied, head.out_features, comm, slices=tied.slices)

    return [_Change(names[embedding], make_embedding), *changes, _Change(names[head], make_head)]


class _Obstacle(Exception):
    """Why a layer cannot be split."""


def _check_model(model: nn.Module) -> None:
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise UsageError(f"a causal LM of transformers is needed, not {type(model).__name__}")
    if model.get_output_embeddings() is None:
        raise UsageError(
            f"{type(model).__name__} has no head that gives logits: use its ForCausalLM class"
        )
    split_already = [name for name, m in model.named_modules() if isinstance(m, ShardedModule)]
    if split_already:
        raise UsageError(f"the model is split already: {split_already[0]} is a part of a layer")
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise UsageError(
                f"{name} is a {type(parameter).__name__}, not a plain parameter: the model is "
                "split or quantised already"
            )
        if parameter.device.type not in ("cpu", "meta"):
            raise UsageError(
                f"{name} is on {parameter.device} and the mesh on the CPU: use model.to('cpu')"
            )
    if getattr(model.config, "quantization_config", None) is not None:
        raise UsageError("quantised models are not supported; load it in bfloat16 or float32")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES.values()):
        found = ", ".join(sorted(map(str, dtypes)))
        raise UsageError(
            f"the model is in {found}; one of bfloat16, float16 and float32 is needed: "
            "use model.to(torch.bfloat16)"
        )


def _generic(name: str) -> str:
    """The name as plans have it: layers' numbers become stars."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _plan(model: nn.Module) -> dict[str, str]:
    """The model's own tensor-parallel plan: a style for every generic name that is cut."""
    prefix = model.base_model_prefix
    base = getattr(model.config, "base_model_tp_plan", None)
    if not base:
        raise UsageError(
            f"{type(model).__name__} has no tensor-parallel plan (config.base_model_tp_plan), so "
            "that it is unknown how its layers can be cut"
        )
    return {f"{prefix}.{name}": style for name, style in base.items()} | (
        getattr(type(model), "_tp_plan", None) or {}
    )


def _styles(model: nn.Module, vocabulary: set[nn.Module]) -> tuple[dict[str, str], dict[str, str]]:
    """The linear layers to be cut, by name, and by generic name what cannot be."""
    plan, styles, obstacles = _plan(model), {}, {}
    for name, style in plan.items():
        known = style in (COLUMNS, ROWS, *_REPLICATED)
        if not known and not (style in _HEAD and name == "lm_head"):
            obstacles[name] = f"its plan {style!r} is not supported"
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or module in vocabulary:
            continue
        style = plan.get(_generic(name))
        if style in (COLUMNS, ROWS):
            styles[name] = style
        elif any(parameter.dim() != 1 for parameter in own.values()):
            obstacles.setdefault(_generic(name), f"a {type(module).__name__} without a plan")
    return styles, obstacles


def _by_parent(styles: dict[str, str]) -> dict[str, dict[str, str]]:
    parents: dict[str, dict[str, str]] = {}
    for name, style in styles.items():
        parent, _, child = name.rpartition(".")
        parents.setdefault(parent, {})[child] = style
    return parents


def _attention(
    name: str, attention: nn.Module, children: dict[str, str], comm: Communicator
) -> Iterable[_Change]:
    """An attention module: its heads are cut, and the KV heads that they read."""
    expected = {"q_proj": COLUMNS, "k_proj": COLUMNS, "v_proj": COLUMNS, "o_proj": ROWS}
    if children != expected:
        raise _Obstacle(f"cut as {children}; supported is {expected}")
    dim, group = getattr(attention, "head_dim", None), "num_key_value_groups"
    if not isinstance(dim, int) or not hasattr(attention, group):
        raise _Obstacle(f"{type(attention).__name__} has no head_dim or no {group}")
    q, k, v, o = (attention.get_submodule(child) for child in expected)
    sizes = (q.out_features, k.out_features, v.out_features, o.in_features)
    heads, kv_heads = q.out_features // dim, k.out_features // dim
    if sizes != (heads * dim, kv_heads * dim, kv_heads * dim, heads * dim) or heads % kv_heads:
        raise _Obstacle(f"features of q, k, v and o are {sizes}, which are not heads of {dim}")
    for parameter_name, parameter in attention.named_parameters():
        child, _, rest = parameter_name.partition(".")
        if child not in expected and (not rest or tuple(parameter.shape) != (dim,)):
            raise _Obstacle(f"{parameter_name} {tuple(parameter.shape)} may belong to single heads")

    shard = shard_heads(heads, kv_heads, comm.world_size, comm.rank)
    query, kv = (Span(span.begin * dim, span.end * dim) for span in (shard.query, shard.kv))
    filling = (0, 0)
    if len(shard.kv) > 1:
        filling = (
            (shard.query.begin - shard.kv.begin * shard.group) * dim,
            (shard.kv.end * shard.group - shard.query.end) * dim,
        )

    def make_query() -> ColumnParallelLinear:
        # A single KV head serves as many query heads as there are.
        setattr(attention, group, len(shard.query) if len(shard.kv) == 1 else shard.group)
        kind = _QueryHeads if any(filling) else ColumnParallelLinear
        layer = kind.from_linear(q, comm, query)
        layer.filling = filling
        return layer

    def make_output() -> RowParallelLinear:
        kind = _HeadsOutput if any(filling) else RowParallelLinear
        layer = kind.from_linear(o, comm, query)
        layer.filling = filling
        return layer

    yield _Change(f"{name}.q_proj", make_query)
    yield _Change(f"{name}.k_proj", lambda: ColumnParallelLinear.from_linear(k, comm, kv))
    yield _Change(f"{name}.v_proj", lambda: ColumnParallelLinear.from_linear(v, comm, kv))
    yield _Change(f"{name}.o_proj", make_output)


def _mlp(
    name: str, mlp: nn.Module, children: dict[str, str], comm: Communicator
) -> Iterable[_Change]:
    """A module whose inner features are cut."""
    inner = {
        child: linear.out_features if style == COLUMNS else linear.in_features
        for child, style in children.items()
        for linear in (mlp.get_submodule(child),)
    }
    if len(set(inner.values())) > 1 or set(children.values()) != {COLUMNS, ROWS}:
        raise _Obstacle(f"cut as {children} with {inner} inner features, which must be equal")
    features = next(iter(inner.values()))
    if comm.world_size > features:
        raise _Obstacle(f"tp={comm.world_size} exceeds its {features} features")
    span = split(features, comm.world_size, comm.rank)
    for child, style in children.items():
        kind = ColumnParallelLinear if style == COLUMNS else RowParallelLinear
        linear = mlp.get_submodule(child)
        yield _Change(
            f"{name}.{child}",
            lambda kind=kind, linear=linear: kind.from_linear(linear, comm, span),
        )


def _refusal(model: nn.Module, obstacles: dict[str, str]) -> str:
    lines = [f"  {name}: {why}" for name, why in obstacles.items()]
    if len(lines) > _MOST_OBSTACLES:
        lines[_MOST_OBSTACLES:] = [f"  and {len(lines) - _MOST_OBSTACLES} more"]
    return "\n".join([f"{type(model).__name__} cannot be split; nothing was changed:", *lines])


def _replace(model: nn.Module, changes: list[_Change], tensors: StoredTensors | None) -> None:
    """Makes the changes one by one; what a replaced module held is freed at once."""
    while changes:
        change = changes.pop(0)
        module = change.make()
        if not module.loaded:
            module.load_parts(
                {
                    name: tensors.read(
                        f"{change.name}.{name}", part.rows, part.columns, module.dtype
                    )
                    for name, part in module.slices.items()
                }
            )
        model.set_submodule(change.name, module)
        return_freed_memory()


def _for_inference(model: nn.Module) -> nn.Module:
    def save_pretrained(*_: Any, **__: Any) -> None:
        raise UsageError("this model holds the parts of one rank; save it before it is split")

    model.save_pretrained = save_pretrained
    return model.eval().requires_grad_(False)
