"""Recordings of our own naive form in float64: `python tests/own_goldens.py` makes tests/goldens/ anew.

Each file holds all that it depends on (weights, inputs, draws), so that nothing rests on a random
generator, nor on a machine's float32 sine: the stock model's projection of the timestep is recorded, too.
The naive form is the reference: it agrees with the published implementation (test_goldens.py) and with the
formulas written down apart from it (test_tuner.py).
"""
import json
from pathlib import Path

import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file

from dualreal.checkpoint import adapter_tensors, load_adapter, published_state
from dualreal.core import atomic_path
from dualreal.objective import denoising_loss
from dualreal.switch import focus
from dualreal.tuner import DualRealConfig, blend_weights, reference

FOLDER = Path(__file__).resolve().parent / "goldens"
BASE = dict(num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, num_layers=4,
            time_embed_dim=8, text_embed_dim=6, sample_width=4, sample_height=4, sample_frames=5,
            max_text_seq_length=4, use_rotary_positional_embeddings=True)
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, snr_shift_scale=1.0,
                rescale_betas_zero_snr=True, prediction_type="v_prediction")
CONFIGS = {
    "joint": dict(groups=2), "one_group": dict(groups=1), "group_each": dict(groups=4),
    "identity_only": dict(groups=2, motion=False), "motion_only": dict(groups=2, identity=False),
    "no_controller": dict(controller=False), "no_condition": dict(groups=2, condition_dim=None),
    "scale_1": dict(groups=2, scale=1.),
}
MASKED = {"training_masked": True, "training_unmasked": False}
MOTION_STEPS = [True, False, False, True, True, False]


def read(name):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["config"])


def under(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def build(weights, config, fused, dtype):
    "A transformer with the recorded base and adapter weights."
    transformer = CogVideoXTransformer3DModel(**BASE)
    transformer.load_state_dict(read("base")[0])
    for p in transformer.parameters(): p.data = p.data.to(dtype)
    load_adapter(transformer, weights, fused=fused, **{k: v for k, v in config.items() if k == "scale"})
    return transformer


def cast(tensors, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def rope(tensors): return tensors["in/rope_cos"], tensors["in/rope_sin"]


def forward(tensors, config, fused, dtype):
    "Output, weights and gradients of both kinds of step, under the names of the recording."
    transformer, made = build(under(tensors, "adapter/"), config, fused, dtype), {}
    given = cast(under(tensors, "in/"), dtype)
    transformer.time_proj.register_forward_hook(lambda *_: given["time_proj"])
    for kind, e in (("motion", given["reference"]), ("identity", None)):
        with reference(transformer, e):
            out = transformer(given["latents"], given["text"], given["timestep"],
                              image_rotary_emb=rope(tensors)).sample
        transformer.zero_grad()
        (out - given["target"]).square().mean().backward()
        made |= {f"{kind}/sample": out.detach(), f"{kind}/identity_weight": blend_weights(transformer)}
        made |= {f"{kind}/grad/{k}": g for k, g in published_state(transformer, gradients=True).items()}
    return made


def train(tensors, config, fused, dtype, masked):
    "Losses and final weights of a short run."
    transformer, losses = build(under(tensors, "adapter/"), config, fused, dtype), []
    scheduler = CogVideoXDPMScheduler(**SCHEDULE)
    scheduler.alphas_cumprod = tensors["in/alphas_cumprod"]
    parameters = list(adapter_tensors(transformer).values())
    step = {}
    transformer.time_proj.register_forward_hook(lambda *_: step["time_proj"])
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
    for i, motion in enumerate(MOTION_STEPS):
        step = cast(under(tensors, f"step{i}/"), dtype)
        focus(transformer, ("motion" if motion else "identity") if masked else None)
        loss = denoising_loss(transformer, scheduler, step["latents"], step["text"], step["timestep"],
                              step["noise"], step["reference"] if motion else None, rope(tensors))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    after = {f"after/{k}": v for k, v in published_state(transformer).items()}
    return {"losses": torch.stack(losses), **after}


def draws(generator):
    "Weights and inputs, in float32: exact in both precisions, and half the size."
    return lambda *shape, scale=1.: scale * torch.randn(*shape, generator=generator)


def start(config, draw):
    "The tensors that a recording begins with: adapter weights and what all passes share."
    transformer = CogVideoXTransformer3DModel(**BASE)
    transformer.add_adapter(DualRealConfig(**{**dict(rank=3, condition_dim=5), **config}))
    adapter = {f"adapter/{k}": draw(*v.shape, scale=.3) for k, v in published_state(transformer).items()}
    angles = draw(8, 8)
    return {**adapter, "in/rope_cos": angles.cos(), "in/rope_sin": angles.sin()}


def sample(draw, generator, batch=2):
    timestep = torch.randint(0, 1000, (batch,), generator=generator)
    return dict(latents=draw(batch, 2, 2, 4, 4), text=draw(batch, 4, 6), reference=draw(batch, 5),
                timestep=timestep, time_proj=CogVideoXTransformer3DModel(**BASE).time_proj(timestep))


def save(name, tensors, config):
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    with atomic_path(FOLDER / f"{name}.safetensors") as tmp:
        save_file(tensors, tmp, {"config": json.dumps(config)})


def record():
    "Make every recording anew."
    torch.set_num_threads(1)  # or sums come out in another order, and the last digits differ
    torch.manual_seed(0)
    save("base", CogVideoXTransformer3DModel(**BASE).state_dict(), BASE)
    for seed, (name, config) in enumerate([*CONFIGS.items(), *((name, CONFIGS["joint"]) for name in MASKED)]):
        generator = torch.Generator().manual_seed(seed)
        draw = draws(generator)
        tensors = start(config, draw)
        if name in CONFIGS:
            given = dict(sample(draw, generator), target=draw(2, 2, 2, 4, 4))
            tensors |= {f"in/{k}": v for k, v in given.items()}
            made = forward(tensors, config, False, torch.float64)
        else:
            for i, motion in enumerate(MOTION_STEPS):
                batch = 3 if motion else 1
                step = dict(sample(draw, generator, batch), noise=draw(batch, 2, 2, 4, 4))
                tensors |= {f"step{i}/{k}": v for k, v in step.items()}
            tensors["in/alphas_cumprod"] = CogVideoXDPMScheduler(**SCHEDULE).alphas_cumprod
            made = train(tensors, config, False, torch.float64, MASKED[name])
        save(name, {**tensors, **{f"out/{k}": v for k, v in made.items()}}, config)


if __name__ == "__main__": record()
