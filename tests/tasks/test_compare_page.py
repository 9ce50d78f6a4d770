"""Pictures of one case in two runs, whatever shape their rows have."""

import numpy as np

from emuworld.tasks.compare_page import beside
from emuworld.tasks.run_folder import PictureRow, Pictures


def _frames(*greys: int) -> list[np.ndarray]:
    return [np.full((2, 2, 3), grey, np.uint8) for grey in greys]


def _shown(pictures: Pictures) -> list[tuple[str, list[int]]]:
    return [(row.name, [int(frame[0, 0, 0]) for frame in row.frames]) for row in pictures.rows]


def test_rows_of_a_walk_stand_below_each_other_and_the_simulator_once() -> None:
    walks = [
        Pictures(
            title="a room",
            columns=["start", "left"],
            rows=[
                PictureRow(name="MuJoCo", frames=_frames(1, 2)),
                PictureRow(name="dream", frames=_frames(1, grey)),
            ],
        )
        for grey in (3, 4)
    ]
    (both,) = beside(*walks)
    assert _shown(both) == [("MuJoCo", [1, 2]), ("dream before", [1, 3]), ("dream after", [1, 4])]
    assert (both.title, list(both.columns)) == ("a room", ["start", "left"])


def test_plans_of_other_lengths_are_shown_one_after_the_other() -> None:
    short = Pictures(title="stack", columns=["start"], rows=[PictureRow(name="imagined", frames=_frames(1))])
    longer = Pictures(
        title="stack", columns=["start", "pick"], rows=[PictureRow(name="imagined", frames=_frames(1, 2))]
    )
    before, after = beside(short, longer)
    assert (before.title, _shown(before)) == ("Before: stack", [("imagined before", [1])])
    assert (after.title, _shown(after)) == ("After: stack", [("imagined after", [1, 2])])


def test_titles_that_tell_the_outcome_are_both_kept() -> None:
    two = [
        Pictures(title=title, columns=["end"], rows=[PictureRow(name="", frames=_frames(grey))])
        for title, grey in (("stack. Not reached: on", 1), ("stack", 2))
    ]
    (both,) = beside(*two)
    assert both.title == "Before: stack. Not reached: on After: stack"
    assert list(both.columns) == ["end, before", "end, after"] and _shown(both) == [("", [1, 2])]
