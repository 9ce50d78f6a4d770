"""What attention over a cache has in common, whatever the cache's numbers are: what a program works on, and
a running softmax. `kernels` and `int8_attention` call it from theirs. And how keys of 16 bits are read.

Import it only where Triton is installed.
"""

import triton
import triton.language as tl


@triton.jit
def own_work(
    starts_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_groups: tl.constexpr,
    repeats: tl.constexpr,
    queries: tl.constexpr,
    parts: tl.constexpr,
    causal: tl.constexpr,
    block: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """This program's pair of a row and a key-value head, its part of the keys, that row and head, its
    queries (token by token, in a token head by head), the first of the row's keys that it reads, the
    one behind its last, and of each query the last key that it sees, or that one. Blocks of queries of one
    pair run side by side, so that all but the first find its keys in the GPU's cache.
    """
    pair = tl.program_id(1)
    part = tl.program_id(2)
    row = pair // num_groups
    group = pair % num_groups
    start = tl.load(starts_ptr + row)
    query = tl.program_id(0) * queries + tl.arange(0, queries)
    num_keys = start + num_tokens
    last_seen = start + query // repeats
    if causal:  # what no query of this block sees is not read
        num_keys = tl.minimum(num_keys, start + ((tl.program_id(0) + 1) * queries - 1) // repeats + 1)
    else:
        last_seen = last_seen * 0 + num_keys
    keys_a_part = tl.cdiv(tl.cdiv(num_keys, parts), block) * block
    first = part * keys_a_part
    return pair, part, row, group, query, first, tl.minimum(first + keys_a_part, num_keys), last_seen


@triton.jit
def softened(
    scores: tl.tensor, scale: tl.tensor, maximum: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Probabilities [queries, keys] (base 2) of scores times `scale`, not yet divided by their sum; what
    those of the keys before are to be multiplied by; and the maximum so far, which the next call takes.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # -inf - -inf is nan
    # One instruction scales a score and takes the base away.
    return tl.exp2(scores * scale - base[:, None]), tl.exp2(maximum - base), new_maximum


@triton.jit
def read_keys(
    q: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    last_seen: tl.tensor,
    log2_scale: tl.tensor,
    maximum: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    block: tl.constexpr,
    masked: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The running softmax goes on over the keys from `first` to before `last`. Not `masked`: these are whole
    blocks, and every query sees them.
    """
    head_dim: tl.constexpr = q.shape[1]
    at = tl.arange(0, head_dim)
    for key in range(first, last, block):
        keys = key + tl.arange(0, block)
        kv_at = keys[:, None] * head_dim + at[None, :]
        if masked:
            there = keys < last
            k = tl.load(k_ptr + kv_at, mask=there[:, None], other=0.0)
            v = tl.load(v_ptr + kv_at, mask=there[:, None], other=0.0)
        else:
            k = tl.load(k_ptr + kv_at)
            v = tl.load(v_ptr + kv_at)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if masked:
            scores = tl.where(there[None, :] & (keys[None, :] <= last_seen[:, None]), scores, float("-inf"))
        p, shrink, maximum = softened(scores, log2_scale, maximum)
        weight = weight * shrink + tl.sum(p, axis=1)
        total = total * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return maximum, weight, total
