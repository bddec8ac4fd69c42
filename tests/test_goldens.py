"""The published implementation's recordings (../shared/goldens) against the naive and the fused form."""
import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from safetensors import safe_open

from dualreal.checkpoint import load_adapter, published_state
from dualreal.objective import denoising_loss
from dualreal.switch import focus
from dualreal.tuner import blend_weights, reference

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"
pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason=f"no published recordings here ({GOLDENS})")
ADAPTER = ("id_attn", "id_ff", "motion_attn", "motion_ff", "controller")


def read(name):
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def under(tensors, prefix):
    return {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}


def build(tensors, metadata, fused):
    config = {k: v for k, v in json.loads(metadata["config"]).items() if "dapter" not in k}
    transformer = CogVideoXTransformer3DModel(**config)
    weights = under(tensors, "weights/")
    adapter = {k: v for k, v in weights.items() if any(a in k for a in ADAPTER)}
    transformer.load_state_dict({k: v for k, v in weights.items() if k not in adapter})
    load_adapter(transformer, adapter, fused=fused)
    return transformer


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("fused", [False, True], ids=["naive", "fused"])
@pytest.mark.parametrize("name", ["joint_motion", "joint_identity", "fixed_weights"])
def test_forward_and_gradients(name, fused):
    tensors, metadata = read(name)
    transformer = build(tensors, metadata, fused)
    given = tensors["in/y_image"] if metadata.get("y", "True") == "True" else None
    with reference(transformer, given):
        sample = transformer(hidden_states=tensors["in/hidden_states"], timestep=tensors["in/timestep"],
                             encoder_hidden_states=tensors["in/encoder_hidden_states"],
                             image_rotary_emb=(tensors["in/rope_cos"], tensors["in/rope_sin"])).sample
    assert off(sample, tensors["out/sample"]) < 1e-5
    if "out/identity_weight" in tensors:
        assert off(blend_weights(transformer), tensors["out/identity_weight"]) < 1e-5
    loss = (sample - tensors["in/grad_target"]).square().mean()
    assert off(loss, tensors["out/grad_loss"][0]) < 1e-5
    loss.backward()
    ours = published_state(transformer, gradients=True)
    theirs = under(tensors, "grad/")
    assert set(ours) == set(theirs)
    worst = {k: off(ours[k], theirs[k]) for k in theirs}
    assert max(worst.values()) < 1e-4, max(worst.items(), key=lambda kv: kv[1])


@pytest.mark.parametrize("fused", [False, True], ids=["naive", "fused"])
def test_training_run(fused):
    tensors, metadata = read("training_masked")
    transformer = build(tensors, metadata, fused)
    scheduler = CogVideoXDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, snr_shift_scale=1.0,
        rescale_betas_zero_snr=True, prediction_type="v_prediction")
    before = published_state(transformer)
    before = {k: v.clone() for k, v in before.items()}
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
    losses = []
    for s, is_motion in enumerate(tensors["in/motion_steps"].tolist()):
        step = under(tensors, f"step{s}/")
        focus(transformer, "motion" if is_motion else "identity")
        loss = denoising_loss(transformer, scheduler, step["latents"], step["text"], step["timestep"],
                              step["noise"], reference=step["reference"] if is_motion else None,
                              image_rotary_emb=(tensors["in/rope_cos"], tensors["in/rope_sin"]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert off(torch.tensor(losses), tensors["out/losses"]) < 1e-4
    after, theirs = published_state(transformer), under(tensors, "out/")
    theirs.pop("losses")
    assert set(after) == set(theirs)
    change = sum((theirs[k] - before[k]).square().sum() for k in theirs).sqrt()
    error = sum((theirs[k] - after[k]).square().sum() for k in theirs).sqrt()
    assert error / change < 1e-3
