"""Composing: sides of two runs, untouched; a controller that alone learns; a run like any other."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_trainer import alike, home, same, settings, stop_at  # noqa: F401  home is a fixture

from dualreal.checkpoint import read_adapter, write_adapter
from dualreal.cli import main
from dualreal.compose import compose
from dualreal.core import InputError
from dualreal.memory import Plan
from dualreal.resume import Interrupted
from dualreal.settings import ComposeConfig, as_flags
from dualreal.trainer import train

FIT = 3


@pytest.fixture(scope="module")
def runs(home):  # noqa: F811
    "Two short runs of different seeds."
    for name, seed in dict(a=42, b=7).items(): short(home, name, seed=seed)
    return home


def short(home, name, **more):  # noqa: F811
    how = dict(steps=4, coupling="one-way", save_every=0)
    train(settings(home, home / name, **{**how, **more}), progress=False)


def asked(home, out, identity="a", motion="b", **more):  # noqa: F811
    known = dict(steps=FIT, samples=0, save_every=0, cache=f"{home / 'cache'}", device="cpu", prompts=["cat"])
    return ComposeConfig(f"{home / identity}", f"{home / motion}", f"{home / out}", **{**known, **more})


def made(home, out, identity="a", motion="b", **more):  # noqa: F811
    return read_adapter(compose(asked(home, out, identity, motion, **more), progress=False))


def part(name): return "identity" if ".id_" in name else "motion" if ".motion_" in name else "controller"


def moved(one, other) -> set:
    "Parts of which a number differs."
    return {part(k) for k, t in one.items() if not torch.equal(t, other[k])}


def parents(home, identity="a", motion="b"):  # noqa: F811
    a, b = (read_adapter(home / name).tensors for name in (identity, motion))
    return {k: (a if part(k) == "identity" else b)[k] for k in a}, a, b


def test_sides_are_their_runs_to_the_bit_and_the_controller_learns(runs):
    one, (sides, a, b) = made(runs, "fitted"), parents(runs)
    assert moved(one.tensors, sides) == {"controller"}
    assert moved(a, b) == {"identity", "motion", "controller"}  # the runs themselves differ in all
    log = json.loads((runs / "fitted/run.json").read_text())["log"]
    assert len(log) == FIT
    for norms in (row["grad_norms"] for row in log):
        assert norms["identity"] == norms["motion"] == 0 < norms["controller"]


def test_its_file_names_both_parents(runs):
    if not (runs / "fitted").exists(): made(runs, "fitted")
    info, a, b = read_adapter(runs / "fitted").info, *(read_adapter(runs / k).info for k in "ab")
    told = info["composed"]
    assert (told["start"], told["steps"], told["motion"]["coupling"]) == ("mean", FIT, "one-way")
    assert [(told[k]["run"], told[k]["seed"]) for k in ("identity", "motion")] == [("a", 42), ("b", 7)]
    assert (info["subject"], info["motion"], info["base"]) == (a["subject"], b["motion"], a["base"])
    assert info["training"]["coupling"] == "one-way" and info["steps_done"] == FIT
    assert str(runs) not in json.dumps(told)  # the file is shared: it names folders, not the way to them


@pytest.mark.parametrize("start", ["fresh", "identity", "motion", "mean"])
def test_without_a_step_it_is_the_start(runs, start):
    one, (sides, a, b) = made(runs, f"plain-{start}", steps=0, start=start), parents(runs)
    if start == "fresh":
        assert not one.settings["controller"] and not any(part(k) == "controller" for k in one.tensors)
    for k in (k for k in one.tensors if part(k) == "controller"):
        assert torch.equal(one.tensors[k], dict(identity=a[k], motion=b[k]).get(start, (a[k] + b[k]) / 2))
    assert all(torch.equal(t, sides[k]) for k, t in one.tensors.items() if part(k) != "controller")


def test_polish_moves_the_sides_and_only_at_its_steps(runs):
    seen, sides = [], parents(runs)[0]
    def look(run, row): seen.append(moved(run.adapter, sides) - {"controller"})
    compose(asked(runs, "polished", steps=2, polish=4), look, progress=False)
    rows = json.loads((runs / "polished/run.json").read_text())["log"]
    assert seen[:2] == [set()] * 2 and seen[2] == {rows[2]["dimension"]}
    assert seen[-1] == {row["dimension"] for row in rows[2:]}


@pytest.mark.slow
def test_a_fit_goes_on_where_it_was_stopped(runs):
    config = asked(runs, "halted", steps=4, polish=2)
    with pytest.raises(Interrupted): compose(config, stop_at(3), progress=False)
    with pytest.raises(InputError, match="other sides, or another start"):
        compose(replace(config, start="fresh", resume=True), progress=False)
    compose(replace(config, resume=True), progress=False)
    compose(replace(config, out=f"{runs / 'at once'}"), progress=False)
    assert same(runs / "halted", runs / "at once")
    assert compose(replace(config, resume=True), progress=False).parent == runs / "halted"  # nothing to do


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [0, 2])
def test_frozen_sides_pass_the_gradient_on_however_memory_is_saved(runs, monkeypatch, streamed):
    "Blocks that are run again, and blocks whose weights come and go: the controller learns the same."
    if not (runs / "fitted").exists(): made(runs, "fitted")
    saving = Plan(2, attention=1, offload=bool(streamed), streamed=streamed, budget=1, parts=(("all", 1),))
    monkeypatch.setattr("dualreal.memory.plan", lambda *args: saving)
    made(runs, f"saving-{streamed}", memory="auto")
    assert alike(runs / f"saving-{streamed}", runs / "fitted")


@pytest.mark.slow
def test_sides_that_were_alone_get_a_fresh_controller(runs):
    for name, seed in dict(c=42, d=7).items(): short(runs, name, seed=seed, coupling="none")
    one = made(runs, "alone", "c", "d")
    assert one.info["composed"]["start"] == "fresh" and one.training["coupling"] == "mutual"
    assert one.info["composed"]["identity"]["coupling"] == "none" and one.settings["controller"]
    assert any(part(k) == "controller" for k in one.tensors)
    with pytest.raises(InputError, match="has no controller; give --start fresh"):
        made(runs, "not", "c", "d", start="mean")


@pytest.mark.slow
def test_a_bare_file_needs_its_data_named(runs, tmp_path):
    shutil.copy(runs / "a/adapter.safetensors", tmp_path / "bare.safetensors")
    bare = tmp_path / "bare.safetensors"
    with pytest.raises(InputError, match="does not say which images .* --identity-data DIR, or --steps 0"):
        made(runs, "bare", bare)
    told = made(runs, "bare", bare, identity_data=f"{runs / 'one'}")
    assert told.info["composed"]["identity"]["run"] == "bare.safetensors"
    if not (runs / "fitted").exists(): made(runs, "fitted")
    assert same(runs / "bare", runs / "fitted")
    shutil.copytree(runs / "a", tmp_path / "a")
    note = tmp_path / "a/config.json"
    note.write_text(note.read_text().replace(str(runs / "one"), "gone"))
    with pytest.raises(InputError, match="gone, are not there"): made(runs, "moved", tmp_path / "a")


def test_a_published_file_without_a_word_of_its_base(runs, tmp_path):
    write_adapter(read_adapter(runs / "a"), tmp_path / "a.pth")
    with pytest.raises(InputError, match="does not name its base"):
        made(runs, "pth", tmp_path / "a.pth", identity_data=f"{runs / 'one'}")
    plain = made(runs, "pth", tmp_path / "a.pth", steps=0)
    assert moved(plain.tensors, made(runs, "both", steps=0).tensors) == set() and plain.base is None


@pytest.mark.parametrize("change, says", [
    (dict(rank=3), "rank: 2 of .* and 3 of"), (dict(scale=.5), "scale: 0.2 of .* and 0.5"),
    (dict(groups=1), "groups: 2 of .* and 1"), (dict(base="other"), "base: .* and other of")])
def test_what_does_not_agree_is_named(runs, tmp_path, change, says):
    b = read_adapter(runs / "b")
    told = {k: v for k, v in change.items() if k != "base"}
    info = dict(b.info, base=change.get("base", b.base), config=b.settings | told)
    write_adapter(replace(b, info=info), tmp_path)
    with pytest.raises(InputError, match=says): made(runs, "no", motion=tmp_path)


def test_one_side_alone_and_other_depths_are_refused(runs, tmp_path):
    a = read_adapter(runs / "a")
    half = {k: t for k, t in a.tensors.items() if part(k) != "motion"}
    info = dict(a.info, config=a.settings | dict(motion=False))
    write_adapter(replace(a, tensors=half, info=info), tmp_path / "half")
    with pytest.raises(InputError, match="has no motion side"): made(runs, "no", motion=tmp_path / "half")
    less = {k: t for k, t in a.tensors.items() if "blocks.1." not in k}
    write_adapter(replace(a, tensors=less), tmp_path / "less")
    with pytest.raises(InputError, match="different transformers"): made(runs, "no", motion=tmp_path / "less")


@pytest.mark.slow
def test_what_comes_out_is_a_run_like_another(runs, tmp_path, capsys):
    "In the shell: composed, made a video with, measured, described, composed again."
    shell = asked(runs, "shell", samples=1)
    assert main(["compose", *as_flags(shell)]) == 0
    said = capsys.readouterr().out
    assert "identity of a (one-way), motion of b (one-way)" in said and "dualreal generate --adapter" in said
    folder = runs / "shell"
    for name in ("adapter.safetensors", "run.json", "config.json", "composed.json", "contact_sheet.png"):
        assert (folder / name).is_file()
    ask = ["--adapter", f"{folder}", "--prompt", "cat", "--steps", "2", "--device", "cpu"]
    assert main(["generate", *ask, "--out", f"{tmp_path / 'v.mp4'}"]) == 0
    assert main(["inspect", f"{folder}"]) == 0 and main(["card", f"{folder}"]) == 0
    assert "identity of a (one-way), motion of b (one-way)" in capsys.readouterr().out
    assert "identity of a (one-way), motion of b" in (folder / "README.md").read_text(encoding="utf-8")
    assert main(["compose", *as_flags(shell)]) == 2
    assert main(["compose", *as_flags(replace(shell, resume=True))]) == 0
    again = asked(runs, "again", "shell", "a", steps=0, samples=1)
    assert main(["compose", *as_flags(again)]) == 0 and len(list((runs / "again/samples").glob("*.mp4"))) == 1
    ask[1] = f"{runs / 'again'}"
    assert main(["generate", *ask, "--out", f"{tmp_path / 'w.mp4'}"]) == 0


@pytest.mark.parametrize("words, says", [
    ("--identity no --motion a --out x", "no: does not exist"),
    ("--identity a --motion b --out a", "holds a run"),
    ("--identity a --motion b --out x --identity-data no", "--identity-data no: no folder"),
    ("--identity a --motion b --out x --steps -1", "steps -1: give at least 0")])
def test_the_shell_is_told_in_one_line(runs, monkeypatch, capsys, words, says):
    monkeypatch.chdir(runs)
    assert main(["compose", *words.split()]) == 2
    assert says in capsys.readouterr().err and not Path("x").exists()
