"""Masks: the same way as their pictures, by area on the latent grid, and nothing where they do not count."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
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

from dualreal import loop
from dualreal.backbone import load_base
from dualreal.cli import main
from dualreal.core import InputError
from dualreal.data import Item, load_case, read_item
from dualreal.encode import encode_frames
from dualreal.family import families, family_of
from dualreal.masks import Masking, masking_of
from dualreal.objective import prediction_error
from dualreal.resume import Interrupted
from dualreal.settings import TrainConfig
from dualreal.toy.bases import tiny_pipeline
from dualreal.trainer import prepare, train
from dualreal.video import write_video

both_families = pytest.mark.parametrize("name", ["cogvideox", "wan"])


def grey(frames, height, width):
    "Random tones in squares of 10 pixels, which survive a film's compression."
    tones = np.random.default_rng(0).integers(0, 256, (frames, height // 10, width // 10), np.uint8)
    return tones.repeat(10, 1).repeat(10, 2)


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def frames_of(path, clip):
    for i, frame in enumerate(clip): save(path / f"{i:02}.png", frame)


@pytest.fixture(scope="module")
def masked(home, tmp_path_factory):  # noqa: F811
    "The trainer's case with masks: of every image but the last, of every clip, in all three forms."
    case = tmp_path_factory.mktemp("masked")
    for i in range(3): save(case / f"one/{i}.png", noise(32, 32, seed=i))
    for i in range(3): write_video(case / f"wave/{i}.gif", noise((5, 9, 9)[i], 32, 32, seed=i))
    half, left = np.zeros((32, 32), np.uint8), np.zeros((9, 32, 32), np.uint8)
    half[8:20, 4:22], left[:, :, :12], left[3:, 8:] = 255, 255, 0
    for i in range(2): save(case / f"one/masks/{i}.png", np.roll(half, 5 * i, 0))
    save(case / "wave/masks/0.png", half)
    frames_of(case / "wave/masks/1", left)
    write_video(case / "wave/masks/2.mp4", np.repeat(left[..., None], 3, -1))
    return case


def ours(home, masked, out, **more):  # noqa: F811
    known = dict(mask_weight=0., steps=2, save_every=0)
    config = settings(home, out, **{**known, **more})
    return replace(config, identity=f"{masked / 'one'}", motion=f"{masked / 'wave'}")


# The grid

@both_families
def test_laid_out_as_the_latents(tmp_path, name):
    "White pixels lie in the cells that the family's VAE makes of them, and nowhere else."
    tiny_pipeline(tmp_path / "base", layers=1, family=name)
    pipe = load_base(tmp_path / "base", "cpu", torch.float32)
    family, config, own = family_of(pipe), pipe.vae.config, pipe.transformer.config
    pixels = torch.zeros(9, 32, 32)
    pixels[0, :16, :16], pixels[5:9, 16:, :] = 1, 1  # the first frame, and the last four
    mean, _ = encode_frames(pipe.vae, np.zeros((9, 32, 32, 3), np.uint8))
    cells = family.pooled(config, pixels)
    assert family.latent_size(own, cells) == family.latent_size(own, mean)
    assert (cells * torch.ones_like(mean)).shape == mean.shape and cells.numel() * 4 == mean.numel()
    plain = cells.squeeze()  # (3, 4, 4): one channel, wherever it lies
    expected = torch.zeros(3, 4, 4)
    expected[0, :2, :2], expected[2, 2:] = 1, 1
    assert torch.equal(plain, expected)
    still, _ = encode_frames(pipe.vae, np.zeros((1, 32, 32, 3), np.uint8))
    assert (family.pooled(config, pixels[:1]) * torch.ones_like(still)).shape == still.shape


@both_families
def test_by_area(name):
    "Half a cell counts half, one of four frames a quarter; by hand."
    config = dict(temporal_compression_ratio=4, block_out_channels=(1, 1), scale_factor_temporal=4,
                  scale_factor_spatial=2)
    pixels = torch.zeros(5, 2, 4)
    pixels[0, 0, 0], pixels[1, :, 2:] = 1, 1
    assert families()[name].pooled(config, pixels).flatten().tolist() == [.25, 0, 0, .25]


@both_families
def test_the_weighted_mean(name):
    "All weights 1: bit for bit the plain one. Else by hand; where a weight is 0 nothing is seen."
    family = families()[name]
    scheduler, draw = family.own_scheduler(), torch.Generator().manual_seed(0)
    shape, cells = (2, 3, 4, 2, 2), (2, 3, 1, 2, 2)
    if name == "wan": shape, cells = (2, 4, 3, 2, 2), (2, 1, 3, 2, 2)
    given = [torch.randn(shape, generator=draw) for _ in range(3)]
    times = torch.tensor([200, 700])
    plain = prediction_error(family, scheduler, *given, times)
    assert torch.equal(plain, prediction_error(family, scheduler, *given, times, torch.ones(cells)))
    mask = (torch.rand(cells, generator=draw) > .5).float()
    weight = torch.stack([Masking(0, {}).weights(Item(Path("a.png"), "image", ""), m) for m in mask])
    error = (given[0] - family.target(scheduler, given[1], given[2], times)).square()
    wide = mask.expand(error.shape)
    by_hand = sum((e * w).sum() / w.sum() for e, w in zip(error, wide)) / 2  # each sample counts alike
    torch.testing.assert_close(prediction_error(family, scheduler, *given, times, weight), by_hand)
    spoilt = given[0] + 100 * (1 - mask)
    assert torch.equal(prediction_error(family, scheduler, spoilt, *given[1:], times, weight),
                       prediction_error(family, scheduler, *given, times, weight))


# Reading

@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("form", ["frames", "video", "alpha", "picture"])
def test_the_same_way_as_the_picture(tmp_path, fit, form):
    "A clip whose red is its mask: after scaling, cropping, padding and thinning both are still the same."
    masks = grey(18, 40, 70)
    if form == "picture": masks[:] = masks[0]
    clip = np.stack([masks] * 3, -1)
    if form == "alpha": clip = np.concatenate([clip, masks[..., None]], -1)
    frames_of(tmp_path / "wave/a", clip)
    if form == "frames": frames_of(tmp_path / "wave/masks/a", masks)
    if form == "picture": save(tmp_path / "wave/masks/a.png", masks[0])
    if form == "video": write_video(tmp_path / "wave/masks/a.mp4", clip)
    save(tmp_path / "one/0.png", clip[0, ..., :3])
    case = load_case(tmp_path / "one", tmp_path / "wave", "cat *", "it is up")
    how = dict(height=32, width=32, max_frames=9, fps=4, fit=fit, step=4)
    read = Masking(0, how).read(case.motion[0])
    assert read.shape == (9, 32, 32) and read.dtype == np.float32
    if form == "alpha":  # the picture itself is laid over white there
        masks = np.stack([masks] * 3, -1)
        frames_of(tmp_path / "plain", masks)
        case = replace(case, motion=[replace(case.motion[0], path=tmp_path / "plain")])
    seen = read_item(case.motion[0], **how)[..., 0] / 255
    assert np.abs(read - seen).max() < (.06 if form == "video" else 1e-6)


def test_alpha_counts_only_when_asked(home, tmp_path):  # noqa: F811
    "An image that is cut out; a file of its name wins; opaque alpha says nothing."
    cut = np.concatenate([noise(32, 32), np.full((32, 32, 1), 255, np.uint8)], -1)
    save(tmp_path / "one/1.png", cut)
    cut[:, 16:, 3] = 0
    save(tmp_path / "one/0.png", cut)
    config = replace(settings(home, tmp_path / "run", steps=1), identity=f"{tmp_path / 'one'}")
    off = prepare(config, progress=False).case.identity
    on = prepare(replace(config, mask_weight=.5), progress=False).case
    assert [item.weight for item in off] == [None, None] and on.identity[1].weight is None
    assert on.identity[0].weight[0, 0].tolist() == [pytest.approx([4 / 3, 4 / 3, 2 / 3, 2 / 3])] * 4
    assert [item.source for item in off] == [item.source for item in on.identity]
    assert torch.equal(off[0].mean, on.identity[0].mean)
    save(tmp_path / "one/masks/0.png", np.full((32, 32), 255, np.uint8))
    now = prepare(replace(config, mask_weight=.5), progress=False).case.identity
    assert now[0].weight.unique().tolist() == [1] and now[0].source != off[0].source


def test_what_counts_less_in_motion(home, masked, tmp_path):  # noqa: F811
    "Turned round for clips alone; the sum of both is everything, and each has a mean of 1."
    first, second = (prepare(ours(home, masked, tmp_path / w, motion_mask=w), progress=False).case
                     for w in ("outside", "inside"))
    for a, b in zip(first.identity, second.identity):
        assert (a.weight is b.weight is None) or torch.equal(a.weight, b.weight)
    assert [a.weight is None for a in first.identity] == [False, False, True]
    for a, b in zip(first.motion, second.motion):
        share = 1 / a.weight.max()  # of the mask; its largest cell lies inside
        torch.testing.assert_close(a.weight * share + b.weight * (1 - share), torch.ones_like(a.weight))
        assert a.weight.mean().item() == pytest.approx(1) and b.weight.mean().item() == pytest.approx(1)


# Training

@pytest.fixture(scope="module")
def runs(home, masked, tmp_path_factory):  # noqa: F811
    "Runs with masks outside of which the loss counts as inside, 1, or 0."
    out, settings_of = tmp_path_factory.mktemp("runs"), dict(
        off=dict(mask_weight=None), one=dict(mask_weight=1.), zero={})
    for name, more in settings_of.items(): train(ours(home, masked, out / name, **more), progress=False)
    return out


def test_nothing_where_they_do_not_count(home, runs, tmp_path):  # noqa: F811
    "Masks beside the files, and masks that count 1, are a run without masks, bit for bit; 0 is another one."
    train(settings(home, tmp_path / "bare", steps=2, save_every=0), progress=False)
    assert same(runs / "off", tmp_path / "bare") and same(runs / "one", runs / "off")
    assert not same(runs / "zero", runs / "off")
    told = json.loads((runs / "zero/run.json").read_text())
    for where in (told["config"], told["training"]):
        assert (where["mask_weight"], where["motion_mask"], where["masks"]) == (0, "outside", "files")


@pytest.mark.slow
def test_only_what_is_inside_is_learnt(home, masked, tmp_path, monkeypatch):  # noqa: F811
    "What the transformer is to predict outside may be anything: no gradient sees it."
    seen, real = [], loop.prediction_loss
    def spoilt(transformer, scheduler, latents, text, times, noise, positions, weight):
        if weight is not None: noise = noise + 1e3 * (weight == 0) * seen[0]
        return real(transformer, scheduler, latents, text, times, noise, positions, weight)
    monkeypatch.setattr(loop, "prediction_loss", spoilt)
    monkeypatch.setattr("dualreal.cogvideox.CogVideoX.noised", lambda self, s, latents, noise, times: latents)
    for factor in (0, 1):
        seen[:] = [factor]
        save(masked / "one/masks/2.png", np.eye(32, dtype=np.uint8) * 255)
        train(ours(home, masked, tmp_path / f"{factor}", motion_ratio=.5), progress=False)
    (masked / "one/masks/2.png").unlink()
    assert same(tmp_path / "0", tmp_path / "1")


def test_checkpointed(home, masked, runs, tmp_path):  # noqa: F811
    train(ours(home, masked, tmp_path / "thrifty", gradient_checkpointing=True), progress=False)
    assert same(tmp_path / "thrifty", runs / "zero")


@pytest.mark.slow
def test_in_other_parts(home, masked, runs, tmp_path):  # noqa: F811
    train(ours(home, masked, tmp_path / "parts", micro_batch=1), progress=False)
    assert alike(tmp_path / "parts", runs / "zero")


@fork
@pytest.mark.slow
def test_two_processes(home, masked, runs, tmp_path):  # noqa: F811
    config = ours(home, masked, tmp_path / "two")
    assert together(trained_together, config, tmp_path) == [0, 0]
    assert alike(tmp_path / "two", runs / "zero")


def test_resumed(home, masked, runs, tmp_path):  # noqa: F811
    "Bit for bit; with another weight, other masks, or none it is refused."
    config = ours(home, masked, tmp_path / "run")
    with pytest.raises(Interrupted): train(config, stop_at(1), progress=False)
    again = replace(config, resume=True)
    for wrong, says in ((dict(mask_weight=.5), "mask_weight=0.0, not 0.5"),
                        (dict(mask_weight=None), "mask_weight=0.0, not None"),
                        (dict(motion_mask="inside"), "motion_mask='outside', not 'inside'")):
        with pytest.raises(InputError, match=says): train(replace(again, **wrong), progress=False)
    kept = (masked / "one/masks/1.png").read_bytes()
    try:
        save(masked / "one/masks/1.png", np.full((32, 32), 255, np.uint8))
        with pytest.raises(InputError, match="other images, clips, masks or captions"):
            train(again, progress=False)
    finally: (masked / "one/masks/1.png").write_bytes(kept)
    train(again, progress=False)
    assert same(config.out, runs / "zero") and log(config.out)


# What is wrong, in a sentence

def test_refused(home, masked, tmp_path, capsys):  # noqa: F811
    "Each by the command and before a step; `check` says it too."
    def says(words, path=None, picture=None, **more):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        for i in range(2): save(folder / f"one/{i}.png", noise(32, 32, seed=i))
        if path: save(folder / path, picture)
        config = settings(home, folder / "run", **{**dict(mask_weight=0.), **more})
        config = replace(config, identity=f"{folder / 'one'}")
        with pytest.raises(InputError, match=words): train(config, progress=False)
        assert not (folder / "run/checkpoints").exists()
    black, clear = np.zeros((32, 32), np.uint8), np.zeros((32, 32, 4), np.uint8)
    says("0.png: its mask leaves nothing to learn", "one/masks/0.png", black)
    says("0.png: 32x16 for a picture of 32x32: a mask has its proportions", "one/masks/0.png", black[:16])
    says("0.png: a mask that is transparent itself", "one/masks/0.png", clear)
    says("give at most 1", mask_weight=1.5)
    says("motion_mask and masks: give mask_weight", mask_weight=None, motion_mask="inside")
    says("motion_mask and masks: give mask_weight", mask_weight=None, masks="auto")
    frames_of(tmp_path / "0/short", np.zeros((3, 32, 32), np.uint8))
    clip = Item(masked / "wave/1.gif", "video", "", tmp_path / "0/short")
    how = dict(height=32, width=32, max_frames=9, fps=None, fit="crop", step=4)
    with pytest.raises(InputError, match="short: has 3 frames, 1.gif has 9"): Masking(0, how).read(clip)
    full = Item(masked / "wave/1.gif", "video", "", tmp_path / "full.png")
    save(full.mask, np.full((32, 32), 255, np.uint8))
    masking = Masking(0, how, "inside")
    with pytest.raises(InputError, match="1.gif: its mask leaves nothing to learn"):
        masking.weights(full, masking.read(full))


def test_a_mask_that_counts_a_little_may_be_empty(home, tmp_path):  # noqa: F811
    for i in range(2): save(tmp_path / f"one/{i}.png", noise(32, 32, seed=i))
    save(tmp_path / "one/masks/0.png", np.full((32, 32), 100, np.uint8))  # below half: nothing is inside
    config = replace(settings(home, tmp_path / "run", mask_weight=.1), identity=f"{tmp_path / 'one'}")
    assert prepare(config, progress=False).case.identity[0].weight.unique().tolist() == [1]


def test_checked(home, masked, tmp_path, capsys):  # noqa: F811
    "Which have one, how much is inside; which names match nothing; that nothing counts without a weight."
    save(masked / "one/masks/stray.png", np.zeros((32, 32), np.uint8))
    words = ["check", "--identity", f"{masked / 'one'}", "--motion", f"{masked / 'wave'}", "--base",
             f"{home / 'tiny'}", "--identity-prompt", "cat *", "--motion-prompt", "it is up"]
    try:
        assert main([*words, "--mask-weight", "0", "--sheet", f"{tmp_path / 'a.png'}"]) == 0
        said = capsys.readouterr().out
        assert main(words) == 0
        without = capsys.readouterr().out
        assert main([*words, "--motion-mask", "inside"]) == 2
    finally: (masked / "one/masks/stray.png").unlink()
    assert "0.png      32x32    mask: 21% inside, from masks/0.png" in said
    assert "from masks/2.mp4" in said and "one/2.png: No mask: all of it counts." in said
    assert "stray.png: a mask of no file" in said and "stray.png: a mask of no file" in without
    assert "5 of 6 have a mask, and without --mask-weight none counts." in without
    assert "inside," not in without
    assert main([*words, "--sheet", f"{tmp_path / 'b.png'}"]) == 0
    dark, plain = (np.asarray(Image.open(tmp_path / f"{k}.png").convert("L"), float) for k in "ab")
    assert dark.shape == plain.shape and dark.mean() < plain.mean() - 20


def test_a_folder_of_masks_is_no_clip(masked):
    "Beside clips it is not a clip itself, nor named as left out."
    case = load_case(masked / "one", masked / "wave", "cat *", "it is up")
    assert [item.path.name for item in case.motion] == ["0.gif", "1.gif", "2.gif"] and not case.notes
    assert [item.mask and item.mask.name for item in case.identity] == ["0.png", "1.png", None]


# Automatic masks

STUB = '''
import numpy as np
def new_session(name):
    if {broken}: raise OSError("no route to host")
    return name
def remove(frame, session, only_mask):
    assert (session, only_mask, frame.ndim) == ("isnet-general-use", True, 3)
    mask = np.zeros(frame.shape[:2], np.uint8)
    mask[:, :mask.shape[1] // 2] = 255
    return mask
'''


def test_automatic(home, masked, tmp_path, monkeypatch):  # noqa: F811
    "A stub in place of rembg: asked of what has no mask, frame by frame; files win."
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "rembg", raising=False)
    (tmp_path / "rembg.py").write_text(STUB.format(broken=False))
    case = prepare(ours(home, masked, tmp_path / "run", masks="auto"), progress=False).case
    assert case.identity[2].weight[0, 0].tolist() == [[2, 2, 0, 0]] * 4
    assert case.identity[0].weight[0, 0].tolist() != [[2, 2, 0, 0]] * 4
    how = dict(height=32, width=32, max_frames=9, fps=None, fit="crop", step=4)
    sizes = dict(height=32, width=32, frames=9)
    masking = masking_of(TrainConfig("", "", "", mask_weight=0., masks="auto", **sizes), 4)
    bare = Item(masked / "wave/1.gif", "video", "")
    assert masking.how == how and masking.source(bare) == "rembg" and masking.read(bare)[:, :, :16].min() == 1
    (tmp_path / "rembg.py").write_text(STUB.format(broken=True))
    monkeypatch.delitem(__import__("sys").modules, "rembg")
    with pytest.raises(InputError, match="isnet-general-use cannot be fetched .no route to host"):
        prepare(ours(home, masked, tmp_path / "run", masks="auto"), progress=False)


def test_not_installed(home, masked, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(InputError, match=r"rembg is not installed: pip install 'dualreal\[masks\]'"):
        train(ours(home, masked, tmp_path / "run", masks="auto"), progress=False)
