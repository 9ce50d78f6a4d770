"""Stage `dida`: a checkpoint that draws token by token learns to draw a whole picture at once.

Starts from a finished checkpoint folder and stories: their pictures drawn anew by the checkpoint itself
(`stories=own`, self-distillation), as they are (`stories=data`), or some of each (`stories=both`). Every
picture of a row gets a noisy copy (`noisy_blocks.py`), corrupted to a random time
(`emuworld.decoding.noise`), whose tokens learn the clean codes. `adaptation=adapter` trains low-rank
matrices that act on noisy tokens only, so that all else stays as it was to the bit; `full` trains all
weights, with the loss of the clean tokens beside it so that text and token by token are kept.

Source: Emu3.5 (arXiv 2510.26583), section on DiDA; what it leaves open is in docs/fast.md. Optimiser: AdamW.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic as _now
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emuworld.checkpoint_folder import DETECTOR_FILE, find, open_parts, present_files, weights_name
from emuworld.decoding.noise import Noise, make_path
from emuworld.decoding.noise import Path as NoisePath
from emuworld.manifest import FILE_NAME as MANIFEST_FILE
from emuworld.manifest import Manifest
from emuworld.model import checkpoint
from emuworld.model.adapter import FILE_NAME as ADAPTER_FILE
from emuworld.model.adapter import Adapter, save_adapter
from emuworld.model.attention import AttentionFunction
from emuworld.model.transformer import Transformer
from emuworld.tokens.vision import DOWNSAMPLE
from emuworld.tokens.vocabulary import Vocabulary
from emuworld.training import loop
from emuworld.training.batch_stream import BatchStream
from emuworld.training.checkpoints import copy_file
from emuworld.training.devices import pick_device
from emuworld.training.distil_stories import samplers
from emuworld.training.examples import Batch, Bucket, ExampleSampler, Mixture, step_batches
from emuworld.training.noisy_blocks import NoisyRows, dense_attention, flex_attention, lay_out
from emuworld.training.objective import compile_layers
from emuworld.training.own_stories import OwnStories
from emuworld.training.packing import KIND as PACKED
from emuworld.training.packing import Packing, packed_batches
from emuworld.training.shard_files import wait_for_shards
from emuworld.training.sizes import check_buckets
from emuworld.training.states import FileStore

_LATEST = 0.999  # of the times that are trained: at 1 nothing is left to learn (URSA)
_WORDS_OF_A_PICTURE = 24  # ids around a picture, at the least
_BANDS = 4  # of times, whose validation losses are told apart
_KEPT_FILES = (DETECTOR_FILE, "README.md")  # what else a folder may have


@dataclasses.dataclass(frozen=True, kw_only=True)
class DidaTraining:
    """Settings of the stage; yaml chooses values."""

    init_from: str = "outputs/train/pretrain"  # the checkpoint folder, or small: the built-in one
    shards: str = "outputs/data/train"  # folder that `data build` wrote
    out: str = "outputs/train/dida"  # the folder of the checkpoint that can
    codes: str = ""  # the out= of a pretraining with the same vision tokenizer, whose codes are read
    stories: str = "own"  # own: the checkpoint's answers | data: the stories as they are | both
    own: OwnStories = dataclasses.field(default_factory=OwnStories)
    own_share: float = 0.5  # with stories=both, of the examples
    num_stories: int = 0  # of the shards, at most; 0: all that are needed
    prepare_seconds: float = math.inf  # of reading and encoding them; what is there by then is taken
    adaptation: str = "adapter"  # adapter | full
    rank: int = 64  # of the adapter
    noise: Noise = dataclasses.field(default_factory=Noise)
    causal_weight: float = 1.0  # of the clean tokens' loss beside the noisy ones'; full adaptation only
    default_passes: int = 0  # what the environments draw with; 0 = token by token unless told otherwise
    size_px: int = 256  # picture side
    device: str = "auto"  # auto | cpu | cuda
    workers: int = 0  # processes that decode pictures; 0: a thread
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    gradient_clip: float = 1.0  # norm above which gradients are made shorter
    # The mixture of a step; docs/training.md has the kinds.
    buckets: tuple[Bucket, ...] = (
        Bucket(kind="walk", frames=6, batch_size=8),
        Bucket(kind="picture", batch_size=16),
    )
    # Rows of one length, of examples that do not see each other: one shape to compile for all buckets.
    packing: Packing = dataclasses.field(default_factory=Packing)
    compile: bool = False  # the layers
    attention: str = "auto"  # flex | dense | auto: flex on a GPU, whose scores are never held as a whole
    mixture: Mixture = dataclasses.field(default_factory=Mixture)
    validate_every_steps: int = 250  # on stories held back
    validation_batches: int = 2  # of each bucket
    seed: int = 0
    loop: loop.LoopConfig = dataclasses.field(default_factory=loop.LoopConfig)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("stories", self.stories, ("own", "data", "both")),
            ("attention", self.attention, ("auto", "flex", "dense")),
            ("adaptation", self.adaptation, ("adapter", "full")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known; expected {' or '.join(known)}")
        if sized := [bucket for bucket in self.buckets if bucket.size_px]:
            raise ValueError(
                f"stage dida has one picture size, size_px of the stage; got {sized[0]}: drop its"
            )
        if not 0 <= self.own_share <= 1:
            raise ValueError(f"own_share must lie in 0..1, got {self.own_share}")
        check_buckets(self.buckets, size_px=self.size_px, packed_tokens=self.packing.tokens)

    @property
    def block_length(self) -> int:
        """Tokens of a noisy picture: its codes, and IMG or EOL before each row."""
        side = self.size_px // DOWNSAMPLE
        return side * (side + 1)

    def num_blocks(self, kind: str, length: int) -> int:
        """Noisy pictures behind a row of `length` clean tokens."""
        if kind == PACKED:
            return max(1, length // (self.block_length + _WORDS_OF_A_PICTURE))
        return max(bucket.frames for bucket in self.buckets if bucket.kind == kind)


class DidaTrainer:
    """Transformer, adapter, optimiser and one training step."""

    def __init__(
        self,
        config: DidaTraining,
        *,
        model: Transformer,
        vocabulary: Vocabulary,
        path: NoisePath,
    ) -> None:
        self.config, self.model, self.vocabulary, self.path = config, model, vocabulary, path
        self.batches: Callable[[], list[Batch]] = list
        self.validation_s = 3.0  # that the last validation took
        self.adapter: Adapter | None = None
        if config.adaptation == "adapter":
            generator = torch.Generator().manual_seed(config.seed)
            self.adapter = Adapter(model, rank=config.rank, generator=generator).to(model.device)
            self.adapter.attach(model)
        else:
            model.requires_grad_(True)
        self.trained = list((self.adapter or model).parameters())
        fused = model.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.trained if p.ndim > 1], "weight_decay": config.weight_decay},
                {"params": [p for p in self.trained if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=fused,
        )

    def step(self, step: int, factor: float) -> Mapping[str, float | Tensor]:
        """One optimiser step over a batch of each bucket; losses are means in nats."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        rng = self._generator(step)
        batches = self.batches()
        noisy = causal = torch.zeros((), device=self.model.device)
        for batch in batches:
            noisy_loss, causal_loss = self.losses(batch, rng=rng)
            loss = noisy_loss.mean() + self.config.causal_weight * causal_loss
            (loss / len(batches)).backward()
            noisy = noisy + noisy_loss.detach().mean() / len(batches)
            causal = causal + causal_loss.detach() / len(batches)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.gradient_clip)
        self.optimizer.step()
        figures = {"noisy_loss": noisy, "gradient_norm": norm}
        return figures if self.adapter else {**figures, "causal_loss": causal}

    def compile_layers(self) -> None:
        """One layer for all, once a shape of rows; the attention function is compiled along."""
        compile_layers(self.model, dynamic=False)
        if self.adapter is not None:  # or the first layer, whose input asks for none, would be another case
            self.model.model.embed_tokens.register_forward_hook(_with_gradient)

    def losses(
        self, batch: Batch, *, rng: torch.Generator, time: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss of every noisy code [N] at random times, or all at one; mean loss of the clean tokens (0 with
        an adapter, which does not change it)."""
        rows, device = self.rows(batch), self.model.device
        # Found on the host: nothing here waits for the device.
        learnt = torch.from_numpy(np.flatnonzero(rows.targets >= 0)).to(device)
        on_device = {
            field.name: torch.from_numpy(getattr(rows, field.name)).to(device)
            for field in dataclasses.fields(NoisyRows)
        }
        blocks, positions = on_device["blocks"], on_device["positions"]
        ids = self._corrupted(rows, on_device, rng=rng, time=time)
        attention = self.attention(blocks, on_device["starts"], on_device["reach"])
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            hidden_BSD = self._hidden(ids, positions, blocks, attention)
            start, stop = self.vocabulary.visual_start, self.vocabulary.visual_stop
            logits_NV = self.model.logits(hidden_BSD.flatten(0, 1)[learnt], start=start, stop=stop)
        targets_N = on_device["targets"].flatten()[learnt]
        noisy = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
        if self.adapter:
            return noisy, noisy.new_zeros(())
        return noisy, self._causal_loss(hidden_BSD, batch)

    @property
    def _autocast(self) -> bool:
        """On a GPU, unless the weights have 16 bits themselves."""
        return self.model.device.type == "cuda" and self.model.dtype == torch.float32

    def attention(self, blocks: Tensor, starts: Tensor, reach: Tensor) -> AttentionFunction:
        """Who sees whom in such rows, in the form that the device computes."""
        flex = self.config.attention == "flex" or (self.config.attention == "auto" and blocks.is_cuda)
        return (flex_attention if flex else dense_attention)(blocks, starts, reach)

    def _hidden(self, ids: Tensor, positions: Tensor, blocks: Tensor, attention: AttentionFunction) -> Tensor:
        if self.adapter is None:
            hidden: Tensor = self.model(ids, attention=attention, positions_BT=positions)
            return hidden
        with self.adapter.active(blocks > 0):
            hidden = self.model(ids, attention=attention, positions_BT=positions)
        return hidden

    def _causal_loss(self, hidden_BSD: Tensor, batch: Batch) -> Tensor:
        """As in pretraining, over the clean tokens."""
        targets = torch.from_numpy(batch.ids[:, 1:]).to(hidden_BSD.device)
        weights = torch.from_numpy(batch.weights).to(hidden_BSD.device)
        with torch.autocast(hidden_BSD.device.type, torch.bfloat16, enabled=self._autocast):
            logits_BTV = self.model.logits(hidden_BSD[:, : targets.shape[1]])
        losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum().clamp_min(1e-6)

    def rows(self, batch: Batch) -> NoisyRows:
        """The batch with a noisy copy of each picture, not corrupted yet."""
        ids_BT = batch.ids[:, :-1]
        return lay_out(
            ids_BT,
            inputs_BT=batch.inputs,
            documents_BT=batch.documents,
            num_blocks=self.config.num_blocks(batch.kind, ids_BT.shape[1]),
            block_length=self.config.block_length,
            vocabulary=self.vocabulary,
        )

    def _corrupted(
        self, rows: NoisyRows, on_device: Mapping[str, Tensor], *, rng: torch.Generator, time: float | None
    ) -> Tensor:
        """The ids with each noisy picture at a time of its own."""
        ids, blocks = on_device["ids"], on_device["blocks"]
        noisy = np.flatnonzero((rows.blocks > 0) & (rows.ids >= self.vocabulary.visual_start))
        places = torch.from_numpy(noisy).to(ids.device)
        times_BK = _spread_times((len(ids), max(1, int(rows.blocks.max()))), rng=rng)
        times_BK = self.config.noise.shifted(times_BK) if time is None else torch.full_like(times_BK, time)
        times_BS = times_BK.gather(1, (blocks - 1).clamp_min(0))
        kept, drawn = torch.rand((2, len(noisy)), generator=rng, device=ids.device, dtype=torch.float64)
        codes = ids.flatten()[places] - self.vocabulary.visual_start
        corrupted = self.path.corrupt(codes, times_BS.flatten()[places], kept_N=kept, drawn_N=drawn)
        return ids.flatten().index_copy(0, places, corrupted + self.vocabulary.visual_start).view_as(ids)

    def validation_losses(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Mean loss of noisy codes in nats, over all times and at the middle of each band of them."""
        begun = _now()
        bands = [(band + 0.5) / _BANDS for band in range(_BANDS)]
        means = []
        with self._measuring():
            for time in bands:
                rng = self._generator(-1)
                losses = [self.losses(batch, rng=rng, time=time)[0].detach() for batch in batches]
                means.append(float(torch.cat(losses).mean()))
        figures = {f"validation_loss_t{time:.3f}": mean for time, mean in zip(bands, means, strict=True)}
        self.validation_s = _now() - begun
        return {"validation_loss": sum(means) / len(means), **figures}

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """Compiled layers measure as they train, or each would be compiled once more without gradients."""
        if self.config.compile and not self.model.config.attention_dropout:
            yield
            return
        with torch.no_grad():
            self.model.eval()
            yield
            self.model.train()

    def _generator(self, step: int) -> torch.Generator:
        seed = int(np.random.SeedSequence((self.config.seed, step + 1)).generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator(self.model.device).manual_seed(seed)

    def state(self) -> dict[str, Any]:
        return {"model": (self.adapter or self.model).state_dict(), "optimizer": self.optimizer.state_dict()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        (self.adapter or self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def _with_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _spread_times(shape: tuple[int, int], *, rng: torch.Generator) -> Tensor:
    """Uniform times of which a batch has early, middle and late ones in equal numbers: the loss of a picture
    near the noise is ten times that of one near its codes, and would drown what a step changes."""
    count = shape[0] * shape[1]
    offset, order = torch.rand((2, count), generator=rng, device=rng.device)
    spread = (offset[0] + torch.arange(count, device=rng.device) / count) % 1.0
    return spread[order.argsort()].view(shape) * _LATEST


def train(config: DidaTraining) -> dict[str, float]:
    """Run the stage; writes a folder that `emuworld.load` opens into `config.out`, whenever it saves its
    state.
    """
    begun, device = _now(), pick_device(config.device)
    torch.set_float32_matmul_precision("high")
    source, out = find(config.init_from), Path(config.out)
    if not config.codes:
        wait_for_shards(config.shards)
    parts = open_parts(source, device=device)
    training, validation = samplers(config, parts, out=out)
    # Frozen weights are in 16 bits on a GPU, as they are decoded with; those that move need more.
    frozen = config.adaptation == "adapter" and device.type == "cuda"
    dtype = torch.bfloat16 if frozen else torch.float32
    trainer = DidaTrainer(
        config,
        model=checkpoint.load(source, device=device, dtype=dtype).train(),
        vocabulary=parts.manifest.vocabulary,
        path=make_path(config.noise, codebook_KE=parts.vision.quantize.embedding.weight.detach()),
    )
    if config.compile:
        trainer.compile_layers()
    held = _held(config, validation)
    store = FileStore(out / "dida.state.pt", get=trainer.state, put=trainer.set_state, device=device)
    stream = BatchStream(
        lambda step: _batches(config, training, step=step),
        first_step=store.first_step() if config.loop.resume else 0,
    )
    trainer.batches = stream.next

    def on_log(step: int) -> Mapping[str, float]:
        return trainer.validation_losses(held) if step % config.validate_every_steps == 0 else {}

    try:
        loop.run(
            config.loop,
            out=out,
            name="dida",
            train_step=trainer.step,
            store=store,
            on_log=on_log,
            on_save=lambda: write_folder(config, trainer, source=source, manifest=parts.manifest),
            begun=begun,
            closing_s=lambda: trainer.validation_s,
        )
    finally:
        stream.close()
    return trainer.validation_losses(held)


def _batches(config: DidaTraining, sampler: ExampleSampler, *, step: int) -> list[Batch]:
    if not config.packing.tokens:
        return step_batches(sampler, config.buckets, seed=config.seed, step=step)
    return packed_batches(
        sampler, config.buckets, packing=config.packing, seed=config.seed, step=step, rank=0, world=1
    )


def _held(config: DidaTraining, sampler: ExampleSampler) -> list[Batch]:
    """What validation measures, in shapes of training."""
    if config.packing.tokens:
        num_rows = config.validation_batches * config.packing.rows_at_once
        packing = dataclasses.replace(config.packing, rows=num_rows)
        return _batches(dataclasses.replace(config, packing=packing), sampler, step=1 << 40)
    rng = np.random.default_rng((config.seed, 1))
    return [sampler.batch(b, rng) for b in config.buckets for _ in range(config.validation_batches)]


def write_folder(config: DidaTraining, trainer: DidaTrainer, *, source: Path, manifest: Manifest) -> None:
    """The checkpoint with its new weights in `config.out`, ready to be opened."""
    out = Path(config.out)
    changed = {MANIFEST_FILE, ADAPTER_FILE}
    if trainer.adapter is None:
        changed |= {checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE}
        checkpoint.save(out, trainer.model, dtype=torch.bfloat16)
        (out / ADAPTER_FILE).unlink(missing_ok=True)
    else:
        save_adapter(out, trainer.adapter, base=weights_name(source))
    for name in (*present_files(source), *_KEPT_FILES):
        if name not in changed and (source / name).is_file():
            copy_file(source / name, out / name)
    sampling = {
        mode: dataclasses.replace(manifest.sampling_for(mode), passes=config.default_passes)
        for mode in manifest.modes
    }
    dataclasses.replace(manifest, dida=config.noise, sampling={**manifest.sampling, **sampling}).save(out)
