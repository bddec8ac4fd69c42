"""Baselines: equal budgets by independent count, merges that are sums, and what is frozen stays."""
import numpy as np
import pytest
import torch

from dualreal.core import InputError
from dualreal.encode import Encoded
from dualreal.experiments.baselines import (
    METHODS,
    attention_bias,
    find_method,
    find_words,
    moving_boxes,
    seen,
    turns,
    videos,
)
from dualreal.generate import generate
from dualreal.toy.bases import tiny_pipeline
from dualreal.toy.world import write_case
from dualreal.trainer import TrainConfig

PROMPTS = ["a cat * is swinging", "a cat * is swinging at night"]
SMALL = '{"reference_encoder": "none", "rank": 4, "groups": 2, "steps": 2}'


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("baselines")
    write_case(home / "case", "teal_cat", "swinging", images=2, clips=2)
    (tiny_pipeline(home / "base", tokens=64) / "dualreal.json").write_text(SMALL)
    return home


def config(home, **more):
    settings = dict(steps=5, seed=1, motion_ratio=.5, batch_identity=2, batch_motion=3, micro_batch=3,
                    lr=1e-3, samples=0, prompts=list(PROMPTS), cache=str(home / "cache"))
    folders = (str(home / part) for part in ("case/identity", "case/motion", "out", "base"))
    return TrainConfig(*folders, **{**settings, **more})


def trained(home, spec, **more):
    method = find_method(spec)
    run = method.prepare(config(home, **more))
    method.train(run)
    return method, run


def output(run, seed=0):
    "The transformer's answer to fixed noise."
    transformer, draw = run.pipe.transformer, torch.Generator().manual_seed(seed)
    c = transformer.config
    x = torch.randn(1, 3, c.in_channels, c.sample_height, c.sample_width, generator=draw)
    with torch.no_grad():
        text, time = run.given.texts[PROMPTS[0]].to(x), torch.tensor([500])
        return transformer(x, text, time, image_rotary_emb=run.given.positions(x[0])).sample


@pytest.mark.parametrize("spec", ["dualreal", "lora", "full_finetune", "isolated", "without_dual_aware",
                                  "subject_then_motion", "without_mask", "without_stageblender",
                                  "one_way_fixed", "none_fixed", "one_way"])
def test_equal_budgets(home, spec, monkeypatch):
    "Samples counted where they are drawn, not from the log; all methods take what DualReal takes."
    drawn, real = [], Encoded.sample

    def noted(item, *how):
        drawn.append(item)
        return real(item, *how)

    monkeypatch.setattr(Encoded, "sample", noted)
    _, run = trained(home, spec)
    taken = {k: sum(any(one is item for item in items) for one in drawn) for k, items in run.samples.items()}
    n = turns(config(home))
    expected = dict(identity=2 * n["identity"], motion=3 * n["motion"])
    assert 0 < n["identity"] < 5 and sum(n.values()) == 5
    if spec == "subject_then_motion":  # motion is led at inference; the class has as many samples
        expected = dict(expected, motion=0)
        assert taken["prior"] == taken["identity"]
    assert {d: taken[d] for d in expected} == expected == seen(run)


def test_merged_lora_is_the_sum_of_its_parts(home):
    _, run = trained(home, "lora:strengths=[1, 0.5]", lr=.05)
    merged = output(run)
    change = {}
    for name, module in run.pipe.transformer.named_modules():
        if not hasattr(module, "lora_A"): continue
        for d, strength in (("identity", 1.), ("motion", .5)):
            a, b = module.lora_A[d].weight, module.lora_B[d].weight
            assert b.abs().sum() > 0, f"{d} did not learn"
            change[name] = change.get(name, 0) + strength * (b @ a).detach()
    plain = find_method("base")
    bare = plain.prepare(config(home))
    plain.train(bare)
    assert not torch.allclose(output(bare), merged, atol=1e-4)
    for name, delta in change.items(): bare.pipe.transformer.get_submodule(name).weight.data += delta
    torch.testing.assert_close(output(bare), merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec, ends", [("lora_qk", ["to_q", "to_k"]), ("lora_vo", ["to_v", "to_out.0"]),
                                        ("lora_ff", ["ff.net.0.proj", "ff.net.2"])])
def test_lora_changes_its_part_of_each_block_only(home, spec, ends):
    _, run = trained(home, spec)
    adapted = [n for n, m in run.pipe.transformer.named_modules() if hasattr(m, "lora_A")]
    blocks = range(len(run.pipe.transformer.transformer_blocks))
    parts = [f"attn1.{end}" if end.startswith("to_") else end for end in ends]
    assert sorted(adapted) == sorted(f"transformer_blocks.{i}.{part}" for i in blocks for part in parts)


@pytest.mark.parametrize("spec", ["isolated", "without_dual_aware"])
def test_sides_are_alone_and_keep_their_strength(home, spec):
    "At strength 0 of both the base is back; one side alone does not depend on the other's training."
    method, run = trained(home, spec)
    both = output(run)
    run.pipe.transformer.set_adapters(["identity", "motion"], [0., 0.])
    plain = find_method("base")
    bare = plain.prepare(config(home))
    plain.train(bare)
    torch.testing.assert_close(output(run), output(bare))
    run.pipe.transformer.set_adapters(["identity", "motion"], [1., 0.])
    alone = output(run)
    assert not torch.allclose(alone, both, atol=1e-4)
    _, without = trained(home, f"{spec}:motion_steps=0")
    torch.testing.assert_close(output(without), alone)
    names = [n for n, _ in run.pipe.transformer.named_parameters()]
    assert not [n for n in names if ".identity.motion." in n or ".motion.identity." in n]


def test_base_is_frozen_except_in_fine_tuning(home):
    plain = find_method("base")
    bare = plain.prepare(config(home))
    plain.train(bare)
    stock = dict(bare.pipe.transformer.named_parameters())
    for spec, changes in (("lora", False), ("isolated", False), ("full_finetune", True)):
        transformer = trained(home, spec)[1].pipe.transformer
        now = {n.replace(".base_layer", ""): p for n, p in transformer.named_parameters()}
        same = all(torch.equal(now[n], p) for n, p in stock.items())
        assert same is not changes, spec
        assert not any(p.requires_grad for n, p in now.items() if n in stock)


@pytest.mark.parametrize("spec", ["dualreal", "lora", "full_finetune", "isolated", "subject_then_motion"])
def test_bfloat16_as_on_a_gpu(home, spec):
    "What learns does so in fp32; videos are made in the base's own precision, which the VAE expects, too."
    method, run = trained(home, spec, precision="bfloat16")
    assert run.pipe.vae.dtype == torch.bfloat16
    frames, _ = method.generate(run, PROMPTS, [0, 1], steps=2)
    assert frames.shape == (2, 9, 32, 32, 3)


def test_videos_in_a_batch_are_the_same_videos(home):
    method, run = trained(home, "dualreal", lr=.05)
    together, weights = videos(run, PROMPTS, [3, 4])
    apart, _ = videos(run, PROMPTS, [3, 4], batch=1)
    assert np.abs(together.astype(int) - apart).max() <= 1
    run.pipe.vae.to("cpu")
    one = generate(run.pipe, PROMPTS[0], run.given.texts, run.case.reference, 3, progress=False)
    assert np.abs(together[0].astype(int) - one.frames).max() <= 1
    assert weights.shape == (2, 2)


def test_videos_have_the_size_of_the_run_not_of_its_base(home):
    method, run = trained(home, "base", height=48, width=16)
    assert videos(run, PROMPTS[:1], [0])[0].shape == (1, 9, 48, 16, 3)
    assert videos(run, PROMPTS[:1], [0], frames=1)[0].shape == (1, 1, 48, 16, 3)


def test_control_moves_attention(home):
    method, run = trained(home, "subject_then_motion")
    strong, none = (find_method(f"subject_then_motion:control={c}") for c in (8, 0))
    led, free = (m.generate(run, PROMPTS[:1], [0])[0] for m in (strong, none))
    plain, _ = videos(run, PROMPTS[:1], [0])
    assert np.abs(free.astype(int) - plain).max() <= 1 and not np.array_equal(led, free)
    assert not run.pipe.transformer._forward_pre_hooks
    with pytest.raises(InputError, match="does not name"): find_words(run.pipe.tokenizer, "a dog", "cat")


def test_boxes_and_bias():
    frames = np.zeros((8, 20, 20, 3), np.uint8)
    for i in range(8): frames[i, 8:12, 2 * i:2 * i + 4] = 255
    boxes = moving_boxes(frames, 2)
    centres = (boxes[:, 1] + boxes[:, 3]) / 2
    assert abs(centres[0] - .25) < .06 and abs(centres[1] - .65) < .06
    bias = attention_bias(boxes, [0, 2], 4, 2, 2, 3.)
    assert bias.shape == (12, 12) and not bias[:4].any() and not bias[:, [1, 3, *range(4, 12)]].any()


def test_table_of_methods():
    for name, method in METHODS.items():
        assert method.tuned_as in (None, "dualreal", "lora"), name
        assert method.tuned_as is None or not METHODS[method.tuned_as].tuned_as
    texts = [str(find_method(name).described()) for name in METHODS]
    assert len(set(texts)) == len(texts)
