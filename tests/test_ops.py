"""The custom ops: schema, compilation, gradients, and nothing that waits for the device."""

import pytest
import torch
from torch.autograd import gradcheck

import optsample_triton as ost
from optsample_triton import Status, backend
from reference import truth
from tests import cases
from tests.tolerances import assert_within
from tests.waits import NeverWaits

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
GRADED = [
    "random std 1",
    "random std 8",
    "zipf, std 1",
    "zipf, std 4",
    "sharp against soft",
    "bimodal, unequal",
    "near-delta 0.99, uniform",
    "tops differ 0.9999",
    "same top 0.9999",
    "same top 0.999999",
    "nearly identical 1e-1",
    "nearly identical 1e-3",
    "nearly identical zipf 1e-3",
    "masked, theta",
    "masked, both",
    "V=2",
    "V=17",
    "every status",
]


def rows(shape, device, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype) for _ in range(2)]


def op_arguments(a, b, *, alpha=None, temperatures=(None, None), method="kl_symmetry", detach=False, diagnostics=True):
    return (a, b, alpha, *temperatures, method, "chernoff", 1e-6, 20, -1.0, detach, diagnostics)


# Registration


@pytest.mark.parametrize("variant", ["plain", "alpha", "temperatures", "no log q"])
def test_opcheck_of_solve(variant, setting):
    device, dtype = setting
    a, b = (x.requires_grad_() for x in rows((2, 9), device, dtype))
    options = {
        "plain": {},
        "alpha": {"alpha": torch.tensor([0.2, 1.3], device=device, dtype=dtype, requires_grad=True), "method": "fixed"},
        "temperatures": {"temperatures": (torch.tensor([0.5, 2.0], device=device, dtype=dtype), None)},
        "no log q": {"diagnostics": False},
    }[variant]
    width = 0 if variant == "no log q" else 9
    arguments = (*op_arguments(a, b, **options), width, dtype)
    result = torch.library.opcheck(torch.ops.optsample.solve.default, arguments, test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


def test_opcheck_of_solve_out(setting):
    device, dtype = setting
    a, b = rows((2, 9), device, dtype)
    arguments = (*op_arguments(a, b), torch.empty(2, 9, device=device, dtype=dtype))
    result = torch.library.opcheck(torch.ops.optsample.solve_out.default, arguments, test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("method", ["kl_symmetry", "fixed"])
def test_opcheck_of_solve_backward(method, setting):
    device, dtype = setting
    a, b = rows((2, 9), device, dtype)
    _, alpha, _, status, _, saved, _ = torch.ops.optsample.solve(*op_arguments(a, b), 9, dtype)
    upstream = rows((2, 9), device, dtype, seed=1)[0], alpha.clone(), alpha.clone()
    problem = (a, b, alpha, None, None, method, "chernoff", 1e-6, 20, -1.0)
    arguments = (*problem, status, saved, *upstream)
    result = torch.library.opcheck(torch.ops.optsample.solve_backward.default, arguments, test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


def draw_arguments(a, b, *, seeds=None, inverse=None):
    problem = (a, b, None, None, None, "kl_symmetry", "chernoff", 1e-4, 20, -1.0)
    return (*problem, 7, 3, seeds, None, seeds is None, inverse, inverse)


@pytest.mark.parametrize("variant", ["plain", "seeds", "filtered"])
def test_opcheck_of_sample(variant, setting):
    device, dtype = setting
    a, b = rows((2, 9), device, dtype)
    options = {
        "plain": {},
        "seeds": {"seeds": torch.arange(2, device=device)},
        "filtered": {"inverse": torch.tensor([0.5, 0.9], device=device, dtype=dtype)},
    }[variant]
    arguments = (*draw_arguments(a, b, **options), 3)
    result = torch.library.opcheck(torch.ops.optsample.sample.default, arguments, test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("model", [0, 1])
def test_opcheck_of_verify(model, setting):
    device, dtype = setting
    a, b = rows((6, 9), device, dtype)
    drafts, lengths = torch.tensor([[1, 8], [3, 0]], device=device), torch.tensor([2, 1], device=device)
    arguments = (*draw_arguments(a, b), drafts, lengths, model)
    result = torch.library.opcheck(torch.ops.optsample.verify.default, arguments, test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


# Compilation


def solved(a, b):
    solution = ost.solve(a, b, temperature_t=1.5, diagnostics=True)
    return solution.alpha, solution.status, solution.kl_theta, solution.sweeps


def mixed(a, b):
    return ost.log_q(a, b, temperature_theta=0.7)


def guided(a, b):
    solution = ost.solve(2.0 * a, b.detach(), alpha=1.5)
    return solution.log_z + ost.log_q(a, b, 0.25).logsumexp(-1)


def drawn(a, b):
    return tuple(ost.sample(a, b, seed=7, num_samples=2, temperature=0.9))


def speculated(a, b):
    drafts = ost.sample(a[:, :-1], a[:, :-1], seed=7, alpha=1.0).token
    return tuple(ost.verify(drafts, a, b, seed=8))


@pytest.mark.parametrize("function", [solved, mixed, guided, drawn, speculated], ids=lambda f: f.__name__)
def test_compiled_whole(function, setting):
    device, dtype = setting
    torch._dynamo.reset()
    a, b = rows((2, 3, 9), device, dtype)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), function(a, b), atol=0, rtol=0)


@pytest.mark.parametrize("size", [9, 12])
def test_compiled_with_dynamic_shapes(size, setting):
    device, dtype = setting
    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (2, 3):
        a, b = rows((count, size), device, dtype)
        torch.testing.assert_close(compiled(a, b), mixed(a, b), atol=0, rtol=0)


@pytest.mark.parametrize("backend_of_dynamo", ["eager", "aot_eager"])
def test_compiled_backward(backend_of_dynamo, setting):
    device, dtype = setting
    torch._dynamo.reset()

    def loss(a, b):
        solution = ost.solve(a, b)
        weights = torch.arange(a.shape[-1], device=a.device, dtype=a.dtype)
        return (solution.alpha + solution.log_z).sum() + (ost.log_q(a, b) * weights).sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend_of_dynamo)):
        a, b = (x.requires_grad_() for x in rows((2, 9), device, dtype))
        function(a, b).backward()
        gradients.append((a.grad, b.grad))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)
    assert bool(gradients[0][0].abs().sum() > 0)


# Gradients in float64


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")


def doubles(shape=(2, 7), std=1.0):
    return [(std * x).requires_grad_() for x in rows(shape, "cpu", torch.float64)]


FUNCTIONS = {
    "alpha": lambda a, b, **kw: ost.solve(a, b, **kw).alpha,
    "log_z": lambda a, b, **kw: ost.solve(a, b, **kw).log_z,
    "log_q": lambda a, b, **kw: ost.log_q(a, b, **kw),
}


@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("algorithm", ["chernoff", "bisect"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name, algorithm, std, eager):
    options = {"algorithm": algorithm, "max_iter": 60}
    assert gradcheck(lambda a, b: FUNCTIONS[name](a, b, **options), doubles(std=std))


@pytest.mark.parametrize("std", [0.1, 3.0])
@pytest.mark.parametrize("method", ["ess_balance", "entropy"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_of_other_methods(name, method, std, eager):
    options = {"method": method, "temperature_t": 1.3, "max_iter": 60}
    assert gradcheck(lambda a, b: FUNCTIONS[name](a, b, **options), doubles(std=std))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_of_a_given_alpha(name, eager):
    alpha = torch.tensor([-0.3, 1.4], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda a, b, alpha: FUNCTIONS[name](a, b, alpha=alpha), [*doubles(), alpha])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_with_temperatures(name, eager):
    options = {"temperature_theta": torch.tensor([0.6, 1.7]), "temperature_t": 1.3}
    assert gradcheck(lambda a, b: FUNCTIONS[name](a, b, **options), doubles())


@pytest.mark.parametrize("method", ["kl_symmetry", "ess_balance", "entropy"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_with_masks_and_padding(name, method, eager):
    """Masked entries and padding are constants and have no gradient."""
    mask_theta = torch.tensor([[0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0, 0]]).bool()
    mask_t = torch.tensor([[0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()

    def function(a, b):
        a, b = a.masked_fill(mask_theta, -torch.inf), b.masked_fill(mask_t, -torch.inf)
        value = FUNCTIONS[name](a, b, vocab_size=6, method=method)
        return value[value.isfinite()]

    assert gradcheck(function, doubles())


def test_gradcheck_of_leading_dimensions(eager):
    assert gradcheck(lambda a, b: ost.log_q(a, b), doubles((1, 2, 4)))
    assert gradcheck(lambda a, b: ost.solve(a[:, ::2], b[:, ::2]).alpha, doubles((2, 4, 5)))


def gradients_of(function, a, b):
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    return torch.autograd.grad(function(a, b), [a, b])


def test_a_detached_alpha_is_a_constant(setting):
    device, dtype = setting
    a, b = rows((2, 9), device, dtype)
    weights = rows((2, 9), device, dtype, seed=1)[0]
    alpha = ost.solve(a, b).alpha
    constant = gradients_of(lambda a, b: (ost.log_q(a, b, alpha) * weights).sum(), a, b)
    detached = gradients_of(lambda a, b: (ost.log_q(a, b, detach_alpha=True) * weights).sum(), a, b)
    whole = gradients_of(lambda a, b: (ost.log_q(a, b) * weights).sum(), a, b)
    torch.testing.assert_close(detached, constant, atol=1e-5, rtol=1e-5)
    assert bool((whole[0] - detached[0]).abs().max() > 1e-3)
    stopped = gradients_of(lambda a, b: ost.solve(a, b, detach_alpha=True).alpha.sum(), a, b)
    assert [int(gradient.count_nonzero()) for gradient in stopped] == [0, 0]


@pytest.mark.parametrize(
    "function", [lambda a, b: ost.solve(a, b).alpha, lambda a, b: ost.log_q(a, b)], ids=["alpha", "log_q"]
)
def test_a_gradient_has_none_of_its_own(function, setting):
    device, dtype = setting
    a, b = (x.requires_grad_() for x in rows((2, 9), device, dtype))
    (gradient,) = torch.autograd.grad(function(a, b).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^the gradient of solve and log_q cannot be differentiated again"):
        gradient.sum().backward()


@pytest.mark.parametrize("method", ["ess_balance", "entropy"])
def test_mixtures_of_other_methods(method, setting):
    device, dtype = setting
    a, b = rows((2, 9), device, dtype)
    weights = rows((2, 9), device, dtype, seed=1)[0]
    alpha = ost.solve(a, b, method=method).alpha
    constant = gradients_of(lambda a, b: (ost.log_q(a, b, alpha) * weights).sum(), a, b)
    given = gradients_of(lambda a, b: (ost.log_q(a, b, method=method, detach_alpha=True) * weights).sum(), a, b)
    torch.testing.assert_close(given, constant, atol=1e-5, rtol=1e-5)


# Gradients in float32


@pytest.mark.parametrize("name", [*GRADED, "banned by -1e9, theta", "banned by -3.4e38, t"])
def test_alpha_gradient_against_truth(name, device, interpreted):
    count = 2 if interpreted and name not in ("every status", "nearly identical 1e-3") else None
    a, b = (x[:count] for x in cases.by_name(name).logits(device=device))
    gradients = gradients_of(lambda a, b: ost.solve(a, b).alpha.nan_to_num().sum(), a, b)
    for gradient, expected in zip(gradients, truth.alpha_gradient(a.cpu(), b.cpu()), strict=True):
        assert gradient.dtype == torch.float32
        assert_within(gradient, expected, "gradient", label=name)


@pytest.mark.parametrize("method", ["ess_balance", "entropy"])
@pytest.mark.parametrize("name", GRADED)
def test_alpha_gradient_of_other_methods(name, method, device, interpreted, monkeypatch):
    count = 1 if interpreted and name != "every status" else None
    a, b = (x[:count] for x in cases.by_name(name).logits(device=device))

    def alpha(a, b):
        return ost.solve(a, b, method=method).alpha.nan_to_num().sum()

    gradients = gradients_of(alpha, a, b)
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    expected = gradients_of(alpha, a.cpu().double(), b.cpu().double())
    for gradient, right in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert_within(gradient, right, "gradient", label=name)


OPTIONS = [
    {},
    {"detach_alpha": True},
    {"alpha": 1.5},
    {"temperature_t": 0.6},
    {"method": "ess_balance", "temperature_theta": 1.4},
    {"method": "entropy", "temperature_t": 0.6},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "name", ["random std 3, V=9728", "zipf, std 1", "tops differ 0.99", "same top 0.999", "masked, theta", "V=17"]
)
def test_log_q_gradient_against_float64(name, options, backend, device, monkeypatch):
    a, b = (x[:2] for x in cases.by_name(name).logits(device=device))
    upstream = rows(a.shape, device, seed=3)[0]

    def weighted(a, b):
        log_q = ost.log_q(a, b, **options)
        return (torch.where(log_q.isfinite(), log_q, 0.0) * upstream.to(a)).sum()

    gradients = gradients_of(weighted, a, b)
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    expected = gradients_of(weighted, a.cpu().double(), b.cpu().double())
    for gradient, right in zip(gradients, expected, strict=True):
        assert_within(gradient, right, "gradient", label=name)


@pytest.mark.parametrize("name", ["zipf, std 1", "same top 0.999", "V=17"])
def test_log_z_gradient_against_float64(name, backend, device, monkeypatch):
    a, b = (x[:2] for x in cases.by_name(name).logits(device=device))
    gradients = gradients_of(lambda a, b: ost.solve(a, b).log_z.sum(), a, b)
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    expected = gradients_of(lambda a, b: ost.solve(a, b).log_z.sum(), a.cpu().double(), b.cpu().double())
    for gradient, right in zip(gradients, expected, strict=True):
        assert_within(gradient, right, "gradient", label=name)


@pytest.mark.parametrize("method", ["kl_symmetry", "ess_balance", "entropy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients(dtype, method, backend, device, monkeypatch):
    a, b = (x[:2] for x in cases.by_name("zipf, std 1").logits(dtype, device))
    gradients = gradients_of(lambda a, b: ost.solve(a, b, method=method).alpha.sum(), a, b)
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    wide = a.cpu().double(), b.cpu().double()
    expected = gradients_of(lambda a, b: ost.solve(a, b, method=method).alpha.sum(), *wide)
    if method == "kl_symmetry":
        expected = truth.alpha_gradient(*wide)
    for gradient, right in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        assert_within(gradient, right, "gradient")


WILD = ["every status", "invalid among good rows", "one common token", "huge 3e38"]


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "kl_symmetry") for name in WILD), ("every status", "ess_balance"), ("every status", "entropy")],
)
def test_gradients_are_finite_whatever_the_row(name, method, backend, device):
    a, b = cases.by_name(name).logits(device=device)
    status = ost.solve(a, b, method=method).status.cpu()

    def everything(a, b):
        solution, log_q = ost.solve(a, b, method=method), ost.log_q(a, b, method=method)
        return (solution.alpha + solution.log_z).nansum() + torch.where(log_q.isfinite(), log_q, 0.0).sum()

    for gradient in gradients_of(everything, a, b):
        assert bool(gradient.isfinite().all())
        assert not bool(gradient[status == Status.INVALID].any())
    for gradient in gradients_of(lambda a, b: ost.solve(a, b, method=method).alpha.nansum(), a, b):
        assert bool(gradient.isfinite().all())
        assert not bool(gradient[status != Status.OK].any())


def test_no_gradient_through_an_alpha_that_is_not_solved(backend, device):
    a, b = cases.by_name("bimodal, unequal").logits(device=device)
    assert ost.solve(a, b, max_iter=1).status.tolist() == [Status.NOT_CONVERGED] * 4
    gradients = gradients_of(lambda a, b: ost.solve(a, b, max_iter=1).alpha.sum(), a, b)
    assert [int(gradient.count_nonzero()) for gradient in gradients] == [0, 0]


def test_an_invalid_row_does_not_spoil_its_neighbours_gradient(backend, device):
    a, b = cases.by_name("invalid among good rows").logits(device=device)
    good = [0, 4]
    weights = rows(a.shape, device, seed=3)[0]

    def weighted(a, b, weights):
        return (ost.log_q(a, b) * weights).sum(-1).nansum() + ost.solve(a, b).alpha.nansum()

    among = gradients_of(lambda a, b: weighted(a, b, weights), a, b)
    alone = gradients_of(lambda a, b: weighted(a, b, weights[good]), a[good], b[good])
    for gradient, expected in zip(among, alone, strict=True):
        assert gradient[good].equal(expected)


# No waiting for the device


def everything_once(a, b, alpha):
    """One call of each kind, gradients included."""
    solution = ost.solve(a, b, diagnostics=True)
    ost.solve(a, b, method="ess_balance", algorithm="bisect", max_iter=3).alpha.sum().backward()
    ost.solve(a, b, alpha=alpha, temperature_theta=0.5, temperature_t=alpha.abs() + 1.0)
    log_q = ost.log_q(a, b)
    (solution.alpha.sum() + log_q.sum()).backward()
    with torch.no_grad():
        ost.log_q(a, b, vocab_size=7, out=torch.empty_like(a))
    seed = torch.arange(2, device=a.device)
    ost.sample(a, b, seed=seed, offset=3, num_samples=2)
    ost.sample(a, b, seed=1, alpha=alpha, temperature=0.5, min_p=0.1)
    ost.verify(seed[:, None], a[:, None].expand(2, 2, -1), b[:, None].expand(2, 2, -1), seed=seed, draft_lengths=seed)


def test_nothing_synchronises(monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "triton")
    device = "cpu" if backend.interpreter_on() else "cuda"
    a, b = (x.requires_grad_() for x in rows((2, 9), device))
    alpha = torch.tensor([0.3, 1.2], device=device)
    everything_once(a, b, alpha)  # compiles, on a GPU
    with NeverWaits() as mode:
        everything_once(a, b, alpha)
    assert mode.entered.count("solve") == 4
    assert mode.entered.count("solve_backward") == 3
    assert set(mode.entered) == {"solve", "solve_out", "solve_backward", "sample", "verify"}
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            everything_once(a, b, alpha)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_watch_for_synchronisation_works():
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), lambda: x[x > 0]):
        with pytest.raises(AssertionError, match="waits for the device"), NeverWaits():
            wait()


def test_graph_capture(beside_eager, kernel_device, monkeypatch):
    """A captured solve follows its inputs. On a CPU, two calls in a row must follow new inputs too."""
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "triton")
    device = kernel_device
    a, b = rows((2, 9), device)
    other_a, other_b = rows((2, 9), device, seed=5)
    offset = torch.zeros((), dtype=torch.int64, device=device)
    expected, token = ost.solve(other_a, other_b).alpha, ost.sample(other_a, other_b, seed=7, offset=4).token
    if device == "cuda":
        ost.log_q(a, b)
        ost.sample(a, b, seed=7, offset=offset)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            alpha, log_q = ost.solve(a, b).alpha, ost.log_q(a, b)
            sample = ost.sample(a, b, seed=7, offset=offset)
        a.copy_(other_a)
        b.copy_(other_b)
        offset.fill_(4)
        graph.replay()
    else:
        a.copy_(other_a)
        b.copy_(other_b)
        offset.fill_(4)
        alpha, log_q = ost.solve(a, b).alpha, ost.log_q(a, b)
        sample = ost.sample(a, b, seed=7, offset=offset)
    assert alpha.equal(expected)
    assert sample.token.equal(token)
    assert_within(log_q, truth.log_q(other_a.cpu(), other_b.cpu()), "log_q")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alignment_changes_a_gradient_in_its_last_digits_at_most(dtype, backend, device):
    a, b = (x[:2] for x in cases.by_name("random std 3, V=9728").logits(dtype, device))
    found = []
    for rows in (cases.off_by_1(a, b), cases.aligned(a, b)):
        rows = [x.detach().requires_grad_() for x in rows]
        found.append(torch.autograd.grad(ost.log_q(*rows).float().square().sum(), rows))
    unit = torch.finfo(dtype).eps
    for x, y in zip(*found, strict=True):
        assert torch.allclose(x, y, rtol=4 * unit, atol=4 * unit * float(y.abs().max()))
