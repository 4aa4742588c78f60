"""``commfuse doctor``: what is here, what runs, and why the rest does not."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from commfuse.cli.ranks import started_ranks
from commfuse.errors import UsageError

# What csrc/cpu/kernel_table.cpp asks of a processor for each variant.
AVX2 = ("avx2", "fma", "f16c")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
AVX512_BF16 = (*AVX512, "avx512_bf16")
ISA_FEATURES = {
    "amx": (*AVX512_BF16, "amx_tile", "amx_bf16"),
    "avx512_bf16": AVX512_BF16,
    "avx512_fma": AVX512_BF16,
    "avx512": AVX512,
    "avx2": AVX2,
    "plain": (),
}
VECTOR_FEATURES = ("avx", "fma", "f16c", "amx", "asimd", "sve", "bf16")
PROMISES = {
    "cpu": "same bits on every rank and in every run of equal shapes and world size",
    "triton": "same bits on every rank and in every run of equal shapes and world size",
    "hierarchical": "same bits on every rank and in every run of equal shapes and hosts",
    "torch": "same bits on every rank; runs may differ",
    "reference": "float64, for tests",
}
PROBE_SECONDS = 60.0


def doctor(
    ranks: Annotated[
        int, typer.Option(help="Ranks to start for a look at their transports; 1: none.")
    ] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this installation and this machine can do, and why the rest does not work.

    Under torchrun, rank 0 reports on torchrun's ranks.
    """
    if ranks < 1:
        raise UsageError(f"--ranks {ranks}: at least 1")
    if started_ranks() is not None:
        from commfuse.cli.probe import collect

        job = collect()
        if os.environ["RANK"] != "0":
            return
    else:
        job = None if ranks == 1 else _probe(ranks)
    gpus = _gpus()
    report = {
        "versions": _versions(),
        "extension": _extension(),
        "cpu": _cpu(),
        "gpus": gpus,
        "memory": _memory(),
        "cache": _cache(),
        "one_process": _one_process("cpu"),
        "one_process_gpu": _one_process("cuda") if gpus["devices"] else None,
        "job": job,
        "determinism": PROMISES,
    }
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        _print(report)
    if job is not None and ("error" in job or not job["sums_are_right"]):
        raise typer.Exit(1)


def _probe(ranks: int) -> dict:
    from commfuse.runtime import launch

    command = [sys.executable, "-m", "commfuse.cli.probe"]
    results = launch.run_ranks(command, ranks, timeout=PROBE_SECONDS)
    failed = [result for result in results if result.status]
    if not failed:
        return json.loads(results[0].stdout.splitlines()[-1])
    said = failed[0].stderr.strip() or f"no answer within {PROBE_SECONDS:.0f} s"
    return {"error": f"rank {failed[0].rank} of {ranks}: {said}"}


def _versions() -> dict[str, str | None]:
    from importlib import metadata

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("commfuse", "torch", "triton", "numpy", "safetensors", "tokenizers", "gguf",
                 "transformers"):  # fmt: skip
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "kernel": platform.release(), "machine": platform.machine()}


def _extension() -> dict:
    from commfuse import _extension

    return {
        "usable": _extension.module is not None,
        "summary": _extension.summary(),
        "build": _extension.build_record,
    }


def _cpu() -> dict:
    from commfuse import _extension

    model, features = platform.machine(), set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            features = set(value.split())
            break
    chosen = None
    if _extension.module is not None:
        try:
            chosen = _extension.module.cpu_isa()
        except ValueError as error:  # COMMFUSE_CPU_ISA names what this processor cannot run
            chosen = str(error)
    return {
        "model": model,
        "cores_of_this_process": sorted(os.sched_getaffinity(0)),
        "cores_online": os.cpu_count(),
        "vector_features": sorted(f for f in features if f.startswith(VECTOR_FEATURES)),
        "variants": {
            name: [feature for feature in needed if feature not in features] or "runs"
            for name, needed in ISA_FEATURES.items()
        },
        "variant_used": chosen,
        "variant_asked_for": os.environ.get("COMMFUSE_CPU_ISA") or None,
    }


def _gpus() -> dict:
    import torch

    from commfuse import _extension

    if torch.version.cuda is None:
        return {"devices": [], "why_none": f"torch {torch.__version__} is not a CUDA build"}
    if not torch.cuda.is_available():
        return {"devices": [], "why_none": "torch finds no GPU"}
    count = torch.cuda.device_count()
    devices = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    native = _extension.module
    if native is not None and hasattr(native, "gpu_links"):
        links = [
            {
                "from": link.from_device,
                "to": link.to_device,
                "peer_access": link.access,
                "native_atomics": link.native_atomics,
                "performance_rank": link.performance_rank,
            }
            for link in native.gpu_links()
        ]
    else:
        links = [
            {"from": a, "to": b, "peer_access": torch.cuda.can_device_access_peer(a, b)}
            for a in range(count)
            for b in range(count)
            if a != b
        ]
    return {"devices": devices, "links": links, "topology": _topology()}


def _topology() -> str | None:
    """What ``nvidia-smi topo -m`` prints; None where there is no such command."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {error}"
    return (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _memory() -> dict:
    import resource

    available = None
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    group = _read("/sys/fs/cgroup/memory.max") or _read(
        "/sys/fs/cgroup/memory/memory.limit_in_bytes"
    )
    limited = group is not None and group.isdecimal() and int(group) < 1 << 60  # or "max"
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    return {
        "available_bytes": available,
        "cgroup_limit_bytes": int(group) if limited else None,
        "address_space_limit_bytes": (
            None if address_space == resource.RLIM_INFINITY else address_space
        ),
        "transparent_huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
    }


def _cache() -> dict:
    from commfuse.models.smollm2 import NAME
    from commfuse.runtime.cache import cache_directory

    folder = cache_directory()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return {
        "directory": str(folder),
        "writable": os.access(existing, os.W_OK),
        "free_bytes": shutil.disk_usage(existing).free,
        "default_model_present": (folder / NAME).is_dir(),
    }


def _one_process(device: str) -> dict:
    from commfuse.cli.probe import explain_all

    return explain_all(None, device)


def _print(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, soft_wrap=True)

    def section(title: str, lines: dict[str, object]) -> None:
        console.print(Text(title, style="bold"))
        for name, value in lines.items():
            console.print(f"  {name}: {value}")

    section("versions", {name: v or "not installed" for name, v in report["versions"].items()})
    section("extension", {"state": report["extension"]["summary"]})
    cpu = report["cpu"]
    used = len(cpu["cores_of_this_process"])
    section(
        "CPU",
        {
            "model": cpu["model"],
            "cores": f"{used} of {cpu['cores_online']} may be used",
            "vector features": " ".join(cpu["vector_features"]) or "none known",
            **{
                f"kernels, {name}": (
                    "this processor runs them"
                    if missing == "runs"
                    else f"lacks {' '.join(missing)}"
                )
                for name, missing in cpu["variants"].items()
            },
            "kernels in use": cpu["variant_used"] or "none: the extension is unusable",
        },
    )
    gpus = report["gpus"]
    if not gpus["devices"]:
        section("GPUs", {"no GPU": gpus["why_none"]})
    else:
        section("GPUs", {str(i): _gpu_text(device) for i, device in enumerate(gpus["devices"])})
        for link in gpus["links"]:
            console.print(f"  {link['from']} -> {link['to']}: {_link_text(link)}")
        if gpus["topology"]:
            console.print(gpus["topology"])
    memory, cache = report["memory"], report["cache"]
    section(
        "memory",
        {
            "available": _gigabytes(memory["available_bytes"]),
            "limit of the control group": _gigabytes(memory["cgroup_limit_bytes"]),
            "limit of the address space": _gigabytes(memory["address_space_limit_bytes"]),
            "transparent huge pages": memory["transparent_huge_pages"] or "unknown",
        },
    )
    section(
        "cache",
        {
            "directory": cache["directory"] + ("" if cache["writable"] else " (not writable)"),
            "free": _gigabytes(cache["free_bytes"]),
            "default model": "there" if cache["default_model_present"] else "not downloaded yet",
        },
    )
    _print_backends(console, "ops in one process", report["one_process"])
    if report["one_process_gpu"] is not None:
        _print_backends(console, "ops in one process, on a GPU", report["one_process_gpu"])
    job = report["job"]
    if job is not None and "error" in job:
        section("ranks", {"they cannot communicate": job["error"]})
    elif job is not None:
        world = len(job["ranks"])
        table = Table(title=f"transport of each pair of {world} ranks", title_justify="left")
        table.add_column("rank", justify="right")
        for rank in range(world):
            table.add_column(str(rank))
        for rank, row in enumerate(job["transports"]):
            table.add_row(str(rank), *row)
        console.print(table)
        right = "right" if job["sums_are_right"] else "WRONG"
        console.print(f"  all together: {job['transport']}; an all-reduce gave {right} sums")
        _print_backends(console, f"ops on {world} ranks", job["backends"])
    section("determinism", report["determinism"])


def _print_backends(console, title: str, backends: dict[str, dict]) -> None:
    from rich.text import Text

    console.print(Text(title, style="bold"))
    for name, found in backends.items():
        console.print(f"  {name}: {found['backend'] or 'nothing can run it'}")
        for backend, reason in found["reasons"].items():
            if backend != found["backend"]:
                console.print(f"    {backend}: {reason}")


def _gigabytes(count: int | None) -> str:
    return "none" if count is None else f"{count / 1e9:.1f} GB"


def _gpu_text(device: dict) -> str:
    return (
        f"{device['name']}, sm_{device['compute_capability'].replace('.', '')}, "
        f"{_gigabytes(device['memory_bytes'])}, {device['multiprocessors']} multiprocessors"
    )


def _link_text(link: dict) -> str:
    if not link["peer_access"]:
        return "no peer access: torch.distributed"
    atomics = link.get("native_atomics")
    return "peer access" + ("" if atomics is None else f", atomics {'yes' if atomics else 'no'}")
