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

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from time import monotonic as _now

import numpy as np
import torch

from emuworld.checkpoint_folder import DETECTOR_FILE, find, open_parts, present_files, weights_name
from emuworld.decoding.noise import Noise, make_path
from emuworld.decoding.sampling import Sampling
from emuworld.manifest import FILE_NAME as MANIFEST_FILE
from emuworld.manifest import Manifest
from emuworld.model import checkpoint
from emuworld.model.adapter import FILE_NAME as ADAPTER_FILE
from emuworld.model.adapter import save_adapter
from emuworld.tokens.sequence import MODES
from emuworld.tokens.vision import DOWNSAMPLE
from emuworld.training import loop
from emuworld.training.batch_stream import BatchStream
from emuworld.training.checkpoints import copy_file
from emuworld.training.devices import pick_device
from emuworld.training.distil_stories import samplers
from emuworld.training.distil_trainer import DidaTrainer
from emuworld.training.examples import Batch, Bucket, ExampleSampler, Mixture, step_batches
from emuworld.training.own_stories import OwnStories
from emuworld.training.packing import KIND as PACKED
from emuworld.training.packing import Packing, packed_batches
from emuworld.training.shard_files import wait_for_shards
from emuworld.training.sizes import check_buckets
from emuworld.training.states import FileStore

_WORDS_OF_A_PICTURE = 24  # ids around a picture, at the least
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
    adapter_from: str = ""  # a folder, or small, whose adapter is trained on; "": a new one
    noise: Noise = dataclasses.field(default_factory=Noise)
    causal_weight: float = 1.0  # of the clean tokens' loss beside the noisy ones'; full adaptation only
    default_passes: int = 0  # what the environments draw with; 0 = token by token unless told otherwise
    gpu_passes: int = 0  # the same on a GPU, where passes are faster, in gpu_modes; 0 = as default_passes
    gpu_modes: tuple[str, ...] = ("explore",)  # modes that lose nothing by it
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
        if self.adapter_from and self.adaptation != "adapter":
            raise ValueError(
                "adapter_from goes on with an adapter: adaptation=full trains none, drop one of both"
            )
        if sized := [bucket for bucket in self.buckets if bucket.size_px]:
            raise ValueError(
                f"stage dida has one picture size, size_px of the stage; got {sized[0]}: drop its"
            )
        if unknown := set(self.gpu_modes) - set(MODES):
            raise ValueError(f"gpu_modes {sorted(unknown)} are unknown; choose among {', '.join(MODES)}")
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

    def drawn(modes: tuple[str, ...], passes: int) -> dict[str, Sampling]:
        return {mode: dataclasses.replace(manifest.sampling_for(mode), passes=passes) for mode in modes}

    on_gpu = drawn(config.gpu_modes, config.gpu_passes) if config.gpu_passes else {}
    dataclasses.replace(
        manifest,
        dida=config.noise,
        sampling={**manifest.sampling, **drawn(manifest.modes, config.default_passes)},
        gpu_sampling=on_gpu,
    ).save(out)
