"""Plans change where results come from, never what they are: every exact policy against the plain step."""
import pytest
import torch
from test_tuner import every_config
from tiny import CONFIGS, LAYERS, adapted, embedding, gradients, run
from torch.testing import assert_close

from dualreal import memory
from dualreal.checkpoint import adapter_tensors, folded, load_adapter, published_state, save_adapter
from dualreal.core import InputError
from dualreal.experiments.speed import scheduler_of
from dualreal.memory import Plan, StepSize, apply, set_policies
from dualreal.objective import denoising_loss
from dualreal.switch import focus

PLANS = {"all": Plan(4, everything=4), "attention": Plan(4, attention=4), "nothing": Plan(4),
         "mixed": Plan(4, everything=1, attention=2), "offload": Plan(4, attention=2, offload=True),
         "streamed": Plan(4, attention=4, offload=True, streamed=2), "all streamed": Plan(4, streamed=4)}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
EXACT = {torch.float64: dict(rtol=1e-10, atol=1e-15), torch.float32: dict(rtol=1e-5, atol=1e-7)}


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@every_plan
def test_plans_are_exact(plan, dtype):
    transformer, e = adapted(dtype=dtype), embedding(dtype)
    plain = gradients(transformer, e)
    apply(transformer, plan)
    for _ in range(2): assert_close(gradients(transformer, e), plain, **EXACT[dtype])
    assert_close(gradients(transformer, e, lambda: run(transformer, -e)), plain, **EXACT[dtype])


@every_config
def test_configurations(config):
    transformer = adapted(config)
    plain = gradients(transformer, embedding())
    apply(transformer, PLANS["streamed"])
    assert_close(gradients(transformer, embedding()), plain, **EXACT[torch.float64])


def masked_step(transformer, dimension, micro):
    "Gradients of a masked step on four samples, `micro` at a time; a parameter without one is left out."
    draw = torch.Generator().manual_seed(5)
    random = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    batch = dict(latents=random(4, 2, 2, 4, 4), noise=random(4, 2, 2, 4, 4), prompt_embeds=random(4, 4, 6),
                 reference=random(4, 5), timesteps=torch.tensor([0, 30, 500, 999]))
    if dimension == "identity": batch["reference"] = None
    focus(transformer, dimension)
    for i in range(0, 4, micro):
        some = {k: v if v is None else v[i:i+micro] for k, v in batch.items()}
        (denoising_loss(transformer, scheduler_of(transformer), **some) * micro / 4).backward()
    grads = {k: p.grad for k, p in adapter_tensors(transformer).items() if p.grad is not None}
    transformer.zero_grad()
    return grads


@pytest.mark.parametrize("dimension", ["identity", "motion", None])
@every_plan
def test_masks_and_micro_batches(plan, dimension):
    transformer = adapted()
    plain = masked_step(transformer, dimension, 4)
    assert any(".id_" in k for k in plain) == (dimension != "motion")
    apply(transformer, plan)
    for micro in (1, 2, 4):
        grads = masked_step(transformer, dimension, micro)
        assert grads.keys() == plain.keys()
        assert_close(grads, plain, **EXACT[torch.float64])


def test_streaming_serves_inference_and_stops():
    transformer = adapted()
    expected = run(transformer, embedding())
    stream = apply(transformer, PLANS["all streamed"])
    home = [p.data_ptr() for p in transformer.transformer_blocks[1].parameters()]
    for _ in range(3): assert torch.equal(run(transformer, embedding()), expected)
    assert [p.data_ptr() for p in transformer.transformer_blocks[1].parameters()] == home  # given back
    stream.stop()
    for slot in stream.slots:
        for t in slot: t.fill_(float("nan"))
    assert torch.equal(run(transformer, embedding()), expected)


def test_streaming_uses_only_its_slots():
    "A weight left in its home would pass every test of values: so where blocks find theirs is watched."
    transformer = adapted()
    stream, seen = apply(transformer, PLANS["all streamed"]), []
    slots = [{t.data_ptr() for t in slot} for slot in stream.slots]
    found = lambda i: {where[name].data_ptr() for where, name in stream.places[i]}
    for i, block in enumerate(transformer.transformer_blocks):
        check = lambda *_, i=i: seen.append(found(i) in slots)
        block.norm2.register_forward_pre_hook(check)
    set_policies(transformer, ["nothing"] * LAYERS)
    gradients(transformer, embedding())
    assert len(seen) == 2 * LAYERS and all(seen)


def test_simulation_counts_what_autograd_keeps():
    "Fake tensors against real ones: the bytes that one more block saves."
    from dualreal.experiments.speed import Shapes, build, inputs, kept_per_block
    shapes = Shapes(width=64, blocks=2, text=6, frames=2, height=8, side=8, rank=4, text_dim=12, reference=10)
    transformer, size = build(shapes), StepSize(64, 64, 5)
    assert inputs(shapes)["latents"][:1].shape == size.latents(transformer)
    slope = memory.needs(transformer, size).slope
    real = kept_per_block(shapes, mask=False)
    assert abs(slope[0] / real - 1) < .1, (slope, real)


def test_plan_refuses(monkeypatch):
    transformer, size = adapted(), StepSize(32, 32, 5)
    with pytest.raises(InputError, match="give auto or a number"): memory.plan(transformer, size, "lots")
    with pytest.raises(InputError, match="1 x 32x32x5 needs at least"): memory.plan(transformer, size, 1e-9)
    assert memory.plan(transformer, size, "auto").everything == LAYERS
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="pip install bitsandbytes"): memory.adamw([], eight_bit=True)


@every_config
def test_folded(config, tmp_path):
    "One reference built in: same output, a smaller file, loads like any adapter."
    transformer, e = adapted(config), embedding(batch=1)
    state = published_state(transformer)
    small = folded(state, e)
    assert not [k for k in small if "condition" in k] and published_state(transformer).keys() == state.keys()
    known = {"scale": transformer.peft_config["default"].scale}
    plain = adapted()
    plain.delete_adapters("default")
    load_adapter(plain, small, **known)
    assert_close(run(plain), run(transformer, e), rtol=1e-10, atol=1e-12)
    path = save_adapter(plain, tmp_path)
    again = adapted()
    again.delete_adapters("default")
    load_adapter(again, path)
    assert torch.equal(run(again, e), run(plain))


def test_folded_size():
    "At the shapes of the published adapter: a fifth."
    from dualreal.bottleneck import BottleneckPair
    from dualreal.stageblender import StageBlender
    with torch.device("meta"): pair, blender = BottleneckPair(3072, 64, 1024), StageBlender(3072, 512)
    count = lambda m: sum(p.numel() for p in m.parameters())
    whole = 84 * count(pair) + count(blender)
    assert (whole - 84 * count(pair.motion.condition)) / whole < .22


def test_compiled_blocks_are_named(monkeypatch):
    "CogVideoX names no repeated blocks; we do."
    transformer, compiled = adapted(CONFIGS["default"]), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append(type(self).__name__))
    with pytest.raises(ValueError, match="_repeated_blocks"): transformer.compile_repeated_blocks()
    memory.compile_blocks(transformer)
    assert compiled == ["CogVideoXBlock"] * LAYERS
