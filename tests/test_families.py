"""What must hold of every family, on tiny bases of random weights: one table, every row for each."""
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from dualreal.backbone import load_base
from dualreal.base import base_family, base_size, find_sizes, sized
from dualreal.checkpoint import (
    adapter_tensors,
    load_adapter,
    published_state,
    read_adapter,
    save_adapter,
    write_adapter,
)
from dualreal.cli import main
from dualreal.core import InputError
from dualreal.experiments.speed import Shapes, build, kept_per_block
from dualreal.family import families
from dualreal.generate import generate
from dualreal.loop import loop
from dualreal.memory import StepSize, needs, plan, set_policies
from dualreal.objective import denoising_loss
from dualreal.settings import TrainConfig
from dualreal.switch import focus, parts_of
from dualreal.toy.bases import tiny_pipeline, tiny_transformer
from dualreal.toy.world import write_case
from dualreal.trainer import prepare, train
from dualreal.tuner import DualRealConfig, attached, blend_weights, conductor_of, dial, reference

ROOT = Path(__file__).parent.parent

def from_the_tutorial():
    "The family that the tutorial writes."
    cells = json.loads((ROOT/"nbs/tutorials/06_another_base.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    exec("\n\n".join(c for c in code if "import" in c or "class LTX" in c or "mask_of" in c), {})


from_the_tutorial()
FAMILIES = ["cogvideox", "wan", "ltx"]
every = pytest.mark.parametrize("family", FAMILIES)


def stock(family, dtype=torch.float64):
    return tiny_transformer(family=family).to(dtype)


def given(family, dtype=torch.float64, batch=2, seed=1):
    "Arguments of `denoising_loss`: latents of 3 frames of 4x4."
    f, draw = families()[family], torch.Generator().manual_seed(seed)
    shape = batch, *f.latent_shape(dict(in_channels=4), 3, 4, 4)
    latents, noise = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
    text, angles = torch.randn(batch, 16, 32, generator=draw).to(dtype), torch.rand(12, 16, generator=draw)
    positions = (angles.cos(), angles.sin()) if family == "cogvideox" else None
    return dict(scheduler=f.own_scheduler(), latents=latents, prompt_embeds=text, noise=noise,
                timesteps=torch.tensor([900, 30][:batch]), image_rotary_emb=positions)


def embedding(dtype=torch.float64, batch=2):
    return torch.randn(batch, 5, generator=torch.Generator().manual_seed(2)).to(dtype)


def attach(transformer, name="default", seed=0, **config):
    "With every weight drawn at random, so that each one matters."
    transformer.add_adapter(DualRealConfig(**{**dict(rank=3, groups=2, condition_dim=5), **config}), name)
    draw = torch.Generator().manual_seed(seed)
    for p in adapter_tensors(transformer, name).values():
        p.data = torch.randn(p.shape, generator=draw).to(p) * .2
    return transformer


def answer(transformer, family, e=None, **how):
    f, g = families()[family], given(family, transformer.dtype)
    with torch.no_grad():
        call = lambda: f.predict(transformer, g["latents"], g["timesteps"], g["prompt_embeds"],
                                 g["image_rotary_emb"])
        if e is None: return call()
        with reference(transformer, e, **how): return call()


def gradients(transformer, family, e, again=None, **how):
    loss = denoising_loss(transformer, **given(family, transformer.dtype), reference=e, **how)
    if again is not None: answer(transformer, family, again)  # another pass before the backward one
    loss.backward()
    found = {k: p.grad for k, p in adapter_tensors(transformer).items()}
    transformer.zero_grad()
    return loss.item(), found


# The transformer

@every
def test_stock_output_comes_back(family):
    transformer = stock(family)
    plain = answer(transformer, family)
    assert torch.equal(answer(attach(stock(family), scale=0.), family, embedding()), plain)
    attach(transformer)
    changed = answer(transformer, family, embedding())
    assert not torch.equal(changed, plain)
    transformer.disable_adapters()
    assert torch.equal(answer(transformer, family), plain)
    transformer.enable_adapters()
    assert torch.equal(answer(transformer, family, embedding()), changed)
    transformer.unload_lora()
    assert torch.equal(answer(transformer, family), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in transformer.modules())


@every
@pytest.mark.parametrize("config", [{}, dict(groups=1), dict(groups=4), dict(identity=False),
                                    dict(motion=False), dict(controller=False), dict(condition_dim=None)],
                         ids=str)
def test_plain_is_fused(family, config):
    e = None if config.get("condition_dim", 5) is None else embedding()
    (a, plain), (b, fused) = (gradients(attach(stock(family), fused=f, **config), family, e)
                              for f in (False, True))
    assert math.isclose(a, b, rel_tol=1e-10)
    for k, g in plain.items():
        if g is None: assert fused[k] is None
        else: torch.testing.assert_close(fused[k], g, rtol=1e-8, atol=1e-13)


@every
def test_every_weight_matters(family):
    "The gradient of each tensor of an adapter, the controller's included, is there and not zero."
    _, found = gradients(attach(stock(family)), family, embedding())
    assert not [k for k, g in found.items() if g is None or not g.abs().sum() > 0]
    assert any(k.startswith("controller.") for k in found)


@every
@pytest.mark.parametrize("acting", [("identity", "motion"), ("motion",), ("identity",)], ids=str)
def test_checkpointed_gradients(family, acting):
    transformer, e = attach(stock(family)), embedding()
    loss, plain = gradients(transformer, family, e, acting=acting)
    for policies in ([*["nothing"] * 4], ["nothing", "attention", "all", "nothing"]):
        set_policies(transformer, policies)
        again, found = gradients(transformer, family, e, -e, acting=acting)
        assert again == loss
        for k, g in plain.items():
            if g is None: assert found[k] is None
            else: torch.testing.assert_close(found[k], g, rtol=1e-9, atol=1e-14)


@every
@pytest.mark.parametrize("side", ["identity", "motion"])
def test_masked_step_moves_one_side(family, side):
    transformer = attach(stock(family))
    focus(transformer, side)
    before = {part: [p.detach().clone() for p in ps] for part, ps in parts_of(transformer).items()}
    stock_before = {k: p.detach().clone() for k, p in transformer.named_parameters() if "dualreal" not in k}
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
    denoising_loss(transformer, **given(family), reference=embedding()).backward()
    optimizer.step()
    moved = {part for part, ps in parts_of(transformer).items()
             if any(not torch.equal(p, q) for p, q in zip(ps, before[part]))}
    assert moved == {side, "controller"}
    for k, p in transformer.named_parameters():
        if k in stock_before: assert torch.equal(p, stock_before[k])


@every
def test_a_fresh_controller_is_undecided_and_the_dial_turns(family):
    transformer = stock(family, torch.float32)
    transformer.add_adapter(DualRealConfig(rank=3, groups=2, condition_dim=None))
    answer(transformer, family)
    torch.testing.assert_close(blend_weights(transformer), torch.full((2, 2), .1))
    with dial(transformer, .5): answer(transformer, family)
    torch.testing.assert_close(blend_weights(transformer), torch.full((2, 2), .15))


@every
def test_the_time_is_heard(family):
    "The controller's weights depend on the time and on the tokens of each sample."
    transformer = attach(stock(family))
    answer(transformer, family, embedding())
    first = blend_weights(transformer)
    assert (first[0] - first[1]).abs().max() > 1e-6
    f, g = families()[family], given(family)
    with torch.no_grad(), reference(transformer, embedding()):
        f.predict(transformer, g["latents"], g["timesteps"].flip(0), g["prompt_embeds"],
                  g["image_rotary_emb"])
    assert (blend_weights(transformer) - first).abs().max() > 1e-6


@every
def test_saved_and_loaded(family, tmp_path):
    transformer, e = attach(stock(family, torch.float32)), embedding(torch.float32)
    file = save_adapter(transformer, tmp_path, reference=e[:1])
    names, blocks = set(read_adapter(file).tensors), families()[family].blocks
    assert f"{blocks}.3.motion_ff_adapter.condition_linear.weight" in names
    assert read_adapter(file).info["transformer"]["family"] == family
    again = stock(family, torch.float32)
    load_adapter(again, file)
    assert torch.equal(answer(again, family, e), answer(transformer, family, e))
    state = get_peft_model_state_dict(transformer)  # PEFT's own way
    twin = attach(stock(family, torch.float32), "elsewhere", seed=9)
    assert set_peft_model_state_dict(twin, state, "elsewhere").unexpected_keys == []
    assert torch.equal(answer(twin, family, e), answer(transformer, family, e))
    third = stock(family, torch.float32)
    load_adapter(third, {f"transformer.{k}": v for k, v in state.items()})
    assert torch.equal(answer(third, family, e), answer(transformer, family, e))


def test_a_family_refuses_anothers_adapter(tmp_path):
    for own, other in zip(FAMILIES, FAMILIES[1:] + FAMILIES[:1]):
        file = save_adapter(attach(stock(own, torch.float32)), tmp_path/own)
        bare = read_adapter(file).tensors  # tells nothing of two families whose lists have one name
        for source in (file, bare)[:2 if own == "wan" else 1]:
            with pytest.raises(InputError, match=f"made for a base of the family {own}.*{other}"):
                load_adapter(stock(other, torch.float32), source)


def test_the_published_format_is_cogvideoxs(tmp_path):
    adapter = read_adapter(save_adapter(attach(stock("wan", torch.float32)), tmp_path/"a"))
    with pytest.raises(InputError, match="published format knows CogVideoX alone"):
        write_adapter(adapter, tmp_path/"b.pth")
    assert not (tmp_path/"b.pth").exists()


@every
def test_several_adapters_and_a_lora_beside(family):
    transformer, e = attach(stock(family, torch.float32)), embedding(torch.float32)
    one = answer(transformer, family, e)
    attach(transformer, "other", seed=5, rank=2, groups=4)
    transformer.set_adapter("default")
    assert torch.equal(answer(transformer, family, e), one)
    transformer.set_adapters(["default", "other"], [1., 0.])
    assert torch.equal(answer(transformer, family, e), one)
    transformer.set_adapters(["default", "other"], [1., 1.])
    both = answer(transformer, family, e)
    assert not torch.equal(both, one)
    torch.manual_seed(3)
    transformer.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "style")
    assert not any("dualreal" in k and "lora" in k for k, _ in transformer.named_parameters())
    transformer.set_adapter(["default", "style"])
    beside = answer(transformer, family, e)
    assert not torch.equal(beside, one)
    transformer.delete_adapters(["style", "other"])
    transformer.set_adapter("default")
    assert torch.equal(answer(transformer, family, e), one)

    first = stock(family, torch.float32)  # the other order
    torch.manual_seed(3)
    first.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "style")
    attach(first)
    first.set_adapter(["default", "style"])
    assert torch.equal(answer(first, family, e), beside)


@every
def test_copies_and_precision(family):
    transformer, e = attach(stock(family, torch.float32)), embedding(torch.float32)
    one = answer(transformer, family, e)
    clone = copy.deepcopy(transformer)
    for p in adapter_tensors(clone).values(): p.data.zero_()
    assert torch.equal(answer(transformer, family, e), one) and not torch.equal(answer(clone, family, e), one)
    half = answer(transformer.bfloat16(), family, e.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - one).norm() < .05 * one.norm()


@pytest.mark.slow
@every
def test_compiled(family):
    transformer, e = attach(stock(family, torch.float32)), embedding(torch.float32)
    one, (loss, plain) = answer(transformer, family, e), gradients(transformer, family, e)
    compiled = torch.compile(copy.deepcopy(transformer))
    torch.testing.assert_close(answer(compiled, family, e), one, rtol=1e-4, atol=1e-5)
    again, found = gradients(compiled, family, e)
    assert math.isclose(again, loss, rel_tol=1e-4)
    for k, g in found.items(): torch.testing.assert_close(g, plain[k], rtol=1e-3, atol=1e-4)


@every
def test_one_clip_is_learnt(family):
    "The loss on one latent clip falls well below what it was."
    transformer, g = stock(family, torch.float32), given(family, torch.float32)
    torch.manual_seed(0)
    transformer.add_adapter(DualRealConfig(rank=8, groups=2, condition_dim=5))
    optimizer, losses = torch.optim.AdamW(adapter_tensors(transformer).values(), lr=1e-2), []
    for _ in range(60):
        loss = denoising_loss(transformer, **g, reference=embedding(torch.float32))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < .7 * losses[0]


@every
def test_memory_is_estimated(family):
    "A plan's activations are those that the simulation of the true step counts; less memory is kept by less."
    transformer = attach(stock(family, torch.float32))
    size = StepSize(32, 32, 9, text=16)
    plenty = plan(transformer, size, 4)
    assert plenty.policies == ["all"] * 4 and dict(plenty.parts)["activations"] > 0
    assert size.latents(transformer)[1:] == tuple(given(family)["latents"].shape[1:])


@every
def test_what_a_block_keeps_is_what_the_planner_says(family):
    shapes = Shapes(width=128, blocks=2, text=16, frames=3, height=8, side=8, batch=1, rank=8, groups=1,
                    text_dim=32, reference=10, family=family)
    measured = kept_per_block(shapes)
    said = needs(build(shapes), StepSize(64, 64, 9, text=16)).slope[0]
    assert .9 < said / measured < 1.1


# A base

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        tiny_pipeline(home/family, family=family, tokens=64, side=dict(ltx=2).get(family, 4))
    write_case(home/"case", "olive_robot", "zigzag", images=2, clips=2, height=32, width=32)
    return home


def config(home, family, out, **settings):
    known = dict(steps=4, samples=0, rank=4, save_every=2, reference_encoder="toy", trackers="none",
                 lr=1e-2, preview_every=0)
    return TrainConfig(str(home/"case/identity"), str(home/"case/motion"), str(out), str(home/family),
                       cache=str(home/"cache"), **{**known, **settings})


def side(family): return (64, 64) if family == "ltx" else (32, 32)


@every
def test_a_base_says_what_it_is(home, family):
    folder = find_sizes(home/family)
    assert base_family(folder).name == family
    pipe = load_base(home/family, dtype=torch.bfloat16)
    assert pipe.vae.dtype == families()[family].vae_dtype(torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert base_size(pipe) == base_size(folder)


@every
def test_frame_rules(home, family):
    step, multiple = dict(cogvideox=(8, 16), wan=(4, 16), ltx=(8, 32))[family]
    assert sized(home/family, frames=1 + step).frames == 1 + step
    with pytest.raises(InputError, match=rf"generates {step}k\+1 frames"): sized(home/family, frames=4)
    with pytest.raises(InputError, match=f"multiple of {multiple}"): sized(home/family, height=40)


@every
def test_trained_resumed_and_generated(home, family, tmp_path):
    "Four steps in one go, and two and two: the same adapter bit for bit, the same video."
    whole = train(config(home, family, tmp_path/"whole"), progress=False)

    class Enough(Exception): pass

    def stop(run, row):
        if row["step"] == 3: raise Enough

    with pytest.raises(Enough): train(config(home, family, tmp_path/"parts"), on_step=stop, progress=False)
    parts = train(config(home, family, tmp_path/"parts", resume=True), progress=False)
    a, b = read_adapter(whole), read_adapter(parts)
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
    pipe = load_base(home/family)
    load_adapter(pipe.transformer, a)
    how = dict(reference=a.reference, steps=3, progress=False)
    made = [generate(pipe, "a robot * is moving", **how) for _ in range(2)]
    assert np.array_equal(made[0].frames, made[1].frames) and made[0].frames.shape == (9, *side(family), 3)
    assert made[0].weights.shape == (3, 4) and not torch.equal(made[0].weights[0], made[0].weights[-1])


@every
def test_weights_are_recorded_under_the_prompt(home, family):
    "Not those of the pass without it: whoever changes only what is not to be seen, changes no first weight."
    pipe = load_base(home/family)
    attach(pipe.transformer)
    how = dict(prompt="one", reference=embedding(torch.float32)[:1], steps=2, guidance=3., progress=False)
    a, b = (generate(pipe, negative=n, **how) for n in ("two", "a much longer other text"))
    if family == "cogvideox": assert torch.equal(a.weights[0], b.weights[0])  # text is among the tokens
    single = generate(pipe, negative="", **{**how, "guidance": 1.})
    torch.testing.assert_close(a.weights[0], single.weights[0], rtol=1e-5, atol=1e-7)


@every
@pytest.mark.parametrize("method", ["lora", "lora_ff", "full_finetune", "isolated", "one_way"])
def test_baselines(home, family, method, tmp_path):
    from dualreal.experiments.baselines import find_method
    m = find_method(method)
    run = m.prepare(config(home, family, tmp_path, prompts=["a robot * is moving"]))
    m.train(run)
    frames, _ = m.generate(run, ["a robot * is moving"], [0], steps=2)
    assert frames.shape == (1, 9, *side(family), 3) and len(run.log) == 4
    assert all(np.isfinite(row["loss"]) for row in run.log)


def test_boxes_lead_where_text_is_attended_to(home, tmp_path):
    from dualreal.experiments.baselines import find_method
    with pytest.raises(InputError, match="cross-attention"):
        asked = config(home, "wan", tmp_path, prompts=["a robot * is moving"])
        find_method("subject_then_motion").prepare(asked)


def test_noise_levels_are_wans(home, tmp_path):
    "Settings of flow matching reach the draw; a base without noise levels refuses them."
    with pytest.raises(InputError, match="sigmas and shift: cogvideox has no noise levels"):
        prepare(config(home, "cogvideox", tmp_path, shift=5.), progress=False)
    drawn = {}
    for name, how in dict(usual={}, shifted=dict(shift=50.), middle=dict(sigmas="logit-normal")).items():
        run = prepare(config(home, "wan", tmp_path/name, **how), progress=False)
        how = run.pipe.scheduler, run.generator, run.config, None
        drawn[name] = [run.given.family.draw_time(*how).item() for _ in range(200)]
    assert all(0 <= t <= 1000 and t != int(t) for ts in drawn.values() for t in ts)
    assert np.median(drawn["shifted"]) > np.median(drawn["usual"]) > 650  # 3 * .5 / 2 = .75
    assert np.std(drawn["middle"]) < np.std(drawn["usual"])


# The commands

@every
def test_commands(home, family, tmp_path, capsys):
    base, case = str(home/family), home/"case"
    both = ["--identity", str(case/"identity"), "--motion", str(case/"motion"), "--base", base]
    assert main(["check", *both, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    out = tmp_path/"run"
    assert main(["train", *both, "--out", str(out), "--steps", "2", "--rank", "2", "--samples", "1",
                 "--reference-encoder", "toy", "--trackers", "none", "--cache", str(home/"cache")]) == 0
    assert (out/"samples/00.mp4").is_file() and (out/"contact_sheet.png").is_file()
    assert main(["inspect", str(out)]) == 0
    assert family in capsys.readouterr().out
    video = tmp_path/"video.mp4"
    assert main(["generate", "--adapter", str(out), "--prompt", "a robot * is moving", "--steps", "2",
                 "--out", str(video)]) == 0
    assert main(["card", str(out)]) == 0
    assert main(["evaluate", "--videos", str(out/"samples"), "--identity", str(case/"identity"), "--motion",
                 str(case/"motion"), "--encoders", "toy", "--out", str(tmp_path/"report")]) == 0
    status = main(["convert", str(out), str(tmp_path/"published.pth")])
    assert status == (0 if family == "cogvideox" else 2)


# Two experts

@pytest.fixture(scope="module")
def pair(home): return tiny_pipeline(home/"pair", family="wan", split=.875, tokens=64)


def both(pipe): return pipe.transformer, pipe.transformer_2


def test_each_expert_learns_its_part(home, pair, tmp_path, monkeypatch):
    "Steps of both, each at times of its own; a step moves the adapter of one."
    run = prepare(config(home, "pair", tmp_path, steps=12), progress=False)
    assert [e.name for e in run.given.experts] == ["high", "low"]
    assert {k.startswith("transformer_2.") for k in run.adapter} == {True, False}
    seen, moved, before = {0: [], 1: []}, [], {}
    for i, one in enumerate(both(run.pipe)):
        note = lambda m, args, kwargs, i=i: seen[i].extend(kwargs["timestep"].tolist())
        one.register_forward_pre_hook(note, with_kwargs=True)

    def look(run, row):
        now = {k: p.detach().clone() for k, p in run.adapter.items()}
        if before: moved.append({k.startswith("transformer_2.") for k in now if not now[k].equal(before[k])})
        before.update(now)

    loop(run, look)
    assert seen[0] and seen[1] and min(seen[0]) >= 875 > max(seen[1])
    assert all(len(m) == 1 for m in moved) and len({*map(tuple, moved)}) == 2


@pytest.mark.parametrize("expert", ["high", "low"])
def test_one_expert_alone(home, pair, tmp_path, expert):
    file = train(config(home, "pair", tmp_path, expert=expert, steps=2), progress=False)
    tensors = read_adapter(file).tensors
    assert {k.startswith("transformer_2.") for k in tensors} == {expert == "low"}
    pipe = load_base(pair)
    load_adapter(pipe, file)
    assert [attached(one) for one in both(pipe)] == [expert == "high", expert == "low"]
    made = generate(pipe, "a robot * is moving", steps=4, progress=False)
    assert 0 < len(made.weights) < 4  # of the steps that the trained one takes
    with pytest.raises(InputError, match="one transformer for all noise levels"):
        train(config(home, "wan", tmp_path/"one", expert=expert), progress=False)


def test_two_experts_in_one_file(home, pair, tmp_path):
    "Trained, resumed, generated with both; silent ones leave the stock video."
    file = train(config(home, "pair", tmp_path/"run"), progress=False)
    adapter, pipe = read_adapter(file), load_base(pair)
    how = dict(prompt="a robot * is moving", steps=4, progress=False)
    plain = generate(pipe, **how).frames
    load_adapter(pipe, adapter)
    made = generate(pipe, reference=adapter.reference, **how)
    assert made.weights.shape == (4, 4) and not np.array_equal(made.frames, plain)
    for one in both(pipe): one.disable_adapters()
    assert np.array_equal(generate(pipe, **how).frames, plain)
    with pytest.raises(InputError, match="base with two experts"):
        load_adapter(load_base(home/"wan"), adapter)
    asked = ["--adapter", str(tmp_path/"run"), "--prompt", "a robot * is moving", "--steps", "2"]
    assert main(["generate", *asked, "--out", str(tmp_path/"video.mp4")]) == 0
    single = plan(pipe.transformer, StepSize(32, 32, 9), 4)
    double = plan(pipe.transformer, StepSize(32, 32, 9), 4, experts=2)
    assert dict(double.parts)["weights"] == 2 * dict(single.parts)["weights"]


def test_a_shift_that_leaves_nothing_is_said(home, pair, tmp_path):
    with pytest.raises(InputError, match="shift 1e-12: leaves the expert 'high' no noise levels"):
        train(config(home, "pair", tmp_path, expert="high", shift=1e-12), progress=False)


def test_other_methods_want_one_transformer(home, pair, tmp_path):
    from dualreal.experiments.baselines import find_method
    with pytest.raises(InputError, match="this base has two"):
        find_method("lora").prepare(config(home, "pair", tmp_path, prompts=["a robot * is moving"]))


def test_bases_of_no_family_are_refused_from_their_configuration(home, tmp_path):
    import shutil
    for name, part, change, said in (
            ("flux", "model_index.json", dict(_class_name="FluxPipeline"), "FluxPipeline, of no family"),
            ("image", "transformer/config.json", dict(in_channels=36), "image-to-video")):
        folder = tmp_path/name
        shutil.copytree(home/"wan", folder)
        config = json.loads((folder/part).read_text())
        (folder/part).write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=said): find_sizes(folder)


def test_the_conductor_forgets():
    "Whichever of time and tokens comes first, nothing of a pass is left behind."
    for family in FAMILIES:
        transformer = attach(stock(family, torch.float32))
        answer(transformer, family, embedding(torch.float32))
        c = conductor_of(transformer)
        assert c.blend is None and c.time is None and c.tokens is None
        assert published_state(transformer)
