"""The token table: published ids as in the fact sheet, built-in ids without gaps, JSON both ways."""

from __future__ import annotations

import dataclasses
import json

import pytest

from emuworld.tokens.vocabulary import CONTROL_TOKENS, EMU35, Vocabulary, builtin


def test_published_ids() -> None:
    assert (EMU35.size, EMU35.visual_start, EMU35.visual_stop) == (282926, 151854, 282926)
    assert EMU35.controls == {
        "pad": 151643,
        "boc": 151696,
        "eoc": 151697,
        "bog": 151706,
        "eog": 151707,
        "bss": 151746,
        "ess": 151747,
        "img": 151851,
        "boi": 151852,
        "eoi": 151853,
        "eol": 151846,
        "eof": 151847,
        "tms": 151848,
        "bos": 151849,
        "eos": 151850,
    }


@pytest.mark.parametrize("num_text, num_visual", [(256, 1), (2000, 4096), (777, 16384)])
def test_builtin_has_no_gaps(num_text: int, num_visual: int) -> None:
    vocabulary = builtin(num_text_tokens=num_text, num_visual_tokens=num_visual)
    controls = set(vocabulary.control_ids)
    ids = range(-1, vocabulary.size + 1)
    kinds = [(vocabulary.is_text(i), i in controls, vocabulary.is_visual(i)) for i in ids]
    assert kinds[0] == kinds[-1] == (False, False, False)
    expected = [(True, False, False)] * num_text + [(False, True, False)] * 15
    assert kinds[1:-1] == expected + [(False, False, True)] * num_visual


def test_default_size_is_the_small_models() -> None:
    assert builtin().size == 2000 + 15 + 4096


def test_codes_and_visual_ids() -> None:
    assert EMU35.visual_id(0) == 151854
    assert EMU35.visual_id(131071) == 282925
    assert EMU35.code(151860) == 6
    for code in (-1, 131072):
        with pytest.raises(ValueError, match="no visual code"):
            EMU35.visual_id(code)
    for token in (151853, 282926):
        with pytest.raises(ValueError, match="no visual token"):
            EMU35.code(token)


def test_control_ids_are_ascending_and_described() -> None:
    assert list(EMU35.control_ids) == sorted(EMU35.controls.values())
    assert all(token.meaning and token.string.startswith("<|") for token in CONTROL_TOKENS.values())


@pytest.mark.parametrize("vocabulary", [EMU35, builtin(num_text_tokens=300)])
def test_json_round_trip(vocabulary: Vocabulary) -> None:
    assert Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary


def test_json_names_what_is_wrong() -> None:
    fields = builtin().to_json()
    with pytest.raises(ValueError, match=r"missing \['eos'\], unknown \['extra'\]"):
        Vocabulary.from_json({"extra": 1} | {k: v for k, v in fields.items() if k != "eos"})
    with pytest.raises(ValueError, match="must be integers"):
        Vocabulary.from_json(fields | {"eos": True})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_text_tokens": 255}, "every byte"),
        ({"eos": builtin().bos}, "share an id"),
        ({"eos": 5}, "text or visual id"),
        ({"eos": builtin().visual_start}, "text or visual id"),
        ({"size": builtin().size - 1}, "do not fit"),
        ({"num_visual_tokens": 0}, "do not fit"),
    ],
)
def test_inconsistent_tables_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(builtin(), **change)
