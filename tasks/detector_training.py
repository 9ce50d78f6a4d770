"""Stage `detector`: the judge learns from the simulator's frames and their segmentation, rendered on the fly.

Half of the training frames pass through the vision tokenizer first, because the judge will look at frames
that a tokenizer decoded. The judge is an instrument and not what is measured: half of its rooms and tables
are drawn as the test split draws them, held-out pairs included (a judge that never met a green ball calls it
a green egg), with seeds that no suite asks for. The threshold is set on the validation split; errors are
measured on validation and test, rooms and tables apart, on plain and on tokenized frames, and stored in the
file's header.
"""

import itertools
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

from emuworld.checkpoint_folder import DETECTOR_FILE, find_device
from emuworld.envs.render import checked_backend
from emuworld.tasks.checks import check_amounts
from emuworld.tasks.detector import (
    BACKGROUND,
    STRIDE,
    Detector,
    DetectorConfig,
    calibrate,
    errors,
    true_shares,
)
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.table_views import make_table_views
from emuworld.tasks.truth import Labels, Request, make_views, render_pool
from emuworld.tokens.vision import VisionTokenizer

# Seeds of rooms, far from those of suites (below 2^31) and of training data (which count up from 0).
TRAINING_ROOMS, MEASURED_ROOMS = 1 << 40, 1 << 41


@dataclass(frozen=True, kw_only=True)
class DetectorTraining:
    """How the detector is trained."""

    max_steps: int = 20_000  # at most
    max_seconds: float = 60.0  # of training; whichever of the two comes first
    batch: int = 128  # crops a step
    crop_px: int = 128  # side of a crop; four in five are laid around an object
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    background_weight: float = 0.3  # of the object-or-not loss: less of it keeps recall up
    seed: int = 0  # of the weights and the order of the crops

    def __post_init__(self) -> None:
        if min(self.max_steps, self.batch, self.crop_px) < 1 or self.max_seconds <= 0:
            raise ValueError(
                f"training.max_steps={self.max_steps}, batch={self.batch}, crop_px={self.crop_px} and "
                f"max_seconds={self.max_seconds} came; expected more than 0 of each"
            )


@dataclass(frozen=True, kw_only=True)
class DetectorStage:
    """Train the detector that judges which objects are in a frame; about two minutes on one H200, half an
    hour on two CPU cores (num_rooms=1000 tokenized_share=0.1 num_test_rooms=40 training.max_seconds=1200).
    """

    out: str = "outputs/train/detector"  # folder for detector.safetensors
    vision: str = "auto"  # folder of a vision tokenizer; auto = that in out, if any; "" = plain frames only
    start_from: str = ""  # a detector file to go on from; "" = new weights
    device: str = "auto"  # auto | cpu | cuda
    num_rooms: int = 2500  # half of the training split, half like those of the test split
    views_per_room: int = 8
    # Of the frames, passed through the tokenizer; half of every batch is of them.
    tokenized_share: float = 0.5
    num_tables: int = 1000  # the same of table-tops, each the first of several edited views
    num_test_rooms: int = 125  # of the validation split, and again of the test split; so many tables too
    size_px: int = 256
    workers: int = 0  # processes that render; 0 = one a core, at most 16
    renderer: str = "auto"  # auto | gl | rays | cuda
    seed: int = 0  # of the rooms
    training: DetectorTraining = field(default_factory=DetectorTraining)

    def __post_init__(self) -> None:
        """ValueError before thousands of frames are rendered."""
        check_amounts(self, 1, "num_rooms", "views_per_room", "num_test_rooms")
        check_amounts(self, 0, "num_tables")
        checked_backend(self.renderer)


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Frames [N, H, W, 3] with their labels; the first `num_tokenized` of them went through a tokenizer."""

    frames: NDArray[np.uint8]
    labels: Labels
    num_tokenized: int = 0


def train(config: DetectorStage, *, on_progress: OnProgress = quiet) -> dict[str, Any]:
    """Run the stage: writes `detector.safetensors` into `config.out`; returns its errors by split and kind of
    frame.
    """
    device = find_device(config.device)
    # Either may fail: before frames are rendered.
    vision, begin = _vision(config, device=device), _begun(config)
    examples = _training_set(config, vision, on_progress=on_progress)

    def on_step(step: int, loss: float, progress: float) -> None:
        on_progress("training", round(100 * progress), 100)

    detector = fit(begin.to(device), examples, training=config.training, on_step=on_step)
    on_progress("training", 100, 100)
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    true: dict[str, NDArray[np.float32]] = {}
    seeds = range(MEASURED_ROOMS, MEASURED_ROOMS + config.num_test_rooms)
    for split, world in itertools.product(("validation", "test"), _worlds(config)):
        frames, labels = _render(config, world, {split: seeds}, on_progress)
        kinds = (
            {"plain": frames} if vision is None else {"tokenized": tokenize(frames, vision), "plain": frames}
        )
        name = split if world == "rooms" else f"{split} tables"
        true[name] = true_shares(labels, config=detector.config)
        found[name] = {kind: detector.shares(some) for kind, some in kinds.items()}
    # Set where it will be used: on tokenized frames, where there are any.
    on = [name for name in true if name.startswith("validation")]
    seen = np.concatenate([next(iter(found[name].values())) for name in on])
    min_share = calibrate(seen, np.concatenate([true[name] for name in on]))
    measured = {
        split: {kind: errors(t, true[split], min_share=min_share).as_dict() for kind, t in tables.items()}
        for split, tables in found.items()
    }
    notes = {"settings": asdict(config), "errors": measured}
    with_threshold(detector, min_share).save(Path(config.out) / DETECTOR_FILE, notes=notes)
    for split, by_kind in measured.items():
        for kind, one in by_kind.items():
            figures = ", ".join(f"{name} {one[name]['value'] or 0.0:.3f}" for name in ("precision", "recall"))
            print(f"detector, {split}, {kind} frames: {figures}", flush=True)
    return measured


def _training_set(
    config: DetectorStage, vision: VisionTokenizer | None, *, on_progress: OnProgress
) -> Examples:
    """Frames and labels to train on; with a tokenizer, a share of them, spread over the rooms, went through
    it.
    """
    half, first = config.num_rooms // 2, TRAINING_ROOMS + (config.seed << 24)
    rooms = {"train": range(first, first + config.num_rooms - half), "test": range(first, first + half)}
    frames, labels = _render(config, "rooms", rooms, on_progress)
    if "tables" in _worlds(config):
        half = config.num_tables // 2
        tables = {"train": range(first, first + config.num_tables - half), "test": range(first, first + half)}
        more, more_labels = _render(config, "tables", tables, on_progress)
        frames = np.concatenate([frames, more])
        labels = Labels(
            shapes=np.concatenate([labels.shapes, more_labels.shapes]),
            colours=np.concatenate([labels.colours, more_labels.colours]),
        )
    if vision is None or config.tokenized_share <= 0.0:
        return Examples(frames=frames, labels=labels)
    chosen = np.zeros(len(frames), np.bool_)
    chosen[
        np.linspace(0, len(frames) - 1, max(1, round(config.tokenized_share * len(frames)))).astype(int)
    ] = True
    order = np.concatenate([np.flatnonzero(chosen), np.flatnonzero(~chosen)])
    frames, num_tokenized = frames[order], int(chosen.sum())
    frames[:num_tokenized] = tokenize(frames[:num_tokenized], vision)
    labels = Labels(shapes=labels.shapes[order], colours=labels.colours[order])
    return Examples(frames=frames, labels=labels, num_tokenized=num_tokenized)


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


def _worlds(config: DetectorStage) -> tuple[str, ...]:
    return ("rooms", "tables") if config.num_tables else ("rooms",)


def _begun(config: DetectorStage) -> Detector:
    """New weights, or those of another detector; shapes that it does not know begin anew."""
    fresh = new(seed=config.training.seed)
    if not config.start_from:
        return fresh
    old = Detector.load(Path(config.start_from))
    if old.config.shapes == fresh.config.shapes:
        return old
    known = len(old.config.shapes)
    if old.config.shapes != fresh.config.shapes[:known] or old.config.colours != fresh.config.colours:
        raise ValueError(
            f"{config.start_from} tells {old.config.shapes} in {old.config.colours} apart; expected some of "
            f"{fresh.config.shapes} in their order; leave start_from out"
        )
    grown = new(replace(old.config, shapes=fresh.config.shapes), seed=config.training.seed)
    state = old.state_dict()
    for name, tensor in grown.state_dict().items():
        if name.startswith("shape_head."):
            state[name] = torch.cat([state[name], tensor[len(state[name]) :]])
    grown.load_state_dict(state)
    return grown


def _render(
    config: DetectorStage, world: str, rooms: dict[str, range], on_progress: OnProgress
) -> tuple[NDArray[np.uint8], Labels]:
    """Views of rooms or tables (seeds by split) with their labels, in the order of the seeds."""
    make = make_views if world == "rooms" else make_table_views
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
    label = f"rendering {world} ({' and '.join(rooms)})"
    with render_pool(config.workers or min(16, cpu_count() or 1)) as pool:
        futures = [pool.submit(make, request) for request in requests]
        for done, _ in enumerate(as_completed(futures), start=1):
            on_progress(label, done, len(requests))
        views = [future.result() for future in futures]
    frames = np.concatenate([frames for frames, _ in views])
    shapes = np.concatenate([labels.shapes for _, labels in views])
    colours = np.concatenate([labels.colours for _, labels in views])
    return frames, Labels(shapes=shapes, colours=colours)


def new(config: DetectorConfig | None = None, *, seed: int = 0) -> Detector:
    """A detector with fresh weights; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Detector(config or DetectorConfig())


def fit(
    detector: Detector,
    examples: Examples,
    *,
    training: DetectorTraining,
    on_step: Callable[[int, float, float], None] = lambda step, loss, progress: None,
) -> Detector:
    """Train the detector in place on its device; `on_step(step, loss, progress 0 to 1)` reports."""
    detector.train()
    optimiser = torch.optim.AdamW(
        detector.parameters(),
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        betas=(0.9, 0.95),
    )
    batches = _batches(examples, training=training, device=detector.device)
    start = time.monotonic()
    for step in range(training.max_steps):
        progress = max(step / training.max_steps, (time.monotonic() - start) / training.max_seconds)
        if progress >= 1.0:
            break
        for group in optimiser.param_groups:  # short warm-up, then linear to almost zero
            group["lr"] = training.learning_rate * min(1.0, (step + 1) / 100, 1.02 - progress)
        frames, shapes, colours = next(batches)
        with torch.autocast(detector.device.type, dtype=torch.bfloat16):
            shape_logits, colour_logits = detector(frames)
        loss = _loss(
            shape_logits.float(),
            colour_logits.float(),
            shapes.long(),
            colours.long(),
            background_weight=training.background_weight,
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimiser.step()
        if step % 20 == 0:
            on_step(step, float(loss.detach()), progress)
    return detector.eval()


def _batches(
    examples: Examples, *, training: DetectorTraining, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Random crops of frames, shapes and colours on the device, every second batch mirrored: a mirrored
    room is a room.
    """
    labels = examples.labels
    data = [torch.from_numpy(array).to(device) for array in (examples.frames, labels.shapes, labels.colours)]
    side = min(training.crop_px // STRIDE, *data[1].shape[1:])  # in cells
    rng = np.random.default_rng(training.seed)
    cells: dict[int, list[NDArray[np.int64]]] = {}  # of each object of a frame; found once a frame
    mirrored = False
    while True:
        rows = _rows(examples, training.batch, rng)
        for row in set(rows.tolist()) - cells.keys():
            cells[row] = _object_cells(labels.shapes[row], labels.colours[row])
        corners = [_corner(cells[row], side, labels.shapes.shape[1:3], rng) for row in rows.tolist()]
        crops = _crops(data, torch.from_numpy(rows).to(device), torch.tensor(corners, device=device), side)
        yield (crops[0].flip(2), crops[1].flip(2), crops[2].flip(2)) if mirrored else crops
        mirrored = not mirrored


def _crops(
    data: list[Tensor], rows_B: Tensor, corners_B2: Tensor, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Crops of `side` cells at the given top and left cells, of frames, shapes and colours."""
    crops = []
    for array, stride in zip(data, (STRIDE, 1, 1), strict=True):
        offsets = torch.arange(side * stride, device=array.device)
        ys, xs = (corners_B2[:, axis, None] * stride + offsets for axis in (0, 1))
        crops.append(array[rows_B[:, None, None], ys[:, :, None], xs[:, None, :]])
    return crops[0], crops[1], crops[2]


def _rows(examples: Examples, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Which frames a batch takes its crops from: half of them tokenized ones, where there are both kinds."""
    total, tokenized = len(examples.frames), examples.num_tokenized
    if tokenized in (0, total):
        return rng.integers(total, size=count)
    half = count // 2
    return np.concatenate(
        [rng.integers(tokenized, size=half), rng.integers(tokenized, total, size=count - half)]
    )


def _object_cells(shapes: NDArray[np.uint8], colours: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """The cells (row, column) of each object of a frame."""
    kinds = np.where(shapes != BACKGROUND, shapes.astype(np.int64) * 256 + colours, 0)
    return [np.argwhere(kinds == kind) for kind in np.unique(kinds[kinds > 0])]


def _corner(
    objects: list[NDArray[np.int64]], side: int, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[int, int]:
    """Top and left cell of a crop: four times in five somewhere around an object, small ones as often as
    large.
    """
    limits = shape[0] - side, shape[1] - side
    if not objects or rng.random() < 0.2:
        return int(rng.integers(limits[0] + 1)), int(rng.integers(limits[1] + 1))
    cells = objects[rng.integers(len(objects))]
    cell = cells[rng.integers(len(cells))]
    top, left = (
        int(np.clip(at - rng.integers(side), 0, most)) for at, most in zip(cell, limits, strict=True)
    )
    return top, left


def _loss(
    shape_logits: Tensor, colour_logits: Tensor, shapes: Tensor, colours: Tensor, *, background_weight: float
) -> Tensor:
    """Three cross entropies of about equal size: object or not everywhere; which shape and which colour
    where there is an object. In one softmax over all, the many background cells would leave the shapes next
    to no gradient.
    """
    is_object = shapes != BACKGROUND
    log_p = shape_logits.log_softmax(1)
    log_p_object = log_p[:, 1:].logsumexp(1)
    weight = torch.where(is_object, 1.0, background_weight)
    presence = -(weight * torch.where(is_object, log_p_object, log_p[:, BACKGROUND])).sum() / weight.sum()
    if not is_object.any():
        return presence
    at_object = shape_logits.movedim(1, -1)[is_object][:, 1:], colour_logits.movedim(1, -1)[is_object]
    shape = F.cross_entropy(at_object[0], shapes[is_object] - 1)
    colour = F.cross_entropy(at_object[1], colours[is_object])
    return presence + shape + colour
