"""The numbers that several kernels use, in the form in which a kernel may read them; most are those of numerics.py.

In a product or a sum they stand to the right of a tensor: to its left, Triton's interpreter would take the result for a
constant.
"""

import math

import triton.language as tl

from optsample_triton import numerics
from optsample_triton.numerics import Drafter, Method, Status, Stream
from optsample_triton.types import Saved

KL_SYMMETRY = tl.constexpr(Method.KL_SYMMETRY.value)
BISECT = tl.constexpr(Method.BISECT.value)
ESS_BALANCE = tl.constexpr(Method.ESS_BALANCE.value)
ENTROPY = tl.constexpr(Method.ENTROPY.value)
FIXED = tl.constexpr(Method.FIXED.value)

OK = tl.constexpr(Status.OK.value)
IDENTICAL = tl.constexpr(Status.IDENTICAL.value)
DISJOINT = tl.constexpr(Status.DISJOINT.value)
INVALID = tl.constexpr(Status.INVALID.value)
NOT_CONVERGED = tl.constexpr(Status.NOT_CONVERGED.value)

PLACE = tl.constexpr(Stream.PLACE.value)
TOKEN = tl.constexpr(Stream.TOKEN.value)
ACCEPT = tl.constexpr(Stream.ACCEPT.value)
RECOVER_PLACE = tl.constexpr(Stream.RECOVER_PLACE.value)
RECOVER_TOKEN = tl.constexpr(Stream.RECOVER_TOKEN.value)
STREAMS = tl.constexpr(numerics.STREAMS)

DRAFTER_NONE = tl.constexpr(Drafter.NONE.value)
DRAFTER_THETA = tl.constexpr(Drafter.THETA.value)

NARROW = tl.constexpr(numerics.NARROW)
REACH = tl.constexpr(numerics.REACH)
PLAIN = tl.constexpr(numerics.PLAIN)
FAR = tl.constexpr(numerics.FAR)
NEGLECTED = tl.constexpr(numerics.NEGLECTED)
NOISE = tl.constexpr(numerics.NOISE)
ABOVE = tl.constexpr(numerics.ABOVE)
DISTANT = tl.constexpr(32.0)  # nats above its references from which a row is read again
OF_MOMENTS = tl.constexpr(numerics.OF_MOMENTS)
LEAP = tl.constexpr(numerics.LEAP)
SD_SHARE = tl.constexpr(numerics.SD_SHARE)
SERIES = tl.constexpr(numerics.SERIES)
CLEAR = tl.constexpr(numerics.CLEAR)
BLURRED = tl.constexpr(numerics.BLURRED)
LEAST = tl.constexpr(math.log(numerics.UNDERFLOW * 2.0**-126))
SLACK = tl.constexpr(numerics.SLACK)
LOWEST = tl.constexpr(numerics.LOWEST)
SAVED = tl.constexpr(len(Saved._fields))

LOG2E = tl.constexpr(1.4426950408889634)
EPSILON = tl.constexpr(1.1920929e-7)  # of float32
STRETCH = tl.constexpr(16)  # tiles that a lane adds up in float32
# In the first sweep the square roots of weights are powers of two: what one power more means in nats, 2 log 2.
NATS_PER_POWER = tl.constexpr(1.3862943611198906)
WILD = tl.constexpr(30.0)  # Chernoff information beyond which no reference is known before a sweep
