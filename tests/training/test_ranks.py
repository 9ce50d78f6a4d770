"""Two processes train as one, however they share the work, and go on from each other's states."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_together
from torch import Tensor

from emuworld.model.transformer import Transformer, sized
from emuworld.tokens.vocabulary import builtin
from emuworld.training import states
from emuworld.training.examples import Batch
from emuworld.training.ranks import Ranks
from emuworld.training.states import ShardedStore, first_step, newest
from emuworld.training.trainer import Optimisation, SupervisedTrainer

VOCABULARY = builtin(num_text_tokens=259, num_visual_tokens=30)
CPU = torch.device("cpu")
SETTINGS = Optimisation(learning_rate=3e-3, precision="fp32", loss_tokens=40, recompute_layers=True)


def _batches(rank: int, world: int, *, first: int) -> Iterator[list[Batch]]:
    """A step's two batches; every process its own rows of them."""
    step = first
    while True:
        out = []
        for number, (rows, length) in enumerate([(4, 20), (2, 31)]):
            rng = np.random.default_rng((step, number))
            ids = rng.integers(0, VOCABULARY.size, (rows, length + 1))
            weights = rng.choice([0.0, 0.5, 1.0], (rows, length)).astype(np.float32)
            mine = slice(rank * rows // world, (rank + 1) * rows // world)
            out.append(Batch(kind="walk", ids=ids[mine], inputs=ids[mine, :-1].copy(), weights=weights[mine]))
        yield out
        step += 1


def _trainer(ranks: Ranks, *, first: int = 0, config: Optimisation = SETTINGS) -> SupervisedTrainer:
    model = Transformer(sized("tiny", vocab_size=VOCABULARY.size, attention_dropout=0.0))
    model.init_weights(torch.Generator().manual_seed(0))
    batches = _batches(ranks.data_rank, ranks.data_world, first=first)
    return SupervisedTrainer(
        model,
        config=config,
        vocabulary=VOCABULARY,
        device=CPU,
        ranks=ranks,
        next_batches=lambda: next(batches),
    )


def _store(folder: str | Path, trainer: SupervisedTrainer) -> ShardedStore:
    return ShardedStore(
        Path(folder), "run", module=trainer.model, optimizers=trainer.optimizers, ranks=trainer.ranks
    )


def _steps(trainer: SupervisedTrainer, first: int, last: int) -> None:
    for step in range(first, last):
        trainer.step(step, 1.0)


def _whole(trainer: SupervisedTrainer) -> dict[str, Tensor]:
    whole = trainer.whole_model(torch.float32)
    return {} if whole is None else whole.state_dict()


def _work(rank: int, folder: str) -> None:
    ranks = Ranks(CPU)
    assert ranks.highest(0.25 * rank, 1.0 - rank) == (0.25, 1.0)
    assert ranks.total(rank + 1.0) == (3.0,)
    assert ranks.share(6) == 3 and ranks.first == (rank == 0) and ranks.leads_row
    trainer = _trainer(ranks)
    _steps(trainer, 0, 1)
    _store(folder, trainer).save({"step": 1, "spent_s": 1.0})
    _steps(trainer, 1, 3)
    halves = _trainer(ranks, config=dataclasses.replace(SETTINGS, precision="bf16"))
    _steps(halves, 0, 3)
    assert {p.dtype for p in halves.model.parameters()} == {torch.float32}  # the master weights
    cut = Ranks(CPU, parallel="tp")
    assert (cut.data_world, cut.tensor) == (1, 2) and cut.total(rank + 1.0) == (1.0,)
    assert cut.from_leader("drawn" if cut.leads_row else None) == "drawn"
    goes_on = _trainer(cut, first=1)
    values = _store(folder, goes_on).load()
    assert values is not None and values["step"] == 1
    _steps(goes_on, 1, 3)
    copies = _trainer(Ranks(CPU, parallel="ddp"), first=1)
    assert copies.ranks.mesh is None and copies.ranks.data_rank == rank
    assert _store(folder, copies).load() == values
    _steps(copies, 1, 3)
    results = {"fsdp": _whole(trainer), "ddp": _whole(copies), "bf16": _whole(halves), "tp": _whole(goes_on)}
    if rank == 0:
        torch.save(results, Path(folder, "results.pt"))
    ranks.close()


def test_two_processes_train_as_one_and_go_on_from_each_others_states(tmp_path: Path) -> None:
    run_together(_work, str(tmp_path))
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    alone = _trainer(Ranks(CPU))
    _steps(alone, 0, 3)
    resumed = _trainer(Ranks(CPU), first=1)
    assert first_step(tmp_path, "run") == 1
    _store(tmp_path, resumed).load()
    _steps(resumed, 1, 3)
    start = _trainer(Ranks(CPU)).model.state_dict()
    for name, expected in _whole(alone).items():
        moved = float((expected - start[name]).norm())
        for way, others in {**results, "one process": _whole(resumed)}.items():
            # Muon turns its products into directions in bf16, where the last bits of a sum show.
            allowed = 0.4 if way == "bf16" else 0.02
            assert float((others[name] - expected).norm()) <= allowed * moved, f"{way}: {name}"


def test_a_state_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    trainer = _trainer(Ranks(CPU))
    _steps(trainer, 0, 1)
    store = _store(tmp_path, trainer)
    store.save({"step": 1, "spent_s": 0.5})
    (tmp_path / "run.state-7").mkdir()  # a writer was killed here
    (tmp_path / "run.state-7" / "values.json").write_text('{"step": 7}')
    assert newest(tmp_path, "run") == tmp_path / "run.state-1"
    _steps(trainer, 1, 2)
    store.save({"step": 7, "spent_s": 0.7})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.state-7"]
    again = _trainer(Ranks(CPU), first=2)
    assert _store(tmp_path, again).load() == {"step": 7.0, "spent_s": 0.7}
    _steps(trainer, 2, 3)
    _steps(again, 2, 3)
    for name, tensor in _whole(trainer).items():
        assert torch.equal(tensor, _whole(again)[name]), name


def test_an_index_that_asks_for_other_types_is_refused(tmp_path: Path) -> None:
    class Wicked:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "touched",)  # type: ignore[return-value]

    folder = tmp_path / "run.state-3"
    folder.mkdir()
    (folder / "values.json").write_text('{"step": 3, "spent_s": 1.0}')
    (folder / ".metadata").write_bytes(pickle.dumps(Wicked()))
    with pytest.raises(ValueError, match="no index of tensors needs"):
        _store(tmp_path, _trainer(Ranks(CPU))).load()
    assert not (tmp_path / "touched").exists()


def test_an_index_of_an_older_python_is_read() -> None:
    """Python 3.11.2 keeps members of enumerations as getattr(enumeration, name)."""
    kept = b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n%s\nV%s\ntR."
    read = states._IndexUnpickler(
        BytesIO(kept % (b"_MEM_FORMAT_ENCODING", b"TORCH_CONTIGUOUS_FORMAT"))
    ).load()
    assert read.name == "TORCH_CONTIGUOUS_FORMAT"
    with pytest.raises(ValueError, match="no index of tensors needs"):
        states._IndexUnpickler(BytesIO(kept % (b"Metadata", b"__init__"))).load()


def test_what_cannot_be_divided_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(CPU)
    ranks.data_world = 4
    with pytest.raises(ValueError, match="multiple of 4"):
        ranks.share(6)
    assert Ranks(CPU).share(6) == 6
    with pytest.raises(ValueError, match="expected one of ddp, fsdp, tp"):
        Ranks(CPU, parallel="both")
    with pytest.raises(ValueError, match="rows of 3"):
        Ranks(CPU, parallel="tp", tensor_ranks=3)
