"""Pictures drawn at once: every code starts as noise and is refined in a few passes (Emu3.5's DiDA).

Text is written token by token (`autoregressive`), which comes here when a picture is next. The picture's
block, IMG and all its codes, goes through the model as a whole: its tokens see what their row of the cache
holds, and each other both ways; then they are forgotten. As in decoding token by token, what is computed at a
token is the scores of the next one, so a model adapted from one that draws token by token begins with what it
knows. Which codes are kept after a pass is said by `Sampling.resample`:

- "confidence": the share of codes that the path has right at the next time is kept, those first of which the
  model is surest; all others are corrupted again.
- "jump": each code jumps to the model's draw, or stays, with the path's probability (discrete flow matching).

After the last pass every code is the model's draw. Nothing here knows prompts, worlds or pixels.

Sources: Emu3.5 (arXiv 2510.26583), section on DiDA, figure 9; URSA (arXiv 2510.24717). What they leave open,
and what was chosen: docs/fast.md.

Shapes: P pictures, R cache rows, T = h (w + 1) tokens of a block (IMG, the codes, EOL between rows), N = h w
codes, V codes of the vocabulary, D hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emuworld.decoding.cache_rows import index_tensor, rides_along, tokens_at_once
from emuworld.decoding.language_model import LanguageModel
from emuworld.decoding.noise import MetricPath, Noise, Path, make_path, noisy_ids
from emuworld.decoding.sampling import Sampling, pick_and_rate
from emuworld.decoding.uniforms import TokenUniforms
from emuworld.model.cache import StaticCache
from emuworld.staging import Arriving, moved
from emuworld.tokens.vocabulary import Vocabulary

_SCORES_AT_ONCE = 64 << 20  # positions times codes of one row: 256 MiB of fp32
# Tokens of one forward on a CPU: more of them are no faster, and what lies between the matrices grows.
_TOKENS_AT_ONCE = 512
_MIXED_TOKENS = 2048  # of a picture, up to which rows of unequal lengths share a forward on a GPU
_DRAWS_A_PASS = 3  # of uniform numbers for every code: the model's draw, whether it stays, what it becomes


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """One picture to draw.

    Attributes:
        rows: its rows of the cache: conditional, unguided, blind, as many as its sampling needs. They hold
            everything before IMG.
        size: height and width in codes.
        index: which picture of its step it is, for the random numbers.
    """

    rows: Sequence[int]
    size: tuple[int, int]
    index: int
    uniforms: TokenUniforms
    sampling: Sampling


class Draft(NamedTuple):
    """A picture after a pass: its place among those asked for, the model's draw of every code int64 [h, w],
    passes done and in all."""

    picture: int
    codes: NDArray[np.int64]
    done: int
    num_passes: int


OnDrawn = Callable[[Sequence[int], Tensor], None]
"""Gets places and the codes int64 [P, h, w] of the pictures there, on the device: those of a GPU may still be
at work, so that what is to be done with them can be launched at once."""


class Painter:
    """A model that draws pictures at once.

    Args:
        model: weights that were adapted to it; the cache they read may be written by others.
        noise: what they were trained with.
        codebook_KE: the vision tokenizer's vectors, for the metric path.
        caution: what whoever draws with it should know; "" for nothing.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        vocabulary: Vocabulary,
        noise: Noise,
        codebook_KE: Tensor,
        caution: str = "",
    ) -> None:
        self.caution = caution
        self.model = model
        self.vocabulary = vocabulary
        self.noise = noise
        self.path: Path = make_path(noise, codebook_KE=codebook_KE.to(model.device))

    def paint(
        self, cache: StaticCache, pictures: Sequence[Picture], *, on_drawn: OnDrawn | None = None
    ) -> Generator[list[Draft], None, list[NDArray[np.int64]]]:
        """Draw the pictures, alike ones together; rows of the cache keep their lengths. `on_drawn` is called
        with pictures whose last pass has begun.

        Yields:
            After every pass, the drafts of the pictures that took part in it.

        Returns:
            The codes [h, w] of each.
        """
        if self.caution:
            warnings.warn(self.caution, stacklevel=2)
        longest = max((picture.size[0] * (picture.size[1] + 1) for picture in pictures), default=0)
        cache.reserve(int(cache.lengths.max()) + longest)
        groups: dict[tuple[tuple[int, int], Sampling, int], list[int]] = {}
        for place, picture in enumerate(pictures):
            groups.setdefault((picture.size, picture.sampling, len(picture.rows)), []).append(place)
        canvases = [
            _Canvas(self, [pictures[place] for place in places], places=places) for places in groups.values()
        ]
        codes: dict[int, NDArray[np.int64]] = {}
        passes: list[list[_Pass]] = []  # that are not told yet
        most = max((canvas.num_passes for canvas in canvases), default=0)
        for at in range(most):
            passes.append([canvas.refine(cache, at) for canvas in canvases if at < canvas.num_passes])
            for one in passes[-1]:
                if on_drawn is not None and one.done == one.num_passes:
                    on_drawn(one.places, one.drawn_Phw)
            # A GPU works at a pass while the one before is told.
            ahead = at + 1 < most and rides_along(self.model.device)
            while len(passes) > ahead:
                drafts = [draft for one in passes.pop(0) for draft in one.drafts()]
                codes |= {draft.picture: draft.codes for draft in drafts}
                yield drafts
        return [codes[place] for place in range(len(pictures))]


class _Pass(NamedTuple):
    """The model's draw of every code of some pictures in a pass, on the device and on its way to the host."""

    drawn_Phw: Tensor
    arriving: Arriving
    places: Sequence[int]
    done: int
    num_passes: int

    def drafts(self) -> list[Draft]:
        pairs = zip(self.places, self.arriving.numpy(), strict=True)
        return [Draft(place, codes_hw, self.done, self.num_passes) for place, codes_hw in pairs]


class _Canvas:
    """Pictures of one size and one sampling, refined together."""

    def __init__(self, painter: Painter, pictures: Sequence[Picture], *, places: Sequence[int]) -> None:
        self._painter = painter
        self._pictures = pictures
        self._places = places
        self._sampling = pictures[0].sampling
        self.num_passes = self._sampling.passes
        self._times = painter.noise.grid(self.num_passes)
        height, width = pictures[0].size
        self._ids_T = torch.full((height * (width + 1),), painter.vocabulary.eol)
        self._ids_T[0] = painter.vocabulary.img
        # The code of row r and column c stands behind r (w + 1) + c, and is predicted there.
        before_N = torch.arange(height)[:, None] * (width + 1) + torch.arange(width)
        self._before_N = moved(before_N.flatten(), painter.model.device)
        self._ids_T = moved(self._ids_T, painter.model.device)
        like_PN = self._before_N.expand(len(pictures), -1)
        self._codes_PN = painter.path.start(partial(self._uniforms, 0), like=like_PN)

    def refine(self, cache: StaticCache, done: int) -> _Pass:
        """One pass."""
        now, then = self._times[done], self._times[done + 1]
        # The first pass is always guided: it is what decides what is drawn.
        guided = done == 0 or now < self._sampling.guided_until
        hiddens_PND = self._hidden(cache, num_rows=len(self._pictures[0].rows) if guided else 1)
        # Made while a GPU computes those.
        drawn_PN = self._uniforms(1 + _DRAWS_A_PASS * done)
        clean_PN, sure_PN = self._predict(hiddens_PND, drawn_PN)
        drawn_Phw = clean_PN.view(-1, *self._pictures[0].size)
        one = _Pass(drawn_Phw, Arriving(drawn_Phw), self._places, done + 1, self.num_passes)
        path = self._painter.path
        if then >= 1.0:
            self._codes_PN = clean_PN
            return one
        kept, changed = (partial(self._uniforms, 2 + _DRAWS_A_PASS * done + k) for k in range(2))
        if self._sampling.resample == "jump":
            codes_N = path.step(
                self._codes_PN.flatten(),
                clean_PN.flatten(),
                now=now,
                then=then,
                kept_N=kept().flatten(),
                drawn_N=changed().flatten(),
            )
            self._codes_PN = codes_N.view_as(clean_PN)
        else:
            noisy_PN = self._corrupted(clean_PN, then, changed)
            self._codes_PN = torch.where(_surest(sure_PN, share=then), clean_PN, noisy_PN)
        return one

    def _corrupted(self, clean_PN: Tensor, time: float, drawn: Callable[[], Tensor]) -> Tensor:
        """What a code looks like that is not right at this time."""
        path = self._painter.path
        if not isinstance(path, MetricPath):  # those that are right are counted already
            return path.start(drawn, like=clean_PN)
        drawn_N = drawn().flatten()
        times_N = torch.full_like(drawn_N, time, dtype=torch.float32)
        codes_N = path.corrupt(clean_PN.flatten(), times_N, kept_N=drawn_N, drawn_N=drawn_N)
        return codes_N.view_as(clean_PN)

    def _uniforms(self, draw: int) -> Tensor:
        """float64 [P, N] on the device."""
        height, width = self._pictures[0].size
        numbers_PN = np.stack([p.uniforms.grid(p.index, draw, height * width) for p in self._pictures])
        return moved(torch.from_numpy(numbers_PN), self._painter.model.device)

    def _predict(self, hiddens_PND: Sequence[Tensor], uniforms_PN: Tensor) -> tuple[Tensor, Tensor]:
        """The model's draw of every code [P, N], and how likely it was."""
        vocabulary, model = self._painter.vocabulary, self._painter.model
        sampling, num_codes = self._sampling, vocabulary.num_visual_tokens
        parts: list[tuple[Tensor, Tensor]] = []
        size = max(1, _SCORES_AT_ONCE // num_codes)
        flat = [hidden_PND.flatten(0, 1).split(size) for hidden_PND in hiddens_PND]
        for *chunks_ND, uniforms_N in zip(*flat, uniforms_PN.flatten().split(size), strict=True):
            rows_NV = [
                model.logits(chunk_ND, start=vocabulary.visual_start, stop=vocabulary.visual_stop)
                for chunk_ND in chunks_ND
            ]
            parts.append(
                pick_and_rate(
                    rows_NV,
                    uniforms_N,
                    truncation=sampling.image,
                    guidance=sampling.guidance,
                    image_guidance=sampling.image_guidance,
                )
            )
        codes_N, sure_N = (torch.cat(part) for part in zip(*parts, strict=True))
        return codes_N.view_as(uniforms_PN), sure_N.view_as(uniforms_PN)

    def _hidden(self, cache: StaticCache, *, num_rows: int) -> list[Tensor]:
        """[P, N, D] of each of the first kinds of rows, where the codes are predicted."""
        ids_PT = self._ids_T.repeat(len(self._pictures), 1)
        ids_PT[:, self._before_N + 1] = noisy_ids(self._codes_PN, self._painter.vocabulary)
        picture_of = {row: at for at, p in enumerate(self._pictures) for row in p.rows[:num_rows]}
        lengths = cache.lengths
        groups: dict[int, list[int]] = {}
        # Rows of any lengths; on the CPU no row may hang on others, and large pictures are work enough alone.
        together = rides_along(ids_PT.device) and ids_PT.shape[1] <= _MIXED_TOKENS
        for row in sorted(picture_of):
            groups.setdefault(0 if together else int(lengths[row]), []).append(row)
        place_of = {row: at for at, row in enumerate(row for group in groups.values() for row in group)}
        # Nothing between two passes may wait for the device: it would stand still while the next is launched.
        ids_RT = ids_PT[index_tensor([picture_of[row] for row in place_of], ids_PT.device)]
        parts: list[Tensor] = []
        on_cpu = ids_PT.device.type == "cpu"
        most_tokens = _TOKENS_AT_ONCE if on_cpu else tokens_at_once(cache.config)
        most = max(1, most_tokens // ids_PT.shape[1])
        for rows in (group[at : at + most] for group in groups.values() for at in range(0, len(group), most)):
            first = place_of[rows[0]]
            hidden_RTD = self._painter.model(
                ids_RT[first : first + len(rows)],
                cache=cache.rows(rows),
                advance_B=[False] * len(rows),
                causal=False,
            )
            parts.append(hidden_RTD[:, self._before_N])
        hidden_RND = torch.cat(parts)
        kinds = ([place_of[p.rows[rank]] for p in self._pictures] for rank in range(num_rows))
        return [hidden_RND[index_tensor(places, ids_PT.device)] for places in kinds]


def _surest(sure_PN: Tensor, *, share: float) -> Tensor:
    """True for the given share of each picture's codes, those with the highest values; ties go by place."""
    count = round(share * sure_PN.shape[1])
    order_PN = sure_PN.argsort(dim=-1, descending=True, stable=True)
    kept_PN = torch.zeros_like(sure_PN, dtype=torch.bool)
    return kept_PN.scatter_(1, order_PN[:, :count], True)
