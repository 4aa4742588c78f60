"""Kernels that fuse communication into computation, for transformers spread over several devices.

``import commfuse`` is cheap: torch and the compiled extension are loaded when a name that needs
them is first used, so that the package imports (and can say what is missing) without either.

Example:
    >>> import commfuse
    >>> with commfuse.Communicator(torch.distributed.group.WORLD) as comm:
    ...     y = commfuse.ops.all_reduce(x, comm)
"""

from __future__ import annotations

import importlib

# Public name -> (module, attribute of it), or (module, None) for the module itself.
_LAZY = {
    "Channel": ("commfuse.runtime.channel", "Channel"),
    "Communicator": ("commfuse.runtime.communicator", "Communicator"),
    "init_mesh": ("commfuse.runtime.mesh", "init_mesh"),
    "parallelize": ("commfuse.models.parallelize", "parallelize"),
    "explain": ("commfuse.ops", "explain"),
    "errors": ("commfuse.errors", None),
    "nn": ("commfuse.nn", None),
    "ops": ("commfuse.ops", None),
}

__all__ = [*sorted(_LAZY), "__version__"]


def __getattr__(name: str):
    """Imports a public name on first use (PEP 562) and keeps it."""
    if name == "__version__":
        from importlib.metadata import version

        value = version("commfuse")
    elif name in _LAZY:
        module_name, attribute = _LAZY[name]
        module = importlib.import_module(module_name)
        value = module if attribute is None else getattr(module, attribute)
    else:
        raise AttributeError(f"module 'commfuse' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
