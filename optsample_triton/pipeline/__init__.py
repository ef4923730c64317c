"""From two models and a dataset to training data with exact weights, and a report that tells whether to trust them.

``generate`` writes one chat line per sample and, on request, its diagnostics; ``analyze`` reads the diagnostics and
writes a report. Both are what ``optsample generate`` and ``optsample analyze`` call. Importing this needs nothing but
the package itself; generating needs the extra ``pipeline``.
"""

from optsample_triton.pipeline.job import Job, PipelineError
from optsample_triton.pipeline.run import Summary, generate

__all__ = ["Job", "PipelineError", "Summary", "analyze", "generate"]


def __getattr__(name: str) -> object:
    if name == "analyze":  # draws figures, which generating does not need
        from optsample_triton.pipeline.analysis import analyze

        return analyze
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
