"""distillation_loss against the loss of TRL's GKD trainer: values and the student's gradient."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # read when TRL's experimental part is imported

import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from optsample_triton.is_reshape import distillation_loss

pytestmark = pytest.mark.filterwarnings("default")  # TRL's own


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("js", 0.1), ("js", 0.5), ("js", 0.9), ("reverse", 1.0)])
def test_the_same_as_gkd(kind: str, beta: float, temperature: float) -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 2, 7, 50, generator=g)
    labels = torch.randint(50, (2, 7), generator=g)
    labels[0, :3] = -100
    results = []
    for loss_of in (
        lambda x: GKDTrainer.generalized_jsd_loss(x, teacher, labels, beta=beta, temperature=temperature),
        lambda x: distillation_loss(
            x,
            teacher,
            kind=kind,
            temperature=temperature,
            mask=labels != -100,
            **({"beta": beta} if kind == "js" else {}),
        ),
    ):
        logits = student.clone().requires_grad_()
        loss = loss_of(logits)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    (theirs, their_grad), (ours, our_grad) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-7)
