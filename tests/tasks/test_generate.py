"""`generate` over many prompts: files of prompts, answers as `.pb`, runs that are killed and go on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emuworld.answers import load_story
from emuworld.tasks import generate
from emuworld.tasks.answering import Answer, Rules, answer_all
from emuworld.tasks.generate import Generate, run
from emuworld.tasks.prompts import Question, read_picture, read_prompts
from emuworld.world_model import WorldModel


def save_picture(path: Path, *, value: int = 99, size: tuple[int, int] = (64, 64), **options: Any) -> Path:
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path, **options)
    return path


@pytest.fixture
def settings(tiny_folder: str, tmp_path: Path) -> dict[str, Any]:
    return {"model": tiny_folder, "device": "cpu", "size_px": 64, "out": str(tmp_path / "out")}


# ---- files of prompts ----------------------------------------------------------------------------


def test_lists_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a fox\n\n  日本 \n")
    assert read_prompts(tmp_path / "a.txt") == [
        Question(name="000", prompt="a fox"),
        Question(name="001", prompt="日本"),
    ]
    entry = {"prompt": "go", "images": ["x.png", "y.png"], "commands": ["turn left"], "seed": 3}
    entry["name"] = "walk"
    (tmp_path / "b.jsonl").write_text('"a fox"\n' + json.dumps(entry) + "\n")
    walk = Question(
        name="walk",
        prompt="go",
        images=(tmp_path / "x.png", tmp_path / "y.png"),
        commands=("turn left",),
        seed=3,
    )
    assert read_prompts(tmp_path / "b.jsonl") == [Question(name="000", prompt="a fox"), walk]
    published = {"cat": {"prompt": "a cat", "reference_image": "cat.jpg", "mode": "x2i", "aspect": "1:1"}}
    (tmp_path / "c.json").write_text(json.dumps(published))
    assert read_prompts(tmp_path / "c.json") == [
        Question(name="cat", prompt="a cat", images=(tmp_path / "cat.jpg",), mode="x2i", aspect="1:1")
    ]


def test_a_folder_of_prompts(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / f"{name}.txt").write_text(f"a {name}\nin two lines\n")
    for name in ("cat.png", "dog_2.png", "dog_10.jpg"):
        save_picture(tmp_path / name)
    cat, dog = read_prompts(tmp_path)
    assert cat.prompt == "a cat\nin two lines"
    assert [path.name for path in (*cat.images, *dog.images)] == ["cat.png", "dog_2.png", "dog_10.jpg"]
    save_picture(tmp_path / "mouse.png")
    with pytest.raises(ValueError, match=r"mouse\.png belongs to no prompt"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "save it as UTF-8"),
        ("a.yaml", "- x", "not read: give"),
        ("a.json", "[1", "is no JSON"),
        ("a.json", "[" * 100_000, "is no JSON"),
        ("a.json", "7", "must hold a list"),
        ("a.json", "[7]", "prompt 0 must be a text"),
        ("a.json", '[{"promt": "x"}]', "must be a text, or an object"),
        ("a.json", '[{"prompt": "x", "image": "y"}]', r"\['image'\], which nothing reads"),
        ("a.json", '[{"prompt": "x", "images": 7}]', "images must be"),
        ("a.json", '[{"prompt": "x", "seed": -1}]', "seed must be"),
        ("a.json", '[{"prompt": "x", "seed": true}]', "seed must be"),
        ("a.json", '["\\ud800"]', "half a surrogate"),
        ("a.json", '{"../up": "x"}', "is no file name"),
        ("a.json", '{".hidden": "x"}', "is no file name"),
        ("a.json", '["x", {"prompt": "y", "name": "000"}]', "two answers would be called"),
        ("a.jsonl", '"x"\n{', "line 2 is no JSON"),
    ],
)
def test_what_is_wrong_with_a_file_of_prompts(
    name: str, content: str | bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said):
        read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")


def test_pictures_are_read_upright_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    assert read_picture(save_picture(tmp_path / "a.jpg", size=(20, 40), exif=exif)).shape == (40, 20, 3)
    (tmp_path / "b.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"b\.png is no PNG, JPEG or WEBP"):
        read_picture(tmp_path / "b.png")
    monkeypatch.setattr("emuworld.tasks.prompts.MAX_PICTURE_PIXELS", 100)
    with pytest.raises(ValueError, match="pixels are too many"):
        read_picture(tmp_path / "a.jpg")


# ---- answers -------------------------------------------------------------------------------------


def ask(model: WorldModel, *questions: Question, batch: int = 4, **rules: Any) -> dict[str, Answer]:
    rules = {"size": (64, 64), **rules}
    answers = answer_all(
        model, questions, rules=Rules(**rules), sampling_for=model.default_sampling, batch=batch
    )
    return {answer.question.name: answer for answer in answers}


def test_every_mode_is_answered(tiny_model: WorldModel, tmp_path: Path) -> None:
    image = save_picture(tmp_path / "a.png")
    questions = [
        Question(name="t2i", mode="t2i", seed=0, prompt="a room"),
        Question(name="x2i", mode="x2i", seed=0, prompt="make it red", images=(image,)),
        Question(name="walk", mode="explore", seed=0, prompt="a room", commands=("turn left", "look up")),
        Question(name="twin", mode="explore", seed=0, prompt="", images=(image,), commands=("turn left",)),
        Question(name="story", mode="story", seed=0, prompt="a room"),
        Question(name="howto", mode="howto", seed=1, prompt="a room"),
        Question(name="vla", mode="vla", seed=2, prompt="turn", images=(image,)),
    ]
    answers = ask(tiny_model, *questions, max_images=3)
    assert not [answer.problem for answer in answers.values() if answer.problem]
    stories = {name: answer.story for name, answer in answers.items()}
    texts = {name: [part.text for part in story.segments] for name, story in stories.items() if story}
    assert texts["t2i"] == texts["x2i"] == [""]
    assert texts["walk"] == ["", "turn left", "look up"] and texts["twin"] == ["turn left"]
    for name, story in stories.items():
        assert story is not None
        images = [image for part in story.segments for image in part.images]
        assert {(image.height, image.width) for image in images} <= {(64, 64)}
        assert len(images) <= 3 and len(story.reference_images) == (name in ("x2i", "twin", "vla"))
    assert answers["t2i"].stopped == "image" and answers["twin"].stopped == "commands"


def test_answers_do_not_depend_on_the_batch(tiny_model: WorldModel) -> None:
    questions = [
        Question(name=f"{seed}", mode="story" if seed % 2 else "t2i", seed=seed, prompt="a room")
        for seed in range(5)
    ]
    one, four = (ask(tiny_model, *questions, batch=batch, max_images=2) for batch in (1, 4))
    assert {name: (a.story, a.stopped) for name, a in one.items()} == {
        name: (a.story, a.stopped) for name, a in four.items()
    }


def test_an_answer_that_fills_the_context_ends_there(tiny_model: WorldModel) -> None:
    """256 px are 278 tokens, the context holds 4,096: some fourteen pictures, then it is full."""
    commands = ("turn left",) * 40
    question = Question(name="long", mode="explore", seed=0, prompt="a room", commands=commands)
    answer = ask(tiny_model, question, size=(256, 256))["long"]
    assert answer.stopped == "context" and answer.story is not None
    assert 10 < len(answer.story.segments) < 16


def test_what_cannot_be_answered_stops_nothing_else(tiny_model: WorldModel, tmp_path: Path) -> None:
    image = save_picture(tmp_path / "a.png")
    answers = ask(
        tiny_model,
        Question(name="long", mode="t2i", seed=0, prompt="x" * 9000),
        Question(name="lost", mode="x2i", seed=0, prompt="x", images=(tmp_path / "none.png",)),
        Question(name="bare", mode="x2i", seed=0, prompt="x"),
        Question(name="shown", mode="t2i", seed=0, prompt="x", images=(image,)),
        Question(name="told", mode="t2i", seed=0, prompt="x", commands=("go",)),
        Question(name="good", mode="t2i", seed=0, prompt="a room"),
    )
    said = {
        "long": "context of 4096 tokens",
        "lost": "none.png",
        "bare": "x2i edits pictures",
        "shown": "words alone",
        "told": "one picture",
    }
    for name, words in said.items():
        assert words in answers[name].problem and answers[name].story is None
    assert answers["good"].story is not None


# ---- runs ----------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_ends_with_the_same_files(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("a room\na red ball\na blue box\n")
    config = Generate(prompts=str(tmp_path / "p.txt"), mode="story", max_images=1, batch=1, **settings)
    calls: list[tuple[str, int, int]] = []
    paths = run(config, on_progress=lambda *call: calls.append(call))
    assert [path.name for path in paths] == ["000.pb", "001.pb", "002.pb"]
    assert [call for call in calls if call[0] == "answers"] == [("answers", i, 3) for i in range(4)]
    whole = {path: path.read_bytes() for path in paths}
    assert load_story(paths[1]).question == "a red ball"

    paths[1].unlink()  # killed before it was written,
    paths[2].write_bytes(whole[paths[2]])
    marks = {path: path.stat().st_mtime_ns for path in (paths[0], paths[2])}
    assert run(config) == paths
    assert {path: path.read_bytes() for path in paths} == whole
    assert {path: path.stat().st_mtime_ns for path in marks} == marks
    monkeypatch.setattr(generate, "answer_all", lambda *_, **__: pytest.fail("nothing was left to do"))
    with monkeypatch.context() as patch:
        patch.setattr(generate, "answer_all", lambda model, waiting, **_: iter(waiting))
        assert run(config) == paths


def test_a_write_that_fails_leaves_no_answer(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    (tmp_path / "p.txt").write_text("a room\n")
    config = Generate(prompts=str(tmp_path / "p.txt"), **settings)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("os.fsync", full)
        run(config)
    assert [path.suffix for path in (tmp_path / "out" / "proto").iterdir()] == [".json"]
    assert [path.name for path in run(config)] == ["000.pb"]


def test_answers_of_other_settings_are_kept_unless_told(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a room\n")
    config = Generate(prompts=str(tmp_path / "p.txt"), **settings)
    (path,) = run(config)
    first = path.read_bytes()
    other = {**settings, "seed": 1, "prompts": str(tmp_path / "p.txt")}
    with pytest.raises(ValueError, match="answer to another prompt or of other settings"):
        run(Generate(**other))
    assert path.read_bytes() == first
    run(Generate(**other, overwrite=True))
    assert path.read_bytes() != first


def test_shards_and_samples(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"cat": "a cat", "dog": {"prompt": "a dog", "seed": 7}}')
    names = []
    for shard in ("0/2", "1/2"):
        config = Generate(prompts=str(tmp_path / "p.json"), n=2, shard=shard, **settings)
        names.append([path.name for path in run(config)])
    assert names == [["cat_00.pb", "dog_00.pb"], ["cat_01.pb", "dog_01.pb"]]
    folder = tmp_path / "out" / "proto"
    seeds = {path.stem: json.loads(path.read_text())["seed"] for path in folder.glob("*.json")}
    assert seeds == {"cat_00": 0, "cat_01": 1, "dog_00": 7, "dog_01": 8}


def test_problems_are_listed_when_the_others_are_done(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('["a room", {"prompt": "x", "images": "none.png"}, "a ball"]')
    with pytest.raises(ValueError, match=r"1 of 3 prompts were not answered:\n001: .*words alone"):
        run(Generate(prompts=str(tmp_path / "p.json"), **settings))
    assert sorted(path.name for path in (tmp_path / "out" / "proto").glob("*.pb")) == ["000.pb", "002.pb"]


def test_one_prompt_gives_pictures_of_what_it_answered(settings: dict[str, Any], tmp_path: Path) -> None:
    image = str(save_picture(tmp_path / "a.png"))
    paths = run(Generate(mode="x2i", prompt="make it red", images=(image,), **settings))
    assert [path.name for path in paths] == ["0000.pb", "0000_00.png", "0000_01.png", "sheet.png"]
    before = paths[0].read_bytes()
    paths = run(Generate(mode="x2i", prompt="make it blue", images=(image,), **settings))
    assert load_story(paths[0]).question == "make it blue" and paths[0].read_bytes() != before


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompts": "p.txt", "commands": ("go",)}, "stand in their file"),
        ({"size_px": 64, "aspect": "1:1"}, "not both"),
        ({"n": 0}, "at least 1"),
        ({"max_images": 0}, "at least 1"),
        ({"shard": "2/2"}, "shard="),
    ],
)
def test_settings_without_meaning(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Generate(**wrong)
