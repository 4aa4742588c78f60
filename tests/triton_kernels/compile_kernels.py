"""Compiles the kernels for the architectures given (80, 90, ...) and prints the result as JSON.

A program of its own: Triton decides when it is imported whether it interprets or compiles.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from commfuse.triton_kernels import (
    all_reduce,
    all_reduce_rms_norm,
    attention,
    matmul_all_reduce,
    silu_mul,
    vocab_parallel_sample,
)
from commfuse.triton_kernels.workspace import Layout

VARIANTS = [(torch.bfloat16, "bf16", 2), (torch.float16, "fp16", 3), (torch.float32, "fp32", 8)]
HIDDEN = 8192
SLOT_BYTES, MAX_BLOCKS = 1 << 20, 128
EVERYWHERE = "float16 W=3"  # of the fused ops; the other variants for compute 9.0 alone
ATTENDING = [(80, "float16 W=3"), (90, "bfloat16 W=2")]  # of attention
# Rows and options of the GEMM's variants.
DECODING = [
    (1, ()),
    (64, ("bias", "residual", "norm_weight", "normalised")),
    (20, ("residual",)),
]


def compiled(architecture: int, kernel, signature: dict, constants: dict, num_warps: int):
    """The kernel as it is launched for 16-byte aligned tensors of a multiple of 16 elements."""
    types = dict.fromkeys(kernel.arg_names, "i32") | signature
    types |= dict.fromkeys(constants, "constexpr")
    sizes = {"numel", "columns", "depth", "dim", "max_length", "features"} - set(
        kernel.do_not_specialize
    )
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name in sizes]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(
        ASTSource(kernel, types, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": num_warps},
    )


def variants(architecture: int):
    """(op, variant, compiled kernel)."""
    for (dtype, pointee, world_size), (rows, options) in zip(VARIANTS, DECODING, strict=True):
        layout = Layout(world_size, SLOT_BYTES, MAX_BLOCKS)
        variant = f"{str(dtype).removeprefix('torch.')} W={world_size}"
        tensor = f"*{pointee}"
        signature = {"x": tensor, "out": tensor, "addresses": "*i64"}
        constants = {"BLOCK": all_reduce.block_size(dtype), **layout.constants()}
        kernel, warps = all_reduce.all_reduce_kernel, all_reduce.NUM_WARPS
        yield "all_reduce", variant, compiled(architecture, kernel, signature, constants, warps)
        if variant == EVERYWHERE and architecture < 100:
            yield "verify_chain", variant, drawing(architecture, pointee, layout)
        if architecture != 90 and variant != EVERYWHERE:
            continue  # each takes seconds

        if (architecture, variant) in ATTENDING:
            for name, kernel in attending(architecture, dtype, pointee):
                yield name, variant, kernel

        names = ("x", "residual", "weight", "summed", "normalised")
        signature = {**dict.fromkeys(names, tensor), "addresses": "*i64", "eps": "fp32"}
        constants = {"BLOCK": all_reduce_rms_norm.block_size(HIDDEN), **layout.constants()}
        kernel = all_reduce_rms_norm.all_reduce_rms_norm_kernel
        warps = all_reduce_rms_norm.num_warps(HIDDEN, dtype)
        yield (
            "all_reduce_rms_norm",
            variant,
            compiled(architecture, kernel, signature, constants, warps),
        )

        given = dict.fromkeys(("x", "w", "summed", *options), tensor)
        absent = {"bias", "residual", "norm_weight", "normalised"} - set(options)
        signature = {**given, "addresses": "*i64", "eps": "fp32"}
        constants = {
            **matmul_all_reduce.compile_constants(rows, HIDDEN, dtype, layout),
            **dict.fromkeys(absent),
        }
        kernel, warps = matmul_all_reduce.matmul_all_reduce_kernel, matmul_all_reduce.NUM_WARPS
        yield (
            "matmul_all_reduce",
            variant,
            compiled(architecture, kernel, signature, constants, warps),
        )


def attending(architecture: int, dtype: torch.dtype, pointee: str):
    """(name, kernel) of attention over heads of 128, four to a KV head, and of gated features."""
    tensors = ("qkv", "q", "k_cache", "v_cache", "q_norm", "k_norm", "out", "gate_up")
    signature = {
        **dict.fromkeys(tensors, f"*{pointee}"),
        **dict.fromkeys(("sequences", "positions"), "*i64"),
        **dict.fromkeys(("cos", "sin", "totals", "sums"), "*fp32"),
        **dict.fromkeys(("eps", "scale"), "fp32"),
    }  # fmt: skip
    keys, dim, group = attention.keys_at_once(dtype), 128, 4
    rows = attention.prefill_rows(group)
    cut = {"PART": attention.PART, "MOST_PARTS": attention.MOST_PARTS}
    for kernel, warps, constants in (
        (silu_mul.silu_mul_kernel, 4, {"BLOCK": silu_mul.BLOCK}),
        (attention.append_kernel, 1, {"HALF": dim // 2}),
        (
            attention.decode_kernel,
            attention.NUM_WARPS,
            {"GROUP": attention.DOT_ROWS, "KEYS": keys, "DIM": dim, **cut},
        ),
        (
            attention.join_kernel,
            attention.NUM_WARPS,
            {"AT_ONCE": attention.PARTS_AT_ONCE, "DIM": dim, **cut},
        ),
        (
            attention.prefill_kernel,
            attention.PREFILL_WARPS,
            {"ROWS": rows, "GROUP": group, "KEYS": keys, "DIM": dim},
        ),
    ):
        own = {name: kind for name, kind in signature.items() if name in kernel.arg_names}
        name = kernel.fn.__name__.removesuffix("_kernel")
        constants = {**constants, "OVERLAP": architecture >= 90}
        yield name, compiled(architecture, kernel, own, constants, warps)


def drawing(architecture: int, pointee: str, layout: Layout):
    """The kernel that draws, with all that it can."""
    integers = (
        "drafts", "row_begin", "top_k", "seed", "position", "tokens", "accepted", "state", "bins",
        "addresses",
    )  # fmt: skip
    signature = {
        **dict.fromkeys(integers, "*i64"), "logits": f"*{pointee}", "temperature": "*fp64",
        "top_p": "*fp64", "q": "*fp32", "logs": "*fp32", "status": "*i32",
    }  # fmt: skip
    constants = {
        "BLOCKS": vocab_parallel_sample.BLOCKS, "DIGITS": 3,
        "ROW_WORDS": vocab_parallel_sample.words_of_row(True, True),
        **dict.fromkeys(("LOGS", "TRUNCATED", "DISTRIBUTED"), True), **layout.constants(),
    }  # fmt: skip
    kernel, warps = vocab_parallel_sample.draw_kernel, vocab_parallel_sample.NUM_WARPS
    return compiled(architecture, kernel, signature, constants, warps)


def resources(cubin: bytes) -> dict[str, int]:
    """What ptxas made of it: registers and bytes of stack of a thread, among others."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}


def main() -> None:
    results = {}
    for architecture in map(int, sys.argv[1:]):
        results[architecture] = {}
        for op, variant, kernel in variants(architecture):
            results[architecture].setdefault(op, {})[variant] = {
                "cubin_bytes": len(kernel.asm["cubin"]),
                "ptx": kernel.asm["ptx"],
                "shared_bytes": kernel.metadata.shared,
                **resources(kernel.asm["cubin"]),
            }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
