"""Pieces of clips and buckets of sizes: what they must change, and what they must not."""
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_trainer import alike, fork, log, noise, noted, same, stop_at, together, trained_together

from dualreal import data, shapes, video
from dualreal.base import base_size, find_base
from dualreal.cli import main
from dualreal.core import InputError
from dualreal.family import families
from dualreal.memory import compile_blocks
from dualreal.resume import Interrupted
from dualreal.settings import TrainConfig
from dualreal.store import adapter_info
from dualreal.toy.bases import tiny_pipeline, tiny_transformer
from dualreal.trainer import prepare, train
from dualreal.video import read_frames, read_video, write_video

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")
FAMILIES = ["cogvideox", "wan"]
every = pytest.mark.parametrize("family", FAMILIES)
SIZES = [(48, 24), (24, 48), (32, 32), (50, 26)]  # of files, height and width


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Tiny bases; photos and clips in portrait and landscape, one clip with a cut, one that is short."
    home = tmp_path_factory.mktemp("shapes")
    for family in FAMILIES:
        note = tiny_pipeline(home / family, layers=2, family=family, side=6) / "dualreal.json"  # 48 pixels
        own = json.loads(note.read_text()) if note.exists() else {}
        note.write_text(json.dumps(own | dict(steps=2)))  # of denoising
    (home / "one").mkdir()
    for i, (h, w) in enumerate(SIZES[:3]): Image.fromarray(noise(h, w, seed=i)).save(home / f"one/{i}.png")
    for i, (h, w) in enumerate(SIZES):
        write_video(home / f"wave/{i}.gif", noise((27, 9, 5, 13)[i], h, w, seed=i))
    return home


def settings(home, out="", family="cogvideox", **more):
    known = dict(base=f"{home / family}", reference_encoder="none", identity_prompt="cat *", prompts=["cat"],
                 motion_prompt="it is up", steps=8, save_every=0, samples=0, batch_motion=2, batch_identity=2,
                 micro_batch=2, warmup=0, groups=2, rank=2, cache=f"{home / 'cache'}", trackers="none",
                 device="cpu", height=48, width=48, frames=9)
    return TrainConfig(f"{home / 'one'}", f"{home / 'wave'}", f"{out}", **{**known, **more})


def flags(home, *more):
    said = f"check --identity {home/'one'} --motion {home/'wave'} --base {home/'cogvideox'} --frames 9"
    return [*said.split(), "--identity-prompt", "cat *", "--motion-prompt", "it is up", *more]


def arranged(home, **more):
    config = settings(home, **more)
    case = data.load_case(config.identity, config.motion, "cat *", "it is up")
    return shapes.arrange(case, config.base, config)


# Pieces

@pytest.fixture(scope="module")
def timed(home):
    "Facts of clips: so many frames at a rate, or at times that are drawn."
    known = video.clip_facts(home / "wave/0.gif")
    def facts(frames, fps=None, seed=0):
        if fps: return known._replace(frames=frames, fps=fps)
        gaps = np.random.default_rng(seed).choice([.02, .05, .3], frames - 1)
        times = tuple(np.cumsum([0, *gaps]).round(6))
        return known._replace(frames=frames, fps=(frames - 1) / times[-1], variable=True, times=times)
    return facts


@pytest.mark.parametrize("clip", [(90, 24.), (60, 25.), (80,), (50, None, 1)])
@pytest.mark.parametrize("fps", [None, 8, 7.5])
def test_a_piece_is_instants_from_a_start(timed, clip, fps):
    "Like the beginning of a clip that began there; from the first frame on it is what it always was."
    facts = timed(*clip)
    assert video.pick_frames(facts, 9, fps, 0) == video.pick_frames(facts, 9, fps)
    for start in (1, 7, 20):
        later = facts._replace(frames=facts.frames - start, times=tuple(t - facts.times[start] for t in
                                                                        facts.times[start:]))
        picks = video.pick_frames(facts, 9, fps, start)
        if not facts.variable: assert picks == [start + i for i in video.pick_frames(later, 9, fps)]
        assert picks[0] == start and picks == sorted(picks) and picks[-1] < facts.frames
        if fps and facts.variable:
            rate = min(fps, 1 / np.median(np.diff(facts.times)))
            wanted = facts.times[start] + np.arange(len(picks)) / rate
            gaps = np.abs(np.array(facts.times)[:, None] - wanted)  # the nearest picture to each instant
            mine = [abs(facts.times[p] - w) for p, w in zip(picks, wanted)]
            assert np.allclose(gaps.min(0), mine, atol=2e-6)


@pytest.mark.parametrize("pieces", ["uniform", "slide", "random"])
@pytest.mark.parametrize("clip", [(97, 24.), (97,)])
@pytest.mark.parametrize("fps", [None, 6])
def test_no_cut_is_inside_a_piece(home, timed, monkeypatch, pieces, clip, fps):
    "Whole pieces, in one scene each, none twice, alike for one seed; a scene without a piece is named."
    scenes, facts = ((0, 40), (40, 44), (44, 97)), timed(*clip)
    monkeypatch.setattr(video, "clip_facts", lambda path: facts)
    monkeypatch.setattr(video, "scenes", lambda path: scenes)
    def cut(name="a.mp4", **more):
        case = data.load_case(home / "one", home / "wave", "cat *", "it is up")
        case = replace(case, motion=[data.Item(Path(name), "video", "it is up")])
        return shapes.arrange(case, home / "cogvideox", settings(home, fps=fps, pieces=pieces, **more))
    for more in (dict(), dict(piece_count=1), dict(piece_count=6), dict(piece_stride=2)):
        if "piece_stride" in more and pieces != "slide": continue
        found = cut(**more)
        starts = found.starts["a.mp4"]
        assert starts == sorted(set(starts)) and len(starts) <= more.get("piece_count", 97)
        for start in starts:
            picks = video.pick_frames(facts, 9, fps, start)
            assert len(picks) == 9 and any(a <= picks[0] and picks[-1] < b for a, b in scenes)
        assert any("too short for 9 frames" in note for note in found.notes)
        assert cut(**more) == found
        if pieces == "random" and not more:
            assert starts not in (cut(seed=43).starts["a.mp4"], cut("b.mp4").starts["b.mp4"])


def scene(seed, frames): return noise(frames, 32, 32, seed=seed) // 16 + np.uint8((20, 120, 220)[seed])


def test_what_cuts_leave(tmp_path):
    "No scene long enough: the longest gives a shorter piece; none long enough for motion: left out, by name."
    one, clips = tmp_path / "one", tmp_path / "clips"
    one.mkdir()
    Image.fromarray(noise(32, 32)).save(one / "0.png")
    write_video(clips / "a.gif", np.concatenate([scene(0, 6), scene(2, 14)]))
    write_video(clips / "b.gif", np.concatenate([scene(i % 3, 4) for i in range(6)]))
    write_video(clips / "c.gif", scene(1, 7))  # short, without a cut
    base = tiny_pipeline(tmp_path / "base", layers=2)
    how = dict(base=str(base), height=32, width=32, frames=17, pieces="uniform")
    config = TrainConfig(str(one), str(clips), "", **how)
    case = data.load_case(one, clips, "cat *", "it is up")
    found = shapes.arrange(case, base, config)
    assert [(item.path.name, item.start, item.size) for item in found.case.motion] == \
        [("a.gif", 6, (32, 32, 13)), ("c.gif", None, None)]
    assert any("no scene has 17 frames, the 13 from 0.72 s are used" in note for note in found.notes)
    why = "b.gif is left out: its cuts leave 4 frames together, a piece needs 5"
    assert any(why in note for note in found.notes)
    assert [len(data.read_item(item, *item.within(32, 32, 17))) for item in found.case.motion] == [13, 5]
    alone = replace(case, motion=case.motion[1:2])
    with pytest.raises(InputError, match="no clip is left"): shapes.arrange(alone, base, config)


def test_pieces_are_samples_of_their_own(home, tmp_path):
    "Their frames are those of their start; encoded apart, but for the first: the clip gives it anyway."
    pieces = [item for item in arranged(home, pieces="slide").case.motion if item.path.name == "0.gif"]
    frames = read_video(pieces[0].path)[0]
    for i, piece in enumerate(pieces):
        assert piece.start == 9 * i and (data.first_frame(piece) == frames[9 * i]).all()
        cropped = video.resize_crop(frames[9 * i:9 * i + 9], 48, 48)
        assert (data.read_item(piece, 48, 48, 9) == cropped).all()
    def case(**more): return prepare(settings(home, cache=str(tmp_path), **more), progress=False).case
    plain, slid, auto = case(), case(pieces="slide"), case(pieces="slide", size="auto")
    assert plain.cached == 7 - 2  # of seven captions two are new
    assert slid.cached == 2 * 9 - 2  # all but two pieces were there
    assert auto.cached == 9 + 1  # captions, and the picture that is square
    assert len({item.source for item in slid.motion}) == 6 and slid.motion[0].source == plain.motion[0].source
    assert torch.equal(slid.motion[0].mean, plain.motion[0].mean)
    assert not torch.equal(slid.motion[0].mean, slid.motion[1].mean)


def test_check_says_pieces_and_buckets(home, tmp_path, capsys):
    def said(*more):
        assert main(flags(home, *more)) == 0
        return capsys.readouterr().out
    plain = said()
    assert "pieces" not in plain and "used as: cropped to 48x48, up to 9 frames" in plain
    line = r"0.gif .* 9 of 27 frames at 8.333 fps, 3 pieces from 0.00, 1.08, 2.16 s"
    assert re.search(line, said("--pieces", "slide"))
    assert "2 pieces from 0.00, 2.16 s" in said("--pieces", "uniform", "--piece-count", "2")
    sheets = [tmp_path / f"{i}.png" for i in range(2)]
    report = json.loads(said("--size", "auto", "--pieces", "slide", "--json", "--sheet", str(sheets[0])))
    assert [row["start"] for row in report["motion"] if row["path"].endswith("0.gif")] == [0, 1.08, 2.16]
    assert sum(b["items"] for b in report["buckets"]) == 3 + 6
    assert report["counts"] == dict(identity=3, motion=4)
    largest = next(b for b in report["buckets"] if b["role"] == "motion")
    assert (largest["height"], largest["width"], largest["items"]) == (64, 32, 4)
    text = said("--size", "auto", "--sheet", str(sheets[1]))
    assert "32x64, 9 frames: 2 samples" in text and "48x48: 1 image" in text and "in 6 buckets" in text
    assert Image.open(sheets[0]).height > Image.open(sheets[1]).height  # a row for each piece


def test_the_sheet_shows_each_item_in_its_size(home, monkeypatch):
    rows = {}
    monkeypatch.setattr(video, "contact_sheet", lambda found, **_: rows.update(found))
    from dualreal.doctor import case_sheet
    case_sheet(arranged(home, size="auto", pieces="slide").case, 48, 48, 9, cell=96)
    assert [image.shape[:2] for image in rows["identity: cat *"]] == [(96, 48), (96, 192), (96, 96)]
    assert {label: frames[0].shape[1:3] for label, frames in rows.items() if "0.gif" in label} == \
        {f"0.gif from {t} s": (96, 48) for t in ("0.00", "1.08", "2.16")}


# Buckets

@every
def test_sizes_that_a_base_allows(home, family):
    step = 16 if family in FAMILIES else 0
    for height, width in [(48, 48), (480, 720), (704, 1280), (96, 32)]:
        sizes = shapes.allowed_sizes(home / family, height, width)
        assert (height, width) in sizes and len(sizes) == len(set(sizes))
        for h, w in sizes: assert h % step == w % step == 0 and h * w <= height * width
        if height * width > 10**5:
            assert all(h * w > .9 * height * width for h, w in sizes)
            for aspect in (1, 4 / 3, 3 / 4, 16 / 9, 9 / 16):
                assert min(abs(math.log(w / h / aspect)) for h, w in sizes) < .03


def test_one_size_for_bases_of_fixed_positions(tmp_path):
    "The toy's are weights, CogVideoX-2B's a table of one size; rotary ones are made for any."
    toy, config = find_base("toy"), TrainConfig("", "", "", size="auto")
    own = base_size(toy)
    only = "takes one size only, its positions are made for "
    with pytest.raises(InputError, match=f"{only}{own.width}x{own.height}"):
        shapes.check_shapes(toy, config)
    two, known = tiny_pipeline(tmp_path / "2b", layers=2), tmp_path / "2b/transformer/config.json"
    shapes.check_shapes(two, config)
    told = json.loads(known.read_text())
    known.write_text(json.dumps(told | dict(use_rotary_positional_embeddings=False)))
    with pytest.raises(InputError, match=f"{only}32x32; leave --size out"):
        shapes.check_shapes(two, config)
    shapes.check_shapes(two, replace(config, size="one"))
    rotary = dict(use_rotary_positional_embeddings=True)
    assert families()["cogvideox"].any_shape(rotary) and families()["wan"].any_shape({})
    assert not families()["cogvideox"].any_shape(rotary | dict(use_learned_positional_embeddings=True))


BAD = {"--piece-count 2": "piece_count and piece_stride: give --pieces uniform, slide or random, too",
       "--piece-stride 2": "piece_count and piece_stride: give --pieces uniform, slide or random, too",
       "--pieces random --piece-stride 2": "piece_stride 2: is of --pieces slide, not random",
       "--pieces slide --piece-count 0": "piece_count 0: give at least 1",
       "--pieces all": "'all': give 'first', 'uniform', 'slide' or 'random'",
       "--size any": "'any': give 'one' or 'auto'",
       "--base toy --size auto": "size auto: this base takes one size only"}


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_one_sentence(home, tmp_path, capsys, command, said):
    more = ["--out", str(tmp_path / "run")] if command == "train" else []
    assert main([command, *flags(home, *more, *said.split())[1:]]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert BAD[said] in lines[-1] and not (tmp_path / "run").exists()


def test_each_sample_is_seen_equally_often(home):
    "A step takes one bucket; over as many steps as there are samples, each is taken as often as the others."
    run, g = prepare(settings(home, size="auto", pieces="slide"), progress=False), torch.Generator()
    for name in ("identity", "motion"):
        items, order = run.samples[name], run.orders[name]
        taken = [order.take(2, g) for _ in range(3 * len(items))]
        assert all(items[a].mean.shape == items[b].mean.shape for a, b in taken)
        assert set(Counter(sum(taken, [])).values()) == {6}
        assert len({items[a].mean.shape for a, _ in taken}) == 3


def test_one_size_is_drawn_as_ever(home):
    "All samples in one order, also where clips differ in length."
    run = prepare(settings(home), progress=False)
    assert len({item.mean.shape for item in run.case.motion}) == 2
    ever = torch.randperm(4, generator=torch.Generator().manual_seed(1)).tolist()[::-1]
    assert run.orders["motion"].take(4, torch.Generator().manual_seed(1)) == ever


@pytest.mark.parametrize("more", [dict(size="auto"),
                                  pytest.param(dict(pieces="slide", piece_count=1), marks=pytest.mark.slow)])
def test_what_must_not_change(home, tmp_path, more):
    "Files of the run's own proportions: auto, and pieces that are the clip's beginning, give the same run."
    for i in range(2): write_video(tmp_path / f"wave/{i}.gif", noise(9, 48, 48, seed=i))
    (tmp_path / "one").mkdir()
    for i in range(2): Image.fromarray(noise(48, 48, seed=i)).save(tmp_path / f"one/{i}.png")
    here = dict(identity=str(tmp_path / "one"), motion=str(tmp_path / "wave"), steps=4)
    train(replace(settings(home, tmp_path / "a"), **here), progress=False)
    train(replace(settings(home, tmp_path / "b", **more), **here), progress=False)
    assert same(tmp_path / "a", tmp_path / "b")
    facts = [json.loads((tmp_path / out / "run.json").read_text()) for out in "ab"]
    assert not any(facts[0][k] for k in ("pieces", "buckets", "left_out"))
    assert facts[1]["pieces"] or facts[1]["buckets"]
    assert facts[1]["cached"] > 2 * 4 - 1  # nothing was encoded again


# Runs

@pytest.mark.parametrize("family", ["cogvideox", pytest.param("wan", marks=pytest.mark.slow)])
def test_a_run_of_many_shapes(home, tmp_path, family):
    "Portrait and landscape in one case; interrupted and resumed it is the same run, bit for bit."
    how = dict(family=family, size="auto", pieces="random", piece_count=2, samples=1, steps=6)
    train(settings(home, tmp_path / "whole", **how), progress=False)
    with pytest.raises(Interrupted):
        train(settings(home, tmp_path / "run", **how), stop_at(3), progress=False)
    train(settings(home, tmp_path / "run", resume=True, **how), progress=False)
    assert same(tmp_path / "run", tmp_path / "whole")
    record = json.loads((tmp_path / "run/run.json").read_text())
    starts = {Path(path).name: found for path, found in record["pieces"].items()}
    assert len(starts["0.gif"]) == 2 == len(starts["3.gif"]) and starts["1.gif"] == [0]
    assert all(math.isfinite(row["loss"]) for row in log(tmp_path / "run"))
    largest = next(b for b in record["buckets"] if b["role"] == "motion")
    assert largest == dict(role="motion", height=64, width=32, frames=9, items=4)
    assert read_frames(tmp_path / "run/samples/00.mp4", [0]).shape[1:3] == (64, 32)
    told = adapter_info(tmp_path / "run/adapter.safetensors")["generation"]
    assert told == dict(height=64, width=32, frames=9)
    (tmp_path / "run/run.json").unlink()
    with pytest.raises(InputError, match="started with piece_count=2, not 3"):
        train(settings(home, tmp_path / "run", resume=True, **how | dict(piece_count=3)), progress=False)


@every
def test_latents_and_positions_have_their_own_size(home, family):
    run = prepare(settings(home, family=family, size="auto"), progress=False)
    f, stride = run.given.family, run.given.family.stride(run.pipe.vae.config)
    config = run.pipe.transformer.config
    shown = run.given.seen("identity") + run.given.seen("motion")
    for item, seen in zip(run.case.identity + run.case.motion, shown):
        frames, *sides = f.latent_size(config, item.mean)
        assert ((frames - 1) * stride[0] + 1, *(stride[1] * side for side in sides)) == seen.shape[:3]
        table = run.given.positions(item.mean)
        if family == "wan": assert table is None
        else:
            whole = run.pipe._prepare_rotary_positional_embeddings(*seen.shape[1:3], frames, "cpu")
            assert all(torch.equal(a, b) for a, b in zip(table, whole))
    if family == "cogvideox":
        tall, wide = (run.given.positions(run.case.identity[i].mean)[0] for i in (0, 1))
        assert tall.shape == wide.shape and not torch.equal(tall, wide)


def test_memory_is_planned_for_the_largest(home, monkeypatch):
    "The bucket with most pixels and frames, not the one with most clips."
    found = arranged(home, size="auto", pieces="slide", height=64, width=48)
    sizes = [(b.height * b.width * b.frames) for b in found.buckets]
    config = found.widest(settings(home))
    assert config.height * config.width * config.frames == max(sizes) > sizes[0]
    def planned(transformer, size, *_): raise InputError(f"{size.height}x{size.width}x{size.frames}")
    monkeypatch.setattr("dualreal.memory.plan", planned)
    how = dict(size="auto", memory="4", height=64, width=48)
    with pytest.raises(InputError, match=f"{config.height}x{config.width}x{config.frames}"):
        prepare(settings(home, **how), progress=False)


@fork
@pytest.mark.slow
def test_two_processes_are_one_run_of_many_shapes(home, tmp_path):
    how = dict(size="auto", pieces="uniform", piece_count=2, steps=6, batch_motion=3)
    train(settings(home, tmp_path / "one", **how), progress=False)
    assert together(trained_together, settings(home, tmp_path / "two", **how), tmp_path) == [0, 0]
    assert alike(tmp_path / "one", tmp_path / "two")
    first, second = noted(tmp_path)
    assert first["rows"] == second["rows"] and first["wrote"] and not second["wrote"]


@pytest.mark.slow
@every
def test_compiled_blocks_take_many_shapes(family):
    "A few programs for many sizes; past PyTorch's limit on programs a block would run uncompiled."
    f, transformer = families()[family], tiny_transformer(family=family, layers=2)
    config, draw = transformer.config, torch.Generator().manual_seed(0)
    text, time = torch.randn(1, 16, 32, generator=draw), torch.tensor([500])
    def made(h, w, frames):
        latents = torch.randn(1, *f.latent_shape(config, frames, h, w), generator=draw)
        angles = torch.rand(frames * h * w // 4, 16, generator=draw)
        return latents, (angles.cos(), angles.sin()) if family == "cogvideox" else None
    sides = (4, 4), (4, 8), (8, 4), (6, 8), (8, 6), (2, 8)
    given = [made(h, w, frames) for h, w in sides for frames in (1, 3)]
    def answers():
        with torch.no_grad(): return [f.predict(transformer, x, time, text, p) for x, p in given]
    plain, seen = answers(), []
    torch._dynamo.reset()
    compile_blocks(transformer, dynamic=None, backend=lambda graph, _: seen.append(graph) or graph.forward)
    for a, b in zip(answers(), plain): torch.testing.assert_close(a, b)
    assert 1 <= len(seen) < torch._dynamo.config.recompile_limit and len(seen) < len(given) / 2
