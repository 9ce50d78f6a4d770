"""What rows have read, remembered from one state to the next."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest

from emuworld.readings import Reading
from emuworld.state import SnapshotError
from emuworld.tokens.sequence import image_block
from emuworld.tokens.token_ids import TokenIds
from emuworld.world_model import Sampling, WorldModel


def test_a_reading_that_goes_on_is_what_it_would_be_anew() -> None:
    """And the one before stays as it was: worlds branch."""
    first = Reading([(1, 2), (3,)])
    for more in ([(4, 5), (6,)], [], [(4,), (5, 6)]):
        longer = Reading(more, before=first)
        anew = Reading([TokenIds([1, 2]), [3], *more])
        assert longer == [*first, *more] == anew and longer.keys == anew.keys
        assert longer.num_tokens == anew.num_tokens == sum(map(len, longer))
    assert first == [(1, 2), (3,)] and len(first.keys) == 2
    assert Reading([(1, 2, 3)]).keys[-1] != first.keys[-1], "boundaries count"
    assert Reading.of(first) is first
    assert len(set(Reading([(1,), (1,), (1,)]).keys)) == 3, "a chunk that comes again is another"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_a_world_has_read_is_known_at_its_next_step(tiny_model: WorldModel, guidance: float) -> None:
    """As if its state were read anew, in branches too; and forgotten when nobody has the state."""
    context = tiny_model._context
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    state = tiny_model.begin(mode="explore", prompt="a", images=[image], seed=3, size=(128, 128))
    sampling = Sampling(guidance=guidance, image_guidance=guidance)
    num_rows = sampling.num_rows(has_references=True)
    states = [state]
    for text in ("b", "", "c"):
        states += [tiny_model.imagine(state, text, sampling=sampling)[0] for state in states]
    before = len(context._known._held)
    for state in states:
        known = context._known.get(state)
        assert known is not None and len(known) in (0, num_rows)
        fresh = context.readings(replace(state), num_rows=num_rows)
        assert [*map(list, context.readings(state, num_rows=num_rows))] == [*map(list, fresh)]
        assert [row.keys for row in context.readings(state, num_rows=num_rows)] == [row.keys for row in fresh]
    assert len(context._known.get(states[-1]) or ()) == num_rows
    damaged = replace(states[-1], answer_ids=(*states[-1].answer_ids, -1))
    with pytest.raises(SnapshotError):
        context.check(damaged)
    assert context._known.get(damaged) is None
    states.clear()
    del state
    gc.collect()
    assert len(context._known._held) < before


def test_a_picture_that_is_known_to_end_the_ids_is_not_looked_for(tiny_model: WorldModel) -> None:
    """And whoever looks finds the same. An answer that does not end with a picture has none of it."""
    context, tokenizer = tiny_model._context, tiny_model.tokenizer
    block = image_block(np.arange(6).reshape(2, 3), tokenizer=tokenizer)
    ids = TokenIds([*tokenizer.encode("turn left"), *block])
    state = tiny_model.begin(mode="explore", prompt="a", size=(128, 128))
    assert context.read_on(state, ids) == [], "nothing is known of it"
    for known in (1, 2):
        context.remember(state, context.readings(state, num_rows=known))
        found, told = context.read_on(state, ids), context.read_on(state, ids, block_tokens=len(block))
        assert found == told and [row.keys for row in found] == [row.keys for row in told]
        later = state.after(ids, size=state.size, ended=False)
        assert found == context.readings(later, num_rows=known)
        for broken in (ids[:0], ids[:-1], [*ids, 5]):
            assert context.read_on(state, TokenIds(broken)) == []
        unfinished = replace(later, answer_ids=later.answer_ids[:-1])
        context.remember(unfinished, found)
        assert context.read_on(unfinished, ids) == []
