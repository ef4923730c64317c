"""The numbers that both backends keep to: status and method codes, thresholds, random streams.

The kernels and the eager path share an algorithm and no code. What must be equal for their results to agree stands
here once.
"""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """What the solver found in a row; the values are those of ``Solution.status`` (uint8)."""

    OK = 0
    IDENTICAL = 1  # the two rows agree up to rounding: alpha = 0.5
    DISJOINT = 2  # no token is finite in both rows: alpha = 1, q* = pi_theta
    INVALID = 3  # NaN, +inf, or no finite logit at all in one of the rows: alpha = NaN
    NOT_CONVERGED = 4  # max_iter was reached first: the best bracketed value


class Method(IntEnum):
    """How alpha is found, as one number: a method and its algorithm. Each is a kernel of its own."""

    KL_SYMMETRY = 0
    BISECT = 1  # KL symmetry by the documents' bisection
    ESS_BALANCE = 2
    ENTROPY = 3
    FIXED = 4


# Which form of psi and psi' a row needs (docs/theory.md, "Conditioning").
NARROW = 0.3  # Chernoff information below which psi' is evaluated through G
REACH = 2.5  # beyond this distance from 1/2 the models are no neighbours of q_x, and G would overflow
PLAIN = 1.0  # |psi| from which its plain sum is as good as G
FAR = 50.0  # Chernoff information beyond which float32 would blur alpha a + (1 - alpha) b

# The error of alpha on the first sweep's curve (docs/theory.md, "The first sweep").
NEGLECTED = 150.0  # of the curve's slope: all terms left out, in units of the first two coefficients times s^6
SERIES = 0.16  # of what the kept coefficients foretell of those two; added to what the ends show of them
NOISE = 1.1  # rounding of each sum, in epsilons
ABOVE = 4.0  # nats above the references from which a logit's own rounding is more than its sum's
OF_MOMENTS = 0.5  # rounding of the moments, in epsilons
SD_SHARE = 0.25  # q* feels an error of alpha in units of 1/sd; the estimate is pessimistic enough to count this much
CLEAR = 4.0  # the sign of psi' counts where psi' is this many times its rounding
LEAP = 1.0 / 64.0  # a longer step is looked at again
BLURRED = 0.1  # rounding of the curve's root from which it says nothing, and the bracket's middle is taken
UNDERFLOW = 1e12  # smallest normal numbers: a mass at 1/2 below it has lost some of its tokens
CUBIC = 1e-6  # of psi: more than that a step's cube may not add to it where psi is taken for a parabola

# Drawing.
SLACK = 1e-6  # nats below a min_p threshold that still count as at it, or rounding would drop tokens
LOWEST = -1e4  # nats that stand for -inf in a product: far below where exp underflows, and 0 * LOWEST is 0


class Stream(IntEnum):
    """What random numbers are for; a draw's counter word is STREAMS times its index plus the stream."""

    PLACE = 0  # which chunk, and which tile of it
    TOKEN = 1
    ACCEPT = 2
    RECOVER_PLACE = 3  # the same for the token that a refused draft is replaced by
    RECOVER_TOKEN = 4


STREAMS = 8


class Drafter(IntEnum):
    """Which model made the drafts whose distribution is subtracted before drawing."""

    NONE = -1
    THETA = 0
    T = 1
