"""Runs that are killed, stopped, damaged, shared between processes: nothing is lost or silently wrong."""
import gc
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from dualreal import checkpoint, encode
from dualreal.checkpoint import adapter_tensors, read_adapter
from dualreal.cli import main
from dualreal.core import InputError
from dualreal.memory import Plan, compile_blocks
from dualreal.resume import Interrupted, restore
from dualreal.settings import as_flags
from dualreal.store import fingerprint, step_folders
from dualreal.toy.bases import tiny_pipeline
from dualreal.trainer import TrainConfig, prepare, train
from dualreal.video import read_video, write_video

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: workers start from a warm parent")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork")


def noise(*shape, seed=0): return np.random.default_rng(seed).integers(0, 255, (*shape, 3), np.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A tiny base and a case whose clips differ in length."
    home = tmp_path_factory.mktemp("trainer")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    tiny_pipeline(home / "tiny", layers=2)
    (home / "one").mkdir()
    for i in range(3): Image.fromarray(noise(32, 32, seed=i)).save(home / f"one/{i}.png")
    for i in range(3): write_video(home / f"wave/{i}.gif", noise((5, 9, 9)[i], 32, 32, seed=i))
    return home


def settings(home, out, **more):
    known = dict(base=f"{home / 'tiny'}", reference_encoder="none", identity_prompt="cat *", prompts=["cat"],
                 motion_prompt="it is up", steps=8, save_every=2, samples=0, batch_motion=3, batch_identity=2,
                 micro_batch=2, warmup=0, groups=2, rank=2, cache=f"{home / 'cache'}", trackers="none",
                 device="cpu")
    return TrainConfig(f"{home / 'one'}", f"{home / 'wave'}", f"{out}", **{**known, **more})


def command(config):
    "The shell's words for a configuration."
    return ["train", *as_flags(config)]


def weights(out): return read_adapter(Path(out) / "adapter.safetensors").tensors
def numbers(row): return {k: v for k, v in row.items() if k != "seconds"}
def log(out): return [numbers(row) for row in json.loads((Path(out) / "run.json").read_text())["log"]]


def same(out, other):
    "Whether two finished runs have the same losses and weights, bit for bit."
    a, b = weights(out), weights(other)
    return log(out) == log(other) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def alike(out, other):
    "Whether they agree as far as rounding lets them: sums in another order, then Adam."
    a, b = weights(out), weights(other)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-6)
    assert [row["dimension"] for row in log(out)] == [row["dimension"] for row in log(other)]
    for k in ("loss", "grad_norm", "identity_weight"):
        assert np.allclose(*[[row[k] for row in log(o)] for o in (out, other)], rtol=1e-4), k
    return True


def stop_at(step, number=signal.SIGTERM):
    "A hook that asks this process to stop at a step."
    def hook(run, row):
        if run.step == step: signal.raise_signal(number)
    return hook


# Killed at any moment

def worker(config, countdown):
    "Train; with a countdown, die at that call of anything that touches the disk."
    def counted(function):
        def call(*args, **kwargs):
            nonlocal countdown
            countdown -= 1
            if countdown == 0: os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    if countdown is not None:
        for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (torch, "save"),
                             (checkpoint, "save_file")):
            setattr(module, name, counted(getattr(module, name)))
    sys.stderr = open(os.devnull, "w")
    train(config, progress=False)
    os._exit(0)


def killed(config, seconds=None, countdown=None):
    "A worker, forked from this warm process, that is killed; its exit code."
    process = multiprocessing.get_context("fork").Process(target=worker, args=(config, countdown))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    "A run that nobody disturbed."
    out = tmp_path_factory.mktemp("whole") / "run"
    train(settings(home, out), progress=False)
    return out


@pytest.fixture(scope="module")
def seconds(home, whole):
    "How long a worker takes for it, with the same result."
    gc.collect()
    gc.freeze()  # or every worker would walk through all of torch's objects
    start = time.monotonic()
    assert killed(settings(home, whole.with_name("timed"))) == 0
    assert same(whole, whole.with_name("timed"))
    return time.monotonic() - start


@fork
@pytest.mark.parametrize("point", [pytest.param(i, marks=[pytest.mark.slow] * (i >= 4)) for i in range(50)])
def test_killed_and_resumed(home, whole, seconds, tmp_path, point):
    "Even points die at a random moment, odd ones at a random call that touches the disk."
    draw, config = random.Random(point), settings(home, tmp_path / "run")
    code = killed(config, countdown=draw.randint(1, 60)) if point % 2 else \
        killed(config, draw.uniform(.2, 1) * seconds)
    assert code in (0, -signal.SIGKILL)
    train(settings(home, tmp_path / "run", resume=True), progress=False)
    assert same(tmp_path / "run", whole)
    assert not list((tmp_path / "run").rglob(".*"))
    newest = step_folders(tmp_path / "run/checkpoints")[0]
    sums = json.loads((newest / "checksums.json").read_text())
    assert sums and sums == {name: fingerprint(newest / name) for name in sums}


# Asked to stop

@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal(home, whole, tmp_path, capsys, monkeypatch, number, status):
    "The step is finished and saved; one line says so; nothing of the run is lost or changed."
    config = settings(home, tmp_path / "run", save_every=0)
    hook = stop_at(5, number)
    def stopped(config, *_, **__): return train(config, hook, progress=False)
    monkeypatch.setattr("dualreal.trainer.train", stopped)
    assert main(command(config)) == status
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("dualreal: stopped after step 5") and "step-5; continue with --resume" in said
    assert [p.name for p in step_folders(f"{config.out}/checkpoints")] == ["step-5"]
    monkeypatch.undo()
    train(settings(home, config.out, save_every=0, resume=True), progress=False)
    assert same(config.out, whole)


def test_resumed_on_another_machine(home, tmp_path, monkeypatch):
    "No cache, and latents with other last digits: the same files are the same run; another picture is not."
    with pytest.raises(Interrupted): train(settings(home, tmp_path / "run"), stop_at(3), progress=False)
    before = encode.encode_frames
    monkeypatch.setattr(encode, "encode_frames", lambda vae, frames: [t + 1e-6 for t in before(vae, frames)])
    again = settings(home, tmp_path / "run", resume=True, cache=str(tmp_path / "cache"))
    train(again, progress=False)
    assert json.loads((tmp_path / "run/run.json").read_text())["log"][-1]["step"] == 8


def test_the_last_step_is_always_kept(home, tmp_path, monkeypatch):
    "Memory runs out at the final videos: it is said what to do, and the resumed run trains no step again."
    config = settings(home, tmp_path / "run", save_every=0, samples=1)
    def full(*_, **__): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr("dualreal.trainer.generate_all", full)
    with pytest.raises(RuntimeError, match="out of memory.*can be continued with --resume"):
        train(config, progress=False)
    monkeypatch.undo()
    train(replace(config, resume=True), lambda *_: pytest.fail("trained"), progress=False)


def test_another_device_in_one_process(home, tmp_path, monkeypatch):
    "Accelerate would silently keep to the first."
    train(settings(home, tmp_path / "run", steps=1), progress=False)
    monkeypatch.setattr("dualreal.trainer.pick_device", lambda name: torch.device("meta"))
    with pytest.raises(InputError, match="device meta: this process has trained on cpu before"):
        train(settings(home, tmp_path / "other", steps=1), progress=False)


def test_handlers_are_given_back(home, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted): train(settings(home, tmp_path / "run"), stop_at(1), progress=False)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


# Damaged

@pytest.fixture(scope="module")
def stopped(home, tmp_path_factory):
    "A run that was stopped, with checkpoints 2, 4 and 6; one more process of it, prepared."
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted): train(settings(home, out), stop_at(6), progress=False)
    return out, prepare(settings(home, out), progress=False)


def flipped(path, at=.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def cut(path): path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
def emptied(path): path.write_bytes(b"")
def of_another_kind(path): path.write_text("[1, 2]\n")
def removed(path): shutil.rmtree(path) if path.is_dir() else path.unlink()
def hollow(path): removed(path), path.mkdir()
def older(path): removed(path), shutil.copytree(path.with_name("step-2"), path)
def to_nowhere(path): path.write_text('{"checkpoint": "step-99", "checksum": "0"}')
def to_elsewhere(path): path.write_text('{"checkpoint": "../../step-6", "checksum": "0"}')


TORN = [(spoil, f"step-6/{name}", "step-4", ("step-6", name)) for spoil in (cut, emptied, flipped, removed)
        for name in ("state.pt", "adapter.safetensors")]
TORN += [(spoil, "step-6/checksums.json", "step-4", ("step-6",))
         for spoil in (cut, emptied, flipped, removed)]
TORN += [(of_another_kind, "step-6/checksums.json", "step-4", ("step-6", "checksums.json")),
         (hollow, "step-6", "step-4", ("step-6", "missing")),
         (older, "step-6", "step-4", ("step-6", "latest")),
         (removed, "step-6", "step-4", ("step-6", "missing")), (to_nowhere, "latest", "step-6", ("step-99",))]
TORN += [(spoil, "latest", "step-6", ("latest",))
         for spoil in (cut, emptied, removed, of_another_kind, to_elsewhere)]


@pytest.mark.parametrize("spoil, where, used, said", TORN, ids=lambda v: getattr(v, "__name__", None))
def test_torn_checkpoint(stopped, tmp_path, capsys, spoil, where, used, said):
    "Never a traceback and never a wrong resume: the newest whole one, and a warning that names the other."
    out, run = stopped
    shutil.copytree(out, tmp_path / "run")
    spoil(tmp_path / "run/checkpoints" / where)
    run.config.out = f"{tmp_path / 'run'}"
    assert restore(run).name == used and run.step == int(used[5:]) == len(run.log)
    expected = read_adapter(out / "checkpoints" / used).tensors
    assert all(torch.equal(p, expected[k]) for k, p in adapter_tensors(run.pipe.transformer).items())
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and all(word in err for word in said), err


def test_nothing_whole_is_a_fresh_start(home, stopped, whole, tmp_path, capsys):
    shutil.copytree(stopped[0], tmp_path / "run")
    for file in (tmp_path / "run/checkpoints").rglob("state.pt"): flipped(file)
    train(settings(home, tmp_path / "run", resume=True), progress=False)
    err = capsys.readouterr().err
    assert "starting afresh" in err and all(f"step-{n}" in err for n in (2, 4, 6))
    assert same(tmp_path / "run", whole)


def test_damaged_settings(home, stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "run")
    path = tmp_path / "run/config.json"
    for text in ("{", "[1, 2]"):
        path.write_text(text)
        with pytest.raises(InputError, match="config.json: damaged"):
            train(settings(home, tmp_path / "run", resume=True), progress=False)
    path.unlink()  # the checkpoint knows them, too
    with pytest.raises(InputError, match="lr=0.001, not 0.5"):
        train(settings(home, tmp_path / "run", resume=True, lr=.5), progress=False)


def test_rotation(home, tmp_path):
    "The newest N stay; the one just written always does."
    train(settings(home, tmp_path / "run", save_every=1, keep=2), progress=False)
    assert [p.name for p in step_folders(tmp_path / "run/checkpoints")] == ["step-8", "step-7"]


# Not a number

@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e6])
def test_a_ruinous_step_is_not_taken(home, whole, tmp_path, monkeypatch, factor):
    from dualreal import loop
    loss, run = loop.prediction_loss, []

    def noted(state, row): run[:] = [state]
    def poisoned(*args): return loss(*args) * (factor if run and run[0].step == 5 else 1)
    monkeypatch.setattr(loop, "prediction_loss", poisoned)
    with pytest.raises(FloatingPointError, match="step 6 .* was not taken.*good checkpoint is .*step-4"):
        train(settings(home, tmp_path / "run"), noted, progress=False)
    assert run[0].step == 5
    assert all(p.isfinite().all() for p in adapter_tensors(run[0].pipe.transformer).values())
    assert all(v.isfinite().all() for state in run[0].optimizer.state.values() for v in state.values())
    monkeypatch.undo()
    train(settings(home, tmp_path / "run", resume=True), progress=False)
    assert same(tmp_path / "run", whole)


# Memory

LITTLE = "0.0005"  # GiB: one of two blocks is checkpointed


@pytest.mark.parametrize("memory, kept", [("auto", dict(everything=2)), (LITTLE, dict(attention=1)),
                                          ("stream", dict(streamed=2))])
def test_a_plan_changes_nothing(home, whole, tmp_path, capsys, monkeypatch, memory, kept):
    "Losses and weights are those of the run without one, bit for bit (streamed: to rounding)."
    if memory == "stream":  # with two blocks it never pays, so the planner does not
        stream = Plan(2, attention=1, offload=True, streamed=2, budget=1, parts=(("all", 1),))
        monkeypatch.setattr("dualreal.memory.plan", lambda *args: stream)
    train(settings(home, tmp_path / "run", memory="auto" if memory == "stream" else memory))
    assert "predicted peak" in capsys.readouterr().out
    assert (alike if memory == "stream" else same)(tmp_path / "run", whole)
    plan = json.loads((tmp_path / "run/run.json").read_text())["plan"]
    assert {k: plan[k] for k in kept} == kept and 0 < plan["bytes"] <= plan["budget"]


TRACED = [pytest.param(memory, "aot_eager", marks=pytest.mark.slow) for memory in (None, LITTLE)]


@pytest.mark.parametrize("memory, backend", [(None, None), *TRACED])
def test_compiled(home, whole, tmp_path, monkeypatch, memory, backend):
    "A run may go on with compiled blocks (traced only: no C++ compiler is needed here)."
    traced = []
    def as_traced(transformer, **how):
        traced.append(how)
        if backend: compile_blocks(transformer, backend=backend, **how)
    monkeypatch.setattr("dualreal.memory.compile_blocks", as_traced)
    with pytest.raises(Interrupted): train(settings(home, tmp_path / "run", memory=memory), stop_at(3))
    assert not traced
    train(settings(home, tmp_path / "run", memory=memory, resume=True, compile=True), progress=False)
    assert traced == [dict(dynamic=False)] and alike(tmp_path / "run", whole)


def test_memory_may_change(home, whole, tmp_path):
    with pytest.raises(Interrupted): train(settings(home, tmp_path / "run"), stop_at(3), progress=False)
    train(settings(home, tmp_path / "run", resume=True, memory=LITTLE), progress=False)
    assert same(tmp_path / "run", whole)


@pytest.mark.parametrize("memory, says", [(None, "out of memory: try --memory auto"),
                                          ("24", "25.8 GB were predicted: try --memory 16")])
def test_out_of_memory(home, whole, tmp_path, capsys, monkeypatch, memory, says):
    "One line says which setting would fit; the run can be continued with it."
    from dualreal import loop
    step = loop.train_step

    def full(run):
        if run.step == 5: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return step(run)
    monkeypatch.setattr(loop, "train_step", full)
    config = settings(home, tmp_path / "run", memory=memory)
    assert main(command(config)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dualreal: out of memory") and says in line and "--resume" in line
    monkeypatch.undo()
    train(settings(home, tmp_path / "run", resume=True, memory=LITTLE), progress=False)
    assert same(tmp_path / "run", whole)


def test_fp8_is_another_run(home, whole, tmp_path, capsys):
    "Said to be approximate, near, and not to be mixed with an exact one."
    train(settings(home, tmp_path / "run", fp8=True))
    assert "fp8 weights (approximate)" in capsys.readouterr().out
    losses = [[row["loss"] for row in log(out)] for out in (tmp_path / "run", whole)]
    assert losses[0] != losses[1] and np.allclose(*losses, rtol=.1)
    begun = settings(home, tmp_path / "two", fp8=True)
    with pytest.raises(Interrupted): train(begun, stop_at(3), progress=False)
    with pytest.raises(InputError, match="fp8=True, not False"):
        train(settings(home, tmp_path / "two", resume=True), progress=False)


# Several processes

def together(function, *args, processes=2, limit=120):
    "Run `function(rank, *args)` in forked processes that form a group; their exit codes."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = f"{free.getsockname()[1]}"

    def begin(rank):
        os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{processes}", MASTER_PORT=port,
                          LOCAL_WORLD_SIZE=f"{processes}", MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
        AcceleratorState._reset_state(reset_partial_state=True)
        function(rank, *args)
        os._exit(0)
    group = [multiprocessing.get_context("fork").Process(target=begin, args=(r,)) for r in range(processes)]
    for process in group: process.start()
    for process in group: process.join(limit)
    hanging = [process.is_alive() for process in group]
    for process in group: process.kill(), process.join()
    assert not any(hanging), "the processes wait for each other"
    return [process.exitcode for process in group]


def trained_together(rank, config, notes, stop=None):
    "Train; note rows, random numbers and, of the second process, whatever it wrote."
    seen, replace, fsync = dict(rows=[], drawn=[], wrote=[], status=0), os.replace, os.fsync

    def hook(run, row):
        if run.step == 1: torch.manual_seed(rank)  # processes may well draw numbers of their own
        seen["drawn"].append(torch.rand(1).item())
        seen["rows"].append(numbers(row))
        if stop and (run.step, rank) == stop: signal.raise_signal(signal.SIGTERM)
    os.replace = lambda a, b: seen["wrote"].append(str(b)) or replace(a, b)
    os.fsync = lambda fd: fsync(fd)
    try: train(config, hook, progress=False)
    except Interrupted as e: seen["status"] = e.status
    (notes / f"{rank}.json").write_text(json.dumps(seen))


def noted(notes): return [json.loads((notes / f"{rank}.json").read_text()) for rank in (0, 1)]


@fork
@pytest.mark.parametrize("more", [dict(), dict(motion_ratio=1., micro_batch=3), dict(gradient_mask=False),
                                  dict(batch_identity=1, batch_motion=1, controller=False),
                                  dict(coupling="one-way", reference_encoder="toy"), dict(coupling="none")],
                         ids=["as published", "clips of many lengths", "unmasked", "an idle process",
                              "one-way", "none"])
def test_two_processes_are_one_run(home, tmp_path, more):
    "The same dimensions, losses, gradients and weights as one process; only the first writes."
    train(settings(home, tmp_path / "one", **more), progress=False)
    assert together(trained_together, settings(home, tmp_path / "two", **more), tmp_path) == [0, 0]
    assert alike(tmp_path / "one", tmp_path / "two")
    first, second = noted(tmp_path)
    assert first["rows"] == second["rows"] and first["wrote"] and not second["wrote"]


@fork
def test_two_processes_resume(home, tmp_path):
    "One of two is told to stop: both do, after the same step. Each draws on where it stood."
    config = dict(save_every=0, steps=6)
    together(trained_together, settings(home, tmp_path / "whole", **config), tmp_path)
    unbroken = noted(tmp_path)
    together(trained_together, settings(home, tmp_path / "run", **config), tmp_path, (3, 1))
    first = noted(tmp_path)
    assert [seen["status"] for seen in first] == [143, 143]
    assert [p.name for p in step_folders(tmp_path / "run/checkpoints")] == ["step-3"]
    again = settings(home, tmp_path / "run", resume=True, **config)
    assert together(trained_together, again, tmp_path) == [0, 0]
    assert same(tmp_path / "run", tmp_path / "whole")
    for before, after, all_of in zip(first, noted(tmp_path), unbroken):
        assert before["drawn"] + after["drawn"] == all_of["drawn"]
    assert unbroken[0]["drawn"] != unbroken[1]["drawn"]


@fork
def test_another_number_of_processes_continues(home, whole, tmp_path):
    with pytest.raises(Interrupted): train(settings(home, tmp_path / "run"), stop_at(3), progress=False)
    assert together(trained_together, settings(home, tmp_path / "run", resume=True), tmp_path) == [0, 0]
    assert alike(tmp_path / "run", whole)


@pytest.mark.slow
def test_accelerate_launch(home, tmp_path):
    "The command of the documentation, from a fresh shell."
    c = settings(home, tmp_path / "run")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m",
              "dualreal.cli"]
    done = subprocess.run([*launch, *command(c)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter ") == 1 and len(log(c.out)) == 8


def test_sharding_is_refused(home, tmp_path, monkeypatch):
    from accelerate.utils import DistributedType
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.FSDP)
    with pytest.raises(InputError, match="set up for FSDP"): prepare(settings(home, tmp_path / "run"))


# Watching

def test_a_preview_can_be_made_again(home, tmp_path):
    "The same pixels, by the command, from the adapter beside it."
    train(settings(home, tmp_path / "run", steps=4, save_every=0, preview_every=2, lr=.05), progress=False)
    folder = tmp_path / "run/previews/step-2"
    record = json.loads((folder / "00.mp4.json").read_text())
    assert main(["generate", "--adapter", f"{folder}", "--prompt", record["prompt"], "--device", "cpu",
                 "--seed", f"{record['seed']}", "--out", f"{tmp_path / 'again.mp4'}"]) == 0
    frames, again = (read_video(path)[0] for path in (folder / "00.mp4", tmp_path / "again.mp4"))
    weight, made = "identity_weight", json.loads((tmp_path / "again.mp4.json").read_text())
    assert {k: made[k] for k in record} == record and made[weight]
    assert np.array_equal(frames, again)
    bias = "controller.fusion_net.3.bias"
    assert not torch.equal(*[weights(path)[bias] for path in (folder, tmp_path / "run")])


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_upright(home, tmp_path, fit):
    "Another shape than the base's own, standing: in training, in its videos, in the command."
    size = dict(height=48, width=32, fit=fit, fps=8.)
    train(settings(home, tmp_path / "run", steps=1, samples=1, **size), progress=False)
    assert read_video(tmp_path / "run/samples/00.mp4")[0].shape[1:] == (48, 32, 3)


def told(run, folder):
    "Numbers for a preview, from what lies in its folder; the best step is 4."
    assert (folder / "00.mp4").exists() and (folder / "adapter.safetensors").exists()
    return dict(identity=run.step / 8, motion=1 - run.step / 8, text=.3)


def test_the_best_step_stays(home, whole, tmp_path, capsys, monkeypatch):
    "Rows, picture and adapter outlive rotation; scoring changes nothing of the run."
    run = tmp_path / "run"
    monkeypatch.setattr("dualreal.evaluate.preview_scorer", lambda *how: told)
    words = as_flags(settings(home, run, preview_every=2, keep=1))
    assert main(["train", *words, "--score-previews"]) == 0
    assert same(run, whole)
    record = json.loads((run / "run.json").read_text())
    assert [row["step"] for row in record["scores"]] == [2, 4, 6, 8] and record["best"]["step"] == 4
    assert json.loads((run / "previews/scores.json").read_text()) == record["scores"]
    assert Image.open(run / "tradeoff.png").size > (100, 100)
    assert [p.name for p in step_folders(run / "checkpoints")] == ["step-8"]
    assert len(list(run.glob("*.safetensors"))) == 1
    line = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert line[:2] == ["dualreal", "generate"] and main([*line[1:-1], f"{tmp_path / 'a.gif'}"]) == 0
    assert read_adapter(run / "previews/step-4").info["steps_done"] == 4


@pytest.mark.parametrize("when", ["score", pytest.param("save", marks=pytest.mark.slow)])
def test_scores_survive(home, tmp_path, when):
    "Killed between a checkpoint and its preview, or later: the same rows in the end."
    def fragile(run, folder):
        if run.step == 4: raise KeyboardInterrupt
        return told(run, folder)
    config = dict(preview_every=2, save_every=4 if when == "score" else 3)
    train(settings(home, tmp_path / "whole", **config), progress=False, score=told)
    with pytest.raises(KeyboardInterrupt):
        train(settings(home, tmp_path / "run", **config), progress=False, score=fragile)
    train(settings(home, tmp_path / "run", resume=True, **config), progress=False, score=told)
    assert same(tmp_path / "run", tmp_path / "whole")
    records = [json.loads((tmp_path / out / "run.json").read_text()) for out in ("run", "whole")]
    assert records[0]["scores"] == records[1]["scores"] and len(records[0]["scores"]) == 4


def test_tensorboard(home, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(settings(home, tmp_path / "run", trackers=None), progress=False)
    seen = events.EventAccumulator(f"{tmp_path / 'run/logs/dualreal'}").Reload()
    for dimension in ("identity", "motion"):
        told = [(e.step, e.value) for e in seen.Scalars(f"loss/{dimension}")]
        rows = [r for r in log(tmp_path / "run") if r["dimension"] == dimension]
        assert told == [(r["step"], pytest.approx(r["loss"], rel=1e-5)) for r in rows]


@pytest.mark.parametrize("name, says", [("mlflow", "tracker 'mlflow'"), ("wandb", "pip install wandb")])
def test_unknown_tracker(home, tmp_path, monkeypatch, name, says):
    monkeypatch.setattr("dualreal.settings.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=says): prepare(settings(home, tmp_path / "run", trackers=name))
