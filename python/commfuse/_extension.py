"""Loads the compiled extension ``commfuse._C`` once, and keeps the reason where that is impossible.

Importing this module never raises for a missing or unusable extension: ``module`` is then None,
``reason`` says why, and :func:`require` raises that reason where an op needs the extension.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch

from commfuse.errors import BackendUnavailable

_FOLDER = Path(__file__).resolve().parent
_RECORD = "_C.build.json"  # written beside the library by setup.py


def _rebuild_command(folder: Path) -> str:
    """The command that compiles the extension against the torch that is installed."""
    clone = folder.parent.parent
    if (clone / "setup.py").is_file() and (clone / "csrc").is_dir():
        return f"pip install --no-build-isolation --no-deps -e {clone}"
    options = "--no-build-isolation --no-deps --force-reinstall --no-cache-dir"
    return f"pip install {options} PATH (a clone or source archive of commfuse)"


def _refusal(folder: Path, record: dict | None) -> str | None:
    """Why the library in ``folder`` must not be loaded into this process, or None."""
    if not any(folder.glob("_C.*.so")):
        return "it is not built"
    if record is None:
        return f"{_RECORD} is missing or unreadable, so the torch of its build is unknown"
    # Every other build is refused: libtorch's C++ ABI is not stable, and a mismatch shows up as a
    # crash or an undefined symbol, not as a message.
    if record["torch"] != torch.__version__:
        return (
            f"it was built against torch {record['torch']}, and torch {torch.__version__} "
            "is installed"
        )
    return None


def _read_record(folder: Path) -> dict | None:
    """What setup.py wrote about the build; None where there is no such file, or a damaged one."""
    try:
        record = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "torch" in record else None


def _load(folder: Path = _FOLDER) -> tuple[ModuleType | None, str | None, dict | None]:
    """The extension, or why there is none, and the record of its build."""
    record = _read_record(folder)
    refusal = _refusal(folder, record)
    if refusal is None:
        try:
            return importlib.import_module("commfuse._C"), None, record
        except ImportError as error:
            refusal = f"it does not load ({error})"
    command = _rebuild_command(folder)
    return None, f"the extension commfuse._C is unusable: {refusal}; build it: {command}", record


module, reason, build_record = _load()


def require() -> ModuleType:
    """The extension module.

    Raises:
        BackendUnavailable: it is missing or unusable; the message says why and how to build it.

    Example:
        >>> from commfuse import _extension
        >>> _extension.require().__name__
        'commfuse._C'
    """
    if module is None:
        raise BackendUnavailable(reason)
    return module


def why_no_cuda() -> str | None:
    """Why this installation has no CUDA kernels, or None if it has."""
    if module is None:
        return reason
    if not build_record["cuda"]:
        return f"the extension was built without CUDA: {build_record['no_cuda']}"
    return None


def summary() -> str:
    """One line: what was built, against what, and what was left out and why."""
    if module is None:
        return reason
    if build_record["cuda"]:
        scope = f"CPU and CUDA {build_record['cuda']}"
    else:
        scope = f"CPU only ({build_record['no_cuda']})"
    return (
        f"commfuse._C: {scope}, built against torch {build_record['torch']} "
        f"by {build_record['compiler']}"
    )


if __name__ == "__main__":
    print(summary())
