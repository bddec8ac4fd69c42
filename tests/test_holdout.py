"""What is kept aside is never learnt from, and looking at it leaves no trace."""
import json
import multiprocessing
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from test_trainer import fork, noise

from dualreal.checkpoint import read_adapter
from dualreal.cli import main
from dualreal.core import InputError
from dualreal.data import hold_out, load_case
from dualreal.doctor import case_sheet, check_case
from dualreal.loop import loss_aside
from dualreal.resume import Interrupted
from dualreal.settings import as_flags
from dualreal.toy.bases import tiny_pipeline
from dualreal.trainer import TrainConfig, prepare, train
from dualreal.video import write_video

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")
SIDES = "identity", "motion"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A tiny base, a case of three images and three clips, and the same without the last ones."
    home = tmp_path_factory.mktemp("hold-out")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    tiny_pipeline(home / "tiny", layers=2)
    for folder, count in (("all", 3), ("fewer", 2)):
        (home / folder / "one").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise(32, 32, seed=i)).save(home / folder / f"one/{i}.png")
            write_video(home / folder / f"wave/{i}.gif", noise((5, 9, 9)[i], 32, 32, seed=i))
    return home


def settings(home, out, folder="all", **more):
    known = dict(base=f"{home / 'tiny'}", reference_encoder="none", identity_prompt="cat *", prompts=["cat"],
                 motion_prompt="it is up", steps=6, save_every=2, samples=0, batch_motion=2, batch_identity=2,
                 micro_batch=2, warmup=0, lr=.01, groups=2, rank=2, cache=f"{home / 'cache'}", device="cpu",
                 trackers="none", hold_out=folder == "all", hold_out_every=4)
    return TrainConfig(f"{home / folder / 'one'}", f"{home / folder / 'wave'}", f"{out}", **{**known, **more})


def record(out): return json.loads((Path(out) / "run.json").read_text())
def log(out): return [{k: v for k, v in row.items() if k != "seconds"} for row in record(out)["log"]]


def same(out, other):
    "Whether two finished runs have the same losses and weights, bit for bit."
    a, b = (read_adapter(Path(o) / "adapter.safetensors") for o in (out, other))
    equal = all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
    return log(out) == log(other) and a.tensors.keys() == b.tensors.keys() and equal


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    "A run with an image and a clip aside, that nobody disturbed."
    out = tmp_path_factory.mktemp("whole") / "run"
    train(settings(home, out), progress=False)
    return out


# What it must change, and what not

def test_trains_as_if_they_were_not_there(home, whole, tmp_path):
    "Losses and weights are those of folders without the two; the reference and the words, too."
    train(settings(home, tmp_path / "run", "fewer"), progress=False)
    assert same(whole, tmp_path / "run")
    told = [record(out) for out in (whole, tmp_path / "run")]
    assert told[0]["words"] == told[1]["words"]
    names = [[Path(f).name for f in told[0]["files"][k]] for k in SIDES]
    assert names == [["0.png", "1.png"], ["0.gif", "1.gif"]]
    assert told[1]["hold_out"] is None


def test_without_it_all_is_learnt_from(home, whole, tmp_path):
    "And looking does not change a step: with the same files, but none aside, the first step is another."
    train(settings(home, tmp_path / "run", hold_out=False, steps=1), progress=False)
    assert [len(record(tmp_path / "run")["files"][k]) for k in SIDES] == [3, 3]
    assert log(tmp_path / "run")[0]["loss"] != log(whole)[0]["loss"]


def test_what_is_recorded(home, whole):
    "Before the first step, every so many, and after the last; where each side was lowest."
    found = record(whole)["hold_out"]
    assert [row["step"] for row in found["log"]] == [0, 4, 6]
    assert {k: [Path(f).name for f in files] for k, files in found["files"].items()} == \
        dict(identity=["2.png"], motion=["2.gif"])
    for side in SIDES:
        losses = [row[side] for row in found["log"]]
        assert len({*losses}) == 3 and found["lowest"][side]["loss"] == min(losses)
    state = torch.load(whole / "checkpoints/step-4/state.pt", weights_only=True)
    assert state["held"] == found["log"][:2]


def test_the_same_look_twice(home, tmp_path):
    "Neither the run's numbers nor what learns changes; another seed looks at the same noise and times."
    run = prepare(settings(home, tmp_path / "run"), progress=False)
    (expert,), drawn, weights = run.given.experts, run.generator.get_state(), torch.get_rng_state()
    losses = [[loss_aside(run, side, expert) for side in SIDES] for _ in range(2)]
    assert losses[0] == losses[1] and run.generator.get_state().equal(drawn)
    assert torch.get_rng_state().equal(weights) and all(p.grad is None for p in run.adapter.values())
    other = prepare(settings(home, tmp_path / "other", seed=1, micro_batch=1), progress=False)
    again = [loss_aside(other, side, other.given.experts[0]) for side in SIDES]
    assert again == pytest.approx(losses[0], rel=1e-5)  # an untrained adapter's up layers are zeros


def test_resumed(home, whole, tmp_path):
    "Bit for bit, the curve included; whatever else is looked at on the way."
    def hook(run, row):
        if run.step == 3: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted): train(settings(home, tmp_path / "run"), hook, progress=False)
    train(settings(home, tmp_path / "run", resume=True), progress=False)
    assert same(tmp_path / "run", whole) and record(tmp_path / "run")["hold_out"]["log"] == \
        record(whole)["hold_out"]["log"]


@pytest.mark.slow
def test_with_a_plan_for_the_memory(home, whole, tmp_path):
    "Blocks that are computed twice or streamed are looked through like others."
    train(settings(home, tmp_path / "run", memory="0.0005"), progress=False)
    assert same(tmp_path / "run", whole)
    assert record(tmp_path / "run")["hold_out"]["log"] == record(whole)["hold_out"]["log"]


def test_resumed_otherwise(home, tmp_path):
    "Without it, or with another file aside, it is another run."
    def hook(run, row):
        if run.step == 3: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted): train(settings(home, tmp_path / "run"), hook, progress=False)
    with pytest.raises(InputError, match="was started with hold_out=True, not False"):
        train(settings(home, tmp_path / "run", resume=True, hold_out=False), progress=False)
    shutil.copytree(home / "all", tmp_path / "all")
    Image.fromarray(noise(32, 32, seed=9)).save(tmp_path / "all/one/2.png")
    again = settings(home, tmp_path / "run", resume=True)
    again.identity = f"{tmp_path / 'all/one'}"
    with pytest.raises(InputError, match="other images, clips, masks or captions"):
        train(again, progress=False)


def together(config, processes=2):
    "Train in forked processes that form a group; their exit codes."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = f"{free.getsockname()[1]}"

    def begin(rank):
        os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{processes}", MASTER_PORT=port,
                          LOCAL_WORLD_SIZE=f"{processes}", MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
        AcceleratorState._reset_state(reset_partial_state=True)
        train(config, progress=False)
        os._exit(0)
    group = [multiprocessing.get_context("fork").Process(target=begin, args=(r,)) for r in range(processes)]
    for process in group: process.start()
    for process in group: process.join(120)
    for process in group: process.kill(), process.join()
    return [process.exitcode for process in group]


@fork
def test_two_processes_are_one(home, whole, tmp_path):
    assert together(settings(home, tmp_path / "two")) == [0, 0]
    one, two = (record(out)["hold_out"]["log"] for out in (whole, tmp_path / "two"))
    for a, b in zip(one, two, strict=True): assert a == pytest.approx(b, rel=1e-4)


def test_each_expert_on_its_own_times(tmp_path, home):
    "Of a base with two transformers; the mean stands for both."
    tiny_pipeline(tmp_path / "wan", family="wan", split=.5, layers=2)
    run = tmp_path / "run"
    small = dict(steps=2, groups=1, height=32, width=32)
    train(settings(home, run, base=f"{tmp_path / 'wan'}", **small), progress=False)
    for row in record(run)["hold_out"]["log"]:
        each = row["experts"]
        assert [*each] == ["high", "low"]
        for side in SIDES:
            assert each["high"][side] != each["low"][side]
            assert row[side] == pytest.approx((each["high"][side] + each["low"][side]) / 2)


# Commands

def test_command(home, tmp_path, capsys, monkeypatch):
    "It says what is kept aside, and in the end where the loss was lowest; trackers have the curve."
    rows = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, row, step: rows.append((step, row)))
    assert main(["train", *as_flags(settings(home, tmp_path / "run"))]) == 0
    out = capsys.readouterr().out
    assert "kept aside" in out and "all/one/2.png" in out and "2 images, 2 clips: encoding" in out
    assert "hold-out loss  identity lowest at step" in out
    assert [step for step, row in rows if "hold_out/motion" in row] == [0, 4, 6]
    assert (tmp_path / "run/loss.png").stat().st_size > 1000


def test_too_few(home, tmp_path, capsys):
    "One sentence, before anything is loaded."
    shutil.copytree(home / "fewer", tmp_path / "few")
    (tmp_path / "few/wave/1.gif").unlink()
    words = ["--identity", f"{tmp_path / 'few/one'}", "--motion", f"{tmp_path / 'few/wave'}", "--hold-out",
             "--identity-prompt", "cat *", "--motion-prompt", "it is up", "--base", f"{home / 'tiny'}"]
    assert main(["train", *words, "--out", f"{tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "2 images and 1 clip do not allow: give 2 or more" in said
    assert not (tmp_path / "run").exists()
    assert main(["check", *words, "--frames", "5"]) == 2
    assert "1 clip do not allow" in capsys.readouterr().err


def test_check_advises(home):
    "From eight images and six clips up; with the flag, what is kept aside is named and shown apart."
    case = load_case(home / "all/one", home / "all/wave", "cat *", "it is up")
    many = case.__class__(**{**vars(case), "identity": 3 * case.identity, "motion": 2 * case.motion})
    def texts(case, **how): return [f["text"] for f in check_case(case, 32, 32, 5, **how)["findings"]]
    advice = "9 images and 6 clips are enough to keep one of each aside."
    assert advice in texts(many) and not any("aside" in text for text in texts(case))
    held = texts(many, held=True)
    assert advice not in held and "2.png and 2.gif are kept aside, never trained on." in held
    learnt, aside = hold_out(case)
    sheets = [case_sheet(learnt, 32, 32, 5, cell=32, aside=a) for a in (None, aside)]
    assert sheets[1].size[1] > sheets[0].size[1]


def test_every_is_a_number_of_steps(home, tmp_path):
    with pytest.raises(InputError, match="hold_out_every 0: give at least 1"):
        prepare(settings(home, tmp_path / "run", hold_out_every=0), progress=False)
