"""`export` and the film of an answer: names and contents as the published viewer's, and runs that go on."""

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from emuworld.answers import save_story
from emuworld.story import Story, StoryImage, StorySegment
from emuworld.tasks import cards
from emuworld.tasks.answer_film import film_size, shots, write_answer_film
from emuworld.tasks.cards import text_card
from emuworld.tasks.export import Export, files_of, run
from emuworld.tasks.sharding import parse_shard, take_shard


def picture(value: int, *, size: tuple[int, int] = (64, 96), thought: str = "") -> StoryImage:
    return StoryImage.from_array(np.full((*size, 3), value, np.uint8), thought=thought)


def story(*, num_references: int = 1) -> Story:
    return Story(
        question="Как варить пельмени?",
        summary="two steps",
        reference_images=tuple(picture(10 + i) for i in range(num_references)),
        segments=(
            StorySegment(text="Chop.", images=(picture(100, thought="close up"), picture(120))),
            StorySegment(images=(picture(140),)),
            StorySegment(text="Serve."),
        ),
    )


@pytest.mark.parametrize(("num_references", "first"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_files_are_named_as_the_published_viewer_names_them(num_references: int, first: int) -> None:
    names = [name for name, _ in files_of(story(num_references=num_references))]
    a, b, c = (f"{first + i:03d}" for i in range(3))
    assert sorted(names) == sorted(
        [
            "000_question.txt",
            "000_global_cot.txt",
            *(f"{i:03d}_reference_image.png" for i in range(num_references)),
            f"{a}_text.txt",
            f"{a}_00_image.png",
            f"{a}_00_image_cot.txt",
            f"{a}_01_image.png",
            f"{b}_00_image.png",
            f"{c}_text.txt",
        ]
    )


def test_an_answer_becomes_its_files(tmp_path: Path) -> None:
    save_story(tmp_path / "000.pb", story())
    (folder,) = run(Export(input=str(tmp_path / "000.pb"), video=False))
    assert folder == tmp_path / "results" / "000"
    assert (folder / "000_question.txt").read_text("utf-8") == "Как варить пельмени?"
    assert (folder / "000_global_cot.txt").read_text() == "two steps"
    assert (folder / "001_00_image_cot.txt").read_text() == "close up"
    with Image.open(folder / "001_01_image.png") as image:
        assert (image.format, image.size) == ("PNG", (96, 64))
        assert np.asarray(image).min() == np.asarray(image).max() == 120


def test_a_folder_is_exported_once_and_again_where_something_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_story(tmp_path / "proto" / "000.pb", story())
    save_story(tmp_path / "proto" / "deep" / "001.proto", story(num_references=0))
    (tmp_path / "proto" / "notes.txt").write_text("no answer")
    config = Export(input=str(tmp_path / "proto"), out=str(tmp_path / "out"), video=False)
    assert run(config) == [tmp_path / "out" / "000", tmp_path / "out" / "deep" / "001"]
    marks = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    run(config)
    assert "2 of them were there already" in capsys.readouterr().out
    save_story(tmp_path / "proto" / "000.pb", Story(question="Another?", segments=story().segments[:1]))
    run(config)
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert [now[path] == mark for path, mark in marks.items() if "deep" in str(path)] == [True] * 3
    assert sorted(path.name for path in (tmp_path / "out" / "000").iterdir() if path.suffix == ".png") == [
        "001_00_image.png",
        "001_01_image.png",
    ]


def test_a_damaged_file_stops_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    for name in ("000", "001", "002"):
        save_story(tmp_path / f"{name}.pb", story())
    data = (tmp_path / "001.pb").read_bytes()
    (tmp_path / "001.pb").write_bytes(data[:-9])
    with pytest.raises(ValueError, match=r"1 of 3 files were(.|\n)*001\.pb: a story is truncated"):
        run(Export(input=str(tmp_path), video=False))
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["000", "002"]


def test_a_folder_with_other_things_in_it_is_not_replaced(tmp_path: Path) -> None:
    save_story(tmp_path / "000.pb", story())
    (tmp_path / "out" / "000").mkdir(parents=True)
    (tmp_path / "out" / "000" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"'thesis\.txt', which no export wrote"):
        run(Export(input=str(tmp_path / "000.pb"), out=str(tmp_path / "out"), video=False))
    assert (tmp_path / "out" / "000" / "thesis.txt").read_text() == "mine"


def test_names_inside_a_message_choose_no_path(tmp_path: Path) -> None:
    hostile = Story(story_id="../../up", question="../q", segments=(StorySegment(text="/etc/passwd"),))
    save_story(tmp_path / "in" / "000.pb", hostile)
    run(Export(input=str(tmp_path / "in"), out=str(tmp_path / "out"), video=False))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == [
        "in/000.pb",
        "out/000/.exported.json",
        "out/000/000_question.txt",
        "out/000/001_text.txt",
    ]


def test_shards_part_the_work(tmp_path: Path) -> None:
    for i in range(5):
        save_story(tmp_path / f"{i:03d}.pb", Story(question=str(i)))
    names = [
        {folder.name for folder in run(Export(input=str(tmp_path), video=False, shard=f"{i}/2"))}
        for i in range(2)
    ]
    assert names == [{"000", "002", "004"}, {"001", "003"}]
    assert take_shard(range(7), "2/3") == [2, 5]
    for wrong in ("3/3", "1", "-1/2", "a/b", "1/0", ""):
        with pytest.raises(ValueError, match="i from 0 to n - 1"):
            parse_shard(wrong)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        run(Export(input=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"holds no \.pb"):
        run(Export(input=str(tmp_path)))
    for name in ("000.pb", "000.bin"):
        save_story(tmp_path / name, story())
    with pytest.raises(ValueError, match="have one name"):
        run(Export(input=str(tmp_path)))


# ---- the film ------------------------------------------------------------------------------------


def test_the_film_shows_question_references_texts_and_pictures_in_turn(tmp_path: Path) -> None:
    write_answer_film(tmp_path / "video.mp4", story())
    meta = imageio.immeta(tmp_path / "video.mp4", plugin="FFMPEG")
    assert (meta["fps"], meta["size"], meta["codec"]) == (1.0, (96, 64), "h264")
    assert meta["pix_fmt"].startswith("yuv420p")
    encoded = (tmp_path / "video.mp4").read_bytes()  # x264 writes its settings into the stream
    assert b"crf=18.0" in encoded and b"rc_lookahead=50" in encoded  # 50: preset slow
    frames = imageio.imread(tmp_path / "video.mp4", plugin="FFMPEG")
    levels = [int(np.median(frame)) for frame in frames]
    expected = [255, 10, 255, 100, 120, 140, 255]
    assert len(levels) == 7 and np.abs(np.subtract(levels, expected)).max() <= 6


def test_the_film_has_the_size_of_the_first_picture() -> None:
    mixed = Story(segments=(StorySegment(text="go", images=(picture(9, size=(33, 47)), picture(9))),))
    assert film_size(mixed) == (32, 46)  # the codec wants even sides
    assert {frame.shape for frame in shots(mixed)} == {(32, 46, 3)}
    assert film_size(Story(question="only words")) == (720, 720)
    assert film_size(Story(reference_images=(picture(9, size=(1, 9000)),))) == (16, 4096)


def test_an_answer_without_anything_has_a_film_too(tmp_path: Path) -> None:
    write_answer_film(tmp_path / "video.mp4", Story())
    assert len(imageio.imread(tmp_path / "video.mp4", plugin="FFMPEG")) == 1


# ---- text cards ----------------------------------------------------------------------------------

TEXTS = {
    "one word": "left",
    "a sentence": "Chop the shrimp and the celery, then mix them with the pork.",
    "a paragraph": "Lorem ipsum dolor sit amet, consectetur adipiscing elit. " * 30,
    "far too long": "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4000,
    "one endless word": "x" * 5000,
    "an address": "https://example.org/" + "a/b" * 60,
    "lines": "one\ntwo\n\nfour",
    "Chinese": "步骤一：将虾仁切碎，与芹菜和猪肉馅混合。" * 3,
    "Arabic": "مرحبا بالعالم، هذه خطوة أولى",
    "Thai": "ขั้นตอนแรกคือสับกุ้งและผสมกับหมูสับ",
    "marks and emoji": "e\u0301 🦊 \u200d a\u0308",
    "control characters": "a\x00b\tc\r\nd\ud800",
    "nothing": " \n ",
}


@pytest.mark.filterwarnings("ignore:no font on this machine")
@pytest.mark.parametrize("size", [(720, 720), (256, 384), (64, 64), (16, 16)], ids=str)
@pytest.mark.parametrize("name", TEXTS)
def test_cards_hold_their_text_inside_the_margins(name: str, size: tuple[int, int]) -> None:
    card = text_card(TEXTS[name], size=size)
    assert (card.shape, card.dtype) == ((*size, 3), np.uint8)
    ink = np.argwhere(card.min(axis=2) < 128)
    assert (len(ink) > 0) == (name != "nothing") or min(size) == 16
    if len(ink) and min(size) > 64:
        margin = min(cards.MARGIN_PX, min(size) // 7) - 6  # a letter may lean over its own box
        low, high = ink.min(axis=0), ink.max(axis=0)
        assert low.min() >= margin and (high < np.array(size) - margin).all()


def test_letters_shrink_until_the_text_fits() -> None:
    """Ink per letter: a word is written in 80 points, a page in the smallest size, all of it on the card."""
    box = (520, 520)
    sizes = []
    for count in (1, 10, 60, 300):
        text = "word " * count
        fonts = cards.fonts_for(text)
        layout = cards._fitted(text.strip(), box=box, fonts=fonts)
        assert " ".join(layout.lines).split() == ["word"] * count
        sizes.append(layout.size_pt)
    assert sizes[0] == 80 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 30
    long = cards._fitted("word " * 9000, box=box, fonts=cards.fonts_for("word"))
    assert long.size_pt == 10 and long.lines[-1].endswith("…")


def test_words_stay_whole_and_scripts_without_spaces_break_anywhere() -> None:
    fonts = cards.fonts_for("abc")
    lines = cards._wrapped("alpha beta gamma", width=120, size_pt=20, fonts=fonts)
    assert lines is not None and " ".join(lines).split() == ["alpha", "beta", "gamma"] and len(lines) > 1
    assert cards._wrapped("extraordinarily", width=60, size_pt=40, fonts=fonts) is None
    pieces = list(cards._pieces("我们走。去左边 now", anywhere=False))
    assert pieces == ["我", "们", "走。", "去", "左", "边 ", "now"]


def test_a_font_is_found_for_what_the_first_one_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cards.fonts_for("turn left").first == ""  # Pillow's own: the same on every machine
    has_cyrillic = [file for file in cards.system_fonts() if cards._has(file, "Ж")]
    if has_cyrillic:
        assert cards.fonts_for("Жa").of["Ж"] in has_cyrillic
    monkeypatch.setattr(cards, "system_fonts", lambda: ())
    with pytest.warns(UserWarning, match="no font on this machine has '虾'"):
        cards.fonts_for("虾 x")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match=r"broken\.ttf cannot be opened"):
        text_card("x", size=(64, 64), font=str(tmp_path / "broken.ttf"))
