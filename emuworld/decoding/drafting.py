"""Several tokens of a picture a pass, without training and without changing what is drawn.

A pass costs little more for sixteen tokens than for one wherever reading the weights is what costs. So the
next places of a picture go through the model together, filled with guesses (Jacobi decoding): what the model
says behind the first is certain, what it says behind the second holds if the first guess came true, and so
on. The guesses that come true are kept with the token behind them, the keys and values of the others are
taken back, and what was drawn behind wrong guesses is guessed next time.

How often guesses come true hangs on how tokens are drawn. Every place has its own exponential numbers, one
for each id, which stay from pass to pass, and the token is the winner of a race between the ids (`sampling.
race`). So a token is a function of the tokens before it and of the numbers at its place. Token by token that
is an exact draw; with guesses it is the same function of the same arguments, so the window changes how many
passes a picture takes and nothing else: not the distribution, and not even the tokens, but for the rounding
of a pass over another number of tokens.

Sources: the window over a picture is from speculative Jacobi decoding (Teng et al., arXiv 2410.01699), which
accepts and redraws by the ratio of probabilities instead; common random numbers in its place are from
drafter-invariant speculative decoding (Daliri et al., arXiv 2408.07978). Guesses for places that were never
drawn repeat the token to the left; what else was tried is in docs/log.md.

Shapes: W worlds, R their cache rows, T tokens of a pass, N = W T, D hidden size, V visual ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from emuworld.decoding.request import Progress
from emuworld.decoding.sampling import Truncation, favour, guide, race
from emuworld.tokens.vocabulary import Vocabulary

# SplitMix64 (Steele et al. 2014): its increment and the multipliers of its output function.
_GAMMA, _MIX_1, _MIX_2 = (
    constant - (1 << 64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
Logits = Callable[[Tensor], Tensor]
"""Hidden states [N, D] -> scores of the visual ids [N, V]."""


class WindowRows(Protocol):
    """Cache rows that take tokens and give them back."""

    def read(self, rows: list[int], ids_RT: Tensor) -> Tensor:
        """Put T tokens into each of these rows, ascending; hidden states [R, T, D]."""

    def take_back(self, rows: Sequence[int], num_tokens: int) -> None:
        """Forget the last tokens of these rows."""

    def has_room(self, rows: Sequence[int], num_tokens: int) -> bool:
        """Whether so many more tokens fit as the cache is."""


class Drafter:
    """Draws through windows, a pass a call.

    Args:
        rows: the cache rows of all worlds; `layout` says which belong to which world.
        logits: the model's scores of the visual ids.
        pads: let every pass have the whole window, also where a picture has fewer places left: one shape, one
            CUDA graph. On the CPU it is only more work.
    """

    def __init__(
        self,
        rows: WindowRows,
        logits: Logits,
        *,
        layout: Sequence[Sequence[int]],
        vocabulary: Vocabulary,
        device: torch.device,
        pads: bool,
    ) -> None:
        self._rows = rows
        self._logits = logits
        self._layout = layout
        self._vocabulary = vocabulary
        self._device = device
        self._pads = pads
        self._pictures: dict[int, _Picture] = {}

    def step(self, worlds: Mapping[int, Progress], members: Sequence[int]) -> None:
        """One pass for each of these worlds, those with equal windows and settings together.

        Everything before the token that is written last must be in the cache.
        """
        groups: dict[_Kind, list[int]] = {}
        for i in members:
            groups.setdefault(self._kind(worlds[i], i), []).append(i)
        for kind, group in groups.items():
            self._pass(kind, worlds, group)

    def _kind(self, world: Progress, i: int) -> _Kind:
        request = world.request
        sampling, num_tokens = request.sampling, request.sampling.draft_window
        if not (self._pads and self._rows.has_room(self._layout[i], num_tokens)):
            num_tokens = min(num_tokens, _num_places(world))
        num_tokens = max(num_tokens, len(world.pending))  # a token and the EOL behind it are read together
        scales = (sampling.guidance, sampling.image_guidance)[: request.num_rows - 1]
        stay = sampling.stay if request.before is not None else 0.0
        return _Kind(num_tokens, sampling.image, scales, stay)

    def _pass(self, kind: _Kind, worlds: Mapping[int, Progress], members: Sequence[int]) -> None:
        num_tokens = kind.num_tokens
        pictures = [self._picture(worlds[i], i) for i in members]
        fed_WT = [picture.fed(num_tokens) for picture in pictures]
        rows = [self._layout[i][rank] for rank in range(1 + len(kind.scales)) for i in members]
        ids_RT = torch.tensor(fed_WT, device=self._device).repeat(1 + len(kind.scales), 1)
        noise_NV = torch.cat([picture.noise(num_tokens) for picture in pictures])  # queued before the pass
        scores_NV = self._scores(self._rows.read(rows, ids_RT), kind)
        if kind.stay:
            stays = [code for picture in pictures for code in picture.stays(num_tokens)]
            scores_NV = favour(scores_NV, torch.tensor(stays, device=self._device), amount=kind.stay)
        drawn_N = race(scores_NV, noise_NV, truncation=kind.truncation) + self._vocabulary.visual_start
        drawn_WT = drawn_N.view(len(members), num_tokens).tolist()
        for i, picture, fed_T, drawn_T in zip(members, pictures, fed_WT, drawn_WT, strict=True):
            num_read = picture.take(fed_T, drawn_T)
            self._rows.take_back(self._layout[i], num_tokens - num_read)

    def _scores(self, hidden_RTD: Tensor, kind: _Kind) -> Tensor:
        scores = self._logits(hidden_RTD.flatten(0, 1)).float()
        if not kind.scales:
            return scores
        guidance, image_guidance = (*kind.scales, 1.0)[:2]
        ranks_NV = scores.chunk(1 + len(kind.scales))
        return guide(*ranks_NV, guidance=guidance, image_guidance=image_guidance)

    def _picture(self, world: Progress, i: int) -> _Picture:
        """What is known of the picture that a world draws; a new one begins with nothing."""
        if world.state.position == 0 or i not in self._pictures:
            self._pictures[i] = _Picture(world, vocabulary=self._vocabulary, device=self._device)
        return self._pictures[i]


class _Kind(NamedTuple):
    """What worlds must have in common to go through the model together: tokens of the pass, how they are
    drawn, guidance and image guidance where there are rows for them, and what codes that stay get."""

    num_tokens: int
    truncation: Truncation
    scales: tuple[float, ...]
    stay: float


def _first_place(world: Progress) -> int:
    """The place behind the first token that the next pass reads, counted from IMG."""
    return world.state.position - len(world.pending) + 1


def _num_places(world: Progress) -> int:
    """Places from `_first_place` on that are left in the picture, its EOI apart."""
    state = world.state
    return state.height * (state.width + 1) - 1 - _first_place(world)


class _Picture:
    """One picture on its way: the tokens guessed and the numbers drawn for the places ahead."""

    def __init__(self, world: Progress, *, vocabulary: Vocabulary, device: torch.device) -> None:
        self._world = world
        self._vocabulary = vocabulary
        self._device = device
        self._guesses: list[int] = []  # for the places from the world's position on
        self._numbers: dict[int, Tensor] = {}  # exponential numbers [V] of places

    def fed(self, num_tokens: int) -> list[int]:
        """What the next pass reads: what is certain and not yet read, then guesses."""
        state, vocabulary = self._world.state, self._vocabulary
        known = self._world.pending
        guesses = self._guesses[: num_tokens - len(known)]
        for place in range(state.position + len(guesses), _first_place(self._world) + num_tokens - 1):
            if self._separates(place):
                guesses.append(vocabulary.eol)
            else:
                known_or_guessed = (*self._world.ids[-2:], *guesses[-2:])
                visual = [token for token in known_or_guessed if vocabulary.is_visual(token)]
                guesses.append(visual[-1] if visual else vocabulary.visual_start)
        return [*known, *guesses]

    def noise(self, num_tokens: int) -> Tensor:
        """Exponential numbers [T, V] of the places behind what the next pass reads."""
        first = _first_place(self._world)
        places = range(first, first + num_tokens)
        missing = [place for place in places if place not in self._numbers]
        uniforms, index = self._world.request.uniforms, self._world.state.num_images
        keys = [uniforms.image_key(index, place) for place in missing]
        rows = exponentials(keys, num_ids=self._vocabulary.num_visual_tokens, device=self._device)
        self._numbers |= zip(missing, rows, strict=True)
        self._numbers = {place: self._numbers[place] for place in places}
        return torch.stack(list(self._numbers.values()))

    def stays(self, num_tokens: int) -> list[int]:
        """What `Sampling.stay` favours at the places behind what the next pass reads, codes or -1."""
        first = _first_place(self._world)
        return self._world.stays(range(first, first + num_tokens))

    def take(self, fed_T: Sequence[int], drawn_T: Sequence[int]) -> int:
        """Write what came true; how many of the tokens read stay in the cache."""
        first, world = _first_place(self._world), self._world
        drawn_T = [
            self._vocabulary.eol if self._separates(first + k) else token for k, token in enumerate(drawn_T)
        ]
        begin, end = len(world.pending) - 1, _num_places(world)
        last = begin
        while last + 1 < min(len(fed_T), end) and fed_T[last + 1] == drawn_T[last]:
            last += 1
        world.write(drawn_T[begin : last + 1])
        # An EOL behind the last token has been written with it.
        self._guesses = list(drawn_T[world.state.position - first :]) if world.drafts else []
        return last + 1

    def _separates(self, place: int) -> bool:
        width = self._world.state.width
        return place % (width + 1) == width


def exponentials(keys: Sequence[int], *, num_ids: int, device: torch.device) -> Tensor:
    """Standard exponential numbers fp32 [keys, ids], positive: the same on every device but for the last bit.

    Number v of a key (64 bits) is output v + 1 of SplitMix64 from there: a counter-based generator, so
    nothing is remembered and nothing is shared.
    """
    signed = [key - (1 << 64) if key >> 63 else key for key in keys]
    states_N1 = torch.tensor(signed, dtype=torch.int64, device=device)[:, None]
    z_NV = states_N1 + torch.arange(1, num_ids + 1, device=device) * _GAMMA
    z_NV = (z_NV ^ _shifted(z_NV, 30)) * _MIX_1
    z_NV = (z_NV ^ _shifted(z_NV, 27)) * _MIX_2
    z_NV = z_NV ^ _shifted(z_NV, 31)
    # 52 bits and a half: never 0 and never 1, both exactly representable in double precision.
    uniforms_NV = (_shifted(z_NV, 12).double() + 0.5) * 2.0**-52
    return uniforms_NV.log_().neg_().float()


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: int64 has the arithmetic one."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
