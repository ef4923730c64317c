"""A few tokens from an engine with the logits processor."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from optsample_triton.integrations.trials import tiny
from optsample_triton.integrations.vllm import read_records

TOKENS = 4


def try_installed() -> str:
    """Start an engine on two tiny models, draw from q* and read what was recorded; what was tried, or an error."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        records = folder / "records.jsonl"
        settings = {"target": tiny.save(folder / "target", seed=1), "records": str(records), "log_interval": 0}
        engine: Any = LLM(
            tiny.save(folder / "policy", seed=0),
            logits_processors=["optsample_triton.integrations.vllm:OptimalSampling"],
            additional_config={"optsample": settings},
            dtype="float32",
            max_model_len=64,
            max_num_seqs=2,
            enforce_eager=True,
        )
        asked = SamplingParams(max_tokens=TOKENS, ignore_eos=True, extra_args={"optsample": True})
        engine.generate([{"prompt_token_ids": [4, 5, 6]}], asked, use_tqdm=False)
        engine.llm_engine.step()  # the last step, which writes what is finished
        found = list(read_records(str(records)))
        engine.llm_engine.engine_core.shutdown()
    if len(found) != 1 or len(found[0]["alpha"]) != TOKENS:
        raise ValueError(f"one request of {TOKENS} tokens was recorded as {found}")
    return "an engine with the logits processor, and its records"


if __name__ == "__main__":
    print(try_installed())
