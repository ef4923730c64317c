"""The README's loop: sample from between two models, reward, step. The policy learns what is rewarded."""

import math
import re
from pathlib import Path

import torch

import optsample_triton as ost

README = Path(__file__).resolve().parents[1] / "README.md"


def divergence(namespace):
    """KL(policy||target), the mean over the prompts."""
    with torch.no_grad():
        log_p, log_q = (namespace[name](namespace["prompts"]).log_softmax(-1) for name in ("policy", "target"))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def test_the_loop_of_the_readme():
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if "is_reshape_loss" in block)
    lines = block.splitlines()
    assert len(lines) == 10
    torch.manual_seed(0)
    namespace = {"torch": torch, "ost": ost}
    exec("\n".join(lines[:2]), namespace)
    before = divergence(namespace)
    exec("\n".join(lines[2:]), namespace)
    assert before > 2.0
    assert divergence(namespace) < 0.1
    assert all(math.isfinite(value.item()) for value in namespace["metrics"].values())
