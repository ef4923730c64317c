"""q* inside vLLM: a logits processor that holds the target, mixes both models' logits and keeps records of the tokens.

Pass ``logits_processors=["optsample_triton.integrations.vllm:OptimalSampling"]`` and the target's path in
``additional_config={"optsample": {"target": ...}}`` to ``LLM``. ``OptimalSampling`` documents the rest.
"""

try:
    import vllm  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "optsample_triton.integrations.vllm needs vLLM: in a clone of this project, pip install '.[vllm]'"
    ) from error

from optsample_triton.integrations.vllm.processor import OptimalSampling
from optsample_triton.integrations.vllm.records import read_records
from optsample_triton.integrations.vllm.settings import Settings

__all__ = ["OptimalSampling", "Settings", "read_records"]
