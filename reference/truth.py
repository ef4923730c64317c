"""The float64 truth on logits, built to stay exact where the textbook formulas lose their digits.

Rows a = logits_theta, b = logits_t, d = a - b, S the tokens finite in both rows, q_t the softmax over S of
t a + (1-t) b, L(t) its log-normaliser, A = L(1), B = L(0), psi(t) = L(t) - t A - (1-t) B. KL symmetry is
psi'(alpha) = L'(alpha) - (A - B) = 0. For nearly equal or confident rows, E[d] and A - B agree in almost all
digits, so their difference is noise. Everything here is therefore computed from the gap of log-mean and mean,

    G_x(s) = log E_{q_x}[exp(s delta)] - s E_{q_x}[delta],    delta = d - (A - B),

which is of second order in delta and is summed from second-order terms alone:

    G = R + lam(M),  R = E[h(s delta)],  M = s E[delta] + R,  h(y) = expm1(y) - y,  lam(t) = log1p(t) - t.

It yields every other quantity:

    KL(q_x||pi_theta) = G_x(1-x)               KL(q_x||pi_t) = G_x(-x)
    psi(x)  = -x G_x(1-x) - (1-x) G_x(-x)      psi'(x) = G_x(-x) - G_x(1-x)
    log 1/ESS_theta = G_x(2-2x) - 2 G_x(1-x)   log 1/ESS_t = G_x(-2x) - 2 G_x(-x)

alpha = 1 is pi_theta, alpha = 0 is pi_t. docs/theory.md derives the formulas and the meaning of masked rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reference import localized_kernels, speculative

OK, IDENTICAL, DISJOINT, INVALID = 0, 1, 2, 3
HUGE = 1e8  # logits that a float64 rounds by more than 1e-8
NEAR = 0.4  # if |log E[exp(s delta)]| is below this, the second-order form is more accurate


class TruthSolution(NamedTuple):
    """alpha, log_z = psi(alpha), status (uint8) and the diagnostics, each [...]."""

    alpha: Tensor
    log_z: Tensor
    status: Tensor
    kl_theta: Tensor
    kl_t: Tensor
    ess_theta: Tensor
    ess_t: Tensor
    entropy_theta: Tensor
    entropy_t: Tensor
    entropy_q: Tensor
    overlap_theta: Tensor
    overlap_t: Tensor


class VerifyLaw(NamedTuple):
    """The exact law of chain speculative verification with K drafts.

    num_accepted [K+1]: P(n drafts are accepted).
    stop [K+1, V]: P(n are accepted and the token emitted after them is v).
    reached [K+1]: P(position k emits a token).
    emitted [K+1, V]: the law of the token at position k, given that the position is reached.
    """

    num_accepted: Tensor
    stop: Tensor
    reached: Tensor
    emitted: Tensor


class _Rows(NamedTuple):
    """Rows [N, V] in float64, prepared for the sums over the common support."""

    a: Tensor  # [N, V] logits, -inf off the row's own support
    b: Tensor
    common: Tensor  # [N, V] bool: S
    u: Tensor  # [N, V] a - max over S of a; 0 off S
    v: Tensor
    delta: Tensor  # [N, V] d - (A - B); 0 off S
    shift: Tensor  # [N] A - B after the maxima are taken out: u - v = delta + shift
    peak_theta: Tensor  # [N] the maxima
    peak_t: Tensor
    status: Tensor  # [N] uint8

    def take(self, index: Tensor) -> _Rows:
        return _Rows(*(field[index] for field in self))


class _Tilted(NamedTuple):
    """q_x [N, V] of rows and its first moments [N]."""

    x: Tensor
    log_q: Tensor
    q: Tensor
    log_norm: Tensor  # log sum exp(x u + (1-x) v)
    mean: Tensor  # E[delta]


def solve(
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    method: str = "kl_symmetry",
    alpha: float | Tensor | None = None,
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> TruthSolution:
    """alpha, psi(alpha), status and diagnostics of rows [..., V]; each result is [...]."""
    rows, shape = _read(logits_theta, logits_t, temperature_theta, temperature_t, vocab_size)
    symmetric = method == "kl_symmetry" and alpha is None
    alpha = _choose_alpha(rows, method, alpha, shape)
    status = rows.status
    tilted = _tilt(rows, alpha)
    gap_theta, gap_t = _gap(rows, tilted, 1 - alpha), _gap(rows, tilted, -alpha)
    log_theta, log_t = _log_softmax(rows.a)[0], _log_softmax(rows.b)[0]
    log_z = -alpha * gap_theta - (1 - alpha) * gap_t
    if symmetric:
        # psi'(alpha) = 0: both KLs are -psi(alpha), even if the rounding of alpha would make them differ
        kl_theta = kl_t = -log_z
    else:
        kl_theta, kl_t = gap_theta, gap_t
    q = tilted.q
    values = {
        "log_z": log_z,
        "kl_theta": kl_theta,
        "kl_t": kl_t,
        "ess_theta": torch.exp(2 * gap_theta - _gap(rows, tilted, 2 - 2 * alpha)),
        "ess_t": torch.exp(2 * gap_t - _gap(rows, tilted, -2 * alpha)),
        "entropy_theta": _entropy(log_theta),
        "entropy_t": _entropy(log_t),
        "entropy_q": _entropy(tilted.log_q),
        "overlap_theta": torch.minimum(log_theta.exp(), q).sum(-1),
        "overlap_t": torch.minimum(log_t.exp(), q).sum(-1),
    }
    # q* = pi_theta if no token is common: KL 0 to pi_theta, infinite KL to pi_t.
    without_common: dict[str, Tensor | float] = {
        "log_z": 0.0,
        "kl_theta": 0.0,
        "kl_t": math.inf,
        "ess_theta": 1.0,
        "ess_t": 0.0,
        "entropy_q": values["entropy_theta"],
        "overlap_theta": 1.0,
        "overlap_t": 0.0,
    }
    for name, given in without_common.items():
        fill = torch.as_tensor(given, dtype=torch.float64, device=status.device)
        values[name] = torch.where(status == DISJOINT, fill, values[name])
    values = {name: torch.where(status == INVALID, math.nan, value) for name, value in values.items()}
    return TruthSolution(
        alpha=alpha.reshape(shape),
        status=status.reshape(shape),
        **{name: value.reshape(shape) for name, value in values.items()},
    )


def log_q(
    logits_theta: Tensor,
    logits_t: Tensor,
    alpha: float | Tensor | None = None,
    *,
    method: str = "kl_symmetry",
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """log q_alpha [..., V]: -inf off S and on padding, NaN over the vocabulary of an INVALID row."""
    rows, shape = _read(logits_theta, logits_t, temperature_theta, temperature_t, vocab_size)
    tilted = _tilt(rows, _choose_alpha(rows, method, alpha, shape))
    status = rows.status[:, None]
    value = torch.where(status == DISJOINT, _log_softmax(rows.a)[0], tilted.log_q)
    value = torch.where(status == INVALID, math.nan, value)
    full = value.new_full((value.shape[0], logits_theta.shape[-1]), -math.inf)
    full[:, : value.shape[1]] = value
    return full.reshape(logits_theta.shape)


def log_partition(a: Tensor, b: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L(t), L', L'', L''' over S, each [...]: derivatives are mean, variance and third central moment of d.

    >>> [x.item() for x in log_partition(torch.zeros(2), torch.zeros(2), 0.3)[1:]]
    [0.0, 0.0, 0.0]
    """
    rows, shape = _read(a, b)
    t = _per_row(t, shape, a.device)
    tilted = _tilt(rows, t)
    centred = rows.delta - tilted.mean[:, None]
    moments = (
        tilted.log_norm + t * rows.peak_theta + (1 - t) * rows.peak_t,
        tilted.mean + rows.shift + (rows.peak_theta - rows.peak_t),
        (tilted.q * centred**2).sum(-1),
        (tilted.q * centred**3).sum(-1),
    )
    empty = [-math.inf, math.nan, math.nan, math.nan]
    values = [torch.where(rows.status == DISJOINT, e, m) for e, m in zip(empty, moments, strict=True)]
    values = [torch.where(rows.status == INVALID, math.nan, value).reshape(shape) for value in values]
    return values[0], values[1], values[2], values[3]


def psi(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """psi(t) = log sum over S of pi_theta^t pi_t^(1-t), both models conditioned on S: [...]."""
    rows, shape = _read(a, b)
    t = _per_row(t, shape, a.device)
    tilted = _tilt(rows, t)
    value = -t * _gap(rows, tilted, 1 - t) - (1 - t) * _gap(rows, tilted, -t)
    return torch.where(rows.status >= DISJOINT, math.nan, value).reshape(shape)


def psi_slope(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """psi'(t) = KL(q_t||pi_t) - KL(q_t||pi_theta): [...]."""
    rows, shape = _read(a, b)
    t = _per_row(t, shape, a.device)
    tilted = _tilt(rows, t)
    value = _gap(rows, tilted, -t) - _gap(rows, tilted, 1 - t)
    return torch.where(rows.status >= DISJOINT, math.nan, value).reshape(shape)


def alpha_gradient(
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the KL-symmetric alpha in both rows, [..., V] each; 0 where the status is not OK.

    With F = L'(alpha) - (A - B) they are -(dF/da)/psi'' and -(dF/db)/psi'', where

        dF/da_i = q_i (1 + alpha (d_i - E[d])) - pi_theta,i
        dF/db_i = q_i (-1 + (1-alpha) (d_i - E[d])) + pi_t,i.

    Both are written here as q_i times a second-order bracket, with pi_theta,i = q_i exp(u_i),
    pi_t,i = q_i exp(v_i): the first-order terms cancel on paper and not in the sums.
    """
    rows, shape = _read(logits_theta, logits_t, temperature_theta, temperature_t, vocab_size)
    alpha = _choose_alpha(rows, "kl_symmetry", None, shape)
    tilted = _tilt(rows, alpha)
    gap_theta, gap_t = _gap(rows, tilted, 1 - alpha), _gap(rows, tilted, -alpha)
    x, mean = alpha[:, None], tilted.mean[:, None]
    centred = rows.delta - mean
    exponent_theta = (1 - x) * centred - gap_theta[:, None]
    exponent_t = -x * centred - gap_t[:, None]
    slope_theta = tilted.q * ((2 * x - 1) * centred + gap_theta[:, None])
    bound = torch.zeros_like(x)  # q exp(u) is a probability
    log_theta, log_t = (_log_softmax(torch.where(rows.common, x, -math.inf))[0] for x in (rows.u, rows.v))
    slope_theta = slope_theta - _weighted_h(tilted.q, exponent_theta, log_theta, bound)
    slope_t = tilted.q * ((1 - 2 * x) * centred - gap_t[:, None])
    slope_t = slope_t + _weighted_h(tilted.q, exponent_t, log_t, bound)
    curvature = (tilted.q * centred**2).sum(-1, keepdim=True)
    gradients = []
    for slope, temperature in ((slope_theta, temperature_theta), (slope_t, temperature_t)):
        value = -slope / curvature / _per_row(temperature, shape, slope.device)[:, None]
        value = torch.where(rows.common & (rows.status == OK)[:, None], value, 0.0)
        full = value.new_zeros((value.shape[0], logits_theta.shape[-1]))
        full[:, : value.shape[1]] = value
        gradients.append(full.reshape(logits_theta.shape))
    return gradients[0], gradients[1]


def sample_law(
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    alpha: float | Tensor | None = None,
    method: str = "kl_symmetry",
    temperature: float = 1.0,
    min_p: float = 0.0,
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The law [..., V] that sample() draws from: q*^(1/temperature), without tokens below min_p times its peak.

    >>> a, b = torch.tensor([0.0, 0.0, -9.0]), torch.tensor([0.0, 0.0, -9.0])
    >>> sample_law(a, b, min_p=0.1).tolist()
    [0.5, 0.5, 0.0]
    """
    log_law = log_q(
        logits_theta,
        logits_t,
        alpha,
        method=method,
        temperature_theta=temperature_theta,
        temperature_t=temperature_t,
        vocab_size=vocab_size,
    )
    log_law = log_law / temperature
    if min_p > 0:
        peak = log_law.amax(-1, keepdim=True)
        log_law = torch.where(log_law - peak < math.log(min_p), -math.inf, log_law)
    return torch.softmax(log_law, dim=-1)


def verify_law(
    draft_probs: Tensor,
    target_probs: Tensor,
    *,
    draft_tokens: Tensor | None = None,
    recipe: str = "exact",
) -> VerifyLaw:
    """Chain speculative verification by enumeration, for drafts that are drawn from draft_probs or given.

    draft_probs [K, V] and target_probs [K+1, V] are the laws at each position; draft_tokens [K] fixes the
    draft. recipe="exact" draws from norm(max(0, q - p)) after a rejection; recipe="biased" is the documents'
    recipe, which draws from q, and is the negative control. All V^K drafts are enumerated: keep V and K small,
    or give draft_tokens.
    """
    if recipe not in ("exact", "biased"):
        raise ValueError(f"recipe is {recipe!r}; expected 'exact' or 'biased'")
    p, q = draft_probs.double(), target_probs.double()
    num_drafts, vocab_size = p.shape
    recover = [speculative.residual(p[k], q[k]) if recipe == "exact" else q[k] for k in range(num_drafts)]
    accept = speculative.acceptance(p, q[:num_drafts])
    stop = q.new_zeros(num_drafts + 1, vocab_size)
    passed = q.new_zeros(num_drafts + 1, vocab_size)  # P(draft token v at position k is accepted)
    if draft_tokens is not None:
        drafts = [tuple(int(token) for token in draft_tokens)]
    else:
        drafts = list(itertools.product(range(vocab_size), repeat=num_drafts))
    for draft in drafts:
        weight = 1.0 if draft_tokens is not None else math.prod(float(p[k, v]) for k, v in enumerate(draft))
        for k, token in enumerate(draft):
            in_range = 0 <= token < vocab_size
            probability = float(accept[k, token]) if in_range else 0.0
            stop[k] += weight * (1 - probability) * recover[k]
            weight *= probability
            if weight == 0:
                break
            passed[k, token] += weight
        else:
            stop[num_drafts] += weight * q[num_drafts]
    joint = stop + passed
    reached = joint.sum(-1)
    emitted = joint / reached[:, None]
    return VerifyLaw(num_accepted=stop.sum(-1), stop=stop, reached=reached, emitted=emitted)


def token_logprobs(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[tokens] and, on request, the entropy: [..., V], [...] -> [...].

    Differentiable in float64, with -inf logits as well.
    """
    log_p = torch.log_softmax(logits.double() / temperature, dim=-1)
    chosen = log_p.gather(-1, tokens.long()[..., None])[..., 0]
    if not entropy:
        return chosen
    finite = torch.where(torch.isneginf(log_p), 0.0, log_p)
    return chosen, -(log_p.exp() * finite).sum(-1)


def is_reshape_loss(
    log_pi: Tensor,
    log_mu: Tensor,
    reward: Tensor,
    *,
    gamma: float | Tensor | str = "auto",
    kernel: str = "power",
    width: float = 1.0,
    rho_min: float = 0.3,
    mask: Tensor | None = None,
    reduction: str = "mean",
    level: str = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """loss = -mean(reward f(r)) with r = exp(log_pi - log_mu), and the metrics, in float64.

    kernel="power": f = (r^gamma - 1)/gamma, with its limit log r at gamma = 0. A localised kernel:
    f = (1-gamma) log r + gamma F_K(r). level="sequence" sums log r along the last dimension first.
    gamma is a constant of the loss; sigma_sq has n-1 in the denominator; the metrics weigh by r^gamma.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}; expected 'token' or 'sequence'")
    log_ratio = log_pi.double() - log_mu.double()
    keep = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask.bool()
    log_ratio = torch.where(keep, log_ratio, 0.0)
    if level == "sequence":
        log_ratio, keep = log_ratio.sum(-1), keep.any(-1)
    chosen = log_ratio[keep].detach()
    count = chosen.numel()
    sigma_sq = chosen.var() if count > 1 else chosen.new_zeros(())
    if isinstance(gamma, str):
        if gamma != "auto":
            raise ValueError(f"gamma is {gamma!r}; expected 'auto', a number or a tensor")
        gamma = torch.sqrt(-math.log(rho_min) / sigma_sq).clamp(max=1.0)
    gamma = torch.as_tensor(gamma, dtype=torch.float64).detach()
    value = reward.double() * reshaped_ratio(log_ratio, gamma, kernel, width)
    value = -torch.where(keep, value, 0.0)
    loss = value if reduction == "none" else value.sum()
    if reduction == "mean":
        loss = loss / max(count, 1)
    share = torch.softmax(gamma * chosen, dim=0)
    ess = 1 / (share**2).sum() if count else chosen.new_zeros(())
    metrics = {
        "gamma": gamma,
        "ess": ess,
        "ess_ratio": ess / max(count, 1),
        "sigma_sq": sigma_sq,
        "max_weight": share.max() if count else chosen.new_zeros(()),
    }
    return loss, metrics


def reshaped_ratio(log_ratio: Tensor, gamma: Tensor, kernel: str = "power", width: float = 1.0) -> Tensor:
    """f(r) of `is_reshape_loss`; its derivative in log r is r^gamma, or (1-gamma) + gamma r K(r-1)."""
    if kernel != "power":
        local = localized_kernels.f_kernel(kernel, torch.exp(log_ratio), width)
        return (1 - gamma) * log_ratio + gamma * local
    divisor = torch.where(gamma == 0, 1.0, gamma)
    return torch.where(gamma == 0, log_ratio, torch.expm1(divisor * log_ratio) / divisor)


def _read(
    logits_theta: Tensor,
    logits_t: Tensor,
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> tuple[_Rows, torch.Size]:
    """Rows [..., V] as [N, vocab_size] in float64, judged and centred; and the leading shape."""
    shape = logits_theta.shape[:-1]
    size = logits_theta.shape[-1] if vocab_size is None else vocab_size
    a, b = (x.detach().double()[..., :size].reshape(-1, size) for x in (logits_theta, logits_t))
    a = a / _per_row(temperature_theta, shape, a.device)[:, None]
    b = b / _per_row(temperature_t, shape, b.device)[:, None]
    invalid = torch.zeros(a.shape[0], dtype=torch.bool, device=a.device)
    for x in (a, b):
        invalid |= (x.isnan() | x.isposinf()).any(-1) | ~x.isfinite().any(-1)
    common = a.isfinite() & b.isfinite()
    disjoint = ~invalid & ~common.any(-1)
    # In the sums, a row without a solution is replaced by one that has one; its results are overwritten.
    a, b = (torch.where(invalid[:, None], 0.0, x) for x in (a, b))
    common = common | (invalid | disjoint)[:, None]
    a_common, b_common = (torch.where(disjoint[:, None], 0.0, x) for x in (a, b))
    peak_theta = torch.where(common, a_common, -math.inf).amax(-1)
    peak_t = torch.where(common, b_common, -math.inf).amax(-1)
    u = torch.where(common, a_common - peak_theta[:, None], 0.0)
    v = torch.where(common, b_common - peak_t[:, None], 0.0)
    difference = torch.where(common, a_common - b_common, 0.0)
    # Computed from a - b, not from u - v: for nearly equal rows the subtraction a - b is exact.
    shift = _masked_logsumexp(u, common) - _masked_logsumexp(v, common)
    delta = difference - (peak_theta - peak_t + shift)[:, None]
    # Unless the difference would lose one of them.
    huge = torch.maximum(peak_theta.abs(), peak_t.abs()) > HUGE
    delta = torch.where(common, torch.where(huge[:, None], u - v - shift[:, None], delta), 0.0)
    # Each difference is known up to the rounding of its two entries; rows are identical if one constant lies within
    # all these bounds. Each token has its own bound, so that a mask of -1e9 does not widen the others'. A difference
    # of one epsilon of a nat always counts as rounding, since it changes no weight.
    doubt = _rounding_unit(logits_theta, logits_t) * torch.maximum(a_common.abs(), b_common.abs()).clamp(min=1.0)
    largest = torch.where(common, difference - doubt, -math.inf).amax(-1)
    smallest = torch.where(common, difference + doubt, math.inf).amin(-1)
    status = torch.where(largest <= smallest, IDENTICAL, OK)
    status = torch.where(disjoint, DISJOINT, status)
    status = torch.where(invalid, INVALID, status).to(torch.uint8)
    return _Rows(a, b, common, u, v, delta, shift, peak_theta, peak_t, status), shape


def _rounding_unit(logits_theta: Tensor, logits_t: Tensor) -> float:
    # bf16 and fp16 are widened exactly and computed in float32, so the rounding is that of float32.
    dtype = torch.promote_types(torch.promote_types(logits_theta.dtype, logits_t.dtype), torch.float32)
    return torch.finfo(dtype).eps


def _per_row(value: float | Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """A number, one value per row, or a tensor that broadcasts to the leading shape: float64 [N]."""
    value = torch.as_tensor(value, dtype=torch.float64, device=device)
    if value.numel() == math.prod(shape):
        return value.reshape(-1)
    return value.expand(shape).reshape(-1)


def _choose_alpha(rows: _Rows, method: str, alpha: float | Tensor | None, shape: torch.Size) -> Tensor:
    """alpha [N] by the method, with the values that the status codes prescribe."""
    if alpha is not None and method not in ("kl_symmetry", "fixed"):
        raise ValueError(f"alpha is given with method={method!r}; expected method='fixed'")
    if alpha is not None:
        chosen = _per_row(alpha, shape, rows.a.device)
    elif method == "kl_symmetry":
        chosen = _find_root(rows, _kl_difference)
    elif method == "ess_balance":
        chosen = _find_root(rows, _ess_difference)
    elif method == "entropy":
        entropy_theta, entropy_t = (_entropy(_log_softmax(x)[0]) for x in (rows.a, rows.b))
        total = entropy_theta + entropy_t
        chosen = torch.where(total > 0, entropy_theta / total, 0.5)
    else:
        raise ValueError(f"Unknown method: {method}")
    if alpha is None:
        chosen = torch.where(rows.status == IDENTICAL, 0.5, chosen)
    chosen = torch.where(rows.status == DISJOINT, 1.0, chosen)
    return torch.where(rows.status == INVALID, math.nan, chosen)


def _kl_difference(rows: _Rows, x: Tensor) -> tuple[Tensor, Tensor]:
    """psi'(x) and psi''(x)."""
    tilted = _tilt(rows, x)
    variance = (tilted.q * (rows.delta - tilted.mean[:, None]) ** 2).sum(-1)
    return _gap(rows, tilted, -x) - _gap(rows, tilted, 1 - x), variance


def _ess_difference(rows: _Rows, x: Tensor) -> tuple[Tensor, Tensor]:
    """psi(-x) - psi(2-x) = log ESS_theta/ESS_t, rising in x, and its slope."""
    tilted = _tilt(rows, x)
    inverse_theta = _gap(rows, tilted, 2 - 2 * x) - 2 * _gap(rows, tilted, 1 - x)
    inverse_t = _gap(rows, tilted, -2 * x) - 2 * _gap(rows, tilted, -x)
    return inverse_t - inverse_theta, _tilt(rows, 2 - x).mean - _tilt(rows, -x).mean


def _find_root(rows: _Rows, function: Callable[[_Rows, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """The root in [0, 1] of a rising function, per row: Newton inside a bracket, else bisection."""
    count = rows.status.shape[0]
    root = torch.full((count,), 0.5, dtype=torch.float64, device=rows.a.device)
    low, high, last_step = torch.zeros_like(root), torch.ones_like(root), torch.ones_like(root)
    active = torch.nonzero(rows.status == OK)[:, 0]
    for _ in range(200):
        if active.numel() == 0:
            break
        x = root[active]
        value, slope = function(rows.take(active), x)
        low[active] = torch.where(value <= 0, x, low[active])
        high[active] = torch.where(value >= 0, x, high[active])
        left, right = low[active], high[active]
        newton = x - value / slope
        step = (newton - x).abs()
        inside = (newton >= left) & (newton <= right)
        # Newton only if it at least halves the previous step; its last steps are rounding.
        done = (value == 0) | (inside & (step <= 2.5e-16)) | (right - left <= 1e-16)
        usable = inside & (done | (step <= last_step[active] / 2))
        following = torch.where(usable, newton, (left + right) / 2)
        root[active] = torch.where(value == 0, x, following)
        last_step[active] = (following - x).abs()
        active = active[~done]
    return root


def _tilt(rows: _Rows, x: Tensor) -> _Tilted:
    weight = torch.where(rows.common, x[:, None] * rows.u + (1 - x)[:, None] * rows.v, -math.inf)
    log_weight, log_norm = _log_softmax(weight)
    q = log_weight.exp()
    return _Tilted(x, log_weight, q, log_norm, (q * rows.delta).sum(-1))


def _gap(rows: _Rows, tilted: _Tilted, s: Tensor) -> Tensor:
    """G_x(s) = log E[exp(s delta)] - s E[delta] under q_x, [N]: not negative, of second order in delta."""
    at = (tilted.x + s)[:, None]
    weight = at * rows.u + (1 - at) * rows.v
    log_mean = _masked_logsumexp(weight, rows.common) - tilted.log_norm - s * rows.shift
    gap = log_mean - s * tilted.mean
    near = torch.nonzero(log_mean.abs() < NEAR)[:, 0]
    s, mean, delta = s[near], tilted.mean[near], rows.delta[near]
    q, bound = tilted.q[near], log_mean[near, None]
    # q exp(s delta), without the sum log q + s delta, whose terms are as large as a finite mask, -1e9 or -3.4e38.
    tilted_by_s = weight[near] - (tilted.log_norm[near] + s * rows.shift[near])[:, None]
    remainder = _weighted_h(q, s[:, None] * delta, tilted_by_s, bound).sum(-1)
    gap[near] = remainder + _log1p_minus(s * mean + remainder)
    return gap


def _weighted_h(q: Tensor, y: Tensor, log_tilted: Tensor, bound: Tensor) -> Tensor:
    """q h(y) = q exp(y) - q (1 + y), [N, V]; log_tilted = log(q exp(y)) never exceeds bound, which keeps it finite."""
    small = y.abs() < 0.5
    y_small = torch.where(small, y, 0.0)
    series = torch.zeros_like(y)
    for k in range(17, 1, -1):
        series.mul_(y_small).add_(1).div_(k)
    # exp(y) - 1 - y = y^2 (1/2)(1 + (y/3)(1 + (y/4)(...)))
    series = q * y_small * y_small * series
    direct = torch.exp(torch.minimum(log_tilted, bound)) - q * (1 + y)
    return torch.where(small, series, direct)


def _log1p_minus(t: Tensor) -> Tensor:
    """log1p(t) - t, by its series if the difference would cancel."""
    small = torch.where(t.abs() < 0.1, t, 0.0)
    series = torch.zeros_like(t)
    for k in range(20, 1, -1):
        series = series * small + (-1.0) ** (k + 1) / k
    return torch.where(t.abs() < 0.1, small * small * series, torch.log1p(t) - t)


def _log_softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax [N, V] and log-sum-exp [N], with the peak's own term kept out of the sum.

    log p of a token with almost all the mass is then right to its last digits, not just to 1e-16 absolute.
    """
    peak, index = x.max(-1, keepdim=True)
    centred = x - peak
    rest = torch.log1p(centred.exp().scatter(-1, index, 0.0).sum(-1, keepdim=True))
    return centred - rest, (peak + rest)[:, 0]


def _masked_logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    return _log_softmax(torch.where(mask, x, -math.inf))[1]


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * torch.where(torch.isneginf(log_p), 0.0, log_p)).sum(-1)
