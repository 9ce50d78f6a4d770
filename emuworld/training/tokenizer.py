"""Stage `tokenizer`: the IBQ vision tokenizer learns to draw the frames of a folder of stories again.

Losses after IBQ: reconstruction (here L1, squared error and its logarithm, no perceptual or adversarial term:
the built-in model is measured against the simulator's own pixels), double quantisation, and entropy: each
position sure of its code, all codes used. Two departures keep a short run from collapsing: the codes keep one
common length (with free lengths the longest wins every dot product), and codes that a window of steps never
used are set to latents of the current batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from emuworld.tokens.vision import DOWNSAMPLE, VisionTokenizer, to_pixels
from emuworld.tokens.vision_network import VisionConfig
from emuworld.training import loop
from emuworld.training.data import FramePool, ShardFeed
from emuworld.training.devices import pick_device
from emuworld.training.muon import Muon
from emuworld.training.ranks import Ranks
from emuworld.training.shard_files import wait_for_shards
from emuworld.training.states import FileStore


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """Settings of the stage; yaml chooses values, the defaults are the built-in model's."""

    shards: str = "outputs/data/train"  # folder that `data build` wrote
    validation_shards: str | None = None  # one of the validation split: what is measured at the end
    out: str = "outputs/train/tokenizer"  # folder of vision.json, vision.safetensors, state and log
    init_from: str | None = None  # folder of a trained tokenizer to go on from; its sizes replace `model`
    # Go on from `init_from` with what draws codes alone: codes stay what they are, and a transformer that
    # learnt them stays of use.
    decoder_only: bool = False
    size_px: int = 256  # larger pictures are made smaller, smaller ones left out
    frames_in_memory: int = 20_000  # at most, from which batches are drawn
    first_frames: int = 4_096  # read before training begins
    wait_for_data_s: float = 0.0  # for the first shard
    device: str = "auto"  # auto | cpu | cuda
    compile: bool = False  # torch.compile: some 80 s first, then faster; on a GPU
    compile_mode: str = "default"  # of torch.compile; reduce-overhead replays CUDA graphs
    batch_size: int = 24  # steps count for more than frames a step
    # Muon for the kernels of convolutions, AdamW for codes, biases and norms; "adamw": for all.
    optimizer: str = "muon"
    learning_rate: float = 6e-4  # AdamW's
    kernel_learning_rate: float = 2e-3  # Muon's
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0  # norm above which gradients are made shorter
    l1_weight: float = 1.0  # of the mean error
    l2_weight: float = 2.0  # of the squared error
    # Of the mean over frames of log squared error, which is what a mean in dB measures.
    log_weight: float = 0.02
    mirror: bool = True  # half of the frames left and right exchanged
    second_look_weight: float = 0.0  # of drawing again what was drawn, moved; see `_second_look`
    quantisation_weight: float = 0.1  # at 0.25 latents collapsed before the decoder had learnt to use them
    entropy_weight: float = 0.02  # of the entropy terms: each pixel sure of its code, all codes in use
    batch_entropy_gain: float = 1.0  # how much more the second of them counts
    entropy_temperature: float = 0.3  # of the softmax over codes in both
    codebook_length: float = 4.0  # common length of all codes; 0 leaves them free, as published
    crop_px: int = 0  # train on random crops of this side; 0 takes whole frames
    restart_every_steps: int = 500  # codes that nothing uses begin anew as what the encoder gives
    restart_until: float = 0.6  # none do any more when the learning rate has fallen by this share
    seed: int = 0
    workers: int = 0  # processes that decode pictures; 0: a thread
    follow_shards: bool = False  # go on looking for shards that a renderer is still writing
    model: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    loop: loop.LoopConfig = dataclasses.field(default_factory=loop.LoopConfig)

    def __post_init__(self) -> None:
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer {self.optimizer!r} is not known; expected 'muon' or 'adamw'")
        if self.size_px < 1 or self.size_px % DOWNSAMPLE or self.crop_px < 0 or self.crop_px % DOWNSAMPLE:
            raise ValueError(
                f"size_px and crop_px are multiples of {DOWNSAMPLE}, got {self.size_px} and {self.crop_px}"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")
        if self.decoder_only and not self.init_from:
            raise ValueError("decoder_only goes on from a trained tokenizer: say which with init_from=FOLDER")
        if self.decoder_only and self.second_look_weight:
            raise ValueError("decoder_only leaves codes as they are: second_look_weight must be 0")


class TokenizerTrainer:
    """Model, optimiser and one training step; `state`/`set_state` for the loop."""

    def __init__(self, config: TokenizerTraining, *, pool: FramePool, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.pool = pool
        torch.manual_seed(config.seed)
        self.model = self._new_model().to(device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stubs
        self.optimizers = self._new_optimizers()
        self.uses = torch.zeros(self.model.num_codes, device=device)
        self._drawn_losses = self._losses
        if config.compile:
            self._drawn_losses = torch.compile(self._losses, dynamic=False, mode=config.compile_mode)

    def _new_model(self) -> VisionTokenizer:
        if self.config.init_from:
            model = VisionTokenizer.load(self.config.init_from).train()
            drawing = (model.decoder, model.post_quant_conv) if self.config.decoder_only else (model,)
            for part in drawing:
                part.requires_grad_(True)
            return model
        model = VisionTokenizer(self.config.model)
        torch.nn.init.normal_(model.quantize.embedding.weight, std=self.config.model.embed_dim**-0.5)
        self._set_code_lengths(model)
        return model

    def _new_optimizers(self) -> list[torch.optim.Optimizer]:
        config = self.config
        trained = [p for p in self.model.parameters() if p.requires_grad]
        kernels = [p for p in trained if p.ndim == 4] if config.optimizer == "muon" else []
        taken = {id(p) for p in kernels}
        others = {"params": [p for p in trained if id(p) not in taken], "base_lr": config.learning_rate}
        adamw = torch.optim.AdamW(
            [others],
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )
        if not kernels:
            return [adamw]
        group = {"params": kernels, "base_lr": config.kernel_learning_rate}
        return [adamw, Muon([group], weight_decay=config.weight_decay)]

    def step(self, step: int, factor: float) -> Mapping[str, Tensor]:
        config = self.config
        if step % 20 == 0:
            self.pool.refresh()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.zero_grad(set_to_none=True)
        rng = np.random.default_rng((config.seed, step))
        images = self.pool.sample(config.batch_size, rng)
        if config.crop_px:
            top, left = (int(rng.integers(0, config.size_px - config.crop_px + 1)) for _ in range(2))
            images = images[:, top : top + config.crop_px, left : left + config.crop_px]
        if config.mirror:
            images = torch.cat((images[::2], images[1::2].flip(2)))
        torch.compiler.cudagraph_mark_step_begin()
        moves = torch.from_numpy(random_moves(config.batch_size // 2, rng)).to(self.device)
        loss, latents, codes, figures = self._drawn_losses(images, moves)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if not config.decoder_only:
            self._set_code_lengths(self.model)
            self._restart_idle_codes(step, factor, codes, latents.detach())
        used = (self.uses > 0).float().mean()  # since the last restart of idle codes
        return {**figures, "codes_used_share": used, "frames": torch.tensor(float(self.pool.num_frames))}

    def _losses(self, images: Tensor, moves: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Images uint8 [B, H, W, 3], moves [B // 2, 2, 3] -> loss, latents [B, D, h, w], codes [B, h, w],
        figures to log.
        """
        config = self.config
        pixels = to_pixels(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            latents = self.model.latents(pixels)
        if config.decoder_only:
            codes = self.model.quantize.codes(latents)
            drawn = self._drawn(self.model.vectors(codes))
            loss, squared_B = self._distance(drawn, pixels)
            figures = {"loss": loss.detach(), "psnr_db": -10 * (squared_B.detach() / 4).log10().mean()}
            return loss, latents, codes, figures
        quantised = self.model.quantize(latents, entropy_temperature=config.entropy_temperature)
        drawn = self._drawn(quantised.z_q)
        reconstruction, squared_B = self._distance(drawn, pixels)
        entropy = quantised.sample_entropy - config.batch_entropy_gain * quantised.batch_entropy
        loss = (
            reconstruction
            + config.quantisation_weight * quantised.quantisation_loss
            + config.entropy_weight * entropy
        )
        figures = {
            "loss": loss.detach(),
            "psnr_db": -10 * (squared_B.detach() / 4).log10().mean(),
            "quantisation": quantised.quantisation_loss.detach(),
            "sample_entropy": quantised.sample_entropy.detach(),
            "batch_entropy": quantised.batch_entropy.detach(),
        }
        if config.second_look_weight:
            again, again_B = self._second_look(drawn.detach(), pixels, moves)
            loss = loss + config.second_look_weight * again
            figures["second_look_db"] = -10 * (again_B.detach() / 4).log10().mean()
        return loss, latents, quantised.codes, figures

    def _drawn(self, z_q_BDhw: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model.pixels(z_q_BDhw).float()

    def _distance(self, drawn: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """How far drawings are from pictures, [B, 3, H, W]: the weighted sum, and squared errors [B]."""
        config, error = self.config, drawn - pixels
        squared_B = error.square().mean(dim=(1, 2, 3))
        logs_B = squared_B.clamp_min(1e-6).log()
        total = config.l1_weight * error.abs().mean() + config.l2_weight * squared_B.mean()
        return total + config.log_weight * logs_B.mean(), squared_B

    def _second_look(self, drawn: Tensor, pixels: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
        """Draw half of the drawings once more, as seen after a move, towards the moved pictures.

        A world model must know the codes of a view from the codes of the one before. Whatever the tokenizer
        makes differently of its own drawing than of the picture, no model can foretell.
        """
        half = len(moves)
        grid = F.affine_grid(moves, [half, *pixels.shape[1:]], align_corners=False)
        seen, target = (
            F.grid_sample(some[:half], grid, padding_mode="reflection", align_corners=False)
            for some in (drawn.clamp(-1, 1), pixels)
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            latents = self.model.latents(seen)
        quantised = self.model.quantize(latents, entropy_temperature=self.config.entropy_temperature)
        return self._distance(self._drawn(quantised.z_q), target)

    @torch.no_grad()
    def _set_code_lengths(self, model: VisionTokenizer) -> None:
        if self.config.codebook_length:
            codes = model.quantize.embedding.weight
            codes.mul_(self.config.codebook_length / codes.norm(dim=1, keepdim=True).clamp_min(1e-6))

    @torch.no_grad()
    def _restart_idle_codes(self, step: int, factor: float, codes: Tensor, z_BDhw: Tensor) -> None:
        every = self.config.restart_every_steps
        self.uses.scatter_add_(0, codes.flatten(), torch.ones_like(codes.flatten(), dtype=self.uses.dtype))
        if not every or (step + 1) % every:
            return
        if factor > 1.0 - self.config.restart_until:  # a code set late would not be learnt
            idle = (self.uses == 0).nonzero().flatten()
            z_ND = z_BDhw.float().permute(0, 2, 3, 1).reshape(-1, z_BDhw.shape[1])
            generator = torch.Generator(self.device).manual_seed(self.config.seed + step)
            rows = torch.randint(len(z_ND), (len(idle),), generator=generator, device=self.device)
            self.model.quantize.embedding.weight[idle] = z_ND[rows]
            self._set_code_lengths(self.model)
        self.uses.zero_()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "uses": self.uses,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.uses.copy_(state["uses"])


def random_moves(num: int, rng: np.random.Generator) -> np.ndarray:
    """Affine maps float32 [num, 2, 3] from places in the moved picture to places in the picture (-1 to 1):
    nearer or farther by up to a quarter, shifted by up to half a picture sideways and a quarter up or down.
    """
    zoom = np.exp(rng.uniform(-0.22, 0.22, num))
    maps = np.zeros((num, 2, 3), np.float32)
    maps[:, 0, 0] = maps[:, 1, 1] = zoom
    maps[:, 0, 2], maps[:, 1, 2] = rng.uniform(-1.0, 1.0, num), rng.uniform(-0.5, 0.5, num)
    return maps


def train(config: TokenizerTraining) -> dict[str, float]:
    """Run the stage; writes `vision.json` and `vision.safetensors` into `config.out`, whenever it saves its
    state, and returns validation figures.
    """
    device = pick_device(config.device)
    if Ranks(device).world > 1:
        raise ValueError("stage tokenizer trains in one process: start it without torchrun")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # shapes are fixed, and the default choice is slow for few channels
    wait_for_shards(config.shards, timeout_s=config.wait_for_data_s)
    size = (config.size_px, config.size_px)
    feed = ShardFeed(config.shards, size=size, workers=config.workers, follow=config.follow_shards)
    pool = FramePool(feed, capacity=config.frames_in_memory, device=device)
    pool.fill(config.first_frames)
    trainer = TokenizerTrainer(config, pool=pool, device=device)
    out = Path(config.out)
    loop.run(
        config.loop,
        out=out,
        name="tokenizer",
        train_step=trainer.step,
        store=FileStore(out / "tokenizer.state.pt", get=trainer.state, put=trainer.set_state, device=device),
        on_save=lambda: trainer.model.save(out),
    )
    feed.close()
    return validate(config, device=device) if config.validation_shards else {}


@torch.no_grad()
def validate(config: TokenizerTraining, *, device: torch.device, num_frames: int = 2_000) -> dict[str, float]:
    """PSNR (mean over frames, dB) and code use of the saved tokenizer over frames of the validation shards,
    in fp32.
    """
    model = VisionTokenizer.load(config.out, device=device)
    size = (config.size_px, config.size_px)
    feed = ShardFeed(config.validation_shards or config.shards, size=size, workers=config.workers)
    pool = FramePool(feed, capacity=num_frames, device=torch.device("cpu"))
    pool.fill(num_frames)
    feed.close()
    images = pool._frames[: pool.num_frames]
    psnr, used = [], torch.zeros(model.num_codes, dtype=torch.bool)
    for chunk in images.split(64):
        codes = model.encode(chunk.to(device))
        used[codes.flatten().cpu()] = True
        error = model.decode(codes).float().cpu() - chunk.float()
        psnr.append(10 * torch.log10(255**2 / error.square().mean(dim=(1, 2, 3)).clamp_min(1e-6)))
    figures = {
        "psnr_db": float(torch.cat(psnr).mean()),
        "codes_used_share": float(used.float().mean()),
        "frames": float(len(images)),
    }
    print("tokenizer, validation: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
    return figures
