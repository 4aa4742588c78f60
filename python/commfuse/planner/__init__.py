"""Where the sweet spot of a model on some devices is, and why: ``commfuse plan``."""
