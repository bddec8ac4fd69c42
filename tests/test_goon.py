"""Runs that are made longer, begin from an adapter, keep an average; schedules; a queue of cases."""
import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_trainer import (  # noqa: F401
    command,
    fork,
    home,
    killed,
    log,
    noted,
    numbers,
    same,
    settings,
    stop_at,
    together,
    trained_together,
    weights,
)

from dualreal.checkpoint import read_adapter
from dualreal.cli import main
from dualreal.core import InputError
from dualreal.loop import schedule_of
from dualreal.resume import Interrupted
from dualreal.store import step_folders
from dualreal.trainer import prepare, train

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")


def short(home, out, **more):  # noqa: F811
    "Four steps, each with a checkpoint's worth of luck."
    return settings(home, out, **dict(dict(steps=4, warmup=None, batch_motion=2), **more))


def record(out): return json.loads((Path(out) / "run.json").read_text())
def rates(out): return [row["lr"] for row in log(out)]


def tree(out):
    "What a folder holds, to the last bit."
    return {p.relative_to(out): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()}


@pytest.fixture(scope="module", autouse=True)
def frozen():
    "Or every run would walk through all of torch's objects."
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def ended(home, tmp_path_factory):  # noqa: F811
    "A run of four steps that has ended."
    out = tmp_path_factory.mktemp("ended") / "run"
    train(short(home, out, samples=1), progress=False)
    return out


@pytest.fixture(scope="module")
def longer(home, ended):  # noqa: F811
    "It again, with six steps more."
    out = ended.with_name("longer")
    shutil.copytree(ended, out)
    train(short(home, out, steps=10, resume=True), progress=False)
    return out


# Going on

def test_what_it_made_stays(ended, longer):
    "The first steps are the same ones; what the run had made lies with their last checkpoint, usable."
    aside = longer / "checkpoints/step-4"
    before = tree(ended)
    for name in ("samples/00.mp4", "samples/00.mp4.json", "contact_sheet.png", "loss.png", "run.json"):
        assert (aside / name).read_bytes() == before[Path(name)], name
    assert all(torch.equal(weights(aside)[k], v) for k, v in weights(ended).items())
    assert log(longer)[:4] == log(ended) and len(log(longer)) == 10 and not same(longer, ended)
    assert [p.name for p in step_folders(longer / "checkpoints")] == ["step-10", "step-8", "step-6", "step-4"]
    assert record(longer)["courses"] == [4, 6] and "courses" not in record(ended)
    assert not (longer / "samples").exists()  # none were asked for
    assert main(["inspect", f"{aside}"]) == 0


def test_the_added_steps_are_a_course(ended, longer):
    "Learning rates: of the four as they were, of the six as in a run of six steps, with the same warm-up."
    own = schedule_of(torch.optim.SGD([torch.zeros(1)], lr=1e-3), "cosine_with_restarts", [6], 0)
    assert rates(longer) == rates(ended) + [1e-3 * own.lr_lambdas[0](step) for step in range(6)]
    assert rates(longer)[4] == 1e-3


@pytest.mark.parametrize("first, second", [(3, 7), *(pytest.param(*stops, marks=pytest.mark.slow)
                                                     for stops in ((3, None), (None, 7), (2, 9), (4, 5)))])
def test_when_it_is_asked_for_does_not_matter(home, longer, tmp_path, first, second):  # noqa: F811
    "Stopped before its end, or in the second course: the same losses and weights, bit for bit."
    out = tmp_path / "run"
    if first is None: train(short(home, out), progress=False)
    else:
        with pytest.raises(Interrupted): train(short(home, out), stop_at(first), progress=False)
    more = short(home, out, steps=10, resume=True)
    if second:
        with pytest.raises(Interrupted): train(more, stop_at(second), progress=False)
        more = short(home, out, steps=None, resume=True)  # its own
    train(more, progress=False)
    assert same(out, longer) and record(out)["courses"] == [4, 6]
    assert (out / "checkpoints/step-4/run.json").exists() == (first is None)


def test_nothing_to_add(home, ended, tmp_path, capsys):  # noqa: F811
    "As many steps or fewer: status 0, a sentence, not a byte is touched; also of a run that has not ended."
    out = tmp_path / "run"
    with pytest.raises(Interrupted): train(short(home, out), stop_at(3), progress=False)
    for run, steps, says in ((ended, 4, "finished already"), (ended, 3, "finished already"),
                             (ended, None, "finished already"), (out, 2, "begun with more than 2 steps")):
        before = tree(run)
        assert main(command(short(home, run, steps=steps, resume=True))) == 0
        line, = capsys.readouterr().out.splitlines()
        assert f"{run}: " in line and says in line and line.endswith("nothing to do")
        assert tree(run) == before


def test_no_checkpoint_to_go_on_from(home, ended, tmp_path, capsys):  # noqa: F811
    "Gone: said before PyTorch is asked. Damaged: nothing has moved."
    out = tmp_path / "run"
    shutil.copytree(ended, out)
    for file in (out / "checkpoints").rglob("state.pt"): file.write_bytes(b"half")
    before = tree(out)
    more = command(short(home, out, steps=6, resume=True))
    assert main(more) == 2 and tree(out) == before
    assert "no checkpoint of this run is whole" in capsys.readouterr().err.splitlines()[-1]
    shutil.rmtree(out / "checkpoints")
    assert main(more) == 2
    assert f"begin another run from its adapter with --init {out}" in capsys.readouterr().err
    assert main(command(short(home, out, steps=4, resume=True))) == 0


@pytest.mark.slow
def test_damaged_last_checkpoint(home, ended, longer, tmp_path, capsys):  # noqa: F811
    "It goes back to the one before; what the run had made is not swept away by the new checkpoint."
    out = tmp_path / "run"
    shutil.copytree(ended, out)
    (out / "checkpoints/step-4/state.pt").write_bytes(b"half")
    train(short(home, out, steps=10, resume=True), progress=False)
    assert "step-4: state.pt is damaged" in capsys.readouterr().err and same(out, longer)
    kept = out / "checkpoints/step-4-before"
    assert (kept / "samples/00.mp4").exists() and record(kept)["steps_done"] == 4


POINTS = [pytest.param(i, marks=[pytest.mark.slow] * (i != 5)) for i in range(1, 40)]


@fork
@pytest.mark.parametrize("point", POINTS)
def test_killed_while_it_goes_on(home, ended, longer, tmp_path, point):  # noqa: F811
    "At that call of anything that touches the disk: nothing saved is lost, and it goes on to the same end."
    out = tmp_path / "run"
    shutil.copytree(ended, out)
    killed(short(home, out, steps=10, resume=True), countdown=point)
    aside, names = out / "checkpoints/step-4", ("samples/00.mp4", "contact_sheet.png", "loss.png", "run.json")
    if not (aside / "run.json").exists(): assert tree(ended).items() <= tree(out).items() | {
        (Path("config.json"), tree(ended)[Path("config.json")])}
    for name in names: assert (out / name).exists() or (aside / name).exists(), name
    train(short(home, out, steps=None, resume=True) if point % 2 and (aside / "run.json").exists() else
          short(home, out, steps=10, resume=True), progress=False)
    assert same(out, longer) and not list(out.rglob(".*"))
    for name in names: assert (aside / name).read_bytes() == (ended / name).read_bytes()


# From an adapter

def test_begins_from_an_adapter(home, ended, tmp_path):  # noqa: F811
    "What is taken is taken, the rest is as fresh as ever."
    own, fresh = weights(ended), prepare(short(home, tmp_path / "a", seed=7), progress=False).adapter
    for side, part in (("both", ""), ("identity", ".id_"), ("motion", ".motion_")):
        told = dict(init=f"{ended}", init_side=side, seed=7)
        run = prepare(short(home, tmp_path / side, **told), progress=False)
        for k, p in run.adapter.items(): assert torch.equal(p, own[k] if part in k else fresh[k]), k
        assert (run.origin["side"], run.origin["steps_done"]) == (side, 4)


def test_an_adapter_that_does_not_fit(home, ended, tmp_path, capsys, monkeypatch):  # noqa: F811
    "One sentence, before a weight of the base is read; without --init it would be another run."
    monkeypatch.setattr("dualreal.trainer.load_base", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("dualreal.trainer.load_reference_encoder", lambda *_, **__: pytest.fail("loaded"))
    said = [(dict(init=f"{ended}", rank=3), "was trained with rank 2, and this run has rank 3"),
            (dict(init=f"{ended}", groups=1), "groups 2, and this run has groups 1"),
            (dict(init=f"{ended}", base="toy", rank=2), "made for another base"),
            (dict(init=f"{ended}", init_side="motion", reference_encoder=None), "channels of the reference"),
            (dict(init=f"{tmp_path / 'nowhere'}"), "nowhere: does not exist"),
            (dict(init_side="motion"), "give --init ADAPTER, too")]
    for wrong, says in said:
        assert main(command(short(home, tmp_path / "run", **wrong))) == 2
        line, = [x for x in capsys.readouterr().err.splitlines() if x.startswith("dualreal: ")]
        assert says in line


# Schedules, averages

@pytest.mark.slow
@pytest.mark.parametrize("name, expected", [("constant", [0, 5e-4, *[1e-3] * 8]),
                                            ("wsd", [0, 5e-4, *[1e-3] * 6, 1e-3, 5e-4])])
def test_schedules(home, tmp_path, name, expected):  # noqa: F811
    train(short(home, tmp_path / "run", steps=10, lr_schedule=name), progress=False)
    assert rates(tmp_path / "run") == pytest.approx(expected)
    assert record(tmp_path / "run")["config"]["lr_schedule"] == name


def test_not_another_run(home, ended, tmp_path):  # noqa: F811
    "What changes the steps is not changed on resume, also of a run from before there were such settings."
    out, new = tmp_path / "run", dict(lr_schedule="wsd", ema=.9, init="x")
    shutil.copytree(ended, out)
    for old in (False, True):
        if old: (out / "config.json").write_text(json.dumps(
            {k: v for k, v in json.loads((ended / "config.json").read_text()).items() if k not in new}))
        for k, was in (("lr_schedule", "'cosine_with_restarts'"), ("ema", "0.0"), ("init", "None")):
            with pytest.raises(InputError, match=f"was started with {k}={was}, not"):
                train(short(home, out, steps=6, resume=True, **{k: new[k]}), progress=False)


def test_average(home, ended, tmp_path):  # noqa: F811
    "Steps are the same with it; what is saved is the mean that the formula gives; resumed to the bit."
    one, seen = short(home, tmp_path / "run", ema=.3), []

    def note(run, row):
        seen.append({k: p.detach().clone() for k, p in run.adapter.items()})
    train(one, note, progress=False)
    assert log(one.out) == log(ended) and not same(one.out, ended)
    mean = seen[0]
    for n, now in enumerate(seen[1:], 1):
        share = 1 - min(.3, (1 + n) / (10 + n))
        mean = {k: mean[k].lerp(now[k], share) for k in mean}
    assert all(torch.equal(p, mean[k]) for k, p in weights(one.out).items())
    assert all(torch.equal(p, seen[-1][k]) for k, p in weights(ended).items())
    assert all(torch.equal(p, mean[k]) for k, p in weights(f"{one.out}/checkpoints/step-4").items())


EVERYTHING = dict(ema=.9, lr_schedule="linear", init_side="motion", coupling="one-way", steps=4)


def test_all_of_it_resumes(home, ended, tmp_path):  # noqa: F811
    "Stopped in the second course; what it began from stays known."
    def on(out, **more): return short(home, tmp_path / out, init=f"{ended}", **{**EVERYTHING, **more})
    train(on("whole"), progress=False)
    shutil.copytree(tmp_path / "whole/checkpoints/step-4", tmp_path / "run/checkpoints/step-4")
    train(on("whole", steps=7, resume=True), progress=False)
    with pytest.raises(Interrupted): train(on("run", steps=7, resume=True), stop_at(5), progress=False)
    train(on("run", steps=7, resume=True), progress=False)
    assert same(tmp_path / "run", tmp_path / "whole") and not same(tmp_path / "run", ended)
    origin = record(tmp_path / "run")["init"]
    assert origin == record(tmp_path / "whole")["init"] == read_adapter(tmp_path / "run").info["init"]
    assert (origin["side"], origin["adapter"]) == ("motion", f"{ended}/adapter.safetensors")


@fork
@pytest.mark.slow
def test_two_processes(home, ended, tmp_path):  # noqa: F811
    "They are one, in the second course, too."
    for out, run in (("one", train), ("two", None)):
        for steps, resume in ((4, False), (6, True)):
            c = short(home, tmp_path / out, init=f"{ended}", **{**EVERYTHING, "steps": steps}, resume=resume)
            if run: run(c, progress=False)
            else: assert together(trained_together, c, tmp_path) == [0, 0]
    a, b = (weights(tmp_path / out) for out in ("one", "two"))
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-6)
    first, second = noted(tmp_path)
    assert first["rows"] == second["rows"] and not second["wrote"]
    assert (tmp_path / "two/checkpoints/step-4/run.json").exists()


# A queue

def listed(home, tmp_path, **more):  # noqa: F811
    "Three cases, one without pictures; the command for them."
    one = dict(identity=f"{home / 'one'}", **more)
    rows = [dict(one, name="first"), dict(name="broken", identity=f"{home / 'nowhere'}"),
            dict(one, name="last", **{"batch-motion": 1})]
    (tmp_path / "cases.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [*command(replace(short(home, tmp_path / "runs", steps=2), identity=None)),
            "--cases", f"{tmp_path / 'cases.jsonl'}"]


def test_a_queue(home, tmp_path, capsys, monkeypatch):  # noqa: F811
    "A line each, a table, status 1; a run is what its own command makes; the next start finds it done."
    words = listed(home, tmp_path)
    assert main(words) == 1
    told = capsys.readouterr()
    lines, table = (part.splitlines() for part in told.out.split("\n\n"))
    assert [line.split()[:3] for line in lines] == [
        ["1/3", "broken", "failed"], ["2/3", "first", "done"], ["3/3", "last", "done"]]
    assert table[0].startswith("3 cases: 1 failed, 2 done") and f"{home / 'nowhere'}" in table[2]
    assert told.err.splitlines()[-1].startswith("dualreal: 1 case of 3 failed")
    assert record(tmp_path / "runs/last")["config"]["batch_motion"] == 1
    train(short(home, tmp_path / "alone", steps=2), progress=False)
    assert same(tmp_path / "runs/first", tmp_path / "alone")
    before = tree(tmp_path / "runs")
    monkeypatch.setattr("dualreal.trainer.set_up", lambda *_: pytest.fail("trained again"))
    assert main(words) == 1 and tree(tmp_path / "runs") == before
    assert capsys.readouterr().out.count("before; ") == 2
    assert main([*words, "--lr", ".5"]) == 1 and tree(tmp_path / "runs") == before
    assert capsys.readouterr().out.count("was started with lr=0.001, not 0.5") == 4  # twice each


def test_a_queue_that_cannot_be(home, tmp_path, capsys):  # noqa: F811
    words = listed(home, tmp_path)
    for wrong, says in (("--log x", "--log: is for one run"), ("--workers 0", "workers 0: give at least 1"),
                        ("--cases none.yaml", "none.yaml: cannot be read"), ("--nothing", "unrecognized")):
        assert main([*words, *wrong.split()]) == 2
        assert says in capsys.readouterr().err
    assert main(["train", "--identity", "x"]) == 2 and "--motion, --out" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_failure_lets_go(home, tmp_path, capsys, monkeypatch):  # noqa: F811
    "Of a case that fails on the way nothing is kept but its sentence; the others are trained."
    from dualreal.experiments.queue import Case, run_cases, train_case
    held = []

    def full(config, *_, **__):
        if config.seed != 1: return Path(config.out) / "adapter.safetensors"
        run = torch.zeros(9)
        held.append(weakref.ref(run))
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr("dualreal.trainer.train", full)
    monkeypatch.setattr("dualreal.experiments.queue.what_came", lambda *_: (held[0]() is None and "done", ""))
    cases = [Case(f"{seed}", short(home, tmp_path / f"{seed}", seed=seed)) for seed in (1, 2)]
    assert run_cases(cases, lambda case: train_case(case, sentence=str)) == {"1": "CUDA out of memory"}
    assert "2/2  2  done" in capsys.readouterr().out


def apart(words):
    "A process with its children, in a group of their own; forked, so it is warm."
    os.setsid()
    sys.stderr = sys.stdout = open(os.devnull, "w")
    os._exit(main(words))


@fork
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_queue_goes_on(home, tmp_path, capsys, workers):  # noqa: F811
    "Killed in the middle of a case: the same command does the rest, and the steps that were saved stay."
    words = [*listed(home, tmp_path), "--workers", f"{workers}", "--steps", "40"]
    going = multiprocessing.get_context("fork").Process(target=apart, args=(words,))
    going.start()
    first, deadline = tmp_path / "runs/first/checkpoints", time.time() + 300
    while not (saved := step_folders(first)) and time.time() < deadline: time.sleep(.02)
    os.killpg(going.pid, signal.SIGKILL)
    going.join()
    time.sleep(1)  # workers have groups of their own, and end with it
    assert saved and not (tmp_path / "runs/first/run.json").exists()
    assert main(words) == 1 and "3 cases: 1 failed, 2 done" in capsys.readouterr().out
    train(short(home, tmp_path / "alone", steps=40), progress=False)
    assert same(tmp_path / "runs/first", tmp_path / "alone")
