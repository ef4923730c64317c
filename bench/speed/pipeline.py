"""`python -m bench.pipeline`: samples per second of optsample generate, against a loop over the reference.

Both draw from the same two random models with KV caches, in the same batches and as many tokens; the loop computes
q* with the documents' function. Needs the extra `pipeline`, so it is not among the cases of `make bench`.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.paths import RESULTS, ROOT
from optsample_triton.pipeline import Job, generate
from reference import OptimalSamplingDistribution, truth

from . import results

FILE = RESULTS / "pipeline.csv"
BATCH, TOKENS, PROMPT, LAYERS, WIDTH = 8, 16, 12, 2, 64


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.pipeline", description=__doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[50_257], metavar="V")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="in each of three repetitions")
    parser.add_argument("--save", action="store_true", help=f"write the rows to {FILE.relative_to(ROOT)}")
    arguments = parser.parse_args(argv)
    rows = []
    for vocab in arguments.vocab:
        rows.append(measure(vocab, arguments.samples))
        row = rows[-1]
        print(
            f"V={vocab:,}, batches of {BATCH}, {TOKENS} tokens: package {row['package_samples_per_s']} samples/s, "
            f"without diagnostics {row['plain_samples_per_s']}, the loop {row['reference_samples_per_s']}",
            flush=True,
        )
    if arguments.save:
        with FILE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


def measure(vocab: int, samples: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = _prepare(folder, vocab, samples)
        _check(folder, models, vocab)
        works: dict[str, Callable[[int], None]] = {
            "package": lambda k: _package(folder, f"a{k}", diagnostics=True),
            "plain": lambda k: _package(folder, f"b{k}", diagnostics=False),
            "reference": lambda k: _loop(models, vocab, samples),
        }
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for repetition in range(3):  # in turns, since other work on the machine comes and goes
            for name, work in works.items():
                begun = time.perf_counter()
                work(repetition)
                seconds[name].append(time.perf_counter() - begun)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {f"{name}_samples_per_s": f"{samples / statistics.median(s):.4g}" for name, s in seconds.items()}
    return {
        "vocab": vocab,
        "batch": BATCH,
        "tokens": TOKENS,
        "layers": LAYERS,
        "width": WIDTH,
        "samples": samples,
        **rates,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": results.current_commit(),
    }


def _prepare(folder: Path, vocab: int, samples: int) -> list[Any]:
    """Two random models and as many prompts as samples; the tokeniser knows the words w0, w1, ..."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{k}": k for k in range(vocab)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", unk_token="w0")
    pair = []
    for seed, name in enumerate(("policy", "target")):
        transformers.set_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            initializer_range=0.1,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = transformers.LlamaForCausalLM(config).eval()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        pair.append(model.to("cuda" if torch.cuda.is_available() else "cpu"))
    prompts = (" ".join(f"w{1 + (31 * k + j) % (vocab - 1)}" for j in range(PROMPT)) for k in range(samples))
    (folder / "prompts.txt").write_text("\n".join(prompts))
    return pair


def _package(folder: Path, name: str, *, diagnostics: bool) -> None:
    """The whole command: models loaded, files written and flushed to disk."""
    generate(
        Job(
            model_theta=str(folder / "policy"),
            model_t=str(folder / "target"),
            dataset=str(folder / "prompts.txt"),
            output=str(folder / name / "out.jsonl"),
            batch_size=BATCH,
            max_new_tokens=TOKENS,
            save_diagnostics=diagnostics,
        )
    )


@torch.no_grad()
def _loop(models: list[Any], vocab: int, samples: int) -> None:
    """What one would write with the documents' function: no files, no diagnostics."""
    optimal = OptimalSamplingDistribution()
    # transformers 5.24 calls a model's cache another name.
    names = ["cache" if "cache" in inspect.signature(m.forward).parameters else "past_key_values" for m in models]
    for begin in range(0, samples, BATCH):
        rows = torch.arange(begin, min(begin + BATCH, samples))[:, None]
        ids = (1 + (31 * rows + torch.arange(PROMPT)) % (vocab - 1)).to(models[0].device)
        caches: list[Any] = [None, None]
        for _ in range(TOKENS):
            laws = []
            for k, model in enumerate(models):
                out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{names[k]: caches[k]})
                caches[k] = out[names[k]]
                laws.append(out.logits[:, -1].float().softmax(-1))
            q_star, alpha, _ = optimal(*laws)
            ids = torch.multinomial(q_star, 1)
            _ = [law.gather(-1, ids).log() for law in (*laws, q_star)], alpha


@torch.no_grad()
def _check(folder: Path, models: list[Any], vocab: int) -> None:
    """alpha of the first sample's tokens against float64 truth, before anything is timed."""
    _package(folder, "checked", diagnostics=True)
    record = json.loads((folder / "checked" / "out.diagnostics.jsonl").read_text().splitlines()[0])
    prompt = [1 + j % (vocab - 1) for j in range(PROMPT)]
    ids = torch.tensor([prompt + record["tokens"]], device=models[0].device)
    theta, t = (model(ids).logits[0, PROMPT - 1 : -1].cpu() for model in models)
    error = (truth.solve(theta, t).alpha - torch.tensor(record["alpha"])).abs().max()
    if not error <= 2e-4:
        raise SystemExit(f"bench.pipeline: alpha is off by {float(error):.2g}, nothing was timed.")
