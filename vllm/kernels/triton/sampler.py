"""Sampling of all codebooks and the streams' next state: one program per row and codebook.

The CUDA source of ``vllm.kernels.sampler``. What is correct is defined by ``v1.sample`` and
``CodebookState``; nothing here knows a request.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm.kernels.sampler import StreamMemory

__all__ = ["sample_frames", "sample_frames_kernel"]

_NUM_WARPS = 4  # each thread then holds 16 weights of a codebook of 1,026

# Columns of the counters, as CodebookState has them.
_NUM_FRAMES = tl.constexpr(0)
_EOS_TURN = tl.constexpr(1)
_EOS_LAG = tl.constexpr(2)
_FRAME_LIMIT = tl.constexpr(3)
_EOS_ALLOWED = tl.constexpr(4)
_ANY_ALLOWED = tl.constexpr(5)
_NUM_COUNTERS = tl.constexpr(6)

# Columns of the settings, as sampler.DeviceSampler has them.
_TEMPERATURE = tl.constexpr(0)
_TOP_P = tl.constexpr(1)
_TOP_K = tl.constexpr(2)
_RAS_WINDOW = tl.constexpr(3)
_RAS_REPEATS = tl.constexpr(4)
_RAS_BLOCKS = tl.constexpr(5)
_SEED_LOW = tl.constexpr(6)
_SEED_HIGH = tl.constexpr(7)
_NUM_SETTINGS = tl.constexpr(8)

_WINDOW = tl.constexpr(64)  # MAX_RAS_WINDOW: frames in the ring
_ONE_BITS = tl.constexpr(0x3F800000)  # of 1.0, the largest weight
_MASKED = tl.constexpr(float("-inf"))
_IDLE = tl.constexpr(-1)
# Finish codes, FrameStatus.
_STOPPED = tl.constexpr(1)
_LIMIT = tl.constexpr(2)
# An arrival counts 1, one with EOS this much more.
_EOS_ARRIVAL = tl.constexpr(1 << 16)
_NUM_ARRIVALS_MASK = tl.constexpr((1 << 16) - 1)
_DRAW = tl.constexpr(0)  # Purpose.DRAW
_RAS_REDRAW = tl.constexpr(1)  # Purpose.RAS_REDRAW


def sample_frames(
    logits: Tensor,
    rows: Tensor,
    settings: Tensor,
    streams: StreamMemory,
    arrivals: Tensor,
    positions: Tensor,
    results: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Enqueue the kernel; see ``sampler.DeviceSampler``, which owns most of the arguments."""
    num_rows, num_codebooks, codebook_size = logits.shape
    sample_frames_kernel[(num_codebooks, num_rows)](
        *(logits, rows, settings, streams.last_frame, streams.counters, streams.history),
        *(arrivals, positions, results),
        NUM_CODEBOOKS=num_codebooks,
        CODEBOOK_SIZE=codebook_size,
        BLOCK=triton.next_power_of_2(codebook_size),
        BOS=streams.bos,
        EOS=streams.eos,
        PDL=pdl,
        num_warps=_NUM_WARPS,
        launch_pdl=pdl,
    )


@triton.jit
def sample_frames_kernel(
    logits_ptr,  # [num_rows, NUM_CODEBOOKS, CODEBOOK_SIZE]
    rows_ptr,  # int [num_rows], negative for padding
    settings_ptr,  # int32 [max_num_rows, 8]
    last_frame_ptr,  # int64 [max_num_rows, NUM_CODEBOOKS]
    counters_ptr,  # int64 [max_num_rows, 6]
    history_ptr,  # int16 [max_num_rows, 64, NUM_CODEBOOKS]
    arrivals_ptr,  # int32 [max_num_rows]
    positions_ptr,  # int64 [max_num_rows]
    results_ptr,  # int16 [num_rows, NUM_CODEBOOKS + 1]
    NUM_CODEBOOKS: tl.constexpr,
    CODEBOOK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # CODEBOOK_SIZE, rounded up to a power of two
    BOS: tl.constexpr,
    EOS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    codebook = tl.program_id(0)
    index = tl.program_id(1)
    row = tl.load(rows_ptr + index).to(tl.int64)
    result_ptr = results_ptr + index * (NUM_CODEBOOKS + 1)
    is_running = row >= 0
    if is_running:
        is_running = tl.load(arrivals_ptr + row) >= 0
    if not is_running:
        tl.store(result_ptr + codebook, _IDLE)
        tl.store(result_ptr + NUM_CODEBOOKS, _IDLE)
        return

    counter_ptr = counters_ptr + row * _NUM_COUNTERS
    row_history_ptr = history_ptr + row * _WINDOW * NUM_CODEBOOKS + codebook
    frame = tl.load(counter_ptr + _NUM_FRAMES)
    if frame <= codebook:
        code = tl.full((), BOS, tl.int32)
    elif frame - tl.load(counter_ptr + _EOS_TURN) >= codebook:
        code = tl.full((), EOS, tl.int32)
    else:
        code = _sample_code(
            logits_ptr + (index * NUM_CODEBOOKS + codebook) * CODEBOOK_SIZE,
            settings_ptr + row * _NUM_SETTINGS,
            counter_ptr,
            row_history_ptr,
            frame,
            codebook,
            NUM_CODEBOOKS,
            CODEBOOK_SIZE,
            BLOCK,
            BOS,
            EOS,
        )

    is_eos = code == EOS
    is_marker = is_eos | (code == BOS)
    slot = frame & (_WINDOW - 1)
    tl.store(row_history_ptr + slot * NUM_CODEBOOKS, tl.where(is_marker, -1, code))
    tl.store(last_frame_ptr + row * NUM_CODEBOOKS + codebook, code)
    tl.store(result_ptr + codebook, code)
    # The program that arrives last knows by the sum how many codes are EOS, so it need not read
    # what the others wrote. It changes counters, so no warp of any may still have to read them.
    tl.debug_barrier()
    arrival = 1 + tl.where(is_eos, _EOS_ARRIVAL, 0)
    arrivals = tl.atomic_add(arrivals_ptr + row, arrival) + arrival
    if (arrivals & _NUM_ARRIVALS_MASK) == NUM_CODEBOOKS:
        num_eos = arrivals // _EOS_ARRIVAL
        status = _advance_row(
            counter_ptr, arrivals_ptr + row, positions_ptr + row, frame, num_eos, NUM_CODEBOOKS
        )
        tl.store(result_ptr + NUM_CODEBOOKS, status)


@triton.jit
def _sample_code(
    logits_ptr,
    setting_ptr,
    counter_ptr,
    history_ptr,
    frame,
    codebook,
    NUM_CODEBOOKS: tl.constexpr,
    CODEBOOK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BOS: tl.constexpr,
    EOS: tl.constexpr,
):
    """A code that the delay pattern leaves free."""
    code = tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + code, mask=code < CODEBOOK_SIZE, other=_MASKED).to(tl.float32)
    may_start = tl.load(counter_ptr + _ANY_ALLOWED) > 0
    may_end = may_start | ((codebook == 0) & (frame >= tl.load(counter_ptr + _EOS_ALLOWED)))
    logits = tl.where((code == BOS) & (not may_start), _MASKED, logits)
    logits = tl.where((code == EOS) & (not may_end), _MASKED, logits)

    repeats = tl.load(setting_ptr + _RAS_REPEATS)
    window = tl.where(repeats > 0, tl.load(setting_ptr + _RAS_WINDOW), 0)
    blocks = tl.load(setting_ptr + _RAS_BLOCKS) != 0
    past = _past_codes(history_ptr, frame - 1, tl.arange(0, _WINDOW), window, NUM_CODEBOOKS)
    penalised = logits
    if blocks:
        penalised = _mask_repeated(
            logits, past, code, history_ptr, frame - 1, window, repeats, NUM_CODEBOOKS
        )

    temperature = tl.load(setting_ptr + _TEMPERATURE).to(tl.float32, bitcast=True)
    top_p = tl.load(setting_ptr + _TOP_P).to(tl.float32, bitcast=True)
    top_k = tl.load(setting_ptr + _TOP_K)
    if temperature == 0.0:
        drawn = _argmax(penalised, code, BLOCK)
    else:
        weights = _weights(penalised, temperature)
        if (top_k >= 1) & (top_k < CODEBOOK_SIZE):
            weights = _keep_top_k(weights, top_k)
        if top_p < 1.0:
            weights = _keep_top_p(weights, top_p, BLOCK)
        drawn = _draw(weights, _uniform(setting_ptr, frame, codebook, _DRAW), code, BLOCK)

    num_repeats = tl.sum((past == drawn).to(tl.int32), 0)
    if (window > 0) & (not blocks) & (num_repeats >= repeats):
        # From the logits before the temperature, and without filters, as the reference does.
        noise = _uniform(setting_ptr, frame, codebook, _RAS_REDRAW)
        drawn = _draw(_weights(logits, 1.0), noise, code, BLOCK)
    return drawn


@triton.jit
def _past_codes(history_ptr, newest, age, window, NUM_CODEBOOKS: tl.constexpr):
    """A codebook's code of ``age`` frames ago; -1 where nothing counts."""
    slot = (newest - age) & (_WINDOW - 1)
    past = tl.load(history_ptr + slot * NUM_CODEBOOKS, mask=age < window, other=-1)
    return past.to(tl.int32)


@triton.jit
def _mask_repeated(
    logits, past, code, history_ptr, newest, window, repeats, NUM_CODEBOOKS: tl.constexpr
):
    """Mask codes that fill the recent past, unless no code would be left."""
    is_banned = code < 0  # none
    age = 0
    while age < window:
        repeated = _past_codes(history_ptr, newest, age, window, NUM_CODEBOOKS)
        count = tl.sum((past == repeated).to(tl.int32), 0)
        is_banned |= (code == repeated) & (count >= repeats)
        age += 1
    masked = tl.where(is_banned, _MASKED, logits)
    return tl.where(tl.max(masked, 0) == _MASKED, logits, masked)


@triton.jit
def _argmax(logits, code, BLOCK: tl.constexpr):
    """The first of the largest; 0 where logits are not numbers."""
    first = _first_where(logits == tl.max(logits, 0), code, BLOCK)
    return tl.where(first < BLOCK, first, 0)


@triton.jit
def _weights(logits, temperature):
    """Softmax up to a factor: the largest weight is 1, a masked code has 0."""
    top = tl.max(logits, 0) / temperature
    return tl.where(logits == _MASKED, 0.0, tl.exp(logits / temperature - top))


@triton.jit
def _keep_top_k(weights, top_k):
    """Zero what is less likely than the k-th; codes as likely as it stay."""
    # Weights lie in 0 .. 1, so their bit patterns are ordered as they are and can be bisected.
    bits = weights.to(tl.int32, bitcast=True)
    low = 0
    high = _ONE_BITS + 1
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        num = tl.sum((bits >= middle).to(tl.int32), 0)
        low = tl.where(num >= top_k, middle, low)
        high = tl.where(num > top_k, high, tl.where(num == top_k, middle + 1, middle))
    return tl.where(bits >= low, weights, 0.0)


@triton.jit
def _keep_top_p(weights, top_p, BLOCK: tl.constexpr):
    """Keep codes while those more likely hold less than p; equally likely codes stay together."""
    bits = weights.to(tl.int32, bitcast=True)
    enough = top_p * tl.sum(weights, 0)
    # What lies above `low` holds enough, what lies above `high` does not.
    low = -1
    high = _ONE_BITS
    num_above_low = BLOCK
    num_above_high = 0
    while (high - low > 1) & (num_above_low - num_above_high > 1):
        middle = low + ((high - low) >> 1)
        is_above = bits > middle
        num_above = tl.sum(is_above.to(tl.int32), 0)
        is_enough = tl.sum(tl.where(is_above, weights, 0.0), 0) >= enough
        low = tl.where(is_enough, middle, low)
        num_above_low = tl.where(is_enough, num_above, num_above_low)
        high = tl.where(is_enough, high, middle)
        num_above_high = tl.where(is_enough, num_above_high, num_above)
    return tl.where(bits > low, weights, 0.0)


@triton.jit
def _draw(weights, noise, code, BLOCK: tl.constexpr):
    """Inverse of the cumulative distribution at ``noise`` in [0, 1), in the order of the codes."""
    cumulative = tl.cumsum(weights, 0)
    target = tl.max(cumulative, 0) * noise
    is_candidate = weights > 0.0
    first = _first_where((cumulative > target) & is_candidate, code, BLOCK)
    # Where the sums' rounding leaves none, the last candidate; 0 where weights are not numbers.
    last = tl.max(tl.where(is_candidate, code, 0), 0)
    return tl.minimum(first, last)


@triton.jit
def _first_where(condition, code, BLOCK: tl.constexpr):
    return tl.min(tl.where(condition, code, BLOCK), 0)


@triton.jit
def _uniform(setting_ptr, frame, codebook, purpose):
    """The number of ``philox.uniform``, to the bit."""
    low = tl.load(setting_ptr + _SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(setting_ptr + _SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    word, _, _, _ = tl.philox((high << 32) | low, frame.to(tl.int32), codebook, purpose, 0)
    return (word >> 8).to(tl.float32) * (2.0**-24)


@triton.jit
def _advance_row(
    counter_ptr, arrival_ptr, position_ptr, frame, num_eos, NUM_CODEBOOKS: tl.constexpr
):
    """Count the frame in; returns its finish code."""
    turn = frame + tl.load(counter_ptr + _EOS_LAG)
    if (num_eos > 0) & (turn < tl.load(counter_ptr + _EOS_TURN)):
        tl.store(counter_ptr + _EOS_TURN, turn)
    tl.store(counter_ptr + _NUM_FRAMES, frame + 1)
    is_full = frame + 1 >= tl.load(counter_ptr + _FRAME_LIMIT)
    status = tl.where(num_eos == NUM_CODEBOOKS, _STOPPED, tl.where(is_full, _LIMIT, 0))
    tl.store(arrival_ptr, tl.where(status == 0, 0, _IDLE))
    tl.store(position_ptr, tl.where(status == 0, tl.load(position_ptr) + 1, _IDLE))
    return status
