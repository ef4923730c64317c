"""What travels inside the kernels, by name: Triton passes NamedTuples through calls, loops and branches.

A record of constants is assigned with an annotation, ``tile: tl.constexpr = Tile(...)``; without one, the assignment
would make tensors of them.

``types.Saved`` and ``types.Diagnostics`` serve in the kernels as well. Triton's cache of compiled kernels knows the
source of the functions and not these definitions: where fields are only reordered, clear it.
"""

from typing import NamedTuple

import triton.language as tl

# Where rows lie, and how they are read.


class Tile(NamedTuple):
    """How a program reads: 2 H tokens at a time."""

    H: tl.constexpr
    PACKED: tl.constexpr  # 16-bit rows as 32-bit words
    DEALT: tl.constexpr  # the number of threads, where rows are not aligned (rows._lanes); 0 where they are
    PROBS: tl.constexpr  # probabilities, read as log(p + eps)


class Layout(NamedTuple):
    """Where row i of a matrix lies: at (i // inner) * outer + (i % inner) * stride."""

    inner: tl.tensor
    outer: tl.tensor
    stride: tl.tensor


class Matrix(NamedTuple):
    """One model's rows [N, V]."""

    ptr: tl.tensor
    inverse_temperature_ptr: tl.tensor  # [N], or None for 1
    layout: Layout


class Batch(NamedTuple):
    """The rows of both models, as a kernel was launched with them."""

    theta: Matrix
    t: Matrix
    V: tl.tensor
    eps: tl.tensor


class ModelRow(NamedTuple):
    """One row of one model. The reference is a logit that is taken off before the temperature is applied."""

    ptr: tl.tensor
    inverse_temperature: tl.tensor
    reference: tl.tensor


class Row(NamedTuple):
    """One row of both models."""

    theta: ModelRow
    t: ModelRow
    V: tl.tensor
    eps: tl.tensor


class Places(NamedTuple):
    """Pointers [H] to the halves of a tile of one row: to tokens, or to words of two, twice the same."""

    low: tl.tensor
    high: tl.tensor


class RowPlaces(NamedTuple):
    """Those of both rows."""

    theta: Places
    t: Places


class HalfTile(NamedTuple):
    """Half a tile [H] of both rows, in nats; 0 outside of the common support."""

    u: tl.tensor  # a relative to its reference
    v: tl.tensor  # b relative to its reference
    d: tl.tensor  # a - b as it is
    common: tl.tensor  # whether the token is in both supports


# From the first sweep to alpha.


class TokenSums(NamedTuple):
    """Sums over tokens; d, and the tops' weights, are in powers (``NATS_PER_POWER``)."""

    mass_t: tl.tensor  # exp(L) at 0, 1/2 and 1
    mass_half: tl.tensor
    mass_theta: tl.tensor
    first: tl.tensor  # of the weight at 1/2 times d, d^2, ... d^6
    second: tl.tensor
    third: tl.tensor
    fourth: tl.tensor
    fifth: tl.tensor
    sixth: tl.tensor
    top: tl.tensor  # the largest weight at 1/2


class FirstSums(NamedTuple):
    """What the first sweep knows of a chunk or of a row. In memory a chunk's sums have this order."""

    mass_t: tl.tensor  # as above, without the token apart
    mass_half: tl.tensor
    mass_theta: tl.tensor
    first: tl.tensor
    second: tl.tensor
    third: tl.tensor
    fourth: tl.tensor
    fifth: tl.tensor
    sixth: tl.tensor
    apart_theta: tl.tensor  # the logits of the token apart; -inf where there is none
    apart_t: tl.tensor
    masked: tl.tensor  # above 0 where there are tokens outside of a support


class Meeting(NamedTuple):
    """Where the programs that share a row meet."""

    chunk_sums_ptr: tl.tensor  # [N, chunks] of FirstSums
    arrived_ptr: tl.tensor  # [N], 0 before a launch and after it
    splits: tl.tensor  # programs per row


class FirstSweep(NamedTuple):
    """What a program has after its share of the first sweep."""

    index: tl.tensor  # of its row
    row: Row
    chunk_sums_ptr: tl.tensor  # the row's
    last: tl.tensor  # whether it finishes the row


class Survey(NamedTuple):
    """What a row holds: flags, and of the common support the largest logits and the largest |logit| in nats."""

    spoilt: tl.tensor  # NaN or +inf
    some_theta: tl.tensor
    some_t: tl.tensor
    some_common: tl.tensor
    top_theta: tl.tensor
    top_t: tl.tensor
    top_half: tl.tensor  # of a / 2 + b / 2, in nats
    largest: tl.tensor


class Ends(NamedTuple):
    """What of a row's psi is known before a sweep; A and B are relative to the references."""

    A: tl.tensor  # L(1)
    B: tl.tensor  # L(0)
    psi_half: tl.tensor  # psi(1/2), -inf where it is not known
    shrink: tl.tensor  # 1; for huge logits less: the factor that keeps d's moments within float32's range


class Bracket(NamedTuple):
    """Where a root lies, and value and slope at both ends of the function of which it is the minimum."""

    low: tl.tensor  # float32, which holds every point that is evaluated
    high: tl.tensor
    value_low: tl.tensor  # NaN where they are not known
    slope_low: tl.tensor
    value_high: tl.tensor
    slope_high: tl.tensor


class Derivatives(NamedTuple):
    """Of a convex function at a point."""

    value: tl.tensor
    slope: tl.tensor
    curvature: tl.tensor
    third: tl.tensor
    fourth: tl.tensor


class Curve(NamedTuple):
    """The logarithm of a mass, f0 + f1 s + ... + f8 s^8 in s = 2 alpha - 1, and its values at the ends."""

    f0: tl.tensor
    f1: tl.tensor
    f2: tl.tensor
    f3: tl.tensor
    f4: tl.tensor
    f5: tl.tensor
    f6: tl.tensor
    f7: tl.tensor
    f8: tl.tensor
    at_t: tl.tensor  # f(-1)
    at_theta: tl.tensor  # f(1)
    spread: tl.tensor  # root mean square of d at 1/2, as it was summed, in units of s


class CurvePoint(NamedTuple):
    """psi on the curve, with its derivatives in s."""

    psi: tl.tensor
    slope: tl.tensor
    curvature: tl.tensor
    share: tl.tensor  # of all tokens but the one apart


class Interpolant(NamedTuple):
    """What the curve says of the root."""

    alpha: tl.tensor
    psi: tl.tensor
    error: tl.tensor  # a bound on that of alpha
    rounding: tl.tensor  # the part of it that is for the rounding of the sums
    low: tl.tensor  # a bracket of the root
    high: tl.tensor


class Rounded(NamedTuple):
    """What of ``FirstSums`` was added up in float32, of each chunk; or its share in a row."""

    mass_t: tl.tensor
    mass_half: tl.tensor
    mass_theta: tl.tensor
    second: tl.tensor


class FirstRoot(NamedTuple):
    """What the first sweep says of a row."""

    found: Interpolant
    ends: Ends
    target: tl.tensor  # of psi' at the root
    sound: tl.tensor  # whether anything of this can be trusted


class ExactSums(NamedTuple):
    """Sums in float64, each relative to what was known of it, and of q_x's weight times delta^k."""

    mass_theta: tl.tensor
    mass_t: tl.tensor
    mass: tl.tensor
    first: tl.tensor
    second: tl.tensor


class PowerSums(NamedTuple):
    """Sums of weight times delta^k, delta = d - centre."""

    mass: tl.tensor
    first: tl.tensor
    second: tl.tensor
    third: tl.tensor
    fourth: tl.tensor


class Moments(NamedTuple):
    """Under q_x: the logarithm of the weights' sum, d's mean, and its central moments, in float64."""

    log_mass: tl.tensor
    mean: tl.tensor
    variance: tl.tensor
    third: tl.tensor
    fourth: tl.tensor


class Expansion(NamedTuple):
    """A point x of a narrow row, in float32, and the two points that G is taken to from there."""

    x: tl.tensor
    base: tl.tensor  # subtracted from the exponents
    chord: tl.tensor  # A - B relative to the references
    centre: tl.tensor  # A - B as it is
    upper: tl.tensor
    lower: tl.tensor


class NarrowSums(NamedTuple):
    powers: PowerSums
    excess_upper: tl.tensor  # of weight times h((upper - x) delta)
    excess_lower: tl.tensor
    lowest: tl.tensor  # d, plus its rounding
    highest: tl.tensor  # d, less its rounding


class NarrowMoments(NamedTuple):
    moments: Moments
    gap_upper: tl.tensor  # G(upper - x)
    gap_lower: tl.tensor  # G(lower - x)
    width: tl.tensor  # of d, less its rounding


class OwnSums(NamedTuple):
    """Of one distribution: the weights of its likeliest tokens, each 1, apart from all others."""

    rest: tl.tensor
    first: tl.tensor  # of weight times z
    tops: tl.tensor


class OnlineSum(NamedTuple):
    """mass * exp(top), lane by lane."""

    top: tl.tensor
    mass: tl.tensor


class Evaluation(NamedTuple):
    """One sweep at a point."""

    psi: tl.tensor
    slope: tl.tensor  # psi'
    mean: tl.tensor  # L'
    variance: tl.tensor  # d's central moments
    third: tl.tensor
    fourth: tl.tensor
    width: tl.tensor  # of d, less its rounding: not above 0 where the rows agree, +inf where it was not looked for


class Options(NamedTuple):
    """How rows are to be solved."""

    given_alpha_ptr: tl.tensor  # [N], for the method FIXED
    tol: tl.tensor
    max_iter: tl.tensor


class Search(NamedTuple):
    """Where the search for alpha stands."""

    task: tl.tensor  # what the next sweep is for
    alpha: tl.tensor
    psi: tl.tensor
    bracket: Bracket
    target: tl.tensor  # of psi' at the root
    status: tl.tensor
    sweeps: tl.tensor


class Root(NamedTuple):
    """A solved row."""

    alpha: tl.tensor  # to the last digit; what is reported and evaluated is the nearest float32
    psi: tl.tensor
    status: tl.tensor
    sweeps: tl.tensor


class Results(NamedTuple):
    """Where a solved row is stored."""

    alpha_ptr: tl.tensor
    log_z_ptr: tl.tensor
    status_ptr: tl.tensor
    sweeps_ptr: tl.tensor
    saved_ptr: tl.tensor
    diagnostics_ptr: tl.tensor  # or None
    out_ptr: tl.tensor  # of log q*, or None
    stride_out: tl.tensor
    width: tl.tensor  # of a row of log q*


class LawSums(NamedTuple):
    """Of q*'s diagnostics."""

    own: OwnSums
    overlap_theta: tl.tensor  # of min(pi_theta, q)
    overlap_t: tl.tensor


class ProbabilitySums(NamedTuple):
    """Of the documents' diagnostics with eps."""

    kl_theta: tl.tensor
    kl_t: tl.tensor
    square_theta: tl.tensor  # of pi_theta^2 / q
    square_t: tl.tensor
    entropy_theta: tl.tensor
    entropy_t: tl.tensor
    entropy_q: tl.tensor
    overlap_theta: tl.tensor
    overlap_t: tl.tensor


# Gradients.


class Tokens(NamedTuple):
    """A tile [BLOCK] of both rows."""

    u: tl.tensor  # as in HalfTile, but 0 only where the model itself has no mass
    v: tl.tensor
    d: tl.tensor
    support: tl.tensor  # where q* has mass
    support_theta: tl.tensor
    support_t: tl.tensor


class Tilt(NamedTuple):
    """q* as the gradient reads it, in float32: exp(x u + (1 - x) v - base)."""

    x: tl.tensor
    base: tl.tensor
    coarse: tl.tensor  # E[d] in two parts
    fine: tl.tensor
    s: tl.tensor  # 2 alpha - 1, of the precise alpha
    disjoint: tl.tensor
    invalid: tl.tensor


class Gaps(NamedTuple):
    """G about q* to theta and t, and for ESS balance to 2 - x and -x; and L at the same four points."""

    theta: tl.tensor
    t: tl.tensor
    upper: tl.tensor
    lower: tl.tensor
    L_theta: tl.tensor
    L_t: tl.tensor
    L_upper: tl.tensor
    L_lower: tl.tensor


class Own(NamedTuple):
    """One model over its own support, for the entropy method's gradient."""

    log_partition: tl.tensor
    entropy: tl.tensor
    share: tl.tensor  # of -dH in dF


class LossSlopes(NamedTuple):
    """The loss's derivatives."""

    log_q_ptr: tl.tensor  # in a row's log q*, or None
    log_q_total: tl.tensor  # the sum of those
    log_z: tl.tensor
    condition: tl.tensor  # in F, the root's condition


class GradientRows(NamedTuple):
    """Where a row's gradients are stored."""

    theta_ptr: tl.tensor
    t_ptr: tl.tensor


# Drawing.


class Drawing(NamedTuple):
    """How a token is found: a chunk, a tile of it, a token of that."""

    CHUNK: tl.constexpr
    TILE: tl.constexpr
    READ: tl.constexpr  # tokens read at a time
    LANES: tl.constexpr  # at least the chunks of a row
    FILTER: tl.constexpr  # whether there is a temperature of q* and a min_p


class Law(NamedTuple):
    """Weights exp(inverse_temperature z), z = x a + (1 - x) b - base, cut below ``threshold``.

    Where a model's law is taken off, its weights are exp(a - own) or exp(b - own).
    """

    x: tl.tensor
    base: tl.tensor
    inverse_temperature: tl.tensor  # of q*
    threshold: tl.tensor
    far: tl.tensor  # whether z needs float64
    own: tl.tensor
    aligned_ptr: tl.tensor  # any aligned memory of the launch's own, for draw._zeros


class LogPartitions(NamedTuple):
    """Of the law, and of both models over their own supports, relative to the references."""

    q: tl.tensor
    theta: tl.tensor
    t: tl.tensor


class DrawnLaw(NamedTuple):
    """A row that is ready to be drawn from."""

    row: Row
    law: Law
    masses: tl.tensor  # of the chunks [LANES]
    partitions: LogPartitions
    status: tl.tensor


class Filters(NamedTuple):
    """What is applied to q*, [N] each or None."""

    inverse_temperature_ptr: tl.tensor
    min_p_ptr: tl.tensor


class Filtering(NamedTuple):
    """A row's filters."""

    inverse_temperature: tl.tensor
    threshold: tl.tensor  # of z, below which min_p cuts
    active: tl.tensor  # whether they change q*
    usable: tl.tensor  # whether they and alpha mean anything


class Key(NamedTuple):
    """What a row's random numbers depend on."""

    seed: tl.tensor
    offset: tl.tensor
    group: tl.tensor


class Seeds(NamedTuple):
    """A seed and an offset for all rows, or, where there are pointers, some for each group of rows."""

    seed_ptr: tl.tensor
    offset_ptr: tl.tensor
    seed: tl.tensor
    offset: tl.tensor
    seed_stride: tl.tensor
    offset_stride: tl.tensor
    mixed: tl.tensor  # 1 where the group's index takes part


class Drafts(NamedTuple):
    """Draft tokens of B sequences, each of ``positions`` rows: one row more than it may have drafts."""

    draft_ptr: tl.tensor  # [B, positions - 1]
    length_ptr: tl.tensor  # [B]
    accepted_ptr: tl.tensor  # [B * positions], a result
    positions: tl.tensor


class TokenLogs(NamedTuple):
    """Log-probabilities of tokens."""

    log_q: tl.tensor
    log_theta: tl.tensor
    log_t: tl.tensor


class Drawn(NamedTuple):
    """Where drawn tokens are stored, and their rows' results."""

    token_ptr: tl.tensor
    log_q_ptr: tl.tensor
    log_theta_ptr: tl.tensor
    log_t_ptr: tl.tensor
    alpha_ptr: tl.tensor
    status_ptr: tl.tensor


# Log-probabilities of tokens.


class LogprobResults(NamedTuple):
    log_prob_ptr: tl.tensor
    entropy_ptr: tl.tensor  # or None
    log_partition_ptr: tl.tensor


class LogprobSlopes(NamedTuple):
    """What a row's gradient is made of."""

    token: tl.tensor
    rest: tl.tensor  # of the log-partition, beyond the row's reference
    entropy_of_row: tl.tensor
    log_prob: tl.tensor  # upstream of the log-probability
    entropy: tl.tensor  # upstream of the entropy
    at_token: tl.tensor  # the gradient at the token itself
