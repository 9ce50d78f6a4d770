"""What every suite runs on: the model, the judge, the truth's workers, and dreams in batches."""

import base64
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from emuworld.envs.dream import Dream
from emuworld.envs.turns import Episode
from emuworld.tasks.detector import Detector
from emuworld.tasks.metrics import Frame
from emuworld.tasks.progress import OnProgress
from emuworld.tasks.run_folder import Record, append_records, read_records
from emuworld.tasks.suites import RoomSuite, case_seed
from emuworld.tasks.truth import Request, StartTruth, WalkTruth
from emuworld.world_model import WorldModel

Frames = NDArray[np.uint8]  # [N, H, W, 3]
C = TypeVar("C")
_CHUNKS_AHEAD = 2  # rendered while one is dreamt: the simulator's processes never wait for the model


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What is measured and with what: the model, the judge, the batch, the workers."""

    suite: RoomSuite
    model: WorldModel
    detector: Detector
    folder: Path
    pool: ProcessPoolExecutor
    threads: ThreadPoolExecutor
    batch: int
    on_progress: OnProgress
    scoring: deque[tuple[Future[Record], Record]] = field(default_factory=deque)
    """Records that the processes are still making, and what is to be added to each."""

    def dream(self, mode: str) -> Dream:
        """The rules of a mode at the suite's size and temperature."""
        suite = self.suite
        greedy = suite.temperature == 0.0
        return Dream(
            model=self.model,
            mode=mode,
            size=suite.size_px,
            greedy=greedy,
            temperature=None if greedy else suite.temperature,
            passes=suite.passes[0] if suite.passes else None,
        )

    def request(self, kind: str, index: int, **more: Any) -> Request:
        """The simulator's part of a case."""
        suite = self.suite
        return Request(
            index=index,
            seed=case_seed(suite, kind, index),
            split=suite.split,
            size_px=suite.size_px,
            renderer=suite.renderer,
            **more,
        )

    @property
    def records_path(self) -> Path:
        return self.folder / "records.jsonl"

    def append(self, records: Sequence[Record]) -> None:
        """Keep cases that are done."""
        append_records(self.records_path, records)

    def score(self, function: Callable[..., Record], *arguments: Any, more: Record) -> None:
        """Have a record made by a process, while the next cases are dreamt."""
        self.scoring.append((self.pool.submit(function, *arguments), more))

    def keep_scored(self, *, wait: bool = False) -> None:
        """Append the records that are made by now, or all, in the order in which they were asked for."""
        while self.scoring and (wait or self.scoring[0][0].done()):
            future, more = self.scoring.popleft()
            self.append([future.result() | more])


def chunks(
    bench: Bench, kind: str, total: int, make: Callable[[Request], C], *, rows: int, **more: Any
) -> Iterator[list[C]]:
    """The cases of a kind that are not stored yet, rendered some chunks ahead; each takes `rows` rows of the
    batch.
    """
    done = {r["index"] for r in read_records(bench.records_path) if r["kind"] == kind}
    todo = [index for index in range(total) if index not in done]
    size = max(1, bench.batch // rows)
    chunks = [todo[start : start + size] for start in range(0, len(todo), size)]
    label, finished = f"{bench.suite.name}: {kind}s", total - len(todo)
    bench.on_progress(label, finished, total)
    waiting: deque[list[Future[C]]] = deque()
    for ahead in range(len(chunks) + _CHUNKS_AHEAD):
        if ahead < len(chunks):
            requests = [bench.request(kind, index, **more) for index in chunks[ahead]]
            waiting.append([bench.pool.submit(make, request) for request in requests])
        if ahead >= _CHUNKS_AHEAD and waiting:
            chunk = waiting.popleft()
            yield [future.result() for future in chunk]
            finished += len(chunk)
            bench.on_progress(label, finished, total)
    bench.keep_scored(wait=True)


# Dreaming -------------------------------------------------------------------------------------------------


def begin(dream: Dream, bench: Bench, kind: str, truths: Sequence[StartTruth | WalkTruth]) -> list[Episode]:
    """Worlds that begin with the simulator's first frame."""
    opened = dream.open_pictures([[truth.frames[0]] for truth in truths])
    turns = [
        dream.reset_turn(
            np.random.default_rng(case_seed(bench.suite, f"dream {kind}", truth.index)),
            {"prompt": truth.prompt, "image": truth.frames[0]},
            opened=one,
        )
        for truth, one in zip(truths, opened, strict=True)
    ]
    return [outcome.episode for outcome in dream.resolve(turns)]


def step_all(
    dream: Dream, bench: Bench, episodes: Sequence[Episode], commands: Sequence[str]
) -> list[Episode]:
    """One command each, `bench.batch` rows at a time. ValueError where a command does not fit the context."""
    after: list[Episode] = []
    for start in range(0, len(episodes), bench.batch):
        bench.keep_scored()
        rows = slice(start, start + bench.batch)
        turns = [dream.step_turn(e, c) for e, c in zip(episodes[rows], commands[rows], strict=True)]
        outcomes = dream.resolve(turns)
        refused = [
            turn.command for turn, one in zip(turns, outcomes, strict=True) if one.info["invalid_action"]
        ]
        if refused:
            raise ValueError(
                f"the model could not take {refused[0]!r} after {episodes[start].frame_index} frames: its "
                "context is full; ask for fewer steps (num_steps, walk_steps) or smaller frames (size_px)"
            )
        after.extend(outcome.episode for outcome in outcomes)
    return after


def walk(
    dream: Dream, bench: Bench, episodes: Sequence[Episode], commands: Sequence[Sequence[str]]
) -> Frames:
    """Frames of the open-loop walks, [rows, steps, H, W, 3]."""
    current, frames, num_steps = list(episodes), [], len(commands[0])
    for step in range(num_steps):
        current = step_all(dream, bench, current, [row[step] for row in commands])
        frames.append(np.stack([episode.frame for episode in current]))
        bench.on_progress(f"{bench.suite.name}: steps of {len(episodes)} together", step + 1, num_steps)
    return np.stack(frames, axis=1)


def reconstruct(model: WorldModel, walks: Sequence[Frames]) -> list[tuple[list[Frame], str]]:
    """Frames of each walk through the vision tokenizer and back, and which codes they used (one bit a code,
    base64).
    """
    codes = model.encode(frame for frames in walks for frame in frames)
    rebuilt = iter(zip(codes, model.decode(codes), strict=True))
    results = []
    for frames in walks:
        used = np.zeros(model.manifest.vocabulary.num_visual_tokens, dtype=np.bool_)
        mine: list[Frame] = []
        for _, (grid, picture) in zip(frames, rebuilt, strict=False):
            used[np.asarray(grid).ravel()] = True
            mine.append(picture)
        results.append((mine, base64.b64encode(np.packbits(used).tobytes()).decode("ascii")))
    return results
