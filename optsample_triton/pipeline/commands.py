"""The verbs generate and analyze: their options, their exit codes, and one sentence where something is wrong."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from optsample_triton.pipeline.job import BACKENDS, DTYPES, Job, PipelineError
from optsample_triton.types import DRAFTS, METHODS

INTERRUPTED = 130


def generate_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Every option is a field of ``Job``; its default stands there."""
    group = parser.add_argument_group("models")
    group.add_argument("--model-theta", metavar="M", required=True, help="pi_theta: a directory or a name of the hub")
    group.add_argument("--model-t", metavar="M", help="pi_t; without it pi_theta itself, with a prompt of its own")
    group.add_argument("--revision-theta", metavar="R", help="branch, tag or commit of --model-theta on the hub")
    group.add_argument("--revision-t", metavar="R", help="the same of --model-t")
    group.add_argument("--dtype", choices=DTYPES, help="of both models (default: what they are stored in)")
    group.add_argument("--device", metavar="D", help="cuda, cuda:1, cpu, ... (default: a GPU where there is one)")
    group.add_argument("--device-t", metavar="D", help="where pi_t goes (default: --device)")
    group.add_argument("--vocab-size", type=int, metavar="V", help="entries that the vocabularies share")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    group.add_argument("--backend", choices=BACKENDS, help="transformers (hf, default) or vLLM")
    group.add_argument("--engine-args", metavar="JSON", help="more for vLLM: '{\"tensor_parallel_size\": 2}'")

    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--dataset", metavar="D", required=True, help="a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a directory "
        "of the datasets library, or a name of the hub",
    )  # fmt: skip
    group.add_argument("--dataset-config", metavar="NAME", help="configuration of a hub dataset, such as main")
    group.add_argument("--split", metavar="NAME", help="split of a hub dataset (default: train)")
    group.add_argument("--prompt-field", metavar="COLUMN", help="the column with the prompt (default: found by names)")
    group.add_argument("--prompt-template", metavar="TEXT", help="the prompt with columns in braces: 'Q: {question}'")
    group.add_argument("--system-prompt", metavar="TEXT", help="for both models, in place of the dataset's")
    group.add_argument("--target-system-prompt", metavar="TEXT", help="for pi_t alone; it is not written to the output")
    group.add_argument("--chat-template", metavar="JINJA", help="a text or a file, in place of the tokenisers' own")
    group.add_argument("--target-chat-template", metavar="JINJA", help="for pi_t alone")
    group.add_argument(
        "--max-prompt-tokens", type=int, metavar="N", help="longer ones are rejected (default: what fits)"
    )

    group = parser.add_argument_group("what is drawn")
    group.add_argument("--alpha-method", choices=METHODS, help="how alpha is chosen (default: kl_symmetry)")
    group.add_argument(
        "--alpha", type=float, metavar="X", help="alpha itself, with --alpha-method fixed; 1 is pi_theta"
    )
    group.add_argument("--temperature-theta", type=float, metavar="T", help="of pi_theta, before the mixture (1)")
    group.add_argument("--temperature-t", type=float, metavar="T", help="of pi_t, before the mixture (1)")
    group.add_argument("--temperature", type=float, metavar="T", help="of q* (1)")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens of q* below P times its peak (0)")
    group.add_argument("--top-k", type=int, metavar="K", help="the K best tokens of q* only")
    group.add_argument("--top-p", type=float, metavar="P", help="the smallest set of tokens of q* with this mass")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="per sample (256)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="a text that ends a sample; may be repeated")
    group.add_argument("--num-samples", type=int, metavar="N", help="in all (default: every row)")
    group.add_argument("--samples-per-prompt", type=int, metavar="N", help="of each prompt, one behind the other (1)")
    group.add_argument("--seed", type=int, metavar="S", help="another seed, other samples (0)")
    group.add_argument("--speculative", type=int, metavar="K", help="draft K tokens at a time; the law stays as it is")
    group.add_argument("--draft", choices=DRAFTS, help="which model drafts (theta)")

    group = parser.add_argument_group("the run")
    group.add_argument("--output", metavar="FILE", required=True, help="chat lines, JSONL; other files lie beside it")
    group.add_argument("--save-diagnostics", action="store_true", help="also write FILE.diagnostics.jsonl")
    group.add_argument("--batch-size", type=int, metavar="N", help="samples that are drawn together (8)")
    group.add_argument("--resume", action="store_true", help="go on with what is there, or begin")
    group.add_argument("--overwrite", action="store_true", help="drop what is there")
    group.add_argument("--log-every", type=float, metavar="SECONDS", help="between lines where there is no bar (30)")
    group.add_argument("--ray", action="store_true", help="spread the batches over a Ray cluster")
    group.add_argument("--address", metavar="A", help="of the cluster (default: one on this machine)")
    group.add_argument("--workers", type=int, metavar="N", help="pairs of models in the cluster (default: one per GPU)")
    group.add_argument("--gpus-per-worker", type=float, metavar="N", help="(default: 1 where the cluster has any)")
    group.add_argument("--cpus-per-worker", type=float, metavar="N", help="CPU slots that each takes (1)")
    return parser


def analyze_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("diagnostics", metavar="FILE", help="what generate --save-diagnostics has written")
    parser.add_argument("--output-dir", metavar="DIR", default="analysis", help="where the report goes (analysis)")
    parser.add_argument("--worst", type=int, metavar="N", default=10, help="how many worst samples to list (10)")
    return parser


def generate(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    arguments = generate_parser(parser).parse_args(_dashes(argv))
    given: dict[str, Any] = {name: value for name, value in vars(arguments).items() if value is not None}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])

    def run() -> str:
        from optsample_triton.pipeline.run import generate

        job = Job(**given)
        done = generate(job)
        if done.rejected and not done.samples:
            raise PipelineError(f"all {done.rejected} rows were rejected, for the reasons in {job.path('rejected')}")
        beside = " and its diagnostics" if job.save_diagnostics else ""
        rejected = f", {done.rejected} rejected: {job.path('rejected')}" if done.rejected else ""
        return f"{done.samples} samples ({done.drawn} of them now) in {job.output}{beside}{rejected}"

    return _report(parser.prog, run, "what is committed is safe, go on with --resume")


def analyze(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    arguments = analyze_parser(parser).parse_args(_dashes(argv))

    def run() -> str:
        from optsample_triton.pipeline.analysis import analyze

        report = analyze(arguments.diagnostics, arguments.output_dir, worst=arguments.worst)
        return f"{report.summary}; see {report.html} or {report.markdown}"

    return _report(parser.prog, run, "nothing was changed")


def _dashes(argv: Sequence[str]) -> list[str]:
    """--model_theta is --model-theta: the documents spell options with underscores."""
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
