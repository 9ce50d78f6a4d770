"""Workers that share a model: the same results for any number of them, shared batches, errors where they
belong.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any

import pytest

from emuworld.agents.agent import Frame
from emuworld.agents.planner import Imagines
from emuworld.tasks.robot.workers import CasesFailed, Desk, Work, serve, work_off
from emuworld.world_model import ContextFull, Sampling, Segment, WorldState


class Counting:
    """A model whose worlds count: every segment's text is the seed times the step."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def begin(
        self, *, mode: str, prompt: str = "", images: Iterable[Frame] = (), seed: int = 0
    ) -> WorldState:
        if prompt == "too long":
            raise ContextFull("no room")
        return WorldState(
            mode=mode, prompt_ids=(), answer_ids=(), seed=seed, step=0, size=None, ended=False,
            fingerprint=b"",
        )  # fmt: skip

    def imagine_batch(
        self, states: Sequence[WorldState], texts: Sequence[str | None], *, sampling: Sampling | None = None
    ) -> list[tuple[WorldState, Segment]]:
        self.rows.append(len(states))
        if any(state.seed == 13 for state in states):
            raise ValueError("an unlucky world")
        return [
            (
                replace(state, step=state.step + 1),
                Segment(text=str(state.seed * (state.step + 1)), image=None, thought=None, ended=False),
            )
            for state in states
        ]

    def imagine_words(
        self, state: WorldState, *, sampling: Sampling | None = None, temperature: float | None = None
    ) -> str | None:
        if state.seed == 13:
            raise ValueError("an unlucky world")
        return f"words of {state.seed}"


def open_tool() -> dict[str, int]:
    return {"cases": 0}


def do(tool: dict[str, int], case: int, model: Imagines | None) -> list[str]:
    tool["cases"] += 1
    if model is None:
        return [str(case)]
    prompt = "too long" if case == 99 else ""
    try:
        state = model.begin(mode="vla", prompt=prompt, seed=case)
    except ContextFull as error:
        return [str(error)]
    texts = [str(model.imagine_words(state))]
    for _ in range(4):
        ((state, segment),) = model.imagine_batch([state], [None])
        texts.append(segment.text)
    return texts


def test_processes_give_what_each_case_gives_alone() -> None:
    found: dict[int, list[str]] = {}
    with pytest.raises(CasesFailed, match=r"1 cases failed \(13\)(.|\n)*an unlucky world"):
        work_off(
            Work(open_tool=open_tool, do=do),
            [5, 7, 13, 99, 11],
            num_workers=2,
            model=Counting(),
            on_result=found.__setitem__,
        )
    expected = {
        case: [f"words of {case}", *(str(case * step) for step in (1, 2, 3, 4))] for case in (5, 7, 11)
    }
    assert found == expected | {99: ["no room"]}


def asked_at_once(seeds: Sequence[int], *, batch: int) -> tuple[list[int], list[Any]]:
    """Workers who have all asked already when the desk opens: the batches' rows, and each one's answer."""
    model, pipes = Counting(), [Pipe() for _ in seeds]
    for seed, (_, worker) in zip(seeds, pipes, strict=True):
        worker.send(("imagine", ([model.begin(mode="vla", seed=seed)], [None], None)))
        worker.send(("done", seed))
    desk = [mine for mine, _ in pipes]
    Desk(desk, seeds, model=model, batch=batch, on_result=lambda case, result: None).run()
    return model.rows, [(worker.recv(), worker.recv())[1] for _, worker in pipes]


def test_what_is_asked_at_once_is_one_batch() -> None:
    rows, answers = asked_at_once([3, 4, 5], batch=8)
    assert rows == [3] and [answer[0][1].text for answer in answers] == ["3", "4", "5"]
    assert asked_at_once([3, 4, 5], batch=2)[0] == [2, 1]


def test_an_error_reaches_whose_it_is() -> None:
    rows, answers = asked_at_once([3, 13, 5], batch=8)
    assert rows == [3, 1, 1, 1] and isinstance(answers[1], ValueError)
    assert [answers[index][0][1].text for index in (0, 2)] == ["3", "5"]


def test_no_model_and_no_case_are_fine() -> None:
    work_off(Work(open_tool=open_tool, do=do), [], num_workers=4, on_result=lambda case, result: None)
    mine, worker = Pipe()
    mine.send(8)
    mine.send(None)
    serve(worker, Work(open_tool=open_tool, do=do), False)
    assert mine.recv() == ("done", ["8"])
