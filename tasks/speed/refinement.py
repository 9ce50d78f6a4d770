"""A guided picture that is drawn at once (`decoding.dida`): a pass over it, and all its passes, on the clock.

Any weights will do: noise costs what a picture costs. No words, no vision decoder.

Shapes: T tokens of a picture.
"""

import itertools
import time
from collections.abc import Callable

import torch

from emuworld.cache_pool import CachedModel
from emuworld.decoding.dida import Painter, Picture
from emuworld.decoding.noise import Noise
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.decoding.uniforms import TokenUniforms
from emuworld.tasks import step_times
from emuworld.tasks.run_log import Figures
from emuworld.tokens.vocabulary import Vocabulary

PROMPT_TOKENS = 64  # before the picture, in both of its rows


def refining(model: CachedModel, *, side: int) -> Callable[[], torch.Tensor]:
    """One pass over both rows of a picture, whose tokens see each other both ways, without its draw."""
    num_tokens = side * (side + 1)
    held = (PROMPT_TOKENS, PROMPT_TOKENS)
    cache = step_times.filled_cache(model, num_rows=2, held=held, room=num_tokens)
    ids_2T = torch.randint(0, model.config.vocab_size, (2, num_tokens), device=model.device)
    return lambda: model(ids_2T, cache=cache, advance_B=(False, False), causal=False)


@torch.inference_mode()
def passes(model: CachedModel, *, side: int, times: int) -> Figures:
    """Milliseconds of such a pass; one is not counted."""
    work = refining(model, side=side)
    return step_times.spread(step_times.timed(work, times=times, device=model.device, warm_ups=1))


@torch.inference_mode()
def painted(
    model: CachedModel,
    *,
    vocabulary: Vocabulary,
    side: int,
    num_passes: int,
    guidance: float,
    top_k: int,
    seed: int,
    guided_until: float = 1.0,
    runs: int = 1,
) -> Figures:
    """Seconds of a picture, with its draws, and of its passes; the last of the runs. `guided_until` as in
    `Sampling`; 1: every pass is guided.
    """
    painter = Painter(
        model, vocabulary=vocabulary, noise=Noise(), codebook_KE=torch.zeros(vocabulary.num_visual_tokens, 1)
    )
    picture = Picture(
        rows=(0, 1),
        size=(side, side),
        index=0,
        uniforms=TokenUniforms(seed=seed, step=0),
        sampling=Sampling(
            image=Truncation(top_k=top_k), guidance=guidance, passes=num_passes, guided_until=guided_until
        ),
    )
    held = (PROMPT_TOKENS, PROMPT_TOKENS)
    cache = step_times.filled_cache(model, num_rows=2, held=held, room=side * (side + 1))
    for _ in range(runs):
        ends_s = [time.perf_counter()]
        for _ in painter.paint(cache, [picture]):  # codes come to the host: it has waited
            ends_s.append(time.perf_counter())
    passes_ms = [1e3 * (after - before) for before, after in itertools.pairwise(ends_s)]
    return {"total_s": round(ends_s[-1] - ends_s[0], 3), "a_pass": step_times.spread(passes_ms)}
