"""One way to a video: commands, studio, previews and methods draw the same pixels for the same request."""
import json
import time

import numpy as np
import pytest

from dualreal.checkpoint import read_adapter
from dualreal.cli import main
from dualreal.desk import LIVE, end_worker, jobs_of
from dualreal.experiments.baselines import find_method
from dualreal.generate import generate, open_pipe
from dualreal.studio import studio
from dualreal.toy.bases import tiny_pipeline
from dualreal.toy.world import write_case
from dualreal.trainer import TrainConfig, train
from dualreal.video import read_video

PROMPT, SMALL = "a cat * is swinging", '{"reference_encoder": "toy", "rank": 4, "groups": 2, "steps": 2}'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run of four steps on a tiny base; what the table's method draws after the same steps."
    home = tmp_path_factory.mktemp("one-way")
    write_case(home / "case", "teal_cat", "swinging", images=2, clips=2)
    (tiny_pipeline(home / "base", tokens=64) / "dualreal.json").write_text(SMALL)
    folders = (str(home / part) for part in ("case/identity", "case/motion", "runs/one", "base"))
    config = TrainConfig(*folders, steps=4, seed=1, lr=.05, prompts=[PROMPT], samples=1, device="cpu",
                         cache=str(home / "cache"))
    train(config, progress=False)
    method = find_method("dualreal")
    run = method.prepare(config)
    method.train(run)
    frames, weights = method.generate(run, [PROMPT], [1], batch=1)
    return home, frames[0], weights


def test_opened_and_generated_is_what_the_table_draws(made):
    home, frames, weights = made
    adapter = read_adapter(home / "runs/one")
    how = dict(adapter.size, reference=adapter.reference, seed=1, progress=False)
    video = generate(open_pipe(adapter, device="cpu"), PROMPT, **how)
    assert np.array_equal(video.frames, frames) and video.weights.equal(weights) and frames.std() > 1


def parts(widget):
    "A page's widgets, from the top down."
    yield widget
    for child in getattr(widget, "children", ()): yield from parts(child)


def fill(page, **values):
    for widget in parts(page):
        if getattr(widget, "description", None) in values: widget.value = values[widget.description]


def press(page, name, out):
    "Press a button and wait until the worker has done what it asks for."
    next(widget for widget in parts(page) if getattr(widget, "description", None) == name).click()
    end = time.monotonic() + 600
    while any(job["state"] in LIVE for job in jobs_of(out)) and time.monotonic() < end: time.sleep(.1)
    end_worker(out)
    assert [job["state"] for job in jobs_of(out)] == ["done"]


def recorded(path):
    "What a video's record says of its making, and its pixels."
    record = json.loads(path.read_text())
    video = path.with_suffix("")
    told = {k: record[k] for k in ("prompt", "seed", "steps", "frames", "timesteps", "identity_weight")}
    return told, read_video(video)[0]


def test_command_and_studio_draw_what_training_drew(made):
    home, _, _ = made
    told, last = recorded(home / "runs/one/samples/00.mp4.json")
    words = ["generate", "--adapter", home / "runs/one", "--prompt", PROMPT, "--seed", 1, "--device", "cpu"]
    assert main([str(word) for word in (*words, "--out", home / "again.mp4")]) == 0
    page = studio(home / "runs", "cpu")
    fill(page, Prompt=PROMPT, Seed="1")
    press(page, "Make video", home / "runs")
    for path in (home / "again.mp4.json", home / "runs/videos/000.mp4.json"):
        said, frames = recorded(path)
        assert said == told and np.array_equal(frames, last)
