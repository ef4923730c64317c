"""The numbers that both backends keep to: status and method codes, the nodes, thresholds, random streams.

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


# The first sweep evaluates L at these points, L' at the inner three and L'' at 1/2.
NODE_LOW, NODE_HIGH = 0.375, 0.625
NODES = (0.0, NODE_LOW, 0.5, NODE_HIGH, 1.0)

# Which form of psi and psi' a row needs (docs/theory.md, "Conditioning").
NARROW = 0.3  # Chernoff information below which psi' is evaluated through G
REACH = 2.5  # beyond this distance from 1/2 the models are no neighbours of q_x, and G would overflow
PLAIN = 1.0  # |psi| from which its plain sum is as good as G
FAR = 50.0  # Chernoff information beyond which float32 would blur alpha a + (1 - alpha) b

# The interpolant's error (docs/theory.md, "Interpolation").
NOISE_ALWAYS, NOISE_OF_TOP = 1.7, 8.4  # rounding of psi' in epsilons: in any row, and for all mass on one token
NEGLECTED_ODD, NEGLECTED_EVEN = 4.0, 0.05  # the first terms left out, in units of the last such coefficients
SD_SHARE = 0.25  # q* feels an error of alpha in units of 1/sd; the estimate is pessimistic enough to count this much
CLEAR = 4.0  # a node's sign counts where psi' is this many times its rounding
NEWTON_START = 0.375  # in s = 2 alpha - 1: the Newton steps inside the interpolant start no farther out
BLURRED = 0.1  # an error from which the interpolant's root says nothing, and the bracket's middle is taken

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
