"""Draw texts with the pipeline, then read every token's numbers: those of q*, whichever law the text was drawn from."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from optsample_triton.demo.questions import Question
from optsample_triton.pipeline import dataset, prompts
from optsample_triton.pipeline.encode import Encoder, load_model, load_tokenizer
from optsample_triton.pipeline.engines import device_of
from optsample_triton.pipeline.job import Job, PipelineError, need
from optsample_triton.pipeline.run import generate

LAWS = ("theta", "t", "q_star")
SYMBOLS = {"theta": "π_θ", "t": "π_t", "q_star": "q*"}
SPECULATIVE, DRAFTED = "speculative", 4
TIGHT, LOOSE = 1e-6, 1e-4  # tolerances of alpha: that of solve, and that of sample
BATCH, CHUNK = 16, 8


class Settings(NamedTuple):
    """What to draw: the options of the command."""

    model: Path
    questions: tuple[Question, ...]
    folder: Path
    samples: int
    max_new_tokens: int
    temperature: float
    seed: int


def counted(number: int, noun: str) -> str:
    """
    >>> counted(1, "text"), counted(4, "text")
    ('1 text', '4 texts')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Token(NamedTuple):
    """One token of a text, and what q* is where it stands. Logarithms are of the token's probability."""

    text: str
    alpha: float
    log_theta: float
    log_t: float
    log_q: float
    sweeps: int

    @property
    def log_w_theta(self) -> float:
        return self.log_theta - self.log_q

    @property
    def log_w_t(self) -> float:
        return self.log_t - self.log_q

    @property
    def preference(self) -> float:
        """log(π_t / π_θ): above 0 the target wanted the token more."""
        return self.log_t - self.log_theta


class Text(NamedTuple):
    """A drawn answer. ``question`` is its number; drafts and overlaps are those that the pipeline recorded.

    All texts of q* have tokens; of the other laws, the first of each question has, since only these are shown.
    """

    law: str
    question: int
    text: str
    tokens: list[Token]
    tested: int
    accepted: int
    overlaps: list[float]  # the probability that a draft of pi_theta is accepted, per token


class Drawn(NamedTuple):
    """All texts by law, and the sweeps that the tokens of q* take at the loose tolerance."""

    texts: dict[str, list[Text]]
    sweeps_loose: list[int]

    def of(self, law: str, question: int) -> list[Text]:
        return [text for text in self.texts[law] if text.question == question]


def jobs(settings: Settings) -> dict[str, Job]:
    """One run of ``optsample generate`` per law, and one that drafts speculatively; q* is the same in both."""
    laws: dict[str, dict[str, Any]] = {
        "theta": {"alpha_method": "fixed", "alpha": 1.0},
        "t": {"alpha_method": "fixed", "alpha": 0.0},
        "q_star": {},
        SPECULATIVE: {"speculative": DRAFTED},
    }
    return {name: _job(settings, name, **law) for name, law in laws.items()}


def _job(settings: Settings, name: str, **law: Any) -> Job:
    return Job(
        model_theta=str(settings.model),
        target_system_prompt="{hint}",
        hint_column="hint",
        answer_column="answer",
        dataset=str(settings.folder / "data" / "questions.jsonl"),
        output=str(settings.folder / "data" / f"{name}.jsonl"),
        samples_per_prompt=settings.samples,
        max_new_tokens=settings.max_new_tokens,
        temperature_theta=settings.temperature,
        temperature_t=settings.temperature,
        dtype="float32",
        batch_size=BATCH,
        save_diagnostics=True,
        overwrite=True,
        seed=settings.seed,
        **law,
    )


def draw(settings: Settings, say: Any) -> Drawn:
    """Write data/*.jsonl, read it again and score the texts. ``say`` gets a sentence before each part."""
    write_questions(settings)
    made = jobs(settings)
    if not load_tokenizer(str(settings.model), None, made["q_star"]).chat_template:
        raise PipelineError(f"model {settings.model} must have a chat template, but has none")
    count = counted(len(settings.questions) * settings.samples, "text")
    for name, job in made.items():
        how = f"{SYMBOLS['q_star']}, {DRAFTED} drafts at a time" if name == SPECULATIVE else SYMBOLS[name]
        say(f"drawing {count} from {how}")
        if generate(job).rejected:
            raise PipelineError(_first_rejected(job))
    say(f"reading {SYMBOLS['q_star']} at every token of the texts")
    reader = Reader(made["q_star"])
    records = {name: list(read(job)) for name, job in made.items()}
    shown = {name: [record for record in records[name] if record["repeat"] == 0] for name in ("theta", "t")}
    shown["q_star"] = records["q_star"]
    texts = {name: [reader.text(name, record) for record in of_law] for name, of_law in records.items()}
    for name, some in shown.items():
        for record, columns in zip(some, reader.score(some, TIGHT), strict=True):
            texts[name][record["line"]] = reader.text(name, record, columns)
    loose = reader.score(records["q_star"], LOOSE)
    return Drawn(texts, [count for columns in loose for count in columns["sweeps"]])


def write_questions(settings: Settings) -> None:
    path = settings.folder / "data" / "questions.jsonl"
    lines = ({"prompt": each.text, "hint": each.hint, "answer": each.answer} for each in settings.questions)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise PipelineError(f"output-dir {settings.folder} cannot be written: {error.strerror or error}") from error


def _first_rejected(job: Job) -> str:
    with job.path("rejected").open(encoding="utf-8") as file:
        line = json.loads(file.readline())
    return f"question {line['row'] + 1} gave no text: {line['message']}"


def read(job: Job) -> Iterator[dict[str, Any]]:
    """The lines of the diagnostics, each with its chat line's messages."""
    with job.path("chat").open(encoding="utf-8") as chat, job.path("diagnostics").open(encoding="utf-8") as numbers:
        for line, record in zip(chat, numbers, strict=True):
            yield json.loads(record) | json.loads(line)


class Reader:
    """Scores texts under both models with ``integrations.huggingface.score_chunks``."""

    def __init__(self, job: Job):
        self.job, self.encoder = job, Encoder(job)
        self.tokenizer = self.encoder.tokenizer
        self.score_chunks = need("optsample_triton.integrations.huggingface", "demo").score_chunks
        self.model = load_model(job.model_theta, None, job, device_of(job.device))

    def score(self, records: list[dict[str, Any]], tol: float) -> list[dict[str, list[Any]]]:
        """Of each record's tokens: alpha, the three log-probabilities and the sweeps that alpha took."""
        torch = need("torch")
        longest = max(len(record["tokens"]) for record in records)
        pair = zip(*(self.ids(record) for record in records), strict=True)
        (ids, mask), (target_ids, target_mask) = (_padded(torch, list(rows), longest) for rows in pair)
        chunks = self.score_chunks(
            self.model,
            None,
            ids,
            attention_mask=mask,
            target_input_ids=target_ids,
            target_attention_mask=target_mask,
            num_tokens=longest,
            chunk_size=CHUNK,
            tol=tol,
            temperature_theta=self.job.temperature_theta,
            temperature_t=self.job.temperature_t,
        )
        columns: dict[str, list[Any]] = {name: [] for name in ("alpha", "log_theta", "log_t", "log_q", "sweeps")}
        for chunk in _bar(chunks, math.ceil(longest / CHUNK)):
            for name, parts in columns.items():
                parts.append(chunk.diagnostics.sweeps if name == "sweeps" else getattr(chunk, name))
        whole = {name: torch.cat(parts, 1).tolist() for name, parts in columns.items()}
        return [
            {name: rows[k][: len(record["tokens"])] for name, rows in whole.items()} for k, record in enumerate(records)
        ]

    def ids(self, record: dict[str, Any]) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
        """(prompt, answer) of both models."""
        asked = prompts.Prompt(record["messages"][:-1], None, record["hint"])
        encoded = self.encoder.encode(asked)
        if isinstance(encoded, dataset.Reject):  # the pipeline has encoded it before
            raise PipelineError(f"question {asked.messages[-1]['content']!r} cannot be encoded: {encoded.message}")
        ids, target_ids = encoded
        return (ids, record["tokens"]), (target_ids or ids, record["tokens"])

    def text(self, law: str, record: dict[str, Any], columns: dict[str, list[Any]] | None = None) -> Text:
        """A record as a text, with its tokens if their scores are given."""
        pieces = self.pieces(record["tokens"]) if columns else []
        return Text(
            law,
            record["row"],
            record["messages"][-1]["content"],
            [Token(piece, *values) for piece, *values in zip(pieces, *(columns or {}).values(), strict=True)],
            record["num_tested"] or 0,
            record["num_accepted"] or 0,
            record["token_overlap_theta"],
        )

    def pieces(self, tokens: list[int]) -> list[str]:
        """What each token adds to the text. A token that ends inside a character adds nothing yet."""
        ends = {self.tokenizer.eos_token_id}
        found, before = [], ""
        for k, token in enumerate(tokens):
            if token in ends:
                found.append("")
                continue
            after = str(self.tokenizer.decode(tokens[: k + 1]))
            whole = after if not after.endswith("\ufffd") else before
            found.append(whole[len(before) :])
            before = whole
        return found


def _padded(torch: Any, rows: list[tuple[list[int], list[int]]], longest: int) -> tuple[Any, Any]:
    """Prompts padded at the left, answers at the right: the answers begin in one column."""
    widest = max(len(prompt) for prompt, _ in rows)
    ids = torch.zeros(len(rows), widest + longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for k, (prompt, answer) in enumerate(rows):
        here = slice(widest - len(prompt), widest + len(answer))
        ids[k, here], mask[k, here] = torch.tensor(prompt + answer), 1
    return ids, mask


def _bar(chunks: Any, total: int) -> Any:
    if not sys.stderr.isatty():
        return chunks
    return need("tqdm").tqdm(chunks, total=total, unit="chunk", leave=False, dynamic_ncols=True)
