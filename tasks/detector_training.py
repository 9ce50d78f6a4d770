"""Stage `detector`: the judge learns from the simulator's frames and their segmentation, rendered on the fly.

Half of the training frames pass through the vision tokenizer first, because the judge will look at frames
that a tokenizer decoded. The judge is an instrument and not what is measured: half of its rooms are drawn as
the test split draws them, held-out pairs included (a judge that never met a green ball calls it a green egg),
with seeds that no suite asks for. The threshold is set on validation rooms; errors are measured on validation
and test rooms, on plain and on tokenized frames, and stored in the file's header.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field, replace
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from emuworld.tasks.detector import BACKGROUND, Detector, DetectorConfig, calibrate, errors, true_shares
from emuworld.tasks.truth import Labels, Request, make_views, render_pool
from emuworld.tokens.vision import VisionTokenizer

OnProgress = Callable[[str, int, int], None]

# Seeds of rooms, far from those of suites (below 2^31) and of training data (which count up from 0).
TRAINING_ROOMS, MEASURED_ROOMS = 1 << 40, 1 << 41


@dataclass(frozen=True, kw_only=True)
class DetectorTraining:
    """How the detector is trained."""

    max_steps: int = 3000
    max_seconds: float = 60.0  # of training; whichever of the two comes first
    batch: int = 128  # frames a step
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    background_weight: float = 0.3  # of the loss: most cells are background, less weight keeps recall up
    seed: int = 0  # of the weights and the order of the frames


@dataclass(frozen=True, kw_only=True)
class DetectorStage:
    """Train the detector that judges which objects are in a frame; about two minutes on one H200, longer on
    a CPU.
    """

    out: str = "outputs/train/detector"  # folder for detector.safetensors
    vision: str = "auto"  # folder of a vision tokenizer; auto = that in out, if any; "" = plain frames only
    device: str = "auto"  # auto | cpu | cuda
    num_rooms: int = 2500  # half of the training split, half like those of the test split
    views_per_room: int = 8
    num_test_rooms: int = 125  # of the validation split, and again of the test split
    size_px: int = 256
    workers: int = 0  # processes that render; 0 = one a core, at most 16
    renderer: str = "auto"  # auto | gl | rays
    seed: int = 0  # of the rooms
    training: DetectorTraining = field(default_factory=DetectorTraining)


def quiet(label: str, done: int, total: int) -> None:
    """No report of progress."""


def train(config: DetectorStage, *, on_progress: OnProgress = quiet) -> dict[str, Any]:
    """Run the stage: writes `detector.safetensors` into `config.out`; returns its errors by split and kind of
    frame.
    """
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    vision = _vision(config, device=device)
    frames, labels = _training_set(config, vision, device=device, on_progress=on_progress)

    def on_step(step: int, loss: float, progress: float) -> None:
        on_progress("training", round(100 * progress), 100)

    detector = fit(DetectorConfig(), frames, labels, training=config.training, device=device, on_step=on_step)
    on_progress("training", 100, 100)
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    true: dict[str, NDArray[np.float32]] = {}
    for split in ("validation", "test"):
        seeds = range(MEASURED_ROOMS, MEASURED_ROOMS + config.num_test_rooms)
        frames, labels = _render(config, {split: seeds}, on_progress)
        kinds = (
            {"plain": frames} if vision is None else {"tokenized": tokenize(frames, vision), "plain": frames}
        )
        true[split] = true_shares(labels, config=detector.config)
        found[split] = {kind: detector.shares(some) for kind, some in kinds.items()}
    # Set where it will be used: on tokenized frames, where there are any.
    min_share = calibrate(next(iter(found["validation"].values())), true["validation"])
    measured = {
        split: {kind: errors(t, true[split], min_share=min_share).as_dict() for kind, t in tables.items()}
        for split, tables in found.items()
    }
    notes = {"settings": asdict(config), "errors": measured}
    with_threshold(detector, min_share).save(Path(config.out) / "detector.safetensors", notes=notes)
    for split, by_kind in measured.items():
        for kind, one in by_kind.items():
            figures = ", ".join(f"{name} {one[name]['value'] or 0.0:.3f}" for name in ("precision", "recall"))
            print(f"detector, {split}, {kind} frames: {figures}", flush=True)
    return measured


def _training_set(
    config: DetectorStage,
    vision: VisionTokenizer | None,
    *,
    device: torch.device,
    on_progress: OnProgress,
) -> tuple[NDArray[np.uint8], Labels]:
    """Frames and labels to train on, every second frame through the vision tokenizer if there is one."""
    half, first = config.num_rooms // 2, TRAINING_ROOMS + (config.seed << 24)
    rooms = {"train": range(first, first + config.num_rooms - half), "test": range(first, first + half)}
    frames, labels = _render(config, rooms, on_progress)
    if vision is not None:
        frames[1::2] = tokenize(frames[1::2], vision)
    return frames, labels


def _vision(config: DetectorStage, *, device: torch.device) -> VisionTokenizer | None:
    """The tokenizer that the judge must see through, if there is one."""
    if config.vision == "auto":
        there = (Path(config.out) / "vision.safetensors").exists()
        return VisionTokenizer.load(config.out, device=device) if there else None
    return VisionTokenizer.load(config.vision, device=device) if config.vision else None


def with_threshold(detector: Detector, min_share: float) -> Detector:
    """The same weights with another threshold."""
    other = Detector(replace(detector.config, min_share=min_share)).to(detector.device)
    other.load_state_dict(detector.state_dict())
    return other.eval()


def tokenize(frames: NDArray[np.uint8], vision: VisionTokenizer) -> NDArray[np.uint8]:
    """Frames [N, H, W, 3] as the vision tokenizer draws them again."""
    device = next(vision.parameters()).device
    with torch.inference_mode():
        parts = torch.from_numpy(np.ascontiguousarray(frames)).split(32)
        return torch.cat([vision.decode(vision.encode(part.to(device))).cpu() for part in parts]).numpy()


def _render(
    config: DetectorStage, rooms: dict[str, range], on_progress: OnProgress
) -> tuple[NDArray[np.uint8], Labels]:
    """Views of rooms (seeds by split) with their labels, in the order of the rooms."""
    requests = [
        Request(
            index=0,
            seed=seed,
            split=split,
            size_px=config.size_px,
            renderer=config.renderer,
            num_steps=config.views_per_room,
        )
        for split, seeds in rooms.items()
        for seed in seeds
    ]
    label = f"rendering rooms ({' and '.join(rooms)})"
    with render_pool(config.workers or min(16, cpu_count() or 1)) as pool:
        futures = [pool.submit(make_views, request) for request in requests]
        for done, _ in enumerate(as_completed(futures), start=1):
            on_progress(label, done, len(requests))
        views = [future.result() for future in futures]
    frames = np.concatenate([frames for frames, _ in views])
    shapes = np.concatenate([labels.shapes for _, labels in views])
    colours = np.concatenate([labels.colours for _, labels in views])
    return frames, Labels(shapes=shapes, colours=colours)


def fit(
    config: DetectorConfig,
    frames: NDArray[np.uint8],
    labels: Labels,
    *,
    training: DetectorTraining,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, float, float], None] = lambda step, loss, progress: None,
) -> Detector:
    """Train on frames [N, H, W, 3] with their labels; `on_step(step, loss, progress 0 to 1)` reports."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(training.seed)  # the initial weights
        detector = Detector(config)
    detector = detector.to(device)
    optimiser = torch.optim.AdamW(
        detector.parameters(),
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        betas=(0.9, 0.95),
    )
    weights = torch.ones(1 + len(config.shapes), device=device)
    weights[BACKGROUND] = training.background_weight
    batches = _batches(frames, labels, training=training, device=device)
    start = time.monotonic()
    for step in range(training.max_steps):
        progress = max(step / training.max_steps, (time.monotonic() - start) / training.max_seconds)
        if progress >= 1.0:
            break
        for group in optimiser.param_groups:  # short warm-up, then linear to almost zero
            group["lr"] = training.learning_rate * min(1.0, (step + 1) / 100, 1.02 - progress)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = _loss(detector, *next(batches), class_weight=weights)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimiser.step()
        if step % 20 == 0:
            on_step(step, float(loss.detach()), progress)
    return detector.eval()


def _batches(
    frames: NDArray[np.uint8], labels: Labels, *, training: DetectorTraining, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Random batches of frames, shapes and colours on the device, every second one mirrored: a mirrored
    room is a room.
    """
    data = [torch.from_numpy(array).to(device) for array in (frames, labels.shapes, labels.colours)]
    rng = torch.Generator(device=device).manual_seed(training.seed)
    mirrored = False
    while True:
        rows = torch.randint(len(data[0]), (training.batch,), generator=rng, device=device)
        frames_B, shapes_B, colours_B = (array[rows].flip(2) if mirrored else array[rows] for array in data)
        yield frames_B, shapes_B, colours_B
        mirrored = not mirrored


def _loss(
    detector: Detector, frames: Tensor, shapes: Tensor, colours: Tensor, *, class_weight: Tensor
) -> Tensor:
    """Cross entropy of the shapes everywhere plus that of the colours where there is an object."""
    shape_logits, colour_logits = detector(frames)
    is_object = shapes != BACKGROUND
    shape_loss = F.cross_entropy(shape_logits.float(), shapes.long(), weight=class_weight)
    per_cell = F.cross_entropy(colour_logits.float(), colours.long(), reduction="none")
    return shape_loss + (per_cell * is_object).sum() / is_object.sum().clamp(min=1)
