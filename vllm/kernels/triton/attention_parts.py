"""What the attention kernels share: rotation as values are read, and one tile of keys and values.

Device functions, no kernels.
"""

import triton
import triton.language as tl

__all__ = ["fold_tile", "load_rotated", "widened"]


@triton.jit
def load_rotated(x_ptr, cos_ptr, signed_sin_ptr, dim, mask, HEAD_DIM: tl.constexpr):
    """Values at ``dim`` of heads, rotated, as float32.

    The pointers are those of each head and of its position's angles, and broadcast against ``dim``.
    The other half is read again rather than moved between threads: it is in the first-level cache.
    """
    other = (dim + HEAD_DIM // 2) % HEAD_DIM
    cos = tl.load(cos_ptr + dim).to(tl.float32)
    signed_sin = tl.load(signed_sin_ptr + dim).to(tl.float32)
    x = tl.load(x_ptr + dim, mask=mask, other=0.0).to(tl.float32)
    rolled = tl.load(x_ptr + other, mask=mask, other=0.0).to(tl.float32)
    return x * cos + rolled * signed_sin


@triton.jit
def fold_tile(query, keys, values, is_visible, scale, maximum, total, context):
    """Take one tile of keys and values into a softmax that is under way.

    A tile of which a row sees nothing changes no bit of that row, once it has seen something.

    Args:
        query: [R, head_dim].
        keys: [head_dim, TILE], of the query's type.
        values: [TILE, head_dim], likewise.
        is_visible: [R or 1, TILE].
        scale: factor on the scores, times log2(e).
        maximum, total: float32 [R], of the scaled scores and of their powers of two.
        context: float32 [R, head_dim], not yet divided by the total.
    """
    # NOTE: float32 is for exactness; tensor cores would round it to 10 bits.
    scores = tl.dot(query, keys, input_precision="ieee") * scale
    scores = tl.where(is_visible, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    shrink = tl.exp2(maximum - new_maximum)
    weights = tl.exp2(scores - new_maximum[:, None])
    total = total * shrink + tl.sum(weights, 1)
    context = context * shrink[:, None]
    context = tl.dot(weights.to(values.dtype), values, context, input_precision="ieee")
    return new_maximum, total, context


@triton.jit
def widened(x, model: tl.constexpr):
    """Values of a cache in the model's type, exactly."""
    if x.dtype.primitive_bitwidth == 8:
        # NOTE: not in one step, for which Triton has no code on sm_89.
        x = x.to(tl.float32)
    return x.to(model)
