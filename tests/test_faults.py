"""What people and machines do wrong: one sentence and status 2, or a clear error and nothing lost."""
import errno
import json
import math
import multiprocessing
import os
import pickle
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given
from hypothesis import settings as trials
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dualreal import data
from dualreal.backbone import load_base
from dualreal.checkpoint import save_adapter
from dualreal.cli import main
from dualreal.core import InputError
from dualreal.encode import encode_all
from dualreal.settings import BaseSize, TrainConfig, completed
from dualreal.store import Store, own, step_folders
from dualreal.toy.bases import tiny_pipeline
from dualreal.trainer import joint_prompt
from dualreal.tuner import DualRealConfig
from dualreal.video import write_video

def noise(*shape, seed=0): return np.random.default_rng(seed).integers(0, 255, (*shape, 3), np.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A tiny base, a good case, an adapter."
    home = tmp_path_factory.mktemp("faults")
    base = tiny_pipeline(home / "tiny", layers=2)
    (home / "one").mkdir()
    for i in range(3): Image.fromarray(noise(32, 32, seed=i)).save(home / f"one/{i}.png")
    for i in range(3): write_video(home / f"wave/{i}.mp4", noise(9, 32, 32, seed=i))
    (home / "one/prompts.txt").write_text("cat *\n")
    (home / "wave/prompts.txt").write_text("it is up\n")
    transformer = load_base(base).transformer
    transformer.add_adapter(DualRealConfig(rank=2, groups=2, condition_dim=None))
    save_adapter(transformer, home / "adapter.safetensors", metadata=dict(base=f"{base}"))
    return home


@pytest.fixture
def case(home, tmp_path):
    for name in ("one", "wave"): shutil.copytree(home / name, tmp_path / name)
    return tmp_path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DUALREAL_CACHE", f"{tmp_path_factory.getbasetemp()}/cache")


def complaint(capsys, *argv):
    "The one line with which a command refuses its input."
    capsys.readouterr()
    status = main([str(a) for a in argv])
    err = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert (status, len(err)) == (2, 1) and err[0].startswith("dualreal: "), (status, err)
    return err[0]


def case_of(folder, base): return ["--identity", folder / "one", "--motion", folder / "wave", "--base", base]


# Images, clips, captions, folders: `check` and `train` refuse them alike

def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")


def half(path): path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def bomb(path):
    "A picture that says it has four thousand million pixels."
    import struct
    import zlib
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 65535, 65535, 8, 2, 0, 0, 0))
    put(path, b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def only_sound(path):
    import wave
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000), file.writeframes(bytes(16000))


def frames_of(path, sizes):
    path.mkdir()
    for i, size in enumerate(sizes): Image.fromarray(noise(*size)).save(path / f"{i}.png")


CASES = {
    "image: empty file": (lambda c: put(c / "one/1.png", b""), "1.png"),
    "image: text": (lambda c: put(c / "one/1.png", "hello"), "1.png"),
    "image: cut off": (lambda c: half(c / "one/1.png"), "1.png"),
    "image: a web page": (lambda c: put(c / "one/1.jpg", "<html>not found</html>"), "1.jpg"),
    "image: a bomb": (lambda c: bomb(c / "one/1.png"), "1.png"),
    "image: a folder of that name": (lambda c: (c / "one/4.png").mkdir(), "4.png"),
    "image: link to nowhere": (lambda c: (c / "one/4.png").symlink_to("nowhere.png"), "4.png"),
    "images: none": (lambda c: [p.unlink() for p in (c / "one").glob("*.png")], "one holds no image"),
    "images: folder missing": (lambda c: shutil.rmtree(c / "one"), "one does not exist"),
    "images: a file for a folder":
        (lambda c: (shutil.rmtree(c / "one"), put(c / "one", "x")), "one is a file"),
    "clip: empty file": (lambda c: put(c / "wave/1.mp4", b""), "1.mp4"),
    "clip: text": (lambda c: put(c / "wave/1.mp4", "hello"), "1.mp4"),
    "clip: cut off": (lambda c: half(c / "wave/1.mp4"), "1.mp4"),
    "clip: only sound": (lambda c: only_sound(c / "wave/1.mp4"), "1.mp4"),
    "clip: one frame": (lambda c: write_video(c / "wave/1.mp4", noise(1, 32, 32)), "1.mp4 has 1 frame"),
    "clip: four frames": (lambda c: write_video(c / "wave/1.mp4", noise(4, 32, 32)), "1.mp4 has 4 frames"),
    "clip: a damaged gif": (lambda c: put(c / "wave/1.gif", b"GIF89a" + bytes(30)), "1.gif"),
    "clip: frames of two sizes": (lambda c: frames_of(c / "wave/v", [(9, 9)] * 4 + [(9, 8)]), "one size"),
    "clip: a damaged frame":
        (lambda c: (frames_of(c / "wave/v", [(9, 9)] * 6), put(c / "wave/v/2.png", "x")), "2.png"),
    "clips: none": (lambda c: [p.unlink() for p in (c / "wave").glob("*.mp4")], "wave holds no clip"),
    "clips: list leads nowhere": (lambda c: put(c / "wave/videos.txt", "9.mp4\n"), "9.mp4 does not exist"),
    "clips: list leads out": (lambda c: put(c / "wave/videos.txt", "../one/0.png\n"), "leads out of"),
    "clips: list names a secret": (lambda c: put(c / "wave/videos.txt", "/etc/passwd\n"), "leads out of"),
    "clips: list is empty": (lambda c: put(c / "wave/videos.txt", "\n"), "videos.txt is empty"),
    "clips: list of text files": (lambda c: put(c / "wave/videos.txt", "prompts.txt\n"), "not a video"),
    "clips: list is binary": (lambda c: put(c / "wave/videos.txt", b"\xff\xfe\x00\xd8"), "not UTF-8"),
    "clips: list with a nul": (lambda c: put(c / "wave/videos.txt", "a\0b.mp4\n"), "videos.txt"),
    "captions: none": (lambda c: (c / "one/prompts.txt").unlink(), "no identity caption"),
    "captions: empty": (lambda c: put(c / "one/prompts.txt", ""), "0 captions"),
    "captions: too few": (lambda c: put(c / "one/prompts.txt", "cat *\ncat *\n"), "2 captions for 3 files"),
    "captions: too many": (lambda c: put(c / "wave/prompts.txt", "it is\n" * 4), "4 captions for 3 files"),
    "captions: a stranger's": (lambda c: put(c / "one/prompts.txt", "9.png\tcat *\n"), "not among the files"),
    "captions: twice": (lambda c: put(c / "one/prompts.txt", "0\tcat *\n0\tdog *\n"), "two captions"),
    "captions: one lacks":
        (lambda c: put(c / "one/prompts.txt", "0\tcat *\n1\tcat *\n"), "no caption for 2.png"),
    "captions: latin-1": (lambda c: put(c / "one/prompts.txt", "Hündin *".encode("latin-1")), "not UTF-8"),
    "captions: only a star": (lambda c: put(c / "one/prompts.txt", "*\n"), "no class word"),
    "captions: too long": (lambda c: put(c / "wave/prompts.txt", "it is " + "up " * 60), "tokens"),
    "captions: a folder":
        (lambda c: ((c / "one/prompts.txt").unlink(), (c / "one/prompts.txt").mkdir()), "no identity"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_case(home, case, capsys, name):
    spoil, says = CASES[name]
    spoil(case)
    assert says in complaint(capsys, "check", *case_of(case, home / "tiny"))


SETTINGS = {
    "steps 0": "steps 0",
    "steps -3": "steps -3",
    "rank 0": "rank 0",
    "groups 3": "groups",
    "frames 4": "frames 4",
    "height 30": "height 30",
    "width 0": "width 0",
    "lr nan": "lr nan",
    "lr 0": "lr 0",
    "clip inf": "clip inf",
    "weight-decay -1": "weight_decay", "motion-ratio 1.5": "motion_ratio", "motion-ratio nan": "motion_ratio",
    "scale -1": "scale",
    "scale nan": "scale",
    "batch-motion 0": "batch_motion",
    "micro-batch 0": "micro_batch",
    "save-every -1": "save_every",
    "keep 0": "keep 0", "preview-every -1": "preview_every", "samples -1": "samples", "device tpu": "tpu",
    "precision int8": "int8", "trackers mlflow": "mlflow", "reference-encoder no/where": "no/where",
    "base no/where": "no/where", "steps x": "--steps", "seed 1.5": "--seed", "warmup -1": "warmup",
    "reference-norm none": "reference",
    "fps 0": "fps 0", "fps nan": "fps nan", "fit squeeze": "'crop' or 'pad'",
    "memory much": "memory", "memory -3": "memory", "score-previews all": "--score-previews",
    "score-previews toy": "--preview-every",
}


@pytest.mark.parametrize("flag", SETTINGS)
def test_bad_setting(home, tmp_path, capsys, flag):
    name, value = flag.split()
    words = ["train", *case_of(home, home / "tiny"), "--out", tmp_path / "run", "--prompt", "cat",
             "--steps", 1, "--reference-encoder", "none", f"--{name}", value]
    assert SETTINGS[flag] in complaint(capsys, *words)
    assert not (tmp_path / "run").exists()


# Adapter files from strangers

class Evil:
    def __reduce__(self): return os.system, ("echo this ran > evil-ran",)


def metadata(**changes):
    "Change the metadata of an adapter file."
    def spoil(path):
        with safe_open(path, "pt") as f:
            tensors, info = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["dualreal"])
        save_file(tensors, path, {"dualreal": json.dumps({**info, **changes})})
    return spoil


def raw(text): return lambda path: save_file({"x": torch.ones(1)}, path, {"dualreal": text})
def pickled(obj): return lambda path: (path.unlink(), torch.save(obj, path.with_suffix(".pth")))


ADAPTERS = {
    "empty": lambda p: put(p, b""),
    "cut off": half,
    "text": lambda p: put(p,
    "hello" * 40),
    "gone": lambda p: p.unlink(),
    "a huge header": lambda p: put(p, b"\xff" * 7 + b"\x7f{}"),
    "a foreign file": lambda p: save_file({"lora": torch.ones(2)}, p),
    "metadata: no JSON": raw("{"),
    "metadata: a list": raw("[1]"),
    "metadata: a number": raw("3"),
    "metadata: deep": raw("[" * 90000),
    "base: a list": metadata(base=["toy"]),
    "base: nowhere": metadata(base="no/where"),
    "base: a URL": metadata(base="https://x.y/z"),
    "config: a list": metadata(config=[1]), "config: unknown": metadata(config=dict(rank=2, run="rm")),
    "config: text": metadata(config=dict(rank="two")), "config: huge": metadata(config=dict(rank=10**9)),
    "generation: a list": metadata(generation=[1]), "generation: unknown": metadata(generation=dict(run=1)),
    "generation: text": metadata(generation=dict(height="tall")),
    "generation: zero": metadata(generation=dict(frames=0)),
    "training: text": metadata(training="long"), "another base": metadata(transformer=dict(blocks=9)),
    "a pickle that runs code": pickled({"x": Evil()}), "a pickled module": pickled(torch.nn.Linear(1, 1)),
    "a pickled list": pickled([1, 2]),
    "a plain pickle": lambda p: (p.unlink(), put(p.with_suffix(".pth"), pickle.dumps(Evil()))),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ADAPTERS)
def test_bad_adapter(home, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a/adapter.safetensors"
    path.parent.mkdir()
    shutil.copy(home / "adapter.safetensors", path)
    ADAPTERS[name](path)
    words = ["generate", "--adapter", path.parent, "--prompt", "cat", "--out", tmp_path / "x.gif"]
    said = complaint(capsys, *words)
    assert any(culprit in said for culprit in (str(tmp_path / "a"), "no/where", "https", "0 frames")), said
    assert not (tmp_path / "evil-ran").exists() and not (tmp_path / "x.gif").exists()


def test_check_fetches_no_weights(home, case, monkeypatch, capsys):
    "Of a base on the Hub: configurations and the tokenizer."
    asked = {}
    def fetched(name, allow_patterns): return asked.update({name: allow_patterns}) or str(home / "tiny")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert main(["check", *map(str, case_of(case, "some/base")), "--sheet", str(case / "sheet.png")]) == 0
    weights = [p for p in asked["some/base"] if not p.endswith(".json") and p != "tokenizer/*"]
    assert asked["some/base"] and not weights
    assert Image.open(case / "sheet.png").width > 100


# Parsers, with whatever a keyboard can produce

words = st.text(max_size=40)
lines = st.lists(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=20), max_size=5)
quick = trials(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def sentence_or(function, *args):
    "A result, or None where the input is refused in one line."
    try: return function(*args)
    except InputError as error: assert "\n" not in str(error) or "\n" in str(args)


@quick
@given(words)
@example("a photo of *")
@example("*")
def test_any_caption(case, prompt):
    found = sentence_or(data.load_case, case / "one", case / "wave", prompt, prompt)
    if found is None: return
    word = found.class_word
    assert word and word == word.strip() and "*" not in word
    assert isinstance(found.motion_words, str) and joint_prompt(found.identity_prompt, found.motion_prompt)


@quick
@given(lines)
@example(["a\tb", "a"])
@example(["\t"])
def test_any_list_of_captions(case, given_lines):
    (case / "one/prompts.txt").write_bytes("\n".join(given_lines).encode())
    found = sentence_or(data.load_case, case / "one", case / "wave")
    if found is None: return
    assert len(found.identity) == len(data.identity_files(case / "one")[0])
    assert all(item.prompt.strip() for item in found.identity)


@quick
@given(lines)
@example(["../x.mp4"])
@example(["in/../../x.mp4"])
@example(["a\0.mp4"])
def test_any_list_of_clips(tmp_path, given_lines):
    "Whatever it says, it never leads out of its folder."
    home = tmp_path / "in"
    home.mkdir(exist_ok=True)
    for path in (home / "a.mp4", tmp_path / "x.mp4"): path.touch()
    (home / "videos.txt").write_bytes("\n".join(given_lines).encode())
    clips, _ = sentence_or(data.motion_files, home) or ([], [])
    for path in clips: assert path.resolve().is_relative_to(home.resolve())


@quick
@given(st.sets(st.sampled_from("a.png b.mp4 images/c.jpg videos/d.mp4 e/f.png x.txt .h.png".split())))
def test_any_layout(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("layout")
    for name in names: put(root / name, "")
    for find in (data.identity_files, data.motion_files):
        found = sentence_or(find, root)
        assert found is None or found[0]
        for path in found[0] if found else []: assert path.exists() and not path.name.startswith(".")


@quick
@given(st.fixed_dictionaries({}, optional=dict(
    steps=st.integers(-2, 9), rank=st.integers(-2, 9), lr=st.floats(), clip=st.floats(),
    frames=st.integers(-2, 99), height=st.integers(-9, 99), keep=st.integers(-1, 5),
    warmup=st.integers(-2, 9), weight_decay=st.floats())))
def test_any_configuration(values):
    done = sentence_or(completed, TrainConfig("one", "wave", "out", **values), BaseSize(32, 32, 9, 16))
    if done is None: return
    assert done.steps > 0 and done.keep > 0 and 0 < done.lr < math.inf and done.weight_decay >= 0


@quick
@given(st.dictionaries(st.sampled_from("rank groups condition_dim scale identity motion controller".split()),
                       st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3)))
def test_any_adapter_configuration(values): sentence_or(lambda: DualRealConfig(**values))


# The cache

def encoded(home, folder, cache):
    pipe = load_base(home / "tiny")
    case = data.load_case(folder / "one", folder / "wave")
    config = TrainConfig("", "", "", height=32, width=32, frames=9)
    return encode_all(pipe, case, config, 16, [], None, Store(cache), "cpu", progress=False)[0]


def test_a_change_costs_its_own_entries(home, case):
    assert encoded(home, case, case / "cache").cached == 12 - 6 - 2  # six visual and two texts are made
    files = {p: p.stat().st_mtime_ns for p in (case / "cache").rglob("*.safetensors")}
    assert encoded(home, case, case / "cache").cached == 12
    Image.fromarray(noise(32, 32, seed=9)).save(case / "one/1.png")
    assert encoded(home, case, case / "cache").cached == 11
    (case / "wave/prompts.txt").write_text("it is in\n")
    assert encoded(home, case, case / "cache").cached == 11  # three share one text
    assert len(list((case / "cache").rglob("*.safetensors"))) == len(files) + 2
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_another_base_costs_what_it_changed(home, case, tmp_path):
    encoded(home, case, case / "cache")
    other = tmp_path / "other"
    shutil.copytree(home / "tiny", other / "tiny")
    from safetensors.torch import load_file
    for part, left in (("transformer", 12), ("vae", 6), ("text_encoder", 10)):
        path = next((other / "tiny" / part).glob("*.safetensors"))
        before, tensors = path.read_bytes(), load_file(path)
        tensors[max(k for k, v in tensors.items() if v.is_floating_point())] += .5
        save_file(tensors, path, {"format": "pt"})
        assert encoded(other, case, case / "cache").cached == left, part
        path.write_bytes(before)
        shutil.rmtree(case / "cache")
        encoded(home, case, case / "cache")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_two_processes_share_a_cache(home, case):
    "At once, on the same case; afterwards every entry is whole and the one that a single process makes."
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(3)

    def work():
        start.wait()
        encoded(home, case, case / "cache")
        os._exit(0)
    group = [fork.Process(target=work) for _ in range(3)]
    for process in group: process.start()
    for process in group: process.join(120)
    assert [process.exitcode for process in group] == [0, 0, 0]
    encoded(home, case, case / "alone")
    def content(name): return {p.name: p.read_bytes() for p in (case / name).rglob("*") if p.is_file()}
    assert content("cache") == content("alone") and len(content("cache")) == 8


# A full disk

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 4 MB."
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk]
    done = shutil.which("mount") and subprocess.run(mount, capture_output=True)
    if not done or done.returncode: pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk, leave):
    "Leave so many bytes free."
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - leave))


def said_full(capsys, *argv):
    capsys.readouterr()
    status = main([str(a) for a in argv])
    err = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert status == 1 and len(err) == 1 and "the disk is full" in err[0], err
    return err[0]


def test_full_disk_during_a_checkpoint(home, small_disk, capsys, monkeypatch):
    "The older checkpoint stays whole; with room again the run continues as if nothing had been."
    out = small_disk / "run"
    words = ["train", *case_of(home, home / "tiny"), "--out", out, "--prompt", "cat", "--reference-encoder",
             "none",
             "--steps", 5, "--save-every", 2, "--samples", 0, "--groups", 2, "--rank", 2, "--device", "cpu",
             "--trackers", "none"]
    from dualreal import loop
    step = loop.train_step

    def filling(run):
        if run.step == 3: fill(small_disk, 20_000)
        return step(run)
    monkeypatch.setattr(loop, "train_step", filling)
    assert "step-4" in said_full(capsys, *words)
    assert [p.name for p in step_folders(out / "checkpoints")] == ["step-2"] and not list(out.rglob(".*"))
    monkeypatch.undo()
    (small_disk / "ballast").unlink()
    assert main([str(w) for w in (*words, "--resume", "--cache", small_disk / "cache")]) == 0
    assert json.loads((out / "run.json").read_text())["log"][-1]["step"] == 5


def test_full_disk_during_encoding(small_disk):
    cache = Store(small_disk / "cache")
    kept = cache.tensors("aa", lambda: dict(x=torch.ones(10)))
    fill(small_disk, 20_000)
    with pytest.raises(OSError) as caught: cache.tensors("bb", lambda: dict(x=torch.ones(100_000)))
    assert caught.value.errno == errno.ENOSPC and "cache" in str(caught.value.filename)
    assert torch.equal(cache.tensors("aa", None)["x"], kept["x"])
    assert [p.name for p in small_disk.rglob("*.safetensors")] == ["aa.safetensors"]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_full_disk_during_a_video(small_disk, suffix):
    path = write_video(small_disk / f"a{suffix}", noise(5, 32, 32))
    before = path.read_bytes()
    fill(small_disk, 20_000)
    with pytest.raises(OSError) as caught: write_video(path, noise(9, 128, 128))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert sorted(p.name for p in small_disk.iterdir()) == [path.name, "ballast"]


# Bases that cannot be used, and numbers that are none

OTHERS = {"is a FluxPipeline": ("model_index.json", dict(_class_name="FluxPipeline")),
          "pipeline is a WanPipeline, but its transformer a CogVideoXTransformer3DModel":
              ("model_index.json", dict(_class_name="WanPipeline")),
          "is a CogVideoXImageToVideoPipeline":
              ("model_index.json", dict(_class_name="CogVideoXImageToVideoPipeline")),
          "cannot be trained yet": ("transformer/config.json", dict(patch_size_t=2))}


@pytest.mark.parametrize("says", OTHERS)
def test_all_commands_refuse_a_base_alike(home, case, capsys, says):
    "From configuration files alone: the weights are not there."
    (file, change), base = OTHERS[says], case / "other"
    shutil.copytree(home / "tiny", base)
    for path in base.rglob("*.safetensors"): path.write_bytes(b"")
    (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | change))
    commands = (["check", *case_of(case, base)], ["train", *case_of(case, base), "--out", case / "run"],
                ["generate", "--adapter", home / "adapter.safetensors", "--base", base, "--prompt", "a",
                 "--out", case / "a.mp4"])
    said = {complaint(capsys, *command) for command in commands}
    assert len(said) == 1 and says in said.pop() and not (case / "run").exists()


def test_weights_of_a_variant(home, tmp_path):
    "A folder with *.fp16.safetensors only, as `from_pretrained(variant=…)` keeps it."
    base = shutil.copytree(home / "tiny", tmp_path / "base")
    for path in base.rglob("*.safetensors"): path.rename(path.with_suffix(".fp16.safetensors"))
    whole, variant = (load_base(b).transformer.state_dict() for b in (home / "tiny", base))
    assert all(torch.equal(v, variant[k]) for k, v in whole.items())


def spoilt(home, folder, part, where=""):
    "The tiny base with one number that is none, in a part of it."
    base = shutil.copytree(home / "tiny", folder)
    for path in (base / part).glob("*.safetensors"):
        tensors = load_file(path)
        tensors[next(n for n in tensors if "norm" not in n and where in n)].flatten()[0] = torch.nan
        save_file(tensors, path, {"format": "pt"})
    return base


@pytest.mark.parametrize("part, says", [
    ("text_encoder", "prompt '': the text encoder"), ("transformer", "step 1: the transformer"),
    ("vae", "the VAE")])
def test_videos_that_are_no_numbers(home, tmp_path, capsys, part, says):
    base = spoilt(home, tmp_path / "base", part, "decoder" if part == "vae" else "")
    status = main(["generate", "--adapter", f"{home}/adapter.safetensors", "--base", f"{base}",
                   "--prompt", "a cat", "--steps", "2", "--out", f"{tmp_path}/a.mp4"])
    err = capsys.readouterr().err.splitlines()[-1]
    assert status == 1 and f"{says} gave numbers that are not finite" in err
    assert not (tmp_path / "a.mp4").exists()


def test_latents_that_are_no_numbers(home, case, capsys):
    base = spoilt(home, case / "base", "vae", "encoder")
    for _ in range(2): # nothing of it went into the cache
        status = main(["train", *map(str, case_of(case, base)), "--out", f"{case}/run", "--steps", "2",
                       "--reference-encoder", "none"])
        err = capsys.readouterr().err.splitlines()[-1]
        assert status == 1 and "one/0.png: the VAE gave numbers that are not finite" in err, err


def test_two_trainings_at_once(home, case, capsys):
    "The second is refused while the first one works; a dead one holds nothing."
    with own(case / "run"):
        said = complaint(capsys, "train", *case_of(case, home / "tiny"), "--out", case / "run", "--steps", 1,
                         "--reference-encoder", "none")
        assert "another process is training there" in said
    (case / "run").mkdir()
    (case / "run/.lock").touch()  # of a process that was killed
    assert main(["train", *map(str, case_of(case, home / "tiny")), "--out", f"{case}/run", "--steps", "1",
                 "--samples", "0", "--reference-encoder", "none"]) == 0


@pytest.mark.parametrize("command", ["check", "train"])
def test_one_look_names_all_faults(home, case, capsys, command):
    "A picture that is none, a clip that is cut, and captions that are missing: in one sentence."
    (case / "one/0.png").write_bytes(b"no picture")
    (case / "one/prompts.txt").unlink()
    clip = case / "wave/1.mp4"
    clip.write_bytes(clip.read_bytes()[:300])
    more = ["--out", case / "run"] if command == "train" else []
    said = complaint(capsys, command, *case_of(case, home / "tiny"), *more)
    places = [said.index(word) for word in ("0.png", "no identity caption", "1.mp4")]
    assert places == sorted(places)
