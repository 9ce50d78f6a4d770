"""Command `play`: walk through a room with keys or typed commands, in the dream, the simulator, or both in
turn.

Dream and simulator begin with the same frame and get the same commands, so one may switch between them at
any moment. The one that is not looked at catches up when it is. The current frame is always in `frame.png`;
the whole walk becomes a film at the end. On a terminal, keys and a small preview; otherwise one command a
line from standard input.
"""

import os
import select
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import gymnasium
import numpy as np
from PIL import Image

from emuworld.files import write_bytes
from emuworld.tasks.film import write_film
from emuworld.tasks.metrics import Frame, psnr
from emuworld.tasks.page import png_bytes
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.world_model import load

try:
    import termios
    import tty
except ModuleNotFoundError:  # not a POSIX system: commands come as lines only
    termios = tty = None  # type: ignore[assignment]


SOURCES = ("dream", "sim")
KEYS = {
    "w": "move forward", "s": "move back", "a": "step left", "d": "step right", "q": "turn left",
    "e": "turn right", "r": "look up", "f": "look down", "x": "turn around", "up": "move forward",
    "down": "move back", "left": "turn left", "right": "turn right",
}  # fmt: skip
ORDERS = {"\t": ":twin", "z": ":undo", "h": ":help", "\x1b": ":quit", "\x03": ":quit", "\x04": ":quit"}
_ARROWS = {"A": "up", "B": "down", "C": "right", "D": "left"}
HELP = """w s a d or arrows  walk, side-step    q e  turn 30 degrees    r f  look up, down    x  turn around
t or Enter  type a command ("go to the red ball", any words in the dream; an empty line lets the dream go on)
Tab  switch dream and simulator    z  undo    h  this help    Esc  end and write the film
typed orders: :twin  :undo  :help  :quit"""


@dataclass(frozen=True, kw_only=True)
class Play:
    """Walk through a room. Keys on a terminal; without one, a command a line from standard input."""

    source: str = "dream"  # dream | sim: what is shown first; Tab or ":twin" switches
    prompt: str = ""  # a room that shows this, such as "a room with a red ball"; "" = a room of the seed
    split: str = "test"  # train | validation | test: which rooms
    seed: int = 0
    model: str = "small"  # a built-in name or a checkpoint folder
    device: str = "auto"  # auto | cpu | cuda
    size_px: int | None = None  # height and width, a multiple of 16; null = the model's own
    preview: bool = True  # draw the frame in the terminal too, in coloured half-blocks
    out: str = "outputs/play"  # folder of frame.png and walk.mp4

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source!r} is unknown; expected one of {', '.join(SOURCES)}")


@dataclass
class World:
    """One of the two environments: its states so far, as bytes, and the frames that were seen."""

    env: gymnasium.Env[Any, Any]
    states: list[bytes] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)  # why a command did nothing, else ""

    def begin(self, frame: Frame) -> None:
        self._keep(frame, "")

    def follow(self, commands: list[str]) -> None:
        """Carry out the commands that this world has not had; a free step is replaced by its own words."""
        for index in range(len(self.frames) - 1, len(commands)):
            frame, _, _, _, info = self.env.step(commands[index])
            if not commands[index] and not info["invalid_action"]:
                commands[index] = info["text"]  # what one world did freely, its twin is told to do
            refused = info.get("reason") or ("the dream cannot take it" if info["invalid_action"] else "")
            self._keep(frame, str(refused))

    def undo(self) -> None:
        """Back to the state before the last command, if it was carried out here."""
        self.states.pop()
        self.frames.pop()
        self.flags.pop()
        self.env.reset(options={"state": self.states[-1]})

    def _keep(self, frame: Frame, flag: str) -> None:
        self.frames.append(frame)
        self.flags.append(flag)
        self.states.append(self.env.get_wrapper_attr("save_state")())


class Session:
    """A walk in two worlds: commands given so far, and which of the worlds is looked at."""

    def __init__(self, config: Play) -> None:
        model = load(config.model, device=config.device)
        # Without the limit of 40 steps: a player goes on until the context is full.
        dream = gymnasium.make("EmuWorld/Explore-v0", model=model, size=config.size_px, max_episode_steps=-1)
        space = dream.observation_space.shape
        assert space is not None
        simulator = gymnasium.make(
            "EmuWorld/ExploreSim-v0", split=config.split, size=space[:2], max_episode_steps=-1
        )
        first, about = simulator.reset(
            seed=config.seed, options={"prompt": config.prompt} if config.prompt else None
        )
        imagined, _ = dream.reset(seed=config.seed, options={"image": first, "prompt": about["prompt"]})
        self.worlds = {"dream": World(env=dream), "sim": World(env=simulator)}
        self.worlds["sim"].begin(first)
        self.worlds["dream"].begin(imagined)
        self.prompt = str(about["prompt"])
        self.source = config.source
        self.commands: list[str] = []
        self.shots: list[tuple[Frame, str]] = [(self.frame, f"start, {self.source}")]

    @property
    def frame(self) -> Frame:
        return self.worlds[self.source].frames[-1]

    def obey(self, line: str) -> str:
        """Carry out a command or an order; returns what to tell the player."""
        if line == ":twin":
            self.source = SOURCES[1 - SOURCES.index(self.source)]
            return self._shown("now you see")
        if line == ":undo":
            if not self.commands:
                return "nothing to undo"
            taken_back = self.commands.pop()
            for world in self.worlds.values():
                if len(world.frames) > len(self.commands) + 1:
                    world.undo()
            return self._shown(f"took back {taken_back!r},")
        if line == ":help":
            return HELP
        if line.startswith(":"):
            return f"unknown order {line!r}; known: :twin :undo :help :quit"
        self.commands.append(line)
        told = self._shown("")
        return f"{self.commands[-1] or '(free step)'}:{told}"

    def _shown(self, words: str) -> str:
        """Let the world that is looked at catch up; note the frame and its distance to the twin's, if
        known.
        """
        world = self.worlds[self.source]
        world.follow(self.commands)
        name = {"dream": "the dream", "sim": "the simulator"}[self.source]
        twin = self.worlds[SOURCES[1 - SOURCES.index(self.source)]]
        twin_known = len(twin.frames) == len(world.frames)
        distance = f", {psnr(world.frames[-1], twin.frames[-1]):.1f} dB from its twin" if twin_known else ""
        refused = f" (nothing happened: {world.flags[-1]})" if world.flags[-1] else ""
        self.shots.append((self.frame, f"{self.commands[-1] if self.commands else 'start'}, {self.source}"))
        return f"{words} {name}, frame {len(world.frames) - 1}{distance}{refused}"

    def close(self) -> None:
        for world in self.worlds.values():
            world.env.close()


def run(
    config: Play,
    *,
    on_progress: OnProgress = quiet,
    source: TextIO | None = None,
    screen: TextIO | None = None,
) -> Path:
    """Play until the player ends it; returns the film's path. `source` and `screen` stand in for the
    terminal.
    """
    source, screen = source or sys.stdin, screen or sys.stdout
    session, out = Session(config), Path(config.out)
    terminal = source.isatty() and screen.isatty()
    preview = config.preview and terminal

    def show(words: str) -> None:
        write_bytes(out / "frame.png", png_bytes(session.frame))
        picture = half_blocks(session.frame, columns=_columns()) + "\n" if preview else ""
        print(picture + words, file=screen, flush=True)

    show(f"{session.prompt}. Watch {out / 'frame.png'}")
    print(HELP, file=screen, flush=True)
    try:
        for line in _keys(source, screen) if terminal else _lines(source):
            show(session.obey(line))
    except KeyboardInterrupt:
        pass
    finally:
        session.close()
    film = out / "walk.mp4"
    write_film(film, session.shots)
    print(f"{len(session.commands)} commands; the walk is in {film}", file=screen, flush=True)
    return film


def _lines(source: TextIO) -> Iterator[str]:
    """Commands from a pipe or a file, one a line."""
    for line in source:
        if line.strip() == ":quit":
            return
        yield line.strip()


def _keys(source: TextIO, screen: TextIO) -> Iterator[str]:
    """Commands from single keys of a terminal; t, Enter or ':' asks for a line."""
    if termios is None or tty is None:
        raise ValueError("keys need a POSIX terminal; pipe commands into 'emuworld play', one a line")
    terminal = source.fileno()
    as_before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal, termios.TCSANOW)  # NOW: keys pressed meanwhile are not thrown away
        while ORDERS.get(key := _read_key(terminal)) != ":quit":
            if key in ("t", "\r", "\n", ":"):
                termios.tcsetattr(terminal, termios.TCSANOW, as_before)
                print("command: ", end="", file=screen, flush=True)
                line = f"{':' if key == ':' else ''}{source.readline().strip()}"
                tty.setcbreak(terminal, termios.TCSANOW)
                if line == ":quit":
                    return
                yield line
            elif key in KEYS or key in ORDERS:
                yield KEYS.get(key) or ORDERS[key]
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, as_before)


def _read_key(terminal: int) -> str:
    """One key press, in lower case; arrows by name, the end of the input as Ctrl-D."""
    key = os.read(terminal, 1).decode(errors="replace")
    if key == "\x1b" and select.select([terminal], [], [], 0.05)[0]:  # an arrow's three bytes come together
        return _ARROWS.get(os.read(terminal, 2).decode(errors="replace")[-1:], "")
    return key.lower() or "\x04"


def _columns() -> int:
    try:
        return min(80, os.get_terminal_size().columns - 1)
    except OSError:
        return 64


def half_blocks(frame: Frame, *, columns: int) -> str:
    """A frame as text: each character cell shows two pixels, one above the other, in true colour."""
    rows = max(2, round(columns * frame.shape[0] / frame.shape[1]) // 2 * 2)
    small = np.asarray(Image.fromarray(frame).resize((columns, rows), Image.Resampling.BOX)).tolist()
    lines = []
    for top, bottom in zip(small[::2], small[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(top, bottom, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
