"""q* in transformers: generation with two models, speculative or not, a logits processor, and scores of given text.

``generate`` is a function and a ``custom_generate`` at once. It is exact and fast: it draws with the fused sampler and
returns every token's log-probabilities. ``OptimalSamplingLogitsProcessor`` works in all other modes of
``model.generate``. ``score`` gives alpha, q* and diagnostics of existing sequences. Needs transformers 4.57 or newer.
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "optsample_triton.integrations.huggingface needs transformers: in a clone of this project, pip install '.[hf]'"
    ) from error

from optsample_triton.integrations.huggingface.generation import generate
from optsample_triton.integrations.huggingface.processor import OptimalSamplingLogitsProcessor
from optsample_triton.integrations.huggingface.rows import OptimalGeneration
from optsample_triton.integrations.huggingface.scoring import SequenceScores, score, score_chunks

__all__ = [
    "OptimalGeneration",
    "OptimalSamplingLogitsProcessor",
    "SequenceScores",
    "generate",
    "score",
    "score_chunks",
]
