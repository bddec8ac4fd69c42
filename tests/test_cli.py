"""The commands as a user meets them: what they make, and how they fail."""
import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dualreal.backbone import load_base
from dualreal.base import base_size, find_base
from dualreal.checkpoint import load_adapter, read_adapter
from dualreal.cli import main, parser
from dualreal.generate import generate as generate_frames
from dualreal.settings import TrainConfig, WatchConfig, as_flags, from_flags
from dualreal.store import read_record
from dualreal.toy.world import HELD_OUT_SUBJECTS, plate, render, write_case
from dualreal.video import read_video, write_video

TOY = base_size(find_base("toy"))
SHAPE = TOY.frames, TOY.height, TOY.width, 3  # of its videos
BLOCKS = json.loads((find_base("toy") / "transformer/config.json").read_text())["num_layers"]
GROUPS = [n for n in range(1, BLOCKS + 1) if BLOCKS % n == 0]  # numbers of groups that it may have


@pytest.fixture(scope="module", autouse=True)
def few_denoising_steps():
    "Where a test names none: the toy's own 30 are for those who look at the videos."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualreal.base.base_size", lambda base: replace(base_size(base), steps=2))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("cli")
    write_case(home / "case", "teal_cat", "swinging", images=2, clips=2)
    return home


@pytest.fixture(scope="module")
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
    return ["train", "--identity", f"{case / 'identity'}", "--motion", f"{case / 'motion'}",
            "--out", f"{out}", "--steps", "3", "--samples", "1", *map(str, more)]


def complaint(capsys, status, *argv):
    "Run a command that must fail; its one line."
    capsys.readouterr()
    assert main([str(a) for a in argv]) == status
    err = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert len(err) == 1 and err[0].startswith("dualreal: "), err
    return err[0]


def one_frame(case): write_video(case / "motion/videos/00.mp4", np.zeros((1, *SHAPE[1:]), np.uint8))
def no_image(case): shutil.rmtree(case / "identity/images"), (case / "identity/images").mkdir()
def no_clip(case): shutil.rmtree(case / "motion/videos"), (case / "motion/videos").mkdir()
def bad_image(case): (case / "identity/images/01.png").write_bytes(b"not a picture")


def cut_clip(case):
    clip = case / "motion/videos/01.mp4"
    write_video(clip, np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8))
    clip.write_bytes(clip.read_bytes()[:clip.stat().st_size // 3])


def captions(case): (case / "identity/prompts.txt").write_text("cat *\ncat *\ncat *\n")
def no_class(case): (case / "identity/prompts.txt").write_text("*\n")
def long_prompt(case): (case / "motion/prompts.txt").write_text("a creature is " + "swinging, " * 60 + "\n")


@pytest.mark.parametrize("spoil, names", [
    (no_image, "identity"), (no_clip, "motion"), (bad_image, "01.png"), (cut_clip, "01.mp4"),
    (one_frame, "00.mp4"), (captions, "prompts.txt"), (no_class, "class word"),
    (long_prompt, f"{TOY.max_tokens}"),
])
def test_bad_case(case, tmp_path, capsys, spoil, names):
    spoil(case)
    assert names in complaint(capsys, 2, *train(case, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, names", [
    (["--groups", f"{BLOCKS - 1}"], f"{GROUPS}"), (["--base", "nobody/nothing"], "nobody/nothing"),
    (["--device", "cuda:77"], "cuda:77"), (["--motion-ratio", "2"], "motion_ratio"),
    (["--steps", "0"], "steps 0"), (["--reference-encoder", "no/where"], "no/where"),
    (["--precision", "int3"], "int3"), (["--lr", "-1"], "lr -1"),
    (["--scale", "-1"], "scale"), (["--clip", "0"], "clip 0"),
    (["--frames", "4"], "frames 4"), (["--height", "60"], "height 60"), (["--samples", "-1"], "samples"),
    (["--prompt", "very " * 99], "tokens"), (["--cache", __file__], "test_cli.py"),
])
def test_bad_setting(home, tmp_path, capsys, monkeypatch, more, names):
    "Refused before anything is encoded, and nothing is left behind."
    monkeypatch.setattr("dualreal.encode.read_item", lambda *a: pytest.fail("work was begun"))
    monkeypatch.setenv("DUALREAL_CACHE", str(tmp_path / "cache"))
    assert names in complaint(capsys, 2, *train(home / "case", tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_folder_without_weights(tmp_path, home, capsys):
    base = tmp_path / "base"
    (base / "transformer").mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    assert str(base) in complaint(capsys, 2, *train(home / "case", tmp_path / "run", "--base", base))


def test_unknown_flag_and_command(capsys, tmp_path):
    assert "--identity" in complaint(capsys, 2, "train", "--nonsense")
    assert "dualreal train --help" in complaint(capsys, 2, "train", "--steps", "abc")
    misspelt = complaint(capsys, 2, *train(tmp_path, tmp_path), "--stepps", "9")
    for words in ("--stepps", "did you mean --steps?", "dualreal train --help"): assert words in misspelt
    assert "fly" in complaint(capsys, 2, "fly")
    assert main(["--help"]) == 0


def test_no_command(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert "generate" in err and out == ""


def shell(*argv):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, encoding="utf-8")


ANSWERS = """
import sys
import dualreal.cli
print({m for m in sys.modules if m.startswith("dualreal.")})
commands = ("demo check train generate compose evaluate conflict bench inspect convert card push "
            "studio").split()
for argv in (["--help"], *([c, "--help"] for c in commands)): assert dualreal.cli.main(argv) == 0
wrong = ["--nonsense"], ["train", "--steps", "x"], ["train", "--fit", "x"], ["fly"], ["bench", "x"]
for argv in (*wrong, *([c, "--nonsense"] for c in commands), []): assert dualreal.cli.main(argv) == 2
print({m.split(".")[0] for m in sys.modules} & set(
    "torch transformers diffusers matplotlib pandas numpy peft accelerate ipywidgets".split()))
"""


def test_help_and_refusals_need_no_torch():
    "Importing the commands imports the settings and the core; nothing heavy comes before there is work."
    done = shell("-c", ANSWERS)
    first, *_, last = done.stdout.splitlines()
    assert done.returncode == 0 and last == "set()", done.stderr
    assert eval(first) == {"dualreal.core", "dualreal.settings", "dualreal.cli"}
    assert shell("-m", "dualreal.cli", "--version").stdout.startswith("dualreal ")


@pytest.mark.parametrize("more", [
    {}, dict(lr=1e-7, scale=-0.5, prompts=["a *", "-x"], gradient_mask=False, resume=True, seed=0),
    dict(gradient_checkpointing=False, memory="12", identity_prompt="a \"b\"", fit="pad", controller=False)])
def test_flags_there_and_back(more):
    "The command line of a configuration is read as that configuration."
    config, watch = TrainConfig("my cat", "wave", "-run", **more), WatchConfig(log="steps.jsonl")
    found = parser().parse_args(["train", *as_flags(config), *as_flags(watch)])
    assert (from_flags(TrainConfig, found), from_flags(WatchConfig, found)) == (config, watch)


def test_one_line_in_a_log(case, tmp_path):
    "Not a single bar or notice beside the complaint, where stderr is a file."
    bad_image(case)
    done = shell("-m", "dualreal.cli", *train(case, tmp_path / "run"))
    assert done.returncode == 2 and "%|" not in done.stdout
    assert len(done.stderr.splitlines()) == 1 and "01.png" in done.stderr


def test_no_place_to_write(home, trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "is a file" in complaint(capsys, 2, *train(home / "case", tmp_path / "file/run"))
    assert "is a file" in complaint(capsys, 2, *generate(trained, tmp_path / "file/a.mp4"))
    (tmp_path / "b.mp4").mkdir()
    assert "b.mp4" in complaint(capsys, 2, *generate(trained, tmp_path / "b.mp4"))
    assert "is a file" in complaint(capsys, 2, "demo", "--out", str(tmp_path / "file/demo"))


def test_no_permission(home, tmp_path, capsys, monkeypatch):
    def refused(*args): raise PermissionError(errno.EACCES, "Permission denied", "/their/dogs")
    monkeypatch.setattr("dualreal.trainer.load_case", refused)
    assert "/their/dogs: permission denied" in complaint(capsys, 2, *train(home / "case", tmp_path / "run"))


def test_demo_of_another_subject(tmp_path, capsys):
    (tmp_path / "demo.json").write_text(json.dumps({"subject": "mint_cat"}))
    assert "mint_cat" in complaint(capsys, 2, "demo", "--out", str(tmp_path))
    assert "teal_dragon" in complaint(capsys, 2, "demo", "--out", str(tmp_path), "--subject", "teal_dragon")
    assert "--steps 0" in complaint(capsys, 2, "demo", "--out", str(tmp_path), "--steps", "0")


def table_of(said):
    "The numbers that the demo prints: name, then a column for each kind of video."
    lines = [line.split() for line in said.splitlines()]
    start = lines.index(["base", "DualReal", "reference"])
    return lines[start + 1:start + 6]


def test_demo_measures_its_videos(tmp_path, capsys, monkeypatch):
    "An empty stage has nothing of the subject, the drawn truth nearly all; DualReal's column is a mean."
    truth = render(HELD_OUT_SUBJECTS["mint_cat"], "swinging", seed=1)[0]
    empty = np.repeat(plate("grass")[None], 9, 0).astype(np.uint8)

    def quick(config):
        "A run whose videos are known."
        run = tmp_path / "run"
        for i, frames in enumerate((truth, empty)): write_video(run / f"samples/{i}.mp4", frames, 8)
        (run / "run.json").write_text(json.dumps({"words": dict(prompts=["cat"], subject="a", motion="b")}))
        return run / "adapter.safetensors"
    monkeypatch.setattr("dualreal.trainer.train", quick)
    monkeypatch.setattr("dualreal.generate.generate", lambda *args, **how: SimpleNamespace(frames=empty))
    how = ["--subject", "mint_cat", "--motion", "swinging", "--seed", "1"]
    assert main(["demo", "--out", str(tmp_path), *how]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [r["file"] for r in scores["DualReal"]] == ["run/samples/0.mp4", "run/samples/1.mp4"]
    rows = table_of(capsys.readouterr().out)
    assert [r[0] for r in rows] == ["palette", "pattern", "kind", "identity", "motion"]
    for name, base, ours, reference in rows:
        assert float(base) == 0 and float(reference) > .6
        assert abs(float(ours) - float(reference) / 2) < .011, name


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--steps", "1"]) == 0
    rows = table_of(capsys.readouterr().out)
    scores = json.loads((out / "scores.json").read_text())
    for name, *said in rows:
        means = [np.mean([r[name] for r in scores[k]]) for k in ("base", "DualReal", "reference")]
        assert said == [f"{mean:.2f}" for mean in means]
    assert [len(rows) for rows in scores.values()] == [4, 1, 1] # sorted by name: DualReal, base, reference
    assert scores["reference"][0]["identity"] > .7 and (out / "demo.png").is_file()


def test_run_has_everything(trained):
    assert [p.name for p in trained.glob("*.safetensors")] == ["adapter.safetensors"]
    assert {p.name for p in trained.iterdir()} >= {"run.json", "loss.png", "contact_sheet.png", "samples"}
    run = json.loads((trained / "run.json").read_text())
    assert [row["step"] for row in run["log"]] == [1, 2, 3]
    assert run["seconds"]["train"] > 0 and run["peak_memory_bytes"] > 0
    assert run["environment"]["packages"]["torch"]
    assert len(read_video(trained / "samples/00.mp4")[0]) == 9


def test_output_in_use_and_resume(trained, home, capsys):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    assert str(trained) in complaint(capsys, 2, *train(home / "case", trained))
    assert main(train(home / "case", trained, "--resume")) == 0
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


def test_resume_without_checkpoint_starts_afresh(home, tmp_path, capsys):
    "A run that saved nothing may do so with other settings, too."
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"seed": 42}))
    assert "holds a run" in complaint(capsys, 2, *train(home / "case", run))
    assert main(train(home / "case", run, "--resume", "--seed", "1", "--samples", "0")) == 0
    assert (run / "run.json").exists()


def test_damaged_checkpoint_is_passed_over(home, trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "run.json").unlink()
    (run / "checkpoints/step-3/state.pt").write_bytes(b"half")
    assert main(train(home / "case", run, "--resume", "--save-every", "2", "--samples", "0")) == 0
    assert "step-3: state.pt is damaged" in capsys.readouterr().err
    log = [[r["loss"] for r in json.loads((d / "run.json").read_text())["log"]] for d in (run, trained)]
    assert log[0] == log[1]


def test_interrupted_and_continued(home, trained, case, tmp_path, capsys, monkeypatch):
    import dualreal.loop
    step, run = dualreal.loop.train_step, tmp_path / "run"

    def interrupted(state):
        if state.step == 2: raise KeyboardInterrupt
        return step(state)
    monkeypatch.setattr("dualreal.loop.train_step", interrupted)
    assert "interrupted" in complaint(capsys, 130, *train(case, run, "--save-every", "2"))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-2"]
    monkeypatch.undo()
    monkeypatch.setenv("DUALREAL_CACHE", str(home / "cache"))
    assert "seed=42" in complaint(capsys, 2, *train(case, run, "--resume", "--seed", "1"))
    captions, extra = case / "identity/prompts.txt", case / "identity/images/02.png"
    before = captions.read_text()
    shutil.copy(case / "identity/images/00.png", extra)
    captions.write_text("cat *\n")
    assert "other images" in complaint(capsys, 2, *train(case, run, "--resume", "--save-every", "2"))
    extra.unlink()
    captions.write_text(before)
    assert main(train(case, run, "--resume", "--micro-batch", "2", "--samples", "0")) == 0  # same steps
    logs = [json.loads((d / "run.json").read_text())["log"] for d in (run, trained)]
    assert np.allclose(*[[row["loss"] for row in log] for log in logs], rtol=1e-3)


def test_size_of_training_is_the_size_of_videos(home, tmp_path):
    "Also frames that the VAE cannot return: 13 are trained on, 9 are made."
    run = tmp_path / "run"
    assert main(train(home / "case", run, "--frames", "13")) == 0
    assert read_video(run / "samples/00.mp4")[0].shape == SHAPE
    assert main(generate(run, tmp_path / "new/folder/ä 猫.gif")) == 0
    assert read_video(tmp_path / "new/folder/ä 猫.gif")[0].shape == SHAPE


def test_padded_slower_scored(home, tmp_path):
    "A run that takes every second frame; its previews are measured by the toy networks."
    run = tmp_path / "run"
    more = ["--fit", "pad", "--fps", "4", "--preview-every", "2", "--score-previews", "--samples", "0"]
    assert main(train(home / "case", run, *more)) == 0
    rows = json.loads((run / "previews/scores.json").read_text())
    assert [row["step"] for row in rows] == [2, 3] and all(0 <= row["motion"] <= 1 for row in rows)


@pytest.mark.parametrize("more", [
    ["--no-mask", "--no-controller"], ["--motion-ratio", "0", "--reference-encoder", "none"],
    ["--motion-ratio", "1", "--groups", f"{BLOCKS}", "--precision", "bfloat16", "--gradient-checkpointing"],
])
def test_variants(home, tmp_path, more):
    run = tmp_path / "run"
    assert main(train(home / "case", run, "--samples", "0", *more)) == 0
    assert main(generate(run, tmp_path / "a.gif", "--frames", "1")) == 0


def test_clips_of_any_kind(case, tmp_path):
    "gif, webm, a folder of frames, an upright mp4: of different lengths, in one batch."
    motion, random = tmp_path / "clips", np.random.default_rng(0)
    def noise(*shape): return random.integers(0, 255, (*shape, 3), np.uint8)
    write_video(motion / "a.gif", noise(6, 40, 60))
    write_video(motion / "b.mp4", noise(13, 90, 50))
    with av.open(str(motion / "c.webm"), "w") as file:
        stream = file.add_stream("libvpx", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in noise(9, 64, 64): file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    (motion / "d").mkdir()
    for i, frame in enumerate(noise(5, 30, 30)): Image.fromarray(frame).save(motion / f"d/{i}.jpg")
    command = train(case, tmp_path / "run", "--motion-prompt", "a thing is moving", "--motion-ratio", "1",
                    "--batch-motion", "4", "--micro-batch", "4", "--samples", "0")
    command[command.index("--motion") + 1] = f"{motion}/"
    assert main(command) == 0


def test_one_image_and_one_clip(case, tmp_path):
    (case / "identity/images/01.png").unlink()
    (case / "motion/videos/01.mp4").unlink()
    captions = ["--identity-prompt", "cat *", "--motion-prompt", "a creature is swinging"]
    assert main(train(case, tmp_path / "run", "--samples", "0", *captions)) == 0


def generate(trained, out, *more):
    return ["generate", "--adapter", f"{trained}", "--prompt", "a cat * is swinging", "--out", f"{out}",
            "--steps", "2", *map(str, more)]


def frames_of(run, out, *more):
    assert main(generate(run, out, *more)) == 0
    return read_video(out)[0].astype(int)


def drawn(adapter, reference):
    pipe = load_base("toy")
    load_adapter(pipe.transformer, adapter)
    return generate_frames(pipe, "a robot * is hopping", reference=reference, steps=2).frames.astype(int)


def test_generate_for_small_cards(trained, tmp_path):
    "Offloaded blocks and a reference built in make the same video; what is approximate says so."
    exact = frames_of(trained, tmp_path / "exact.mp4")
    assert np.array_equal(frames_of(trained, tmp_path / "offloaded.mp4", "--offload"), exact)
    assert main(["convert", str(trained), str(tmp_path / "folded.pth"), "--fold"]) == 0
    frames_of(tmp_path / "folded.pth", tmp_path / "folded.mp4", "--base", "toy")
    off = drawn(tmp_path / "folded.pth", None) - drawn(trained, read_adapter(trained).reference)
    assert np.abs(off).mean() < .01 # of 255; before the codec, which blows up a rounding
    frames_of(trained, tmp_path / "fast.mp4", "--approximate", "first-block")
    assert json.loads((tmp_path / "fast.mp4.json").read_text())["approximate_cache"] == "first-block"


def test_folding_needs_what_it_builds_in(trained, home, tmp_path, capsys):
    bare, again = tmp_path / "bare.pth", tmp_path / "b.safetensors"
    own = "--reference", str(home / "case/identity/images/00.png"), "--base", "toy"
    def fold(source, *more): return complaint(capsys, 2, "convert", source, again, *more)
    assert "--reference is for --fold" in fold(trained, *own)
    assert main(["convert", str(trained), str(bare)]) == 0
    assert "stores no reference; give --reference" in fold(bare, "--fold")
    assert main(["convert", str(bare), str(again), "--fold", *own]) == 0
    assert "is there already" in fold(trained) and "is the source" in fold(again, "--overwrite")
    assert "no condition to fold" in complaint(capsys, 2, "convert", again, tmp_path / "c.pth", "--fold")
    assert "reference is built in" in complaint(capsys, 2, *generate(again, tmp_path / "a.mp4", *own))
    assert main(["convert", str(again), str(bare), "--overwrite"]) == 0
    assert "no condition to use it" in complaint(capsys, 2, *generate(bare, tmp_path / "a.mp4", *own))
    wrong = generate(trained, tmp_path / "a.mp4", "--approximate", "x")
    assert "'first-block' or 'attention'" in complaint(capsys, 2, *wrong)


def test_generate_keeps_what_is_there(trained, tmp_path, capsys):
    out = tmp_path / "video.mp4"
    out.write_text("mine")
    assert "--overwrite" in complaint(capsys, 2, *generate(trained, out)) and out.read_text() == "mine"
    frames_of(trained, out, "--overwrite")


def test_prompts_that_ask_for_nothing(trained, tmp_path, capsys):
    "An empty one is refused; without the subject's word there is a note."
    nothing = generate(trained, tmp_path / "a.mp4", "--prompt", "  ")
    assert "--prompt is empty" in complaint(capsys, 2, *nothing)
    frames_of(trained, tmp_path / "b.mp4", "--prompt", "a cat is swinging")
    said = """note: no "*" in 'a cat is swinging': the adapter knows its subject as "cat *\""""
    assert said in capsys.readouterr().out
    frames_of(trained, tmp_path / "c.mp4")
    assert "note" not in capsys.readouterr().out


def test_generate_many(trained, tmp_path, capsys):
    "Prompts in turn, seeds counting up; each video is the one that its own command makes."
    frames_of(trained, tmp_path / "one", "--videos", "2", "--seed", "7")
    for i in (0, 1):
        frames_of(trained, tmp_path / f"alone{i}.mp4", "--seed", 7 + i)
        both = [read_video(f)[0] for f in (tmp_path / f"one/0{i}.mp4", tmp_path / f"alone{i}.mp4")]
        assert np.array_equal(*both)
    named = "near\ta cat * is swinging\nfar.mp4\ta cat * is swinging in the snow\n"
    (tmp_path / "asked.txt").write_text(named)
    words = ["generate", "--adapter", str(trained), "--prompts", str(tmp_path / "asked.txt"), "--steps", "2"]
    assert main([*words, "--out", str(tmp_path / "named")]) == 0
    assert sorted(p.name for p in (tmp_path / "named").glob("*.mp4")) == ["far.mp4", "near.mp4"]
    assert read_record(tmp_path / "named/far.mp4")["prompt"] == "a cat * is swinging in the snow"
    assert main([*words, "--videos", "3", "--out", str(tmp_path / "three")]) == 0
    told = [read_record(tmp_path / f"three/0{i}.mp4") for i in range(3)]
    assert [t["seed"] for t in told] == [42, 43, 44]
    assert told[0]["prompt"] == told[2]["prompt"] != told[1]["prompt"]
    assert "is there already" in complaint(capsys, 2, *words, "--out", str(tmp_path / "named"))
    assert "leave .mp4 off" in complaint(capsys, 2, *words, "--out", str(tmp_path / "x.mp4"))
    assert "give --prompt" in complaint(capsys, 2, *words, "--prompt", "a", "--out", str(tmp_path / "x"))


def test_generate_otherwise(trained, tmp_path, capsys):
    "A negative prompt and a LoRA change the video, are recorded, and weight 0 changes nothing."
    plain = frames_of(trained, tmp_path / "plain.mp4")
    assert not np.array_equal(frames_of(trained, tmp_path / "no.mp4", "--negative-prompt", "grass"), plain)
    assert read_record(tmp_path / "no.mp4")["negative_prompt"] == "grass"
    transformer = load_base("toy").transformer
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    transformer.add_adapter(config, "style")
    state = get_peft_model_state_dict(transformer, adapter_name="style")
    CogVideoXPipeline.save_lora_weights(tmp_path / "style", state)
    lora = tmp_path / "style/pytorch_lora_weights.safetensors"
    for i, path in enumerate((lora, lora.parent)):
        assert not np.array_equal(frames_of(trained, tmp_path / f"with{i}.mp4", "--lora", path), plain)
    assert read_record(tmp_path / "with0.mp4")["lora"] == [str(lora)]
    assert np.array_equal(frames_of(trained, tmp_path / "off.mp4", "--lora", f"{lora}:0"), plain)
    wrong = trained / "adapter.safetensors"
    for path, says in (("no.safetensors:.5", "does not exist"), (wrong, "is no LoRA for this base")):
        assert says in complaint(capsys, 2, *generate(trained, tmp_path / "x.mp4", "--lora", path))


def test_train_warns_of_captions(home, tmp_path, capsys):
    case = shutil.copytree(home / "case", tmp_path / "case")
    (case / "identity/images/receipt.pdf").touch()
    assert main(train(case, tmp_path / "run", "--samples", "0", "--identity-prompt", "cat")) == 0
    out = capsys.readouterr().out
    assert "note: " in out and "not used: receipt.pdf." in out
    assert 'warning: Identity caption \'cat\' has no "*"' in out and "2 images, 2 clips" in out


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_generate(trained, tmp_path, suffix):
    out = tmp_path / f"video{suffix}"
    assert main(generate(trained, out)) == 0
    assert read_video(out)[0].shape == SHAPE
    record = json.loads((tmp_path / f"video{suffix}.json").read_text())
    assert np.shape(record["identity_weight"]) == (2, TOY.groups) and record["seed"] == 42


def test_generate_with_reference_and_dial(trained, home, tmp_path):
    picture = next((home / "case/identity/images").glob("*.png"))
    assert main(generate(trained, tmp_path / "a.mp4", "--reference", picture, "--dial", "1")) == 0
    with safe_open(trained / "adapter.safetensors", "pt") as file:
        total = json.loads(file.metadata()["dualreal"])["config"]["scale"]
    assert np.allclose(json.loads((tmp_path / "a.mp4.json").read_text())["identity_weight"], total, atol=0.01)


def test_reference_is_seen_as_in_training(trained, home, tmp_path, monkeypatch):
    "An adapter trained with the published normalisation gets its new reference that way too."
    with safe_open(trained / "adapter.safetensors", "pt") as file:
        tensors, info = {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["dualreal"])
    info["training"]["reference_norm"] = "published"
    save_file(tensors, tmp_path / "a.safetensors", {"dualreal": json.dumps(info)})
    seen = []
    monkeypatch.setattr("dualreal.backbone.ReferenceEncoder.encode",
                        lambda self, images, norm="clip": seen.append(norm) or tensors["reference_embedding"])
    more = ["--frames", "1", "--reference", next((home / "case/identity/images").glob("*.png"))]
    assert main(generate(tmp_path / "a.safetensors", tmp_path / "a.gif", *more)) == 0
    assert seen == ["published"]


def test_reference_is_the_whole_picture(case, tmp_path):
    "The stored embedding is what --reference would give for the first picture, whatever its shape."
    from dualreal.backbone import load_reference_encoder
    portrait = np.random.default_rng(0).integers(0, 255, (90, 50, 3), np.uint8)
    Image.fromarray(portrait).save(case / "identity/images/00.png")
    assert main(train(case, tmp_path / "run", "--samples", 0)) == 0
    stored = read_adapter(tmp_path / "run").reference
    anew = load_reference_encoder(base="toy").encode([portrait])
    torch.testing.assert_close(stored, anew, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more, names", [
    (["--dial", "3"], "--dial 3"), (["--frames", "10"], "8k+1"), (["--height", "65"], "height 65"),
    (["--reference", "nope.png"], "nope.png"), (["--base", "nobody/nothing"], "nobody/nothing"),
])
def test_generate_refuses(trained, tmp_path, capsys, more, names):
    assert names in complaint(capsys, 2, *generate(trained, tmp_path / "a.mp4", *more))
    assert list(tmp_path.iterdir()) == []


def test_generate_refuses_files(trained, tmp_path, capsys):
    assert ".mp4 or .gif" in complaint(capsys, 2, *generate(trained, tmp_path / "a.webm"))
    assert "tokens" in complaint(capsys, 2, *generate(trained, tmp_path / "a.mp4"), "--prompt", "very " * 99)
    no = tmp_path / "no.safetensors"
    no.write_bytes(b"x" * 50)
    assert "no.safetensors" in complaint(capsys, 2, *generate(no, tmp_path / "a.mp4"))


def test_adapter_of_another_base(trained, tmp_path, capsys):
    from dualreal.toy.bases import tiny_pipeline
    tiny_pipeline(tmp_path / "tiny")
    tiny = ["--base", tmp_path / "tiny"]
    assert "another base" in complaint(capsys, 2, *generate(trained, tmp_path / "a.mp4", *tiny))


def test_published_file(trained, tmp_path, capsys):
    assert main(["convert", str(trained), str(tmp_path / "adapter.pth")]) == 0
    assert "holds no reference" in capsys.readouterr().out
    assert main(generate(tmp_path / "adapter.pth", tmp_path / "a.mp4", "--base", "toy")) == 0
    assert "condition absent" in capsys.readouterr().out
    assert "--base" in complaint(capsys, 2, *generate(tmp_path / "adapter.pth", tmp_path / "b.mp4"))
    assert main(["inspect", str(tmp_path / "adapter.pth")]) == 0
    assert "published dictionary" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "adapter.pth"), str(tmp_path / "back.safetensors")]) == 0
    assert main(["inspect", str(tmp_path / "back.safetensors")]) == 0
    first, second = map(read_adapter, (trained, tmp_path / "back.safetensors"))
    ours, info, back, told = first.tensors, first.info, second.tensors, second.info
    assert ours.keys() == back.keys() and told["config"]["scale"] == info["config"]["scale"]
    assert ".safetensors or .pth" in complaint(capsys, 2, "convert", trained, tmp_path / "adapter.bin")


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598"), # torch.save
])
def test_full_disk(trained, home, tmp_path, capsys, monkeypatch, error):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "run.json").unlink()
    before = (run / "adapter.safetensors").read_bytes()

    def full(*args, **kwargs):
        monkeypatch.setattr("dualreal.core.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        raise error
    monkeypatch.setattr("dualreal.checkpoint.save_file", full)
    command = train(home / "case", run, "--resume", "--save-every", "2")
    said = complaint(capsys, 1, *command)
    assert "adapter.safetensors: the disk is full" in said and "--resume" in said
    assert (run / "adapter.safetensors").read_bytes() == before
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-2", "step-3"]
    assert not list(run.glob(".*"))


def test_check_json(case, capsys):
    where = ["--identity", str(case / "identity"), "--motion", str(case / "motion")]
    assert main(["check", *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    bad_image(case)
    assert main(["check", *where, "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"] is False and "01.png" in err


@pytest.mark.parametrize("more,says", [
    (("--frames", "3"), "frames 3: give at least 5"), (("--frames", "0"), "frames 0: give at least"),
    (("--height", "65"), "height 65: this base needs a multiple of"),
    (("--height", "128", "--width", "128"), f"this base draws {TOY.height}x{TOY.width} only")])
def test_check_refuses_what_train_refuses(case, tmp_path, capsys, more, says):
    where = ["--identity", case / "identity", "--motion", case / "motion"]
    assert says in complaint(capsys, 2, "check", *where, *more)
    assert says in complaint(capsys, 2, *train(case, tmp_path / "run", *more))


def test_log_in_a_new_folder_and_one_that_cannot_be(case, tmp_path, capsys):
    log = tmp_path / "new/steps.jsonl"
    assert main(train(case, tmp_path / "run", "--samples", "0", "--log", log)) == 0
    assert len(log.read_text().splitlines()) == 3
    inside = complaint(capsys, 2, *train(case, tmp_path / "more", "--log", log / "x"))
    assert "is a file, not a folder" in inside and not (tmp_path / "more").exists()


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
    assert main(train(case, tmp_path / "run", "--identity-prompt", "cat *", "--samples", "0")) == 0


def test_names_the_file(trained, case, tmp_path, capsys):
    "What is wrong with a file is said with its name."
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    assert foreign.name in complaint(capsys, 2, "inspect", foreign)
    assert foreign.name in complaint(capsys, 2, "convert", foreign, tmp_path / "a.pth")
    (tmp_path / "a.pth").mkdir()
    assert "a.pth: is a folder" in complaint(capsys, 2, "convert", trained, tmp_path / "a.pth")
    (case / "motion/videos.txt").write_text("/no/such/clip.mp4\n")
    assert "/no/such/clip.mp4" in complaint(capsys, 2, *train(case, tmp_path / "run"))
    (case / "motion/videos.txt").unlink()
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model_index.json").write_text("{half")
    said = complaint(capsys, 2, *train(case, tmp_path / "run", "--base", tmp_path / "base"))
    assert "model_index.json: not a pipeline's index" in said


def test_out_is_a_folder(case, tmp_path, capsys):
    assert "leave .safetensors off" in complaint(capsys, 2, *train(case, tmp_path / "cat.safetensors"))


def test_other_pictures_are_another_run(trained, case, tmp_path, capsys):
    "The captions may be the same: what is in the pictures counts."
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "run.json").unlink()
    Image.new("RGB", (TOY.width, TOY.height), "teal").save(case / "identity/images/01.png")
    assert "other images" in complaint(capsys, 2, *train(case, run, "--resume", "--save-every", 2))


def test_left_behind_by_a_kill(trained, home, tmp_path):
    "A temporary file of a killed run is no adapter, and goes."
    run = tmp_path / "run"
    (run).mkdir()
    (run / ".adapter-abc.safetensors").write_bytes(b"half")
    assert main(train(home / "case", run, "--resume")) == 0
    assert [p.name for p in run.glob("*.safetensors")] == ["adapter.safetensors"]
