"""Log-probabilities of given tokens: one read of the logits forward, one read and one write backward.

With z = (logit - reference) / temperature and s = sum exp(z), both over the row's finite entries,
    log p_token = z_token - log s,  H = log s - (sum exp(z) z) / s,  dH/dz_i = -p_i (log p_i + H),
    dz_i = g (1[i = token] - p_i) - h p_i (log p_i + H)                 g, h: upstream of log p_token and of H

One exponential per logit in each direction. The reference is the token's own logit or the maximum of the first tile
that holds a finite one, whichever is larger: other logits may exceed it by 60 nats and more before a sum overflows, and
the rare row where one does is read again with its true maximum.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from optsample_triton import launch
from optsample_triton.kernels.entry import _device
from optsample_triton.kernels.moments import LOG2E
from optsample_triton.kernels.rows import inside_halves, load_halves, narrowed
from optsample_triton.types import Model, Targets, TokenLogprobs

FLOOR = tl.constexpr(-1e4)  # nats: far below where exp underflows, and finite, so that 0 * FLOOR is 0
HIGH = tl.constexpr(12.0)  # nats: means of z beyond it cost the entropy, from which they are subtracted, its digits


@triton.jit
def tile_maximum(ptr, start, V, H: tl.constexpr, PACKED: tl.constexpr):
    x0, x1 = load_halves(ptr, start, V, H, PACKED, True)
    in0, in1 = inside_halves(ptr, start, V, H)
    return tl.maximum(tl.where(in0, x0, -float("inf")), tl.where(in1, x1, -float("inf")))


@triton.jit
def _finite_or_zero(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def first_maximum(ptr, V, H: tl.constexpr, PACKED: tl.constexpr):
    top = -float("inf")
    start = 0
    while (start < V) & (top == -float("inf")):
        top = tl.max(tile_maximum(ptr, start, V, H, PACKED), 0)
        start += 2 * H
    return _finite_or_zero(top)


@triton.jit
def true_maximum(ptr, V, H: tl.constexpr, PACKED: tl.constexpr):
    top = tl.full([H], -float("inf"), tl.float32)
    for tile in tl.range(0, V, 2 * H):
        top = tl.maximum(top, tile_maximum(ptr, tile, V, H, PACKED))
    return _finite_or_zero(tl.max(top, 0))


@triton.jit
def _add_half(mass, first, x, reference, scale, ENTROPY: tl.constexpr):
    z = (x - reference) * scale
    e = tl.exp2(z * LOG2E)
    if ENTROPY:
        first += e * tl.maximum(z, FLOOR)
    return mass + e, first


@triton.jit
def row_sums(
    ptr, V, reference, scale,
    H: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr, PACKED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """sum exp(z) and, for the entropy, sum exp(z) z.

    Chunks are merged in float64: beside a confident row's 1 a float32 sum of the whole row would lose its other tokens.
    """
    mass, first = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    for start in tl.range(0, V, CHUNK):
        stop = tl.minimum(start + CHUNK, V)
        full = start + (stop - start) // (2 * H) * (2 * H)
        part, moment = tl.zeros([H], tl.float32), tl.zeros([H], tl.float32)
        for tile in tl.range(start, full, 2 * H, loop_unroll_factor=UNROLL):
            x0, x1 = load_halves(ptr, tile, V, H, PACKED, False)
            part, moment = _add_half(part, moment, x0, reference, scale, ENTROPY)
            part, moment = _add_half(part, moment, x1, reference, scale, ENTROPY)
        if full < stop:
            x0, x1 = load_halves(ptr, full, V, H, PACKED, True)
            in0, in1 = inside_halves(ptr, full, V, H)
            x0, x1 = tl.where(in0, x0, -float("inf")), tl.where(in1, x1, -float("inf"))
            part, moment = _add_half(part, moment, x0, reference, scale, ENTROPY)
            part, moment = _add_half(part, moment, x1, reference, scale, ENTROPY)
        mass += tl.sum(part, 0).to(tl.float64)
        if ENTROPY:
            first += tl.sum(moment, 0).to(tl.float64)
    return mass, first


@triton.jit
def row_logprob(
    ptr, token, V, scale, slot, log_prob_ptr, entropy_ptr, partition_ptr,
    H: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One row: its token's log-probability, its entropy where asked for, and its log-partition.

    NaN for a row that holds NaN, +inf or nothing finite, and for a token outside the vocabulary.
    """
    ENTROPY: tl.constexpr = entropy_ptr is not None
    inside = (token >= 0) & (token < V)
    logit = tl.load(ptr + token, mask=inside, other=float("nan")).to(tl.float32)
    reference = first_maximum(ptr, V, H, PACKED)
    reference = tl.where((logit > reference) & (logit < float("inf")), logit, reference)
    mass, first = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    sweeps = 0
    while sweeps < 2:
        if sweeps == 1:
            reference = true_maximum(ptr, V, H, PACKED)
        mass, first = row_sums(ptr, V, reference, scale, H, CHUNK, UNROLL, PACKED, ENTROPY)
        done = (mass < float("inf")) & (first <= mass * HIGH)
        sweeps += tl.where(done, 2, 1)
    nan = mass * float("nan")
    usable = (mass > 0.0) & (mass < float("inf"))
    log_mass = tl.where(usable, tl.log(tl.where(usable, mass, 1.0)), nan)
    log_prob = (logit.to(tl.float64) - reference) * scale.to(tl.float64) - log_mass
    tl.store(log_prob_ptr + slot, log_prob.to(tl.float32))
    tl.store(partition_ptr + slot, reference * scale.to(tl.float64) + log_mass)
    if ENTROPY:
        tl.store(entropy_ptr + slot, (log_mass - first / mass).to(tl.float32))


@triton.jit
def _scale_of(ptr, index):
    if ptr is None:
        return tl.full([], 1.0, tl.float32)
    else:
        return tl.load(ptr + index)


@triton.jit
def _row_offset(index, inner, stride_outer, stride_inner):
    """Where row ``index`` of [outer, inner, V] starts."""
    return (index // inner).to(tl.int64) * stride_outer + (index % inner).to(tl.int64) * stride_inner


@triton.jit(do_not_specialize=["N", "inner", "ignore_index"])
def logprob_kernel(
    logits_ptr, other_ptr, token_ptr, scale_ptr, other_scale_ptr,  # [outer, inner, V] twice, [N], 1/temperature [N]
    log_prob_ptr, entropy_ptr, partition_ptr,  # [N], or [2, N] where there is another model
    N, V, inner, stride_outer, stride_inner, other_stride_outer, other_stride_inner, ignore_index,
    H: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index = program % N
    token = tl.load(token_ptr + index)
    if token != ignore_index:
        if program < N:
            row = logits_ptr + _row_offset(index, inner, stride_outer, stride_inner)
            row_logprob(
                row, token, V, _scale_of(scale_ptr, index), program, log_prob_ptr, entropy_ptr, partition_ptr,
                H, CHUNK, UNROLL, PACKED,
            )  # fmt: skip
        elif other_ptr is not None:
            row = other_ptr + _row_offset(index, inner, other_stride_outer, other_stride_inner)
            row_logprob(
                row, token, V, _scale_of(other_scale_ptr, index), program, log_prob_ptr, entropy_ptr, partition_ptr,
                H, CHUNK, UNROLL, PACKED,
            )  # fmt: skip


@triton.jit
def _store_tile(x, offs, token, scalars, grad_ptr, mask, ENTROPY: tl.constexpr):
    top, rest, scale, up, turn, entropy, at_token = scalars
    log_p = (x - top) * scale - rest
    p = tl.exp2(log_p * LOG2E)
    pull = up
    if ENTROPY:
        pull += turn * (tl.maximum(log_p, FLOOR) + entropy)
    grad = tl.where(offs == token, at_token, -p * pull)
    tl.store(grad_ptr + offs, narrowed(grad * scale, grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["inner", "ignore_index"])
def logprob_gradient_kernel(
    logits_ptr, token_ptr, scale_ptr, log_prob_ptr, partition_ptr, entropy_ptr,  # [outer, inner, V], and [N] each
    up_ptr, turn_ptr,  # upstream of the log-probabilities and of the entropies [N]; with entropy_ptr or None
    grad_ptr,  # [outer, inner, V], and it may be the logits themselves
    V, inner, stride_outer, stride_inner, grad_stride_outer, grad_stride_inner, ignore_index, chunks,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    ENTROPY: tl.constexpr = turn_ptr is not None
    index = tl.program_id(0) // chunks
    start = tl.program_id(0) % chunks * CHUNK
    stop = tl.minimum(start + CHUNK, V)
    full = start + (stop - start) // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    logits_ptr += _row_offset(index, inner, stride_outer, stride_inner)
    grad_ptr += _row_offset(index, inner, grad_stride_outer, grad_stride_inner)
    token, partition = tl.load(token_ptr + index), tl.load(partition_ptr + index)
    scale, up = _scale_of(scale_ptr, index), tl.load(up_ptr + index).to(tl.float32)
    turn, entropy = up, up
    still = up == 0.0
    if ENTROPY:
        turn, entropy = tl.load(turn_ptr + index).to(tl.float32), tl.load(entropy_ptr + index)
        still = still & (turn == 0.0)
    outside = (token < 0) | (token >= V)
    if still | outside | (token == ignore_index) | (partition != partition):
        # Nothing to read: a masked token's row is only written.
        for tile in tl.range(start, full, BLOCK):
            tl.store(grad_ptr + tile + lanes, tl.zeros([BLOCK], grad_ptr.dtype.element_ty))
        tl.store(grad_ptr + full + lanes, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=full + lanes < stop)
    else:
        # The log-partition in two parts, the first in the logits' own units: x - top is then exact where it matters.
        top = (partition / scale).to(tl.float32)
        rest = (partition - top.to(tl.float64) * scale).to(tl.float32)
        # Of a confident row's token 1 - p is all that is left: to its digits.
        log_prob = tl.load(log_prob_ptr + index).to(tl.float64)
        p = tl.exp(log_prob)
        at_token = ((1.0 - p) * up).to(tl.float32)
        if ENTROPY:
            at_token -= (p * (tl.maximum(log_prob, FLOOR) + entropy) * turn).to(tl.float32)
        scalars = (top, rest, scale, up, turn, entropy, at_token)
        for tile in tl.range(start, full, BLOCK):
            x = tl.load(logits_ptr + tile + lanes).to(tl.float32)
            _store_tile(x, tile + lanes, token, scalars, grad_ptr, None, ENTROPY)
        mask = full + lanes < stop
        x = tl.load(logits_ptr + full + lanes, mask=mask, other=0.0).to(tl.float32)
        _store_tile(x, full + lanes, token, scalars, grad_ptr, mask, ENTROPY)


def _packed(*tensors: Tensor | None) -> bool:
    """Whether 16-bit rows [outer, inner, V] can be read as 32-bit words: each starts on a multiple of 4 bytes."""
    for x in tensors:
        if x is not None and (x.element_size() != 2 or x.data_ptr() % 4 or x.stride(0) % 2 or x.stride(1) % 2):
            return False
    return True


def _strides(rows: Tensor) -> tuple[int, int]:
    """Of [outer, inner, V]; a dimension of one row has the other's, so that its length compiles nothing anew."""
    outer, inner = rows.stride()[:2]
    return (inner if rows.shape[0] == 1 else outer), (outer if rows.shape[1] == 1 else inner)


def token_logprobs(models: Sequence[Model], targets: Targets, entropy: bool) -> TokenLogprobs:
    """log-probabilities [M, N], entropies [M, N] (float32) and log-partitions [M, N] (float64); M is 1 or 2."""
    model, other = models[0], models[-1]
    (outer, inner, vocab), device = model.logits.shape, model.logits.device
    n, count = outer * inner, len(models)
    log_probs = torch.zeros(count, n, dtype=torch.float32, device=device)  # ignored rows keep the 0
    entropies = torch.zeros(count, n, dtype=torch.float32, device=device) if entropy else None
    partitions = torch.zeros(count, n, dtype=torch.float64, device=device)
    if n:
        shape = launch.logprob_shape(_device(device)[0], model.logits.dtype)
        second, strides = ((None, None), (0, 0)) if count == 1 else (other, _strides(other.logits))
        logprob_kernel[(count * n,)](
            model.logits, second[0], targets.tokens, model.inverse_temperature, second[1],
            log_probs, entropies, partitions,
            n, vocab, inner, *_strides(model.logits), *strides, targets.ignore_index,
            H=shape.half, CHUNK=shape.chunk, UNROLL=shape.unroll, PACKED=_packed(model.logits, other.logits),
            num_warps=shape.num_warps, **shape.limit,
        )  # fmt: skip
    return TokenLogprobs(log_probs, entropies, partitions)


def logprobs_backward(
    logits: Tensor,
    tokens: Tensor,
    inverse_temperature: Tensor | None,
    log_probs: Tensor,
    partitions: Tensor,
    entropies: Tensor | None,
    grad_log_probs: Tensor,
    grad_entropies: Tensor | None,
    ignore_index: int,
    out: Tensor,
) -> None:
    """The gradient in the logits [outer, inner, V] into ``out``, which may be the logits; the others are [N]."""
    outer, inner, vocab = logits.shape
    if out.numel():
        shape = launch.shape(_device(logits.device)[0], logits.dtype)
        chunks = triton.cdiv(vocab, shape.chunk)
        logprob_gradient_kernel[(outer * inner * chunks,)](
            logits, tokens, inverse_temperature, log_probs, partitions, entropies, grad_log_probs, grad_entropies, out,
            vocab, inner, *_strides(logits), *_strides(out), ignore_index, chunks,
            BLOCK=2 * shape.half, CHUNK=shape.chunk, num_warps=shape.num_warps,
        )  # fmt: skip
