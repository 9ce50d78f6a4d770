"""Command `demo`: one page that shows what this is, made in minutes on two cores."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np

from emuworld.envs.tabletop.plans import sample_task
from emuworld.tasks import page
from emuworld.tasks.film import side_by_side, write_film
from emuworld.tasks.metrics import Frame, psnr
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.robot.demo_part import robot_part
from emuworld.tasks.run_folder import PictureRow, Pictures
from emuworld.world_model import WorldModel, load

# There and back three ways: what was left is looked at again, and the last view should be the first one.
WALK = (
    "turn left", "turn left", "turn right", "turn right", "move forward", "turn right 45 degrees",
    "turn left 45 degrees", "move back", "look down", "look ahead", "turn right", "turn left",
)  # fmt: skip
BRANCHES = ("turn left", "turn right", "move forward", "turn around")
BRANCH_AFTER = 5  # commands of the walk


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Paint a caption, walk through a dream beside the simulator, branch it, let a robot work: one page."""

    prompt: str = "a room with a red ball and a blue box"  # of the pictures
    seed: int = 3  # of the pictures and of the room
    num_pictures: int = 4
    walk: tuple[str, ...] = WALK  # commands given to dream and simulator alike
    branches: tuple[str, ...] = BRANCHES  # commands tried from one saved state
    split: str = "test"  # train | validation | test: which rooms
    model: str = "small"  # a built-in name or a checkpoint folder
    device: str = "auto"  # auto | cpu | cuda
    size_px: int | None = None  # height and width, a multiple of 16; null = the model's own
    robot: str | None = "open-put-close"  # family of the robot's task; null = no robot
    out: str = "outputs/demo"  # folder of the page


@dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """The same commands in dream and simulator, and four branches from one moment of both."""

    prompt: str
    true: list[Frame]  # one more than there are commands
    dreamt: list[Frame]
    branches_true: list[Frame]
    branches_dreamt: list[Frame]
    state_bytes: int  # size of the saved state
    frame_s: float  # seconds a dreamt frame took, one at a time


def run(config: Demo, *, on_progress: OnProgress = quiet) -> Path:
    """Make the page; returns its path."""
    start = time.monotonic()
    label, total = "demo", config.num_pictures + len(config.walk) + len(config.branches)
    total += config.robot is not None
    task = None if config.robot is None else sample_task(config.robot, config.split, config.seed)
    on_progress(label, 0, total)
    model = load(config.model, device=config.device)
    pictures = _pictures(config, model)
    on_progress(label, config.num_pictures, total)
    walk = _walk(config, model, lambda done: on_progress(label, config.num_pictures + done, total))
    out = Path(config.out)
    film = [
        (side_by_side([true, dreamt]), f"{words}   (left: MuJoCo, right: dream)")
        for true, dreamt, words in zip(walk.true, walk.dreamt, ["start", *config.walk], strict=True)
    ]
    write_film(out / "walk.mp4", film)
    parts = _parts(config, pictures, walk)
    if task is not None:
        parts.append(robot_part(model, task, out, seed=config.seed))
    took_s = time.monotonic() - start
    page.write_page(
        out / "index.html",
        title="A world that you step",
        lead=(
            f"A small world model imagined all of this on {model.device.type.upper()} in {took_s:.0f} s, "
            f"{walk.frame_s:.1f} s a frame. MuJoCo shows what would really have been seen."
        ),
        parts=parts,
        footer="Made by emuworld demo. Go on with: emuworld play, generate, plan and eval",
    )
    on_progress(label, total, total)
    print(f"Done in {took_s:.0f} s. Look at {out / 'index.html'}")
    return out / "index.html"


def _pictures(config: Demo, model: WorldModel) -> list[Frame]:
    """Pictures of the prompt, all in one batch."""
    envs = gymnasium.make_vec(
        "EmuWorld/T2I-v0", num_envs=config.num_pictures, model=model, size=config.size_px
    )
    envs.reset(seed=config.seed)
    frames, *_ = envs.step([config.prompt] * config.num_pictures)
    envs.close()
    return list(frames)


def _walk(config: Demo, model: WorldModel, on_frame: Callable[[int], None]) -> Walk:
    dream = gymnasium.make("EmuWorld/Explore-v0", model=model, size=config.size_px)
    size = dream.observation_space.shape[:2] if dream.observation_space.shape else None
    simulator = gymnasium.make("EmuWorld/ExploreSim-v0", split=config.split, size=size)
    true, about = simulator.reset(seed=config.seed)
    dreamt, _ = dream.reset(seed=config.seed, options={"image": true, "prompt": about["prompt"]})
    walk: dict[str, list[Frame]] = {"true": [true], "dreamt": [dreamt]}
    saved, saved_true = b"", b""
    start = time.monotonic()
    for step, command in enumerate(config.walk):
        walk["true"].append(simulator.step(command)[0])
        walk["dreamt"].append(dream.step(command)[0])
        if step + 1 == min(BRANCH_AFTER, len(config.walk)):
            saved, saved_true = (env.get_wrapper_attr("save_state")() for env in (dream, simulator))
        on_frame(step + 1)
    frame_s = (time.monotonic() - start) / len(config.walk)
    branches_true = []
    for command in config.branches:
        simulator.reset(options={"state": saved_true})
        branches_true.append(simulator.step(command)[0])
    branches_dreamt = _branch(config, model, saved)
    on_frame(len(config.walk) + len(config.branches))
    for env in (dream, simulator):
        env.close()
    return Walk(
        prompt=about["prompt"],
        branches_true=branches_true,
        branches_dreamt=branches_dreamt,
        state_bytes=len(saved),
        frame_s=frame_s,
        true=walk["true"],
        dreamt=walk["dreamt"],
    )


def _branch(config: Demo, model: WorldModel, saved: bytes) -> list[Frame]:
    """One saved state, several futures, in one batch."""
    count = len(config.branches)
    envs = gymnasium.make_vec("EmuWorld/Explore-v0", num_envs=count, model=model, size=config.size_px)
    envs.reset(options={"states": [saved] * count})
    frames, *_ = envs.step(list(config.branches))
    envs.close()
    return list(frames)


def _parts(config: Demo, pictures: Sequence[Frame], walk: Walk) -> list[str]:
    commands = list(config.walk)
    notes = [f"{psnr(d, t):.1f} dB" for d, t in zip(walk.dreamt, walk.true, strict=True)]
    mean = float(np.mean([psnr(d, t) for d, t in zip(walk.dreamt[1:], walk.true[1:], strict=True)]))
    branch_notes = [
        f"{psnr(d, t):.1f} dB" for d, t in zip(walk.branches_dreamt, walk.branches_true, strict=True)
    ]
    return [
        page.section(
            "From words",
            page.text(f"“{config.prompt}”, {len(pictures)} seeds, one batch."),
            page.strip(
                [page.figure(f, caption=f"seed {config.seed + i}") for i, f in enumerate(pictures)],
                cell_rem=12,
            ),
        ),
        page.section(
            "A walk in the dream, beside the simulator",
            page.text(
                f"“{walk.prompt}”, a room of the {config.split} split. Both begin with the simulator's "
                "first frame; the dream sees no other. Under each dreamt frame its PSNR to the simulator's, "
                f"{mean:.1f} dB on average. What a turn newly reveals the dream has to invent; what it has "
                "seen before it should keep."
            ),
            page.picture_rows(
                Pictures(
                    title="",
                    columns=["start", *commands],
                    rows=[
                        PictureRow(name="MuJoCo", frames=walk.true),
                        PictureRow(name="dream", frames=walk.dreamt, notes=notes),
                    ],
                )
            ),
            page.video("walk.mp4", caption="The walk as a film: left the simulator, right the dream."),
        ),
        page.section(
            "One saved state, four futures",
            page.text(
                f"The dream after {min(BRANCH_AFTER, len(commands))} commands is {walk.state_bytes} bytes. "
                f"Restored {len(config.branches)} times and stepped in one batch, under other commands:"
            ),
            page.picture_rows(
                Pictures(
                    title="",
                    columns=config.branches,
                    rows=[
                        PictureRow(name="MuJoCo", frames=walk.branches_true),
                        PictureRow(name="dream", frames=walk.branches_dreamt, notes=branch_notes),
                    ],
                )
            ),
        ),
    ]
