"""What is asked of a world model: the settings of each suite and the seeds behind its cases.

A suite is a frozen dataclass; how its cases are made true is in `truth.py`, how they are run in
`evaluate.py`, and what the figures say in `report.py`. Every case has its own seed, so a run can be cut
short, resumed or enlarged and the cases stay the same.
"""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from emuworld.tasks.checks import check_amounts, check_choices

# The bars of issue 2: what a release must reach at least. `report` prints them beside the figures.
BARS: dict[str, float] = {
    "tokenizer_db": 32.0,
    "tokenizer_codes_used": 0.60,  # of all codes, over 2,000 frames
    "step_1_seen_gap_db": 1.5,  # at most this far under the tokenizer's reconstruction
    "step_1_moves_over_copy_db": 4.0,
    "retrieval": 0.95,
    "step_10_seen_db": 24.0,
    "t2i_all_present": 0.80,
    "x2i_success": 0.75,  # issue 4: edit done and rest kept
}
# Those of issue 4, by agent.
ROBOT_BARS: dict[str, float] = {
    "oracle": 1.0,
    "oracle_minutes": 15.0,  # the whole suite, on two cores
    "none": 0.0,  # at most
    "random": 0.0,  # at most
    "planner": 0.60,
    "valid": 0.98,
    "executable": 0.95,
    "significance": 0.05,  # at most: against text-only and scripted, where the goal place is in the picture
}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every suite needs to run, whatever it asks."""

    model: str = "small"  # a built-in name or a checkpoint folder
    device: str = "auto"  # auto | cpu | cuda
    weights: str = "bf16"  # of the transformer on a GPU: bf16 | fp8
    out: str = "outputs/eval"  # folder of the run
    seed: int = 0  # of the cases; the same seed asks the same
    size_px: int = 256  # height and width of a frame, a multiple of 16
    batch: int = 0  # rows imagined at once; 0 = 512 on a GPU, 8 on a CPU
    workers: int = 0  # processes of the simulator; 0 = one a core, at most 16
    renderer: str = "auto"  # auto | gl | rays | cuda
    passes: tuple[int, ...] = ()  # in which pictures are drawn; [] = the model's own; several: compared
    resume: bool = True  # go on where an earlier run of the same settings stopped
    score_only: bool = False  # run nothing: summarise the stored cases again
    report: bool = True  # write the summary and the page; false: later, with score_only

    def __post_init__(self) -> None:
        """ValueError for what cannot be run, before anything is."""
        check_amounts(self, 1, "size_px")
        check_amounts(self, 0, "batch", "workers", *(name for name in vars(self) if name.startswith("num_")))
        if min(self.passes, default=0) < 0:
            raise ValueError(f"passes={list(self.passes)}; expected numbers of 0 or more")


@dataclass(frozen=True, kw_only=True)
class RoomSettings(RunSettings):
    """What the suites on rooms need beside that."""

    detector: str = ""  # file of the judge; "" = detector.safetensors beside the model
    split: str = "test"  # train | validation | test: which rooms
    temperature: float | None = 0.0  # 0 = always the likeliest token; null = the model's own sampling
    num_pictures: int = 6  # cases kept with their pictures for the page

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, split=("train", "validation", "test"))
        if self.size_px % 16:
            raise ValueError(f"size_px={self.size_px}; expected a multiple of 16")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}; expected 0 or more, or null")


@dataclass(frozen=True, kw_only=True)
class ExploreTwin(RoomSettings):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, phrasing=("canonical", "split"))
        check_amounts(self, 1, "num_steps", "num_branches", "walk_steps")


@dataclass(frozen=True, kw_only=True)
class TextToImage(RoomSettings):
    """Pictures from words: are the named objects there, in the right colour? A detector judges.

    Half of the prompts name one object, half name two; colours and shapes are those of the split, held-out
    pairs included in test.
    """

    name: ClassVar[str] = "t2i"
    num_prompts: int = 200
    temperature: float | None = None  # null = the model's own sampling, as a user gets it
    # split: its captions | requests: the same things in words of somebody who asks for a picture ("sketch …")
    phrasing: str = "split"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, phrasing=("split", "requests"))


@dataclass(frozen=True, kw_only=True)
class EditPictures(RoomSettings):
    """Pictures edited as they are told: is the edit done, and is the rest kept?

    Rooms and table-tops in turn, and in each all kinds of edits in turn: 20 edits are one of each.
    """

    name: ClassVar[str] = "x2i"
    num_edits: int = 400
    temperature: float | None = None  # null = the model's own sampling, as a user gets it
    # split: its phrasings | made-up: begun in words that nobody has heard | by-shape: "the ball" for "the red
    # ball", where there is one
    phrasing: str = "split"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, phrasing=("split", "made-up", "by-shape"))


@dataclass(frozen=True, kw_only=True)
class TellTales(RoomSettings):
    """Tales of two objects, told panel by panel: is everybody there in every panel, nobody else, and does it
    show what its line tells? A detector judges.

    The question is the plot or its theme; then each panel's line is given, and the model draws the panel.
    """

    name: ClassVar[str] = "story"
    num_tales: int = 60  # of 4 to 6 panels each
    temperature: float | None = None  # null = the model's own sampling, as a user gets it


@dataclass(frozen=True, kw_only=True)
class RobotSuite(RunSettings):
    """331 frozen table-top tasks: an agent says subtasks, an arm carries them out in physics, and the goal's
    predicates say how far it got.

    The scenes are the test split's; none of them is ever trained on.
    """

    name: ClassVar[str] = "robot-331"
    # planner | guide (mode howto's illustrated steps, followed as they stand) | text-only | scripted | oracle
    # | random | none
    agent: str = "planner"
    use: str = "both"  # both | text | keyframe: what of a plan is believed when it is carried out
    phrasing: str = "turns"  # turns: each scene one of its phrasings | plain | held-out
    families: str = ""  # of the tasks, separated by commas; "" = all
    first: int = 0  # only so many of the scenes; 0 = all
    repeats: int = 1  # runs of each scene from a fresh start: do they end in one state?
    num_plans: int = 4  # imagined side by side by the planner
    in_words: bool = True  # beside them the plan that the words spell out; false: the model's own alone
    strategy: str = "sample"  # sample | beam
    max_pictures: int = 64  # imagined for one scene at most
    max_steps: int = 16  # subtasks of one scene at most
    num_judged: int = 60  # scenes on which the judges of pictures are judged, for agents with pictures
    against: str = ""  # folders of other agents' runs to compare with, scene by scene; commas between
    num_pictures: int = 2  # failures of each family kept with their pictures for the page

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(
            self,
            agent=("planner", "guide", "text-only", "scripted", "oracle", "random", "none"),
            use=("both", "text", "keyframe"),
            phrasing=("turns", "plain", "held-out"),
            strategy=("sample", "beam"),
        )
        check_amounts(self, 0, "first")
        check_amounts(self, 1, "repeats", "num_plans", "max_pictures", "max_steps")


RoomSuite = ExploreTwin | TextToImage | EditPictures | TellTales
Suite = RoomSuite | RobotSuite
SUITES: dict[str, type[RunSettings]] = {
    one.name: one for one in (ExploreTwin, TextToImage, EditPictures, TellTales, RobotSuite)
}


def case_seed(suite: RunSettings, kind: str, index: int) -> int:
    """The seed of one case, below 2^31: depends on the suite's seed, the kind of case and its index alone."""
    words = [suite.seed, zlib.crc32(kind.encode()), index]
    return int(np.random.SeedSequence(words).generate_state(1)[0] >> 1)
