"""How good a keyframe is as a picture of this scene: are all things there once, did bystanders stay, has the
background drifted?

Everything is read off the picture by `keyframe_readout` against the known present scene; nothing is asked of
the future. Whoever prints these figures prints beside them how often they are wrong on frames whose truth is
known (`tests/tasks/test_keyframe_scores.py` holds the least that they must do).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from emuworld.tasks.metrics import ssim
from emuworld.tasks.robot.calibration import Calibration, Frame, Mask
from emuworld.tasks.robot.keyframe_execution import Keyframe, read_all, still_mask, take_up
from emuworld.tasks.robot.keyframe_readout import Place, Reading, overlap
from emuworld.tasks.robot.table_view import TableView

STAYED_M = 0.035  # read positions scatter by a centimetre on damaged pictures


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How the picture's background differs from the true one, in three parts that do not mix.

    `photometric`: mean change of a middle grey by gain and offset, levels of 255; `camera_px`: shift;
    `residual`: mean absolute difference that is left on what stands still, levels of 255, and `ssim` there.
    """

    photometric: float
    camera_px: float
    residual: float
    ssim: float


@dataclass(frozen=True, kw_only=True)
class KeyframeScores:
    """What was found: names of objects, by what is wrong with them, and the background's drift.

    `num_expected` loose objects should be seen, `num_seen` places were found that look like one of them.
    """

    num_expected: int
    num_seen: int
    missing: tuple[str, ...]
    duplicated: tuple[str, ...]
    moved_bystanders: tuple[str, ...]
    drift: Drift

    @property
    def is_clean(self) -> bool:
        """Every object once, and what should stay has stayed."""
        return not (self.missing or self.duplicated or self.moved_bystanders)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"is_clean": self.is_clean}


def score_keyframe(
    picture: Frame, view: TableView, *, moved: Collection[str] = (), hidden: Collection[str] = ()
) -> KeyframeScores:
    """Judge a picture of the moment after a subtask, seen from the moment before it.

    Args:
        view: the scene before the subtask.
        moved: objects that the subtask moves; all others are bystanders.
        hidden: objects that need not be seen: held in the hand, or inside a closed drawer.
    """
    keyframe = take_up(picture, view)
    names = [name for name in view.names if name not in hidden and in_view(view, name)]
    readings = read_all(keyframe.picture, view, names)
    return scores_of(keyframe, view, readings, moved=moved)


def scores_of(
    keyframe: Keyframe, view: TableView, readings: Mapping[str, Reading], *, moved: Collection[str] = ()
) -> KeyframeScores:
    """The scores from readings that are there already."""
    seen = claims(readings)
    return KeyframeScores(
        num_expected=len(readings),
        num_seen=sum(len(places) for places in seen.values()),
        missing=tuple(name for name, places in seen.items() if not places),
        duplicated=tuple(name for name, places in seen.items() if len(places) > 1),
        moved_bystanders=tuple(
            name
            for name, places in seen.items()
            if name not in moved
            and len(places) == 1
            and np.linalg.norm(places[0].position - view.position(name)) > STAYED_M
        ),
        drift=_drift(keyframe, view),
    )


def claims(readings: Mapping[str, Reading]) -> dict[str, list[Place]]:
    """The places of each object that no other one fits better: things of one colour see each other."""
    every = [(name, place) for name, one in readings.items() for place in one.sightings]
    return {
        name: [
            place
            for place in one.sightings
            if not any(
                other != name and rival.score > place.score and overlap(place, rival)
                for other, rival in every
            )
        ]
        for name, one in readings.items()
    }


def drift_of(calibration: Calibration, picture: Frame, reference: Frame, still: Mask) -> Drift:
    """The three parts; `picture` is the calibrated one."""
    return Drift(
        photometric=calibration.photometric,
        camera_px=calibration.camera_px,
        residual=float(np.abs(picture.astype(float) - reference)[still].mean()) if still.any() else 0.0,
        ssim=ssim(picture, reference, mask=still),
    )


def _drift(keyframe: Keyframe, view: TableView) -> Drift:
    return drift_of(keyframe.calibration, keyframe.picture, view.frame, still_mask(view))


def in_view(view: TableView, name: str) -> bool:
    """Whether enough of an object is seen now to be missed later."""
    return int(view.mask(name).sum()) >= 40 * view.size[0] * view.size[1] / 256**2
