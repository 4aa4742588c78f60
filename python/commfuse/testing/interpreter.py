"""Triton's interpreter, quicker: its time is most of what the tests of Triton kernels take."""

from __future__ import annotations

import functools
from types import SimpleNamespace


def patch_language_once() -> None:
    """Has the interpreter replace the functions of ``triton.language`` once for each function.

    It does so at every launch, and again in every call of a device function, by going through all
    names of the language: up to half of its time. At the end of a launch it puts the originals
    back; here they stay away, which a process that only interprets does not notice.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def patched(function) -> SimpleNamespace:
        patch(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patched
