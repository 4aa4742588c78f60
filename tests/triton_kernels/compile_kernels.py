"""Compiles the kernels for the architectures given (80, 90, ...) and prints the result as JSON.

A program of its own: Triton decides when it is imported whether it interprets or compiles.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from commfuse.triton_kernels.all_reduce import NUM_WARPS, all_reduce_kernel, block_size
from commfuse.triton_kernels.workspace import Layout

VARIANTS = [(torch.bfloat16, "bf16", 2), (torch.float16, "fp16", 3), (torch.float32, "fp32", 8)]


def compile_all_reduce(architecture: int, dtype: torch.dtype, pointee: str, world_size: int):
    """The kernel as it is launched for 16-byte aligned tensors of a multiple of 16 elements."""
    kernel = all_reduce_kernel
    constants = {"BLOCK": block_size(dtype), **Layout(world_size, 1 << 16).constants()}
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= {"x": f"*{pointee}", "out": f"*{pointee}", "addresses": "*i64"}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in ("x", "out", "addresses", "numel")
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": NUM_WARPS},
    )


def main() -> None:
    results = {}
    for architecture in map(int, sys.argv[1:]):
        results[architecture] = {}
        for dtype, pointee, world_size in VARIANTS:
            asm = compile_all_reduce(architecture, dtype, pointee, world_size).asm
            variant = f"{str(dtype).removeprefix('torch.')} W={world_size}"
            results[architecture][variant] = {"cubin_bytes": len(asm["cubin"]), "ptx": asm["ptx"]}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
