"""The published sizes with random weights, made on the device: what `bench what=published-34b` drives.

The whole path runs through `WorldModel` over a checkpoint that exists in memory only. Pictures are noise;
shapes, memory and times are those of the release.
"""

import gc
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from emuworld.answers import load_story, save_story, to_story
from emuworld.checkpoint_folder import BUILTIN, Parts
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.manifest import Manifest
from emuworld.model.config import SIZES, sized
from emuworld.model.fused import FusedTransformer
from emuworld.model.transformer import Transformer
from emuworld.pictures import Pixels
from emuworld.state import FINGERPRINT_BYTES
from emuworld.tasks import step_times
from emuworld.tasks.progress import OnProgress
from emuworld.tasks.run_log import Figures, RunLog
from emuworld.tokens.text import TextTokenizer, read_ranks
from emuworld.tokens.vision import DOWNSAMPLE, PUBLISHED, VisionConfig, VisionTokenizer
from emuworld.tokens.vocabulary import EMU35, Vocabulary, builtin
from emuworld.world_model import Segment, WorldModel, WorldState

CLOSING_TOKENS = 48  # words that the model may write behind the last picture before its answer is closed
_VISIONS = {
    "published": PUBLISHED,
    "tiny": VisionConfig(
        patch_px=1, width=32, width_multipliers=(1,) * 5, z_channels=8, embed_dim=8, num_codes=131_072
    ),
}
_PROMPT = "A lighthouse on a cliff above a stormy sea at dusk, oil painting, warm light in its windows."
_QUESTION = "Tell the story of a fox who looks for the sea, in three pictures."
_LINES = (
    "The fox wakes in the forest and hears the gulls.",
    "She follows the river down to the meadows.",
    "At last she stands on the beach and looks at the waves.",
    "The tide brings her a shell, and she takes it home.",
)
_MARGIN = 1.3  # of the time that a part is expected to take, over its steps alone


@dataclass(frozen=True, kw_only=True)
class RandomTransformer:
    """A transformer of the published size with random weights, and how its steps are timed."""

    device: str = "auto"  # auto | cpu | cuda
    size: str = "emu3.5"  # tiny | small | emu3.5: the transformer's shape; the vocabulary stays
    num_layers: int | None = None  # null = as many as the size has
    contexts: tuple[int, ...] = (550, 2100)  # tokens held when steps are timed: the middle of a picture
    steps: int = 30  # steps timed of each kind
    guidance: float = 5.0
    top_k: int = 5120  # of the visual tokens, as published
    seed: int = 0
    budget_s: float = math.inf  # no part is begun that would end later; inf = all are


@dataclass(frozen=True, kw_only=True)
class PublishedSize(RandomTransformer):
    """The same with both tokenizers, beside the published way of decoding."""

    vision: str = "published"  # published | tiny: the vision tokenizer
    text: str = "../shared/data"  # folder of the release's text tokenizer; absent: the built-in one
    published_tokens: int = 12  # tokens timed of the published way

    def __post_init__(self) -> None:
        if self.size not in SIZES or self.vision not in _VISIONS:
            raise ValueError(
                f"size must be one of {', '.join(SIZES)} and vision one of {', '.join(_VISIONS)}, got "
                f"{self.size!r} and {self.vision!r}"
            )


@dataclass(frozen=True, kw_only=True)
class PublishedSpeed(PublishedSize):
    """The published 34 B with random weights: milliseconds a token beside the published way, peak memory, and
    the whole path up to `.pb` files.
    """

    out: str = "outputs/bench/published-34b"  # folder for figures, pictures and .pb files
    pictures: tuple[int, ...] = (32, 64)  # sides in tokens of the pictures drawn from words
    story_side: int = 24  # side in tokens of a story's pictures
    story_pictures: int = 3  # 0 = no story
    rows: tuple[int, ...] = (2, 16)  # cache rows of a step; a guided picture takes two

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.story_pictures <= len(_LINES):
            raise ValueError(f"story_pictures must be 0 to {len(_LINES)}, got {self.story_pictures}")


class Rig:
    """The model with random weights in all its forms, and the parts of the measurement that need it."""

    def __init__(
        self, config: PublishedSize, *, out: Path, device: torch.device, on_progress: OnProgress
    ) -> None:
        self.config = config
        self._out = out
        self._device = device
        self._on_progress = on_progress
        self._tokenizer = text_tokenizer(Path(config.text))
        self._last_picture: Pixels | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        return self._tokenizer.vocabulary

    @property
    def visual(self) -> slice:
        return slice(self.vocabulary.visual_start, self.vocabulary.visual_stop)

    def make(self) -> Figures:
        """Random weights, made and fused on the device."""
        config, device = self.config, self._device
        start_s = time.perf_counter()
        changes = {} if config.num_layers is None else {"num_layers": config.num_layers}
        with torch.device("meta"):
            shape = sized(config.size, vocab_size=EMU35.size, tie_word_embeddings=False, **changes)
            model = Transformer(shape).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.plain = model.to_empty(device=device).eval().requires_grad_(False)
        self.plain.init_weights(torch.Generator(device).manual_seed(config.seed))
        self._wait()
        made_s = time.perf_counter() - start_s
        self.fused = FusedTransformer(self.plain)
        self._wait()
        parameters = list(self.plain.parameters())
        return {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "gb": round(sum(parameter.nbytes for parameter in parameters) / 1e9, 2),
            "dtype": str(self.plain.dtype).removeprefix("torch."),
            "made_s": round(made_s, 2),
            "fused_s": round(time.perf_counter() - start_s - made_s, 2),
            "kernels": self.fused.uses_kernels,
            "text_tokenizer": "published" if self.vocabulary is EMU35 else "built-in",
            **step_times.memory(device),
        }

    def to_8_bits(self) -> Figures:
        """The layers' matrices in fp8 from here on; the 16-bit ones are given up."""
        start_s = time.perf_counter()
        del self.fused
        self.__dict__.pop("world", None)
        gc.collect()  # nothing may hold the 16-bit matrices: each layer's are let go as it is rounded
        self.fused = FusedTransformer(self.plain, weights="fp8")
        self._wait()
        return {"took_s": round(time.perf_counter() - start_s, 2), **step_times.memory(self._device)}

    @cached_property
    def world(self) -> WorldModel:
        """The facade over a checkpoint that exists in memory only."""
        config, device = self.config, self._device
        vision = random_vision(_VISIONS[config.vision], device=device, seed=config.seed)
        sampling = Sampling(
            text=Truncation(top_k=1024, top_p=0.9),
            image=Truncation(top_k=config.top_k),
            guidance=config.guidance,
        )
        manifest = Manifest(
            vocabulary=self.vocabulary,
            default_size=None,
            largest_side=2048,
            max_text_tokens=CLOSING_TOKENS,
            sampling=dict.fromkeys(("t2i", "story"), sampling),
        )
        parts = Parts(
            folder=self._out,
            transformer=self.fused,
            vision=vision,
            tokenizer=self._tokenizer,
            manifest=manifest,
            fingerprint=bytes(FINGERPRINT_BYTES),
        )
        return WorldModel(parts)

    def picture(self, side: int) -> Figures:
        """A picture from words, and its `.pb` file."""
        size = (side * DOWNSAMPLE, side * DOWNSAMPLE)
        self.fresh()
        pace = Pace(partial(self._on_progress, f"t2i {side}x{side}"))
        start_s = time.perf_counter()
        state = self.world.begin(mode="t2i", prompt=_PROMPT, seed=self.config.seed, size=size)
        state, segment = self.world.imagine(state, "", on_step=pace)
        total_s = time.perf_counter() - start_s
        assert segment.image is not None and segment.image.shape == (*size, 3), "a picture was asked for"
        self._last_picture = segment.image
        return {
            "tokens": len(state.answer_ids),
            "total_s": round(total_s, 2),
            **pace.figures(),
            "vision_decode_s": round(self._decoding_s(state), 3),
            "pb_bytes": self._written(f"t2i-{side}", _PROMPT, [segment]),
            **step_times.memory(self._device),
        }

    def pictures(self, side: int, *, num_worlds: int, sampling: Sampling | None = None) -> Figures:
        """So many pictures from words at once."""
        size = (side * DOWNSAMPLE, side * DOWNSAMPLE)
        self.fresh()
        pace = Pace(partial(self._on_progress, f"{num_worlds} of {side}x{side}"))
        start_s = time.perf_counter()
        states = [
            self.world.begin(mode="t2i", prompt=_PROMPT, seed=self.config.seed + i, size=size)
            for i in range(num_worlds)
        ]
        done = self.world.imagine_batch(states, [""] * num_worlds, sampling=sampling, on_step=pace)
        total_s = time.perf_counter() - start_s
        assert all(segment.image is not None for _, segment in done), "every picture was asked for"
        return {
            "pictures_a_minute": round(60 * num_worlds / total_s, 2),
            "total_s": round(total_s, 2),
            **pace.figures(),
            **step_times.memory(self._device),
        }

    def story(self, side: int, *, num_pictures: int) -> Figures:
        """A reference picture, lines with pictures, and words of the model's own to the end of its answer."""
        size = (side * DOWNSAMPLE,) * 2
        reference = self._last_picture
        if reference is None:
            reference = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        self.fresh()
        start_s = time.perf_counter()
        state = self.world.begin(mode="story", prompt=_QUESTION, images=[reference], size=size)
        figures: Figures = {"begin_s": round(time.perf_counter() - start_s, 2)}
        segments: list[Segment] = []
        lines: list[str | None] = [*_LINES[:num_pictures], None]
        for number, line in enumerate(lines):
            pace = Pace(partial(self._on_progress, f"story, part {number + 1}"))
            state, segment = self.world.imagine(state, line, on_step=pace)
            segments.append(segment)
            figures["own words" if line is None else f"picture {number + 1}"] = pace.figures()
        assert all(segment.image is not None for segment in segments[:-1]), "each line asks for a picture"
        return {
            "tokens": len(state.answer_ids),
            "total_s": round(time.perf_counter() - start_s, 2),
            "ended": segments[-1].ended,
            **figures,
            "pb_bytes": self._written("story", _QUESTION, segments, references=[reference]),
            **step_times.memory(self._device),
        }

    def expected_s(self, num_tokens: int, log: RunLog) -> float:
        """How long so many guided tokens will take, from the steps timed before."""
        steps = [value["ms"] for part, value in log.figures.items() if part.startswith("step, 2 rows")]
        return _MARGIN * 1e-3 * num_tokens * min(steps) if steps else 0.0

    def _written(
        self, name: str, question: str, segments: list[Segment], *, references: list[Pixels] | None = None
    ) -> int:
        """Size of the `.pb` file, which must be read again as it was written."""
        story = to_story(question, references=references or [], segments=segments)
        path = self._out / f"{name}.pb"
        save_story(path, story)
        assert load_story(path) == story, f"{path} reads otherwise than it was written"
        return path.stat().st_size

    def _decoding_s(self, state: WorldState) -> float:
        """Seconds of the vision tokenizer for the last picture, once more and warm."""
        self._wait()
        start_s = time.perf_counter()
        self.world.last_image(state)
        return time.perf_counter() - start_s

    def fresh(self) -> None:
        """No caches, and peaks counted from here; the vision tokenizer is made before."""
        self.world.caches.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Pace:
    """Listens to the steps of one segment: what a token takes from the first step to the last."""

    def __init__(self, on_step: Callable[[int, int], None]) -> None:
        self._on_step = on_step
        self._points: list[tuple[float, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self._points.append((time.perf_counter(), done))
        self._on_step(done, total)

    def figures(self) -> Figures:
        """Milliseconds a token: over all, and the spread over the loop's steps (rows of a picture)."""
        pairs = itertools.pairwise(self._points)
        gaps = [(1e3 * (t1 - t0), n1 - n0) for (t0, n0), (t1, n1) in pairs if n1 > n0]
        if not gaps:
            return {"note": "a single step"}
        overall = sum(gap for gap, _ in gaps) / sum(count for _, count in gaps)
        return {
            "ms_a_token": round(overall, 3),
            "ms_a_call": round(sum(gap for gap, _ in gaps) / len(gaps), 3),
            "steps": step_times.spread([gap / n for gap, n in gaps]),
        }


def random_vision(config: VisionConfig, *, device: torch.device, seed: int) -> VisionTokenizer:
    """A vision tokenizer whose pictures are noise of about the right spread."""
    with torch.device("meta"):
        vision = VisionTokenizer(config)
    vision = vision.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in vision.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(name.endswith("weight")))  # norms as they are, biases nothing
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    return vision


def text_tokenizer(folder: Path) -> TextTokenizer:
    """The release's, where its files are in `folder`, else the built-in one with as many visual ids."""
    if (folder / "emu3.tiktoken").is_file():
        return TextTokenizer.published(folder)
    ranks = BUILTIN["small"] / "text.tiktoken"
    vocabulary = builtin(num_text_tokens=len(read_ranks(ranks)), num_visual_tokens=EMU35.num_visual_tokens)
    return TextTokenizer.builtin(ranks, vocabulary=vocabulary)
