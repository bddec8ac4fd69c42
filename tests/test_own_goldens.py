"""Both forms against the recordings in tests/goldens, in float64 and float32."""
import pytest
import torch
from own_goldens import CONFIGS, FOLDER, MASKED, forward, read, train, under

forms = pytest.mark.parametrize("fused", [False, True], ids=["naive", "fused"])
precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def off(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


@precisions
@forms
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_gradients(name, fused, dtype):
    tensors, config = read(name)
    expected, made = under(tensors, "out/"), forward(tensors, config, fused, dtype)
    assert made.keys() == expected.keys()
    for k, v in made.items():
        limit = 1e-9 if dtype == torch.float64 else 1e-4 if "/grad/" in k else 1e-5
        assert v.dtype == dtype and off(v, expected[k]) < limit, k


@precisions
@forms
@pytest.mark.parametrize("name", MASKED)
def test_training(name, fused, dtype):
    tensors, config = read(name)
    expected, made = under(tensors, "out/"), train(tensors, config, fused, dtype, MASKED[name])
    exact = dtype == torch.float64
    assert off(made["losses"], expected["losses"]) < (1e-9 if exact else 1e-4)
    before, after, theirs = under(tensors, "adapter/"), under(made, "after/"), under(expected, "after/")
    assert after.keys() == theirs.keys() == before.keys()
    flat = lambda weights: torch.cat([weights[k].double().flatten() for k in sorted(weights)])
    change = flat(theirs) - flat(before)
    assert (flat(after) - flat(theirs)).norm() < (1e-9 if exact else 1e-3) * change.norm()
    assert change.norm() > 0


def test_recordings_stay_small():
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 1.5e6
