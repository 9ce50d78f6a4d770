"""The guide against a stub world model that writes what a script says: what it is asked, what is handed out,
where it ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from emuworld.agents.agent import Assignment, Frame
from emuworld.agents.guide import Guide, how_to
from emuworld.world_model import ContextFull, Sampling, Segment, Truncation, WorldState

OPENING = "You need a red cube and a blue plate."
PICK, PLACE = "Pick up the red cube.", "Put the red cube on the blue plate."


def frame(level: int = 120) -> Frame:
    return np.full((16, 16, 3), level, dtype=np.uint8)


class StubModel:
    """Writes the script's texts one after another, each with a picture of its own, then ends its answer. With
    `lasting` it draws behind every text of the script again and again."""

    def __init__(self, *script: str, lasting: bool = False) -> None:
        self.script, self.lasting = script, lasting
        self.asked: list[tuple[str, str, int, int]] = []  # mode, prompt, number of pictures, seed
        self.samplings: list[Sampling | None] = []

    def begin(
        self, *, mode: str, prompt: str = "", images: Iterable[Frame] = (), seed: int = 0
    ) -> WorldState:
        self.asked.append((mode, prompt, len(list(images)), seed))
        return WorldState(
            mode=mode, prompt_ids=(), answer_ids=(), seed=seed, step=0, size=None, ended=False,
            fingerprint=b"",
        )  # fmt: skip

    def imagine_batch(
        self,
        states: Sequence[WorldState],
        texts: Sequence[str | None],
        *,
        sampling: Sampling | None = None,
    ) -> list[tuple[WorldState, Segment]]:
        (state,), (text,) = states, texts
        assert text is None and not state.ended, "the model writes by itself, up to its own end"
        self.samplings.append(sampling)
        grown = replace(state, step=state.step + 1)
        if state.step >= len(self.script) and not self.lasting:
            return [(replace(grown, ended=True), Segment(text="", image=None, thought=None, ended=True))]
        words = self.script[state.step % len(self.script)]
        return [(grown, Segment(text=f"{words} ", image=frame(state.step), thought=None, ended=False))]

    def imagine_words(
        self, state: WorldState, *, sampling: Sampling | None = None, temperature: float | None = None
    ) -> str | None:
        raise AssertionError("no words are looked for that could be done")


def handed_out(
    agent: Guide, *, goal: Frame | None = None, info: Mapping[str, object] | None = None
) -> list[str]:
    agent.begin(
        Assignment(instruction="Put the red cube on the blue plate.", frame=frame(), goal=goal, seed=3)
    )
    texts: list[str] = []
    while len(texts) < 9 and (step := agent.act(frame(), info or {})) is not None:
        texts.append(step.text)
    return texts


@pytest.mark.parametrize(
    "instruction, question",
    [
        ("put the red cube on the blue plate", "How to put the red cube on the blue plate."),
        ("Put the red cube on the blue plate.", "How to put the red cube on the blue plate."),
        ("  stack the red cube\non the blue cube ! ", "How to stack the red cube on the blue cube."),
        ("How to open the drawer?", "How to open the drawer."),
        ("how to Open the drawer", "How to open the drawer."),
        ("First open the drawer. Then close it.", "How to first open the drawer. Then close it."),
    ],
)
def test_the_question_is_as_training_writes_it(instruction: str, question: str) -> None:
    assert how_to(instruction) == how_to(question) == question


@pytest.mark.parametrize("instruction", ["", " . ", "How to ?"])
def test_a_question_needs_words(instruction: str) -> None:
    with pytest.raises(ValueError, match="what is to be done"):
        how_to(instruction)


def test_the_model_is_asked_once_and_its_steps_are_handed_out_in_order() -> None:
    model = StubModel(PICK, PLACE)
    agent = Guide(model)
    assert handed_out(agent, info={"invalid_action": True}) == [PICK, PLACE]  # whatever became of a step
    assert model.asked == [("howto", "How to put the red cube on the blue plate.", 1, 3)]
    assert agent.num_pictures == 2 and len(model.samplings) == 3  # the last one found the end
    assert handed_out(agent) == [PICK, PLACE] and agent.num_pictures == 2, "an episode forgets the one before"


def test_steps_have_their_pictures() -> None:
    agent = Guide(StubModel(PICK, PLACE))
    handed_out(agent)
    pictures = [step.keyframe for step in agent.steps]
    assert all(np.array_equal(one, frame(index)) for index, one in enumerate(pictures) if one is not None)
    assert len(pictures) == 2 and None not in [type(one) for one in pictures]


def test_what_is_needed_is_no_step_of_work() -> None:
    agent = Guide(StubModel(OPENING, PLACE, OPENING), is_opening=lambda text: text == OPENING)
    assert handed_out(agent) == [PLACE, OPENING]  # the opening alone is left out, no later words
    assert agent.num_pictures == 3 and np.array_equal(agent.steps[0].keyframe, frame(1))
    assert handed_out(Guide(StubModel(OPENING, PLACE))) == [OPENING, PLACE], "nobody has said what it is"


def test_words_that_nobody_can_do_are_handed_out_too() -> None:
    assert handed_out(Guide(StubModel("Fly.", PLACE))) == ["Fly.", PLACE]


def test_a_guide_without_steps_is_nothing_to_do() -> None:
    assert handed_out(Guide(StubModel())) == []
    assert handed_out(Guide(StubModel(OPENING), is_opening=lambda text: True)) == []


def test_limits_are_kept() -> None:
    endless = StubModel(PICK, lasting=True)
    steps = Guide(endless, max_steps=3)
    assert handed_out(steps) == [PICK] * 3 and steps.num_pictures == len(endless.samplings) == 3
    pictures = Guide(StubModel(OPENING, PICK, PLACE), is_opening=lambda text: text == OPENING, max_pictures=2)
    assert handed_out(pictures) == [PICK] and pictures.num_pictures == 2


def test_a_full_context_gives_no_guide_or_a_shorter_one() -> None:
    class Full(StubModel):
        def begin(self, **_: object) -> WorldState:
            raise ContextFull("no room")

    class Cut(StubModel):
        def imagine_batch(self, states: Sequence[WorldState], *rest: object, **named: object) -> list[object]:
            if states[0].step == 1:  # words, and no room for their picture
                cut = Segment(text="Put the red", image=None, thought=None, ended=True)
                return [(replace(states[0], ended=True), cut)]
            return super().imagine_batch(states, *rest, **named)  # type: ignore[arg-type,return-value]

    assert handed_out(Guide(Full(PICK))) == []
    assert handed_out(Guide(Cut(PICK, PLACE))) == [PICK]


def test_question_sampling_and_goal_are_passed_on() -> None:
    model, settings = StubModel(PICK), Sampling(text=Truncation(temperature=0.5))
    handed_out(Guide(model, question=lambda words: f"Q: {words}", sampling=settings), goal=frame(9))
    assert model.asked == [("howto", "Q: Put the red cube on the blue plate.", 2, 3)]
    assert set(map(id, model.samplings)) == {id(settings)}
