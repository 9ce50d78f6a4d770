"""Stage `tune`: a trained model learns a folder of pictures and texts, with all weights or an adapter.

Words and picture pairs teach t2i, edits x2i (`picture_folder.py` says what a folder may hold). Pictures are
cut to the middle and encoded once. With an adapter (LoRA) the model's weights stay, and
`emuworld.load(model, adapter=OUT)` opens both; without one OUT is a checkpoint folder of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from emuworld.model import checkpoint, lora_folder
from emuworld.model.adapter import Adapter
from emuworld.model.transformer import Transformer
from emuworld.tokens.vision import DOWNSAMPLE
from emuworld.training import loop
from emuworld.training.checkpoints import Source, open_source, save_checkpoint
from emuworld.training.data import TokenStory
from emuworld.training.devices import pick_device
from emuworld.training.examples import Batch, BatchStream, Bucket, ExampleSampler, Mixture
from emuworld.training.packing import Packing, packed_batches, row_of
from emuworld.training.picture_folder import Pair, picture, read_pairs
from emuworld.training.ranks import Ranks
from emuworld.training.states import ShardedStore, first_step
from emuworld.training.supervised import with_dropout
from emuworld.training.trainer import Optimisation, SupervisedTrainer

_ADAPTER = "adapter"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning(Optimisation):
    """Settings of the stage."""

    data: str = "pictures"  # the folder; see docs/training.md for what it may hold
    init_from: str = "small"  # what is tuned: the built-in model, a checkpoint folder, or a published one
    out: str = "outputs/train/tune"
    adaptation: str = _ADAPTER  # adapter: matrices of low rank beside the model's own | full
    rank: int = 16  # of the adapter
    batch_size: int = 4  # rows of a step; each fits the longest pair
    held_back: float = 0.1  # share of the pairs that are only measured
    size_px: int = 0  # picture side; 0: the model's own
    dropout: float = 0.0
    unconditional: float = 0.1  # rows without words, for guidance
    visual_weight: float = 1.0  # of picture tokens; text weighs 1 (paper, SFT stage A)
    optimizer: str = "adamw"
    learning_rate: float = 5e-4
    embedding_learning_rate: float = 1e-4
    device: str = "auto"
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
    training, measured, packing = _examples(config, source, stories)
    model = with_dropout(checkpoint.load(source.weights, dtype=torch.float32), config.dropout).train()
    adapter = None
    if config.adaptation == _ADAPTER:
        adapter = Adapter(model, rank=config.rank, generator=torch.Generator().manual_seed(config.seed))
        adapter.to(device).attach(model)
    draw = partial(packed_batches, training, _buckets(stories), packing=packing, seed=config.seed)
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
    for name in after:
        print(f"tune: {name} of {len(measured)} pairs held back: {before[name]:.3f} -> {after[name]:.3f}")
    opened = f"{config.init_from!r}, adapter={config.out!r}" if adapter else repr(config.out)
    print(f"tune: open it with emuworld.load({opened})", flush=True)
    return after


def _stories(config: Tuning, source: Source, *, device: torch.device) -> list[TokenStory]:
    """Every pair with its pictures as codes."""
    side = config.size_px or (source.manifest.default_size or (512, 512))[0]
    pairs = read_pairs(config.data)
    stories = []
    for number, pair in enumerate(pairs):
        shown = [pair.picture] if pair.source is None else [pair.source, pair.picture]
        pixels = np.stack([picture(path, size=(side, side)) for path in shown])
        codes = source.vision.encode(torch.from_numpy(pixels).to(device)).cpu().numpy()
        stories.append(_story(pair, codes))
        if (number + 1) % 50 == 0 or number + 1 == len(pairs):
            print(f"tune: {number + 1} of {len(pairs)} pairs encoded", flush=True)
    return stories


def _story(pair: Pair, codes: np.ndarray) -> TokenStory:
    is_edit = pair.source is not None
    return TokenStory(
        question="",
        texts=("", pair.text) if is_edit else ("",),
        captions=("", "") if is_edit else (pair.text,),
        codes=codes,
        kind="x2i" if is_edit else "pictures",
        num_references=int(is_edit),
    )


def _examples(
    config: Tuning, source: Source, stories: Sequence[TokenStory]
) -> tuple[ExampleSampler, list[Batch], Packing]:
    """What is drawn from, the pairs held back (a row each), and rows that fit the longest example."""

    def sampler_of(chosen: Sequence[TokenStory], *, unconditional: float) -> ExampleSampler:
        mixture = Mixture(
            unconditional=unconditional,
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
        sampler_of([story], unconditional=0.0).example(_buckets([story])[0], rng) for story in stories
    ]
    tokens = -(-max(len(example.ids) for example in examples) // 64) * 64
    every = round(1 / config.held_back) if config.held_back else len(stories) + 1
    held = [number for number in range(len(stories)) if number % every == every - 1]
    sampler = sampler_of(
        [story for number, story in enumerate(stories) if number not in held],
        unconditional=config.unconditional,
    )
    rows = [
        row_of(sampler, [examples[number]], tokens=tokens, rng=np.random.default_rng(number))
        for number in held
    ]
    packing = Packing(tokens=tokens, rows=config.batch_size, rows_at_once=config.batch_size)
    return sampler, rows, packing


def _buckets(stories: Sequence[TokenStory]) -> tuple[Bucket, ...]:
    """One for each kind of the stories, in proportion to their numbers."""
    pictures = sum(story.kind == "pictures" for story in stories)
    edits = len(stories) - pictures
    buckets = (("picture", 1, pictures), ("x2i", 2, edits))
    return tuple(Bucket(kind=kind, frames=n, batch_size=number) for kind, n, number in buckets if number)


def _save(config: Tuning, source: Source, model: Transformer, adapter: Adapter | None) -> None:
    """The adapter's folder, or a checkpoint folder with everything that the source has."""
    if adapter is not None:
        lora_folder.save(config.out, adapter, rank=config.rank, base=config.init_from)
    else:
        save_checkpoint(Path(config.out), model, source=source)
