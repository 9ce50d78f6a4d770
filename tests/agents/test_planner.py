"""The planner against a stub world model that imagines what a script says: which plan it takes, when it looks
again, how much it spends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from emuworld.agents.agent import Assignment, Frame, Step
from emuworld.agents.objectives import ImaginedPlan, changed_share, completeness, consistency, goal_picture
from emuworld.agents.planner import Planner, PlannerConfig
from emuworld.world_model import ContextFull, Sampling, Segment, WorldState

SIDE = 64


def frame(spot: int = 0, *, level: int = 120) -> Frame:
    """A plain picture with a white square at one of 16 spots."""
    picture = np.full((SIDE, SIDE, 3), level, dtype=np.uint8)
    row, column = divmod(spot, 4)
    picture[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 250
    return picture


def drawn(text: str) -> Segment:
    """The picture that the model draws for words that it was given: the square at a spot of its own."""
    return Segment(text=text, image=frame(len(text)), thought=None, ended=False)


Script = Sequence[tuple[str, int]]  # texts and the spot that the square is at afterwards


class StubModel:
    """Begins with one script for each plan of a round; every world follows its own, then ends."""

    def __init__(self, *rounds: Sequence[Script]) -> None:
        self.rounds = list(rounds)
        self.scripts: dict[int, Script] = {}
        self.prompts: list[str] = []
        self.images: list[list[Frame]] = []
        self.batches: list[int] = []
        self._current: list[Script] = []

    def begin(
        self, *, mode: str, prompt: str = "", images: Iterable[Frame] = (), seed: int = 0
    ) -> WorldState:
        assert mode == "vla"
        self.prompts.append(prompt)
        self.images.append(list(images))
        self._current = list(self.rounds.pop(0)) if len(self.rounds) > 1 else list(self.rounds[0])
        self.scripts = {}
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
        self.batches.append(len(states))
        return [
            self._next(state) if text is None else (replace(state, step=state.step + 1), drawn(text))
            for state, text in zip(states, texts, strict=True)
        ]

    def imagine_words(
        self, state: WorldState, *, sampling: Sampling | None = None, temperature: float | None = None
    ) -> str | None:
        segment = self._next(state)[1]
        return None if segment.image is None else segment.text

    def _next(self, state: WorldState) -> tuple[WorldState, Segment]:
        if state.seed not in self.scripts:
            self.scripts[state.seed] = self._current[len(self.scripts) % len(self._current)]
        script = self.scripts[state.seed]
        if state.step >= len(script):
            ended = replace(state, ended=True, step=state.step + 1)
            return ended, Segment(text="", image=None, thought=None, ended=True)
        text, spot = script[state.step]
        grown = replace(state, step=state.step + 1)
        return grown, Segment(text=f"{text} ", image=frame(spot), thought=None, ended=False)


GOOD: Script = (("pick", 1), ("place", 2))


def planner(
    model: StubModel,
    *,
    blocked: str = "",
    done: Sequence[bool | None] = (None,),
    spelled: Sequence[str] = (),
    **settings: object,
) -> Planner:
    """`blocked`: a first subtask that the robot would not set out on. `done`: whether the work is, at one
    step after the other; the last one stays. `spelled`: subtasks that the instruction names."""
    told = list(done)
    config = PlannerConfig(**{"num_plans": 2, "depth": 4, "text_tries": 1, **settings})  # type: ignore[arg-type]
    objectives = {"goal": lambda plan: float(any("place" in step.text for step in plan.steps))}
    agent = Planner(
        model,
        question=lambda instruction: f"Q: {instruction}",
        config=config,
        objectives=objectives,
        is_valid=lambda text: text in ("pick", "place", "push"),
        can_begin=lambda plan: plan.steps[0].text != blocked,
        is_done=lambda instruction: told.pop(0) if len(told) > 1 else told[0],
        spelled_out=lambda instruction: spelled,
    )
    agent.begin(Assignment(instruction="do it", frame=frame(), seed=3))
    return agent


def steps(agent: Planner, views: Sequence[int], info: Mapping[str, object] | None = None) -> list[str | None]:
    taken = [agent.act(frame(spot), info or {}) for spot in views]
    return [None if step is None else step.text for step in taken]


def test_hands_out_the_best_plan_and_stops() -> None:
    model = StubModel([(("push", 3),), GOOD])
    agent = planner(model)
    assert steps(agent, [0, 1, 2]) == ["pick", "place", None]
    assert model.prompts == ["Q: do it"]  # nothing surprised it: one round was enough


def test_steps_carry_keyframe_and_scores() -> None:
    step = planner(StubModel([GOOD])).act(frame(), {})
    assert step is not None and step.keyframe is not None
    assert np.array_equal(step.keyframe, frame(1))
    assert step.scores["goal"] == 1.0 and step.scores["votes"] == 1.0 and step.scores["valid"] == 1.0


def test_unusable_words_lose_against_anything_usable() -> None:
    model = StubModel([(("fly", 1), ("place", 2)), (("push", 3),)])
    assert steps(planner(model), [0]) == ["push"]


def test_nothing_is_imagined_behind_a_subtask_that_cannot_be_done() -> None:
    agent = planner(StubModel([(("fly", 1), ("place", 2))], [GOOD]), num_plans=1)
    assert steps(agent, [0]) == ["pick"]
    assert agent.num_pictures == 1 + len(GOOD) + 1  # "fly" alone; the other plan, and that it is over
    cut = planner(StubModel([(("pick", 1), ("fly", 2), ("place", 3))]), num_plans=1, tries=1, replan="never")
    assert steps(cut, [0, 1]) == ["pick", None]  # it is not asked to fly
    assert not cut.considered[0].complete and len(cut.considered[0].steps) == 2


def test_words_are_looked_for_that_can_be_done_before_they_are_drawn() -> None:
    rounds = [(("fly", 1), ("place", 2)), (("swim", 1),), GOOD]  # one for each seed that is asked
    agent = planner(StubModel(rounds), num_plans=1, text_tries=3)
    assert steps(agent, [0]) == ["pick"]
    assert agent.num_pictures == len(GOOD) + 1  # none of "fly" and "swim"
    in_vain = planner(StubModel([(("fly", 1),)]), num_plans=1, text_tries=3, tries=1)
    assert steps(in_vain, [0]) == [None] and in_vain.num_pictures == 1
    with pytest.raises(ValueError, match="text_tries must be 1 or more"):
        PlannerConfig(text_tries=0)


def test_looks_again_when_the_view_is_not_the_keyframe() -> None:
    model = StubModel([GOOD], [(("push", 9),)])
    agent = planner(model)
    assert steps(agent, [0, 5]) == ["pick", "push"]  # 5: the square is not where the keyframe has it
    assert np.array_equal(model.images[1][0], frame(5))


def test_never_looks_again_when_told_so() -> None:
    model = StubModel([GOOD], [(("push", 9),)])
    assert steps(planner(model, replan="never"), [0, 5, 5]) == ["pick", "place", None]
    assert len(model.prompts) == 1


def test_always_looks_again_when_told_so() -> None:
    model = StubModel([GOOD])
    assert steps(planner(model, replan="always"), [0, 1]) == ["pick", "pick"]
    assert len(model.prompts) == 2


def test_a_refused_subtask_is_not_tried_again() -> None:
    model = StubModel([GOOD], [GOOD, (("push", 3), ("place", 2))])
    agent = planner(model)
    assert steps(agent, [0]) == ["pick"]
    step = agent.act(frame(0), {"invalid_action": True})
    assert step is not None and step.text == "push"


def test_a_plan_that_can_be_begun_is_looked_for() -> None:
    model = StubModel([GOOD], [GOOD], [(("push", 3),)])
    assert steps(planner(model, blocked="pick"), [0]) == ["push"]
    assert len(model.prompts) == 3
    better = StubModel([GOOD, (("push", 3), ("place", 2))])  # one of the first round already
    assert steps(planner(better, blocked="pick"), [0]) == ["push"]
    assert len(better.prompts) == 1


def test_nothing_is_done_where_no_plan_can_be_begun() -> None:
    model = StubModel([GOOD])
    assert steps(planner(model, blocked="pick", tries=2), [0]) == [None]
    assert len(model.prompts) == 2
    refused = planner(StubModel([(("pick", 1),)]))
    assert steps(refused, [0]) == ["pick"]
    assert refused.act(frame(0), {"invalid_action": True}) is None  # it knows nothing else


def test_work_that_is_done_is_left_alone() -> None:
    """Though the plan has more, and though the view is not the keyframe's."""
    model = StubModel([GOOD], [(("push", 9),)])
    assert steps(planner(model, done=(False, True)), [0, 5]) == ["pick", None]
    assert steps(planner(StubModel([GOOD]), done=(True,)), [0]) == [None]


def test_a_plan_that_ends_too_early_is_followed_by_another() -> None:
    model = StubModel([(("pick", 1),)], [(("place", 2),)])
    assert steps(planner(model, done=(False, False, True)), [0, 1, 2]) == ["pick", "place", None]
    assert steps(planner(StubModel([(("pick", 1),)], [(("place", 2),)])), [0, 1]) == ["pick", None]


def test_what_the_words_spell_out_is_one_more_plan() -> None:
    model = StubModel([(("push", 3),)])
    agent = planner(model, spelled=("pick", "place"))
    step = agent.act(frame(), {})
    assert step is not None and step.text == "pick" and np.array_equal(step.keyframe, frame(len("pick")))
    assert agent.num_pictures == sum(model.batches)
    assert [[one.text for one in plan.steps] for plan in agent.considered] == [
        ["pick", "place"],
        *[["push"]] * 2,
    ]


def test_what_the_words_spell_out_comes_first_where_pictures_are_few() -> None:
    model = StubModel([(("push", 3), ("push", 4), ("push", 5))])
    agent = planner(model, spelled=("pick", "place"), max_pictures=2)
    assert steps(agent, [0]) == ["pick"] and agent.num_pictures == 2


def test_words_that_spell_out_nothing_to_be_done_are_left_alone() -> None:
    """One of them is no subtask, was refused, or the budget is too small for all."""
    push = [(("push", 3),)]
    assert steps(planner(StubModel(push), spelled=("fly", "place")), [0]) == ["push"]
    assert steps(planner(StubModel(push), spelled=("pick", "place"), max_pictures=1), [0]) == ["push"]
    agent = planner(StubModel(push), spelled=("pick", "place"))
    assert steps(agent, [0]) == ["pick"]
    step = agent.act(frame(0), {"invalid_action": True})
    assert step is not None and step.text == "push"


def test_without_budget_the_words_are_done_without_pictures() -> None:
    agent = planner(StubModel([(("push", 3),)]), spelled=("pick", "place"), replan="always", max_pictures=2)
    first, rest = (agent.act(frame(spot), {}) for spot in (0, 3))
    assert first is not None and first.keyframe is not None  # the budget goes into the words' pictures
    assert rest is not None and (rest.text, rest.keyframe) == ("pick", None)


def test_brightness_is_no_surprise() -> None:
    model = StubModel([GOOD])
    agent = planner(model)
    agent.act(frame(), {})
    brighter = np.clip(frame(1).astype(int) + 12, 0, 255).astype(np.uint8)
    step = agent.act(brighter, {})
    assert step is not None and step.text == "place" and len(model.prompts) == 1


def test_budget_is_kept() -> None:
    model = StubModel([GOOD])
    agent = planner(model, replan="always", max_pictures=7)
    steps(agent, [0] * 5)
    assert agent.num_pictures == sum(model.batches) <= 7


def test_without_budget_the_old_plan_goes_on() -> None:
    model = StubModel([GOOD], [(("push", 9),)])
    agent = planner(model, max_pictures=6)  # one round: two plans of two pictures and their two ends
    assert steps(agent, [0, 5, 5]) == ["pick", "place", None]


def test_step_limit() -> None:
    agent = planner(StubModel([GOOD]), replan="always", max_steps=2)
    assert steps(agent, [0, 0, 0]) == ["pick", "pick", None]


def test_a_full_context_gives_no_plan() -> None:
    class Full(StubModel):
        def begin(self, **_: object) -> WorldState:
            raise ContextFull("no room")

    assert steps(planner(Full([GOOD])), [0]) == [None]


def test_same_seed_same_steps_and_other_seeds_other_worlds() -> None:
    seeds: list[set[int]] = []
    for seed in (3, 3, 4):
        model = StubModel([GOOD])
        agent = planner(model)
        agent.begin(Assignment(instruction="do it", frame=frame(), seed=seed))
        agent.act(frame(), {})
        seeds.append(set(model.scripts))
    assert seeds[0] == seeds[1] and not seeds[0] & seeds[2] and len(seeds[0]) == 2


def test_goal_picture_goes_to_the_model_and_decides() -> None:
    model = StubModel([(("place", 7),), (("place", 9),)])
    agent = planner(model)
    agent.begin(Assignment(instruction="as in the picture", frame=frame(), goal=frame(9)))
    step = agent.act(frame(), {})
    assert step is not None and step.keyframe is not None and np.array_equal(step.keyframe, frame(9))
    assert len(model.images[0]) == 2


def test_beam_prefers_the_branch_that_scores() -> None:
    scripts = [(("push", 3), ("push", 5)), (("pick", 1), ("push", 4)), GOOD, (("push", 6),)]
    agent = planner(StubModel(scripts), strategy="beam", num_plans=2, branches=2, depth=2)
    found = agent.plans(frame())
    assert len(found) == 2
    assert found[0].scores["goal"] >= found[1].scores["goal"]
    assert agent.num_pictures == 2 + 4


def test_needs_an_assignment() -> None:
    with pytest.raises(ValueError, match="begin"):
        Planner(StubModel([GOOD]), question=str).act(frame(), {})


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="strategy"):
        PlannerConfig(strategy="luck")
    with pytest.raises(ValueError, match="1 or more"):
        PlannerConfig(depth=0)


def plan_of(*pictures: Frame, complete: bool = True, goal: Frame | None = None) -> ImaginedPlan:
    return ImaginedPlan(
        assignment=Assignment(instruction="", frame=frame(), goal=goal),
        frame=frame(),
        steps=tuple(Step(text="pick", keyframe=picture) for picture in pictures),
        complete=complete,
    )


def test_consistency_wants_a_change_but_not_another_scene() -> None:
    other_scene = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
    assert consistency(plan_of(frame(1), frame(2))) == 1.0
    assert consistency(plan_of(frame(), frame())) == 0.0
    assert consistency(plan_of(other_scene.astype(np.uint8))) < 0.2
    assert consistency(plan_of()) == 0.0


def test_goal_picture_measures_the_way() -> None:
    assert goal_picture(plan_of(frame(9), goal=frame(9))) == 1.0
    assert goal_picture(plan_of(frame(7), goal=frame(9))) < 0.1
    assert goal_picture(plan_of(frame(7))) == 1.0


def test_completeness() -> None:
    assert (completeness(plan_of()), completeness(plan_of(complete=False))) == (1.0, 0.5)


def test_changed_share_by_hand() -> None:
    assert changed_share(frame(0), frame(0)) == 0.0
    assert changed_share(frame(0), frame(1)) == pytest.approx(8 / 64)  # two squares of 2 x 2 cells
