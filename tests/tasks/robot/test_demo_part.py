"""The robot on the demo's page: who planned is said, and a verdict of physics stands under the pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from emuworld.agents.agent import Frame
from emuworld.envs.tabletop.plans import sample_task
from emuworld.envs.tabletop.subtasks import canonical
from emuworld.tasks.robot.demo_part import FILM_NAME, robot_part
from emuworld.world_model import Segment, WorldState

TASK = sample_task("drawers", "validation", 0)


class Dreamer:
    """Knows the right words, and imagines that nothing is seen to change."""

    def __init__(self, *modes: str) -> None:
        self.manifest = SimpleNamespace(modes=modes)

    def begin(self, *, images: Iterable[Frame], **_: Any) -> WorldState:
        (self.frame,) = images
        return WorldState(
            mode="vla", prompt_ids=(), answer_ids=(), seed=0, step=0, size=None, ended=False, fingerprint=b""
        )

    def imagine_batch(
        self, states: Sequence[WorldState], *_: Any, **__: Any
    ) -> list[tuple[WorldState, Segment]]:
        return [(replace(state, step=state.step + 1), self._segment(state.step)) for state in states]

    def imagine_words(self, state: WorldState, **_: Any) -> str | None:
        segment = self._segment(state.step)
        return None if segment.image is None else segment.text

    def _segment(self, step: int) -> Segment:
        over = step > 0
        text = "" if over else canonical(TASK.oracle[0])
        return Segment(text=text, image=None if over else self.frame, thought=None, ended=over)


def made(model: Dreamer, folder: Path) -> str:
    return robot_part(model, TASK, folder, seed=0)  # type: ignore[arg-type]


def test_a_model_that_cannot_plan_does_not_and_the_page_says_so(tmp_path: Path) -> None:
    said = made(Dreamer("explore", "t2i"), tmp_path)
    assert "trained for explore and t2i only" in said and "imagined plans" not in said.split("<table>")[0]
    assert said.count("executed, ") == 2 and 'alt="imagined' not in said
    assert ">met<" in said and "Success" in said and FILM_NAME in said
    assert (tmp_path / FILM_NAME).stat().st_size > 1000


def test_a_model_trained_for_it_plans(tmp_path: Path) -> None:
    said = made(Dreamer("vla"), tmp_path)
    assert "The world model imagined 2 plans" in said and 'alt="imagined, ' in said
    assert "Success" in said
