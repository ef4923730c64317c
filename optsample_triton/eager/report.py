"""What is read off a solved row: diagnostics, and log q* itself."""

from __future__ import annotations

import torch
from torch import Tensor

from optsample_triton.eager.log_partition import tilted_moments
from optsample_triton.eager.rows import Rows, outside_common_support
from optsample_triton.eager.solve import NARROW, State
from optsample_triton.types import Status


def own_entropies(rows: Rows) -> Tensor:
    """log-partition and entropy of each model over its own finite entries, [N, 4]: A, B, H_theta, H_t."""
    n, device = rows.count, rows.theta.device
    top = torch.full((n, 2), -torch.inf, dtype=torch.float64, device=device)
    sums = torch.zeros(n, 4, dtype=torch.float64, device=device)  # mass and first moment of z - top, per model
    for block in rows.blocks():
        for chunk in rows.chunks():
            z = torch.stack(rows.read(block, chunk, torch.float64), 1)  # [R, 2, C]
            new_top = torch.maximum(top[block], z.amax(-1))
            base = torch.where(torch.isinf(new_top), 0.0, new_top)
            moved = torch.where(torch.isneginf(top[block]), 0.0, top[block] - base)
            z = z - base[..., None]
            w = z.exp()
            z.masked_fill_(torch.isneginf(z), 0.0)
            old_mass, old_first = sums[block, :2], sums[block, 2:]
            shrink = torch.where(torch.isneginf(top[block]), 0.0, moved.exp())
            first = shrink * (old_first + moved * old_mass) + (w * z).sum(-1)
            sums[block] = torch.cat([shrink * old_mass + w.sum(-1), first], -1)
            top[block] = new_top
    mass, first = sums[:, :2], sums[:, 2:]
    return torch.cat([top + mass.log(), mass.log() - first / mass], -1)


def entropy_alpha(rows: Rows) -> Tensor:
    """The entropy formula H_theta / (H_theta + H_t), [N]; 1/2 where both entropies are 0."""
    entropies = own_entropies(rows)[:, 2:]
    total = entropies.sum(-1)
    return torch.where(total > 0, entropies[:, 0] / total, torch.where(total == 0, 0.5, torch.nan))


FIGURES = 9


def figures(rows: Rows, state: State) -> Tensor:
    """The fields of ``Diagnostics`` without the sweeps, [N, 9] float64."""
    x = state.alpha
    chord = state.log_partition_theta - state.log_partition_t
    offsets = torch.stack([1.0 - x, -x, 2.0 - 2.0 * x, -2.0 * x], -1)
    moments = tilted_moments(rows, x, chord, offsets)
    to_theta, to_t, twice_theta, twice_t = moments.excess.unbind(-1)
    # Wide rows have their figures from psi, psi(2 - alpha) and psi(-alpha), which hold where exp(G) overflows.
    plain_psi = moments.log_partition - x * state.log_partition_theta - (1.0 - x) * state.log_partition_t
    slope = moments.mean - chord
    wide = ~(plain_psi > -NARROW)
    kl_theta = torch.where(wide, -(1.0 - x) * slope - plain_psi, to_theta)
    kl_t = torch.where(wide, x * slope - plain_psi, to_t)
    log_ess_theta, log_ess_t = 2.0 * to_theta - twice_theta, 2.0 * to_t - twice_t
    far = wide.nonzero().squeeze(-1)
    if far.numel():
        some = rows.select(far)
        psi, at_theta, at_t = plain_psi[far], state.log_partition_theta[far], state.log_partition_t[far]
        for log_ess, point in ((log_ess_theta, 2.0 - x[far]), (log_ess_t, -x[far])):
            log_partition = tilted_moments(some, point, chord[far]).log_partition
            log_ess[far] = point * at_theta + (1.0 - point) * at_t - log_partition - psi
    entropy_q = moments.log_partition - x * moments.mean_theta - (1.0 - x) * moments.mean_t
    own = own_entropies(rows)
    overlap = _overlaps(rows, x, moments.log_partition, own)
    values = torch.stack(
        [
            kl_theta, kl_t, log_ess_theta.exp(), log_ess_t.exp(),
            own[:, 2], own[:, 3], entropy_q, overlap[:, 0], overlap[:, 1],
        ], -1,
    )  # fmt: skip
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    alone = torch.stack([zero, zero + torch.inf, one, zero, own[:, 2], own[:, 3], own[:, 2], one, zero], -1)
    status = state.status[:, None]
    values = torch.where(status == Status.DISJOINT, alone, values)
    return torch.where(status == Status.INVALID, torch.nan, values)


def probability_figures(rows: Rows, state: State) -> Tensor:
    """The documents' eps forms of the same figures, for probability rows, [N, 9] float64."""
    eps = rows.eps
    x, base_theta, base_t = state.alpha, state.log_partition_theta, state.log_partition_t
    log_norm = state.psi + x * base_theta + (1.0 - x) * base_t
    sums = torch.zeros(rows.count, FIGURES, dtype=torch.float64, device=rows.theta.device)
    for block in rows.blocks():
        weight = x[block, None]
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, torch.float64)  # log(p + eps)
            theta, t = (p.double() for p in rows.raw(block, chunk))
            q = (weight * a + (1.0 - weight) * b - log_norm[block, None]).exp()
            log_q = (q + eps).log()
            parts = [
                q * (log_q - a), q * (log_q - b), theta.square() / (q + eps), t.square() / (q + eps),
                -theta * a, -t * b, -q * log_q, torch.minimum(theta, q), torch.minimum(t, q),
            ]  # fmt: skip
            sums[block] += torch.stack([part.sum(-1) for part in parts], -1)
    sums[:, 2:4] = sums[:, 2:4].reciprocal()
    return torch.where(state.status[:, None] == Status.INVALID, torch.nan, sums)


def _overlaps(rows: Rows, x: Tensor, log_partition: Tensor, own: Tensor) -> Tensor:
    """sum min(pi, q*) for both models, [N, 2]."""
    overlap = torch.zeros(rows.count, 2, dtype=torch.float64, device=rows.theta.device)
    for block in rows.blocks():
        weight = x[block, None]
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, torch.float64)
            outside = outside_common_support(a, b)
            z = weight * a + (1.0 - weight) * b - log_partition[block, None]
            q = z.masked_fill(outside, -torch.inf).exp()
            for k, logits in enumerate((a, b)):
                overlap[block, k] += torch.minimum((logits - own[block, k, None]).exp(), q).sum(-1)
    return overlap


FAR = 50.0  # Chernoff information beyond which float32 would blur alpha a + (1 - alpha) b


def write_log_q(rows: Rows, state: State, out: Tensor) -> None:
    """log q* of every row into out [N, V'], V' >= V; padding beyond V gets -inf. May write over an input."""
    dtype = rows.working_dtype
    disjoint, invalid = state.status == Status.DISJOINT, state.status == Status.INVALID
    far = state.psi < -FAR
    # Against the centres the float32 arithmetic below is of the size of log q*, not of the logits.
    base_theta, base_t = state.centre_theta.to(dtype), state.centre_t.to(dtype)
    exact = state.psi + state.alpha * (state.log_partition_theta - base_theta)
    exact = exact + (1.0 - state.alpha) * (state.log_partition_t - base_t)
    rest = torch.where(invalid, torch.nan, exact)
    for block in rows.blocks():
        col = block, None
        lone, broken = disjoint[col], invalid[col]
        precise = torch.float64 if bool(far[block].any()) else dtype
        weight = state.alpha[col].to(precise)
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, precise)
            outside = torch.where(lone, torch.isneginf(a), outside_common_support(a, b))
            value = weight * (a - base_theta[col]) - rest[col].to(precise)
            value = value + ((1.0 - weight) * (b - base_t[col])).masked_fill(lone, 0.0)
            value = value.clamp_(max=0.0).masked_fill(outside, -torch.inf).masked_fill(broken, torch.nan)
            out[block, chunk] = value.to(out.dtype)
    out[:, rows.vocab :] = -torch.inf
