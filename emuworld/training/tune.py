"""Stage `tune`: a trained model learns a folder of pictures and texts, with all weights or an adapter.

Words and picture pairs teach t2i, edits x2i (`picture_folder.py` says what a folder may hold), LeRobot data
sets vla (`lerobot_folder.py`). Pictures are cut to the middle and encoded once. With an adapter (LoRA) the
model's weights stay, and `emuworld.load(OUT)` opens both; without one OUT is a checkpoint folder of its own.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from emuworld.model import checkpoint, lora_folder
from emuworld.model.adapter import Adapter
from emuworld.model.transformer import Transformer
from emuworld.pictures import middle
from emuworld.questions import vla_question
from emuworld.tokens.vision import DOWNSAMPLE
from emuworld.training import loop
from emuworld.training.batch_stream import BatchStream
from emuworld.training.checkpoints import Source, open_source, save_checkpoint
from emuworld.training.data import TokenStory
from emuworld.training.devices import pick_device
from emuworld.training.examples import BUCKET_MODES, Batch, Bucket, ExampleSampler, Mixture
from emuworld.training.lerobot_folder import Episode, is_lerobot, read_episodes
from emuworld.training.packing import KIND as PACKED
from emuworld.training.packing import Packing, packed_batches, row_of
from emuworld.training.picture_folder import Pair, opened, read_pairs
from emuworld.training.ranks import Ranks
from emuworld.training.states import ShardedStore, first_step
from emuworld.training.supervised import with_dropout
from emuworld.training.trainer import Optimisation, SupervisedTrainer

_ADAPTER = "adapter"
_BUCKETS = {"pictures": "picture"}  # a story's kind -> the bucket's, where they have two names
_SPACIOUS = 2  # pictures a row of vla has room for, by those of the longest story: words need some of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning(Optimisation):
    """Settings of the stage."""

    data: str = "pictures"  # the folder; see docs/training.md for what it may hold
    init_from: str = "small"  # what is tuned: the built-in model, a checkpoint folder, or a published one
    out: str = "outputs/train/tune"  # folder of the adapter, or of the whole checkpoint
    adaptation: str = "adapter"  # adapter: matrices of low rank beside the model's own | full
    rank: int = 16  # of the adapter
    batch_size: int = 4  # rows of a step; each fits the longest pair or episode
    held_back: float = 0.1  # share of the pairs or episodes that are only measured
    size_px: int = 0  # picture side; 0: the model's own
    camera: str = ""  # of a LeRobot data set: the feature with the pictures; "": its first
    keyframes: int = 4  # of an episode without subtasks, evenly spaced: to reach, grasp, carry, let go
    robot: str = ""  # asks LeRobot's tasks as the published model is asked, of this arm; "": the task alone
    dropout: float = 0.0  # of embeddings, attention weights and outputs
    unconditional: float = 0.1  # rows without words, for guidance
    visual_weight: float = 1.0  # of picture tokens; text weighs 1 (paper, SFT stage A)
    optimizer: str = "adamw"
    learning_rate: float = 5e-4
    embedding_learning_rate: float = 1e-4
    device: str = "auto"  # auto | cpu | cuda
    seed: int = 0
    loop: loop.LoopConfig = dataclasses.field(
        default_factory=lambda: loop.LoopConfig(
            max_steps=80, warmup_steps=10, schedule="cosine", log_every_steps=10
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptation not in (_ADAPTER, "full"):
            raise ValueError(f"adaptation={self.adaptation!r} is not known; expected adapter or full")
        if not 0 <= self.held_back < 1 or self.rank < 1 or self.batch_size < 1 or self.size_px % DOWNSAMPLE:
            raise ValueError(
                f"held_back must lie in 0..1, rank and batch_size be 1 or more and size_px a multiple of "
                f"{DOWNSAMPLE}, got {self.held_back}, {self.rank}, {self.batch_size} and {self.size_px}"
            )
        if self.keyframes < 1:
            raise ValueError(f"keyframes must be 1 or more, got {self.keyframes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Told:
    """A story whose codes come later, and its pictures, which are decoded while one iterates."""

    story: TokenStory
    pictures: Iterable[Image.Image]


def train(config: Tuning) -> dict[str, float]:
    """Run the stage; writes the adapter, or the whole checkpoint, whenever it saves its state. Returns the
    losses of the pairs that were held back.
    """
    device = pick_device(config.device)
    ranks = Ranks(device)
    if ranks.world > 1:
        raise ValueError("stage tune trains in one process: start it without torchrun")
    source, out = open_source(config.init_from, device=device), Path(config.out)
    stories = _stories(config, source, device=device)
    source = _teaching(source, stories)
    context = checkpoint.load_config(source.weights).max_position_embeddings
    buckets = _buckets(stories, context=context)
    training, measured, packing = _examples(config, source, stories, buckets)
    model = with_dropout(checkpoint.load(source.weights, dtype=torch.float32), config.dropout).train()
    adapter = None
    if config.adaptation == _ADAPTER:
        adapter = Adapter(model, rank=config.rank, generator=torch.Generator().manual_seed(config.seed))
        adapter.to(device).attach(model)
    draw = partial(packed_batches, training, tuple(buckets.values()), packing=packing, seed=config.seed)
    resumed = first_step(out, "tune") if config.loop.resume else 0
    stream = BatchStream(lambda step: draw(step=step, rank=0, world=1), first_step=resumed)
    trainer = SupervisedTrainer(
        model,
        config=config,
        vocabulary=source.tokenizer.vocabulary,
        device=device,
        ranks=ranks,
        next_batches=stream.next,
        seed=config.seed,
        adapter=adapter,
    )
    before = trainer.validation_losses(measured) if measured else {}
    try:
        loop.run(
            config.loop,
            out=out,
            name="tune",
            train_step=trainer.step,
            store=ShardedStore(
                out, "tune", module=adapter or model, optimizers=trainer.optimizers, ranks=ranks
            ),
            on_save=lambda: _save(config, source, model, adapter),
        )
    finally:
        stream.close()
    after = trainer.validation_losses(measured) if measured else {}
    held = f"{len(measured)} {_noun(config)} held back"
    for name in [name for name in after if not name.endswith(PACKED)]:  # whose only kind that is
        print(f"tune: {name} of {held}: {before[name]:.3f} -> {after[name]:.3f}")
    print(f"tune: open it with model={config.out} or emuworld.load({config.out!r})", flush=True)
    return after


def _stories(config: Tuning, source: Source, *, device: torch.device) -> list[TokenStory]:
    """Every pair or episode with its pictures as codes; the pictures of one at a time are in memory."""
    side = config.size_px or (source.manifest.default_size or (512, 512))[0]
    told = _told(config)
    stories = []
    for number, one in enumerate(told):
        pixels = np.stack([middle(image, (side, side)) for image in one.pictures])
        codes = source.vision.encode(torch.from_numpy(pixels).to(device)).cpu().numpy()
        stories.append(dataclasses.replace(one.story, codes=codes))
        if (number + 1) % 50 == 0 or number + 1 == len(told):
            print(f"tune: {number + 1} of {len(told)} {_noun(config)} encoded", flush=True)
    return stories


def _told(config: Tuning) -> list[_Told]:
    if is_lerobot(config.data):
        episodes = read_episodes(config.data, camera=config.camera, keyframes=config.keyframes)
        return [_told_episode(episode, robot=config.robot) for episode in episodes]
    if config.camera or config.robot:
        warnings.warn(f"camera and robot change nothing: {config.data} is no LeRobot data set", stacklevel=2)
    return [_told_pair(pair) for pair in read_pairs(config.data)]


def _told_pair(pair: Pair) -> _Told:
    is_edit = pair.source is not None
    story = TokenStory(
        question="",
        texts=("", pair.text) if is_edit else ("",),
        captions=("", "") if is_edit else (pair.text,),
        codes=np.empty((0, 0, 0), np.uint16),
        kind="x2i" if is_edit else "pictures",
        num_references=int(is_edit),
    )
    shown = [pair.picture] if pair.source is None else [pair.source, pair.picture]
    return _Told(story=story, pictures=map(opened, shown))


def _told_episode(episode: Episode, *, robot: str) -> _Told:
    """The task asks, the first picture is given, the steps answer."""
    story = TokenStory(
        question=vla_question(episode.task, robot=robot) if robot else episode.task,
        texts=("", *episode.texts),
        captions=("",) * (1 + len(episode.texts)),
        codes=np.empty((0, 0, 0), np.uint16),
        kind="vla",
        num_references=1,
    )
    return _Told(story=story, pictures=episode.pictures)


def _noun(config: Tuning) -> str:
    return "episodes" if is_lerobot(config.data) else "pairs"


def _teaching(source: Source, stories: Sequence[TokenStory]) -> Source:
    """The source, whose manifest says what it will have learnt too."""
    modes = [*source.manifest.modes, *(BUCKET_MODES[_bucket_kind(story)] for story in stories)]
    manifest = dataclasses.replace(source.manifest, modes=tuple(dict.fromkeys(modes)))
    return dataclasses.replace(source, manifest=manifest)


def _examples(
    config: Tuning, source: Source, stories: Sequence[TokenStory], buckets: Mapping[str, Bucket]
) -> tuple[ExampleSampler, list[Batch], Packing]:
    """What is drawn from, the stories held back (a row each), and rows that fit the longest example."""

    def sampler_of(chosen: Sequence[TokenStory], *, is_measured: bool) -> ExampleSampler:
        """Measured are stories as they are: asked, and from their beginning."""
        mixture = Mixture(
            unconditional=0.0 if is_measured else config.unconditional,
            midway=0.0 if is_measured else Mixture.midway,
            visual_weight=config.visual_weight,
            answers_only=True,
            code_noise=0.0,
        )
        size = (stories[0].codes.shape[1], stories[0].codes.shape[2])
        sampler = ExampleSampler(tokenizer=source.tokenizer, mixture=mixture, size=size)
        sampler.add(chosen)
        return sampler

    rng = np.random.default_rng(config.seed)
    examples = [
        sampler_of([story], is_measured=True).example(buckets[_bucket_kind(story)], rng) for story in stories
    ]
    tokens = -(-max(len(example.ids) for example in examples) // 64) * 64
    every = round(1 / config.held_back) if config.held_back else len(stories) + 1
    held = [number for number in range(len(stories)) if number % every == every - 1]
    sampler = sampler_of(
        [story for number, story in enumerate(stories) if number not in held],
        is_measured=False,
    )
    rows = [
        row_of(sampler, [examples[number]], tokens=tokens, rng=np.random.default_rng(number))
        for number in held
    ]
    packing = Packing(tokens=tokens, rows=config.batch_size, rows_at_once=config.batch_size)
    return sampler, rows, packing


def _buckets(stories: Sequence[TokenStory], *, context: int) -> dict[str, Bucket]:
    """One for each kind of the stories, in proportion to their numbers. Rows are as long as the longest
    example; a bucket of vla only cuts what would not fit the model's context.
    """
    counts = Counter(_bucket_kind(story) for story in stories)
    size = (stories[0].codes.shape[1], stories[0].codes.shape[2])
    frames = {"picture": 1, "x2i": 2, "vla": _SPACIOUS * max(len(story.codes) for story in stories)}
    buckets = {
        kind: Bucket(kind=kind, frames=frames[kind], batch_size=number) for kind, number in counts.items()
    }
    while "vla" in buckets and buckets["vla"].frames > 2 and buckets["vla"].row_length(size) > context:
        buckets["vla"] = dataclasses.replace(buckets["vla"], frames=buckets["vla"].frames - 1)
    return buckets


def _bucket_kind(story: TokenStory) -> str:
    return _BUCKETS.get(story.kind, story.kind)


def _save(config: Tuning, source: Source, model: Transformer, adapter: Adapter | None) -> None:
    """The adapter's folder, or a checkpoint folder with everything that the source has."""
    if adapter is not None:
        lora_folder.save(config.out, adapter, rank=config.rank, base=config.init_from)
    else:
        save_checkpoint(Path(config.out), model, source=source)
