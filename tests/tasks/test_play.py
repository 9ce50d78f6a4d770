"""A walk played through pipes: both worlds, undo, free steps, and what is left on disk."""

import io
import os
import pty
import termios
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emuworld.tasks import play
from emuworld.tasks.play import Play, Session


def _config(tiny_folder: str, out: Path, **more: object) -> Play:
    return Play(model=tiny_folder, device="cpu", size_px=64, out=str(out), seed=3, **more)  # type: ignore[arg-type]


def test_both_worlds_begin_alike_and_follow_when_looked_at(tiny_folder: str, tmp_path: Path) -> None:
    session = Session(_config(tiny_folder, tmp_path, source="sim"))
    session.obey("turn left")
    assert (len(session.worlds["sim"].frames), len(session.worlds["dream"].frames)) == (2, 1)
    assert "the dream, frame 1" in session.obey(":twin")
    assert len(session.worlds["dream"].frames) == 2
    assert "dB from its twin" in session.obey(":twin")
    session.close()


def test_undo_goes_back_in_both_worlds_and_the_same_command_leads_to_the_same_frame(
    tiny_folder: str, tmp_path: Path
) -> None:
    session = Session(_config(tiny_folder, tmp_path))
    before = session.frame
    session.obey("turn left")
    after = session.frame
    assert "took back 'turn left'" in session.obey(":undo")
    np.testing.assert_array_equal(session.frame, before)
    session.obey("turn left")
    np.testing.assert_array_equal(session.frame, after)
    session.obey(":undo")
    assert session.obey(":undo") == "nothing to undo"
    session.close()


def test_a_free_step_tells_the_twin_what_was_done(tiny_folder: str, tmp_path: Path) -> None:
    session = Session(_config(tiny_folder, tmp_path, source="sim"))
    session.obey("")
    assert session.commands[0], "the simulator's own choice of command"
    session.obey(":twin")
    assert len(session.worlds["dream"].frames) == 2
    session.close()


def test_a_walk_from_a_pipe_leaves_a_frame_and_a_film(tiny_folder: str, tmp_path: Path) -> None:
    screen = io.StringIO()
    lines = io.StringIO("turn left\n:nonsense\n:twin\ngo to the moon\n:quit\nnever read\n")
    film = play.run(_config(tiny_folder, tmp_path, source="sim"), source=lines, screen=screen)
    said = screen.getvalue()
    assert "unknown order ':nonsense'" in said and "never read" not in said
    assert film == tmp_path / "walk.mp4" and film.stat().st_size > 1000
    assert np.asarray(Image.open(tmp_path / "frame.png")).shape == (64, 64, 3)
    assert "2 commands" in said


def test_a_command_that_a_world_cannot_do_is_said_to_have_done_nothing(
    tiny_folder: str, tmp_path: Path
) -> None:
    session = Session(_config(tiny_folder, tmp_path, source="sim"))
    before = session.frame
    assert "nothing happened" in session.obey("fly to the moon")
    np.testing.assert_array_equal(session.frame, before)
    session.close()


def test_keys_of_a_terminal_become_commands_and_the_terminal_is_left_as_it_was() -> None:
    main, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    typed = [b"w\x1b[D\tZ?", b"t", b"look at me\n", b"\x04"]

    def type_slowly() -> None:
        for part in typed:
            time.sleep(0.1)  # as a person would; a line is typed after its prompt
            os.write(main, part)

    with os.fdopen(terminal, "r") as source:
        hands = threading.Thread(target=type_slowly)
        hands.start()
        keys = list(play._keys(source, io.StringIO()))
        hands.join()
        assert termios.tcgetattr(terminal) == before
    os.close(main)
    assert keys == ["move forward", "turn left", ":twin", ":undo", "look at me"]


def test_the_preview_draws_two_pixels_a_character() -> None:
    frame = np.zeros((4, 4, 3), np.uint8)
    frame[:2] = (255, 0, 0)
    lines = play.half_blocks(frame, columns=2).split("\n")
    assert len(lines) == 1 and lines[0].count("▀") == 2
    assert "38;2;255;0;0" in lines[0] and "48;2;0;0;0" in lines[0]


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match="dream, sim"):
        Play(source="film")
