"""Beside LoRAs on a stock pipeline: any order of loading, and what people do then, as with LoRAs alone."""
import copy
from tempfile import TemporaryDirectory

import pytest
import torch
from accelerate import cpu_offload
from diffusers import CogVideoXPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from tiny import CONFIGS, REFERENCE, adapted, attach, embedding, run, stock
from torch.testing import assert_close

from dualreal.checkpoint import load_adapter, published_state
from dualreal.core import InputError
from dualreal.memory import compile_blocks
from dualreal.toy.bases import tiny_pipeline
from dualreal.tuner import DualRealConfig, active, reference

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`",
                                        "ignore:Adapter .* was active")
WEIGHTS = "pytorch_lora_weights.safetensors"
LORAS, OURS = {"style": 5, "film": 6}, {"subject": 7, "other": 8, "late": 9}  # name: seed
ORDERS = {"LoRA first": ["style", "subject"], "DualReal first": ["subject", "style"],
          "two of each": ["style", "subject", "film", "other"],
          "mixed": ["other", "film", "subject", "style"]}
SETS = (["style"], ["subject"], ["style", "subject"])


@pytest.fixture(scope="module")
def base(tmp_path_factory): return tiny_pipeline(tmp_path_factory.mktemp("base"), tokens=8)


def pipeline(base): return CogVideoXPipeline.from_pretrained(base)


@pytest.fixture(scope="module")
def loras(base, tmp_path_factory):
    "Files of LoRAs, as diffusers saves them."
    home = tmp_path_factory.mktemp("loras")
    for name, seed in LORAS.items():
        transformer = pipeline(base).transformer
        torch.manual_seed(seed)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "proj"]
        transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), name)
        state = get_peft_model_state_dict(transformer, adapter_name=name)
        CogVideoXPipeline.save_lora_weights(home/name, state)
    return home


def add(pipe, name, loras):
    if name in LORAS: return pipe.load_lora_weights(loras/name, adapter_name=name)
    pipe.transformer.add_adapter(DualRealConfig(rank=3, groups=2, condition_dim=REFERENCE), name)
    torch.manual_seed(OURS[name])
    with torch.no_grad():
        for k, p in pipe.transformer.named_parameters():
            if f".{name}." in k: torch.nn.init.normal_(p, std=.2)


def made(base, loras, names):
    pipe = pipeline(base)
    for name in names: add(pipe, name, loras)
    return pipe


def inputs(dtype=torch.float32):
    "Arguments of a forward pass, and a reference for each sample."
    g = torch.Generator().manual_seed(0)
    given = dict(hidden_states=torch.randn(2, 3, 4, 4, 4, generator=g).to(dtype),
                 encoder_hidden_states=torch.randn(2, 8, 32, generator=g).to(dtype),
                 timestep=torch.tensor([900, 30]),
                 image_rotary_emb=tuple(torch.randn(12, 16, generator=g).cos() for _ in range(2)))
    return given, torch.randn(2, REFERENCE, generator=g)


def out(pipe, names=None, weights=None):
    "The output with these adapters active (None: as it is)."
    transformer = pipe.transformer
    if names is not None: pipe.set_adapters(names, weights)
    given, e = inputs(transformer.dtype)
    with torch.no_grad():
        if active(transformer) is None: return transformer(**given).sample
        with reference(transformer, e): return transformer(**given).sample


@pytest.fixture(scope="module")
def expected(base, loras):
    "Active adapters -> output, each from a pipeline that has nothing else; (): stock."
    found = {tuple(names): out(made(base, loras, names), names) for names in SETS}
    return found | {(): out(pipeline(base))}


def hooks(transformer):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in transformer.modules())


def check(pipe, expected, sets=SETS, **close):
    for names in sets:
        found = out(pipe, names)
        if close: assert_close(found.float(), expected[tuple(names)], **close)
        else: assert torch.equal(found, expected[tuple(names)]), names


# What people do, each with a pipeline that has all adapters of an order.

def weights(pipe, expected, base, loras):
    check(pipe, expected)
    assert torch.equal(out(pipe, ["style", "subject"], [1., 0.]), expected["style",])
    assert torch.equal(out(pipe, ["style", "subject"], [0., 1.]), expected["subject",])
    half = out(made(base, loras, ["style", "subject"]), ["style", "subject"], [.5, .25])
    assert torch.equal(out(pipe, ["style", "subject"], [.5, .25]), half)


def enable_and_disable(pipe, expected, base, loras):
    pipe.set_adapters(["style", "subject"])
    for off, on in ((pipe.transformer.disable_adapters, pipe.transformer.enable_adapters),
                    (pipe.disable_lora, pipe.enable_lora)):
        off()
        assert torch.equal(out(pipe), expected[()])
        on()
        assert torch.equal(out(pipe), expected["style", "subject"])


def delete_the_lora(pipe, expected, base, loras):
    pipe.delete_adapters("style")
    check(pipe, expected, [["subject"]])
    add(pipe, "style", loras)
    check(pipe, expected)


def delete_ours(pipe, expected, base, loras):
    count = hooks(pipeline(base).transformer)
    for name in OURS.keys() & pipe.transformer.peft_config.keys(): pipe.delete_adapters(name)
    check(pipe, expected, [["style"]])
    assert hooks(pipe.transformer) == count and active(pipe.transformer) is None
    add(pipe, "subject", loras)
    check(pipe, expected)


def unload(pipe, expected, base, loras):
    pipe.unload_lora_weights()
    plain = pipeline(base).transformer
    assert torch.equal(out(pipe), expected[()]) and hooks(pipe.transformer) == hooks(plain)
    assert not hasattr(pipe.transformer, "peft_config")
    assert [n for n, _ in pipe.transformer.named_modules()] == [n for n, _ in plain.named_modules()]
    assert pipe.transformer.state_dict().keys() == plain.state_dict().keys()
    for name in ("style", "subject"): add(pipe, name, loras)
    check(pipe, expected)


def fuse(pipe, expected, base, loras):
    near = dict(rtol=1e-4, atol=1e-5)
    for scale in (1., .5):
        alone = made(base, loras, ["style"])
        alone.fuse_lora(adapter_names=["style"], lora_scale=scale)
        pipe.set_adapters(["style", "subject"])
        pipe.fuse_lora(adapter_names=["style"], lora_scale=scale)
        if scale == 1.: assert_close(out(pipe), expected["style", "subject"], **near)
        pipe.set_adapters(["style", "subject"], [scale, 0.])  # of the first, what it was fused with
        assert_close(out(pipe), out(alone), **near)
        pipe.unfuse_lora()
    check(pipe, expected, **near)
    with pytest.raises(InputError, match="'subject' is DualReal's and cannot be folded"):
        pipe.fuse_lora(adapter_names=["subject"])
    check(pipe, expected, **near)


def fuse_refused(pipe, expected, base, loras):
    "A refusal leaves nothing fused, and every factor as it was."
    for names in (None, ["style", "subject"]):
        pipe.set_adapters(["style", "subject"], [.5, .25])
        before = out(pipe)
        with pytest.raises(InputError, match="'subject' is DualReal's and cannot be folded"):
            pipe.fuse_lora(adapter_names=names, lora_scale=.5)
        assert torch.equal(out(pipe), before)
    assert not any(m.merged for m in pipe.transformer.modules() if hasattr(m, "merged_adapters"))
    check(pipe, expected)


def loaded_twice(pipe, expected, base, loras):
    pipe.load_lora_weights(loras/"style", adapter_name="again")
    pipe.delete_adapters("style")
    assert torch.equal(out(pipe, ["again", "subject"]), expected["style", "subject"])
    pipe.unload_lora_weights()
    assert torch.equal(out(pipe), expected[()])


def saved_between(pipe, expected, base, loras):
    "Through the Hub's format of one model, a LoRA's own file, and Python's."
    with TemporaryDirectory() as home:
        pipe.transformer.save_lora_adapter(home, adapter_name="style")
        twin = made(base, loras, ["subject"])
        twin.transformer.load_lora_adapter(home, adapter_name="style", prefix=None, weight_name=WEIGHTS)
        check(twin, expected)
        only = made(base, loras, ["subject"])
        only.save_pretrained(f"{home}/pipe")
        assert torch.equal(out(CogVideoXPipeline.from_pretrained(f"{home}/pipe")), expected[()])
        torch.save(pipe.transformer, f"{home}/whole.pt")
        pipe.transformer = torch.load(f"{home}/whole.pt", weights_only=False)
    check(pipe, expected)


def moved(pipe, expected, base, loras):
    "To another device by name: LoRAs, and ours."
    pipe.set_lora_device(["style", "subject"], "meta")
    for name in ("style", "subject"):
        there = {p.device.type for n, p in pipe.transformer.named_parameters() if f".{name}." in n}
        assert there == {"meta"}
    pipe.unload_lora_weights()
    assert torch.equal(out(pipe), expected[()])


def save_and_load(pipe, expected, base, loras):
    ours = published_state(pipe.transformer, "subject")
    lora = get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    twin = pipeline(base)
    load_adapter(twin.transformer, ours, "subject")
    twin.load_lora_weights({f"transformer.{k}": v for k, v in lora.items()}, adapter_name="style")
    check(twin, expected)
    state = get_peft_model_state_dict(pipe.transformer, adapter_name="subject")
    third = made(base, loras, ["style", "other"])
    assert not set_peft_model_state_dict(third.transformer, state, "other").unexpected_keys
    assert torch.equal(out(third, ["other"]), expected["subject",])
    again = pipeline(base)
    for name in pipe.transformer.peft_config: add(again, name, loras)
    again.transformer.load_state_dict(pipe.transformer.state_dict())
    check(again, expected)


def deepcopy(pipe, expected, base, loras):
    pipe.transformer, before = copy.deepcopy(pipe.transformer), pipe.transformer
    with torch.no_grad():
        for p in before.parameters(): p.zero_()
    check(pipe, expected)


def bf16(pipe, expected, base, loras):
    pipe.transformer.to(torch.bfloat16)
    check(pipe, expected, rtol=.1, atol=.1)


def fp8(pipe, expected, base, loras):
    "Stored in fp8, the other order of steps: what is adapted is cast, adapters are not."
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    later = made(base, loras, [name for name in pipe.transformer.peft_config if name in LORAS])
    later.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    for name in OURS.keys() & pipe.transformer.peft_config.keys(): add(later, name, loras)
    for names in SETS: assert_close(out(pipe, names), out(later, names), rtol=.02, atol=.02)
    kinds = {p.dtype for n, p in pipe.transformer.named_parameters() if "dualreal" in n}
    assert kinds == {torch.float32}
    assert torch.float8_e4m3fn in {p.dtype for p in pipe.transformer.parameters()}


def group_offload(pipe, expected, base, loras):
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, "block_level", num_blocks_per_group=1)
    check(pipe, expected)
    for name in ("style", "subject"): pipe.delete_adapters(name)
    for name in ("subject", "style"): add(pipe, name, loras)
    check(pipe, expected)


def model_offload(pipe, expected, base, loras):
    cpu_offload(pipe.transformer, torch.device("cpu"))
    check(pipe, expected, rtol=1e-5, atol=1e-5)
    assert all(p.is_meta for p in pipe.transformer.parameters())
    add(pipe, "late", loras)  # its weights go where the modules run, not where they wait
    assert torch.isfinite(out(pipe, ["late"])).all()


def checkpointing(pipe, expected, base, loras):
    pipe.set_adapters(["style", "subject"])
    found = []
    for on in (False, True):
        if on: pipe.transformer.enable_gradient_checkpointing()
        with torch.enable_grad(): found.append(learnt(pipe.transformer))
    assert found[0].keys() == found[1].keys()
    assert all(any(kind in name for name in found[0]) for kind in ("lora_", "dualreal_"))
    for name in found[0]: assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-7)
    check(pipe, expected)


def learnt(transformer):
    "Gradients of everything that learns; between the passes another forward pass takes place."
    given, e = inputs()
    with reference(transformer, e): made = transformer(**given).sample
    transformer(**given | dict(timestep=torch.tensor([5, 5])))
    made.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None}
    transformer.zero_grad()
    return grads


ACTIONS = [weights, enable_and_disable, delete_the_lora, delete_ours, unload, fuse, fuse_refused,
           loaded_twice, save_and_load, saved_between, moved, deepcopy,
           bf16, fp8, group_offload, model_offload, checkpointing]


@pytest.mark.parametrize("action", ACTIONS, ids=[a.__name__ for a in ACTIONS])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_neighbours(order, action, base, loras, expected):
    action(made(base, loras, order), expected, base, loras)


def test_all_linear():
    "A LoRA for all linear layers adapts the stock ones, none of ours."
    where = lambda t: sorted(n for n, _ in t.named_modules() if n.endswith("lora_A"))
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    alone, beside, first = stock(), attach(stock(), CONFIGS["default"]), stock()
    for transformer in (alone, beside, first): transformer.add_adapter(lora, "style")
    attach(first, CONFIGS["default"])
    assert where(alone) == where(beside) == where(first) and not [n for n in where(beside) if "dualreal" in n]
    for transformer in (beside, first):
        transformer.set_adapter("default")
        assert torch.equal(run(transformer, embedding()), run(adapted(), embedding()))


def test_a_reference_for_each_prompt(base, loras):
    "Under guidance every sample is there twice; the references of the prompts are meant for both."
    pipe, e = made(base, loras, ["subject"]), torch.randn(2, REFERENCE)
    pipe.set_progress_bar_config(disable=True)
    how = dict(height=32, width=32, num_frames=9, num_inference_steps=2, max_sequence_length=8,
               output_type="latent")
    draw = lambda i: torch.Generator().manual_seed(i)
    for scale in (1., 6.):
        with reference(pipe.transformer, e):
            both = pipe(["a cat", "a dog"], guidance_scale=scale, generator=[draw(0), draw(1)], **how).frames
        for i, prompt in enumerate(("a cat", "a dog")):
            with reference(pipe.transformer, e[i:i+1]):
                one = pipe(prompt, guidance_scale=scale, generator=draw(i), **how).frames
            assert_close(both[i:i+1], one, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="2 reference embeddings for 4"), reference(pipe.transformer, e):
        pipe.transformer(torch.randn(4, 3, 4, 4, 4), torch.randn(4, 8, 32), torch.tensor([3, 3, 3, 3]))


@pytest.mark.slow
@pytest.mark.parametrize("regional", [True, False], ids=["blocks", "whole"])
def test_compiled_before_and_after(base, loras, expected, regional):
    "Who compiled a stock transformer and loads an adapter then gets what the adapter says."
    pipe = pipeline(base)
    if regional: compile_blocks(pipe.transformer, fullgraph=True)
    else: pipe.transformer.compile()
    near = dict(rtol=1e-3, atol=1e-4)
    assert_close(out(pipe), expected[()], **near)
    for name in ("subject", "style"):
        add(pipe, name, loras)
        assert_close(out(pipe, [name]), expected[name,], **near)
    assert_close(out(pipe, ["style", "subject"]), expected["style", "subject"], **near)
    pipe.unload_lora_weights()
    assert_close(out(pipe), expected[()], **near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision_is_the_models(base, dtype):
    "A pipeline asks for the precision of the first weight: ours, float32 while they learn, come later."
    transformer = CogVideoXPipeline.from_pretrained(base, dtype=dtype).transformer
    transformer.add_adapter(DualRealConfig(rank=2, groups=2, condition_dim=None))
    for name, p in transformer.named_parameters():
        if "dualreal" in name: p.data = p.data.float()
    assert transformer.dtype == dtype
