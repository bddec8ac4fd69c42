"""Another toy: the folder that DUALREAL_ASSETS names takes the place of the package's, in everything."""
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import dualreal.toy.truth  # noqa: F401  enters the toy among the worlds
from dualreal.backbone import load_reference_encoder, outline
from dualreal.base import find_base
from dualreal.checkpoint import read_adapter
from dualreal.cli import main
from dualreal.core import InputError, asset
from dualreal.encoders import load_encoders
from dualreal.experiments.benchmark import jobs_of, load_bench
from dualreal.experiments.jobs import run_jobs
from dualreal.experiments.results import read_results
from dualreal.toy.bases import tiny_pipeline
from dualreal.toy.world import HELD_OUT_SUBJECTS, plate, render, write_case
from dualreal.video import read_image, read_video

PACKAGE = Path(dualreal.__file__).parent / "assets"
HEIGHT, WIDTH = 32, 48  # of a toy that is neither square nor the package's
CASE = "--identity", "case/identity", "--motion", "case/motion"


@pytest.fixture
def other(tmp_path, monkeypatch):
    "A folder with a toy base of random weights and the package's encoders, in use."
    home = tmp_path / "assets"
    tiny_pipeline(home / "toy-base", tokens=64)
    note = dict(height=HEIGHT, width=WIDTH, reference_encoder="toy", rank=2, groups=2, steps=2)
    (home / "toy-base/dualreal.json").write_text(json.dumps(note))
    for name in ("toy-clip", "toy-dino"): shutil.copytree(PACKAGE / name, home / name)
    monkeypatch.setenv("DUALREAL_ASSETS", str(home))
    monkeypatch.setenv("DUALREAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return home


def own_reference(home, width):
    "A reference encoder beside the CLIP; its embedding has another length."
    shutil.copytree(home / "toy-clip", home / "toy-reference")
    note = home / "toy-reference/open_clip_config.json"
    config = json.loads(note.read_text())
    config["model_cfg"]["embed_dim"] = width
    note.write_text(json.dumps(config))
    model = open_clip.CLIP(**config["model_cfg"])
    save_file({k: v.contiguous() for k, v in model.state_dict().items()},
              home / "toy-reference/open_clip_model.safetensors")


def sizes(*files): return {tuple(one.shape[-3:-1]) for one in files}


def test_drawn_at_the_size_of_the_toy(other):
    one = HELD_OUT_SUBJECTS["teal_cat"]
    assert sizes(render(one, "hopping")[0], plate("snow")) == {(HEIGHT, WIDTH)}
    assert sizes(render(one, "hopping", height=16)[0]) == {(16, WIDTH)}
    with pytest.raises(InputError, match="0x48"): render(one, "hopping", height=0)
    (other / "toy-base/dualreal.json").write_text("{}")
    with pytest.raises(InputError, match="dualreal.json: lacks the height"): plate("snow")


def test_every_command_takes_the_other_toy(other, capsys, monkeypatch):
    write_case("case", "mint_cat", "hopping", images=2, clips=2)
    assert main(["check", *CASE]) == 0
    assert f"cropped to {WIDTH}x{HEIGHT}" in capsys.readouterr().out
    assert main(["train", *CASE, "--out", "run", "--steps", "2", "--samples", "1"]) == 0
    assert main(["generate", "--adapter", "run", "--prompt", "a cat *", "--out", "videos/a.mp4"]) == 0
    how = "--encoders", "toy", "--truth", "mint_cat:hopping"
    assert main(["evaluate", "--videos", "videos", *CASE[:2], "--out", "scores", *how]) == 0
    row = json.loads(Path("scores/report.json").read_text())["videos"][0]
    assert (row["height"], row["width"]) == (HEIGHT, WIDTH) and 0 <= row["truth_identity"] <= 1
    monkeypatch.setattr("dualreal.toy.world.write_case", partial(write_case, images=2, clips=2))
    assert main(["demo", "--steps", "1", "--out", "demo"]) == 0
    pictures, films = sorted(Path().rglob("identity/**/*.png")), sorted(Path().rglob("*.mp4"))
    assert {p.parts[0] for p in [*pictures, *films]} == {"case", "run", "videos", "demo"}
    assert sizes(*map(read_image, pictures), *(read_video(p)[0] for p in films)) == {(HEIGHT, WIDTH)}


def test_benchmark_of_the_other_toy(other, tmp_path):
    toy = load_bench("toy", steps=1, sampling=1, videos=1, images=1, clips=1, seeds=[0])
    toy = replace(toy, cases=toy.cases[:1], tables=dict(all=["dualreal"]))
    job, = jobs_of(toy, tmp_path / "out")
    assert run_jobs([job], tmp_path / "out", progress=False)["done"] == 1
    result, = read_results([job], tmp_path / "out")
    assert sizes(read_video(result["videos"][0])[0]) == {(HEIGHT, WIDTH)}
    assert (result["config"]["height"], result["config"]["width"]) == (HEIGHT, WIDTH)


def test_a_result_names_what_was_used(other, monkeypatch):
    def settings(): return jobs_of(load_bench("toy"), "out", ["base"])[0].settings
    shared = settings()
    own_reference(other, 24)
    apart = settings()
    assert apart["networks"][:2] == shared["networks"] and len(apart["networks"]) == 3
    monkeypatch.delenv("DUALREAL_ASSETS")
    package = settings()
    assert package["networks"] == shared["networks"] and package["base"] != shared["base"]


def test_a_reference_encoder_of_its_own(other):
    "The condition comes from `toy-reference`, the scores from `toy-clip`."
    assert outline("toy", torch.float32)[2] == load_reference_encoder("toy").dim != 24
    picture = render(HELD_OUT_SUBJECTS["teal_cat"])[0]
    before = load_encoders("toy")["clip_i"].images(picture)
    own_reference(other, 24)
    assert outline("toy", torch.float32)[2] == load_reference_encoder("toy").dim == 24
    assert (load_encoders("toy")["clip_i"].images(picture) == before).all()
    write_case("case", images=1, clips=1)
    assert main(["train", *CASE, "--out", "run", "--steps", "1", "--samples", "0"]) == 0
    assert read_adapter("run").reference.shape == (1, 24)


@pytest.mark.parametrize("part, use", [
    ("toy-base", lambda: find_base("toy")), ("toy-base", lambda: plate("snow")),
    ("toy-clip", lambda: load_reference_encoder("toy")), ("toy-clip", lambda: load_encoders("toy")),
    ("toy-dino", lambda: load_encoders("toy"))], ids=["base", "drawing", "reference", "clip", "dino"])
def test_what_is_missing_is_named(other, part, use):
    shutil.rmtree(other / part)
    with pytest.raises(InputError, match=f"DUALREAL_ASSETS={other}: there is no folder {part} in it"): use()


def test_without_the_variable(monkeypatch):
    monkeypatch.delenv("DUALREAL_ASSETS", raising=False)
    assert asset("toy-base") == find_base("toy") == PACKAGE / "toy-base"
