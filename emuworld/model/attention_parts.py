"""What attention over a cache has in common, whatever the cache's numbers are: the keys of a program, and a
running softmax. `kernels` and `int8_attention` call it from theirs.

Import it only where Triton is installed.
"""

import triton
import triton.language as tl


@triton.jit
def own_keys(
    start: tl.tensor,
    part: tl.tensor,
    query: tl.tensor,
    num_tokens: tl.tensor,
    repeats: tl.constexpr,
    queries: tl.constexpr,
    parts: tl.constexpr,
    causal: tl.constexpr,
    block: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The first of its row's keys that this program reads, the one behind its last, and of each of its
    queries the last key that it sees, or that one. Queries come token by token, in a token head by head.
    """
    num_keys = start + num_tokens
    last_seen = start + query // repeats
    if causal:  # what no query of this block sees is not read
        num_keys = tl.minimum(num_keys, start + ((tl.program_id(2) + 1) * queries - 1) // repeats + 1)
    else:
        last_seen = last_seen * 0 + num_keys
    keys_a_part = tl.cdiv(tl.cdiv(num_keys, parts), block) * block
    first = part * keys_a_part
    return first, tl.minimum(first + keys_a_part, num_keys), last_seen


@triton.jit
def softened(scores: tl.tensor, maximum: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Probabilities [queries, keys] (base 2), not yet divided by their sum; what those of the keys before are
    to be multiplied by; and the maximum so far, which the next call takes.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # -inf - -inf is nan
    return tl.exp2(scores - base[:, None]), tl.exp2(maximum - base), new_maximum
