"""What must hold of the metrics for any video: random sizes, lengths and rates."""
import numpy as np
import pytest

from dualreal.metrics import (
    Undefined,
    bootstrap,
    dynamic_degree,
    flow_stride,
    macro_average,
    motion_smoothness,
    temporal_flickering,
)

def clips(count=25):
    "Random videos (F, H, W, 3) with random rates; a seed each, so that a failure names its video."
    for seed in range(count):
        rng = np.random.default_rng(seed)
        shape = (int(rng.integers(1, 12)), int(rng.integers(1, 70)), int(rng.integers(1, 70)), 3)
        fps = float(rng.choice([0, 6, 8, 10, 23.976, 25, 29.97, 60]))
        yield rng.integers(0, 256, shape, dtype=np.uint8), fps


def still(a, b): return np.zeros((*a.shape[:2], 2))


@pytest.mark.parametrize("video,fps", list(clips()))
def test_any_video_has_a_score_or_a_reason(video, fps):
    for least, score in ((2, temporal_flickering), (3, lambda v: motion_smoothness(v, lambda a, b: a))):
        if len(video) < least:
            with pytest.raises(Undefined, match=f"has {len(video)}"): score(video)
        else: assert 0 <= score(video) <= 1
    side = 16 * ((video.shape[1] + 15) // 16), 16 * ((video.shape[2] + 15) // 16)
    if len(video) <= flow_stride(fps) or side[0] * side[1] < 20:
        with pytest.raises(Undefined): dynamic_degree(video, fps, still)
    else: assert dynamic_degree(video, fps, still) == 0


@pytest.mark.parametrize("video,fps", list(clips(5)))
def test_time_backwards_flickers_the_same(video, fps):
    if len(video) < 2: return
    assert temporal_flickering(video) == pytest.approx(temporal_flickering(video[::-1]), abs=1e-15)


@pytest.mark.parametrize("shape,kind", [((3, 4, 4, 3), float), ((3, 4, 4), "uint8"), ((3, 4, 4, 4), "uint8")])
def test_what_is_no_video_is_said(shape, kind):
    with pytest.raises(ValueError, match="must be uint8"): temporal_flickering(np.zeros(shape, kind))


def test_intervals_hold_the_mean_and_shrink():
    rng = np.random.default_rng(0)
    widths = []
    for n in (5, 50, 500):
        b = bootstrap(rng.normal(size=n))
        assert b["low"] < b["mean"] < b["high"] and b["n"] == n
        widths.append(b["high"] - b["low"])
    assert widths[0] > widths[1] > widths[2]
    assert macro_average(dict(a=[0., 1.], b=[1.]))["mean"] == .75
