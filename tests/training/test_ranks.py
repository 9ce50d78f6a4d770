"""Two processes train as one: equal copies, one log, a batch divided between them."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch

from emuworld.training.ranks import Ranks


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = Ranks(torch.device("cpu"))
    weight = torch.nn.Parameter(torch.full((3, 2), float(rank)))
    ranks.copy_first([weight])
    copied = weight.tolist()
    (weight * (rank + 1)).sum().backward()
    ranks.average_gradients([weight])
    assert weight.grad is not None
    result = {
        "copied": copied,
        "gradient": weight.grad.tolist(),
        "highest": ranks.highest(0.25 * rank, 1.0 - rank),
        "share": ranks.share(6),
        "first": ranks.first,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    ranks.close()


def test_two_processes_agree(tmp_path: Path) -> None:
    port = _free_port()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for result in results:
        assert result["copied"] == [[0.0, 0.0]] * 3  # the first one's values
        assert result["gradient"] == [[1.5, 1.5]] * 3  # mean of 1 and 2
        assert result["highest"] == [0.25, 1.0]
        assert result["share"] == 3
    assert [result["first"] for result in results] == [True, False]


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(torch.device("cpu"))
    ranks.world = 4
    with pytest.raises(ValueError, match="multiple of 4"):
        ranks.share(6)
    assert Ranks(torch.device("cpu")).share(6) == 6
