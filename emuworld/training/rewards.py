"""Rewards of answers: named terms, each brought to 1..10, weighted, and always told one by one.

A term gives a raw figure to each of a batch of answers (`Term`); `Scale` says which raw figures are worth 1
and 10. Terms that look at pictures with published networks are here, and in `reading.py` those that read
their text; terms that read a simulator's truth, or judge like the evaluation suites, are functions that
`emuworld.tasks.rewards` hands down. A term whose weights or library are missing says so and is left out by
its name: nothing stands in for it.

The paper normalises each reward to [1, 10] and does not say how they are combined; here it is the weighted
mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from emuworld.training import reading

LOWEST, HIGHEST = 1.0, 10.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What is judged: a prompt with its reference pictures, and what the model made of it."""

    mode: str
    prompt: str
    references: tuple[np.ndarray, ...] = ()  # uint8 [H, W, 3] each
    pictures: tuple[np.ndarray, ...] = ()
    texts: tuple[str, ...] = ()
    truth: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what the prompt's line says besides


Term = Callable[[Sequence[Answer]], Sequence[float]]
"""Raw figures, one for each answer; NaN where the term does not apply to it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """A term by its name: raw figures of `low` and below count 1, of `high` and above 10, between them in
    proportion (`high` < `low`: less is better). `model` and `head` are what some terms read.
    """

    name: str
    weight: float = 1.0
    low: float = 0.0
    high: float = 1.0
    model: str = ""  # a folder or hub id that transformers opens
    head: str = ""  # aesthetics: a safetensors file with weight [1, D] and bias [1]

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.low == self.high:
            raise ValueError(
                f"term {self.name}: weight must be above 0 and low differ from high, got {self.weight}, "
                f"{self.low} and {self.high}"
            )

    def scaled(self, raw: Sequence[float]) -> np.ndarray:
        """float64, 1 to 10; NaN stays."""
        share = (np.asarray(raw, dtype=np.float64) - self.low) / (self.high - self.low)
        return LOWEST + (HIGHEST - LOWEST) * np.clip(share, 0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """`total` float64 [N], 1 to 10, and what each term gave by its name (NaN: did not apply)."""

    total: np.ndarray
    terms: Mapping[str, np.ndarray]


Open = Callable[[Scale, torch.device], Term]
"""Makes a term by its settings, on a device. OSError, ValueError or KeyError where it cannot be computed."""


class Blend:
    """The weighted mean of terms.

    Args:
        scales: which terms, and how they count.
        handed_down: what opens terms of the simulator and the suites, by name.

    Attributes:
        left_out: name -> why, of terms that cannot be computed here.

    Raises:
        ValueError: a name that no term has, or none that can be computed.
    """

    def __init__(
        self, scales: Sequence[Scale], *, handed_down: Mapping[str, Open], device: torch.device
    ) -> None:
        self._terms: list[tuple[Scale, Term]] = []
        self.left_out: dict[str, str] = {}
        known = {**_LEARNT, **handed_down, "preservation": lambda scale, device: preservation}
        for scale in scales:
            if scale.name not in known:
                names = ", ".join(sorted(known))
                raise ValueError(f"no reward term is called {scale.name!r}; there are {names}")
            try:
                term = known[scale.name](scale, device)
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
                self.left_out[scale.name] = " ".join(str(error).split())[:300]
                print(f"reward {scale.name} is left out: {self.left_out[scale.name]}", flush=True)
                continue
            self._terms.append((scale, term))
        if not self._terms:
            raise ValueError(f"no reward term is left: {self.left_out or 'rewards is empty'}")

    def __call__(self, answers: Sequence[Answer]) -> Scores:
        """Scores of a batch. An answer to which no term applies gets the lowest score."""
        totals, weights = np.zeros(len(answers)), np.zeros(len(answers))
        terms = {}
        for scale, term in self._terms:
            scores = scale.scaled(term(answers))
            if scores.shape != (len(answers),):
                raise ValueError(f"term {scale.name} gave {scores.shape} figures for {len(answers)} answers")
            applies = ~np.isnan(scores)
            totals += np.where(applies, scores, 0.0) * scale.weight
            weights += applies * scale.weight
            terms[scale.name] = scores
        mean = np.where(weights > 0, totals / np.maximum(weights, 1e-12), LOWEST)
        return Scores(total=mean, terms=terms)


def preservation(answers: Sequence[Answer]) -> list[float]:
    """How much of the last reference picture is as it was, 0 to 1: the share of pixels that changed by less
    than 24 of 255 levels. For edits; more is better up to what the edit must change, so `high` is below 1.
    """
    shares = []
    for answer in answers:
        if not answer.references or not answer.pictures:
            shares.append(math.nan)
            continue
        before, after = answer.references[-1], answer.pictures[-1]
        if before.shape != after.shape:
            before = np.asarray(Image.fromarray(before).resize(after.shape[1::-1]))
        changed = np.abs(before.astype(np.int16) - after.astype(np.int16)).max(axis=2)
        shares.append(float((changed < 24).mean()))
    return shares


class _Pictures:
    """The image half of a CLIP or SigLIP of transformers, or a network of pictures alone such as DINOv2."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        if not scale.model:
            raise ValueError(f"rewards: {scale.name} needs model=, a folder or hub id of transformers")
        offline = Path(scale.model).is_dir()
        self.model = transformers.AutoModel.from_pretrained(scale.model, local_files_only=offline)
        self.model = self.model.to(device).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(scale.model, local_files_only=offline)
        self.device = device

    @torch.no_grad()
    def vectors(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """Unit vectors [N, D] of pictures."""
        inputs = self.processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt")
        look = getattr(self.model, "get_image_features", self.model)  # DINOv2 and ViT have no such half
        return _unit(look(**inputs.to(self.device)))

    @torch.no_grad()
    def word_vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [N, D] of texts, cut where the model can read no more."""
        inputs = self.processor(text=list(texts), return_tensors="pt", padding="max_length", truncation=True)
        return _unit(self.model.get_text_features(**inputs.to(self.device)))


class Alignment:
    """Cosine between the prompt and each picture, by CLIP or SigLIP; the mean over the pictures."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self._clip = _Pictures(scale, device)
        if not hasattr(self._clip.model, "get_text_features"):
            raise ValueError(f"rewards: alignment needs a CLIP or SigLIP; {scale.model} reads no words")

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        def one(answer: Answer) -> float:
            words = self._clip.word_vectors([answer.prompt])
            return float((self._clip.vectors(answer.pictures) @ words.T).mean())

        return [one(answer) if answer.pictures else math.nan for answer in answers]


class Aesthetics:
    """A linear head on CLIP's image vectors, as the LAION predictor is; about 1 to 10 by itself."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self._clip = _Pictures(scale, device)
        if not scale.head:
            raise ValueError("rewards: aesthetics needs head=, a safetensors file with weight and bias")
        tensors = load_file(scale.head)
        self._weight, self._bias = (tensors[name].float().to(device) for name in ("weight", "bias"))

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        def one(answer: Answer) -> float:
            return float((self._clip.vectors(answer.pictures) @ self._weight.T + self._bias).mean())

        return [one(answer) if answer.pictures else math.nan for answer in answers]


class Identity:
    """Cosine between the first reference picture (else the first drawn) and each picture drawn: the least.

    By CLIP's or SigLIP's whole-picture vectors, or by the pooled ones of DINOv2, which was trained to tell
    things apart by looks and not by words.
    """

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self._network = _Pictures(scale, device)

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        def one(answer: Answer) -> float:
            shown = [*answer.references[:1], *answer.pictures]
            if len(shown) < 2:
                return math.nan
            vectors = self._network.vectors(shown)
            return float((vectors[1:] @ vectors[0]).min())

        return [one(answer) for answer in answers]


_LEARNT: dict[str, Open] = {
    "alignment": Alignment,
    "aesthetics": Aesthetics,
    "identity": Identity,
    "ocr": reading.Ocr,
    "layout": reading.Layout,
}


def _unit(found: Any) -> torch.Tensor:
    vectors = found if isinstance(found, torch.Tensor) else getattr(found, "pooler_output", None)
    if vectors is None:
        raise ValueError(
            "rewards: this model gives no one vector for a picture; take a CLIP, a SigLIP or a DINOv2"
        )
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
