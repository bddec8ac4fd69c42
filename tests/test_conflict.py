"""What a trained pair is asked, and that asking changes nothing."""
import json

import numpy as np
import pytest
import torch

from dualreal.card import shared_files, write_card
from dualreal.cli import main
from dualreal.conflict import DIALS, SHIPPED, Judge, Probe, conflict, front, places, probing
from dualreal.core import InputError
from dualreal.encoders import load_encoders
from dualreal.generate import generate, open_pipe
from dualreal.settings import ConflictConfig, TrainConfig
from dualreal.toy.world import HELD_OUT_SUBJECTS, identity_pictures, render, write_case
from dualreal.trainer import train
from dualreal.tuner import conductor_of

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("conflict")
    write_case(home / "case", "teal_cat", "swinging", images=2, clips=3)
    how = dict(steps=3, samples=0, save_every=0, batch_identity=2, batch_motion=2, micro_batch=2,
               lr=.05, warmup=0, trackers="none", cache=str(home / "cache"))
    train(TrainConfig(f"{home}/case/identity", f"{home}/case/motion", f"{home}/run", **how), progress=False)
    return home / "run"


def film(pipe, probe, reference):
    with probing(pipe, probe, 2):
        return generate(pipe, "a cat * is swinging", None, reference, steps=2, progress=False).frames


def test_probes_change_what_they_say(run):
    "All blocks left out one by one is a dimension alone; a part that never comes, and none, change nothing."
    from dualreal.checkpoint import read_adapter
    adapter = read_adapter(run)
    pipe = open_pipe(adapter)
    depth, hooks = len(pipe.transformer.transformer_blocks), len(pipe.transformer._forward_pre_hooks)
    made = lambda **how: film(pipe, Probe("", **how), adapter.reference)
    whole, alone = made(), made(off="motion")
    assert (made(off="motion", part=(1., 1.)) == whole).all() and (whole != alone).any()
    assert (made(off="motion", blocks=tuple(range(depth))) == alone).all()
    late = made(off="motion", part=(.5, 1.))
    assert (late != whole).any() and (late != alone).any()
    assert (made(strength=1.5) != whole).any()
    conductor = conductor_of(pipe.transformer) # as it was
    assert conductor.acting == ("identity", "motion") and set(conductor.scaling.values()) == {1.}
    assert len(pipe.transformer._forward_pre_hooks) == hooks
    plain = generate(pipe, "a cat * is swinging", None, adapter.reference, steps=2, progress=False).frames
    assert (plain == whole).all()


def test_every_place_is_asked_once():
    for depth, groups in ((8, 4), (42, 7), (30, 6)):
        some = [p for p in places(depth, groups) if p.blocks]
        for one in ("identity", "motion"):
            assert sorted(b for p in some if p.off == one for b in p.blocks) == list(range(depth))
    assert len({p.name for p in front() + places(42, 7)}) == len(front()) + 2 * (7 + 3)


def test_a_leak_is_the_actors_look():
    "Drawn videos: the subject in the motion leaks nothing, another actor all of it."
    rng = np.random.default_rng(0)
    cat, bear = HELD_OUT_SUBJECTS["teal_cat"], HELD_OUT_SUBJECTS["magenta_bear"]
    draw = lambda who: render(who, "hopping", "room", 9, 64, 64, rng, .3)[0]
    judge = Judge(identity_pictures(cat, 4, rng, 64, 64)[0], [draw(bear) for _ in range(3)], 8, "a cat *",
                  load_encoders("toy"))
    own, other = (judge(draw(who)) for who in (cat, bear))
    assert judge.leak(own) < .4 < .7 < judge.leak(other), (judge.leak(own), judge.leak(other))
    assert own["identity"] > other["identity"] and min(own["motion"], other["motion"]) > .7
    photos = identity_pictures(cat, 2, rng, 64, 64)[0]
    single = Judge(photos, [draw(bear)], 8, "a cat *", load_encoders("toy"))
    assert single.leak(own) is None # one clip says nothing of how actors differ


def test_the_command(run, capsys, monkeypatch):
    monkeypatch.setattr("dualreal.conflict.places", lambda *how: places(*how)[:2]) # the notebook asks for all
    assert main(["conflict", str(run), "--encoders", "toy", "--steps", "2"]) == 0
    said = capsys.readouterr().out
    report = json.loads((run / "conflict/conflict.json").read_text(encoding="utf-8"))
    assert all(line in said for line in report["advice"]) and (run / "conflict/conflict.png").is_file()
    assert len(report["rows"]) == len(list((run / "conflict/videos").glob("*.mp4")))
    assert {f"dial {d:g}" for d in DIALS} <= report["rows"].keys() and SHIPPED in report["rows"]
    card = write_card(run).read_text(encoding="utf-8")
    assert "## Subject against motion" in card and report["advice"][0] in card
    assert run / "conflict/conflict.png" in shared_files(run)
    (run / "conflict/conflict.json").write_text(json.dumps(report | dict(adapter="another")))
    with pytest.raises(InputError, match="of another adapter"): write_card(run)


def test_refusals(run, tmp_path, capsys):
    for words, said in (("no", "no such"), (f"{run} --identity {tmp_path}/no", "no folder is there"),
                        (f"{run} --encoders published --weights {tmp_path}", "cannot be measured")):
        assert main(["conflict", *words.split()]) == 2
        assert said in capsys.readouterr().err.replace("does not exist", "no such")
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes((run / "adapter.safetensors").read_bytes())
    with pytest.raises(InputError, match="give --identity DIR"):
        conflict(ConflictConfig(str(lone), out=str(tmp_path / "out"), encoders="toy"), progress=False)
    assert torch.is_grad_enabled()
