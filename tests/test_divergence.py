"""KL between the models in both directions, and the losses made of it: values and gradients against float64 truth."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import optsample_triton as ost
from bench.speed.timing import peak_extra_bytes
from tests import cases
from tests.tolerances import assert_within

NAMES = [
    "random std 1",
    "random std 8",
    "zipf, std 2",
    "near-delta 0.99, uniform",
    "same top 0.999",
    "nearly disjoint, gap 30",
    "identical",
    "nearly identical 1e-3",
    "masked, theta",
    "masked, t",
    "masked, both",
    "banned by -1e9, theta",
    "one common token",
    "disjoint",
    "huge 1e4",
    "V=1",
    "V=17",
    "every status",
    "empty batch",
]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LOSSES = {"forward": 0.0, "reverse": 1.0, "js": 0.3}
INF = math.inf


def log_softmax(x):
    """NaN for a row that no model should have."""
    bad = x.isnan().any(-1) | (x == INF).any(-1) | x.isneginf().all(-1)
    return torch.where(bad[..., None], torch.nan, x.log_softmax(-1)), bad


def kl(log_r, log_p):
    """KL(r || p) by its definition: 0 log 0 = 0, infinite where r allows what p bans."""
    banned = log_r.isneginf()
    difference = torch.where(banned | log_p.isneginf(), 0.0, log_r) - torch.where(banned | log_p.isneginf(), 0.0, log_p)
    value = (log_r.exp() * difference).sum(-1)
    return torch.where((log_p.isneginf() & ~banned).any(-1), INF, value)


def truth(a, b, beta, inverse=1.0):
    """float64, differentiable where it is finite."""
    (theta, bad_theta), (t, bad_t) = (log_softmax(x.double() * inverse) for x in (a, b))
    if beta == 0.0:
        value = kl(t, theta)
    elif beta == 1.0:
        value = kl(theta, t)
    else:
        banned = t.isneginf() & theta.isneginf()
        mixed = torch.logaddexp(t.masked_fill(banned, 0.0) + math.log(beta), theta + math.log(1 - beta))
        mixed = mixed.masked_fill(banned, -INF)
        value = beta * kl(t, mixed) + (1 - beta) * kl(theta, mixed)
    return torch.where(bad_theta | bad_t, torch.nan, value)


def rows(name, device, dtype=torch.float32):
    return cases.by_name(name).logits(dtype, device)


@pytest.mark.parametrize("name", NAMES)
def test_both_directions_against_truth(name, backend, device):
    a, b = rows(name, device)
    forward, reverse = ost.kl_t_theta(a, b), ost.kl_theta_t(a, b)
    assert forward.dtype == torch.float32
    assert_within(forward, truth(a.cpu(), b.cpu(), 0.0), "kl")
    assert_within(reverse, truth(a.cpu(), b.cpu(), 1.0), "kl")
    assert_within(ost.kl_t_theta(b, a), reverse.double().cpu(), "kl")


@pytest.mark.parametrize("name", ["random std 1", "masked, theta", "banned by -1e9, theta", "every status"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(name, dtype, backend, device):
    a, b = rows(name, device, dtype)
    for kind, beta in LOSSES.items():
        found = ost.distillation_loss(a, b, kind=kind, beta=0.3, reduction="none")
        assert found.dtype == torch.float32
        assert_within(found, truth(a.cpu(), b.cpu(), beta), "kl")


def finite_rows(name, device):
    """Rows without NaN, whose gradients float64 has too."""
    a, b = rows(name, device)
    good = [~log_softmax(x.cpu())[1] for x in (a, b)]
    return a[good[0] & good[1]], b[good[0] & good[1]]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", ["random std 8", "same top 0.999", "nearly identical 1e-3", "masked, theta", "V=17"])
def test_gradients_of_divergences(name, kind, backend, device):
    """Of both models, with a temperature; an infinite row has none."""
    a, b = finite_rows(name, device)
    inputs = [x.clone().requires_grad_() for x in (a, b)]
    weights = torch.linspace(0.25, 1.0, a.shape[0], device=a.device)
    found = ost.distillation_loss(*inputs, kind=kind, beta=0.3, temperature=0.7, reduction="none")
    finite = found.isfinite()
    grads = torch.autograd.grad((found * weights).sum(), inputs)
    exact = [x.cpu().double().requires_grad_() for x in (a, b)]
    loss = truth(*exact, LOSSES[kind], 1 / 0.7)
    assert torch.equal(loss.isfinite(), finite.cpu())
    expected = torch.autograd.grad((loss[finite.cpu()] * weights.cpu().double()[finite.cpu()]).sum(), exact)
    for grad, true in zip(grads, expected, strict=True):
        assert_within(grad, true.nan_to_num(), "gradient")


def test_an_infinite_divergence_says_so(backend, device):
    """The student bans what the teacher likes; the other direction and the Jensen-Shannon divergence are finite."""
    a = torch.tensor([[0.0, -INF, 1.0], [0.0, -INF, 1.0], [0.0, 1.0, 2.0]], device=device, requires_grad=True)
    b = torch.tensor([[1.0, 0.5, -1.0], [1.0, -INF, -1.0], [2.0, 1.0, 0.0]], device=device)
    assert ost.kl_t_theta(a, b).isinf().tolist() == [True, False, False]
    assert ost.kl_theta_t(a, b).isfinite().all()
    losses = ost.distillation_loss(a, b, reduction="none")
    assert ost.distillation_loss(a, b).item() == INF
    assert ost.distillation_loss(a, b, kind="js").isfinite()
    (grad,) = torch.autograd.grad(losses.sum(), a)
    assert grad[0].tolist() == [0.0] * 3
    assert grad.isfinite().all()
    assert bool((grad[1:, 0] != 0.0).all())


def test_a_hair_of_support_beyond_the_floats(backend, device):
    """The teacher's mass on a token underflows; if the student bans it, the divergence is infinite all the same."""
    a = torch.tensor([[0.0, -INF]], device=device)
    b = torch.tensor([[0.0, -500.0]], device=device)
    assert ost.kl_t_theta(a, b).item() == INF
    assert ost.kl_theta_t(a, b).item() == 0.0
    assert ost.kl_theta_t(a, torch.tensor([[0.0, -3e38]], device=device)).item() == 0.0


def test_small_divergences_keep_their_digits(backend, device):
    """Of nearly equal rows: (b - a)^2 / 2 on average, where differences of entropies leave noise."""
    g = torch.Generator().manual_seed(0)
    a = 3 * torch.randn(4, 1000, generator=g)
    b = a + 1e-3 * torch.randn(4, 1000, generator=g)
    found = ost.kl_t_theta(a.to(device), b.to(device)).double().cpu()
    torch.testing.assert_close(found, truth(a, b, 0.0), rtol=2e-3, atol=0.0)


def test_temperatures_and_padded_vocabularies(backend, device):
    a, b = rows("random std 1", device)
    warm = torch.linspace(0.5, 2.0, a.shape[0], device=a.device)
    expected = truth(a.cpu()[:, :20] / warm.cpu().double()[:, None], b.cpu()[:, :20] / 0.8, 0.0)
    assert_within(ost.kl_t_theta(a, b, temperature_theta=warm, temperature_t=0.8, vocab_size=20), expected, "kl")


@pytest.mark.parametrize("view", ["sequence", "expanded", "transposed", "one row"])
def test_layouts(view, backend, device):
    a, b = (torch.randn(3, 5, 40, device=device, generator=None) for _ in range(2))
    views = {
        "sequence": (a[:, :-1], b[:, 1:]),
        "expanded": (a[:, :1].expand(-1, 4, -1), b[:, :4]),
        "transposed": (a.transpose(0, 1), b.transpose(0, 1).contiguous()),
        "one row": (a[0, 0], b[0, 0]),
    }
    theta, t = views[view]
    found = ost.kl_theta_t(theta, t)
    assert found.shape == theta.shape[:-1]
    assert_within(found, truth(theta.cpu(), t.cpu(), 1.0), "kl")
    student = theta.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(ost.distillation_loss(student, t), student)
    leaf = theta.detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(ost.distillation_loss(leaf, t), leaf)[0], expected)


def test_masks_and_reductions(backend, device):
    a, b = rows("random std 1", device)
    a[1], b[2] = torch.nan, -INF
    mask = torch.ones(a.shape[0], dtype=torch.int64, device=a.device)
    mask[1:3] = 0
    student = a.clone().requires_grad_()
    each = ost.distillation_loss(student, b, mask=mask, reduction="none")
    assert each[1:3].tolist() == [0.0, 0.0]
    mean, total = (ost.distillation_loss(student, b, mask=mask, reduction=r) for r in ("mean", "sum"))
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(mean, each.sum() / mask.sum())
    (grad,) = torch.autograd.grad(mean, student)
    assert grad.isfinite().all()
    assert not grad[1:3].any()
    assert ost.distillation_loss(student, b, mask=torch.zeros_like(mask)).item() == 0.0


def test_gradcheck_and_opcheck():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 3, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    warm = torch.tensor([0.7, 1.0, 2.0], dtype=torch.float64)
    inputs = a.detach(), b, None, warm, 0.3
    torch.library.opcheck(torch.ops.optsample.divergence.default, inputs, test_utils=CHECKS)
    for kind, beta in LOSSES.items():
        assert_within(
            ost.distillation_loss(a[0], b[0], kind=kind, beta=0.3, reduction="none"), truth(a[0], b[0], beta), "kl"
        )
        assert gradcheck(lambda x, y, beta=beta: torch.ops.optsample.divergence(x, y, None, warm, beta)[0], (a, b))
    (first,) = torch.autograd.grad(ost.kl_t_theta(a, b).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(first.sum(), a)


def test_compiles_as_one_graph():
    a, b = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).unbind(0)

    def loss(x, y):
        return ost.distillation_loss(x, y, kind="js", mask=torch.ones(3), temperature=0.7)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        student = a.clone().requires_grad_()
        value = function(student, b)
        value.backward()
        results.append((value.detach(), student.grad))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_memory_grows_by_the_gradient_alone():
    """More rows cost one gradient of theirs, in their own dtype; the blocks in float32 stay as they are."""

    def peak(count):
        student, teacher = torch.zeros(2, count, 8192).bfloat16().unbind(0)
        student = student.clone().requires_grad_()
        return peak_extra_bytes(lambda: ost.distillation_loss(student, teacher).backward(), student.device)

    assert peak(128) - peak(64) < 1.1 * 64 * 8192 * 2


def test_wrong_arguments_are_one_sentence():
    a, b = torch.randn(2, 3, 8).unbind(0)
    for options, message in (
        ({"kind": "backward"}, "kind must be one of forward, reverse, js"),
        ({"kind": "js", "beta": 1.0}, "beta must lie between 0 and 1"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"mask": torch.ones(4)}, "mask must have the shape of the rows"),
        ({"temperature": 0.0}, "temperature_theta must lie between"),
        ({"vocab_size": 9}, "vocab_size must be between 1 and the rows' length 8"),
    ):
        with pytest.raises(ValueError, match=message):
            ost.distillation_loss(a, b, **options)
    with pytest.raises(ValueError, match="logits_t has a vocabulary of 7"):
        ost.kl_t_theta(a, b[:, :7])
