"""Couplings: who acts in which step of a training, and that nothing else ever knows of it."""
import json
from pathlib import Path

import pytest
import tiny
import torch
from test_trainer import home, same, settings, stop_at  # noqa: F401  home is a fixture
from tiny import CONFIGS, adapted, attach, embedding, full, inputs, random_weights, run, stock
from torch.testing import assert_close

from dualreal import loop
from dualreal.bottleneck import BottleneckPair
from dualreal.checkpoint import load_adapter, read_adapter, save_adapter
from dualreal.cli import main
from dualreal.core import InputError
from dualreal.memory import set_policies
from dualreal.resume import Interrupted
from dualreal.settings import TrainConfig, as_flags
from dualreal.switch import COUPLINGS
from dualreal.trainer import prepare, train
from dualreal.tuner import Site, reference

BOTH = "identity", "motion"
OTHER = dict(identity="motion", motion="identity")
forms = pytest.mark.parametrize("fused", [False, True], ids=["naive", "fused"])
each_side = pytest.mark.parametrize("side", BOTH)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_coupling = pytest.mark.parametrize("coupling", COUPLINGS)


def gradients(transformer, acting=BOTH, between=None):
    return tiny.gradients(transformer, embedding(), between, acting)


def pairs(transformer):
    return [s.dualreal_bottleneck["default"] for s in transformer.modules() if isinstance(s, Site)]


def side_of(name): return "motion" if ".motion_" in name else "identity"


def unlearnt(weights, sides):
    "The same, with sides that add their skip only: their `up` is zero."
    ups = [k for k in weights if "_adapter.up_linear" in k and side_of(k) in sides]
    return weights | {k: torch.zeros_like(weights[k]) for k in ups}


# A forward pass

@forms
@each_side
@every_config
def test_the_skip_stays_and_nothing_else(config, side, fused):
    "Output and gradients are those of a plain adapter whose other side is at its start; that side has none."
    transformer = adapted(config, fused=fused)
    weights = unlearnt(random_weights(config), [OTHER[side]])
    like = stock()
    load_adapter(like, weights, fused=False, scale=full(config).scale)
    with torch.no_grad(), reference(transformer, embedding(), (side,)): out = transformer(**inputs()).sample
    assert_close(out, run(like, embedding()), rtol=1e-9, atol=1e-12)
    if not getattr(full(config), side): return
    ours, theirs = gradients(transformer, (side,))[1], gradients(like)[1]
    theirs = {n: g for n, g in theirs.items() if f".{OTHER[side]}." not in n}
    assert_close(ours, theirs, rtol=1e-8, atol=1e-13)


@forms
@each_side
def test_who_does_not_act_is_not_computed(side, fused):
    "Not even looked at: nothing is left of the other bottlenecks."
    transformer = adapted(fused=fused)
    expected = gradients(transformer, (side,))
    for pair in pairs(transformer): setattr(pair, OTHER[side], torch.nn.Identity())
    out, grads = gradients(transformer, (side,))
    assert torch.equal(out, expected[0]) and all(torch.equal(g, expected[1][n]) for n, g in grads.items())
    with pytest.raises(AttributeError): gradients(transformer)


@forms
@each_side
@pytest.mark.parametrize("policy", ["stock", "nothing", "attention"])
def test_checkpointed_is_plain(side, policy, fused):
    "The recomputation comes when both sides act again, and another pass has been made."
    transformer = adapted(fused=fused)
    out, grads = gradients(transformer, (side,))
    if policy == "stock": transformer.enable_gradient_checkpointing()
    else: set_policies(transformer, [policy] * 4)

    def between():
        run(transformer, -embedding())
        with reference(transformer, None, (OTHER[side],)): transformer(**inputs(seed=7))

    again, recomputed = gradients(transformer, (side,), between)
    assert torch.equal(again, out)
    assert_close(recomputed, grads, rtol=1e-12, atol=1e-15)
    assert not any(f".{OTHER[side]}." in n for n in grads)


@forms
@pytest.mark.parametrize("config", [CONFIGS[name] for name in ("default", "no controller", "motion only")])
def test_all_are_alike_at_the_start(config, fused):
    transformer = stock()
    load_adapter(transformer, unlearnt(random_weights(config), BOTH), fused=fused, scale=full(config).scale)
    outs = []
    for steps in COUPLINGS.values():
        for acting in steps.values():
            with torch.no_grad(), reference(transformer, embedding(), acting):
                outs.append(transformer(**inputs()).sample)
    for out in outs: assert_close(out, run(transformer, embedding()), rtol=1e-12, atol=1e-13)


def test_two_adapters():
    "Each keeps its skip; of the two, the side that acts is the one that has it."
    transformer = attach(attach(stock(), CONFIGS["identity alone"], "a"), CONFIGS["motion alone"], "b")
    transformer.set_adapter(["a", "b"])
    with torch.no_grad(), reference(transformer, None, ("motion",)): out = transformer(**inputs()).sample
    like = stock()
    load_adapter(like, unlearnt(random_weights(CONFIGS["identity alone"]), ["identity"]), "a")
    attach(like, CONFIGS["motion alone"], "b")
    like.set_adapter(["a", "b"])
    assert_close(out, run(like), rtol=1e-9, atol=1e-12)


# The loop

class Spy:
    "What every bottleneck pair was told: in training (with gradients), and in generation."
    def __init__(self, monkeypatch):
        self.training, self.generation, forward = [], [], BottleneckPair.forward

        def noted(pair, x, w_identity, w_motion, e=None, out=None, opposed=False, acting=None):
            where = self.training if torch.is_grad_enabled() else self.generation
            where.append((tuple(acting), e))
            return forward(pair, x, w_identity, w_motion, e, out, opposed, acting)
        monkeypatch.setattr(BottleneckPair, "forward", noted)


def referenced(home, out, **more):  # noqa: F811
    return settings(home, out, **{**dict(reference_encoder="toy", steps=6), **more})


def sides(out):
    "The tensors of an adapter by side."
    tensors, found = read_adapter(Path(out) / "adapter.safetensors").tensors, dict(identity={}, motion={})
    for k, t in tensors.items():
        if not k.startswith("controller."): found[side_of(k)][k] = t
    return found


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@every_coupling
def test_steps_as_ordered(home, tmp_path, monkeypatch, coupling):  # noqa: F811
    "Who acts, and what it is told: a clip its first frame's embedding, with one-way a picture its own."
    state = prepare(referenced(home, tmp_path / "run", coupling=coupling), progress=False)
    for item in (*state.case.identity, *state.case.motion): item.std.zero_()  # latents tell the sample
    factor, told, real = state.pipe.vae.config.scaling_factor, [], loop.prediction_loss

    def noted(transformer, scheduler, latents, *rest):
        spy.training.clear()
        loss = real(transformer, scheduler, latents, *rest)
        told.append((latents, spy.training[0], len({str(known) for known in spy.training}) == 1))
        return loss
    spy = Spy(monkeypatch)
    monkeypatch.setattr(loop, "prediction_loss", noted)
    for _ in range(6):
        told.clear()
        dimension = loop.train_step(state)["dimension"]
        gets = dimension == "motion" or coupling == "one-way"
        for latents, (acting, e), alike in told:
            assert alike and acting == COUPLINGS[coupling][dimension]
            known = getattr(state.case, dimension)
            items = [next(i for i in known if torch.equal(i.mean * factor, x)) for x in latents]
            assert e is None if not gets else torch.equal(e, torch.stack([i.reference for i in items]))
        assert told


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory):  # noqa: F811
    "A run of each coupling with fixed weights, which `none` implies."
    out = tmp_path_factory.mktemp("couplings")
    for coupling in COUPLINGS: train(whole(home, out / coupling, coupling), progress=False)
    return out


def whole(home, out, coupling, **more):  # noqa: F811
    return referenced(home, out, coupling=coupling, controller=coupling == "none", **more)


def test_motion_learns_alike_without_identity(runs):
    one_way, none, mutual = (sides(runs / c) for c in ("one-way", "none", "mutual"))
    assert equal(one_way["motion"], none["motion"]) and not equal(mutual["motion"], none["motion"])
    assert not equal(one_way["identity"], none["identity"])
    assert not equal(one_way["identity"], mutual["identity"])


def test_checkpointed_run_is_the_same(home, runs, tmp_path):  # noqa: F811
    train(whole(home, tmp_path / "run", "one-way", gradient_checkpointing=True), progress=False)
    assert same(tmp_path / "run", runs / "one-way")


def test_generation_always_runs_both(home, tmp_path, monkeypatch):  # noqa: F811
    "Previews and final videos of a run, and its adapter once it is loaded: both sides, with the reference."
    spy = Spy(monkeypatch)
    always = lambda told: {(acting, e is None) for acting, e in told} == {(BOTH, False)}
    config = referenced(home, tmp_path / "run", coupling="none", steps=4, preview_every=2, samples=1)
    train(config, progress=False)
    assert {acting for acting, _ in spy.training} == {("identity",), ("motion",)} and always(spy.generation)
    spy.generation.clear()
    asked = ["--prompt", "cat", "--device", "cpu", "--out", f"{tmp_path / 'a.gif'}"]
    assert main(["generate", "--adapter", f"{tmp_path / 'run'}", *asked]) == 0
    assert always(spy.generation)
    spy.generation.clear()
    transformer = adapted()
    with reference(transformer, None, ("motion",)): run(transformer, embedding())  # within a step, too
    assert always(spy.generation)


# What is said, recorded, refused

@every_coupling
def test_recorded(runs, coupling, capsys):
    "In run.json, in the adapter, on its card; with `none` also that the weights are fixed."
    told = json.loads((runs / coupling / "run.json").read_text())
    adapter = read_adapter(runs / coupling)
    for where in (told["config"], told["training"], adapter.training):
        assert (where["coupling"], where["controller"]) == (coupling, False)
    assert adapter.settings["controller"] is False
    assert main(["inspect", f"{runs / coupling}"]) == 0
    assert f"coupling           {coupling}\n" in capsys.readouterr().out
    assert main(["card", f"{runs / coupling}"]) == 0
    assert f"| coupling | `{coupling}` |" in (runs / coupling / "README.md").read_text()


def test_without_the_field_it_is_mutual(home, tmp_path, capsys):  # noqa: F811
    "A published file, an adapter and a run from before there were couplings."
    save_adapter(adapted(), tmp_path / "a.pth")
    save_adapter(adapted(), tmp_path / "old/adapter.safetensors", metadata=dict(training=dict(seed=3)))
    for path in ("a.pth", "old"):
        assert main(["inspect", f"{tmp_path / path}"]) == 0
        assert "coupling           mutual\n" in capsys.readouterr().out
    assert main(["card", f"{tmp_path / 'old'}"]) == 0
    assert "| coupling | `mutual` |" in (tmp_path / "old/README.md").read_text()
    begun = settings(home, tmp_path / "run", steps=3)
    with pytest.raises(Interrupted): train(begun, stop_at(2), progress=False)
    path = tmp_path / "run/config.json"
    old = json.loads(path.read_text())
    del old["coupling"]
    path.write_text(json.dumps(old))
    with pytest.raises(InputError, match="coupling='mutual', not 'one-way'"):
        train(settings(home, tmp_path / "run", steps=3, resume=True, coupling="one-way"), progress=False)
    train(settings(home, tmp_path / "run", steps=3, resume=True), progress=False)


def test_resumed_under_another_coupling(home, runs, tmp_path):  # noqa: F811
    "Refused, whether the folder's settings or only the checkpoint's are left; its own goes on where it was."
    out = tmp_path / "run"
    with pytest.raises(Interrupted): train(whole(home, out, "one-way"), stop_at(2), progress=False)
    for other in ("mutual", "none"):
        with pytest.raises(InputError, match=f"coupling='one-way', not '{other}'"):
            train(whole(home, out, other, resume=True), progress=False)
    (out / "config.json").unlink()
    with pytest.raises(InputError, match="coupling='one-way', not 'none'"):
        train(whole(home, out, "none", resume=True), progress=False)
    train(whole(home, out, "one-way", resume=True), progress=False)
    assert same(out, runs / "one-way")


@pytest.mark.parametrize("coupling", ["one-way", "none"])
def test_it_needs_the_mask(home, tmp_path, capsys, coupling):  # noqa: F811
    config = settings(home, tmp_path / "run", coupling=coupling, gradient_mask=False)
    assert main(["train", *as_flags(config)]) == 2
    assert f"coupling '{coupling}' needs the gradient mask: leave --no-mask out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_words(capsys):
    "The table of the method and the choices of the setting are the same; another word is refused."
    setting = TrainConfig.__dataclass_fields__["coupling"]
    assert setting.metadata["choices"] == tuple(COUPLINGS) and TrainConfig("a", "b", "c").coupling == "mutual"
    assert main(["train", "--identity", "a", "--motion", "b", "--out", "c", "--coupling", "both"]) == 2
    assert "give 'mutual', 'one-way' or 'none'" in capsys.readouterr().err
    transformer = adapted()
    for wrong in ("motion", (), ("motion", "both")):
        with pytest.raises(InputError, match="acting"), reference(transformer, None, wrong): pass
