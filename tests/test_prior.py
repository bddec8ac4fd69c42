"What the wide prior shows: nothing that is held out, nor what might be taken for it."
import numpy as np
import pytest

from dualreal.toy.world import (
    HELD_OUT_MOTIONS,
    HELD_OUT_SUBJECTS,
    MOTIONS,
    near,
    unlike,
    wide_caption,
    wide_clip,
    wide_picture,
)

@pytest.fixture(scope="module")
def drawn():
    "Truth and a caption of 1,000 clips and 1,000 pictures, small."
    rng = np.random.default_rng(123)
    truths = [draw(rng, 8)[1] for draw in (wide_clip, wide_picture) for _ in range(1000)]
    return [(t, wide_caption(rng, t)) for t in truths]


def test_no_held_out_subject_and_none_near_one(drawn):
    held = HELD_OUT_SUBJECTS.values()
    assert not [t.subject for t, _ in drawn if any(near(t.subject, h) for h in held)]
    assert all(near(h, h) for h in held)


def test_no_held_out_motion_and_none_near_one(drawn):
    clips = [t for t, _ in drawn if len(t.x) > 1]
    named = [t.motion for t in clips if isinstance(t.motion, str)]
    paths = [t.motion.path for t in clips if not isinstance(t.motion, str)]
    assert len(clips) == 1000 and 400 < len(named) < 600
    assert set(named) == set(MOTIONS)
    held = [m.path for m in HELD_OUT_MOTIONS.values()]
    assert min(unlike(p, h) for p in paths for h in held) > .6
    assert max(unlike(h, h) for h in held) < 1e-6


def test_no_caption_says_the_star_or_a_held_out_word(drawn):
    unseen = {"*"} | {w for m in HELD_OUT_MOTIONS.values() for w in m.phrase.split()}
    seen = {w for m in MOTIONS.values() for w in m.phrase.split()}
    said = {word for _, caption in drawn for word in caption.split()}
    assert not said & (unseen - seen - {"a"})
    assert len(said) > 300 # names and verbs without meaning among them
