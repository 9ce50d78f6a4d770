"""Cases of the simulator: reproducible, and true by construction of the commands."""

import numpy as np
import pytest

from emuworld.envs.palette import SHAPES
from emuworld.envs.rooms.commands import COMMANDS, Pose
from emuworld.envs.rooms.scenes import RoomScene
from emuworld.tasks import truth
from emuworld.tasks.truth import Request


def _request(seed: int, **more: object) -> Request:
    return Request(index=0, seed=seed, split="test", size_px=64, renderer="rays", **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def start() -> truth.StartTruth:
    return truth.make_start(_request(7, num_steps=6, num_branches=4))


def test_the_same_request_gives_the_same_case(start: truth.StartTruth) -> None:
    again = truth.make_start(_request(7, num_steps=6, num_branches=4))
    assert again.commands == start.commands and again.other_commands == start.other_commands
    np.testing.assert_array_equal(again.frames, start.frames)
    np.testing.assert_array_equal(again.seen, start.seen)


def test_a_start_has_the_shapes_it_promises(start: truth.StartTruth) -> None:
    assert start.frames.shape == (7, 64, 64, 3) and start.seen.shape == (6, 64, 64)
    assert start.labels.shapes.shape == start.labels.colours.shape == (7, 16, 16)
    assert len(start.moved) == 6 and len(set(start.branch_commands)) == 4
    assert all(a != b for a, b in zip(start.commands, start.other_commands, strict=True))


def test_what_did_not_move_shows_the_same_frame_and_all_of_it_was_seen() -> None:
    for seed in range(20):
        case = truth.make_start(_request(seed, num_steps=4, num_branches=2))
        for step, moved in enumerate(case.moved):
            if not moved:
                np.testing.assert_array_equal(case.frames[step], case.frames[step + 1])
                assert case.seen[step].mean() > 0.99
                return
    pytest.fail("no command stayed in place in 20 walks; go-to commands of absent objects should")


def test_branches_lead_to_different_views(start: truth.StartTruth) -> None:
    for one in range(4):
        assert not np.array_equal(start.branch_frames[one], start.frames[0])
        for other in range(one):
            assert not np.array_equal(start.branch_frames[one], start.branch_frames[other])


def test_every_undo_undoes_and_only_level_and_go_to_have_none() -> None:
    scene = RoomScene.sample("train", 0, num_objects=0, layout="rectangle")
    middle = Pose(x_m=0.0, y_m=0.0, yaw_rad=0.3).rounded()
    for command in COMMANDS:
        back = truth.undo(command)
        if back is None:
            assert command.phrase in ("look ahead", "move forward one metre")
            continue
        there = scene.execute(middle, command)
        if not there.blocked:
            assert scene.execute(there.pose, back).pose == middle, command.phrase


def test_a_walk_out_and_back_ends_where_it_began() -> None:
    walk = truth.make_walk(_request(3, num_steps=12))
    assert walk.frames.shape == (13, 64, 64, 3) and len(walk.commands) == 12
    for step in range(6):
        np.testing.assert_array_equal(walk.frames[step], walk.frames[12 - step])


def test_a_full_turn_ends_where_it_began_and_zero_degrees_is_the_start() -> None:
    turn = truth.make_turn(_request(5))
    np.testing.assert_array_equal(turn.frames[0], turn.frames[-1])
    assert turn.around is not None and len(turn.around_deg) == len(turn.around)
    at_zero = turn.around[turn.around_deg.index(0.0)]
    np.testing.assert_array_equal(at_zero, turn.frames[0])  # 64 px both
    left = turn.around[turn.around_deg.index(30.0)]
    np.testing.assert_array_equal(left, turn.frames[1])  # "turn left" is 30 degrees counter-clockwise


@pytest.mark.parametrize("index", [0, 1])
def test_prompts_name_what_their_view_shows(index: int) -> None:
    case = truth.make_prompt(Request(index=index, seed=11, split="test", size_px=64, renderer="rays"))
    assert len(case.pairs) == 1 + index
    labelled = {
        (truth.COLOUR_NAMES[c], SHAPES[s - 1])
        for s, c in zip(case.labels.shapes.ravel(), case.labels.colours.ravel(), strict=True)
        if s
    }
    assert labelled == set(case.pairs)
    assert all(f"{colour} {shape}" in case.prompt for colour, shape in case.pairs)


def test_labels_mark_the_coloured_pixels_of_an_object() -> None:
    frames, labels = truth.make_views(
        Request(index=0, seed=2, split="train", size_px=64, renderer="rays", num_steps=6)
    )
    red = labels.colours == truth.COLOUR_NAMES.index("red")
    assert frames.shape == (6, 64, 64, 3) and (labels.shapes > 0).any()
    small = frames[:, 2::4, 2::4].astype(int)
    for colour in (red & (labels.shapes > 0),):
        if colour.any():
            assert (small[colour][:, 0] > small[colour][:, 1] + 20).mean() > 0.8
