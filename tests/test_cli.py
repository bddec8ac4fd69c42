"""The commands as a user meets them: what they make, and how they fail."""
import errno
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dualreal.cli import main
from dualreal.toyworld import write_case
from dualreal.video import read_video, write_video


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("cli")
    write_case(home / "case", "teal_cat", "swinging", images=2, clips=2)
    return home


@pytest.fixture(scope="session")
def trained(home):
    assert main(train(home / "case", home / "run", "--save-every", "2")) == 0
    return home / "run"


@pytest.fixture
def case(home, tmp_path):
    shutil.copytree(home / "case", tmp_path / "case")
    return tmp_path / "case"


@pytest.fixture(autouse=True)
def cache(home, monkeypatch):
    monkeypatch.setenv("DUALREAL_CACHE", str(home / "cache"))


def train(case, out, *more):
    return ["train", "--identity", str(case / "identity"), "--motion", str(case / "motion"), "--out", str(out), "--steps", "3",
            "--samples", "1", *map(str, more)]


def complaint(capsys, status, *argv):
    "Run a command that must fail; its one line."
    capsys.readouterr()
    assert main([str(a) for a in argv]) == status
    err = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert len(err) == 1 and err[0].startswith("dualreal: "), err
    return err[0]


def one_frame(case): write_video(case / "motion/videos/00.mp4", np.zeros((1, 64, 64, 3), np.uint8))
def no_image(case): shutil.rmtree(case / "identity/images"), (case / "identity/images").mkdir()
def no_clip(case): shutil.rmtree(case / "motion/videos"), (case / "motion/videos").mkdir()
def bad_image(case): (case / "identity/images/01.png").write_bytes(b"not a picture")


def cut_clip(case):
    write_video(case / "motion/videos/01.mp4", np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8))
    whole = (case / "motion/videos/01.mp4").read_bytes()
    (case / "motion/videos/01.mp4").write_bytes(whole[:len(whole) // 3])


def captions(case): (case / "identity/prompts.txt").write_text("cat *\ncat *\ncat *\n")
def no_class(case): (case / "identity/prompts.txt").write_text("*\n")
def long_prompt(case): (case / "motion/prompts.txt").write_text("a creature is " + "swinging and " * 60 + "\n")


@pytest.mark.parametrize("spoil, names", [
    (no_image, "identity"), (no_clip, "motion"), (bad_image, "01.png"), (cut_clip, "01.mp4"), (one_frame, "00.mp4"),
    (captions, "prompts.txt"), (no_class, "class word"), (long_prompt, "64"),
])
def test_bad_case(case, tmp_path, capsys, spoil, names):
    spoil(case)
    assert names in complaint(capsys, 2, *train(case, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, names", [
    (["--groups", "4"], "[1, 2, 3, 6]"), (["--base", "nobody/nothing"], "nobody/nothing"), (["--steps", "0"], "steps 0"),
    (["--device", "cuda:77"], "cuda:77"), (["--motion-ratio", "2"], "motion_ratio"), (["--reference-encoder", "no/where"], "no/where"),
    (["--precision", "int3"], "int3"), (["--lr", "-1"], "lr -1"), (["--scale", "-1"], "scale"),
])
def test_bad_setting(home, tmp_path, capsys, more, names):
    assert names in complaint(capsys, 2, *train(home / "case", tmp_path / "run", *more))


def test_folder_without_weights(tmp_path, home, capsys):
    base = tmp_path / "base"
    (base / "transformer").mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    assert str(base) in complaint(capsys, 2, *train(home / "case", tmp_path / "run", "--base", base))


def test_unknown_flag_and_command(capsys):
    assert main(["train", "--nonsense"]) == 2
    assert main(["fly"]) == 2
    assert main(["--help"]) == 0


def test_run_has_everything(trained):
    assert [p.name for p in trained.glob("*.safetensors")] == ["adapter.safetensors"]
    assert {p.name for p in trained.iterdir()} >= {"run.json", "loss.png", "contact_sheet.png", "checkpoints", "samples"}
    run = json.loads((trained / "run.json").read_text())
    assert [row["step"] for row in run["log"]] == [1, 2, 3]
    assert run["seconds"]["train"] > 0 and run["peak_memory_bytes"] > 0 and run["environment"]["packages"]["torch"]
    assert len(read_video(trained / "samples/00.mp4")[0]) == 9


def test_output_in_use_and_resume(trained, home, capsys):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    assert str(trained) in complaint(capsys, 2, *train(home / "case", trained))
    assert main(train(home / "case", trained, "--resume")) == 0
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


def test_resume_without_checkpoint_starts_afresh(home, tmp_path):
    assert main(train(home / "case", tmp_path / "new", "--resume")) == 0
    assert (tmp_path / "new/run.json").exists()


def test_damaged_checkpoint_is_passed_over(home, trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "run.json").unlink()
    shutil.copytree(run / "checkpoints/step-2", run / "checkpoints/step-3")
    (run / "checkpoints/step-3/state.pt").write_bytes(b"half")
    assert main(train(home / "case", run, "--resume", "--save-every", "2")) == 0
    assert "step-3" in capsys.readouterr().out
    log = [[r["loss"] for r in json.loads((d / "run.json").read_text())["log"]] for d in (run, trained)]
    assert log[0] == log[1]


def generate(trained, out, *more):
    return ["generate", "--adapter", str(trained), "--prompt", "a cat * is swinging", "--out", str(out), "--steps", "2", *map(str, more)]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_generate(trained, tmp_path, suffix):
    out = tmp_path / f"video{suffix}"
    assert main(generate(trained, out)) == 0
    assert read_video(out)[0].shape == (9, 64, 64, 3)
    record = json.loads((tmp_path / f"video{suffix}.json").read_text())
    assert np.shape(record["identity_weight"]) == (2, 3) and record["seed"] == 42


def test_generate_with_reference_and_dial(trained, home, tmp_path):
    picture = next((home / "case/identity/images").glob("*.png"))
    assert main(generate(trained, tmp_path / "a.mp4", "--reference", picture, "--dial", "1")) == 0
    assert np.allclose(json.loads((tmp_path / "a.mp4.json").read_text())["identity_weight"], 0.2, atol=0.01)


@pytest.mark.parametrize("more, names", [
    (["--dial", "3"], "--dial 3"), (["--frames", "10"], "8k+1"), (["--height", "65"], "height 65"), (["--reference", "nope.png"], "nope.png"),
    (["--base", "nobody/nothing"], "nobody/nothing"),
])
def test_generate_refuses(trained, tmp_path, capsys, more, names):
    assert names in complaint(capsys, 2, *generate(trained, tmp_path / "a.mp4", *more))
    assert list(tmp_path.iterdir()) == []


def test_generate_refuses_files(trained, tmp_path, capsys):
    assert ".mp4 or .gif" in complaint(capsys, 2, *generate(trained, tmp_path / "a.webm"))
    assert "tokens" in complaint(capsys, 2, *generate(trained, tmp_path / "a.mp4")[:4], "very " * 99, "--out", tmp_path / "a.mp4")
    (tmp_path / "no.safetensors").write_bytes(b"x" * 50)
    assert "no.safetensors" in complaint(capsys, 2, *generate(tmp_path / "no.safetensors", tmp_path / "a.mp4"))


def test_adapter_of_another_base(trained, tmp_path, capsys):
    from dualreal.backbone import tiny_pipeline
    tiny_pipeline(tmp_path / "tiny")
    assert "another base" in complaint(capsys, 2, *generate(trained, tmp_path / "a.mp4", "--base", tmp_path / "tiny"))


def test_published_file(trained, tmp_path, capsys):
    assert main(["convert", str(trained), str(tmp_path / "adapter.pth")]) == 0
    assert main(generate(tmp_path / "adapter.pth", tmp_path / "a.mp4", "--base", "toy")) == 0
    assert "condition absent" in capsys.readouterr().out
    assert "--base" in complaint(capsys, 2, *generate(tmp_path / "adapter.pth", tmp_path / "b.mp4"))
    assert main(["inspect", str(tmp_path / "adapter.pth")]) == 0
    assert "published dictionary" in capsys.readouterr().out


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), RuntimeError('Error while serializing: I/O error: No space left on device (os error 28)'),
    RuntimeError("[enforce fail at inline_container.cc:665] . PytorchStreamWriter failed writing file data/3: file write failed"),
])
def test_full_disk(trained, home, tmp_path, capsys, monkeypatch, error):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "run.json").unlink()
    before = (run / "adapter.safetensors").read_bytes()

    def full(*args, **kwargs): raise error
    monkeypatch.setattr("dualreal.checkpoint.save_file", full)
    assert "the disk is full" in complaint(capsys, 1, *train(home / "case", run, "--resume", "--save-every", "2"))
    assert (run / "adapter.safetensors").read_bytes() == before
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-2"]
    assert not list(run.glob(".*"))


def test_check_json(case, capsys):
    where = ["--identity", str(case / "identity"), "--motion", str(case / "motion")]
    assert main(["check", *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    bad_image(case)
    assert main(["check", *where]) == 2
    assert "01.png" in capsys.readouterr().out


def test_images_of_any_kind(case, tmp_path):
    "Palette, grey with alpha, CMYK, a rotated jpeg, webp: all are pictures."
    images, one = case / "identity/images", Image.open(case / "identity/images/00.png")
    one.convert("P").save(images / "a.png")
    one.convert("LA").save(images / "b.png")
    one.convert("CMYK").save(images / "c.jpg")
    one.save(images / "d.webp")
    exif = Image.Exif()
    exif[0x0112] = 6
    one.save(images / "e.jpeg", exif=exif)
    assert main(train(case, tmp_path / "run", "--identity-prompt", "cat *")) == 0
