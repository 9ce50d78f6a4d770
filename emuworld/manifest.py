"""What a checkpoint folder says of itself in `emuworld.json`: ids, sizes, sampling defaults, modes and
commands.

Training writes it, `emuworld.world_model` reads it; the weights' own shapes are in `config.json` and
`vision.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from emuworld.decoding.grammar import SizeBounds
from emuworld.decoding.noise import Noise
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.files import write_text
from emuworld.tokens.sequence import MODES
from emuworld.tokens.vision import DOWNSAMPLE
from emuworld.tokens.vocabulary import EMU35, Vocabulary

FILE_NAME = "emuworld.json"
_FORMAT = 1
# Thoughts before an answer and a picture, and the text itself. The release has no such bound but the context.
_PUBLISHED_TEXT_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `emuworld.json`.

    Attributes:
        vocabulary: the table of ids.
        default_size: height and width in pixels of what `begin` makes unless told otherwise; None lets the
            model choose.
        smallest_side, largest_side: bounds of image sides in pixels, multiples of 16.
        max_text_tokens: words that the model may write in one segment before its answer is closed.
        sampling: settings for each mode; a mode without any gets `Sampling()`.
        modes: the modes that the checkpoint was trained for; `begin` takes every mode.
        commands: commands to sample from, for each mode that has some.
        dida: the noise with which the checkpoint learnt to draw a picture at once; None: it has not. The
            settings in `sampling` say whether it does so unless told otherwise.
        gpu_sampling: settings for a mode on a GPU, in place of those in `sampling`: a few passes are faster
            than token by token there and slower on a CPU.
    """

    vocabulary: Vocabulary
    default_size: tuple[int, int] | None = (256, 256)
    smallest_side: int = 128
    largest_side: int = 512
    max_text_tokens: int = 512
    sampling: Mapping[str, Sampling] = field(default_factory=dict)
    modes: tuple[str, ...] = MODES
    commands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dida: Noise | None = None
    gpu_sampling: Mapping[str, Sampling] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = {*self.modes, *self.sampling, *self.commands, *self.gpu_sampling} - set(MODES)
        if unknown or not self.modes:
            raise ValueError(
                f"modes {sorted(unknown)} are unknown; choose among {', '.join(MODES)}, at least one"
            )
        low, high = self.smallest_side, self.largest_side
        if any(type(side) is not int or side % DOWNSAMPLE for side in (low, high)) or not 0 < low <= high:
            raise ValueError(f"sides must be multiples of {DOWNSAMPLE}, small to large, got {low}..{high}")
        if self.default_size is not None:
            self.check_size(self.default_size)
        if self.max_text_tokens < 1:
            raise ValueError(f"max_text_tokens must be at least 1, got {self.max_text_tokens}")
        for sampling in (*self.sampling.values(), *self.gpu_sampling.values()):
            self.check_sampling(sampling)

    @cached_property
    def bounds(self) -> SizeBounds:
        """Sides in visual tokens."""
        return SizeBounds(smallest=self.smallest_side // DOWNSAMPLE, largest=self.largest_side // DOWNSAMPLE)

    def check_size(self, size: tuple[int, int]) -> None:
        """ValueError unless both sides (pixels) are multiples of 16 within the bounds."""
        low, high = self.smallest_side, self.largest_side
        if len(size) != 2 or any(side % DOWNSAMPLE or not low <= side <= high for side in size):
            raise ValueError(
                f"size {size} does not work: height and width must be multiples of {DOWNSAMPLE} "
                f"in {low}..{high} pixels"
            )

    def check_sampling(self, sampling: Sampling) -> None:
        """ValueError for settings that this checkpoint has not learnt."""
        if sampling.passes and self.dida is None:
            raise ValueError(
                f"passes={sampling.passes} draws pictures at once, which this checkpoint has not learnt (its "
                f"{FILE_NAME} has no dida): use passes=0, or adapt it with 'emuworld train stage=dida'"
            )

    def sampling_for(self, mode: str) -> Sampling:
        return self.sampling.get(mode) or Sampling()

    def for_device(self, kind: str) -> Manifest:
        """With the sampling of such a device ("cpu", "cuda") alone."""
        own = {} if kind == "cpu" else self.gpu_sampling
        return replace(self, sampling={**self.sampling, **own}, gpu_sampling={})

    def to_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "vocabulary": self.vocabulary.to_json(),
            "default_size": None if self.default_size is None else list(self.default_size),
            "smallest_side": self.smallest_side,
            "largest_side": self.largest_side,
            "max_text_tokens": self.max_text_tokens,
            "sampling": _told(self.sampling),
            "modes": list(self.modes),
            "commands": {mode: list(commands) for mode, commands in self.commands.items()},
            **({} if self.dida is None else {"dida": self.dida.to_json()}),
            **({"gpu_sampling": _told(self.gpu_sampling)} if self.gpu_sampling else {}),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Manifest:
        """Read what `to_json` gave. ValueError for another format and for unknown or missing names."""
        fields = dict(fields)
        if fields.pop("format", None) != _FORMAT:
            raise ValueError(f"{FILE_NAME} has no format {_FORMAT}; write it with Manifest.save")
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown or "vocabulary" not in fields:
            raise ValueError(
                f"{FILE_NAME} must hold a vocabulary and no unknown names, "
                f"got {sorted(unknown) or sorted(fields)}"
            )
        readers: dict[str, Callable[[Any], Any]] = {
            "vocabulary": Vocabulary.from_json,
            "default_size": lambda size: size if size is None else tuple(size),
            "sampling": _read,
            "gpu_sampling": _read,
            "modes": tuple,
            "commands": lambda modes: {mode: tuple(value) for mode, value in modes.items()},
            "dida": lambda noise: None if noise is None else Noise.from_json(noise),
        }
        return cls(**{name: readers.get(name, lambda value: value)(value) for name, value in fields.items()})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `emuworld.json` beside and rename it."""
        write_text(Path(folder) / FILE_NAME, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        path = Path(folder) / FILE_NAME
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}); give a folder that training wrote") from error
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} does not describe a checkpoint: {error}") from error


def _told(sampling: Mapping[str, Sampling]) -> dict[str, Any]:
    return {mode: one.to_json() for mode, one in sampling.items()}


def _read(modes: Mapping[str, Any]) -> dict[str, Sampling]:
    return {mode: Sampling.from_json(fields) for mode, fields in modes.items()}


def published(name: str) -> Manifest:
    """What the Emu3.5 release leaves unsaid in its folders: ids, sizes, and the sampling of its
    configurations (fact sheet, sections 2, 4.4 and 5.2).

    `name` is the checkpoint's: one with "Image" in it, as "Emu3.5-Image", draws from words with guidance 5,
    others with 2. For `vla` the release has no settings; those of `howto` stand in.
    """
    plain, guided = Truncation(top_k=1024, top_p=0.9), Truncation(top_k=200, top_p=0.8, temperature=0.7)
    one_picture, many_pictures = Truncation(top_k=5120), Truncation(top_k=10_240)
    howto = Sampling(text=guided, image=many_pictures, guidance=3.0)
    return Manifest(
        vocabulary=EMU35,
        default_size=None,
        smallest_side=128,
        largest_side=2048,
        max_text_tokens=_PUBLISHED_TEXT_TOKENS,
        sampling={
            "t2i": Sampling(text=plain, image=one_picture, guidance=5.0 if "image" in name.lower() else 2.0),
            "x2i": Sampling(text=plain, image=one_picture, guidance=3.0),
            "howto": howto,
            "story": Sampling(text=plain, image=many_pictures, guidance=3.0),
            "explore": Sampling(
                text=Truncation(top_k=200, top_p=0.5, temperature=0.7), image=one_picture, guidance=3.0
            ),
            "vla": howto,
        },
    )
