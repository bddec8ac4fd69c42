"What the recipes' trainings share, in two processes."
import multiprocessing
import os
import socket

import pytest
import torch
from torch import nn

from dualreal.experiments.pretrain import Progress, join, pool, pretrain

def draw(rng): return dict(x=rng.normal(size=3))


def train(folder, minutes):
    "A line; each process has drawings of its own."
    torch.manual_seed(0)
    model, data = nn.Linear(3, 1), pool(folder / "pool", draw, 7, part=2)
    assert data["x"].shape == (7, 3)
    def loss(at: Progress, g):
        x = data["x"][torch.randint(7, (2,), generator=g)].float()
        mse = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        return mse, dict(mse=mse)
    optimizer = torch.optim.SGD(model.parameters(), .1)
    how = dict(average=0., keep=0., every=1)
    return pretrain(folder / "line.pt", model, [optimizer], loss, lambda at: 1., minutes, **how)


def work(rank, port, folder, minutes):
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    join()
    torch.save(train(folder, minutes), folder / f"{rank}.pt")


def together(folder, minutes):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(rank, port, folder, minutes)) for rank in (0, 1)]
    for p in processes: p.start()
    for p in processes: p.join(120)
    assert [p.exitcode for p in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by fork")
def test_two_processes_make_one_model_and_go_on(tmp_path):
    one, other = together(tmp_path, .01)
    assert all(torch.equal(one[k], other[k]) for k in one)
    state = torch.load(tmp_path / "line.pt", weights_only=True)
    assert state["at"]["step"] > 1 and all(torch.equal(one[k], state["model"][k]) for k in one)
    alone, shared = (pool(tmp_path / name, draw, 7, part=2)["x"] for name in ("alone", "pool"))
    assert torch.equal(alone, shared)
    one, other = together(tmp_path, .03)
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert torch.load(tmp_path / "line.pt", weights_only=True)["at"]["step"] > state["at"]["step"]
