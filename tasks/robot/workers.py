"""Cases worked off by several processes that share one world model, which stays where it was loaded.

A worker that imagines asks the parent over its pipe; the parent puts together what several workers ask at the
same moment and runs it as one batch. What a case gives does not depend on the batches (worlds do not), so it
does not depend on the number of workers either. Workers are our own processes: what travels through the pipes
comes from nowhere else.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from emuworld.agents.agent import Frame
from emuworld.agents.planner import Imagines
from emuworld.world_model import Sampling, Segment, WorldState

_GATHER_S = 0.005  # after a request, so long is waited for others to share its batch
_AT_ONCE = ("begin", "imagine_words")  # methods of the model that are answered one by one
_LEAVE_S = 5.0  # to a worker that is told to stop

Tool = TypeVar("Tool")  # what a worker opens once and uses for all its cases
Case = TypeVar("Case")
Result = TypeVar("Result")


class CasesFailed(RuntimeError):
    """Some cases raised; the message has them and the first one's trace. The others are done."""


@dataclass(frozen=True, kw_only=True)
class Work(Generic[Tool, Case, Result]):
    """What a worker does: `open_tool()` once, `do(tool, case, model)` for every case. Both are module-level
    functions, for they travel to the worker by name."""

    open_tool: Callable[[], Tool]
    do: Callable[[Tool, Case, Imagines | None], Result]


class DistantModel:
    """A world model in another process, behind a pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def begin(
        self, *, mode: str, prompt: str = "", images: Iterable[Frame] = (), seed: int = 0
    ) -> WorldState:
        """See `WorldModel.begin`."""
        return self._ask("begin", {"mode": mode, "prompt": prompt, "images": list(images), "seed": seed})

    def imagine_batch(
        self,
        states: Sequence[WorldState],
        texts: Sequence[str | None],
        *,
        sampling: Sampling | None = None,
    ) -> list[tuple[WorldState, Segment]]:
        """See `WorldModel.imagine_batch`."""
        return self._ask("imagine", (list(states), list(texts), sampling))

    def imagine_words(
        self, state: WorldState, *, sampling: Sampling | None = None, temperature: float | None = None
    ) -> str | None:
        """See `WorldModel.imagine_words`."""
        return self._ask("imagine_words", {"state": state, "sampling": sampling, "temperature": temperature})

    def _ask(self, kind: str, what: Any) -> Any:
        self._pipe.send((kind, what))
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def work_off(
    work: Work[Tool, Case, Result],
    cases: Sequence[Case],
    *,
    num_workers: int,
    model: Imagines | None = None,
    batch: int = 8,
    on_result: Callable[[Case, Result], None],
) -> None:
    """Do every case in one of `num_workers` processes; results are handed over as they come, in any order.

    `batch`: rows that the model imagines at once, at most. Raises CasesFailed, after all others are done,
    where cases raise; RuntimeError where a worker dies.
    """
    if not cases:
        return
    context = get_context("spawn")
    pipes: dict[Connection, Any] = {}
    try:
        for _ in range(min(max(num_workers, 1), len(cases))):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(theirs, work, model is not None), daemon=True, name="robot-worker"
            )
            process.start()
            theirs.close()
            pipes[mine] = process
        Desk(list(pipes), cases, model=model, batch=batch, on_result=on_result).run()
        for pipe in pipes:
            pipe.send(None)
        for process in pipes.values():
            process.join(_LEAVE_S)
    finally:
        for process in pipes.values():
            process.terminate()


class Desk:
    """The parent's side: hands out cases, takes results, answers for the model. See `work_off`.

    Args:
        pipes: to the workers, each of which follows `serve`.
    """

    def __init__(
        self,
        pipes: Sequence[Connection],
        cases: Sequence[Any],
        *,
        model: Imagines | None,
        batch: int,
        on_result: Callable[[Any, Any], None],
    ) -> None:
        self._pipes = list(pipes)
        self._waiting = list(reversed(cases))
        self._model, self._batch, self._on_result = model, batch, on_result
        self._busy: dict[Connection, Any] = {}
        self._failed: list[tuple[Any, str]] = []

    def run(self) -> None:
        """Until every case is done; raises as `work_off` does."""
        for pipe in self._pipes:
            self._hand_out(pipe)
        while self._busy:
            imagine: dict[Connection, Any] = {}
            gather: float | None = None
            while ready := wait([pipe for pipe in self._busy if pipe not in imagine], gather):
                for pipe in self._pipes:
                    if pipe in ready:
                        self._take(pipe, imagine)
                gather = _GATHER_S if imagine else None
                if len(imagine) == len(self._busy) or not self._busy:
                    break
            self._imagine(imagine)
        if self._failed:
            names = ", ".join(str(case) for case, _ in self._failed[:8])
            raise CasesFailed(f"{len(self._failed)} cases failed ({names}); the first: {self._failed[0][1]}")

    def _hand_out(self, pipe: Connection) -> None:
        self._busy.pop(pipe, None)
        if self._waiting:
            self._busy[pipe] = self._waiting.pop()
            pipe.send(self._busy[pipe])

    def _take(self, pipe: Connection, imagine: dict[Connection, Any]) -> None:
        """One message of a worker."""
        try:
            kind, what = pipe.recv()
        except EOFError:
            raise RuntimeError(f"a worker died at {self._busy[pipe]}; out of memory?") from None
        if kind == "imagine":
            imagine[pipe] = what
        elif kind in _AT_ONCE:
            pipe.send(_tried(getattr(self._model, kind), **what))
        elif kind == "failed":
            self._failed.append((self._busy[pipe], what))
            self._hand_out(pipe)
        else:
            self._on_result(self._busy[pipe], what)
            self._hand_out(pipe)

    def _imagine(self, asked: dict[Connection, Any]) -> None:
        """Answer what was asked together; requests with other sampling settings stay apart."""
        rest = list(asked.items())
        while rest:
            sampling, rows = rest[0][1][2], 0
            taken: list[tuple[Connection, Any]] = []
            for item in rest:
                if item[1][2] == sampling and (not taken or rows + len(item[1][0]) <= self._batch):
                    taken.append(item)
                    rows += len(item[1][0])
            rest = [item for item in rest if item not in taken]
            self._answer(taken)

    def _answer(self, taken: Sequence[tuple[Connection, Any]]) -> None:
        assert self._model is not None
        states = [state for _, (some, _, _) in taken for state in some]
        texts = [text for _, (_, some, _) in taken for text in some]
        grown = _tried(self._model.imagine_batch, states, texts, sampling=taken[0][1][2])
        if isinstance(grown, Exception) and len(taken) > 1:  # whose it is shows when they are asked alone
            for item in taken:
                self._answer([item])
            return
        for pipe, (some, _, _) in taken:
            pipe.send(grown if isinstance(grown, Exception) else grown[: len(some)])
            grown = grown if isinstance(grown, Exception) else grown[len(some) :]


def _tried(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """The result, or the ValueError that the worker has to know (a full context)."""
    try:
        return function(*args, **named)
    except ValueError as error:
        return error


def serve(pipe: Connection, work: Work[Any, Any, Any], has_model: bool) -> None:
    """A worker's life: cases come, results go; None, or a parent that is gone, ends it."""
    model = DistantModel(pipe) if has_model else None
    tool: Any = None
    try:
        while (case := pipe.recv()) is not None:
            try:
                tool = work.open_tool() if tool is None else tool
                answer = ("done", work.do(tool, case, model))
            except (EOFError, BrokenPipeError):
                raise
            except Exception:  # the other cases are worth having; the parent raises in the end
                answer = ("failed", traceback.format_exc())
            pipe.send(answer)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
