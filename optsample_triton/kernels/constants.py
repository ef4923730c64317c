"""The numbers that several kernels use, in the form in which a kernel may read them; most are those of numerics.py.

In a product or a sum they stand to the right of a tensor: to its left, Triton's interpreter would take the result for a
constant.
"""

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

NODE_LOW = tl.constexpr(numerics.NODE_LOW)
NODE_HIGH = tl.constexpr(numerics.NODE_HIGH)
NARROW = tl.constexpr(numerics.NARROW)
REACH = tl.constexpr(numerics.REACH)
PLAIN = tl.constexpr(numerics.PLAIN)
FAR = tl.constexpr(numerics.FAR)
NOISE_ALWAYS = tl.constexpr(numerics.NOISE_ALWAYS)
NOISE_OF_TOP = tl.constexpr(numerics.NOISE_OF_TOP)
NEGLECTED_ODD = tl.constexpr(numerics.NEGLECTED_ODD)
NEGLECTED_EVEN = tl.constexpr(numerics.NEGLECTED_EVEN)
SD_SHARE = tl.constexpr(numerics.SD_SHARE)
CLEAR = tl.constexpr(numerics.CLEAR)
NEWTON_START = tl.constexpr(numerics.NEWTON_START)
BLURRED = tl.constexpr(numerics.BLURRED)
SLACK = tl.constexpr(numerics.SLACK)
LOWEST = tl.constexpr(numerics.LOWEST)
SAVED = tl.constexpr(len(Saved._fields))

LOG2E = tl.constexpr(1.4426950408889634)
EPSILON = tl.constexpr(1.1920929e-7)  # of float32
# The node sums are of weights whose eighth roots are powers of two: what one power more means in nats, 8 log 2, and its
# square, both as float32 holds them.
NATS_PER_POWER = tl.constexpr(5.5451774597167969)
NATS_PER_POWER_SQUARED = tl.constexpr(30.748992919921875)
WILD = tl.constexpr(30.0)  # Chernoff information beyond which no reference is known before a sweep
