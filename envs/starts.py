"""How imagined worlds begin: the options of a reset, checked; worlds from words, from pictures, from a
painting."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from emuworld.envs.spaces import MAX_COMMAND_LENGTH, is_unicode
from emuworld.world_model import WorldModel, WorldState

Frame = npt.NDArray[np.uint8]  # [H, W, 3]
Picture = npt.NDArray[np.integer[Any]]  # a Frame, or codes int [h, w]

BLANK_GREY = 128  # mid-grey: what t2i shows before the question

_RESET_OPTIONS = ("prompt", "image", "images", "state")
_TOKEN_PX = 16  # a code stands for 16 by 16 pixels
_warned: set[tuple[bytes, str]] = set()  # model and mode: once a process


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A user's pictures as codes, and the last one as the model holds it."""

    codes: tuple[Picture, ...]
    shown: Frame


@dataclass(frozen=True, kw_only=True, eq=False)
class Worlds:
    """Worlds of one mode on one model, whose pictures have one `size` (height, width)."""

    model: WorldModel
    mode: str
    size: tuple[int, int]

    def begin(self, prompt: str, *, seed: int, images: Sequence[Picture] = ()) -> WorldState:
        """A world from words, and from pictures as the model takes them."""
        return self.model.begin(mode=self.mode, prompt=prompt, images=images, seed=seed, size=self.size)

    def from_pictures(self, prompt: str, *, seed: int, pictures: Sequence[Frame]) -> WorldState:
        """A world from a user's pictures of any size.

        The last one is the first observation, so it is brought to its size. Where the model sees reference
        pictures of any size, those before it keep theirs.
        """
        *others, last = self._as_seen(pictures)
        return self.begin(prompt, seed=seed, images=[*others, *self.model.encode([last])])

    def _as_seen(self, pictures: Sequence[Frame]) -> list[Frame]:
        *others, last = pictures
        if self.model.size is not None:
            others = [fit_picture(picture, self.size) for picture in others]
        return [*others, fit_picture(last, self.size)]

    def opened(self, pictures: Sequence[Sequence[Frame]]) -> list[Opened]:
        """What `from_pictures` makes of the pictures of many worlds, encoded and decoded together."""
        seen = [self._as_seen(some) for some in pictures]
        codes = iter(self.model.encode(one for some in seen for one in some))
        codes_of = [[next(codes) for _ in some] for some in seen]
        shown = self.model.decode(some[-1] for some in codes_of)
        return [Opened(codes=tuple(some), shown=last) for some, last in zip(codes_of, shown, strict=True)]

    def painting(self, prompt: str, *, seed: int) -> WorldState:
        """The world of t2i that is to paint the picture from which a world begins; see `from_painting`."""
        height, width = self.size
        blank = np.zeros((height // _TOKEN_PX, width // _TOKEN_PX), dtype=np.int64)
        self.begin(prompt, seed=seed, images=[blank])  # raises before the painting if it would not fit
        return self.model.begin(mode="t2i", prompt=prompt, seed=seed, size=self.size)

    def from_painting(self, prompt: str, *, painting: WorldState) -> WorldState:
        """The world that goes on from the picture that t2i has painted."""
        codes = self.model.picture_codes(painting)[-1:]
        return replace(self.begin(prompt, seed=painting.seed, images=codes), step=painting.step)

    def edit(self, instruction: str, *, world: WorldState) -> WorldState:
        """The question of x2i about a world: about all its reference pictures, and after the first edit about
        the last picture alone. As codes, because every decoding and encoding again would lose something.
        """
        codes = self.model.picture_codes(world)
        codes = codes[-1:] if world.answer_ids else codes
        # Random numbers follow the seed and the step: one seed must not draw every edit alike.
        return replace(self.begin(instruction, seed=world.seed, images=codes), step=world.step)

    def shown(self, world: WorldState) -> Frame:
        """The picture that the world ends with, as the model holds it: decoded from its tokens."""
        frame = self.model.last_image(world)
        return self.blank() if frame is None else frame

    def blank(self) -> Frame:
        return np.full((*self.size, 3), BLANK_GREY, np.uint8)

    def warn_if_untrained(self) -> None:
        """A UserWarning, once a process for each model and mode that it was not trained for."""
        trained, key = self.model.manifest.modes, (self.model.fingerprint, self.mode)
        if self.mode in trained or key in _warned:
            return
        _warned.add(key)
        warnings.warn(
            f"this checkpoint was trained for {', '.join(trained)}, not for {self.mode}: the environment "
            "works, but what it shows means little; use a checkpoint that was trained for this mode",
            UserWarning,
            stacklevel=4,  # reset_turn, the environment's reset, whoever called that
        )


def frame_size(model: WorldModel, size: int | str | Sequence[int] | None, *, mode: str) -> tuple[int, int]:
    """Height and width of the observations. ValueError for what the model cannot draw, and for "auto"."""
    if isinstance(size, int):
        asked: tuple[int, ...] | str = (size, size)
    elif isinstance(size, str):
        asked = size
    elif size is None:
        asked = "default"
    else:
        try:
            asked = tuple(size)  # a list where a spec came from JSON
        except TypeError as error:
            raise ValueError(
                f"size is {size!r}; expected whole pixels, (height, width), or a ratio like '16:9'"
            ) from error
    sides = model.picture_size(asked, mode=mode)  # type: ignore[arg-type]  # checked there
    if sides is None:
        raise ValueError(f"size {size!r} leaves it open, but observations have one size: give it")
    return sides


def checked_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Reset options, `images` always a list of pictures. ValueError for unknown, contradictory or badly typed
    ones."""
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"options is {type(options).__name__}; expected a dict, as {{'prompt': 'a room'}}")
    options = dict(options or {})
    unknown = options.keys() - set(_RESET_OPTIONS)
    if unknown:
        raise ValueError(
            f"unknown reset options {sorted(unknown)}; this environment takes {list(_RESET_OPTIONS)}"
        )
    if "state" in options and len(options) > 1:
        raise ValueError(
            f"options['state'] holds the whole world; leave out {sorted(options.keys() - {'state'})}"
        )
    if "image" in options and "images" in options:
        raise ValueError("give options['image'] (one picture) or options['images'] (a list), not both")
    pictures = [options["image"]] if "image" in options else list(options.get("images", ()))
    prompt = options.get("prompt", "")
    if not isinstance(prompt, str) or not is_unicode(prompt) or len(prompt) > MAX_COMMAND_LENGTH:
        raise ValueError(
            f"options['prompt'] is text of at most {MAX_COMMAND_LENGTH} characters that UTF-8 can write; "
            f"got {type(prompt).__name__} of length {len(prompt) if isinstance(prompt, str) else '-'}"
        )
    return {**options, "images": [_checked_picture(picture) for picture in pictures]}


def fit_picture(picture: Frame, size: tuple[int, int]) -> Frame:
    """A picture of any size, cropped around its centre and scaled to `size` (height, width)."""
    if picture.shape[:2] == size:
        return picture
    height, width = size
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (width, height), Image.Resampling.LANCZOS))


def _checked_picture(picture: Any) -> Frame:
    """A copy, so that a caller's array may change afterwards."""
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"a start picture is uint8 [H, W, 3]; got {array.dtype} {list(array.shape)}. "
            "Convert it with numpy.asarray(image.convert('RGB'))"
        )
    return np.array(array)
