"""Fails, and says why, where this Python cannot serve ``make gpu-test`` and ``make gpu-bench``.

``python tools/check_gpu.py``
"""

import importlib.util
import shutil
import sys

NEEDED = ("torch", "triton", "numpy", "pytest", "typer", "rich", "tokenizers", "jinja2")


def obstacle() -> str | None:
    """What is missing, or None."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}; choose another: GPU_PYTHON=..."
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} of {sys.executable} is not a CUDA build"
    if not torch.cuda.device_count():
        return f"torch {torch.__version__} of {sys.executable} finds no GPU here"
    tools = [name for name in ("nvcc", "ninja") if shutil.which(name) is None]
    return f"{' and '.join(tools)} not found on PATH" if tools else None


if __name__ == "__main__":
    problem = obstacle()
    sys.exit(f"gpu: {problem}" if problem else 0)
