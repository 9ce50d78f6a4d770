"""What is asked of a world model: the settings of each suite and the seeds behind its cases.

A suite is a frozen dataclass; how its cases are made true is in `truth.py`, how they are run in
`evaluate.py`, and what the figures say in `report.py`. Every case has its own seed, so a run can be cut
short, resumed or enlarged and the cases stay the same.
"""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

# The bars of issue 2: what a release must reach at least. `report` prints them beside the figures.
BARS: dict[str, float] = {
    "tokenizer_db": 32.0,
    "tokenizer_codes_used": 0.60,  # of all codes, over 2,000 frames
    "step_1_seen_gap_db": 1.5,  # at most this far under the tokenizer's reconstruction
    "step_1_moves_over_copy_db": 4.0,
    "retrieval": 0.95,
    "step_10_seen_db": 24.0,
    "t2i_all_present": 0.80,
}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every suite needs to run, whatever it asks."""

    model: str = "small"  # a built-in name or a checkpoint folder
    device: str = "auto"  # auto | cpu | cuda
    out: str = "outputs/eval"  # folder of the run
    detector: str = ""  # file of the judge; "" = detector.safetensors beside the model
    split: str = "test"  # train | validation | test: which rooms
    seed: int = 0  # of the cases; the same seed asks the same
    size_px: int = 256  # height and width of a frame, a multiple of 16
    batch: int = 0  # rows imagined at once; 0 = 512 on a GPU, 8 on a CPU
    workers: int = 0  # processes that render the truth; 0 = one a core, at most 16
    renderer: str = "auto"  # auto | gl | rays
    temperature: float | None = 0.0  # 0 = always the likeliest token; null = the model's own sampling
    passes: tuple[int, ...] = ()  # in which pictures are drawn; [] = the model's own; several: compared
    num_pictures: int = 6  # cases kept with their pictures for the page
    resume: bool = True  # go on where an earlier run of the same settings stopped
    score_only: bool = False  # run nothing: summarise the stored cases again


@dataclass(frozen=True, kw_only=True)
class ExploreTwin(RunSettings):
    """The dream beside its twin: the same start, the same commands, compared frame by frame with MuJoCo.

    A start is a room of the split, seen by the simulator. Its first frame begins the dream, both get the
    same random commands open loop, and every dreamt frame is compared with the simulator's.
    """

    name: ClassVar[str] = "explore-twin"
    num_starts: int = 500  # rooms
    num_steps: int = 10  # random commands a room, open loop
    num_shuffled: int = 200  # of the rooms, dreamt under other commands too: the shuffle gap
    num_branches: int = 4  # different commands from the start, for counterfactual retrieval
    num_walks: int = 32  # long walks out and back, for object permanence
    walk_steps: int = 40  # commands of a long walk; the second half undoes the first
    num_turns: int = 32  # full turns of 12 x 30 degrees, for the closing error
    phrasing: str = "canonical"  # canonical: the table's words | split: all phrasings of the split


@dataclass(frozen=True, kw_only=True)
class TextToImage(RunSettings):
    """Pictures from words: are the named objects there, in the right colour? A detector judges.

    Half of the prompts name one object, half name two; colours and shapes are those of the split, held-out
    pairs included in test.
    """

    name: ClassVar[str] = "t2i"
    num_prompts: int = 200
    temperature: float | None = None  # null = the model's own sampling, as a user gets it


Suite = ExploreTwin | TextToImage
SUITES: dict[str, type[ExploreTwin] | type[TextToImage]] = {
    one.name: one for one in (ExploreTwin, TextToImage)
}


def case_seed(suite: Suite, kind: str, index: int) -> int:
    """The seed of one case, below 2^31: depends on the suite's seed, the kind of case and its index alone."""
    words = [suite.seed, zlib.crc32(kind.encode()), index]
    return int(np.random.SeedSequence(words).generate_state(1)[0] >> 1)
