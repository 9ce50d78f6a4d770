"""A small judge that reads objects off frames: which shapes of which colours are there, and how large.

A fully convolutional net labels every fourth pixel of a frame with a shape (or background) and a colour;
pairs whose labels cover enough of the frame count as found. It judges imagined frames, so it also trains on
frames that passed through the vision tokenizer. It is no ground truth: whoever prints a figure judged by it
prints its own `Errors` against the simulator on the same kind of frames beside it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emuworld.files import written
from emuworld.tasks.metrics import Estimate, Frame, bootstrap
from emuworld.tasks.truth import COLOUR_NAMES, DETECTED_SHAPES, LABEL_STRIDE, Labels

STRIDE = LABEL_STRIDE  # one label for each 4 x 4 pixels
# An object counts as visible from one token up (16 x 16 of 256 x 256 pixels); a smaller sighting counts
# neither for nor against a judgement, because the world model cannot be expected to draw it.
VISIBLE_SHARE = 1.0 / 256.0
BACKGROUND = 0  # shape label 0; shape s of the table is label s + 1

Pair = tuple[str, str]  # colour, shape


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """What the detector tells apart, and how large it is; `min_share` is set by calibration."""

    colours: tuple[str, ...] = COLOUR_NAMES
    shapes: tuple[str, ...] = DETECTED_SHAPES
    width: int = 64
    dilations: tuple[int, ...] = (1, 2, 4, 8, 4, 1)  # each cell sees about 100 px around it
    min_share: float = VISIBLE_SHARE / 2  # of the frame that a pair's labels must cover to count as found


@dataclass(frozen=True, kw_only=True)
class Found:
    """One colour and shape found in a frame, and the share of the frame that it covers (0 to 1)."""

    colour: str
    shape: str
    share: float

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape


@dataclass(frozen=True, kw_only=True, eq=False)
class Sighting:
    """One object found in a frame and where: its middle (0 to 1) and its cells."""

    colour: str
    shape: str
    share: float
    column: float
    row: float
    cells: NDArray[np.bool_]  # [H/4, W/4], True = this object

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far the detector itself is right on simulator frames, with 95 % intervals over frames."""

    precision: Estimate  # of the pairs it found, the share that is there
    recall: Estimate  # of the pairs visible (at least one token large), the share it found
    num_frames: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "precision": self.precision.as_dict(),
            "recall": self.recall.as_dict(),
            "num_frames": self.num_frames,
        }


class _Block(nn.Module):
    """Two 3 x 3 convolutions, the first dilated, added to the input."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(8, width)
        self.conv_1 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.norm_2 = nn.GroupNorm(8, width)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv_2(F.gelu(self.norm_2(self.conv_1(F.gelu(self.norm_1(x))))))
        return x


class Detector(nn.Module):
    """uint8 frames [B, H, W, 3] -> shape logits [B, 1 + shapes, H/4, W/4] and colour logits [B, colours,
    H/4, W/4].

    About 0.48 M parameters. H and W must be multiples of 4.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3 * STRIDE * STRIDE, config.width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(config.width, dilation) for dilation in config.dilations)
        self.norm = nn.GroupNorm(8, config.width)
        self.shape_head = nn.Conv2d(config.width, 1 + len(config.shapes), 1)
        self.colour_head = nn.Conv2d(config.width, len(config.colours), 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        x = frames.permute(0, 3, 1, 2).to(self.stem.weight.dtype) / 127.5 - 1.0
        x = self.stem(F.pixel_unshuffle(x, STRIDE))
        for block in self.blocks:
            x = block(x)
        x = F.gelu(self.norm(x))
        return self.shape_head(x), self.colour_head(x)

    @property
    def device(self) -> torch.device:
        return self.stem.weight.device

    @torch.inference_mode()
    def shares(self, frames: NDArray[np.uint8], *, batch: int = 64) -> NDArray[np.float32]:
        """Share of each frame that the largest object of each pair covers, 0 where none is: [N, colours,
        shapes].

        An object is a connected patch of one colour; its cells vote on its shape.
        """
        tables = [np.zeros((0, *self._num_pairs), dtype=np.float32)]
        for start in range(0, len(frames), batch):
            part = torch.from_numpy(np.ascontiguousarray(frames[start : start + batch])).to(self.device)
            shape_logits, colour_logits = self(part)
            tables.append(_object_table(shape_logits.float(), colour_logits.float()).cpu().numpy())
        return np.concatenate(tables)

    @torch.inference_mode()
    def sightings(self, frames: NDArray[np.uint8], *, batch: int = 64) -> list[tuple[Sighting, ...]]:
        """Every object of at least `min_share` of each frame, largest first; one pair may be there twice."""
        found: list[tuple[Sighting, ...]] = []
        for start in range(0, len(frames), batch):
            part = torch.from_numpy(np.ascontiguousarray(frames[start : start + batch])).to(self.device)
            shape_logits, colour_logits = self(part)
            log_p, colour = shape_logits.float().log_softmax(1), colour_logits.argmax(1)
            patches = _patches(torch.where(log_p.argmax(1) == BACKGROUND, -1, colour))
            arrays = (one.cpu().numpy() for one in (patches, log_p[:, 1:], colour))
            found += [self._sighted(*frame) for frame in zip(*arrays, strict=True)]
        return found

    def _sighted(
        self, patches: NDArray[np.int64], log_p: NDArray[np.float32], colours: NDArray[np.int64]
    ) -> tuple[Sighting, ...]:
        """Objects of one frame: patch numbers [h, w], shape scores [S, h, w], colours [h, w]."""
        numbers, counts = np.unique(patches[patches > 0], return_counts=True)
        found = []
        for number in numbers[counts >= self.config.min_share * patches.size]:
            cells = patches == number
            row, column = (np.argwhere(cells).mean(0) + 0.5) / patches.shape
            found.append(
                Sighting(
                    colour=self.config.colours[int(colours[cells][0])],
                    shape=self.config.shapes[int(log_p[:, cells].sum(1).argmax())],
                    share=float(cells.mean()),
                    column=float(column),
                    row=float(row),
                    cells=cells,
                )
            )
        return tuple(sorted(found, key=lambda one: -one.share))

    def detect(
        self, frames: Sequence[Frame] | NDArray[np.uint8], *, batch: int = 64
    ) -> list[tuple[Found, ...]]:
        """What is found in each frame [H, W, 3] of one size, largest first."""
        if len(frames) == 0:
            return []
        tables = self.shares(np.stack(list(frames)), batch=batch)
        return [self._found(table) for table in tables]

    def _found(self, table: NDArray[np.float32]) -> tuple[Found, ...]:
        colours, shapes = self.config.colours, self.config.shapes
        found = [
            Found(colour=colours[c], shape=shapes[s], share=float(table[c, s]))
            for c, s in np.argwhere(table >= self.config.min_share)
        ]
        return tuple(sorted(found, key=lambda one: -one.share))

    @property
    def _num_pairs(self) -> tuple[int, int]:
        return len(self.config.colours), len(self.config.shapes)

    def save(self, path: Path, *, notes: dict[str, Any] | None = None) -> None:
        """Write safetensors in half precision (about 0.55 MB), configuration and `notes` in its header."""
        tensors = {
            name: tensor.detach().to("cpu", torch.float16) for name, tensor in self.state_dict().items()
        }
        header = {"config": json.dumps(asdict(self.config)), "notes": json.dumps(notes or {}), "format": "pt"}
        with written(path) as beside:
            save_file({name: one.contiguous() for name, one in tensors.items()}, beside, metadata=header)

    @staticmethod
    def load(path: Path, *, device: str | torch.device = "cpu") -> "Detector":
        """Open a file that `save` wrote, in fp32."""
        if not path.exists():
            raise ValueError(
                f"no detector at {path}; say where one is with detector=FILE (the built-in model's is "
                "emuworld/weights/small/detector.safetensors), or make one with: "
                f"emuworld train stage=detector out={path.parent}"
            )
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if "config" not in header:
                raise ValueError(
                    f"{path} holds no detector: its header has no 'config'; train one (stage=detector)"
                )
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
        stored: dict[str, Any] = json.loads(header["config"])
        lists = {key: tuple(value) for key, value in stored.items() if isinstance(value, list)}
        detector = Detector(DetectorConfig(**stored | lists))
        detector.load_state_dict(tensors)
        return detector.to(device).eval()


def _object_table(shape_logits: Tensor, colour_logits: Tensor) -> Tensor:
    """Logits [B, 1 + S, h, w] and [B, C, h, w] -> share of the frame of the largest patch per pair, [B, C,
    S].
    """
    count, num_colours = colour_logits.shape[:2]
    log_p = shape_logits.log_softmax(1)
    colour = colour_logits.argmax(1)
    patch = _patches(torch.where(log_p.argmax(1) == BACKGROUND, -1, colour)).flatten(1)  # [B, cells]
    cells, num_shapes = patch.shape[1], log_p.shape[1] - 1
    votes = torch.zeros(count, cells + 1, num_shapes, device=patch.device)
    per_cell = log_p[:, 1:].flatten(2).transpose(1, 2)  # [B, cells, S]
    votes.scatter_add_(1, patch[:, :, None].expand(-1, -1, num_shapes), per_cell)
    area = torch.zeros(count, cells + 1, device=patch.device)
    area.scatter_add_(1, patch, torch.ones_like(patch, dtype=area.dtype))
    area[:, 0] = 0.0  # patch 0 is what is no object
    colour_of = torch.zeros(count, cells + 1, dtype=torch.int64, device=patch.device)
    colour_of.scatter_(1, patch, colour.flatten(1))  # all cells of a patch have one colour
    pair = colour_of * num_shapes + votes.argmax(2)
    table = torch.zeros(count, num_colours * num_shapes, device=patch.device)
    table.scatter_reduce_(1, pair, area / cells, reduce="amax")
    return table.view(count, num_colours, num_shapes)


def _patches(kind: Tensor) -> Tensor:
    """Numbers from 1 for the 4-connected patches of equal `kind` [B, h, w], 0 where it is negative.

    Every cell starts with its own number and takes the largest of its like neighbours until nothing changes.
    """
    count, height, width = kind.shape
    own = torch.arange(1, height * width + 1, device=kind.device).view(1, height, width)
    number = torch.where(kind < 0, 0, own.expand(count, -1, -1))
    down = (kind[:, 1:] == kind[:, :-1]) & (kind[:, 1:] >= 0)
    right = (kind[:, :, 1:] == kind[:, :, :-1]) & (kind[:, :, 1:] >= 0)
    while True:
        before = number
        number = number.clone()
        for _ in range(8):  # between two looks at whether it is done
            upper, lower = number[:, :-1], number[:, 1:]
            both = torch.maximum(upper, lower)
            number[:, :-1] = torch.where(down, both, upper)
            number[:, 1:] = torch.where(down, torch.maximum(both, number[:, 1:]), number[:, 1:])
            left, further = number[:, :, :-1], number[:, :, 1:]
            both = torch.maximum(left, further)
            number[:, :, :-1] = torch.where(right, both, left)
            number[:, :, 1:] = torch.where(right, torch.maximum(both, number[:, :, 1:]), number[:, :, 1:])
        if torch.equal(number, before):
            return number


def true_shares(labels: Labels, *, config: DetectorConfig) -> NDArray[np.float32]:
    """Share of each frame that each pair truly covers: [N, colours, shapes]."""
    count, num_shapes = len(labels.shapes), len(config.shapes)
    num_pairs = len(config.colours) * num_shapes
    cells = labels.shapes[0].size
    table = np.zeros((count, num_pairs), dtype=np.float32)
    for row, (shapes, colours) in enumerate(zip(labels.shapes, labels.colours, strict=True)):
        is_object = shapes != BACKGROUND
        pair = colours[is_object].astype(np.int64) * num_shapes + shapes[is_object] - 1
        table[row] = np.bincount(pair, minlength=num_pairs) / cells
    return table.reshape(count, len(config.colours), num_shapes)


def pairs_of(table: NDArray[np.float32], *, config: DetectorConfig, at_least: float) -> frozenset[Pair]:
    """The pairs of one frame's table [colours, shapes] that cover at least a share of it."""
    return frozenset((config.colours[c], config.shapes[s]) for c, s in np.argwhere(table >= at_least))


def errors(found: NDArray[np.float32], true: NDArray[np.float32], *, min_share: float) -> Errors:
    """Precision and recall from two tables [N, colours, shapes] of shares: what was found and what is
    there.
    """
    is_found, is_there, is_visible = found >= min_share, true > 0, true >= VISIBLE_SHARE
    hits = (is_found & is_there).sum((1, 2))
    recalled = (is_found & is_visible).sum((1, 2))
    return Errors(
        precision=bootstrap(hits.astype(float), weights=is_found.sum((1, 2))),
        recall=bootstrap(recalled.astype(float), weights=is_visible.sum((1, 2))),
        num_frames=len(found),
    )


def calibrate(found: NDArray[np.float32], true: NDArray[np.float32]) -> float:
    """The smallest share to count as found that gives the best F1 on validation frames, on a grid up to one
    token.
    """

    def f1(min_share: float) -> float:
        is_found = found >= min_share
        hits = (is_found & (true > 0)).sum() / max(is_found.sum(), 1)
        recalled = (is_found & (true >= VISIBLE_SHARE)).sum() / max((true >= VISIBLE_SHARE).sum(), 1)
        return float(2 * hits * recalled / max(hits + recalled, 1e-9))

    grid = [VISIBLE_SHARE * part / 16 for part in range(2, 17)]
    return max(grid, key=f1)
