"""A - B again, in float64, for rows whose psi'' is so small that float32's rounding of it moves the root."""

import torch

from optsample_triton.eager.evaluate import Evaluation, WidthGroup
from optsample_triton.eager.moments import tilted_moments
from optsample_triton.eager.state import rows_where
from optsample_triton.numerics import LEAP


def sharpen_chord(group: WidthGroup, at: Evaluation, tol: float) -> None:
    """Where the rounding of A - B would move alpha by more than tol, read both again, in float64.

    A corner's slopes stand clear of it.
    """
    part, variance = group.state, at.moments.variance
    smooth = part.ok & (part.error <= tol) & (at.slope.abs() <= LEAP * variance)
    blurred = rows_where(smooth & (part.chord_rounding > tol * variance))
    if blurred.numel():
        chosen = group.rows.select(blurred)
        zero = torch.zeros(chosen.count, dtype=torch.float64, device=chosen.device)
        at_theta, at_t = tilted_moments(chosen, zero + 1.0, zero), tilted_moments(chosen, zero, zero)
        part.log_partition_theta[blurred] = at_theta.log_mass + at_theta.top_theta
        part.log_partition_t[blurred] = at_t.log_mass + at_t.top_t
        part.chord_rounding[blurred], part.error[blurred] = 0.0, torch.inf
        # The bracket was narrowed by the slopes of the old chord.
        part.bracket.low[blurred], part.bracket.high[blurred] = 0.0, 1.0
        for tangent in part.bracket[2:]:
            tangent[blurred] = torch.nan
        part.sweeps[blurred] += 2
