"""What a plan looks like: a strip of imagined above executed keyframes, and a film of the arm at work."""

from __future__ import annotations

import numpy as np

from emuworld.agents.objectives import resized
from emuworld.envs.render import Renderer
from emuworld.envs.tabletop.scene import TableScene
from emuworld.tasks.film import captioned, side_by_side
from emuworld.tasks.robot.calibration import Frame
from emuworld.tasks.robot.episode import Outcome, RobotEpisode

FILM_EVERY = 5  # control steps of 40 ms: five pictures a second of the arm's time
SECONDS_A_SHOT = 0.1  # so that it is shown twice as fast
_GREY = 128


class ArmFilm:
    """Takes pictures while the arm moves. `shoot` and `tell` are `run_agent`'s `on_motion` and `on_step`."""

    def __init__(self, renderer: Renderer, *, size: tuple[int, int]) -> None:
        self.shots: list[tuple[Frame, str]] = []
        self._renderer = renderer
        self._size = size
        self._moving: list[Frame] = []
        self._steps = 0

    def shoot(self, scene: TableScene) -> None:
        """A control step has passed."""
        self._steps += 1
        if self._steps % FILM_EVERY == 0:
            height, width = self._size
            self._moving.append(
                self._renderer.render(scene.model, scene.data, scene.camera(), height=height, width=width)
            )

    def tell(self, outcome: Outcome) -> None:
        """A subtask is over: its words go under its pictures."""
        self.shots += [(shot, said(outcome)) for shot in (*self._moving, outcome.frame)]
        self._moving = []


def said(outcome: Outcome) -> str:
    """The words of a step, and why where it failed."""
    result = outcome.executed.result
    return outcome.step.text if result.done else f"{outcome.step.text}: {result.reason}"


def strip(episode: RobotEpisode) -> Frame:
    """Imagined keyframes above what came out, one column a step; grey where nothing was imagined. A plan
    without keyframes has no upper row."""
    imagined = [one.step.keyframe for one in episode.outcomes]
    if all(one is None for one in imagined):
        columns = [captioned(episode.first, "start")]
        return side_by_side(columns + [captioned(one.frame, said(one)) for one in episode.outcomes])
    blank = np.full_like(episode.first, _GREY)
    sized = [blank if one is None else resized(one, blank.shape[:2]) for one in imagined]
    columns = [captioned(np.concatenate([blank, episode.first]), "start (above: imagined, below: executed)")]
    for above, one in zip(sized, episode.outcomes, strict=True):
        columns.append(captioned(np.concatenate([above, one.frame]), said(one)))
    return side_by_side(columns)
