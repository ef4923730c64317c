"""log q* itself, written over a whole row."""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import DISJOINT, FAR, INVALID
from optsample_triton.kernels.moments import tilted_top, wide_moments
from optsample_triton.kernels.rows import as_logits, narrowed, relative


@triton.jit
def _log_q_tile(row, start, x, log_mass, disjoint, far, inside, tile):
    """log q* of a contiguous tile, -inf where q* has no mass."""
    offs = start + tl.arange(0, 2 * tile.H)
    a = as_logits(tl.load(row.theta.ptr + offs, mask=inside, other=0.0).to(tl.float32), row.eps, tile.PROBS)
    b = as_logits(tl.load(row.t.ptr + offs, mask=inside, other=0.0).to(tl.float32), row.eps, tile.PROBS)
    keep = (a != -float("inf")) & ((b != -float("inf")) | disjoint)
    u = tl.where(keep, relative(a, row.theta), 0.0)
    v = tl.where(keep & (disjoint == 0), relative(b, row.t), 0.0)
    if far:
        wide = x * u.to(tl.float64) + (1.0 - x) * v.to(tl.float64) - log_mass
        value = wide.to(tl.float32)
    else:
        x32 = x.to(tl.float32)
        value = x32 * u + (1.0 - x32) * v - log_mass.to(tl.float32)
    return tl.where(keep, tl.minimum(value, 0.0), -float("inf"))


@triton.jit
def store_log_q(row, ends, root, out_ptr, width, tile):
    """log q* over the row, -inf over the padding after it. ``out_ptr`` may be one of the inputs."""
    x, status = root.alpha, root.status
    BLOCK: tl.constexpr = 2 * tile.H
    offs = tl.arange(0, BLOCK)
    disjoint = status == DISJOINT
    far = root.psi < -FAR
    log_mass = x * ends.A + (1.0 - x) * ends.B + root.psi
    shift = tl.where(status == INVALID, float("nan"), 0.0)
    if not tile.PROBS:  # noqa: SIM102 (one is known when the kernel is compiled)
        if (ends.shrink < 1.0) & (status != DISJOINT) & (status != INVALID):
            # Huge logits round all of that by many nats: q* is normalised anew, from its likeliest token.
            far = far | (ends.shrink < 1.0)
            log_mass = tilted_top(row, x, tile)
            shift = -wide_moments(row, x, log_mass, 0.0 * ends.shrink, ends.shrink, tile).log_mass.to(tl.float32)
    full = row.V // BLOCK * BLOCK
    for start in tl.range(0, full, BLOCK):
        value = _log_q_tile(row, start, x, log_mass, disjoint, far, offs >= 0, tile) + shift
        tl.store(out_ptr + start + offs, narrowed(value, out_ptr.dtype.element_ty))
    if full < row.V:
        inside = full + offs < row.V
        value = _log_q_tile(row, full, x, log_mass, disjoint, far, inside, tile) + shift
        tl.store(out_ptr + full + offs, narrowed(value, out_ptr.dtype.element_ty), mask=inside)
    for start in tl.range(row.V, width, BLOCK):
        nothing = tl.full([BLOCK], -float("inf"), tl.float32).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + start + offs, nothing, mask=start + offs < width)
