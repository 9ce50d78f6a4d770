"""Stage `pretrain`: the transformer learns to go on with stories, next token by next token.

Reads shards, turns their pictures into codes once with a trained vision tokenizer (kept beside the run, so a
resumed run does not encode again), draws examples (`examples.py`) and trains. Shards that appear while it
runs join. A bucket may have a picture size of its own (`sizes.py`): each size is encoded by itself.

Optimiser: Muon (orthogonalised momentum) for the matrices inside the layers, AdamW for embeddings and norms;
`optimizer=adamw` is the paper's. Loss: weighted cross-entropy, visual to text 0.5 to 1.0 (paper, table 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.manifest import Manifest
from emuworld.model import checkpoint
from emuworld.model.growth import deepened
from emuworld.model.transformer import Transformer, TransformerConfig, sized
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vision import DOWNSAMPLE, VisionTokenizer
from emuworld.tokens.vocabulary import Vocabulary, builtin
from emuworld.training import loop
from emuworld.training.batch_stream import BatchStream
from emuworld.training.checkpoints import copy_file
from emuworld.training.data import KINDS
from emuworld.training.devices import pick_device
from emuworld.training.encoding import TokenFeed
from emuworld.training.examples import (
    BUCKET_MODES,
    Batch,
    Bucket,
    ExampleSampler,
    Mixture,
    step_batches,
)
from emuworld.training.packing import Packing, packed_batches
from emuworld.training.ranks import Ranks
from emuworld.training.shard_files import wait_for_shards
from emuworld.training.sizes import check_buckets, loss_name, size_name, trained_sizes
from emuworld.training.states import ShardedStore, first_step
from emuworld.training.text import FILE_NAME as TEXT_FILE
from emuworld.training.trainer import Optimisation, SupervisedTrainer

_SHARD_EVERY_STEPS = 4  # times the processes that read: each takes its share of the shards

# What the environments draw with unless told otherwise: chosen on the validation split for the built-in model
# (scripts/choose_sampling.py, docs/log.md).
SAMPLING = {
    "explore": Sampling(
        text=Truncation(temperature=0.7, top_p=0.9), image=Truncation(top_p=0.9), guidance=2.0
    ),
    "t2i": Sampling(image=Truncation(temperature=0.5, top_p=0.9), guidance=2.5),
    "story": Sampling(
        text=Truncation(temperature=0.7, top_p=0.9),
        image=Truncation(temperature=0.3, top_p=0.9),
        guidance=1.5,
    ),
    # Cooler, drawn to the edited picture, and without the tilt of change_weight=8, more of it is kept.
    "x2i": Sampling(
        image=Truncation(temperature=0.15, top_p=0.9), guidance=2.0, image_guidance=1.5, stay=2.0
    ),
}
SAMPLING |= dict.fromkeys(("howto", "vla"), SAMPLING["explore"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainTraining(Optimisation):
    """Settings of the stage; yaml chooses values, the defaults are the built-in model's."""

    name: str = "pretrain"  # of its states and log; stages that follow each other in one folder need others
    shards: str = "outputs/data/train"  # folder of shards (data build), or of folders of them
    validation_shards: str | None = None  # the same, of worlds that are only measured; null: nothing is
    vision: str = "outputs/train/tokenizer"  # folder of a trained vision tokenizer
    text: str = "outputs/train/text/text.tiktoken"  # what stage=text wrote
    out: str = "outputs/train/pretrain"  # folder of the states, the log and the checkpoint
    init_from: str | None = None  # folder of a checkpoint whose weights it begins with; null: random ones
    # Side of the pictures of buckets without a size_px of their own. Larger pictures are cut to their middle
    # and made smaller; stories with smaller ones are left out and told: nothing is enlarged.
    size_px: int = 256
    first_frames: int = 4_096  # encoded before training begins, of all sizes together
    wait_for_data_s: float = 0.0  # for the first shard, where there is none yet
    device: str = "auto"  # auto | cpu | cuda
    # Of several processes (torchrun): ddp, each with a whole copy; fsdp, each with a part of every weight;
    # tp, which cuts every layer.
    parallel: str = "ddp"
    tensor_ranks: int = 0  # with parallel=tp, processes that share a layer; 0: all
    model: str = "small"  # tiny | small | emu3.5: the size of a new transformer
    num_layers: int = 0  # grown from init_from's by layers that add nothing at first; 0: as many as it has
    dropout: float = 0.0  # of embeddings, attention weights and outputs; the paper has 0.1
    # Batch sizes are those of all processes together; size_px (and width_px) of a bucket: another size.
    buckets: tuple[Bucket, ...] = (
        Bucket(kind="walk", frames=12, batch_size=16),
        Bucket(kind="picture", batch_size=64),
        Bucket(kind="walk", frames=42, batch_size=2, every=4),
    )
    packing: Packing = dataclasses.field(default_factory=Packing)
    mixture: Mixture = dataclasses.field(default_factory=Mixture)
    mirror: bool = True  # learn from mirrored pictures too, left and right exchanged in their words
    validate_every_steps: int = 500  # losses over the validation shards
    validation_batches: int = 4  # of each bucket
    seed: int = 0  # of new weights, and of what is drawn to learn from
    workers: int = 0  # processes that decode pictures, for each size; 0: a thread
    follow_shards: bool = False  # go on looking for shards that a renderer is still writing
    loop: loop.LoopConfig = dataclasses.field(default_factory=loop.LoopConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers and not self.init_from:
            raise ValueError(
                f"num_layers={self.num_layers} grows a trained model: it needs init_from=FOLDER; a new one "
                "has as many layers as its size (model=) says"
            )
        if self.mixture.own_codes and (self.packing.tokens or self.parallel == "tp"):
            raise ValueError(
                f"mixture.own_codes={self.mixture.own_codes} cannot be had with packed rows or parallel=tp: "
                "the model draws its own codes row by row, from scores that are whole; set it to 0, or leave "
                "out packing.tokens and parallel=tp"
            )
        check_buckets(self.buckets, size_px=self.size_px, packed_tokens=self.packing.tokens)


def new_model(config: PretrainTraining, *, vocabulary: Vocabulary) -> Transformer:
    """The transformer that the stage begins with, alike in every process: on the CPU, in fp32."""
    if config.init_from:
        model = checkpoint.load(config.init_from, dtype=torch.float32)
        if config.num_layers:
            model = deepened(model, config.num_layers)
        return with_dropout(model, config.dropout).train()
    shape = transformer_config(config.model, vocab_size=vocabulary.size)
    model = Transformer(dataclasses.replace(shape, attention_dropout=config.dropout))
    model.init_weights(torch.Generator().manual_seed(config.seed))
    return model


def with_dropout(model: Transformer, dropout: float) -> Transformer:
    """The same weights under another dropout."""
    with torch.device("meta"):
        other = Transformer(dataclasses.replace(model.config, attention_dropout=dropout))
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    return other


def transformer_config(name: str, *, vocab_size: int) -> TransformerConfig:
    """A named size with the vocabulary of the run's tokenizers."""
    return sized(name, vocab_size=vocab_size)


def train(config: PretrainTraining) -> dict[str, float]:
    """Run the stage; writes a folder that `emuworld.load` opens into `config.out`, whenever it saves its
    state.
    """
    device = pick_device(config.device)
    ranks = Ranks(device, parallel=config.parallel, tensor_ranks=config.tensor_ranks)
    torch.set_float32_matmul_precision("high")
    # cuDNN's causal attention, forward and backward, takes 0.6 of the flash kernel's time on an H200.
    torch.backends.cuda.enable_flash_sdp(False)
    wait_for_shards(config.shards, timeout_s=config.wait_for_data_s)
    out = Path(config.out)
    vision = VisionTokenizer.load(config.vision, device=device)
    vision = vision.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stubs
    tokenizer = text_tokenizer(config.text, num_visual_tokens=vision.num_codes)
    model = new_model(config, vocabulary=tokenizer.vocabulary)
    examples = _Examples(config, vision=vision, tokenizer=tokenizer, ranks=ranks) if ranks.leads_row else None
    drawn = examples.validation() if examples and ranks.first else []
    validation = ranks.from_first(drawn if ranks.first else None)
    trainer = SupervisedTrainer(
        model,
        config=config,
        vocabulary=tokenizer.vocabulary,
        device=device,
        ranks=ranks,
        next_batches=examples.stream.next if examples else list,
        own_passes=config.mixture.own_passes,
        seed=config.seed,
    )

    def train_step(step: int, factor: float) -> Mapping[str, float | Tensor]:
        if examples and step % (_SHARD_EVERY_STEPS * ranks.data_world) == 0:
            examples.refresh()
        return trainer.step(step, factor)

    def on_log(step: int) -> Mapping[str, float]:
        figures = {"frames": float(examples.sampler.num_frames)} if examples else {}
        if validation and step % config.validate_every_steps == 0:
            figures |= trainer.validation_losses(validation)
        return figures

    def on_save() -> None:
        whole = trainer.whole_model(torch.bfloat16)
        if whole is not None:
            checkpoint.save(out, whole, dtype=torch.bfloat16)
            complete_folder(config, vocabulary=tokenizer.vocabulary)

    try:
        loop.run(
            config.loop,
            out=out,
            name=config.name,
            train_step=train_step,
            store=ShardedStore(
                out, config.name, module=trainer.model, optimizers=trainer.optimizers, ranks=ranks
            ),
            on_log=on_log,
            on_save=on_save,
            ranks=ranks,
        )
    finally:
        if examples:
            examples.close()
    figures = trainer.validation_losses(validation) if validation else {}
    ranks.close()
    if not ranks.first:
        return {}
    print(f"the checkpoint is in {out}; open it with emuworld.load({config.out!r}), or as model={config.out}")
    return figures


class _Examples:
    """What one row of processes learns from: its share of the shards, and batches drawn from it."""

    def __init__(
        self, config: PretrainTraining, *, vision: VisionTokenizer, tokenizer: TextTokenizer, ranks: Ranks
    ) -> None:
        self._config, self._vision, self._tokenizer, self._ranks = config, vision, tokenizer, ranks
        self.sampler, self._feeds = self._open(config.shards, "train")
        while self.sampler.num_frames < config.first_frames and _take(self._feeds, self.sampler):
            continue
        if not self.sampler.num_frames and ranks.world > 1:
            raise ValueError(
                f"process {ranks.rank} of {ranks.world} has no story to learn from in its share of the "
                f"shards in {config.shards}: build more and smaller ones (episodes_per_shard), or start "
                "fewer processes"
            )
        for bucket in config.buckets:
            self.sampler.check(bucket)
        if config.packing.tokens:
            ranks.share(config.packing.rows)
        self._buckets = tuple(
            b if config.packing.tokens else dataclasses.replace(b, batch_size=ranks.share(b.batch_size))
            for b in config.buckets
        )
        resumed = first_step(Path(config.out), config.name) if config.loop.resume else 0
        self.stream = BatchStream(self._draw, first_step=resumed)

    def _draw(self, step: int) -> list[Batch]:
        config, ranks = self._config, self._ranks
        if not config.packing.tokens:
            return step_batches(
                self.sampler, self._buckets, seed=config.seed, step=step, rank=ranks.data_rank
            )
        return packed_batches(
            self.sampler,
            self._buckets,
            packing=config.packing,
            seed=config.seed,
            step=step,
            rank=ranks.data_rank,
            world=ranks.data_world,
        )

    def refresh(self) -> None:
        """Take in a shard that is ready, if there is one, at every size."""
        for feed in self._feeds:
            if (shard := feed.ready()) is not None:
                with self.stream.lock:
                    self.sampler.add(shard.stories, shard=shard.stem)

    def validation(self) -> list[Batch]:
        """Batches of every bucket from the validation shards, where there are some."""
        config = self._config
        if not config.validation_shards:
            return []
        sampler, feeds = self._open(config.validation_shards, "validation")
        while _take(feeds, sampler):
            continue
        for feed in feeds:
            feed.close()
        if config.packing.tokens:
            return self._packed_validation(sampler)
        rng = np.random.default_rng((config.seed, 1))
        return [
            dataclasses.replace(sampler.batch(bucket, rng), kind=self._loss_name(bucket))
            for bucket in config.buckets
            for _ in range(config.validation_batches)
        ]

    def _packed_validation(self, sampler: ExampleSampler) -> list[Batch]:
        """Rows of all buckets, as in training; of each bucket by itself where they differ in size."""
        config = self._config
        packing = dataclasses.replace(config.packing, rows=config.validation_batches, rows_at_once=1)
        draw = partial(packed_batches, sampler, packing=packing, seed=config.seed, rank=0, world=1)
        if len(trained_sizes(config.buckets, size_px=config.size_px)) == 1:
            return draw(config.buckets, step=1 << 40)
        return [
            dataclasses.replace(batch, kind=self._loss_name(bucket))
            for number, bucket in enumerate(config.buckets)
            for batch in draw((bucket,), step=(1 << 40) + number)
        ]

    def _loss_name(self, bucket: Bucket) -> str:
        return loss_name(bucket, buckets=self._config.buckets, size_px=self._config.size_px)

    def close(self) -> None:
        self.stream.close()
        for feed in self._feeds:
            feed.close()

    def _open(self, folder: str, name: str) -> tuple[ExampleSampler, list[TokenFeed]]:
        """A sampler with all stories whose codes are kept, and a feed of the others for each size."""
        config, ranks = self._config, self._ranks
        codes = self._vision.code_fingerprint()[:12]
        train = name == "train"
        feeds = []
        for size, kinds in trained_sizes(config.buckets, size_px=config.size_px).items():
            cache = f"tokens-{name}-{codes}-{size_name(size)}"
            feed = TokenFeed(
                folder,
                vision=self._vision,
                cache=Path(config.out) / (cache if kinds == KINDS else f"{cache}-{'+'.join(kinds)}"),
                follow=config.follow_shards and train,
                size=size,
                kinds=kinds,
                workers=config.workers,
                compile=config.compile,
                device=next(self._vision.parameters()).device,
                mirror=config.mirror and train,
                share=(ranks.data_rank, ranks.data_world) if train else (0, 1),
            )
            feeds.append(feed)
        side = config.size_px // DOWNSAMPLE
        sampler = ExampleSampler(tokenizer=self._tokenizer, mixture=config.mixture, size=(side, side))
        for feed in feeds:
            for shard in feed.cached():
                sampler.add(shard.stories, shard=shard.stem)
        return sampler, feeds


def _take(feeds: Sequence[TokenFeed], sampler: ExampleSampler) -> bool:
    """Wait for the next shard of every feed; False after the last."""
    shards = [shard for feed in feeds if (shard := feed.wait()) is not None]
    for shard in shards:
        sampler.add(shard.stories, shard=shard.stem)
    return bool(shards)


def complete_folder(config: PretrainTraining, *, vocabulary: Vocabulary) -> None:
    """Put tokenizers and manifest beside the transformer, so that `emuworld.load(out)` opens the folder."""
    sources = {name: Path(config.vision) / name for name in ("vision.json", "vision.safetensors")}
    sources[TEXT_FILE] = Path(config.text)
    for name, source in sources.items():
        copy_file(source, Path(config.out) / name)
    modes = tuple(sorted({BUCKET_MODES[bucket.kind] for bucket in config.buckets}))
    sizes = list(trained_sizes(config.buckets, size_px=config.size_px))
    own = (config.size_px, config.size_px)
    sides = [side for size in sizes for side in size]
    Manifest(
        vocabulary=vocabulary,
        default_size=own if own in sizes else sizes[0],
        smallest_side=min(128, *sides),
        largest_side=max(512, *sides),
        modes=modes,
        sampling={mode: SAMPLING[mode] for mode in modes},
    ).save(config.out)


def text_tokenizer(path: str, *, num_visual_tokens: int) -> TextTokenizer:
    """The built-in tokenizer of a ranks file, with a vocabulary for so many visual codes. Raises ValueError
    where there is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no text tokenizer {path}: make one with emuworld train stage=text")
    num_text_tokens = sum(1 for line in Path(path).read_bytes().splitlines() if line)
    return TextTokenizer.builtin(
        path, vocabulary=builtin(num_text_tokens=num_text_tokens, num_visual_tokens=num_visual_tokens)
    )
