"""`generate`, `demo` and films on the tiny model."""

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from emuworld.tasks import demo, film, generate


def test_generate_writes_one_picture_a_seed_whatever_the_batch(tiny_folder: str, tmp_path: Path) -> None:
    for batch, name in ((1, "a"), (3, "b")):
        config = generate.Generate(
            model=tiny_folder, device="cpu", size_px=64, n=3, seed=5, batch=batch, out=str(tmp_path / name)
        )
        paths = generate.run(config)
        names = ["0005", "0006", "0007"]
        assert [path.name for path in paths] == [
            *(f"{name}.pb" for name in names),
            *(f"{name}.png" for name in names),
            "sheet.png",
        ]
    for name in ("0005.png", "0006.png", "0007.png"):
        one, other = (np.asarray(Image.open(tmp_path / folder / name)) for folder in "ab")
        np.testing.assert_array_equal(one, other)


def test_generate_steps_worlds_and_starts_from_a_picture(tiny_folder: str, tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(tmp_path / "start.png")
    config = generate.Generate(
        mode="explore",
        model=tiny_folder,
        device="cpu",
        size_px=64,
        n=1,
        commands=("turn left", "look up"),
        images=(str(tmp_path / "start.png"),),
        out=str(tmp_path / "walk"),
    )
    assert [path.name for path in generate.run(config)] == [
        "0000.pb",
        "0000_00.png",
        "0000_01.png",
        "0000_02.png",
        "sheet.png",
    ]


def test_generate_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="words alone"):
        generate.Generate(commands=("turn left",))
    with pytest.raises(ValueError, match="unknown"):
        generate.Generate(mode="dance")


def test_the_demo_makes_its_page(tiny_folder: str, tmp_path: Path) -> None:
    config = demo.Demo(
        model=tiny_folder,
        device="cpu",
        size_px=64,
        num_pictures=2,
        walk=("turn left", "turn right"),
        branches=("look up", "turn around"),
        robot=None,  # tests/tasks/robot/test_demo_part.py
        out=str(tmp_path),
    )
    calls: list[tuple[str, int, int]] = []
    path = demo.run(config, on_progress=lambda *call: calls.append(call))
    page = path.read_text()
    assert page.count("data:image/png") == 2 + 2 * 3 + 2 * 2
    assert "dB" in page and "turn around" in page and "walk.mp4" in page
    assert (tmp_path / "walk.mp4").exists()
    assert calls[0] == ("demo", 0, 6) and calls[-1] == ("demo", 6, 6)


def test_a_film_shows_every_shot_for_its_time(tmp_path: Path) -> None:
    frame = np.full((33, 47, 3), 200, np.uint8)  # odd sides: the codec wants even ones
    film.write_film(tmp_path / "f.mp4", [(frame, "one"), (frame, "two")], seconds_a_shot=0.5)
    frames = imageio.imread(tmp_path / "f.mp4", plugin="FFMPEG")
    assert len(frames) == 2 * round(0.5 * film.FRAMES_A_SECOND)
    assert abs(int(frames[0][10, 10, 0]) - 200) < 12
    with pytest.raises(ValueError, match="at least one frame"):
        film.write_film(tmp_path / "f.mp4", [])


@pytest.mark.parametrize("words", ["done", "put the orange cylinder to the left of the yellow cube: blocked"])
def test_a_caption_stays_inside_its_bar(words: str) -> None:
    frame = np.full((64, 192, 3), 200, dtype=np.uint8)
    picture = film.captioned(frame, words)
    bar = picture[64:]
    assert np.array_equal(picture[:64], frame) and bar.max() > 150
    ground = bar[0, 0]
    for edge in (bar[:, -4:], bar[:, :4], bar[-1:], bar[:1]):  # letters that are cut would touch one
        assert (edge == ground).all()
