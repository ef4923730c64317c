"""From two models and a dataset to training data with exact weights, and a report on how far to trust them.

``generate`` writes one chat line per sample and, on request, its diagnostics. ``analyze`` reads the diagnostics and
writes a report. ``optsample generate`` and ``optsample analyze`` call them. Importing this module needs only the
package itself; generating needs the extra ``pipeline``.
"""

from optsample_triton.pipeline.job import Job, PipelineError
from optsample_triton.pipeline.run import Summary, generate

__all__ = ["Job", "PipelineError", "Summary", "analyze", "generate"]


def __getattr__(name: str) -> object:
    if name == "analyze":  # it loads what draws figures, which generating does not need
        from optsample_triton.pipeline.analysis import analyze

        return analyze
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
