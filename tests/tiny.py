"""A tiny stock transformer, its inputs, and adapters of every configuration with random weights."""
from types import SimpleNamespace

import torch
from diffusers import CogVideoXTransformer3DModel

from dualreal.checkpoint import load_adapter
from dualreal.tuner import reference

LAYERS, WIDTH, TIME, RANK, REFERENCE = 4, 16, 8, 3, 5
CONFIGS = {
    "default": dict(groups=2),
    "one group": dict(groups=1),
    "a group each": dict(groups=LAYERS),
    "identity only": dict(groups=2, motion=False),
    "motion only": dict(groups=2, identity=False),
    "no controller": dict(controller=False),
    "no condition": dict(groups=2, condition_dim=None),
    "scale 0": dict(groups=2, scale=0.),
    "scale 1": dict(groups=2, scale=1.),
    "rank 1": dict(groups=1, rank=1),
    "identity alone": dict(motion=False, controller=False),
    "motion alone": dict(identity=False, condition_dim=None, controller=False),
}


def stock(layers=LAYERS, dtype=torch.float64, seed=0):
    "A small transformer of the stock class, with random weights."
    torch.manual_seed(seed)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, num_layers=layers,
        time_embed_dim=TIME, text_embed_dim=6, sample_width=4, sample_height=4, sample_frames=5,
        max_text_seq_length=4, use_rotary_positional_embeddings=True).to(dtype)


def inputs(dtype=torch.float64, batch=2, seed=1):
    "Arguments of a forward pass: two latent frames of 4x4, four text tokens."
    draw = torch.Generator().manual_seed(seed)
    angles = torch.rand(8, 8, generator=draw)
    return dict(hidden_states=torch.randn(batch, 2, 2, 4, 4, generator=draw).to(dtype),
                encoder_hidden_states=torch.randn(batch, 4, 6, generator=draw).to(dtype),
                timestep=torch.randint(0, 1000, (batch,), generator=draw),
                image_rotary_emb=(angles.cos(), angles.sin()))


def embedding(dtype=torch.float64, batch=2):
    return torch.randn(batch, REFERENCE, generator=torch.Generator().manual_seed(2)).to(dtype)


def full(config):
    "All settings of a configuration of the table."
    values = dict(rank=RANK, groups=7, condition_dim=REFERENCE, scale=.2)
    return SimpleNamespace(**{**values, **dict(identity=True, motion=True, controller=True), **config})


def random_weights(config, dtype=torch.float64, seed=3, layers=LAYERS):
    "A published dictionary for a configuration, from the names and shapes of the method's description alone."
    c, shapes = full(config), {}
    for site in (f"transformer_blocks.{i}.{s}_{m}_adapter" for i in range(layers) for m in ("attn", "ff")
                 for s in ("id", "motion")):
        if not (c.motion if "motion" in site else c.identity): continue
        shapes |= {f"{site}.down_linear": (c.rank, WIDTH), f"{site}.up_linear": (WIDTH, c.rank)}
        if "motion" in site and c.condition_dim: shapes[f"{site}.condition_linear"] = (WIDTH, c.condition_dim)
    if c.controller:
        layers = {"channel_encoder.0": (TIME, WIDTH), "timestep_encoder.1": (3 * TIME, TIME), "norm": (TIME,),
                  "fuse_proj": (4 * TIME, TIME), "fuse_proj_down": (TIME, 4 * TIME),
                  "fusion_net.1": (128, TIME), "fusion_net.3": (c.groups, 128)}
        shapes |= {f"controller.{name}": shape for name, shape in layers.items()}
    draw = torch.Generator().manual_seed(seed)
    tensor = lambda shape: torch.randn(shape, generator=draw).mul(.3).to(dtype)
    return {f"{name}.{kind}": tensor(shape if kind == "weight" else shape[:1])
            for name, shape in shapes.items() for kind in ("weight", "bias")}


def attach(transformer, config, name="default", seed=3, **more):
    "Give a transformer an adapter of the table with random weights."
    known = {k: v for k, v in {**config, **more}.items() if k in ("scale", "fused")}  # weights tell the rest
    load_adapter(transformer, random_weights(config, transformer.dtype, seed), name, **known)
    return transformer


def adapted(config=CONFIGS["default"], dtype=torch.float64, **more):
    return attach(stock(dtype=dtype), config, **more)


def run(transformer, e=None, **changes):
    "The output without gradients; `e`: reference."
    arguments = {**inputs(transformer.dtype), **changes}
    with torch.no_grad(), reference(transformer, e): return transformer(**arguments).sample


def gradients(transformer, e=None, between=None, acting=("identity", "motion")):
    "Output and gradients by parameter name; the backward pass comes after the reference has ended."
    with reference(transformer, e, acting): out = transformer(**inputs(transformer.dtype)).sample
    if between: between()
    transformer.zero_grad()
    (out - 1).square().mean().backward()
    grads = {n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None}
    transformer.zero_grad()
    return out.detach(), grads
