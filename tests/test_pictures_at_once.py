"""Pictures drawn at once, through the facade: the same bytes in any company, who may ask, what is told.

The weights are random: what is drawn is noise, but every number of it must be reproduced.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emuworld import pictures
from emuworld.checkpoint_folder import weights_name
from emuworld.decoding.noise import Noise
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.envs.dream import Dream
from emuworld.manifest import Manifest
from emuworld.model import checkpoint
from emuworld.model.adapter import Adapter, load_adapter, save_adapter, write_adapter
from emuworld.pictures import contact_sheet
from emuworld.tasks import convert, generate
from emuworld.world_model import ImageDraft, ImageRow, Segment, SegmentDone, WorldModel, WorldState, load

FREE = Sampling(text=Truncation(top_p=0.9), image=Truncation(top_k=20), guidance=3.0, passes=3)
SETTINGS = {
    "confidence": dataclasses.replace(FREE, guided_until=0.5),
    "jump": dataclasses.replace(FREE, resample="jump", passes=4, guidance=1.0),
    "three rows": dataclasses.replace(FREE, image_guidance=1.5, passes=2),
}
COMMANDS = ("turn left", None, "", "move forward", None, "go to the red ball", "look up", "turn right")
CUDA = torch.device("cuda")
Result = tuple[WorldState, Segment]


def copied(source: str, folder: Path, *, noise: Noise | None) -> Path:
    """A copy of a checkpoint whose manifest says that it draws pictures at once."""
    shutil.copytree(source, folder)
    dataclasses.replace(Manifest.load(folder), dida=noise).save(folder)
    return folder


@pytest.fixture(scope="module", params=["mixture", "metric", "masked"])
def model(
    request: pytest.FixtureRequest, tiny_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> WorldModel:
    folder = tmp_path_factory.mktemp("dida") / "tiny"
    return load(copied(tiny_folder, folder, noise=Noise(path=request.param, shift=2.0)), device="cpu")


def begin(model: WorldModel, world: int) -> WorldState:
    images = [np.full((128, 128, 3), 30 * world, np.uint8)] if world % 3 == 2 else []
    return model.begin(
        mode="explore",
        prompt="a room " * (1 + world % 4),
        images=images,
        seed=world,
        size=((64, 96), (64, 64))[world % 2],
    )


def walk(model: WorldModel, worlds: list[int], sampling: Sampling) -> dict[int, list[Result]]:
    """Two steps of each world, all together; a world that has ended stays behind."""
    states = {world: begin(model, world) for world in worlds}
    history: dict[int, list[Result]] = {world: [] for world in worlds}
    for step in range(2):
        alive = [world for world in worlds if not states[world].ended]
        texts = [COMMANDS[(world + step) % len(COMMANDS)] for world in alive]
        results = model.imagine_batch([states[world] for world in alive], texts, sampling=sampling)
        for world, result in zip(alive, results, strict=True):
            states[world] = result[0]
            history[world].append(result)
    return history


def same(one: Result, other: Result) -> bool:
    pixels = [None if s.image is None else s.image.tobytes() for _, s in (one, other)]
    return one[0] == other[0] and pixels[0] == pixels[1] and one[1].text == other[1].text


@pytest.mark.parametrize("name", SETTINGS)
def test_same_seed_same_pictures_in_any_company(model: WorldModel, name: str) -> None:
    """1, 2 and 8 worlds, in other orders, with texts given and written, of two sizes."""
    model.caches.clear()
    together = walk(model, list(range(8)), SETTINGS[name])
    drawn = {s.image.tobytes() for results in together.values() for _, s in results if s.image is not None}
    assert len(drawn) > 8, "worlds of different seeds differ"
    for batch in ([5, 2], [3, 0, 7, 1, 6, 4], [2], [4]):
        model.caches.clear()
        for world, results in walk(model, batch, SETTINGS[name]).items():
            assert len(results) == len(together[world])
            assert all(same(a, b) for a, b in zip(results, together[world], strict=True)), (batch, world)


def test_pictures_may_begin_before_their_codes_are_on_the_host(
    model: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the same pictures, made once each, also where some worlds draw token by token."""
    states = [begin(model, world) for world in range(5)]
    settings = [FREE, FREE, dataclasses.replace(FREE, passes=0), dataclasses.replace(FREE, passes=5), FREE]
    texts = ["turn left", "look up", "look up", "turn right", "look up"]
    expected = model.imagine_batch(states, texts, sampling=settings)
    while_drawn, decode, decoded = pictures.while_drawn, model._vision.decode, list[bool]()

    def counted(codes_Bhw: torch.Tensor, *, known: bool = False) -> torch.Tensor:
        decoded.extend([known] * len(codes_Bhw))
        return decode(codes_Bhw, known=known)

    monkeypatch.setattr(model._vision, "decode", counted)
    monkeypatch.setattr(model._vision, "pictures_at_once", lambda size: 1)
    monkeypatch.setattr(pictures, "while_drawn", lambda *args, device: while_drawn(*args, device=CUDA))
    found = model.imagine_batch(states, texts, sampling=settings)
    for (state, segment), (other_state, other) in zip(found, expected, strict=True):
        assert state == other_state and segment.image is not None and other.image is not None
        # Convolutions round otherwise on other strides, and on another number of threads.
        assert np.abs(segment.image.astype(int) - other.image).max() <= 1
    assert sorted(decoded) == [False, True, True, True, True]


def test_restored_worlds_go_on_beside_worlds_that_draw_token_by_token(model: WorldModel) -> None:
    state, expected, snapshots = begin(model, 3), [], []
    for text in ("turn left", "look up"):
        snapshots.append((text, state.to_bytes()))
        state, segment = model.imagine(state, text, sampling=FREE)
        expected.append((state, segment))
    for (text, snapshot), result in zip(snapshots, expected, strict=True):
        model.caches.clear()
        states = [begin(model, 1), WorldState.from_bytes(snapshot)]
        token_by_token = dataclasses.replace(FREE, passes=0)
        both = model.imagine_batch(states, ["look up", text], sampling=[token_by_token, FREE])
        assert same(both[1], result)
        assert same(both[0], model.imagine(states[0], "look up", sampling=token_by_token))


def test_a_stream_tells_every_pass_and_ends_as_imagine_does(model: WorldModel) -> None:
    state = begin(model, 0)
    expected = model.imagine(state, "turn left", sampling=FREE)
    events = list(model.stream(state, "turn left", sampling=FREE))
    drafts = [event for event in events if isinstance(event, ImageDraft)]
    rows = np.stack([event.codes for event in events if isinstance(event, ImageRow)])
    assert [(draft.done, draft.num_passes) for draft in drafts] == [(1, 3), (2, 3), (3, 3)]
    assert drafts[0].codes.shape == (4, 6)
    assert not np.array_equal(drafts[0].codes, drafts[1].codes)
    np.testing.assert_array_equal(rows, drafts[-1].codes)
    assert isinstance(events[-1], SegmentDone)
    assert same((events[-1].state, events[-1].segment), expected)


def test_progress_is_told_and_ends_at_what_was_expected(model: WorldModel) -> None:
    told: list[tuple[int, int]] = []
    model.imagine(begin(model, 0), "", sampling=FREE, on_step=lambda *numbers: told.append(numbers))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert all(done <= expected for done, expected in told)
    assert len(told) == FREE.passes


def test_passes_and_rules_matter_and_seeds_too(model: WorldModel) -> None:
    state = begin(model, 0)
    other_seed = dataclasses.replace(state, seed=99)
    asked = [
        (state, FREE),
        (other_seed, FREE),
        (state, dataclasses.replace(FREE, passes=4)),
        (state, dataclasses.replace(FREE, resample="jump")),
        (state, dataclasses.replace(FREE, guidance=1.0)),
        (state, dataclasses.replace(FREE, passes=0)),
    ]
    states, settings = zip(*asked, strict=True)
    results = model.imagine_batch(states, ["turn left"] * len(asked), sampling=settings)
    assert len({after.answer_ids for after, _ in results}) == len(asked)


def test_a_checkpoint_that_has_not_learnt_it_says_so(tiny_model: WorldModel) -> None:
    state = begin(tiny_model, 0)
    with pytest.raises(ValueError, match=r"passes=3 .* has not learnt .* passes=0, or adapt"):
        tiny_model.imagine(state, "turn left", sampling=FREE)
    with pytest.raises(ValueError, match="has not learnt"):
        dataclasses.replace(tiny_model.manifest, sampling={"explore": FREE})


def test_a_gpu_may_draw_in_passes_where_a_cpu_does_not(tiny_folder: str, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path / "tiny", noise=Noise())
    own = Manifest.load(folder)
    drawn = dataclasses.replace(own.sampling_for("explore"), passes=3)
    dataclasses.replace(own, gpu_sampling={"explore": drawn}).save(folder)
    both = Manifest.load(folder)
    assert both.gpu_sampling == {"explore": drawn}
    on_gpu, on_cpu = both.for_device("cuda"), both.for_device("cpu")
    assert on_cpu.sampling_for("explore") == own.sampling_for("explore")
    assert on_gpu.sampling_for("explore") == drawn
    assert on_gpu.sampling_for("story") == own.sampling_for("story")
    assert load(folder, device="cpu").default_sampling("explore").passes == 0
    with pytest.raises(ValueError, match="has not learnt"):
        dataclasses.replace(both, dida=None)
    with pytest.raises(ValueError, match="unknown"):
        dataclasses.replace(both, gpu_sampling={"fly": drawn})


def test_a_window_is_of_token_by_token_whatever_the_checkpoint_draws_with(
    tiny_folder: str, tmp_path: Path
) -> None:
    folder = copied(tiny_folder, tmp_path / "tiny", noise=Noise())
    own = Manifest.load(folder)
    drawn = dataclasses.replace(own.sampling_for("explore"), passes=3)
    dataclasses.replace(own, sampling={**own.sampling, "explore": drawn}).save(folder)
    model = load(folder, device="cpu")

    def passes(**given: int) -> int:
        asked = generate._sampling(model, "explore", generate.Generate(prompt="a room", **given))
        dream = Dream(model=model, mode="explore", **given)
        assert dream._sampling["explore"].passes == asked.passes
        return asked.passes

    assert passes() == passes(draft_window=0) == 3
    assert passes(draft_window=4) == 0
    assert passes(draft_window=4, passes=2) == 2


def test_an_adapter_leaves_token_by_token_as_it_was(
    tiny_folder: str, tiny_model: WorldModel, tmp_path: Path
) -> None:
    """Byte for byte, pictures and text; drawn at once, the adapter makes other pictures."""
    folder = copied(tiny_folder, tmp_path / "adapted", noise=Noise())
    plain = load(copied(tiny_folder, tmp_path / "plain", noise=Noise()), device="cpu")
    adapter = Adapter(checkpoint.load(folder), rank=4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for up_Or in adapter.up_Or.values():
            up_Or.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1))
    save_adapter(folder, adapter)
    adapted = load(folder, device="cpu")
    assert adapted.fingerprint != tiny_model.fingerprint == plain.fingerprint
    token_by_token = dataclasses.replace(FREE, passes=0)
    for text in ("turn left", None):
        before = tiny_model.imagine(begin(tiny_model, 2), text, sampling=token_by_token)
        after = adapted.imagine(begin(adapted, 2), text, sampling=token_by_token)
        restored = dataclasses.replace(after[0], fingerprint=tiny_model.fingerprint)
        assert same((restored, after[1]), before)
    drawn = [one.imagine(begin(one, 2), "turn left", sampling=FREE)[0].answer_ids for one in (plain, adapted)]
    assert drawn[0] != drawn[1]


def test_a_checkpoint_in_8_bits_draws_the_same(tiny_folder: str, tmp_path: Path) -> None:
    """Its adapter is told the new weights; on the CPU all is computed in 8 bits anyway."""
    folder = copied(tiny_folder, tmp_path / "adapted", noise=Noise())
    adapter = Adapter(checkpoint.load(folder), rank=2, generator=torch.Generator().manual_seed(0))
    save_adapter(folder, adapter, base=weights_name(folder))
    (folder / "detector.safetensors").write_bytes(b"a judge")
    convert.run(convert.Convert(model=str(folder), out=str(tmp_path / "int8"), to="int8"))
    assert (tmp_path / "int8" / "detector.safetensors").read_bytes() == b"a judge"
    convert.run(convert.Convert(model=str(tmp_path / "int8"), out=str(tmp_path / "bf16"), to="qwen3"))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("adapted", "int8", "bf16")]
    assert sizes[1] < sizes[0] == sizes[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models = [load(tmp_path / name, device="cpu") for name in ("adapted", "int8", "bf16")]
        for sampling in (FREE, dataclasses.replace(FREE, passes=0)):
            one, two, three = (
                model.imagine(begin(model, 2), "turn left", sampling=sampling)[0].answer_ids
                for model in models
            )
            assert one == two == three


@pytest.mark.parametrize("cut", ["half", "other rank", "other scales", "missing"])
def test_a_damaged_adapter_is_named(tiny_folder: str, tmp_path: Path, cut: str) -> None:
    folder = copied(tiny_folder, tmp_path / "adapted", noise=Noise())
    adapter = Adapter(checkpoint.load(folder), rank=2, generator=torch.Generator().manual_seed(0))
    save_adapter(folder, adapter)
    path = folder / "dida.safetensors"
    tensors = load_file(path)
    name = min(tensors).rpartition(".")[0]
    if cut == "half":
        path.write_bytes(path.read_bytes()[:500])
        tensors.clear()
    elif cut == "missing":
        del tensors[name + ".up"], tensors[name + ".down"]
    else:
        end = ".up" if cut == "other rank" else ".scale"
        tensors[name + end] = tensors[name + end].new_zeros((*tensors[name + end].shape[:-1], 3))
    if tensors:
        save_file(tensors, path)
    with pytest.raises(ValueError, match=r"dida\.safetensors: "):
        load(folder, device="cpu")


def test_an_adapter_is_kept_in_8_bits(tiny_folder: str, tmp_path: Path) -> None:
    """Each direction to half a step of its own scale, and the same once more after a second writing."""
    model = checkpoint.load(tiny_folder)
    adapter = Adapter(model, rank=3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for up_Or in adapter.up_Or.values():
            up_Or[:, :2].normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1))
            up_Or[:, 0] *= 1e-3
    save_adapter(tmp_path, adapter)
    assert (tmp_path / "dida.safetensors").stat().st_size < sum(p.numel() for p in adapter.parameters()) * 2
    read = load_adapter(tmp_path, model)
    for key, down_rI in adapter.down_rI.items():
        name = key.replace("-", ".")
        for direction in range(3):
            exact = torch.outer(adapter.up_Or[key][:, direction], down_rI[direction])
            kept = torch.outer(read[name + ".up"][:, direction], read[name + ".down"][direction])
            assert (exact - kept).abs().max() <= 1.01 / 127 * exact.abs().max()
    write_adapter(tmp_path, read, base="")
    again = load_adapter(tmp_path, model)
    assert all(torch.allclose(again[name], tensor, rtol=1e-6) for name, tensor in read.items())


def test_an_adapter_of_other_weights_is_told(tiny_folder: str, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path / "adapted", noise=Noise())
    adapter = Adapter(checkpoint.load(folder), rank=2, generator=torch.Generator().manual_seed(0))
    save_adapter(folder, adapter, base=weights_name(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(folder, device="cpu")
        model.imagine(begin(model, 2), "turn left", sampling=FREE)
    others = checkpoint.load(folder, dtype=torch.float32)
    with torch.no_grad():
        others.model.norm.weight.mul_(1.1)
    checkpoint.save(folder, others, dtype=torch.bfloat16)
    model = load(folder, device="cpu")
    with pytest.warns(UserWarning, match="other weights"):
        model.imagine(begin(model, 2), "turn left", sampling=FREE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.imagine(begin(model, 2), "turn left", sampling=dataclasses.replace(FREE, passes=0))


def test_a_contact_sheet_holds_every_frame() -> None:
    frames = [np.full((4, 4, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    sheet = contact_sheet(frames, columns=2, gap_px=1)
    assert sheet.shape == (11, 11, 3)
    assert [int(sheet[2, 2, 0]), int(sheet[2, 7, 0]), int(sheet[7, 2, 0])] == [10, 20, 30]
    with pytest.raises(ValueError, match="at least one frame"):
        contact_sheet([])
