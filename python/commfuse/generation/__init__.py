"""Text generation: prompts in, tokens out, with the statistics of every step."""

from commfuse.generation.engine import Generation, Generator
from commfuse.generation.pipeline import Pipeline
from commfuse.generation.statistics import GenerationStatistics

__all__ = ["Generation", "GenerationStatistics", "Generator", "Pipeline"]
