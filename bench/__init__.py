"""Benchmarks: one runner for all ops, and one for the generation of text. See ``README.md``.

Installed as ``commfuse.bench``; run by ``commfuse bench``.
"""
