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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from emuworld import pictures
from emuworld.cache_pool import CachePool
from emuworld.checkpoint_folder import Located, Parts, check_weights, find_device, locate, signature
from emuworld.context import Context
from emuworld.decoding.autoregressive import StepCallback, finish
from emuworld.decoding.request import Stop
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.events import Event, ImageDone, ImageDraft, ImageRow, SegmentDone, TextPiece, ThoughtPiece
from emuworld.following import follow, writer_and_caches
from emuworld.pictures import Codes, Pixels
from emuworld.running_batch import Imagined, RunningBatch
from emuworld.state import ContextFull, Segment, SnapshotError, WorldState, block_codes, image_blocks
from emuworld.stream import stream, words_of
from emuworld.tokens.sequence import MODES, prompt_ids
from emuworld.tokens.token_ids import TokenIds

__all__ = [
    "ContextFull",
    "Event",
    "ImageDone",
    "ImageDraft",
    "ImageRow",
    "Imagined",
    "RunningBatch",
    "Sampling",
    "Segment",
    "SegmentDone",
    "SnapshotError",
    "Stop",
    "TextPiece",
    "ThoughtPiece",
    "Truncation",
    "WorldModel",
    "WorldState",
    "load",
]


class WorldModel:
    """A checkpoint, opened. One handle serves any number of worlds; copies of it share its weights.

    Args:
        parts: the checkpoint.
        reopen: gives this handle in another process, where it is pickled to; None = it cannot be pickled.
        cache_bytes: bound of the key-value caches that are kept for branching; see `CachePool`.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        reopen: Callable[[], WorldModel] | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.folder = parts.folder
        self.manifest = parts.manifest_here
        self.tokenizer, self.fingerprint = parts.tokenizer, parts.fingerprint
        self._transformer = parts.transformer
        self._vision = parts.vision
        self._reopen = reopen
        self._lock = threading.RLock()
        self._context = Context(
            manifest=self.manifest,
            tokenizer=parts.tokenizer,
            fingerprint=parts.fingerprint,
            max_tokens=parts.transformer.config.max_position_embeddings,
        )
        self._writer, self._caches = writer_and_caches(
            parts.transformer, context=self._context, cache_bytes=cache_bytes, painter=parts.painter
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
        images: Iterable[Pixels | Codes] = (),
        seed: int = 0,
        size: tuple[int, int] | str | None = None,
    ) -> WorldState:
        """A new world: its prompt, and nothing imagined yet.

        Args:
            mode: one of `emuworld.tokens.sequence.MODES`, trained for (`manifest.modes`) or not.
            prompt: any text; control tokens in it stay text. `emuworld.questions` puts what vla, explore and
                howto ask into the words that the published model has learnt.
            images: reference pictures, uint8 [H, W, 3], or their codes, int64 [H/16, W/16]. A checkpoint
                with a size of its own sees them stretched to the world's; any other sees each at its own
                ratio, resized to the mode's area (1024 x 1024 pixels in t2i and x2i, 720 x 720 elsewhere).
            seed: 0 .. 2**64 - 1.
            size: height and width in pixels of every picture, or a name: "16:9" and the other ratios of
                `emuworld.pictures.ASPECTS`, "default", or "auto": the model chooses. None: the checkpoint's
                own size; where it has none, that of the reference picture if there is just one, else the
                model chooses.

        Raises:
            ValueError: something is not as above.
            ContextFull: the prompt leaves no room for a picture.
        """
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is unknown: choose one of {', '.join(MODES)}")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a str, got {type(prompt).__name__}")
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be an integer in 0..2**64 - 1, got {seed!r}")
        asked = self.picture_size(size, mode=mode)
        references = [
            pictures.reference(image, size=asked, mode=mode, manifest=self.manifest) for image in images
        ]
        if size is None and asked is None and len(references) == 1:
            asked = pictures.reference_size(references[0], manifest=self.manifest)
        codes = [
            image if pictures.is_codes(image) else self.encode([pictures.checked(image)])[0]
            for image in references
        ]
        state = WorldState(
            mode=mode,
            prompt_ids=TokenIds(prompt_ids(mode, question=prompt, images=codes, tokenizer=self.tokenizer)),
            answer_ids=TokenIds(),
            seed=int(seed),
            step=0,
            size=asked,
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
        sampling: Sampling | Sequence[Sampling | None] | None = None,
        on_step: StepCallback | None = None,
    ) -> list[tuple[WorldState, Segment]]:
        """The next segment of each state, together: cheaper than one by one, and equal to it.

        Args:
            states: any states of this model, equal ones too (branches); modes, lengths and sizes may differ.
            texts: for each state the segment's text, word for word ("" too), behind which a picture is drawn;
                or None: the model writes the text itself, and then draws or ends its answer.
            sampling: settings for all, or one for each; default: the checkpoint's for each state's mode.
            on_step: called after every step with tokens written and expected.

        Returns:
            New states and segments, in the order of `states`. In t2i and x2i the first picture is the answer:
            nothing follows it. An answer that runs into a limit is closed there (`ended`, no image), and
            `stop_reason` names the limit.

        Raises:
            ContextFull: no room for a text that was given and a picture (`fits` tells beforehand). Nothing
                has been computed then.
            ValueError: an ended state, a text that is no str; SnapshotError: a state of another model, or a
                broken one.
        """
        plans = self._writer.plan_all(states, texts, sampling)
        if not plans:
            return []
        with self._lock, torch.inference_mode():
            begun, on_drawn = pictures.while_drawn(self._vision, device=self.device)
            written = finish(self._writer.write(plans, on_step, on_drawn=on_drawn))
            return self._writer.read_all(plans, written, decode=self._decoding, begun=begun, ahead=True)

    def stream(
        self, state: WorldState, text: str | None = None, *, sampling: Sampling | None = None
    ) -> Iterator[Event]:
        """The next segment, told while it is imagined: text as it is written, a picture row by row, or pass
        by pass where it is drawn at once (its rows then come together, after the last pass).

        The last event is `SegmentDone` with what `imagine` gives for the same arguments, token for token. The
        model is free between two events: other worlds may be imagined meanwhile, and whoever has heard enough
        stops listening. Arguments and errors are those of `imagine`; errors come at the call.
        """
        return stream(
            self._writer.plan(state, text, sampling),
            writer=self._writer,
            tokenizer=self.tokenizer,
            decode=self._decoding,
            lock=self._lock,
        )

    def imagine_words(
        self, state: WorldState, *, sampling: Sampling | None = None, temperature: float | None = None
    ) -> str | None:
        """The words with which `imagine` would go on from here, token for token, and no picture: a tenth of
        its time. None where it would draw none, because the answer is over. Errors are those of `imagine`.

        With `temperature` the words are drawn with it, from all that may follow: other and bolder ones, to be
        given to `imagine`.
        """
        if temperature is not None:
            sampling = sampling or self.default_sampling(state.mode)
            sampling = replace(sampling, text=Truncation(temperature=temperature))
        return words_of(self.stream(state, sampling=sampling))

    def running_batch(self, num_worlds: int = 8, *, on_step: StepCallback | None = None) -> RunningBatch[Any]:
        """A batch of so many worlds that others join as soon as one is done: for many segments of unequal
        length, and for worlds that go on at their own pace.

            with model.running_batch(32) as batch:
                for name, state in states.items():
                    batch.add(state, name=name)
                for name, state, segment in batch:  # as they are finished
                    if not state.ended:
                        batch.add(state, name=name)
        """
        return RunningBatch(
            self._writer, num_worlds=num_worlds, decode=self._decoding, lock=self._lock, on_step=on_step
        )

    def fits(self, state: WorldState, text: str | None) -> bool:
        """Whether the context has room for this text and a picture (None: a picture and one word)."""
        num_text_tokens = self._context.text_tokens(text)
        return not state.ended and self._context.free_tokens(state, num_text_tokens=num_text_tokens) >= 0

    def last_image(self, state: WorldState) -> Pixels | None:
        """The picture drawn last, else the last reference picture as the model sees it. uint8 [H, W, 3]."""
        codes = self.picture_codes(state)
        return self.decode(codes[-1:])[0] if codes else None

    def picture_codes(self, state: WorldState) -> list[Codes]:
        """Codes int64 [h, w] of every picture of a world: the reference pictures, then those drawn.

        Handed to `begin` they go on into another world without a loss.
        """
        self._context.check(state)
        vocabulary = self.manifest.vocabulary
        return [block_codes(block, vocabulary) for block in image_blocks(state.ids, vocabulary)]

    def picture_size(self, size: tuple[int, int] | str | None, *, mode: str) -> tuple[int, int] | None:
        """Height and width in pixels that `begin` takes this `size` for; None: the model chooses."""
        return pictures.asked_size(size, mode=mode, manifest=self.manifest)

    def encode(self, images: Iterable[Pixels]) -> list[Codes]:
        """Pictures uint8 [H, W, 3], sides multiples of 16 -> codes int64 [H/16, W/16] each."""
        with self._lock:
            return pictures.encode(self._vision, images, device=self.device)

    def decode(self, codes: Iterable[Codes]) -> list[Pixels]:
        """Codes int [h, w] -> pictures uint8 [16 h, 16 w, 3] each."""
        return self._decoding(codes).received()

    def _decoding(self, codes: Iterable[Codes]) -> pictures.ToHost:
        """`decode`, begun."""
        with self._lock:
            return pictures.decoding(self._vision, codes, device=self.device)

    def default_sampling(self, mode: str) -> Sampling:
        """What `imagine` uses in a mode unless told otherwise."""
        return self.manifest.sampling_for(mode)

    def commands(self, mode: str) -> tuple[str, ...]:
        """Commands to sample from in a mode; empty where the checkpoint names none."""
        return self.manifest.commands.get(mode, ())

    def follow(self) -> None:
        """Compute what the leading process asks for, until it ends (`emuworld.following`)."""
        with torch.inference_mode():
            follow(self._writer, self._caches)

    def unlock(self) -> None:
        """Forget who uses the model, and half-written caches: in a forked child other threads are gone."""
        self._lock = threading.RLock()
        self._caches.clear()

    def __copy__(self) -> WorldModel:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> WorldModel:
        return self

    def __reduce__(self) -> tuple[Callable[[], WorldModel], tuple[()]]:
        if self._reopen is None:
            raise TypeError(
                "this model was built in memory; pickle one that emuworld.load opened from a folder"
            )
        return self._reopen, ()


_opened: dict[tuple[Located, torch.device, str, str], tuple[object, WorldModel]] = {}
_opening = threading.Lock()


def _after_fork() -> None:
    """One thread and free locks: the parent's threads are not here, and waiting for them hangs. Gymnasium's
    AsyncVectorEnv forks; results on one thread are the same."""
    global _opening
    _opening = threading.Lock()
    if _opened:
        torch.set_num_threads(1)
    for _, model in _opened.values():
        model.unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def load(
    model: str | os.PathLike[str],
    *,
    vision: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    device: str = "auto",
    weights: str = "bf16",
    cache: str = "bf16",
) -> WorldModel:
    """Open a checkpoint: "small", the one in the package, a folder that training wrote, or a published model.

    Opening the same folders again gives the same handle, unless their files have changed.

    Args:
        model: "small"; a folder with config.json, model.safetensors, vision.json, vision.safetensors,
            text.tiktoken and emuworld.json; or a folder or hub id in the layout of the Emu3.5 release
            (sharded safetensors, model_type "Emu3"), or the same as a Qwen3ForCausalLM; or the folder of an
            adapter, which says what model it belongs to.
        vision, text: folders or hub ids of a published model's tokenizers. Default: looked for inside the
            model's folder, in the folders in it and in those beside it.
        adapter: a folder with a LoRA in PEFT's layout, as fine-tuning writes it, to be added to the weights.
        device: "cpu", "cuda", "cuda:1" ...; "auto" takes CUDA where there is any. On the CPU the transformer
            runs in its exact int8 form, on CUDA in bf16; the vision tokenizer always in fp32.
        weights: of the transformer on CUDA: "bf16", or "fp8": smaller and less accurate (docs/fast.md).
        cache: of keys and values on CUDA: "bf16", or "int8": half the memory, for many pictures at once.

    Raises ValueError for a folder or device that is not there, a file that is missing, damaged or does not
    fit, and too little memory.
    """
    place, checkpoint = find_device(device), locate(model, vision=vision, text=text, adapter=adapter)
    check_weights(weights, place, cache=cache)
    with _opening:
        files = signature(checkpoint.files)
        known = _opened.get((checkpoint, place, weights, cache))
        if known is None or known[0] != files:
            name, vision, text, adapter = checkpoint.names
            parts = {"vision": vision, "text": text, "adapter": adapter}
            again = partial(load, name, **parts, device=device, weights=weights, cache=cache)
            opened = WorldModel(checkpoint.open(place, weights).with_cache(cache), reopen=again)
            known = _opened[checkpoint, place, weights, cache] = (files, opened)
        return known[1]
