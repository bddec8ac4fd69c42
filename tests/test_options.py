"""All options of training at once: each is tested alone elsewhere; here they meet."""
import json
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image
from test_shapes import home, settings  # noqa: F401  home is a fixture
from test_trainer import fork, log, noise, noted, same, stop_at, together, trained_together

from dualreal.cli import main
from dualreal.generate import generate, open_pipe
from dualreal.resume import Interrupted
from dualreal.settings import CheckConfig, as_flags
from dualreal.trainer import train
from dualreal.video import write_video

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")
EVERYTHING = dict(size="auto", pieces="random", piece_count=2, hold_out=True, hold_out_every=3,
                  mask_weight=.2, motion_mask="inside", prior_weight=.5, ema=.8, lr_schedule="wsd",
                  coupling="one-way", gradient_checkpointing=True, micro_batch=1)


@pytest.fixture(scope="module")
def full(home):  # noqa: F811
    "Masks of a photo and of a clip, and pictures of the class."
    for path, size in ((home / "one/masks/0.png", (48, 24)), (home / "other/0.png", (24, 48)),
                       (home / "other/1.png", (32, 32))):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise(*size, seed=7)).save(path)
    half = noise(27, 48, 24, seed=8) // 2
    half[:, :24] = 255
    write_video(home / "wave/masks/0.gif", half)
    return home


def everything(full, out, **more):
    return settings(full, out, **{**EVERYTHING, "prior": f"{full / 'other'}", **more})


@pytest.fixture(scope="module")
def whole(full, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(everything(full, out, samples=1), progress=False)
    return out


def test_each_has_left_its_mark(whole):
    record = json.loads((whole / "run.json").read_text())
    kept = {Path(p).name for paths in record["hold_out"]["files"].values() for p in paths}
    assert kept == {"2.png", "3.gif"} and [row["step"] for row in record["hold_out"]["log"]] == [0, 3, 6, 8]
    starts = {Path(path).name: found for path, found in record["pieces"].items()}
    assert "3.gif" not in starts and len(starts["0.gif"]) == 2
    assert {b["role"] for b in record["buckets"]} == {"identity", "motion"}
    assert len(record["files"]["prior"]) == 2 and record["config"]["ema"] == .8
    first, last = record["log"][0]["lr"], record["log"][-1]["lr"]
    assert first == record["log"][4]["lr"] > last


def test_resumed(full, whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Interrupted): train(everything(full, out, samples=1), stop_at(5), progress=False)
    train(everything(full, out, samples=1, resume=True), progress=False)
    assert same(out, whole) and log(out) == log(whole)
    kept = [json.loads((run / "run.json").read_text())["hold_out"]["log"] for run in (out, whole)]
    assert kept[0] == kept[1]


def test_gone_on_and_begun_from(full, whole, tmp_path):
    "A longer run, and another one that begins from it: both go through, from the mean that was saved."
    out = tmp_path / "run"
    train(everything(full, out, steps=3), progress=False)
    train(everything(full, out, steps=5, resume=True), progress=False)
    record = json.loads((out / "run.json").read_text())
    assert record["courses"] == [3, 2] and len(record["log"]) == 5
    assert (out / "checkpoints/step-3/run.json").is_file()
    train(everything(full, tmp_path / "other", steps=2, init=f"{out}"), progress=False)
    assert json.loads((tmp_path / "other/run.json").read_text())["init"]["steps_done"] == 5


def test_the_commands(full, whole, tmp_path, capsys):
    "Checked with its sheet, and what was trained makes a video."
    config = everything(full, tmp_path / "run")
    mine = {k: v for k, v in vars(config).items() if k in {f.name for f in fields(CheckConfig)}}
    said = as_flags(CheckConfig(**mine))
    sheet = tmp_path / "sheet.png"
    assert main(["check", *said, "--sheet", f"{sheet}"]) == 0, capsys.readouterr()
    assert sheet.is_file() and "bucket" in capsys.readouterr().out
    made = generate(open_pipe(whole), "cat", steps=2, height=64, width=32, frames=9, progress=False)
    assert made.frames.shape == (9, 64, 32, 3)


@fork
@pytest.mark.slow
def test_two_processes(full, tmp_path):
    how = dict(steps=4, batch_motion=2, micro_batch=2, gradient_checkpointing=False)
    assert together(trained_together, everything(full, tmp_path / "two", **how), tmp_path) == [0, 0]
    train(everything(full, tmp_path / "one", **how), progress=False)
    first, second = noted(tmp_path)
    assert first["rows"] == second["rows"]
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [r["dimension"] for r in one] == [r["dimension"] for r in two]
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(one, two))
