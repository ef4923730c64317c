"""The verbs generate and analyze: their options, their exit codes, and one sentence if something is wrong."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from optsample_triton.pipeline.job import BACKENDS, DTYPES, SAFE, Job, PipelineError
from optsample_triton.types import DRAFTS, METHODS

INTERRUPTED = 130


def generate_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options, each a field of ``Job`` with the field's default."""
    group = parser.add_argument_group("models")
    group.add_argument("--model-theta", metavar="M", required=True, help="pi_theta: a directory or a hub name")
    group.add_argument("--model-t", metavar="M", help="pi_t (default: pi_theta with another prompt)")
    group.add_argument("--revision-theta", metavar="R", help="branch, tag or commit of --model-theta on the hub")
    group.add_argument("--revision-t", metavar="R", help="branch, tag or commit of --model-t on the hub")
    group.add_argument("--dtype", choices=DTYPES, help="dtype of both models (default: as stored)")
    group.add_argument("--device", metavar="D", help="cuda, cuda:1, cpu, ... (default: a GPU if there is one)")
    group.add_argument("--device-t", metavar="D", help="device of pi_t (default: --device)")
    group.add_argument("--vocab-size", type=int, metavar="V", help="how many entries the vocabularies share")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    group.add_argument("--backend", choices=BACKENDS, help="transformers (hf, default) or vLLM")
    group.add_argument("--engine-args", metavar="JSON", help="more options for vLLM: '{\"tensor_parallel_size\": 2}'")

    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--dataset",
        metavar="D",
        required=True,
        help="a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a directory of the datasets library, or a hub name",
    )
    group.add_argument("--dataset-config", metavar="NAME", help="configuration of a hub dataset, such as main")
    group.add_argument("--split", metavar="NAME", help="split of a hub dataset (default: train)")
    group.add_argument("--prompt-field", metavar="COLUMN", help="the prompt's column (default: found by its name)")
    group.add_argument("--prompt-template", metavar="TEXT", help="the prompt with columns in braces: 'Q: {question}'")
    group.add_argument("--system-prompt", metavar="TEXT", help="system prompt of both models; replaces the dataset's")
    group.add_argument(
        "--target-system-prompt",
        metavar="TEXT",
        help="system prompt of pi_t only, where {hint} is the row's hint; not in the output",
    )
    group.add_argument("--hint-column", metavar="COLUMN", help="a hint for each row, which only pi_t reads")
    group.add_argument(
        "--hint-template",
        metavar="TEXT",
        help="pi_t's prompt with {hint} and {prompt} (hint, blank line, prompt; the prompt alone if "
        "--target-system-prompt has the hint)",
    )
    group.add_argument("--answer-column", metavar="COLUMN", help="the right answer's column (default: found by name)")
    group.add_argument("--chat-template", metavar="JINJA", help="a text or a file; replaces the tokenisers' templates")
    group.add_argument("--target-chat-template", metavar="JINJA", help="chat template of pi_t only")
    group.add_argument(
        "--max-prompt-tokens", type=int, metavar="N", help="reject longer prompts (default: what the models can read)"
    )

    group = parser.add_argument_group("sampling")
    group.add_argument("--alpha-method", choices=METHODS, help="how alpha is chosen (default: kl_symmetry)")
    group.add_argument("--alpha", type=float, metavar="X", help="alpha for --alpha-method fixed; 1 is pi_theta")
    group.add_argument("--temperature-theta", type=float, metavar="T", help="of pi_theta, before mixing (1)")
    group.add_argument("--temperature-t", type=float, metavar="T", help="of pi_t, before mixing (1)")
    group.add_argument("--temperature", type=float, metavar="T", help="of q* (1)")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the peak of q* (0)")
    group.add_argument("--top-k", type=int, metavar="K", help="keep only the K most likely tokens of q*")
    group.add_argument("--top-p", type=float, metavar="P", help="keep only the smallest set of tokens with this mass")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="limit per sample (256)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="a text that ends a sample; may be repeated")
    group.add_argument("--num-samples", type=int, metavar="N", help="samples in all (default: every row)")
    group.add_argument("--samples-per-prompt", type=int, metavar="N", help="consecutive samples of each prompt (1)")
    group.add_argument("--seed", type=int, metavar="S", help="seed of all samples (0)")
    group.add_argument("--speculative", type=int, metavar="K", help="draft K tokens at a time; q* is unchanged")
    group.add_argument("--draft", choices=DRAFTS, help="which model drafts (theta)")

    group = parser.add_argument_group("run")
    group.add_argument("--output", metavar="FILE", required=True, help="chat lines, JSONL; other files go beside it")
    group.add_argument("--save-diagnostics", action="store_true", help="also write FILE.diagnostics.jsonl")
    group.add_argument("--batch-size", type=int, metavar="N", help="samples that are drawn together (8)")
    group.add_argument("--resume", action="store_true", help="continue an interrupted run, or start one")
    group.add_argument("--overwrite", action="store_true", help="delete the existing output")
    group.add_argument("--log-every", type=float, metavar="SECONDS", help="between log lines if there is no bar (30)")
    group.add_argument("--ray", action="store_true", help="spread the batches over a Ray cluster")
    group.add_argument("--address", metavar="A", help="address of the cluster (default: start one on this machine)")
    group.add_argument("--workers", type=int, metavar="N", help="pairs of models in the cluster (default: one per GPU)")
    group.add_argument(
        "--gpus-per-worker", type=float, metavar="N", help="GPUs per worker (default: 1 if there is any)"
    )
    group.add_argument("--cpus-per-worker", type=float, metavar="N", help="CPU slots per worker (1)")
    return parser


def analyze_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("diagnostics", metavar="FILE", help="the file that generate --save-diagnostics wrote")
    parser.add_argument("--output-dir", metavar="DIR", default="analysis", help="folder of the report (analysis)")
    parser.add_argument("--worst", type=int, metavar="N", default=10, help="how many of the worst samples to list (10)")
    return parser


def generate(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    arguments = generate_parser(parser).parse_args(dashes(argv))
    given: dict[str, Any] = {name: value for name, value in vars(arguments).items() if value is not None}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])

    def run() -> str:
        from optsample_triton.pipeline.run import generate

        job = Job(**given)
        done = generate(job)
        if done.rejected and not done.samples:
            raise PipelineError(f"all {done.rejected} rows were rejected; {job.path('rejected')} has the reasons")
        beside = " and its diagnostics" if job.save_diagnostics else ""
        rejected = f", {done.rejected} rejected: {job.path('rejected')}" if done.rejected else ""
        return f"{done.samples} samples ({done.drawn} of them now) in {job.output}{beside}{rejected}"

    return _report(parser.prog, run, SAFE)


def analyze(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    arguments = analyze_parser(parser).parse_args(dashes(argv))

    def run() -> str:
        from optsample_triton.pipeline.analysis import analyze

        report = analyze(arguments.diagnostics, arguments.output_dir, worst=arguments.worst)
        return f"{report.summary}; see {report.html} or {report.markdown}"

    return _report(parser.prog, run, "nothing was changed")


def dashes(argv: Sequence[str]) -> list[str]:
    """Read --model_theta as --model-theta, since the documents spell options with underscores."""
    spelled = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        spelled.append((name.replace("_", "-") if name.startswith("--") else name) + equals + value)
    return spelled


def _report(prog: str, run: Callable[[], str], after: str) -> int:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("optsample_triton.pipeline")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        print(run())
    except PipelineError as error:
        print(f"{prog}: {str(error).rstrip('.')}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted, {after}.", file=sys.stderr)
        return INTERRUPTED
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return 0
