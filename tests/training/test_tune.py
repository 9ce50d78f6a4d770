"""Fine-tuning on a folder: what is read, and that a model learns it, with all weights or an adapter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot_sets import SUBTASKS, TASKS, Recorded, write_set
from PIL import Image
from safetensors.torch import load_file, save_file

from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.model import checkpoint, lora_folder
from emuworld.pictures import middle
from emuworld.questions import vla_question
from emuworld.tokens.sequence import parse_answer
from emuworld.training import tune
from emuworld.training.checkpoints import open_source
from emuworld.training.examples import Bucket, ExampleSampler, Mixture
from emuworld.training.lerobot_folder import read_episodes
from emuworld.training.loop import LoopConfig
from emuworld.training.picture_folder import picture, read_pairs
from emuworld.world_model import load


def _save(path: Path, colour: tuple[int, int, int]) -> None:
    pixels = np.full((50, 90, 3), colour, np.uint8)
    pixels[:, :10] = 255  # outside the middle
    Image.fromarray(pixels).save(path)


def _folder(folder: Path) -> Path:
    folder.mkdir()
    for number in range(12):
        _save(folder / f"{number}.png", ((200, 30, 30), (30, 30, 200))[number % 2])
        (folder / f"{number}.txt").write_text(("a red box", "a blue ball")[number % 2] + "\n")
    return folder


def _config(data: Path, tiny_folder: str, out: Path, *, adaptation: str, steps: int = 25) -> tune.Tuning:
    return tune.Tuning(
        data=str(data),
        init_from=tiny_folder,
        out=str(out),
        adaptation=adaptation,
        size_px=64,
        learning_rate=1e-2,
        embedding_learning_rate=1e-3,
        held_back=0.2,
        device="cpu",
        loop=LoopConfig(max_steps=steps, warmup_steps=3, schedule="cosine", log_every_steps=5),
    )


@pytest.mark.parametrize("adaptation", ["adapter", "full"])
def test_a_folder_is_learnt(tiny_folder: str, tmp_path: Path, adaptation: str) -> None:
    torch.set_num_threads(1)
    data, out = _folder(tmp_path / "pictures"), tmp_path / "out"
    after = tune.train(_config(data, tiny_folder, out, adaptation=adaptation))
    lines = [json.loads(line) for line in (out / "tune.log.jsonl").read_text().splitlines()]
    assert after["validation_visual_loss"] < 0.5 * lines[0]["visual_loss"]
    if adaptation == "full":
        model = load(out, device="cpu")
    else:
        assert not (out / "model.safetensors").exists()
        model = load(tiny_folder, adapter=out, device="cpu")
        assert model.fingerprint != load(tiny_folder, device="cpu").fingerprint
        assert model is load(tiny_folder, adapter=out, device="cpu")
        assert model is load(out, device="cpu")  # it says what model it belongs to
    drawn = [
        model.imagine(model.begin(mode="t2i", prompt=text, seed=1, size=(64, 64)), "")[0]
        for text in ("a red box", "a blue ball")
    ]
    codes = [model.picture_codes(state)[0] for state in drawn]
    shown = [model.encode([picture(data / f"{n}.png", size=(64, 64))])[0] for n in (0, 1)]
    for ours, asked in zip(codes, shown, strict=True):
        assert (ours == asked).mean() > 0.4  # of 64 codes
    weights = checkpoint.load(tiny_folder).state_dict()
    again = tune.train(_config(data, tiny_folder, out, adaptation=adaptation))  # nothing is left to do
    assert again == pytest.approx(after, rel=1e-4)
    assert all(
        torch.equal(tensor, weights[name])
        for name, tensor in checkpoint.load(tiny_folder).state_dict().items()
    )


def _robot_set(folder: Path, *, pairs: int, dtype: str) -> Path:
    """Episodes of two tasks in one file, of two steps and of one in turn."""
    two_steps = Recorded(tasks=[0] * 6, subtasks=[0] * 3 + [1] * 3)
    one_step = Recorded(tasks=[1] * 4, subtasks=[2] * 4, look=3)
    return write_set(folder, [two_steps, one_step] * pairs, subtasks="index", dtype=dtype)


@pytest.mark.parametrize("adaptation", ["adapter", "full"])
def test_a_lerobot_data_set_teaches_vla(tiny_folder: str, tmp_path: Path, adaptation: str) -> None:
    torch.set_num_threads(1)
    data, out = _robot_set(tmp_path / "set", pairs=3, dtype="video"), tmp_path / "out"
    after = tune.train(_config(data, tiny_folder, out, adaptation=adaptation, steps=80))
    lines = [json.loads(line) for line in (out / "tune.log.jsonl").read_text().splitlines()]
    assert after["validation_visual_loss"] < 0.5 * lines[0]["visual_loss"]
    assert after["validation_text_loss"] < 0.5 * lines[0]["text_loss"]
    model = load(out, device="cpu") if adaptation == "full" else load(tiny_folder, adapter=out, device="cpu")
    likeliest = Sampling(text=Truncation(top_k=1), image=Truncation(top_k=1))
    start, *ends = [middle(image, (64, 64)) for image in read_episodes(data)[0].pictures]
    state = asked = model.begin(mode="vla", prompt=TASKS[0], images=[start], seed=1, size=(64, 64))
    for subtask, end in zip(SUBTASKS[:2], ends, strict=True):
        state, segment = model.imagine(state, subtask, sampling=likeliest)
        assert segment.image is not None and segment.image.shape == (64, 64, 3)
        assert (model.picture_codes(state)[-1] == model.encode([end])[0]).mean() > 0.6  # of 16 codes
    assert model.imagine(asked, sampling=likeliest)[1].text in SUBTASKS  # the model's own words


def test_what_is_learnt_of_robots_is_what_is_asked(tiny_folder: str, tmp_path: Path) -> None:
    """The prompt of a training example, to the token; with a robot in the published model's words."""
    data = _robot_set(tmp_path / "set", pairs=1, dtype="image")
    source, model = open_source(tiny_folder, device=torch.device("cpu")), load(tiny_folder, device="cpu")
    for robot in ("", "SO-100"):
        config = dataclasses.replace(
            _config(data, tiny_folder, tmp_path, adaptation="full"), robot=robot, camera=""
        )
        story = tune._stories(config, source, device=torch.device("cpu"))[0]
        sampler = ExampleSampler(
            tokenizer=source.tokenizer, mixture=Mixture(unconditional=0.0, midway=0.0), size=(4, 4)
        )
        sampler.add([story])
        example = sampler.example(Bucket(kind="vla", frames=6, batch_size=1), np.random.default_rng(0))
        asked = vla_question(TASKS[0], robot=robot) if robot else TASKS[0]
        state = model.begin(mode="vla", prompt=asked, images=[story.codes[0]], size=(64, 64))
        assert tuple(example.ids[: example.prompt_tokens]) == state.prompt_ids
        told = parse_answer(example.ids[example.prompt_tokens :], tokenizer=source.tokenizer)
        assert [segment.text for segment in told] == list(SUBTASKS[:2]) and told.ended
        assert all(np.array_equal(a.codes, b) for a, b in zip(told, story.codes[1:], strict=True))


def test_settings_for_robots_alone_are_told(tmp_path: Path) -> None:
    data = _folder(tmp_path / "pictures")
    config = dataclasses.replace(_config(data, "small", tmp_path, adaptation="full"), camera="top")
    with pytest.warns(UserWarning, match="camera and robot change nothing"):
        tune._told(config)
    with pytest.raises(ValueError, match="keyframes must be 1 or more"):
        dataclasses.replace(config, keyframes=0)


def test_what_a_folder_may_hold(tmp_path: Path) -> None:
    data = _folder(tmp_path / "a")
    assert [(p.picture.name, p.text) for p in read_pairs(data)][:2] == [
        ("0.png", "a red box"),
        ("1.png", "a blue ball"),
    ]
    (data / "captions.csv").write_text('image,caption\n2.png,"a wall, red"\n')
    (pair,) = read_pairs(data)
    assert (pair.picture.name, pair.text, pair.source) == ("2.png", "a wall, red", None)
    (data / "metadata.jsonl").write_text(
        '\n{"file_name": "3.png", "text": "make it blue", "source": "2.png"}\n'
    )
    (pair,) = read_pairs(data)
    assert pair.source is not None and (pair.picture.name, pair.source.name) == ("3.png", "2.png")
    pixels = picture(data / "0.png", size=(32, 32))
    assert pixels.shape == (32, 32, 3) and pixels.max() <= 210  # the white edge is cut off


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"file_name": "../out.png", "text": "a"}', "is no file in"),
        ('{"file_name": "none.png", "text": "a"}', "is no file in"),
        ('{"file_name": "0.png"}', "no text"),
        ("[1]", "expected an object"),
        ("{", "not valid JSON"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path: Path, line: str, said: str) -> None:
    data = _folder(tmp_path / "a")
    _save(tmp_path / "out.png", (0, 0, 0))
    (data / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"metadata\.jsonl, line 2: .*{said}"):
        read_pairs(data)


def test_empty_folders_and_broken_pictures_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dog\.txt beside dog\.png"):
        read_pairs(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        read_pairs(tmp_path / "none")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="is no picture"):
        picture(tmp_path / "bad.png", size=(32, 32))


def test_adapters_in_pefts_layout(tiny_folder: str, tmp_path: Path) -> None:
    """An adapter as PEFT writes it, on two modules, alpha twice the rank: W + 2 B A."""
    model = checkpoint.load(tiny_folder, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "model.layers.1.mlp.up_proj"
    shape = before[f"{name}.weight"].shape
    down, up = torch.randn(4, shape[1]), torch.randn(shape[0], 4)
    key = f"base_model.model.{name}.lora_{{}}.weight"
    save_file({key.format("A"): down, key.format("B"): up}, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    lora_folder.merge(tmp_path, model)
    for one, tensor in model.state_dict().items():
        expected = before[one] + (2.0 * up @ down if one == f"{name}.weight" else 0.0)
        torch.testing.assert_close(tensor, expected)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(ValueError, match="not a plain LoRA"):
        lora_folder.merge(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(
        {key.format("A"): down[:, :5].contiguous(), key.format("B"): up},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="belongs to another one"):
        lora_folder.merge(tmp_path, model)
    assert load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        load(tiny_folder, adapter=tmp_path / "none", device="cpu")
    with pytest.raises(ValueError, match="names none"):
        load(tmp_path, device="cpu")
    gone = settings | {"base_model_name_or_path": str(tmp_path / "gone")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(gone))
    with pytest.raises(
        ValueError, match=r"is an adapter, and its model '.*gone' cannot be opened: .*Give both"
    ):
        load(tmp_path, device="cpu")
