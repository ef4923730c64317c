"""An engine in processes of its own: python in_processes.py MODELS RECORDS RANKS OUTPUT writes what it generated."""

import json
import sys
from pathlib import Path

from engines import greedy, some_prompts
from vllm import LLM

from optsample_triton.integrations.vllm import read_records

EXTRAS = [{"optsample": True}, None, {"optsample_alpha": 0.3}, {"optsample": True, "optsample_target_prompt": "look "}]
PROMPTS = some_prompts([5, 9, 33, 40, 17, 8, 20, 3], seed=11)
TOKENS = 12


def main(folder: str, path: str, ranks: str, output: str) -> None:
    llm = LLM(
        f"{folder}/policy",
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        seed=0,
        max_num_batched_tokens=64,
        tensor_parallel_size=int(ranks),
        max_num_seqs=3,
        logits_processors=["optsample_triton.integrations.vllm:OptimalSampling"],
        additional_config={"optsample": {"target": f"{folder}/target", "records": path}},
    )
    params = [greedy(TOKENS, {**(EXTRAS[k % 4] or {"optsample": False}), "optsample_id": k}) for k in range(8)]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    made = [list(output.outputs[0].token_ids) for output in outputs]
    records = read_records(path, expected={k: TOKENS for k in range(8) if EXTRAS[k % 4]}, timeout=60)
    Path(output).write_text(json.dumps({"made": made, "records": records}))


if __name__ == "__main__":
    main(*sys.argv[1:])
