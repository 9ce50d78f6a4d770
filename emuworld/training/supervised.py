"""Stage `pretrain`: the transformer learns to go on with stories, next token by next token.

Reads shards, turns their pictures into codes once with a trained vision tokenizer (kept beside the run, so a
resumed run does not encode again), draws examples (`examples.py`) and trains. Shards that appear while it
runs join.

Optimiser: Muon (orthogonalised momentum) for the matrices inside the layers, AdamW for embeddings and norms;
`optimizer=adamw` is the paper's. Loss: weighted cross-entropy, visual to text 0.5 to 1.0 (paper, table 2).
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.manifest import Manifest
from emuworld.model import checkpoint
from emuworld.model.transformer import Transformer, TransformerConfig, sized
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vision import DOWNSAMPLE, VisionTokenizer
from emuworld.tokens.vocabulary import Vocabulary, builtin
from emuworld.training import loop
from emuworld.training.data import wait_for_shards
from emuworld.training.devices import pick_device
from emuworld.training.encoding import TokenFeed
from emuworld.training.examples import (
    BUCKET_MODES,
    Batch,
    BatchStream,
    Bucket,
    ExampleSampler,
    Mixture,
)
from emuworld.training.muon import Muon
from emuworld.training.ranks import Ranks
from emuworld.training.text import FILE_NAME as TEXT_FILE

_SHARD_EVERY_STEPS = 8
_COPY_EVERY_STEPS = 200  # equal gradients keep copies equal but for rounding; so often it is undone

SAMPLING = {  # what the environments draw with unless told otherwise; lower temperatures end in bare walls
    "explore": Sampling(
        text=Truncation(temperature=0.7, top_p=0.9), image=Truncation(top_p=0.9), guidance=2.0
    ),
    "t2i": Sampling(image=Truncation(top_p=0.9), guidance=5.0),
    "x2i": Sampling(image=Truncation(top_p=0.9), guidance=2.0),
}
SAMPLING |= dict.fromkeys(("story", "howto", "vla"), SAMPLING["explore"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainTraining:
    """Settings of the stage; yaml chooses values, the defaults are the built-in model's."""

    shards: str = "outputs/data/train"
    validation_shards: str | None = None
    vision: str = "outputs/train/tokenizer"
    text: str = "outputs/train/text/text.tiktoken"
    out: str = "outputs/train/pretrain"
    init_from: str | None = None
    size_px: int = 256
    first_frames: int = 4_096
    wait_for_data_s: float = 0.0
    device: str = "auto"
    compile: bool = False
    model: str = "small"
    optimizer: str = "muon"
    learning_rate: float = 3e-3  # of the matrices inside the layers
    embedding_learning_rate: float = 2e-3
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    # Batch sizes are those of all processes together.
    buckets: tuple[Bucket, ...] = (
        Bucket(kind="walk", frames=12, batch_size=16),
        Bucket(kind="picture", batch_size=64),
        Bucket(kind="walk", frames=42, batch_size=2, every=4),
    )
    mixture: Mixture = dataclasses.field(default_factory=Mixture)
    mirror: bool = True  # learn from mirrored pictures too, left and right exchanged in their words
    validate_every_steps: int = 500
    validation_batches: int = 4
    seed: int = 0
    workers: int = 0  # processes that decode pictures; 0: a thread
    follow_shards: bool = False  # go on looking for shards that a renderer is still writing
    loop: loop.LoopConfig = dataclasses.field(default_factory=loop.LoopConfig)

    def __post_init__(self) -> None:
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer {self.optimizer!r} is not known; expected 'muon' or 'adamw'")


class SupervisedTrainer:
    """Transformer, optimisers and one training step."""

    def __init__(
        self, config: PretrainTraining, *, tokenizer: TextTokenizer, device: torch.device, ranks: Ranks
    ) -> None:
        self.config = config
        self.device = device
        self.ranks = ranks
        self.vocabulary = tokenizer.vocabulary
        self.model = self._new_model().to(device)
        self.optimizers = make_optimizers(self.model, config)
        self.batches: Callable[[], list[Batch]] = list
        self._losses = self._weighted_losses
        if config.compile:  # a compilation a bucket, each with its own fixed shape
            self._losses = torch.compile(self._weighted_losses, dynamic=False)

    def _new_model(self) -> Transformer:
        if self.config.init_from:
            return checkpoint.load(self.config.init_from, device="cpu", dtype=torch.float32)
        model = Transformer(transformer_config(self.config.model, vocab_size=self.vocabulary.size))
        model.init_weights(torch.Generator().manual_seed(self.config.seed))
        return model

    def _weighted_losses(
        self, inputs: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of weighted losses, and the plain losses of text and of visual targets as sums (nats)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits_BTV = self.model.logits(self.model(inputs))
        losses = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets.flatten(), reduction="none"
        ).view_as(targets)
        visual = (targets >= self.vocabulary.visual_start) & (weights > 0)
        text = (targets < self.vocabulary.num_text_tokens) & (weights > 0)
        plain = losses.detach()
        return (losses * weights).sum(), (plain * text).sum(), (plain * visual).sum()

    def step(self, step: int, factor: float) -> Mapping[str, float | Tensor]:
        """One optimiser step over a batch of each bucket; losses are means over its tokens, in nats."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.zero_grad(set_to_none=True)
        batches = self.batches()
        total_weight = float(sum(batch.weights.sum() for batch in batches))
        text = visual = torch.zeros((), device=self.device)
        for batch in batches:
            loss, text_sum, visual_sum = self._losses(*self._to_device(batch))
            (loss / total_weight).backward()
            text, visual = text + text_sum, visual + visual_sum
        self.ranks.average_gradients(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if step % _COPY_EVERY_STEPS == 0:
            self.ranks.copy_first(self.model.parameters())
        counts = [self._counts(batch) for batch in batches]
        return {
            "visual_loss": visual / max(1, sum(c[1] for c in counts)),
            "text_loss": text / max(1, sum(c[0] for c in counts)),
            "gradient_norm": norm,
            "tokens": float(sum(batch.weights.size for batch in batches) * self.ranks.world),
        }

    def validation_losses(self, batches: list[Batch]) -> dict[str, float]:
        """Mean losses in nats over given batches, and of pictures for each kind of bucket by itself."""
        self.model.eval()
        sums = {
            kind: self._sums([b for b in batches if b.kind == kind]) for kind in {b.kind for b in batches}
        }
        self.model.train()
        text, num_text, visual, num_visual = np.sum(list(sums.values()), axis=0)
        figures = {
            "validation_visual_loss": float(visual / max(1, num_visual)),
            "validation_text_loss": float(text / max(1, num_text)),
        }
        for kind, of_kind in sorted(sums.items()):
            figures[f"validation_visual_loss_{kind}"] = of_kind[2] / max(1, of_kind[3])
        return figures

    @torch.no_grad()
    def _sums(self, batches: list[Batch]) -> tuple[float, int, float, int]:
        """Sum of text losses and number of text targets, the same of visual ones."""
        text, num_text, visual, num_visual = 0.0, 0, 0.0, 0
        for batch in batches:
            _, text_sum, visual_sum = self._weighted_losses(*self._to_device(batch))
            counts = self._counts(batch)
            text, num_text = text + float(text_sum), num_text + counts[0]
            visual, num_visual = visual + float(visual_sum), num_visual + counts[1]
        return text, num_text, visual, num_visual

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and weights, [B, T] each."""
        inputs, ids, weights = (torch.from_numpy(a) for a in (batch.inputs, batch.ids, batch.weights))
        return inputs.to(self.device), ids.to(self.device)[:, 1:], weights.to(self.device)

    def _counts(self, batch: Batch) -> tuple[int, int]:
        targets, trained = batch.ids[:, 1:], batch.weights > 0
        text = int(((targets < self.vocabulary.num_text_tokens) & trained).sum())
        return text, int(((targets >= self.vocabulary.visual_start) & trained).sum())

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def transformer_config(name: str, *, vocab_size: int) -> TransformerConfig:
    """A named size with the vocabulary of the run's tokenizers."""
    return sized(name, vocab_size=vocab_size)


def make_optimizers(model: Transformer, config: PretrainTraining) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices inside the layers and AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    inside = {id(p) for p in matrices}
    embeddings = [p for p in model.parameters() if id(p) not in inside and p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": embeddings, "base_lr": config.embedding_learning_rate, "weight_decay": 0.0},
        {"params": vectors, "base_lr": config.embedding_learning_rate, "weight_decay": 0.0},
    ]
    fused = model.device.type == "cuda"
    if config.optimizer == "adamw":
        groups.append(
            {"params": matrices, "base_lr": config.learning_rate, "weight_decay": config.weight_decay}
        )
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=fused)]
    muon = Muon([{"params": matrices, "base_lr": config.learning_rate}], weight_decay=config.weight_decay)
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=fused), muon]


def train(config: PretrainTraining) -> dict[str, float]:
    """Run the stage; writes a folder that `emuworld.load` opens into `config.out`, whenever it saves its
    state.
    """
    device = pick_device(config.device)
    ranks = Ranks(device)
    torch.set_float32_matmul_precision("high")
    wait_for_shards(config.shards, timeout_s=config.wait_for_data_s)
    out = Path(config.out)
    vision = VisionTokenizer.load(config.vision, device=device)
    vision = vision.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stubs
    tokenizer = text_tokenizer(config.text, num_visual_tokens=vision.num_codes)
    side = config.size_px // DOWNSAMPLE
    fingerprint = hashlib.sha256((Path(config.vision) / "vision.safetensors").read_bytes()).hexdigest()[:12]

    def sampler_of(folder: str, name: str) -> tuple[ExampleSampler, TokenFeed]:
        feed = TokenFeed(
            folder,
            vision=vision,
            cache=out / f"tokens-{name}-{fingerprint}",
            follow=config.follow_shards and name == "train",
            size_px=config.size_px,
            workers=config.workers,
            compile=config.compile,
            device=device,
            mirror=config.mirror and name == "train",
            share=(ranks.rank, ranks.world) if name == "train" else (0, 1),
        )
        sampler = ExampleSampler(tokenizer=tokenizer, mixture=config.mixture, size=(side, side))
        for stories in feed.cached():
            sampler.add(stories)
        return sampler, feed

    sampler, feed = sampler_of(config.shards, "train")
    while sampler.num_frames < config.first_frames and (stories := feed.wait()) is not None:
        sampler.add(stories)
    validation = _validation_batches(config, sampler_of) if config.validation_shards and ranks.first else []
    trainer = SupervisedTrainer(config, tokenizer=tokenizer, device=device, ranks=ranks)
    stream = BatchStream(
        sampler,
        buckets=tuple(dataclasses.replace(b, batch_size=ranks.share(b.batch_size)) for b in config.buckets),
        seed=config.seed,
        first_step=_first_step(config, device),
        rank=ranks.rank,
    )
    trainer.batches = stream.next

    def train_step(step: int, factor: float) -> Mapping[str, float | Tensor]:
        if step % _SHARD_EVERY_STEPS == 0 and (stories := feed.ready()):
            with stream.lock:
                sampler.add(stories)
        return trainer.step(step, factor)

    def on_log(step: int) -> Mapping[str, float]:
        figures = {"frames": float(sampler.num_frames)}
        if validation and step % config.validate_every_steps == 0:
            figures |= trainer.validation_losses(validation)
        return figures

    def on_save() -> None:
        checkpoint.save(out, trainer.model, dtype=torch.bfloat16)
        complete_folder(config, vocabulary=tokenizer.vocabulary)

    try:
        loop.run(
            config.loop,
            out=out,
            name="pretrain",
            train_step=train_step,
            get_state=trainer.state,
            set_state=trainer.set_state,
            device=device,
            on_log=on_log,
            on_save=on_save,
            ranks=ranks,
        )
    finally:
        stream.close()
        feed.close()
    ranks.close()
    if not ranks.first:
        return {}
    return trainer.validation_losses(validation) if validation else {}


def complete_folder(config: PretrainTraining, *, vocabulary: Vocabulary) -> None:
    """Put tokenizers and manifest beside the transformer, so that `emuworld.load(out)` opens the folder."""
    sources = {name: Path(config.vision) / name for name in ("vision.json", "vision.safetensors")}
    sources[TEXT_FILE] = Path(config.text)
    for name, source in sources.items():
        part = Path(config.out) / f"{name}.part"
        shutil.copyfile(source, part)
        part.replace(Path(config.out) / name)
    modes = tuple(sorted({BUCKET_MODES[bucket.kind] for bucket in config.buckets}))
    Manifest(
        vocabulary=vocabulary,
        default_size=(config.size_px, config.size_px),
        smallest_side=min(128, config.size_px),
        largest_side=max(512, config.size_px),
        modes=modes,
        sampling={mode: SAMPLING[mode] for mode in modes},
    ).save(config.out)


def text_tokenizer(path: str, *, num_visual_tokens: int) -> TextTokenizer:
    """The built-in tokenizer of a ranks file, with a vocabulary for so many visual codes."""
    num_text_tokens = sum(1 for line in Path(path).read_bytes().splitlines() if line)
    return TextTokenizer.builtin(
        path, vocabulary=builtin(num_text_tokens=num_text_tokens, num_visual_tokens=num_visual_tokens)
    )


def _first_step(config: PretrainTraining, device: torch.device) -> int:
    path = Path(config.out) / "pretrain.state.pt"
    return int(loop.load_state(path, device=device)["step"]) if config.loop.resume and path.exists() else 0


def _validation_batches(
    config: PretrainTraining, sampler_of: Callable[[str, str], tuple[ExampleSampler, TokenFeed]]
) -> list[Batch]:
    assert config.validation_shards
    sampler, feed = sampler_of(config.validation_shards, "validation")
    while (stories := feed.wait()) is not None:
        sampler.add(stories)
    feed.close()
    rng = np.random.default_rng((config.seed, 1))
    return [sampler.batch(bucket, rng) for bucket in config.buckets for _ in range(config.validation_batches)]
