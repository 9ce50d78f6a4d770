"""The facade: begin a world, imagine its next segment. Pure functions over states; caches only add speed.

Contract (CPU): a state, a text and a sampling give the same bytes whatever else runs in the batch, in which
order, after a restore, from a fork and in another process. It rests on the exact form of the transformer
(`emuworld.model.exact`), on caches in canonical form (`emuworld.cache_pool`), on counter-based random numbers
(`emuworld.decoding.uniforms`) and on pictures that are encoded and decoded one by one.

It is no environment: it knows no rewards, episodes or spaces.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emuworld import pictures
from emuworld.cache_pool import CachePool, Ids
from emuworld.checkpoint_folder import BUILTIN, Parts, find, find_device, open_parts, signature
from emuworld.context import Context, in_tokens
from emuworld.decoding.autoregressive import Request, StepCallback, generate
from emuworld.decoding.grammar import Grammar
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.decoding.uniforms import TokenUniforms
from emuworld.pictures import Codes, Pixels
from emuworld.state import ContextFull, Segment, SnapshotError, WorldState, block_codes, image_blocks
from emuworld.tokens.sequence import parse_answer, prompt_ids
from emuworld.tokens.text import TextTokenizer

__all__ = [
    "ContextFull",
    "Sampling",
    "Segment",
    "SnapshotError",
    "Truncation",
    "WorldModel",
    "WorldState",
    "load",
]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One state's next segment: what is forced, how much text the model may write, how it is drawn."""

    state: WorldState
    forced: Ids
    max_text_tokens: int
    sampling: Sampling


class WorldModel:
    """A checkpoint, opened. One handle serves any number of worlds; copies of it share its weights.

    Args:
        parts: the checkpoint.
        reopen: a function and its arguments that give this handle in another process; None = it cannot be
            pickled.
        cache_bytes: bound of the key-value caches that are kept for branching; see `CachePool`.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        reopen: tuple[Callable[..., WorldModel], tuple[str, str]] | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        vocabulary = parts.manifest.vocabulary
        if parts.vision.num_codes != vocabulary.num_visual_tokens:
            raise ValueError(
                f"the vision tokenizer has {parts.vision.num_codes} codes, the vocabulary "
                f"{vocabulary.num_visual_tokens} visual tokens; both must come from one checkpoint"
            )
        self.folder = parts.folder
        self.manifest = parts.manifest
        self.tokenizer = parts.tokenizer
        self.fingerprint = parts.fingerprint
        self._transformer = parts.transformer
        self._vision = parts.vision
        self._reopen = reopen
        self._lock = threading.RLock()
        self._context = Context(
            manifest=parts.manifest,
            tokenizer=parts.tokenizer,
            fingerprint=parts.fingerprint,
            max_tokens=parts.transformer.config.max_position_embeddings,
        )
        self._caches = CachePool(parts.transformer, max_bytes=cache_bytes)
        self._grammar = Grammar(
            vocabulary,
            digit_ids=[_single(parts.tokenizer, digit) for digit in "0123456789"],
            star_id=_single(parts.tokenizer, "*"),
            bounds=parts.manifest.bounds,
        )

    @property
    def max_tokens(self) -> int:
        """Length of the context: prompt and answer together."""
        return self._context.max_tokens

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels of what `begin` makes unless told otherwise; None: the model chooses."""
        return self.manifest.default_size

    @property
    def device(self) -> torch.device:
        return self._transformer.device

    @property
    def caches(self) -> CachePool:
        """The key-value caches, for figures and for giving memory back (`caches.clear()`)."""
        return self._caches

    def begin(
        self,
        *,
        mode: str,
        prompt: str = "",
        images: Iterable[Pixels] = (),
        seed: int = 0,
        size: tuple[int, int] | None = None,
    ) -> WorldState:
        """A new world: its prompt, and nothing imagined yet.

        Args:
            mode: one of `manifest.modes`.
            prompt: any text; control tokens in it stay text.
            images: reference pictures, uint8 [H, W, 3]. Those of another size than the world's are resized to
                it (Lanczos, without keeping the aspect ratio).
            seed: 0 .. 2**64 - 1.
            size: height and width in pixels of every picture. Default: the checkpoint's; where that has none,
                the last reference picture's, rounded to what the model can draw; without one, the model
                chooses.

        Raises:
            ValueError: something is not as above.
            ContextFull: the prompt leaves no room for a picture.
        """
        if mode not in self.manifest.modes:
            raise ValueError(f"mode {mode!r} is not among those this checkpoint knows: {self.manifest.modes}")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a str, got {type(prompt).__name__}")
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be an integer in 0..2**64 - 1, got {seed!r}")
        references = [pictures.checked(image) for image in images]
        size = pictures.choose_size(size, pictures=references, manifest=self.manifest)
        codes = self.encode(pictures.resized(image, size) for image in references) if size else []
        state = WorldState(
            mode=mode,
            prompt_ids=tuple(prompt_ids(mode, question=prompt, images=codes, tokenizer=self.tokenizer)),
            answer_ids=(),
            seed=int(seed),
            step=0,
            size=size,
            ended=False,
            fingerprint=self.fingerprint,
        )
        self._context.require(state)
        return state

    def imagine(
        self,
        state: WorldState,
        text: str | None = None,
        *,
        sampling: Sampling | None = None,
        on_step: StepCallback | None = None,
    ) -> tuple[WorldState, Segment]:
        """The next segment. See `imagine_batch`."""
        return self.imagine_batch([state], [text], sampling=sampling, on_step=on_step)[0]

    def imagine_batch(
        self,
        states: Sequence[WorldState],
        texts: Sequence[str | None],
        *,
        sampling: Sampling | None = None,
        on_step: StepCallback | None = None,
    ) -> list[tuple[WorldState, Segment]]:
        """The next segment of each state, together: cheaper than one by one, and equal to it.

        Args:
            states: any states of this model, equal ones too (branches); modes, lengths and sizes may differ.
            texts: for each state the segment's text, word for word ("" too), behind which a picture is drawn;
                or None: the model writes the text itself, and then draws or ends its answer.
            sampling: settings for all; default: the checkpoint's for each state's mode.
            on_step: called after every step with tokens written and expected.

        Returns:
            New states and segments, in the order of `states`. A text of the model's that fills the context or
            reaches `manifest.max_text_tokens` ends the answer (`ended`, no image).

        Raises:
            ContextFull: no room for another picture (`fits` tells beforehand). Nothing has been computed
                then.
            ValueError: an ended state, a text that is no str; SnapshotError: a state of another model, or a
                broken one.
        """
        if len(states) != len(texts):
            raise ValueError(
                f"got {len(states)} states and {len(texts)} texts; give one text (or None) for each"
            )
        plans = [self._plan(state, text, sampling) for state, text in zip(states, texts, strict=True)]
        groups: dict[Sampling, list[int]] = {}
        for i, plan in enumerate(plans):
            groups.setdefault(plan.sampling, []).append(i)
        results: dict[int, tuple[WorldState, Segment]] = {}
        with self._lock, torch.inference_mode():
            for members in groups.values():
                written = self._write([plans[i] for i in members], on_step)
                for i, ids in zip(members, written, strict=True):
                    results[i] = self._finish(plans[i].state, ids)
        return [results[i] for i in range(len(plans))]

    def fits(self, state: WorldState, text: str | None) -> bool:
        """Whether the context has room for this text and a picture (None: a picture and one word)."""
        num_text_tokens = self._context.text_tokens(text)
        return not state.ended and self._context.free_tokens(state, num_text_tokens=num_text_tokens) >= 0

    def last_image(self, state: WorldState) -> Pixels | None:
        """The picture drawn last, else the last reference picture as the model sees it. uint8 [H, W, 3]."""
        self._context.check(state)
        blocks = image_blocks(state.ids, self.manifest.vocabulary)
        return self.decode([block_codes(blocks[-1], self.manifest.vocabulary)])[0] if blocks else None

    def encode(self, images: Iterable[Pixels]) -> list[Codes]:
        """Pictures uint8 [H, W, 3], sides multiples of 16 -> codes int64 [H/16, W/16] each."""
        with self._lock:
            return pictures.encode(self._vision, images, device=self.device)

    def decode(self, codes: Iterable[Codes]) -> list[Pixels]:
        """Codes int [h, w] -> pictures uint8 [16 h, 16 w, 3] each."""
        with self._lock:
            return pictures.decode(self._vision, codes, device=self.device)

    def default_sampling(self, mode: str) -> Sampling:
        """What `imagine` uses in a mode unless told otherwise."""
        return self.manifest.sampling_for(mode)

    def commands(self, mode: str) -> tuple[str, ...]:
        """Commands to sample from in a mode; empty where the checkpoint names none."""
        return self.manifest.commands.get(mode, ())

    def unlock(self) -> None:
        """Forget who uses the model, and half-written caches: for a forked child, where other threads are
        gone."""
        self._lock = threading.RLock()
        self._caches.clear()

    def __copy__(self) -> WorldModel:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> WorldModel:
        return self

    def __reduce__(self) -> tuple[Callable[..., WorldModel], tuple[Any, ...]]:
        if self._reopen is None:
            raise TypeError(
                "this model was built in memory; pickle one that emuworld.load opened from a folder"
            )
        return self._reopen

    def _plan(self, state: WorldState, text: str | None, sampling: Sampling | None) -> _Plan:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"text must be a str or None, got {type(text).__name__}")
        self._context.check(state)
        if state.ended:
            raise ValueError("this world's answer has ended; begin another, or go back to an earlier state")
        free = self._context.require(state, num_text_tokens=self._context.text_tokens(text))
        forced: Ids = () if text is None else (*self.tokenizer.encode(text), self.manifest.vocabulary.boi)
        return _Plan(
            state=state,
            forced=forced,
            max_text_tokens=min(self.manifest.max_text_tokens, free + 1),
            sampling=sampling or self.default_sampling(state.mode),
        )

    def _write(self, plans: Sequence[_Plan], on_step: StepCallback | None) -> list[list[int]]:
        """The ids of each plan's segment; all plans have one sampling."""
        sampling = plans[0].sampling
        sequences = [self._context.conditional_chunks(plan.state) for plan in plans]
        if sampling.guided:
            sequences += [self._context.unguided_chunks(plan.state) for plan in plans]
        room = max(
            len(plan.forced)
            + (0 if plan.forced else plan.max_text_tokens)
            + self._context.block_tokens(plan.state.size)
            for plan in plans
        )
        cache, hiddens_D = self._caches.prepare(sequences, room=room)
        requests = [
            Request(
                state=self._grammar.start(in_tokens(plan.state.size), first=not plan.state.answer_ids),
                hidden_D=hidden_D,
                uniforms=TokenUniforms(seed=plan.state.seed, step=plan.state.step),
                forced=plan.forced,
                max_text_tokens=plan.max_text_tokens,
            )
            for plan, hidden_D in zip(plans, hiddens_D, strict=False)
        ]
        return generate(
            self._transformer, cache, requests, grammar=self._grammar, sampling=sampling, on_step=on_step
        )

    def _finish(self, state: WorldState, ids: Sequence[int]) -> tuple[WorldState, Segment]:
        """State and segment after the ids of one segment."""
        parsed = parse_answer(ids, tokenizer=self.tokenizer)
        last = parsed.segments[-1] if parsed.segments else None
        codes = last.codes if last else None
        image = self.decode([codes])[0] if codes is not None else None
        thoughts = [t for t in (parsed.thought, last.thought if last else None) if t is not None]
        size = state.size if image is None else image.shape[:2]
        state = replace(
            state, answer_ids=(*state.answer_ids, *ids), step=state.step + 1, size=size, ended=parsed.ended
        )
        return state, Segment(
            text=last.text if last else "",
            image=image,
            thought="\n".join(thoughts) if thoughts else None,
            ended=parsed.ended,
        )


_opened: dict[tuple[Path, torch.device], tuple[object, WorldModel]] = {}
_opening = threading.Lock()


def _after_fork() -> None:
    """One thread and free locks: the parent's threads (OpenMP's too) are not here; waiting for them hangs.

    Gymnasium's AsyncVectorEnv forks. Results on one thread are the same.
    """
    global _opening
    _opening = threading.Lock()
    if _opened:
        torch.set_num_threads(1)
    for _, model in _opened.values():
        model.unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def load(name: str | os.PathLike[str], *, device: str = "auto") -> WorldModel:
    """Open a checkpoint: "small", the one in the package, or a folder that training wrote.

    Opening the same folder again gives the same handle, unless its files have changed.

    Args:
        name: "small" or a folder with config.json, model.safetensors, vision.json, vision.safetensors,
            text.tiktoken and emuworld.json.
        device: "cpu", "cuda", "cuda:1" ...; "auto" takes CUDA where there is any. On the CPU the transformer
            runs in its exact form with int8 weights, on CUDA in bf16; the vision tokenizer always in fp32.

    Raises:
        ValueError: there is no such folder or device, or a file is missing, damaged or does not fit.
    """
    folder, place = find(name), find_device(device)
    with _opening:
        files = signature(folder)
        known = _opened.get((folder, place))
        if known is None or known[0] != files:
            again = str(name) if name in BUILTIN else str(folder)  # a child may work in another directory
            parts = open_parts(folder, device=place)
            model = WorldModel(parts, reopen=(_load_positional, (again, device)))
            known = _opened[folder, place] = (files, model)
        return known[1]


def _load_positional(name: str, device: str) -> WorldModel:
    return load(name, device=device)


def _single(tokenizer: TextTokenizer, text: str) -> int:
    """The one id of a text that must have one: sizes are written with these."""
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise ValueError(
            f"{text!r} must be one token, got {len(ids)}; the text tokenizer does not fit this model"
        )
    return ids[0]
