"""Answers that a model in training draws to prompts, with the engine that serves worlds.

On the CPU the model itself draws; on CUDA a bf16 copy in the fused form, into which the weights are copied
before each round, so that recorded graphs stay good.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from emuworld import pictures
from emuworld.cache_pool import CachedModel, CachePool
from emuworld.context import Context
from emuworld.decoding.autoregressive import finish
from emuworld.decoding.sampling import Sampling
from emuworld.manifest import Manifest
from emuworld.model.fused import fused
from emuworld.model.transformer import Transformer
from emuworld.segments import SegmentWriter
from emuworld.state import FINGERPRINT_BYTES, WorldState, block_codes, image_blocks
from emuworld.tokens.sequence import parse_answer, prompt_ids
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.token_ids import TokenIds
from emuworld.tokens.vision import VisionTokenizer
from emuworld.training import reading
from emuworld.training.rewards import Answer

_FINGERPRINT = bytes(FINGERPRINT_BYTES)  # worlds of a round live no longer than its weights
_WORDLESS = ("t2i", "x2i", "explore")  # what is drawn first in these modes is a picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked: words, codes [h, w] of reference pictures, the commands of an answer's steps (none: the
    model writes them, `steps` of them), and what a reward may want to know besides. ValueError for a truth of
    text in pictures that is of no use.
    """

    mode: str
    text: str
    codes: tuple[np.ndarray, ...] = ()
    commands: tuple[str, ...] = ()
    steps: int = 1
    truth: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        reading.wanted(mode=self.mode, prompt=self.text, truth=self.truth)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """An answer's ids behind its prompt's, and which of them were drawn (True), not given or forced."""

    prompt_ids: TokenIds
    answer_ids: TokenIds
    drawn: np.ndarray  # [len(answer_ids)] bool
    answer: Answer


class Drawer:
    """Draws answers with the weights that a transformer has at the time.

    `apart`: with a copy in the fused form; None: on CUDA.
    """

    def __init__(
        self,
        policy: Transformer,
        *,
        vision: VisionTokenizer,
        tokenizer: TextTokenizer,
        manifest: Manifest,
        size_px: int,
        apart: bool | None = None,
    ) -> None:
        self._policy, self._vision, self._tokenizer, self._manifest = policy, vision, tokenizer, manifest
        self._size = (size_px, size_px)
        on_cuda = policy.device.type == "cuda"
        self._copy = copy.deepcopy(policy) if (on_cuda if apart is None else apart) else None
        if self._copy is not None and on_cuda:
            self._copy.to(torch.bfloat16)
        self._engine: CachedModel = policy if self._copy is None else fused(self._copy)
        self._caches = CachePool(self._engine)
        context = Context(
            manifest=manifest,
            tokenizer=tokenizer,
            fingerprint=_FINGERPRINT,
            max_tokens=policy.config.max_position_embeddings,
        )
        self._writer = SegmentWriter(self._engine, context=context, caches=self._caches)
        self._seen: dict[
            int, tuple[Prompt, tuple[np.ndarray, ...]]
        ] = {}  # with the prompt: its id stays taken

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, sampling: Sampling, at_once: int = 128
    ) -> list[Rollout]:
        """An answer for each prompt; `seeds` decide what is drawn."""
        training = self._policy.training
        self._policy.eval()
        if self._copy is not None:
            for mine, theirs in zip(self._copy.parameters(), self._policy.parameters(), strict=True):
                mine.copy_(theirs)
        self._caches.forget()
        drawn: list[Rollout] = []
        for start in range(0, len(prompts), at_once):
            part = slice(start, start + at_once)
            drawn += self._together(prompts[part], seeds[part], sampling)
        self._policy.train(training)
        return drawn

    def _together(self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling) -> list[Rollout]:
        states = [self._begin(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        drawn: list[list[bool]] = [[] for _ in prompts]
        for step in range(max(len(p.commands) or p.steps for p in prompts)):
            going = [
                i
                for i, p in enumerate(prompts)
                if step < (len(p.commands) or p.steps) and not states[i].ended
            ]
            plans = [
                self._writer.plan(states[i], _text(prompts[i], step, states[i]), sampling) for i in going
            ]
            for i, plan, written in zip(
                going, plans, finish(self._writer.write(plans)) if plans else (), strict=True
            ):
                ended = parse_answer(written.ids, tokenizer=self._tokenizer).ended
                drawn[i] += self._chosen(written.ids, len(plan.forced))
                states[i] = plan.state.after(
                    written.ids, size=plan.state.size, ended=ended or plan.state.mode in ("t2i", "x2i")
                )
        return self._rollouts(prompts, states, drawn)

    def _begin(self, prompt: Prompt, seed: int) -> WorldState:
        ids = prompt_ids(prompt.mode, question=prompt.text, images=prompt.codes, tokenizer=self._tokenizer)
        return WorldState(
            mode=prompt.mode,
            prompt_ids=TokenIds(ids),
            answer_ids=TokenIds(),
            seed=seed,
            step=0,
            size=self._size,
            ended=False,
            fingerprint=_FINGERPRINT,
        )

    def _chosen(self, ids: Sequence[int], num_forced: int) -> list[bool]:
        """Which ids the model chose: codes, and words and what ends them; not a picture's frame and size."""
        vocabulary = self._manifest.vocabulary
        chosen, inside = [], False
        for at, token in enumerate(ids):
            opens = token == vocabulary.boi
            free = vocabulary.is_visual(token) or (not inside and token != vocabulary.eos)
            chosen.append(at >= num_forced and free)
            inside = (inside or opens) and token != vocabulary.eoi
        return chosen

    def _rollouts(
        self, prompts: Sequence[Prompt], states: Sequence[WorldState], drawn: Sequence[list[bool]]
    ) -> list[Rollout]:
        vocabulary = self._manifest.vocabulary
        grids = [
            [block_codes(block, vocabulary) for block in image_blocks(state.answer_ids, vocabulary)]
            for state in states
        ]
        shown = iter(self._decoded([grid for of_one in grids for grid in of_one]))
        references = self._references(prompts)
        rollouts = []
        for prompt, state, chosen, own in zip(prompts, states, drawn, grids, strict=True):
            parsed = parse_answer(state.answer_ids, tokenizer=self._tokenizer)
            answer = Answer(
                mode=prompt.mode,
                prompt=prompt.text,
                references=references[id(prompt)],
                pictures=tuple(next(shown) for _ in own),
                texts=tuple(segment.text for segment in parsed),
                truth=prompt.truth,
            )
            rollouts.append(
                Rollout(
                    prompt_ids=state.prompt_ids,
                    answer_ids=state.answer_ids,
                    drawn=np.array(chosen, dtype=bool),
                    answer=answer,
                )
            )
        return rollouts

    def _decoded(self, grids: Sequence[np.ndarray]) -> list[np.ndarray]:
        return pictures.decode(self._vision, grids, device=self._policy.device)

    def _references(self, prompts: Sequence[Prompt]) -> dict[int, tuple[np.ndarray, ...]]:
        """The reference pictures of each prompt as the model sees them, by the prompt's identity; kept,
        because prompts are few and come again."""
        new = {id(p): p for p in prompts if id(p) not in self._seen}
        shown = iter(self._decoded([grid for p in new.values() for grid in p.codes]))
        for key, prompt in new.items():
            self._seen[key] = prompt, tuple(next(shown) for _ in prompt.codes)
        return {id(p): self._seen[id(p)][1] for p in prompts}


def _text(prompt: Prompt, step: int, state: WorldState) -> str | None:
    if prompt.commands:
        return prompt.commands[step]
    return "" if prompt.mode in _WORDLESS and not state.answer_ids else None
