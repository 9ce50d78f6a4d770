"""Commands: words and motions, each known by hand."""

import math

import numpy as np
import pytest

from emuworld.envs.rooms.collision import BODY_RADIUS_M, SKIN_M, Footprint, Obstacles
from emuworld.envs.rooms.commands import (
    COMMANDS,
    LEVEL_PITCH_RAD,
    PITCH_LIMITS_RAD,
    STAND_OFF_M,
    WORDINGS,
    Command,
    Place,
    Pose,
    execute,
    go_to,
    parse,
    phrase,
    sample_command,
)

OPEN = Obstacles([])
START = Pose(x_m=1.0, y_m=2.0, yaw_rad=math.radians(30)).rounded()


def named(words: str) -> Command:
    command = parse(words)
    assert command is not None, words
    return command


def done(words: str, pose: Pose = START, obstacles: Obstacles = OPEN) -> Pose:
    return execute(pose, named(words), obstacles=obstacles, places={}).pose


def test_every_phrasing_means_its_command_and_no_other() -> None:
    phrases = [words for wording in WORDINGS for words in wording.phrases("test")]
    assert len(set(phrases)) == len(phrases)
    assert len(COMMANDS) >= 12
    for wording in WORDINGS:
        assert wording.held_out, "each command has phrasings for the test split alone"
        for words in wording.phrases("test"):
            assert parse(words) == wording.command
        assert not set(wording.held_out) & set(wording.phrases("train"))


@pytest.mark.parametrize("words", ["Turn  LEFT", "turn left.", " turn\tleft ! "])
def test_case_spaces_and_a_final_dot_do_not_matter(words: str) -> None:
    assert parse(words) == named("turn left")


@pytest.mark.parametrize(
    "words", ["", "turn", "turn left right", "go to the ball", "go to the mauve ball", "fly", "."]
)
def test_other_words_are_no_command(words: str) -> None:
    assert parse(words) is None


@pytest.mark.parametrize(
    ("words", "x", "y", "yaw_deg"),
    [
        ("move forward", 1 + 0.5 * math.cos(math.pi / 6), 2.25, 30),
        ("move forward one metre", 1 + math.cos(math.pi / 6), 2.5, 30),
        ("move back", 1 - 0.5 * math.cos(math.pi / 6), 1.75, 30),
        ("step left", 0.75, 2 + 0.5 * math.cos(math.pi / 6), 30),
        ("step right", 1.25, 2 - 0.5 * math.cos(math.pi / 6), 30),
        ("turn left", 1, 2, 60),
        ("turn right", 1, 2, 0),
        ("turn left 45 degrees", 1, 2, 75),
        ("turn right 90 degrees", 1, 2, -60),
        ("turn around", 1, 2, -150),
    ],
)
def test_motions_by_hand(words: str, x: float, y: float, yaw_deg: float) -> None:
    pose = done(words)
    assert (pose.x_m, pose.y_m) == pytest.approx((x, y), abs=1e-6)
    assert math.degrees(pose.yaw_rad) == pytest.approx(yaw_deg)
    assert pose.pitch_rad == START.pitch_rad


def test_looking_has_limits_and_a_way_back() -> None:
    pose = START
    for _ in range(5):
        pose = done("look up", pose)
    assert pose.pitch_rad == pytest.approx(PITCH_LIMITS_RAD[1])
    for _ in range(9):
        pose = done("look down", pose)
    assert pose.pitch_rad == pytest.approx(PITCH_LIMITS_RAD[0])
    assert done("look ahead", pose) == START
    assert START.pitch_rad == pytest.approx(LEVEL_PITCH_RAD)


def test_round_trips_come_home_to_equal_numbers() -> None:
    rng = np.random.Generator(np.random.Philox(1))
    for _ in range(50):
        start = Pose(x_m=rng.normal(), y_m=rng.normal(), yaw_rad=rng.uniform(-4, 4)).rounded()
        pose = start
        for _ in range(12):
            pose = done("turn left", pose)
        assert pose == start
        assert done("move back", done("move forward", start)) == start
        assert done("step right", done("step left", start)) == start
        assert done("turn around", done("turn around", start)) == start


def test_a_wall_stops_and_says_so() -> None:
    wall = Obstacles([Footprint(x_m=2.0, y_m=0.0, half_x_m=0.5, half_y_m=5.0)])
    start = Pose(x_m=1.0, y_m=0.0, yaw_rad=0.0).rounded()
    outcome = execute(start, named("move forward"), obstacles=wall, places={})
    assert outcome.blocked and outcome.possible
    assert outcome.moved_m == pytest.approx(0.5 - BODY_RADIUS_M - SKIN_M)
    again = execute(outcome.pose, named("move forward"), obstacles=wall, places={})
    assert again.blocked and again.moved_m < 1e-5
    away = execute(again.pose, named("move back"), obstacles=wall, places={})
    assert not away.blocked


def test_go_to_faces_the_object_and_stops_before_it() -> None:
    places = {"red ball": Place(x_m=0.0, y_m=4.0, radius_m=0.2)}
    start = Pose(x_m=0.0, y_m=0.0, yaw_rad=0.0, pitch_rad=0.3).rounded()
    outcome = execute(start, named("Walk to the red ball."), obstacles=OPEN, places=places)
    assert outcome.possible and outcome.moved_m == pytest.approx(4.0 - STAND_OFF_M)
    assert outcome.pose == Pose(x_m=0.0, y_m=2.5, yaw_rad=math.pi / 2).rounded()
    near = execute(outcome.pose, go_to("red ball"), obstacles=OPEN, places=places)
    assert near.pose == outcome.pose and near.possible


def test_go_to_what_is_not_there_or_behind_something_changes_nothing() -> None:
    places = {"red ball": Place(x_m=0.0, y_m=4.0, radius_m=0.2)}
    between = Obstacles([Footprint(x_m=0.5, y_m=3.0, radius_m=0.3)])
    for target, obstacles in (("blue box", OPEN), ("red ball", between)):
        outcome = execute(START, go_to(target), obstacles=obstacles, places=places)
        assert not outcome.possible and outcome.pose == START and outcome.reason


def test_sampled_commands_and_words_keep_to_the_split() -> None:
    rng = np.random.Generator(np.random.Philox(2))
    held_out = {words for wording in WORDINGS for words in wording.held_out} | {"walk up to the red ball"}
    seen: dict[str, set[str]] = {"train": set(), "test": set()}
    for split, words in seen.items():
        for _ in range(2000):
            command = sample_command(rng, split, targets=("red ball",))
            words.add(said := phrase(command, rng, split))
            assert parse(said) == command
    assert not seen["train"] & held_out
    assert held_out <= seen["test"]


def test_any_text_is_parsed_or_refused() -> None:
    rng = np.random.Generator(np.random.Philox(3))
    for _ in range(2000):
        text = "".join(chr(code) for code in rng.integers(0, 0x10FFFF, int(rng.integers(0, 40))))
        assert parse(text) is None
