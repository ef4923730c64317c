"""A whole run of the pipeline on two tiny models, for `optsample doctor`: generate, then analyze."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from optsample_triton.pipeline.job import Job
from optsample_triton.pipeline.run import generate


def try_installed() -> str:
    """Write two samples and their report; what was tried, or an error."""
    from optsample_triton.integrations.trials import tiny
    from optsample_triton.pipeline.analysis import analyze

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dataset = folder / "prompts.jsonl"
        dataset.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a b", "c")), encoding="utf-8")
        job = Job(
            model_theta=tiny.save(folder / "policy", seed=0),
            model_t=tiny.save(folder / "target", seed=1),
            dataset=str(dataset),
            output=str(folder / "data" / "out.jsonl"),
            max_new_tokens=4,
            device="cpu",
            save_diagnostics=True,
        )
        done = generate(job)
        report = analyze(job.path("diagnostics"), folder / "analysis")
        if (done.samples, report.tally.samples) != (2, 2):
            raise ValueError(f"2 samples were asked for, {done.samples} written and {report.tally.samples} read")
    return "generate and analyze"


if __name__ == "__main__":
    print(try_installed())
