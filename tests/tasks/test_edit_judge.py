"""The judge of edits on the simulator's own pictures, and on pictures that are wrong in known ways."""

from dataclasses import replace

import numpy as np
import pytest

from emuworld.tasks.detector import Sighting
from emuworld.tasks.edit_judge import judge
from emuworld.tasks.edit_summary import EXPECTED, KNOWN_WORDS, OTHER_WORDS, summarise_x2i
from emuworld.tasks.edit_truth import ROOM_KINDS, TABLE_KINDS, EditTruth, Place, make_edit
from emuworld.tasks.metrics import wilson
from emuworld.tasks.truth import Request

SIZE = 256


def _made(index: int) -> EditTruth:
    return make_edit(Request(index=index, seed=70 + index, split="validation", size_px=SIZE, renderer="rays"))


@pytest.fixture(scope="module")
def truths() -> list[EditTruth]:
    """Each kind once, in one of the worlds."""
    kinds = len(ROOM_KINDS)
    assert len(TABLE_KINDS) == kinds
    return [_made(2 * kind + kind % 2) for kind in range(kinds)]


def _place_of(truth: EditTruth) -> list[Sighting]:
    """What a perfect detector says about a new object in the true answer."""
    colour, _, kind = truth.result.rpartition(" ")
    place = truth.place_after
    assert place is not None
    cells = np.zeros((SIZE // 4, SIZE // 4), np.bool_)
    cells[int(place.row * SIZE / 4), int(place.column * SIZE / 4)] = True
    return [
        Sighting(
            colour=colour, shape={"cube": "box"}.get(kind, kind), share=place.share,
            column=place.column, row=place.row, cells=cells,
        )
    ]  # fmt: skip


def test_cases_show_every_kind_in_both_worlds_and_are_the_same_again(truths: list[EditTruth]) -> None:
    assert [truth.kind for truth in truths] == [
        (ROOM_KINDS, TABLE_KINDS)[kind % 2][kind] for kind in range(len(ROOM_KINDS))
    ]
    assert {truth.world for truth in truths} == {"rooms", "tables"}
    for truth in truths:
        assert len(truth.references) == 1 + (truth.kind == "combine")
        pictures = (truth.before, truth.after, truth.wrong, truth.spoilt)
        assert all(one.shape == (SIZE, SIZE, 3) for one in pictures)
        same = np.abs(truth.before.astype(int) - truth.after).max(2) <= 6
        assert same[~truth.changed].all() and truth.changed.any()
        assert all((one != truth.after).any() for one in (truth.wrong, truth.spoilt, truth.before))
    again = _made(2)
    np.testing.assert_array_equal(again.wrong, _made(2).wrong)


def test_true_answers_pass_and_others_fail(truths: list[EditTruth]) -> None:
    wrong = spoilt = 0
    for truth in truths:
        verdict = judge(truth, truth.after, seen=[], rebuilt=truth.after)
        assert verdict.success, truth.instruction
        left = judge(truth, truth.before, seen=[], rebuilt=truth.after)
        assert not left.done, truth.instruction
        wrong += judge(truth, truth.wrong, seen=[], rebuilt=truth.after).success
        spoilt += judge(truth, truth.spoilt, seen=[], rebuilt=truth.after).success
    assert wrong <= 1 and spoilt <= 1


def test_a_new_object_may_stand_where_the_words_leave_it_open(truths: list[EditTruth]) -> None:
    truth = replace(next(one for one in truths if one.kind == "add"), instruction="add it")
    # The object is drawn elsewhere: the true picture, turned by an eighth of its width, its place with it.
    elsewhere = truth.before.copy()
    ys, xs = np.nonzero(truth.changed)
    moved = (xs + SIZE // 8) % SIZE
    elsewhere[ys, moved] = truth.after[ys, xs]
    (sighting,) = _place_of(truth)
    column = (sighting.column + 1 / 8) % 1.0
    cells = np.zeros_like(sighting.cells)
    cells[np.unique(ys // 4)[:, None], np.unique(moved // 4)[None]] = True
    seen = [replace(sighting, column=column, cells=cells)]
    assert judge(truth, elsewhere, seen=seen, rebuilt=truth.after).success
    assert not judge(truth, elsewhere, seen=[], rebuilt=truth.after).done
    for side, column in (("on the left", 0.9), ("on the right", 0.1), ("in the middle", 0.05)):
        named = replace(truth, instruction=f"add it {side}")
        assert not judge(named, elsewhere, seen=[replace(seen[0], column=column)], rebuilt=truth.after).done


def test_what_the_tokenizer_cannot_draw_is_not_held_against_the_answer(truths: list[EditTruth]) -> None:
    truth = next(one for one in truths if one.kind == "remove")
    noisy = np.clip(
        truth.after.astype(int) + np.random.default_rng(0).integers(-60, 60, truth.after.shape), 0, 255
    )
    noisy = noisy.astype(np.uint8)
    assert not judge(truth, noisy, seen=[], rebuilt=truth.after).kept
    assert judge(truth, noisy, seen=[], rebuilt=noisy).kept


def test_light_and_backgrounds_may_have_another_shade_but_no_other_colour(truths: list[EditTruth]) -> None:
    for group in ("light", "background"):
        truth = next(one for one in truths if one.group == group)
        shade = np.clip(truth.after * 0.97, 0, 255).astype(np.uint8)
        assert judge(truth, shade, seen=[], rebuilt=truth.after).success
        other = truth.after.astype(int)
        other[truth.changed] += np.array([40, -40, 40])
        other = np.clip(other, 0, 255).astype(np.uint8)
        assert not judge(truth, other, seen=[], rebuilt=truth.after).done


def test_a_moved_camera_may_stand_a_little_off(truths: list[EditTruth]) -> None:
    truth = next(one for one in truths if one.group == "viewpoint")
    assert judge(truth, np.roll(truth.after, 3, axis=1), seen=[], rebuilt=truth.after).kept
    assert not judge(truth, np.roll(truth.after, 24, axis=1), seen=[], rebuilt=truth.after).success


def test_what_comes_into_view_is_free_and_what_was_in_view_is_not(truths: list[EditTruth]) -> None:
    truth = next(one for one in truths if one.group == "viewpoint" and one.given.mean() < 0.9)
    assert all(one.given.all() for one in truths if one.group != "viewpoint")
    imagined, forgotten = truth.after.copy(), truth.after.copy()
    imagined[~truth.given] = forgotten[truth.given] = 128
    assert judge(truth, imagined, seen=[], rebuilt=truth.after).kept
    assert not judge(truth, forgotten, seen=[], rebuilt=truth.after).kept


def test_a_thing_that_is_moved_has_left_its_place(truths: list[EditTruth]) -> None:
    truth = next(one for one in truths if one.kind == "move")
    twice = truth.after.copy()
    twice[truth.vacated] = truth.before[truth.vacated]
    assert not judge(truth, twice, seen=[], rebuilt=truth.after).done
    assert isinstance(truth.place_before, Place) and isinstance(truth.place_after, Place)


def test_what_is_replaced_is_not_only_gone(truths: list[EditTruth]) -> None:
    truth = next(one for one in truths if one.kind == "replace")
    gone = truth.after.copy()
    gone[truth.occupied] = np.median(truth.after[~truth.changed], axis=0).astype(np.uint8)
    assert not judge(truth, gone, seen=[], rebuilt=truth.after).done


def _record(
    index: int,
    *,
    world: str,
    group: str,
    dream: tuple[bool, bool],
    fooled: bool = False,
    asked: str = "add a red ball",
) -> dict:
    verdict = {who: {"done": done, "kept": kept is not False} for who, (done, kept) in EXPECTED.items()}
    if fooled:
        verdict["wrong, tokenizer"] = {"done": True, "kept": True}
        verdict["copied, tokenizer"] = {"done": False, "kept": True}
    verdict["dream"] = {"done": dream[0], "kept": dream[1]}
    return {
        "kind": "edit",
        "index": index,
        "world": world,
        "group": group,
        "instruction": asked,
        "target": "red ball",
        "judged": verdict,
    }


def test_figures_count_successes_by_kind_and_the_judges_errors_beside() -> None:
    records = [
        _record(0, world="rooms", group="add", dream=(True, True)),
        _record(1, world="tables", group="add", dream=(True, False)),
        _record(2, world="rooms", group="light", dream=(False, True), fooled=True),
        _record(3, world="tables", group="light", dream=(True, True), asked="use cold light"),
    ]
    figures = summarise_x2i(records)
    groups = figures["groups"]
    assert (
        groups["all"]["dream"]["success"]["value"] == 0.5 and groups["add"]["dream"]["done"]["value"] == 1.0
    )
    assert groups["tables"]["dream"]["kept"]["value"] == 0.5
    assert groups[OTHER_WORDS]["dream"]["success"] == wilson(1, 1).as_dict()
    assert groups[KNOWN_WORDS]["dream"]["success"] == wilson(1, 3).as_dict()
    judge_errors = groups["all"]["judge"]
    assert judge_errors["false successes, tokenizer"]["value"] == pytest.approx(1 / 12)
    assert judge_errors["missed successes, tokenizer"]["value"] == pytest.approx(1 / 8)
    assert judge_errors["false successes, plain"]["value"] == 0.0
    assert groups["light"]["judge"]["false successes, tokenizer"]["value"] == pytest.approx(1 / 6)
    assert not figures["bars"]["edit done, rest kept"]["met"]
    assert summarise_x2i([])["bars"]["edit done, rest kept"]["met"] is False
