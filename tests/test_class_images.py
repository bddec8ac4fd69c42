"""Class images: made once by the base alone, and told in identity steps what the subject's pictures are."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_coupling import Spy
from test_trainer import (  # noqa: F401  home is a fixture
    alike,
    fork,
    home,
    log,
    noise,
    same,
    settings,
    stop_at,
    together,
    trained_together,
)

from dualreal import generate, loop
from dualreal.cli import main
from dualreal.core import InputError
from dualreal.generate import open_pipe
from dualreal.resume import Interrupted
from dualreal.settings import as_flags
from dualreal.switch import COUPLINGS
from dualreal.trainer import prepare, train
from dualreal.video import read_image

@pytest.fixture(scope="module")
def others(tmp_path_factory):
    "Two pictures of the class, of different proportions."
    folder = tmp_path_factory.mktemp("others")
    for i in range(2): Image.fromarray(noise(32, 32 + 8 * i, seed=7 + i)).save(folder / f"{i}.png")
    return folder


def ours(home, others, out, **more):  # noqa: F811
    return settings(home, out, **{**dict(prior=f"{others}", steps=2, save_every=0), **more})


@pytest.fixture(scope="module")
def whole(home, others, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("prior") / "run"
    train(ours(home, others, out), progress=False)
    return out


def test_made_once_by_the_base_alone(home, tmp_path, monkeypatch):  # noqa: F811
    "What `generate` gives of the base without an adapter; a later run finds them in the cache."
    config = settings(home, tmp_path / "run", prior="2", cache=f"{tmp_path / 'cache'}")
    run = prepare(config, progress=False)
    made = [read_image(path) for path in run.given.files["prior"]]
    pipe = open_pipe(base=f"{home / 'tiny'}", device="cpu")
    for seed, picture in enumerate(made):
        again = generate.generate(pipe, "a cat", seed=seed, frames=1, progress=False).frames
        assert np.array_equal(again[0], picture)
    assert {Path(p).parents[1] for p in run.given.files["prior"]} == {tmp_path / "cache"}
    assert not np.array_equal(*made)
    assert [item.prompt for item in run.case.prior] == ["a cat"] * 2
    assert run.pipe.text_encoder is None and str(run.pipe.vae.device) == "cpu"  # left as without them
    def never(*_, **__): raise AssertionError("made again")
    monkeypatch.setattr(generate, "generate_all", never)
    assert prepare(replace(config, seed=7), progress=False).given.files == run.given.files
    with pytest.raises(AssertionError, match="made again"):
        prepare(replace(config, identity_prompt="dog *"), progress=False)


@pytest.mark.parametrize("coupling", ["mutual", "one-way", pytest.param("none", marks=pytest.mark.slow)])
def test_told_what_the_pictures_are_told(home, others, tmp_path, monkeypatch, coupling):  # noqa: F811
    "Who acts, the weight of the loss, and the reference: none, or with one-way each picture's own."
    config = ours(home, others, tmp_path / "run", coupling=coupling, reference_encoder="toy", prior_weight=.5,
                  motion_ratio=.3, steps=6)
    state = prepare(config, progress=False)
    assert state.course.batches["identity"] == {"identity": (2, 1.), "prior": (2, .5)}
    assert state.course.batches["motion"] == {"motion": (3, 1.)}
    case = state.case
    for item in (*case.identity, *case.motion, *case.prior): item.std.zero_()  # latents tell the sample
    factor, told, real = state.pipe.vae.config.scaling_factor, [], loop.prediction_loss

    def noted(transformer, scheduler, latents, text, *rest):
        spy.training.clear()
        loss = real(transformer, scheduler, latents, text, *rest)
        told.append((latents, text, loss.item(), spy.training[0]))
        return loss
    spy, seen = Spy(monkeypatch), set()
    monkeypatch.setattr(loop, "prediction_loss", noted)
    for _ in range(4):
        told.clear()
        row = loop.train_step(state)
        if row["dimension"] == "motion":
            assert all(len(latents[0]) > 1 for latents, *_ in told)
            continue
        (pictures, words, first, by), (others_, class_words, second, also) = told
        assert row["loss"] == pytest.approx(first + .5 * second)
        assert by[0] == also[0] == COUPLINGS[coupling]["identity"]
        items = [next(i for i in case.prior if torch.equal(i.mean * factor, x)) for x in others_]
        assert {i.path for i in items} == set(state.given.files["prior"])
        assert not torch.equal(words[0], class_words[0])
        known = torch.stack([i.reference for i in items])
        assert also[1] is None if coupling != "one-way" else torch.equal(also[1], known)
        assert by[1] is None or coupling == "one-way"
        seen.add(coupling)
    assert seen == {coupling}  # at least one identity step was looked at


def test_the_blend_weight_is_a_mean(home, others, tmp_path):  # noqa: F811
    "Of all samples of a step: without a controller it is half of the scale."
    state = prepare(ours(home, others, tmp_path / "run", controller=False, motion_ratio=0), progress=False)
    assert loop.train_step(state)["identity_weights"] == pytest.approx([.1, .1])


@pytest.mark.slow
def test_off_is_off(home, others, whole, tmp_path):  # noqa: F811
    "Without class images nothing changes with their weight; with them the run is another one, and says so."
    for out, weight in (("a", 1.), ("b", 3.)):
        train(ours(home, others, tmp_path / out, prior=None, prior_weight=weight), progress=False)
    assert same(tmp_path / "a", tmp_path / "b") and not same(tmp_path / "a", whole)
    told = json.loads((whole / "run.json").read_text())
    assert told["config"]["prior"] == f"{others}" and told["config"]["prior_weight"] == 1
    assert [Path(p).name for p in told["files"]["prior"]] == ["0.png", "1.png"]
    assert "prior" not in json.loads((tmp_path / "a/run.json").read_text())["files"]


@pytest.mark.slow
def test_checkpointed(home, others, whole, tmp_path):  # noqa: F811
    train(ours(home, others, tmp_path / "run", gradient_checkpointing=True), progress=False)
    assert same(tmp_path / "run", whole)


@fork
@pytest.mark.slow
def test_two_processes(home, others, whole, tmp_path):  # noqa: F811
    assert together(trained_together, ours(home, others, tmp_path / "two"), tmp_path) == [0, 0]
    assert alike(tmp_path / "two", whole)
    made = ours(home, others, tmp_path / "made", prior="3", cache=f"{tmp_path / 'cache'}")
    assert together(trained_together, made, tmp_path) == [0, 0]  # the first makes them, the second finds them
    train(replace(made, out=f"{tmp_path / 'one'}"), progress=False)
    assert alike(tmp_path / "made", tmp_path / "one")


def test_resumed(home, others, whole, tmp_path):  # noqa: F811
    "Bit for bit, also from a copy of the folder; with others, or none, it is refused."
    config = ours(home, others, tmp_path / "run")
    with pytest.raises(Interrupted): train(config, stop_at(1), progress=False)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    (fewer / "0.png").write_bytes((others / "0.png").read_bytes())
    for prior in (None, f"{fewer}"):
        with pytest.raises(InputError, match="other images, clips, masks or captions"):
            train(replace(config, resume=True, prior=prior), progress=False)
    with pytest.raises(InputError, match="prior_weight=1.0, not 2.0"):
        train(replace(config, resume=True, prior_weight=2.), progress=False)
    (fewer / "1.png").write_bytes((others / "1.png").read_bytes())
    train(replace(config, resume=True, prior=f"{fewer}"), progress=False)
    assert same(config.out, whole) and log(config.out)


@pytest.mark.slow
def test_resumed_on_another_machine(home, tmp_path, monkeypatch):  # noqa: F811
    "The base draws them a little differently there: the run goes on."
    config = settings(home, tmp_path / "run", prior="1", steps=3, save_every=0, cache=f"{tmp_path / 'cache'}")
    with pytest.raises(Interrupted): train(config, stop_at(1), progress=False)
    real = generate.generate_all
    def brighter(*args, **how):
        made = real(*args, **how)
        return [replace(one, frames=one.frames // 2 + 100) for one in made]
    monkeypatch.setattr(generate, "generate_all", brighter)
    train(replace(config, resume=True, cache=f"{tmp_path / 'other'}"), progress=False)
    assert json.loads((tmp_path / "run/run.json").read_text())["log"][-1]["step"] == 3


@pytest.mark.parametrize("prior, says", [
    ("0", "prior 0: give a folder of class images, or at least 1"), ("-3", "at least 1"),
    ("nowhere", "prior nowhere: is neither a folder nor a number of images"),
    ("{empty}", "holds no image"), ("{starred}", "'cat *' holds *, the word of the subject")])
def test_refused(home, tmp_path, capsys, prior, says):  # noqa: F811
    "In a sentence, by both commands, before anything is encoded."
    for name in ("empty", "starred"): (tmp_path / name).mkdir()
    Image.fromarray(noise(32, 32)).save(tmp_path / "starred/0.png")
    (tmp_path / "starred/prompts.txt").write_text("cat *\n")
    prior = prior.format(empty=tmp_path / "empty", starred=tmp_path / "starred")
    config = settings(home, tmp_path / "run", prior=prior)
    assert main(["train", *as_flags(config)]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()
    words = ["--identity", config.identity, "--motion", config.motion, "--base", config.base]
    words += ["--identity-prompt", "cat *", "--motion-prompt", "it is up"]
    assert main(["check", *words, f"--prior={prior}"]) == 2
    assert says in capsys.readouterr().err


def test_checked(home, others, tmp_path, capsys):  # noqa: F811
    "`check` reads a folder's, shows them in the sheet, and tells what the base would make."
    config = settings(home, tmp_path / "run")
    words = ["check", "--identity", config.identity, "--motion", config.motion, "--base", config.base,
             "--identity-prompt", "cat *", "--motion-prompt", "it is up", "--sheet", f"{tmp_path / 'a.png'}"]
    sizes = []
    rows = "class: 2 images\n  0.png      32x32\n  1.png      40x32"
    for more, says in (([], "used as"), (["--prior", f"{others}"], rows),
                       (["--prior", "5"], 'class: 5 images of "a cat", which the base makes')):
        assert main([*words, *more]) == 0
        assert says in capsys.readouterr().out
        sizes.append(Image.open(tmp_path / "a.png").height)
    assert sizes[1] > sizes[0] == sizes[2]
