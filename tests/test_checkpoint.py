"""Adapter files as they come: published, wrapped, cut off, foreign. What does not fit leaves no trace."""
import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import CONFIGS, LAYERS, REFERENCE, adapted, embedding, random_weights, run, stock

from dualreal.checkpoint import FILE, find_adapter, load_adapter, published_state, read_adapter, save_adapter
from dualreal.core import InputError

WEIGHTS = random_weights(CONFIGS["default"])
CONDITION = "transformer_blocks.0.motion_ff_adapter.condition_linear.weight"


class Evil:
    def __reduce__(self): return print, ("this would have run",)


def refused(source, says, transformer=None, **known):
    "The sentence with which `source` is refused; the transformer stays as it was."
    transformer = transformer or stock()
    before = {n: p.detach().clone() for n, p in transformer.named_parameters()}
    with pytest.raises(InputError, match=says) as caught: load_adapter(transformer, source, **known)
    after = dict(transformer.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert "\n" not in str(caught.value)
    if not known: assert len(getattr(transformer, "peft_config", {})) == any("dualreal" in k for k in before)
    return str(caught.value)


def test_what_does_not_match_is_named():
    missing = {k: v for k, v in WEIGHTS.items() if "blocks.2." not in k}
    said = refused(missing, "missing")
    lost = sorted(WEIGHTS.keys() - missing.keys())
    assert all(k in said for k in lost[:3]) and f"and {len(lost) - 3} more" in said and len(said) < 300
    refused({**WEIGHTS, "extra.weight": torch.ones(1)}, "not of this adapter: extra.weight")
    refused({**WEIGHTS, "controller.norm.bias": torch.ones(3)}, "of another shape: controller.norm.bias")
    refused({k: v for k, v in WEIGHTS.items() if k != CONDITION}, f"missing: {CONDITION}")
    refused({k: v for k, v in WEIGHTS.items() if "blocks.3." not in k}, r"another base: blocks 3 \(here 4\)")
    refused(WEIGHTS, r"another base: blocks 4 \(here 8\)", stock(layers=8))
    refused(random_weights(dict(groups=3)), "groups=3 does not divide")
    refused({k: v for k, v in WEIGHTS.items() if "controller" in k}, "not a DualReal adapter")
    refused({**WEIGHTS, "step": 3}, "'step' is no tensor")
    refused({}, "not a DualReal adapter")
    refused(WEIGHTS, "of another shape", rank=4)
    refused(WEIGHTS, "v1.5", adapter_name="v1.5")


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "transformer.", "base_model.model.",
            "diffusion_model.")


@pytest.mark.parametrize("form", [*PREFIXES, "state_dict", "PEFT", "PEFT's model"])
def test_wrapped_names(tmp_path, form):
    named = {form + k if form in PREFIXES else k: v for k, v in WEIGHTS.items()}
    if form == "state_dict": named = {"state_dict": named, "epoch": 3}
    if form == "PEFT": named = get_peft_model_state_dict(adapted())
    if form == "PEFT's model":
        named = {f"base_model.model.{k}": v for k, v in get_peft_model_state_dict(adapted()).items()}
    torch.save(named, tmp_path / "adapter.pth")
    transformer = stock()
    load_adapter(transformer, tmp_path)
    assert torch.equal(run(transformer, embedding()), run(adapted(), embedding()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "bin"])
def test_precisions(tmp_path, dtype, suffix):
    path = save_adapter(adapted(dtype=dtype), tmp_path / f"a.{suffix}")
    assert path == tmp_path / f"a.{suffix}" and find_adapter(tmp_path) == path
    tensors = read_adapter(path).tensors
    assert {v.dtype for v in tensors.values()} == {dtype} and tensors.keys() == WEIGHTS.keys()
    transformer = stock()
    load_adapter(transformer, path)
    assert all(torch.equal(v, tensors[k].double()) for k, v in published_state(transformer).items())


def test_what_the_file_says(tmp_path):
    about, e = dict(base="toy", subject="cat *", training=dict(steps=3, out=tmp_path)), embedding()[:1]
    path = save_adapter(adapted(CONFIGS["scale 1"]), tmp_path / "run.v2", metadata=about, reference=e)
    assert path == tmp_path / "run.v2" / FILE
    with safe_open(path, "pt") as f: info = json.loads(f.metadata()["dualreal"])
    assert info["config"] == dict(rank=3, groups=2, condition_dim=5, scale=1., identity=True, motion=True,
                                  controller=True)
    assert info["transformer"] == {"family": "cogvideox", "class": type(stock()).__name__, "blocks": 4,
                                   "width": 16, "time_dim": 8}
    assert info["training"] == dict(steps=3, out=str(tmp_path)) and info["subject"] == "cat *"
    adapter = read_adapter(path.parent)
    tensors, read, carried = adapter.tensors, adapter.info, adapter.reference
    assert read == info and torch.equal(carried, e) and tensors.keys() == WEIGHTS.keys()
    assert load_adapter(stock(), path).scale == 1. and load_adapter(stock(), path, fused=False).fused is False
    for shape in ((5,), (1, 5), (1, 1, 5)):
        save_adapter(adapted(), tmp_path, reference=torch.ones(shape))
        assert read_adapter(tmp_path).reference.shape == (1, REFERENCE)
    with pytest.raises(InputError, match=r"\(2, 5\)"):
        save_adapter(adapted(), tmp_path, reference=embedding())
    kept = read_adapter(tmp_path).reference
    assert torch.equal(kept, torch.ones(1, REFERENCE))  # what was saved is still there


def test_folders(tmp_path):
    refused(tmp_path / "none", "none: does not exist")
    refused(tmp_path, "no adapter")
    save_adapter(adapted(), tmp_path / "a.pth")
    save_adapter(adapted(), tmp_path / "b.safetensors")
    (tmp_path / ".b-x1.safetensors").write_bytes(b"of an interrupted save")
    assert find_adapter(tmp_path).name == "b.safetensors"
    save_adapter(adapted(), tmp_path / "c.safetensors")
    refused(tmp_path, "more than one adapter file .b.safetensors, c.safetensors.")


def test_a_published_file_with_another_total(tmp_path):
    "Published code knows one total; a file of another one says so."
    for total, more in ((.2, set()), (.5, {"scale"})):
        file = save_adapter(adapted(dict(CONFIGS["default"], scale=total)), tmp_path / "a.pth")
        assert set(torch.load(file, weights_only=True)) == set(WEIGHTS) | more
        assert load_adapter(stock(), file).scale == total
    assert load_adapter(stock(), file, scale=.3).scale == .3
    refused({**WEIGHTS, "scale": torch.ones(2)}, "scale has 2 numbers, not one")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_and_foreign_files(tmp_path):
    whole = save_adapter(adapted(), tmp_path / "whole.safetensors").read_bytes()
    files = {"cut.safetensors": whole[:900], "empty.safetensors": b"", "text.safetensors": b"hello" * 99,
             "text.pth": b"hello" * 99, "empty.pth": b"", "pickle.pth": pickle.dumps(Evil())}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, f"{name}: cannot be read as an adapter: the file is damaged")
    for name, content in {"evil.pth": {"x": Evil()}, "module.pth": torch.nn.Linear(1, 1)}.items():
        torch.save(content, tmp_path / name)
        refused(tmp_path / name, f"{name}: .*it could run code")
    for name, content in {"list.pth": [1, 2], "number.pth": 3, "tensor.pth": torch.ones(2)}.items():
        torch.save(content, tmp_path / name)
        refused(tmp_path / name, f"{name}: ")
    torch.save({"optimizer": WEIGHTS}, tmp_path / "nested.pth")
    refused(tmp_path / "nested.pth", "nested.pth: .*'optimizer' is no tensor")
    save_file({"lora_A.weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", "lora.safetensors: .*not a DualReal adapter")


def test_metadata_of_other_versions(tmp_path):
    path = tmp_path / "a.safetensors"

    def saved(**config):
        config = dict(rank=3, groups=2, condition_dim=5, **config)
        save_file(WEIGHTS, path, {"format": "pt", "dualreal": json.dumps(dict(config=config))})
        return path

    assert load_adapter(stock(), saved()).groups == 2
    refused(saved(heads=3), "a.safetensors: unknown setting heads")
    refused(saved(scale="much"), "scale='much'")
    refused(saved(motion=False), "not of this adapter")
    save_file(WEIGHTS, path, {"format": "pt", "dualreal": "{"})
    refused(path, "cannot be read")
    save_file(WEIGHTS, path)  # the published tensors as safetensors, without metadata
    assert load_adapter(stock(), path).rank == 3


def test_over_an_attached_adapter():
    transformer = adapted(fused=False)
    before = [id(p) for p in transformer.parameters()]
    new = random_weights(CONFIGS["default"], seed=8)
    assert load_adapter(transformer, new).fused is False
    assert [id(p) for p in transformer.parameters()] == before  # an optimiser still holds them
    assert all(torch.equal(v, new[k]) for k, v in published_state(transformer).items())
    for config in ("one group", "rank 1", "no condition", "motion only"):
        refused(random_weights(CONFIGS[config]), "other settings", transformer)
    refused(new, "other settings", transformer, fused=True)
    refused(new, "other settings", transformer, scale=1.)
    refused({**new, "controller.norm.bias": torch.ones(2)}, "another shape", transformer)
    lora = stock()
    lora.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "default")
    with pytest.raises(InputError, match="other settings"): load_adapter(lora, new)


def test_published_state_is_a_copy():
    transformer = adapted()
    state = published_state(transformer)
    with torch.no_grad():
        for p in transformer.parameters(): p.zero_()
    assert all(torch.equal(state[k], WEIGHTS[k]) for k in WEIGHTS) and len(state) == 14 + LAYERS * 20
    assert published_state(transformer, gradients=True) == {}


def test_an_empty_configuration_is_inferred(tmp_path):
    from dualreal.checkpoint import Adapter
    tensors = random_weights(CONFIGS["one group"])
    assert Adapter(tensors, dict(config={})).settings == Adapter(tensors).settings
