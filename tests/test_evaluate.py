"""A folder of videos as people have them: what is scored, what is complained of, what is kept."""
import errno
import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import dualreal.evaluate as module
import dualreal.store as store
from dualreal.cli import main
from dualreal.encoders import Missing, load_encoders
from dualreal.evaluate import METRICS, References, Scorer, evaluate, score_frames, status
from dualreal.metrics import (
    Tracks,
    dynamic_degree,
    motion_smoothness,
    temporal_consistency,
    temporal_flickering,
)
from dualreal.report import write_pages
from dualreal.toy.world import HELD_OUT_SUBJECTS, render, write_case
from dualreal.video import read_video, stream_video, write_video

HAS_DECORD = find_spec("decord") is not None


class Means:
    "Stands in for CLIP and DINO: mean colours of the halves of a picture; says what it was asked."
    name = "means"
    def __init__(self): self.batches, self.prompts = [], []

    def images(self, frames, batch=32):
        self.batches.append(len(frames))
        return np.stack([np.r_[f[:, :f.shape[1] // 2 + 1].mean((0, 1)), f.mean((0, 1)), 1] for f in frames])

    def text(self, prompt):
        self.prompts.append(prompt)
        if len(prompt.split()) > 77: raise module.InputError(f"{len(prompt.split())} tokens, means reads 77")
        return np.r_[np.arange(6) + len(prompt), 1.]


class Shift:
    name = "shift"
    def __call__(self, a, b):
        move = (b.mean() - a.mean()) * np.linspace(0, 1, a.shape[1])
        return np.stack(np.broadcast_arrays(move, np.zeros(a.shape[:2])), -1)


class Drift:
    name = "drift"
    def __call__(self, frames):
        points = np.arange(len(frames))[:, None, None] * np.array([3., 1.]) + np.zeros((1, 4, 2))
        return Tracks(points, np.ones(points.shape[:2], bool), *frames.shape[1:3])


class Blend:
    name = "blend"
    def __call__(self, a, b): return (a + b) / 2


@pytest.fixture
def fakes():
    seen = dict(clip_t=Means(), clip_i=Means(), dino_i=Means())
    return dict(seen, flow=Shift(), midpoint=Blend(), tracks=Drift())


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("drawn"), "teal_cat", "swinging", images=2, clips=2)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, drawn):
    monkeypatch.setenv("DUALREAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(drawn, "case")
    return tmp_path


def noise(count=9, height=32, width=48, seed=0):
    "Frames of blocks that drift."
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]


def encode(path, frames, codec="libx264", times=None, rate=8, **attributes):
    "Write a clip with settings that `write_video` does not offer; times: of the frames, in ms."
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for name, value in attributes.items(): setattr(stream.codec_context, name, value)
        if times is not None: stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None: picture.pts, picture.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def score(fakes, folder="videos", **more):
    return evaluate(folder, "case/identity", encoders=fakes, progress=False, **more)


# Maths in pieces

@pytest.mark.parametrize("seed", range(40))
def test_pieces_are_the_whole(seed, fakes):
    "Random sizes, lengths, rates and cuts: every metric is that of the whole video, or has a reason."
    rng = np.random.default_rng(seed)
    count, height, width = (int(rng.integers(1, n)) for n in (40, 60, 60))
    fps, frames = float(rng.choice([0, 6, 8, 10, 23.976, 25, 60])), noise(count, height + 8, width + 8, seed)
    scorer = Scorer(fps, fakes)
    cuts = np.sort(rng.integers(0, count + 1, 3))
    for part in np.split(frames, cuts):
        if len(part): scorer.feed(part)
    found, features = scorer.values(), fakes["clip_i"].images(frames)
    whole = dict(temporal_flickering=lambda: temporal_flickering(frames),
                 temporal_consistency=lambda: temporal_consistency(features),
                 motion_smoothness=lambda: motion_smoothness(frames, fakes["midpoint"]),
                 dynamic_degree=lambda: dynamic_degree(frames, fps, fakes["flow"]))
    for metric, run in whole.items():
        try: expected = run()
        except module.Undefined: assert f"has {count}" in scorer.why[metric]
        else: assert found[metric] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_networks_get_batches_and_clip_t_is_alone(fakes):
    row = score_frames(noise(40), 8, References([noise(1)[0]] * 2, [(noise(), 8)]), "a cat", fakes)
    assert fakes["clip_t"].batches == [16, 16, 8] and fakes["clip_t"].prompts == ["a cat"]
    assert fakes["clip_i"].batches == [2, 16, 16, 8] # the references once; for consistency too
    assert not fakes["clip_i"].prompts and not row["why"]
    assert all(isinstance(row[m], float) for m in METRICS)


def test_references_at_both_sizes(fakes):
    small, large = noise(9, 24, 36), noise(9, 48, 72)
    row = score_frames(large, 8, References(clips=[(small, 8)]), None, fakes)
    native = dynamic_degree(small, 8, fakes["flow"])
    assert row["dynamic_degree_deviation"] == pytest.approx(row["dynamic_degree"] - native)
    assert row["dynamic_degree_deviation_resized"] != row["dynamic_degree_deviation"]
    assert row["stride"] == 1 and (row["height"], row["width"]) == (48, 72)


def test_missing_network_is_said_never_dropped(fakes):
    fakes["clip_i"] = Missing("clip", "clip (605 MB) is not there")
    write_video("videos/a.mp4", noise())
    report = score(fakes)
    row = report["videos"][0]
    for m in ("clip_i", "temporal_consistency"):
        assert row[m] is None
        assert row["why"][m] == report["missing"][m] == "not computed: clip (605 MB) is not there"
        assert report["encoders"][m] is None and report["summary"][m]["n"] == 0
    assert row["dino_i"] is not None and report["encoders"]["dino_i"] == "means" and status(report) == 0


# Folders

def test_order_and_names_change_nothing(fakes):
    for i in range(3):
        source = write_video(f"one/{i}.mp4", noise(seed=i))
        target = Path(f"two/{'cab'[i]} é.mp4")
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)
    folders = ("one", "two", "one")
    one, two, again = (score(fakes, f, cache=f"cache{i}")["summary"] for i, f in enumerate(folders))
    assert one == two == again


def test_only_what_changed_is_decoded(fakes, monkeypatch):
    opened = []
    def spy(path, *more): opened.append(path.name); return stream_video(path, *more)
    monkeypatch.setattr(module, "stream_video", spy)
    for i in range(3): write_video(f"videos/{i}.mp4", noise(40, seed=i))
    Path("p.txt").write_text("one\ntwo\nthree\n")
    first = score(fakes, prompts="p.txt")
    assert opened == ["0.mp4", "1.mp4", "2.mp4"] # once each, whatever the number of metrics
    opened.clear()
    assert score(fakes, prompts="p.txt")["summary"] == first["summary"] and not opened
    write_video("videos/1.mp4", noise(40, seed=9))
    Path("p.txt").write_text("one\ntwo\n3\n")
    asked = len(fakes["dino_i"].batches)
    third = score(fakes, prompts="p.txt")
    assert opened == ["1.mp4", "2.mp4"] and third["counts"]["cached"] == 1
    assert fakes["dino_i"].batches[asked:] == [2, 16, 16, 8] # the new prompt cost no picture's feature
    assert third["videos"][0] == first["videos"][0] | dict(cached=True)


def test_cases_count_once(fakes):
    for i, name in enumerate(("a/0", "a/1", "a/2", "b/0")): write_video(f"videos/{name}.mp4", noise(seed=i))
    report = score(fakes)
    values = {r["name"]: r["temporal_flickering"] for r in report["videos"]}
    a, b = [v for k, v in values.items() if k[0] == "a"], values["b/0.mp4"]
    assert report["summary_cases"]["temporal_flickering"]["mean"] == pytest.approx((np.mean(a) + b) / 2)
    assert report["summary"]["temporal_flickering"]["mean"] == pytest.approx(np.mean([*a, b]))
    assert report["summary_cases"]["temporal_flickering"]["n"] == 2


# Bad input

def pictures(folder, frames, mode="RGB"):
    Path(folder).mkdir(parents=True)
    for i, frame in enumerate(frames): Image.fromarray(frame).convert(mode).save(f"{folder}/{i}.png")


def truncated():
    path = write_video("videos/x.mp4", noise(20))
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])


def empty_file(): Path("videos/x.mp4").write_bytes(b"")
def empty_folder(): Path("videos/x").mkdir()
def mixed(): pictures("videos/x", [*noise(2), noise(1, 40)[0]])
def one_frame(): pictures("videos/x", noise(1))
def two_frames(): pictures("videos/x", noise(2))


@pytest.mark.parametrize("spoil,says,error", [
    (truncated, "cut off", True), (empty_file, "cannot be read", True), (empty_folder, "no frames", True),
    (mixed, "must have one size", True), (one_frame, "has 1", False), (two_frames, "has 2", False)])
def test_a_bad_video_costs_one_row(spoil, says, error, fakes):
    write_video("videos/good clip é.mp4", noise())
    spoil()
    report = score(fakes)
    good, bad = sorted(report["videos"], key=lambda r: r["name"][0] == "x")
    assert not good["error"] and all(good[m] is not None for m in METRICS[1:-2])
    assert bool(bad["error"]) == error and any(says in why for why in bad["why"].values())
    assert not error or str(Path("videos") / bad["name"]) in bad["error"]
    assert status(report) == 1 and report["counts"]["failed"] == error
    Path("videos/good clip é.mp4").unlink()
    assert status(score(fakes)) == (2 if error else 1)


def uneven(): encode(Path("videos/x.mkv"), noise(12), times=[40 * i + 160 * (i // 4) for i in range(12)])
def tagged(): encode(Path("videos/x.mp4"), noise(), colorspace=1)
def alpha(): pictures("videos/x", noise(), "RGBA")
def portrait(): write_video("videos/x.mp4", noise(9, 64, 32))


@pytest.mark.parametrize("make,says", [
    (uneven, "frame rate varies"), (tagged, "BT.709"), (alpha, "transparency"), (portrait, None)])
def test_odd_videos_are_scored_with_a_note(make, says, fakes):
    Path("videos").mkdir()
    make()
    report = score(fakes)
    assert status(report) == 0
    notes = report["videos"][0]["notes"]
    assert notes == [] if says is None else len(notes) == 1 and says in notes[0]


def test_palette_and_transparent_references(fakes):
    write_video("videos/a.mp4", noise())
    for i, mode in enumerate(("P", "RGBA", "LA")):
        Image.fromarray(noise(1)[0]).convert(mode).save(f"case/identity/images/x{i}.png")
    report = score(fakes)
    assert status(report) == 0 and any("x1.png, x2.png: transparency" in n for n in report["notes"])


def test_prompts_too_few_and_too_long(fakes):
    for i in range(3): write_video(f"videos/{i}.mp4", noise(seed=i))
    Path("p.txt").write_text("0\ta cat\n1\t" + "very " * 90 + "\n")
    rows = (report := score(fakes, prompts="p.txt"))["videos"]
    values, why = [r["clip_t"] for r in rows], [r["why"].get("clip_t") for r in rows]
    assert values[0] is not None and values[1:] == [None, None] and status(report) == 1
    assert "tokens" in why[1] and "list of prompts" in why[2]
    Path("p.txt").write_text("a cat\na dog\n")
    with pytest.raises(module.InputError, match="2 prompts for 3 videos"): score(fakes, prompts="p.txt")


def test_own_report_among_the_videos(fakes):
    "Scored into the folder of the videos, then scored again: the strips are no videos."
    write_video("videos/a.mp4", noise())
    first = score(fakes, out="videos")
    again = score(fakes, out="videos")
    assert again["summary"] == first["summary"] and len(again["videos"]) == 1


def test_link_in_a_circle(fakes):
    write_video("videos/in/a.mp4", noise())
    Path("videos/in/up").symlink_to("..")
    assert [row["name"] for row in score(fakes)["videos"]] == ["in/a.mp4"]


def test_name_that_is_no_text(fakes):
    "Linux takes any bytes for a name: one bad video, and the report is written all the same."
    for i, name in enumerate("ab"): write_video(f"videos/{name}.mp4", noise(seed=i))
    try: Path("videos/a.mp4").rename(os.fsdecode(b"videos/caf\xe9.mp4"))
    except OSError: pytest.skip("this file system takes UTF-8 only")
    score(fakes, out="out")
    good, row = json.loads(Path("out/report.json").read_text(encoding="utf-8"))["videos"]
    assert os.fsencode(row["name"]) == b"caf\xe9.mp4" and len(write_pages("out")) == 3
    assert "not UTF-8: rename it" in row["error"] and good["error"] is None


def test_a_copy_counts_once(fakes):
    "Two files of one content are one sample; a prompt beside a video is its own."
    for i, name in enumerate("abc"): write_video(f"videos/{name}.mp4", noise(seed=i % 2))
    Path("videos/a.mp4.json").write_text('{"prompt": "a cat"}')
    report = score(fakes)
    assert [row["name"] for row in report["videos"]] == ["a.mp4", "b.mp4"]
    assert "c.mp4: the same video as a.mp4, counted once" in report["notes"]
    assert "prompts: of the records beside 1 of 3 videos" in report["notes"]
    assert report["videos"][0]["clip_t"] is not None and report["videos"][1]["clip_t"] is None


def test_identity_of_clips(fakes):
    "The published layout may hold clips of the subject: the first frame of each is its picture."
    frames = noise()
    write_video("videos/a.mp4", frames)
    write_video("subject/videos/0.mp4", frames)
    report = evaluate("videos", "subject", encoders=fakes, progress=False)
    assert status(report) == 0 and report["summary"]["clip_i"]["mean"] is not None


def test_clips_that_the_flow_refuses(fakes):
    "Left out with the true reason, and never without a word."
    class Large(Shift):
        def __call__(self, a, b):
            if min(a.shape[:2]) < 40: raise module.InputError("large needs 40 pixels") # padded to 16
            return super().__call__(a, b)
    fakes["flow"], small, good = Large(), noise(9, 24, 36), noise(9, 64, 64)
    row = score_frames(good, 8, References(clips=[(small, 8)]), None, fakes)
    why = row["why"]["dynamic_degree_deviation"]
    assert "1 of 1 clips of the motion" in why and "40 pixels" in why
    write_video("videos/a.mp4", good)
    for i, clip in enumerate((small, good, good[:1])): write_video(f"clips/{i}.mp4", clip)
    report = score(fakes, motion="clips")
    assert report["summary"]["dynamic_degree_deviation"]["mean"] is not None
    assert any("2 of 3 clips of the motion" in n and "0.mp4: large needs 40" in n for n in report["notes"])


def test_results_that_cannot_be_kept(fakes, monkeypatch):
    "A full cache is not the video's fault: no row, and nothing computed is called unreadable."
    write_video("videos/a.mp4", noise())
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(store, "write_json", full)
    with pytest.raises(RuntimeError, match="results cannot be kept.*No space left"): score(fakes)


@pytest.mark.parametrize("damaged", [b"\xff\xfe{", b"[1, 2]", b"{", b""])
def test_damaged_result_is_made_again(damaged, fakes, home):
    write_video("videos/a.mp4", noise())
    first = score(fakes)
    [entry] = (home / "cache/evaluate").glob("*/*.json")
    entry.write_bytes(damaged)
    assert score(fakes)["summary"] == first["summary"]


def test_weights_that_are_damaged(home, capsys):
    write_video("videos/a.mp4", noise())
    (home / "wts").mkdir()
    for name in ("raft_large_C_T_V1-22a6c225.pth", "ViT-B-32-quickgelu-openai.safetensors"):
        (home / "wts" / name).write_bytes(b"abc")
        ask = ["evaluate", "--videos", "videos", "--identity", "case/identity", "--out", "o"]
        capsys.readouterr()
        assert main([*ask, "--weights", "wts"]) == 2
        assert f"{Path('wts') / name} cannot be read as" in capsys.readouterr().err


# The command

def test_command_and_its_status(home, capsys):
    videos, out = home / "videos", home / "out"
    ask = ["evaluate", "--identity", "case/identity", "--encoders", "toy"]
    ask += ["--videos", str(videos), "--out", str(out)]
    cat = HELD_OUT_SUBJECTS["teal_cat"]
    for i in range(2): write_video(videos / f"{i} é.mp4", render(cat, "swinging", seed=i)[0])
    assert main([*ask, "--motion", "case/motion"]) == 0
    names = {"report.json", "report.csv", "report.md", "report.tex", "report.html", "sheets"}
    assert {p.name for p in out.iterdir()} == names
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["encoders"]["clip_i"] == "toy-clip" and report["encoders"]["dynamic_degree"] == "dis"
    assert report["summary"]["clip_t"] == dict(mean=None, low=None, high=None, n=0)
    assert len((out / "report.csv").read_text(encoding="utf-8").splitlines()) == 3
    assert "data:image/jpeg;base64," in (out / "report.html").read_text(encoding="utf-8")
    (videos / "cut.mp4").write_bytes(b"nothing")
    capsys.readouterr()
    assert main(ask) == 1
    said = capsys.readouterr()
    assert "2 known already, 1 unreadable" in said.out and "dualreal: cut.mp4: " in said.err
    for path in videos.glob("? é.mp4"): path.unlink()
    assert main(ask) == 2


@pytest.mark.parametrize("wrong,says", [
    (["--videos", "nowhere"], "nowhere"), (["--identity", "nowhere"], "nowhere"),
    (["--prompts", "no.txt"], "no.txt"), (["--weights", "no/folder"], "no/folder"),
    (["--truth", "unicorn:swinging"], "unicorn"), (["--midpoint", "no.pt2"], "no.pt2"),
    (["--videos", "case/identity/images"], None), (["--out", "case/identity/images/00.png"], "00.png")])
def test_wrong_arguments_are_two(wrong, says, capsys):
    write_video("videos/a.mp4", noise())
    given = {"--videos": "videos", "--identity": "case/identity", "--out": "out", "--encoders": "toy"}
    given |= dict([wrong])
    code = main(["evaluate", *[a for pair in given.items() for a in pair]])
    err = capsys.readouterr().err
    if says is None: assert code == 1 # a folder of pictures is a video, here of two frames
    else: assert code == 2 and says in err and len(err.splitlines()) == 1


# Decoders and memory, in processes of their own

READ = """
import sys, hashlib
from dualreal.video import stream_video
h = hashlib.sha256()
for part in stream_video(sys.argv[1], 5, sys.argv[2]): h.update(part.tobytes())
print(h.hexdigest())
"""


def said(code, *args):
    "The words that `code` prints in a process of its own."
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def run(code, *args): return said(code, *args)[-1]


@pytest.mark.skipif(not HAS_DECORD, reason="decord has no wheel here")
@pytest.mark.parametrize("name,codec", [("a.mp4", "libx264"), ("b.mp4", "mpeg4"), ("c.avi", "mpeg4")])
def test_decoders_agree_to_the_bit(name, codec):
    path = encode(Path(name).absolute(), noise(13, 64, 96), codec)
    assert run(READ, path, "decord") == run(READ, path, "pyav")
    assert (np.concatenate(list(stream_video(path, 5))) == read_video(path)[0]).all()


PEAK = """
import sys, resource
from dualreal.encoders import DisFlow, Missing, WarpMidpoint
from dualreal.evaluate import evaluate
flow, none = DisFlow(), Missing("none", "none")
made = dict(clip_t=none, clip_i=none, dino_i=none, flow=flow, midpoint=WarpMidpoint(flow))
for videos in sys.argv[1:]:
    evaluate(videos, "case/identity", encoders=made, progress=False, cache=videos + "-cache")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
@pytest.mark.parametrize("many", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_videos(many):
    pytest.importorskip("resource")
    for count in (2, many):
        for i in range(count): write_video(f"v{count}/{i}.mp4", noise(9, 64, 96, seed=i))
    two, more = map(int, said(PEAK, "v2", f"v{many}"))
    assert more < 1.1 * two, f"{two} KiB for 2 videos, {more} KiB for {many}"


def test_exported_midpoint(fakes):
    import torch
    class Mean(torch.nn.Module):
        def forward(self, a, b): return (a + b) / 2
    pair = torch.rand(1, 3, 32, 48), torch.rand(1, 3, 32, 48)
    torch.jit.trace(Mean(), pair).save("mean.pt")
    torch.export.save(torch.export.export(Mean(), pair), "mean.pt2")
    for name in ("mean.pt", "mean.pt2"):
        program = load_encoders("toy", midpoint=name)["midpoint"]
        assert motion_smoothness(noise(), program) == motion_smoothness(noise(), fakes["midpoint"])
    with pytest.raises(module.InputError, match="mean.pt2 does not make a picture of two of 40x24"):
        program(*np.random.rand(2, 24, 40, 3).astype(np.float32)) # exported for one size only
