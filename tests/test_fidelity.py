"""Motion fidelity: the formula, the points that are followed, the way through `evaluate` to its tables."""
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from dualreal import encoders
from dualreal.cli import main
from dualreal.core import InputError
from dualreal.encoders import DisFlow, FlowTracker, Missing, load_encoders
from dualreal.evaluate import References, Scorer, evaluate
from dualreal.metrics import Tracks, Undefined, fidelities, motion_fidelity
from dualreal.report import cells, write_pages
from dualreal.toy.world import HELD_OUT_SUBJECTS, render, write_case
from dualreal.video import write_video

TOY = cache(lambda: load_encoders("toy"))
CAT, BEAR = (HELD_OUT_SUBJECTS[k] for k in ("teal_cat", "magenta_bear"))


def walks(seed, points=7, frames=9, size=(60, 80), step=4.):
    "Points that wander, some of them out of sight now and then."
    rng = np.random.default_rng(seed)
    path = np.cumsum(rng.normal(size=(frames, points, 2)) * step, 0) + 30
    return Tracks(path, rng.random((frames, points)) > .1, *size)


def by_hand(video, clip):
    "The definition, a loop for each sum."
    def sides(t):
        unit, found = np.hypot(t.height, t.width), []
        for i in range(t.points.shape[1]):
            p, s = t.points[:, i] / unit, t.seen[:, i]
            known = [k for k in range(len(p) - 1) if s[k] and s[k + 1]]
            far = max((np.hypot(*(p[k] - p[0])) for k in range(len(p)) if s[k]), default=0)
            if far > .05 and len(known) >= (len(p) - 1) / 2: found.append({k: p[k + 1] - p[k] for k in known})
        return found
    def corr(a, b):
        both, values = [k for k in a if k in b], []
        if len(both) < (len(video.points) - 1) / 2: return -1
        for k in both:
            x, y = np.hypot(*a[k]), np.hypot(*b[k])
            still = int(x < .005) + int(y < .005)
            values.append([a[k] @ b[k] / (x * y) if x * y else 0, 0, 1][still])
        return np.mean(values)
    own, wanted = sides(video), sides(clip)
    table = np.array([[corr(a, b) for b in wanted] for a in own])
    return (table.max(1).mean() + table.max(0).mean()) / 2


@pytest.mark.parametrize("seed", range(6))
def test_formula_is_the_definition(seed):
    a, b = walks(seed, 5 + seed, step=(4, 1.5)[seed % 2]), walks(seed + 50, 9)
    assert motion_fidelity(a, b) == pytest.approx(by_hand(a, b), abs=1e-12)
    assert motion_fidelity(a, b) == pytest.approx(motion_fidelity(b, a), abs=1e-12)


def test_neither_order_nor_place_nor_size_counts():
    a, b = walks(1), walks(2)
    other = Tracks(3 * b.points[:, ::-1] + 11, b.seen[:, ::-1], 180, 240)
    assert motion_fidelity(a, other) == pytest.approx(motion_fidelity(a, b), abs=1e-12)


def test_clips_in_which_nothing_moves_are_left_out():
    still = Tracks(np.zeros((9, 3, 2)), np.ones((9, 3), bool), 60, 80)
    best, mean = fidelities(walks(1), [still, walks(2), walks(3)])
    assert mean < best == max(motion_fidelity(walks(1), walks(k)) for k in (2, 3))
    for clips, says in (([still], "nothing moves in the clip"), ([], "no reference clip")):
        with pytest.raises(Undefined, match=says): fidelities(walks(1), clips)
    assert fidelities(still, [walks(2)]) == (0, 0)


def test_points_go_with_the_flow_and_out_of_the_picture():
    "A flow known everywhere, and a size that is no multiple of 16."
    sizes = []
    def flow(a, b): sizes.append(a.shape[:2]); return np.broadcast_to(np.float32([3, -2]), (*a.shape[:2], 2))
    flow.name = "known"
    clip = np.random.default_rng(0).integers(0, 255, (5, 40, 50, 3), np.uint8)
    t = FlowTracker(flow)(clip)
    assert np.allclose(np.diff(t.points, axis=0), [3, -2]) and set(sizes) == {(48, 64)}
    inside = (t.points >= 0).all(-1) & (t.points <= (49, 39)).all(-1)
    assert np.array_equal(t.seen, np.logical_and.accumulate(inside))
    assert not t.seen[-1].all() and t.seen[0].all()


def test_where_nothing_changes_nothing_moves():
    "Whatever a flow sees in the noise of a file: two levels here; beside it a square that changes."
    def flow(a, b): return np.ones((*a.shape[:2], 2), np.float32)
    flow.name = "always"
    clip = np.full((4, 48, 48, 3), 100, np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None] % 2 * 2
    clip[::2, :16, :16] = 200
    moves = np.diff(FlowTracker(flow)(clip).points, axis=0)
    where = FlowTracker(flow)(clip).points[0]
    assert not moves[:, (where > 24).any(1)].any() and (moves[0][(where < 12).all(1)] == 1).all()


# CoTracker: its code is not here, so a package of the same interface stands in

STAND_IN = '''
import torch

class CoTrackerPredictor(torch.nn.Module):
    def __init__(self, checkpoint, offline=True, v2=False, window_len=60):
        super().__init__()
        assert offline and not v2 and window_len == 60
        self.model = torch.nn.Linear(1, 2, bias=False)
        self.model.load_state_dict(torch.load(checkpoint, weights_only=True))

    def forward(self, video, queries=None, segm_mask=None, grid_size=0, grid_query_frame=0):
        b, t, c, h, w = video.shape
        assert c == 3 and video.dtype == torch.float32 and video.max() > 1 and queries is None
        lines = torch.linspace(0, w - 1, grid_size), torch.linspace(0, h - 1, grid_size)
        grid = torch.stack(torch.meshgrid(*lines, indexing="xy"), -1).reshape(1, 1, -1, 2)
        time = torch.arange(t).float()[None, :, None, None]
        return grid + self.model(time), torch.ones(b, t, grid_size**2, dtype=torch.bool)
'''


@pytest.fixture
def weights(tmp_path, monkeypatch):
    "A folder with a clone of the stand-in, and weights that move points by (4, 1) a frame."
    (tmp_path / "weights/co-tracker/cotracker").mkdir(parents=True)
    (tmp_path / "weights/co-tracker/cotracker/predictor.py").write_text(STAND_IN)
    torch.save(dict(weight=torch.tensor([[4.], [1.]])), tmp_path / "weights/scaled_offline.pth")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path / "weights"
    for name in [n for n in sys.modules if n.split(".")[0] == "cotracker"]: del sys.modules[name]


def test_cotracker_from_a_folder(weights):
    tracker = load_encoders("published", weights)["tracks"]
    assert tracker.name == "cotracker3 offline"
    t = tracker(np.full((9, 48, 64, 3), 200, np.uint8))
    assert np.allclose(t.points[-1] - t.points[0], [32, 8]) and t.seen.dtype == bool and t.seen.all()
    grey = np.full((9, 48, 64, 3), 9, np.uint8)
    s = Scorer(8, dict(tracks=tracker), References(clips=[(grey, 8)]), wanted=("motion_fidelity",))
    s.feed(grey)
    assert s.values()["motion_fidelity"] == [pytest.approx(1)] * 2
    (weights / "scaled_offline.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read as cotracker3 offline"):
        load_encoders("published", weights)
    (weights / "scaled_offline.pth").unlink()
    lost = load_encoders("published", weights)["tracks"]  # its code is there, its weights are not
    assert isinstance(lost, Missing) and "scaled_offline.pth is not there" in lost.why


def test_without_cotracker_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    lost = load_encoders("published", tmp_path)["tracks"]
    assert isinstance(lost, Missing) and "--tracks flow" in lost.why and "co-tracker" in lost.why
    assert isinstance(load_encoders("published", flow="dis", tracks="flow")["tracks"], FlowTracker)
    with pytest.raises(InputError, match="neither 'cotracker' nor 'flow'"):
        load_encoders("toy", tracks="raft")


# Through `evaluate`

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALREAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_case("case", "teal_cat", "swinging", images=2, clips=3)
    videos = dict(still=(CAT, "still"), wrong=(CAT, "hopping"), right=(CAT, "swinging"))
    for i, (name, how) in enumerate(dict(videos, another=(BEAR, "swinging")).items()):
        write_video(f"videos/{name}.mp4", render(*how, seed=i + 5)[0])
    return tmp_path


def scored(**more):
    known = dict(motion="case/motion", encoders=TOY(), progress=False)
    return evaluate("videos", "case/identity", **known | more)


def rows(report, column="motion_fidelity"):
    return {Path(r["name"]).stem: r.get(column) for r in report["videos"]}


def test_on_the_toy(home):
    "The right path is nearer than a wrong one, whoever goes it; nothing moves: nothing came back."
    write_video("videos/short.mp4", render(CAT, "swinging", seed=1)[0][:1])
    report = scored(out="report")
    found, mean = rows(report), rows(report, "motion_fidelity_mean")
    assert found["still"] == 0 and found["short"] is None
    assert found["wrong"] < min(found["right"], found["another"])
    assert all(mean[k] <= found[k] for k in ("wrong", "right", "another"))
    why = next(r["why"] for r in report["videos"] if r["name"] == "short.mp4")
    assert why["motion_fidelity"] == "it needs 2 frames 1 apart, the video has 1"
    assert {report["encoders"][f"motion_fidelity{k}"] for k in ("", "_mean")} == {"points along dis"}
    assert report["summary"]["motion_fidelity"]["n"] == 4
    write_pages("report")
    assert "Motion fidelity ↑" in Path("report/report.md").read_text(encoding="utf-8")
    again = scored()
    assert again["counts"]["decoded"] == 0 and rows(again) == found
    write_video("case/motion/videos/more.mp4", render(BEAR, "hopping", seed=3)[0])
    assert rows(scored())["wrong"] > found["wrong"]  # compared with what is there now


def test_what_is_no_fault_of_a_video(home):
    none = {k: v for k, v in TOY().items() if k != "tracks"}
    for how, says in ((dict(motion=None), "no clip of the motion was given"),
                      (dict(encoders=none), "none that follows")):
        report = scored(**how)
        why = next(iter(report["videos"]))["why"]["motion_fidelity"]
        assert why.startswith("not computed: ") and says in why and not set(rows(report).values()) - {None}
    for clip in Path("case/motion/videos").iterdir(): clip.unlink()
    write_video("case/motion/videos/00.mp4", render(CAT, "still", seed=3)[0])
    Path("case/motion/prompts.txt").write_text("a cat is swinging\n")
    report = scored()
    assert next(iter(report["videos"]))["why"]["motion_fidelity"] == "not computed: nothing moves in the clip"
    assert report["summary"]["motion_fidelity"]["mean"] is None


def test_in_pieces_as_a_whole_and_thinned():
    "Twenty-four frames a second, an odd piece, more frames than are followed."
    seen, clip = [], render(CAT, "swinging", frames=60, height=32, width=32)[0]
    def spy(frames): seen.append(frames); return walks(1, frames=len(frames))
    spy.name = "spy"
    for cuts in ([60], [7, 16, 16, 21]):
        s = Scorer(24, dict(tracks=spy), References(clips=[(clip, 24)]), wanted=("motion_fidelity",))
        for part in np.split(clip, np.cumsum(cuts)[:-1]): s.feed(part)
        assert s.values()["motion_fidelity"] == [pytest.approx(1)] * 2
    assert all(np.array_equal(frames, clip[::3]) for frames in seen)
    s = Scorer(8, dict(tracks=spy), References(clips=[(clip, 24)]), wanted=("motion_fidelity",))
    for _ in range(4): s.feed(clip)
    s.values()
    assert len(seen[-2]) == 128 or len(seen[-1]) == 128


def test_the_shell_takes_the_tracks(home, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(encoders, "load_encoders", lambda *given: asked.append(given) or TOY())
    ask = ["--videos", "videos", "--identity", "case/identity", "--motion", "case/motion", "--out", "scores"]
    ask += ["--encoders", "toy"]
    assert main(["evaluate", *ask, "--tracks", "flow"]) == 0 and asked[0][-1] == "flow"
    assert "Motion fidelity" in capsys.readouterr().out
    assert main(["evaluate", *ask, "--tracks", "none"]) == 2


def test_results_from_before_have_no_such_column(home):
    "Pages and tables of what was recorded without it go on."
    scored(out="report")
    path = Path("report/report.json")
    old = json.loads(path.read_text(encoding="utf-8"))
    for part in [old["summary"], old["summary_cases"], old["encoders"], *old["videos"]]:
        for k in ("motion_fidelity", "motion_fidelity_mean"): part.pop(k, None)
    path.write_text(json.dumps(old), encoding="utf-8")
    for page in write_pages("report"): assert "Motion fidelity" not in page.read_text(encoding="utf-8")
    both = cells(dict(old=old["summary"], new=dict(motion_fidelity=dict(mean=.5, low=.4, high=.6, n=3))))
    assert list(both["Motion fidelity ↑"]) == ["–", "0.500 [0.400, 0.600]"]


def test_a_benchmark_of_published_networks_does_without(monkeypatch):
    "CoTracker is no part of the paper's table: its absence stops no run."
    from dualreal.experiments.jobs import networks_of
    lost = dict(tracks=Missing("cotracker3 offline", "not here"))
    monkeypatch.setattr(encoders, "load_encoders", lambda *a, **k: lost)
    networks_of.cache_clear()
    assert isinstance(networks_of("published")["tracks"], Missing)
    networks_of.cache_clear()


def test_the_toy_has_one_flow():
    assert isinstance(TOY()["flow"], DisFlow) and TOY()["tracks"].flow is TOY()["flow"]
