"""The method on a stock transformer: every configuration against the formulas, and what PEFT users expect."""
import copy
import math
import pickle

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tiny import (
    CONFIGS,
    LAYERS,
    RANK,
    REFERENCE,
    TIME,
    WIDTH,
    adapted,
    attach,
    embedding,
    full,
    gradients,
    inputs,
    random_weights,
    run,
    stock,
)
from torch.testing import assert_close

from dualreal.checkpoint import adapter_tensors, load_adapter, published_state, save_adapter
from dualreal.core import InputError
from dualreal.switch import focus, parts_of
from dualreal.tuner import DualRealConfig, active, blend_weights, conductor_of, dial, reference

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


# The method, written down a third time: from a stock transformer and a published dictionary, nothing of ours.

def linear(weights, name, x): return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x): return x * .5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x): return .5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + .044715 * x**3)))


def bottleneck(weights, name, x, e):
    given = e is not None and f"{name}.condition_linear.weight" in weights
    y = x + linear(weights, f"{name}.condition_linear", e).unsqueeze(1) if given else x
    return linear(weights, f"{name}.up_linear", gelu(linear(weights, f"{name}.down_linear", y))) + x


def identity_weight(weights, t, h, s):
    "The controller of the method's section 3, (B, n)."
    if "controller.norm.weight" not in weights: return torch.full((len(h), 1), s / 2, dtype=h.dtype)
    c = linear(weights, "controller.channel_encoder.0", h.max(dim=1).values)
    shift, scale, gate = linear(weights, "controller.timestep_encoder.1", t * torch.sigmoid(t)).chunk(3, -1)
    f = (c - c.mean(-1, keepdim=True)) / torch.sqrt(c.var(-1, unbiased=False, keepdim=True) + 1e-5)
    f = f * weights["controller.norm.weight"] + weights["controller.norm.bias"]
    f = f * (1 + scale) + shift
    f = gelu_tanh(linear(weights, "controller.fuse_proj", f))
    f = linear(weights, "controller.fuse_proj_down", f) + gate * c
    f = linear(weights, "controller.fusion_net.1", f.clamp(min=0)).clamp(min=0)
    return s / (1 + torch.exp(-linear(weights, "controller.fusion_net.3", f)))


def by_the_book(transformer, weights, s, e, hidden_states, encoder_hidden_states, timestep, image_rotary_emb):
    "Sample and identity weights of the adapted transformer, block by block from the stock modules."
    t = transformer.time_embedding(transformer.time_proj(timestep).to(hidden_states.dtype))
    h = transformer.patch_embed(encoder_hidden_states, hidden_states)
    n_text, blocks = encoder_hidden_states.shape[1], transformer.transformer_blocks
    w = identity_weight(weights, t, h, s)
    text, video = h[:, :n_text], h[:, n_text:]
    for i, block in enumerate(blocks):
        w_id = w[:, i // (len(blocks) // w.shape[1])].reshape(-1, 1, 1)

        def beside(place, x, i=i, w_id=w_id):
            sides = {"id": w_id, "motion": s - w_id}
            names = {side: f"transformer_blocks.{i}.{side}_{place}_adapter" for side in sides}
            return sum(sides[side] * bottleneck(weights, name, x, e) for side, name in names.items()
                       if f"{name}.up_linear.bias" in weights)

        v, x, gate_v, gate_x = block.norm1(video, text, t)
        out_v, out_x = block.attn1(v, encoder_hidden_states=x, image_rotary_emb=image_rotary_emb)
        added = beside("attn", torch.cat([x, v], 1))
        video = video + gate_v * (out_v + added[:, n_text:])
        text = text + gate_x * (out_x + added[:, :n_text])
        v, x, gate_v, gate_x = block.norm2(video, text, t)
        both = torch.cat([x, v], 1)
        out = block.ff(both) + beside("ff", both)
        video, text = video + gate_v * out[:, n_text:], text + gate_x * out[:, :n_text]
    out = transformer.proj_out(transformer.norm_out(transformer.norm_final(video), temb=t))
    batch, frames, channels, height, width = hidden_states.shape
    out = out.reshape(batch, frames, height // 2, width // 2, channels, 2, 2)
    return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(hidden_states.shape), w


@pytest.mark.parametrize("given", [True, False], ids=["reference", "none"])
@pytest.mark.parametrize("fused", [False, True], ids=["naive", "fused"])
@every_config
def test_by_the_book(config, fused, given):
    e, s = embedding() if given else None, full(config).scale
    weights = {k: w.requires_grad_() for k, w in random_weights(config).items()}
    expected, w = by_the_book(stock().requires_grad_(False), weights, s, e, **inputs())
    grads = torch.autograd.grad((expected - 1).square().mean(), list(weights.values()), allow_unused=True)
    theirs = {k: g for k, g in zip(weights, grads) if g is not None}
    transformer = adapted(config, fused=fused)
    with reference(transformer, e): out = transformer(**inputs()).sample
    (out - 1).square().mean().backward()
    ours = published_state(transformer, gradients=True)
    assert_close(out, expected, rtol=1e-9, atol=1e-12)
    assert_close(blend_weights(transformer), w.expand_as(blend_weights(transformer)), rtol=1e-9, atol=1e-12)
    assert set(ours) == set(theirs)
    assert_close(ours, theirs, rtol=1e-8, atol=1e-13)


def test_many_blocks():
    "From 20 targets on, PEFT shortens its list of them; the 5B model has 85."
    weights = random_weights(dict(groups=5), layers=10)
    expected, _ = by_the_book(stock(10), weights, .2, embedding(), **inputs())
    transformer = stock(10)
    for name in ("one", "two"): load_adapter(transformer, weights, name)
    assert_close(run(transformer, embedding()), expected, rtol=1e-9, atol=1e-12)


@every_config
def test_stock_output_returns(config):
    plain = stock()
    with torch.no_grad(): expected = plain(**inputs()).sample
    transformer = adapted(config)
    before = run(transformer, embedding())
    transformer.disable_adapters()
    assert torch.equal(run(transformer, embedding()), expected)
    transformer.enable_adapters()
    assert torch.equal(run(transformer, embedding()), before)
    assert torch.equal(before, expected) == (config == CONFIGS["scale 0"])
    transformer.delete_adapters("default")
    with torch.no_grad(): assert torch.equal(transformer(**inputs()).sample, expected)


@every_config
def test_round_trips(config, tmp_path):
    transformer = adapted(config)
    expected, ours = run(transformer, embedding()), transformer.peft_config["default"]
    copies = {"deepcopy": copy.deepcopy(transformer), "pickle": pickle.loads(pickle.dumps(transformer)),
              "safetensors": stock(), "pth": stock(), "peft": attach(stock(), config, "other", seed=9),
              "state_dict": attach(stock(seed=9), config, seed=9)}
    for suffix in ("safetensors", "pth"):
        known = {"scale": ours.scale} if suffix == "pth" else {}  # the published form does not tell
        path = save_adapter(transformer, tmp_path / f"adapter.{suffix}")
        loaded = load_adapter(copies[suffix], path, **known)
        told = "rank condition_dim scale identity motion controller".split() + ["groups"] * ours.controller
        assert {k: getattr(loaded, k) for k in told} == {k: getattr(ours, k) for k in told}
    state = get_peft_model_state_dict(transformer)
    assert not set_peft_model_state_dict(copies["peft"], state, "other").unexpected_keys
    copies["state_dict"].load_state_dict(transformer.state_dict())
    for name, twin in copies.items():
        assert torch.equal(run(twin, embedding()), expected), name
        for p in twin.parameters(): torch.nn.init.zeros_(p)
    assert torch.equal(run(transformer, embedding()), expected)  # none of them shares memory with it


def test_whole_module_saved(tmp_path):
    transformer = adapted()
    torch.save(transformer, tmp_path / "module.pt")
    assert torch.equal(run(torch.load(tmp_path / "module.pt", weights_only=False)), run(transformer))


def test_peft_model(tmp_path):
    "The other way into PEFT, without diffusers' add_adapter."
    peft = get_peft_model(stock(), DualRealConfig(rank=RANK, groups=2, condition_dim=REFERENCE))
    weights = random_weights(CONFIGS["default"])
    with torch.no_grad():
        for name, p in adapter_tensors(peft).items(): p.copy_(weights[name])
    peft.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stock(), tmp_path)
    expected = run(adapted(), embedding())
    for model in (peft, loaded):
        with torch.no_grad(), reference(model, embedding()): out = model(**inputs()).sample
        assert torch.equal(out, expected)


@every_config
def test_gradient_checkpointing(config):
    transformer = adapted(config)
    plain = gradients(transformer, embedding())
    transformer.enable_gradient_checkpointing()

    def between():
        run(transformer, -embedding())
        transformer(**inputs(seed=7))

    out, grads = gradients(transformer, embedding(), between)
    assert_close(out, plain[0], rtol=0, atol=0)
    assert_close(grads, plain[1], rtol=1e-12, atol=1e-15)
    learns = {n for n, g in grads.items() if "dualreal_controller" in n and g.any()}
    assert bool(learns) == (full(config).controller and full(config).scale > 0)


@every_config
def test_bfloat16(config):
    expected = run(adapted(config, torch.float32), embedding(torch.float32))
    moved = adapted(config, torch.float32).to(torch.bfloat16)
    mixed = adapted(config, torch.bfloat16)
    for p in adapter_tensors(mixed).values(): p.data = p.data.float()
    for transformer in (adapted(config, torch.bfloat16), moved, mixed):
        out = run(transformer, embedding(torch.float32))
        assert out.dtype == torch.bfloat16
        assert (out - expected).norm() < .05 * expected.norm()
        _, grads = gradients(transformer, embedding(torch.bfloat16))
        assert all(g.isfinite().all() for g in grads.values())
        assert len(grads) == len(adapter_tensors(transformer))


def test_autocast():
    transformer = adapted(dtype=torch.float32)
    expected = run(transformer, embedding(torch.float32))
    with torch.autocast("cpu", torch.bfloat16): out = run(transformer, embedding(torch.float32))
    assert (out.float() - expected).norm() < .05 * expected.norm()


# Several adapters

def test_several_adapters():
    transformer = stock()
    outputs = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        attach(transformer, config, name, seed)
        outputs[name] = run(transformer, embedding())
        assert torch.equal(outputs[name], run(attach(stock(), config, seed=seed), embedding())), name
    for name in CONFIGS:
        transformer.set_adapter(name)
        assert torch.equal(run(transformer, embedding()), outputs[name]), name
        training = [n for n, p in transformer.named_parameters() if p.requires_grad]
        assert training and all(f".{name}." in n for n in training)
    both = ["one group", "identity only"]
    transformer.set_adapter(both)
    one_way = run(transformer, embedding())
    assert [tuple(blend_weights(transformer, name).shape) for name in both] == [(2, 1), (2, 2)]
    transformer.set_adapter(both[::-1])
    assert_close(run(transformer, embedding()), one_way)
    assert not any(torch.equal(one_way, outputs[name]) for name in both)
    _, grads = gradients(transformer, embedding())
    assert {name for name in CONFIGS for n in grads if f".{name}." in n} == set(both)


def test_two_alike_add_up():
    "Two active adapters with the same weights and half the scale each are one (without a controller)."
    config = CONFIGS["no controller"]
    whole, halves = adapted(config), stock()
    for name in "ab": attach(halves, config, name, scale=.1)
    halves.set_adapter(["a", "b"])
    assert_close(run(halves, embedding()), run(whole, embedding()), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Adapter a was active")
def test_weights_of_adapters():
    transformer = attach(attach(stock(), CONFIGS["default"], "a"), CONFIGS["one group"], "b")
    transformer.set_adapter("a")
    only, half = run(transformer, embedding()), run(transformer, embedding(), attention_kwargs={"scale": .5})
    transformer.set_adapters(["a", "b"], [1., 0.])
    assert torch.equal(run(transformer, embedding()), only)
    transformer.set_adapters("a", .5)
    assert torch.equal(run(transformer, embedding()), half) and not torch.equal(half, only)
    transformer.delete_adapters("a")
    attach(transformer, CONFIGS["default"], "a")
    assert torch.equal(run(transformer, embedding()), only)  # the new one does not inherit the weight
    plain = stock()
    with torch.no_grad(): expected = plain(**inputs()).sample
    assert torch.equal(run(transformer, embedding(), attention_kwargs={"scale": 0.}), expected)
    assert torch.equal(run(transformer, embedding()), only)


@pytest.mark.filterwarnings("ignore:Adapter a was active")
def test_deleted_adapters():
    transformer = attach(attach(stock(), CONFIGS["one group"], "a"), CONFIGS["default"], "b")
    transformer.set_adapter("a")
    transformer.delete_adapters("a")
    assert torch.equal(run(transformer, embedding()), run(attach(stock(), CONFIGS["default"]), embedding()))
    for ask in (adapter_tensors, published_state, blend_weights):
        with pytest.raises(InputError, match="'a'"): ask(transformer, "a")
    assert active(transformer) is transformer.peft_config["b"]
    transformer.delete_adapters("b")
    assert active(transformer) is None
    for ask in (adapter_tensors, blend_weights, parts_of):
        with pytest.raises(InputError, match="no DualReal adapter"): ask(transformer)
    assert not [n for n, _ in transformer.named_parameters() if "dualreal_" in n]
    assert torch.equal(run(attach(transformer, CONFIGS["default"]), embedding()), run(adapted(), embedding()))


def test_beside_a_lora():
    transformer = stock()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "lora")
    with torch.no_grad(): lora = transformer(**inputs()).sample
    attach(transformer, CONFIGS["default"])
    alone = run(transformer, embedding())
    assert torch.equal(alone, run(adapted(), embedding()))
    transformer.set_adapter(["lora", "default"])
    assert not torch.equal(run(transformer, embedding()), alone)
    assert blend_weights(transformer).shape == (2, 2)
    transformer.set_adapters(["lora", "default"], [1., 0.])
    assert torch.equal(run(transformer, embedding()), lora)
    transformer.set_adapter("lora")
    assert active(transformer) is None
    with pytest.raises(InputError, match="no DualReal adapter is active"): blend_weights(transformer)
    transformer.set_adapter("default")
    focus(transformer, "identity")
    assert len(parts_of(transformer)["identity"]) == 8 * LAYERS


# What is refused, and leaves nothing behind

def test_refused_adapters():
    transformer = stock()
    names = [n for n, _ in transformer.named_parameters()]
    wrong = {"default": r"groups=3 .* \[1, 2, 4\]", "v1.5": "'v1.5'", "": "''", "keys": "'keys'"}
    for name, says in wrong.items():
        config = DualRealConfig(groups=3 if name == "default" else 2)
        with pytest.raises(InputError, match=says): transformer.add_adapter(config, name)
        assert [n for n, _ in transformer.named_parameters()] == names
        assert not hasattr(transformer, "peft_config")
    with torch.no_grad(): expected = stock()(**inputs()).sample
    with torch.no_grad(): assert torch.equal(transformer(**inputs()).sample, expected)
    attach(transformer, CONFIGS["default"])
    with pytest.raises(InputError, match="groups=3"): transformer.add_adapter(DualRealConfig(groups=3), "two")
    assert list(transformer.peft_config) == ["default"]
    assert torch.equal(run(transformer), run(adapted()))
    with pytest.raises(ValueError, match="already exists"): transformer.add_adapter(DualRealConfig(groups=2))


@pytest.mark.parametrize("wrong", [
    dict(rank=0), dict(rank=True), dict(rank="64"), dict(rank=None), dict(groups=0),
    dict(groups=2., controller=False), dict(condition_dim=0), dict(condition_dim=False), dict(scale=-.1),
    dict(scale=float("inf")), dict(scale="0.2"), dict(scale=True), dict(identity=1), dict(motion=None),
    dict(controller="no"), dict(fused=0), dict(identity=False, motion=False)], ids=str)
def test_refused_configurations(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))): DualRealConfig(**wrong)


def test_other_classes_are_refused():
    with pytest.raises(InputError, match="no DualReal adapter"): conductor_of(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="no DualReal adapter"): blend_weights(stock())


# Reference, dial, recorded weights

@pytest.mark.parametrize("fused", [False, True], ids=["naive", "fused"])
def test_reference_shapes(fused):
    transformer, e = adapted(fused=fused), embedding()
    expected = run(transformer, e)
    assert torch.equal(run(transformer, e[:, None]), expected)
    assert_close(run(transformer, e.float()), expected, rtol=1e-5, atol=1e-6)
    one = run(transformer, e[:1])
    assert_close(run(transformer, e[:1].expand(2, -1)), one)
    assert torch.equal(run(transformer, e[:1, None]), one) and not torch.equal(one, expected)
    assert not torch.equal(run(transformer, 0 * e), run(transformer))  # the bias of the condition
    for wrong, says in [(e[0], r"shape \(5,\)"), (e[None, None], "shape"), (e[:, :4], "4 channels, .* 5"),
                        (e.repeat(2, 1), "4 reference embeddings for 2 samples")]:
        with pytest.raises(InputError, match=says): run(transformer, wrong)
    assert torch.equal(run(transformer, e), expected) and conductor_of(transformer).reference is None


def test_reference_is_ignored_without_a_condition():
    for name in ("identity only", "no condition", "identity alone"):
        transformer = adapted(CONFIGS[name])
        assert torch.equal(run(transformer, torch.randn(1, 99).double()), run(transformer))


def test_reference_of_a_guidance_batch():
    "Both branches of classifier-free guidance in one batch see the one reference."
    transformer, e, one = adapted(), embedding(batch=1), inputs(batch=1)
    double = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in one.items()}
    double["encoder_hidden_states"][0] = 0
    both, prompt = run(transformer, e, **double), run(transformer, e, **one)
    assert_close(both[1:], prompt)
    assert not torch.equal(both[:1], prompt) and len(blend_weights(transformer)) == 1
    run(transformer, e, **double)
    assert len(blend_weights(transformer)) == 2


def test_reference_nests_and_ends():
    transformer, e = adapted(), embedding()
    with reference(transformer, e):
        outer = transformer(**inputs()).sample
        with reference(transformer, None): absent = transformer(**inputs()).sample
        assert torch.equal(absent, run(transformer))
        assert torch.equal(transformer(**inputs()).sample, outer)
    with pytest.raises(KeyError), reference(transformer, e): raise KeyError
    assert torch.equal(run(transformer, e), outer.detach()) and conductor_of(transformer).reference is None


@every_config
def test_dial(config):
    transformer, scale = adapted(config), full(config).scale
    run(transformer)
    neutral = blend_weights(transformer)
    for value in (-1, -.3, 0, .5, 1):
        with dial(transformer, value): run(transformer)
        assert_close(blend_weights(transformer), (neutral + value * scale / 2).clamp(0, scale))
    for value in (1.01, -2, float("nan")):
        with pytest.raises(InputError, match="between"), dial(transformer, value): pass
    run(transformer)
    assert torch.equal(blend_weights(transformer), neutral)


def test_dial_to_one_side():
    "All the way to identity, the motion side no longer counts."
    transformer, weights = adapted(CONFIGS["no controller"]), random_weights(CONFIGS["no controller"])
    no_motion = {k: v for k, v in weights.items() if "motion" not in k}
    alone, _ = by_the_book(stock(), no_motion, .4, None, **inputs())  # no controller: half of it, 0.2
    with dial(transformer, 1): assert_close(run(transformer, embedding()), alone, rtol=1e-9, atol=1e-12)


# Training

@every_config
@pytest.mark.parametrize("dimension", ["identity", "motion", None])
def test_focus(config, dimension):
    transformer, c = adapted(config), full(config)
    kinds = [k for k in ("identity", "motion", "controller") if getattr(c, k)]
    training = lambda: {k for k in kinds for n, p in transformer.named_parameters() if p.requires_grad
                        and (f".{k}." in n or (k == "controller" and "dualreal_controller" in n))}
    assert training() == set(kinds)  # after loading: nothing masked
    focus(transformer, dimension)
    assert training() == {k for k in kinds if dimension is None or k in (dimension, "controller")}
    assert not [n for n, p in transformer.named_parameters() if p.requires_grad and "dualreal_" not in n]
    assert {k: bool(ps) for k, ps in parts_of(transformer).items()} == \
        {k: k in kinds for k in ("identity", "motion", "controller")}
    transformer.set_adapter("default")
    assert training() == set(kinds)


def test_focus_states():
    transformer = stock()
    transformer.requires_grad_(True)
    transformer.add_adapter(DualRealConfig(rank=2, groups=2, condition_dim=5))
    ours = lambda name="default": {p.requires_grad for p in adapter_tensors(transformer, name).values()}
    base = lambda: {p.requires_grad for n, p in transformer.named_parameters() if "dualreal_" not in n}
    assert ours() == {True} and base() == {False}
    focus(transformer, "motion")
    load_adapter(transformer, random_weights(CONFIGS["default"]), "second")
    assert ours("second") == {True} and ours() == {False} and base() == {False}
    focus(transformer, "motion")
    assert ours("second") == {True, False} and ours() == {False}
    load_adapter(transformer, random_weights(CONFIGS["default"], seed=4), "second")  # over an attached one
    assert ours("second") == {True} and base() == {False}
    with pytest.raises(InputError, match="'both'"): focus(transformer, "both")


masked_steps = [(c, d, False) for c in CONFIGS for d in ("identity", "motion")]


@pytest.mark.parametrize("config, dimension, checkpointing", [*masked_steps, ("default", "motion", True)])
def test_masked_step(config, dimension, checkpointing):
    config = CONFIGS[config]
    other = {"identity": "motion", "motion": "identity"}[dimension]
    transformer, c = adapted(config), full(config)
    if checkpointing: transformer.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(adapter_tensors(transformer).values(), lr=1e-2, weight_decay=.1)

    def step(on):
        focus(transformer, on)
        with reference(transformer, None if on == "identity" else embedding()):
            out = transformer(**inputs()).sample
        if not out.requires_grad: return
        out.square().mean().backward()
        optimizer.step()

    step(None)
    optimizer.zero_grad(set_to_none=True)
    tensors = lambda: {k: p.detach().clone() for k, p in transformer.named_parameters()}
    moments = lambda: {n: {k: v.clone() for k, v in optimizer.state[p].items()}
                       for n, p in transformer.named_parameters()}
    before, state = tensors(), moments()
    step(dimension)
    after, now = tensors(), moments()
    for n, p in transformer.named_parameters():
        learns = f".{dimension}." in n or "dualreal_controller" in n
        absent = dimension == "identity" and ".condition." in n
        if not learns or absent:
            assert p.grad is None and torch.equal(before[n], after[n]), n
            assert_close(state[n], now[n], rtol=0, atol=0)
        else: assert p.grad is not None and not torch.equal(before[n], after[n]), n
    assert bool(parts_of(transformer)[other]) == getattr(c, other)


def test_masked_gradients_are_those_of_the_unmasked_step():
    transformer = adapted()
    _, everything = gradients(transformer, embedding())
    for dimension in ("identity", "motion"):
        focus(transformer, dimension)
        _, masked = gradients(transformer, embedding())
        assert_close(masked, {n: everything[n] for n in masked}, rtol=1e-12, atol=1e-15)
        assert masked.keys() == {n for n in everything if f".{dimension}." in n or "dualreal_controller" in n}


# How it is called

def test_positional_arguments():
    transformer, given = adapted(), inputs()
    x, text, t, rope = given.values()
    expected = run(transformer, embedding())
    with torch.no_grad(), reference(transformer, embedding()):
        for out in (transformer(x, text, t, None, None, rope).sample,
                    transformer(x, text, t, None, None, rope, {}).sample,
                    transformer(x, text, t, None, None, rope, None, False)[0],
                    transformer(x, text, timestep=t, image_rotary_emb=rope, attention_kwargs=None).sample):
            assert torch.equal(out, expected)
        kwargs = {"scale": .5}  # diffusers looks for it among the named arguments
        assert not torch.equal(transformer(**given, attention_kwargs=kwargs).sample, expected)
        assert kwargs == {"scale": .5}  # the caller's dictionary stays as it was
        with pytest.raises(TypeError): transformer(x, text, t, None, None, rope, None, True, "too many")
    with torch.inference_mode(): assert torch.equal(transformer(**given).sample, run(transformer))


def test_train_and_eval():
    transformer = adapted()
    expected = run(transformer, embedding())
    assert torch.equal(run(transformer.eval(), embedding()), expected)
    assert torch.equal(run(transformer.train(), embedding()), expected)
    assert transformer.training and all(p.requires_grad for p in adapter_tensors(transformer).values())


def test_failure_in_mid_forward():
    transformer, plain = adapted(), stock()
    expected = run(transformer, embedding())

    def fail(*_): raise KeyError("mid-forward")

    block = "transformer_blocks.2"
    for place in (f"{block}.ff", f"{block}.attn1", "patch_embed"):
        handle = transformer.get_submodule(place).register_forward_hook(fail)
        with pytest.raises(KeyError): run(transformer, -embedding())
        handle.remove()
        assert torch.equal(run(transformer, embedding()), expected)
        with pytest.raises(InputError): run(transformer, embedding(batch=3))
        transformer.disable_adapters()
        with torch.no_grad(): assert torch.equal(run(transformer), plain(**inputs()).sample)
        transformer.enable_adapters()
    assert conductor_of(transformer).blend is None


def test_parts_called_alone():
    transformer, given = adapted(), inputs()
    with pytest.raises(RuntimeError, match="call the transformer"): transformer.forward(**given)
    tokens, text, t = (torch.randn(2, *shape).double() for shape in ((8, WIDTH), (4, WIDTH), (TIME,)))
    block = transformer.transformer_blocks[0]
    with pytest.raises(RuntimeError, match="call the transformer"): block(tokens, text, t)
    with pytest.raises(RuntimeError, match="call the transformer"): block.ff(tokens)


@pytest.mark.parametrize("kind", ["model", "sequential", "block_level", "leaf_level"])
def test_offloading(kind):
    "Offloading rebuilds the arguments on their way to a device; here every device is the CPU."
    transformer, expected = adapted(), run(adapted(), embedding())
    if kind == "model": cpu_offload_with_hook(transformer, "cpu")
    elif kind == "sequential": cpu_offload(transformer, torch.device("cpu"))
    else:
        groups = dict(num_blocks_per_group=1) if kind == "block_level" else {}
        transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), kind, **groups)
    with torch.no_grad(), reference(transformer, embedding()): out = transformer(**inputs()).sample
    assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_no_memory_kept():
    "After a forward pass the adapter holds the last weights, and nothing of the pass's graph."
    transformer = adapted()
    transformer(**inputs())
    conductor = conductor_of(transformer)
    assert conductor.blend is None and conductor.time is None and conductor.tokens is None
    assert not conductor.last["default"].requires_grad
    assert not [m for m in transformer.modules() if getattr(m, "blend", None)]


def test_stock_extras_still_work():
    transformer = adapted()
    expected = run(transformer, embedding())
    assert len(transformer.attn_processors) == LAYERS
    transformer.fuse_qkv_projections()
    assert_close(run(transformer, embedding()), expected)
    transformer.unfuse_qkv_projections()
    assert transformer.active_adapters() == ["default"]
    assert sum(isinstance(m, type(conductor_of(transformer))) for m in transformer.modules()) == 1


@pytest.mark.slow
def test_compiled():
    transformer, e = adapted(dtype=torch.float32), embedding(torch.float32)
    compiled = torch.compile(adapted(dtype=torch.float32))
    for given in (e, None):
        assert_close(run(compiled, given), run(transformer, given), rtol=1e-4, atol=1e-5)
        out, grads = gradients(compiled, given)
        expected = gradients(transformer, given)
        assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
        grads = {n.removeprefix("_orig_mod."): g for n, g in grads.items()}
        assert_close(grads, expected[1], rtol=1e-3, atol=1e-5)
    with dial(compiled, .5): out = run(compiled, e)
    with dial(transformer, .5): assert_close(out, run(transformer, e), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_blocks():
    "Regional compilation: the blocks share their code, whatever their group."
    config = CONFIGS["a group each"]
    transformer, compiled = adapted(config, torch.float32), adapted(config, torch.float32)
    torch._dynamo.reset()
    for block in compiled.transformer_blocks: block.compile()
    e, count = embedding(torch.float32), torch._dynamo.utils.counters["stats"]
    before = count["unique_graphs"]
    assert_close(run(compiled, e), run(transformer, e), rtol=1e-4, atol=1e-5)
    assert 1 <= count["unique_graphs"] - before <= 2  # the first block's tokens lie otherwise in memory
    grads, expected = (gradients(t, e)[1] for t in (compiled, transformer))
    assert_close(grads, expected, rtol=1e-3, atol=1e-5)
