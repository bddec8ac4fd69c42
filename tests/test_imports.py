"""Modules stand alone, import only smaller numbers, and keep the walls between the chapters."""
import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from fresh import outcomes
from house import (
    MODULES,
    NOTEBOOKS,
    NUMBERS,
    ROOT,
    imports,
    missing,
    module_of,
    outside,
    private,
    reached,
    siblings,
    taken,
    tree,
)
from safetensors.numpy import save_file as write_tensors

from dualreal.core import write_json
from dualreal.toy.world import write_case

HEAVY = {"torch", "torchvision", "transformers", "diffusers", "peft", "accelerate", "open_clip", "timm"}
TOY = {"toy.world", "toy.truth", "toy.bases"}
FAMILIES = "cogvideox", "wan"
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: a fresh process each takes minutes")


def some(*names): return pytest.mark.parametrize("module", [m for m in names if m in NUMBERS])


# The numbers

def test_number_is_import_order():
    wrong = [f"{m} ({NUMBERS[m]:02}) imports {s} ({NUMBERS[s]:02})"
             for m in MODULES for s in siblings(m) if NUMBERS[s] >= NUMBERS[m]]
    assert not wrong


def test_no_number_twice():
    names = [p.name for p in (ROOT/"nbs").glob("[0-9]*.ipynb")]
    assert not [name for name in names if not re.match(r"\d\d_[a-z]", name)]
    assert not [number for number, times in Counter(name[:2] for name in names).items() if times > 1]
    assert sorted(p.name for p in NOTEBOOKS.values()) == sorted(names)  # each exports a module of its own


def test_a_module_is_called_as_its_notebook():
    called = {m: m.removeprefix("experiments.").replace(".", "") for m in MODULES}
    assert not [m for m, p in NOTEBOOKS.items() if p.stem[3:] != called[m]]


# The walls

@some(*(m for m in MODULES if NUMBERS[m] < 10))
def test_method_needs_no_house(module):
    assert not [m for m in reached(module) if NUMBERS[m] >= 10]
    if module not in FAMILIES: assert not outside(module) & {"accelerate", "diffusers", "transformers"}


@some("family", *FAMILIES)
def test_a_family_loads_nothing(module):
    "Its facts are asked for by refusals, which must come at once."
    assert not {n.split(".")[0] for n in imports(module, functions=False)} & HEAVY


THEIRS = re.compile(r"CogVideoX\w*(3D|Pipeline|Scheduler)|Wan\w*(3D|Pipeline)|AutoencoderKL|add_noise|"
                    r"get_velocity|[48]k ?\+ ?1|attention_kwargs|_prepare_rotary_positional_embeddings|"
                    r"scaling_factor|latents_mean")


@some(*(m for m in MODULES if m not in {"family", *FAMILIES}))
def test_only_families_know_families(module):
    "Classes, schedulers' methods, layouts and lengths of one family stand in its notebook."
    text = (ROOT/"dualreal"/f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if THEIRS.search(line)]


@some("metrics", "report", "figures")
def test_figures_need_no_model(module):
    assert not outside(module) & HEAVY - {"torch"}


@some("metrics", "report")
def test_numbers_need_no_house(module):
    assert reached(module) <= {"core", "video", module}


def test_settings_are_the_standard_library():
    assert siblings("settings") <= {"core"}
    for module in ("settings", "core"):
        found = {name.split(".")[0] for name in imports(module, functions=module == "settings")}
        assert not found - sys.stdlib_module_names - {"dualreal"}


def test_cli_is_the_end():
    assert not [m for m in MODULES if "cli" in siblings(m)]
    assert not [m for m in MODULES if m != "cli" and "studio" in siblings(m)]


@some(*(m for m in MODULES if m not in TOY | {"cli", "show"}))  # show: the studio's example
def test_only_commands_know_the_toy(module):
    assert not siblings(module) & TOY


# Names

@some(*MODULES)
def test_what_is_imported_late_is_there(module):
    "An import inside a function fails only when it is run: here it is looked up."
    assert not missing(module)


def borrowed(source) -> list[str]:
    return [f"{module}.{name}" for module, name in sorted(taken(source)) if private(name)]


@some(*MODULES)
def test_no_module_takes_anothers_private_name(module):
    assert not borrowed(module)


def pages():
    "Notebooks that use the package; one that exports holds its own private names anyway."
    return sorted(p for p in (ROOT/"nbs").rglob("[0-9i]*.ipynb") if not p.parent.name.startswith("."))


def test_no_page_takes_a_private_name():
    found = {p.name: borrowed(p) for p in pages()}
    own = {p: m for m, p in NOTEBOOKS.items()}
    assert not {n: names for p in pages() for n in [p.name]
                if (names := [b for b in found[n] if b.rpartition(".")[0] != own.get(p)])}


def patched(source) -> list[str]:
    "Private names that a string names: `\"dualreal.core._x\"`, `setattr(core, \"_x\", …)`."
    modules = {called: m for name, called in imports(source).items() for m, rest in [module_of(name)]
               if m and not rest}
    found = []
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Constant) and re.fullmatch(r"dualreal(\.\w+)*\._[a-z]\w*", str(node.value)):
            found.append(node.value)
        elif isinstance(node, ast.Call) and len(node.args) > 1 and ast.unparse(node.args[0]) in modules:
            name = getattr(node.args[1], "value", "")
            if isinstance(name, str) and private(name): found.append(f"{ast.unparse(node.args[0])}.{name}")
    return found


BESIDE = [*sorted((ROOT/"tests").glob("*.py")), *sorted((ROOT/"tools").glob("*.py"))]


def test_pages_tests_and_tools_find_what_they_import():
    assert not {path.name: names for path in [*BESIDE, *pages()] if (names := missing(path))}


@pytest.mark.parametrize("path", BESIDE, ids=[p.stem for p in BESIDE])
def test_tests_and_tools_use_what_is_public(path):
    assert not borrowed(path) + patched(path)


@pytest.mark.parametrize("path", BESIDE, ids=[p.stem for p in BESIDE])
def test_no_source_is_rewritten_and_run(path):
    "A test runs what stands there: `exec` and `compile` take no text that `replace` or `re.sub` has changed."
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    run = [node for node in calls if ast.unparse(node.func) in ("exec", "eval") and node.args]
    changed = re.compile(r"\.replace\(|\bsub\(")
    assert not [ast.unparse(node) for node in run if changed.search(ast.unparse(node.args[0]))]


# Fresh processes

PRELOADED = ("torch", "peft", "accelerate", "pandas", "matplotlib.pyplot", "diffusers.CogVideoXPipeline",
             "transformers.T5EncoderModel", "IPython.display")


@fork
def test_each_module_is_imported_first(tmp_path):
    "Each in a process of its own, elsewhere than in the repository: what imports here imports for a user."
    made = outcomes([f"from dualreal.{m} import *" for m in MODULES], tmp_path, PRELOADED)
    assert {m: said for m, (status, said) in zip(MODULES, made) if status} == {}


@fork
def test_a_module_that_leans_on_another_is_found(tmp_path):
    "What the test above is worth: it sees an import that works only after another's, and a missing name."
    (tmp_path/"leaning").mkdir()
    for name, text in {"__init__": "", "core": "X = 1", "late": "import leaning\nY = leaning.core.X",
                       "other": "Z = only_a_notebook_knows"}.items():
        (tmp_path/"leaning"/f"{name}.py").write_text(text)
    names = ["core", "late", "other"]
    made = outcomes([f"from leaning.{n} import *" for n in names], tmp_path, path=[tmp_path])
    assert [status for status, _ in made] == [0, 1, 1]
    assert "has no attribute 'core'" in made[1][1] and "only_a_notebook_knows" in made[2][1]


def without_torch(commands, status, cwd):
    "Each command ends with `status`, in a process of its own that has loaded none of what is heavy."
    program = """
import sys
from dualreal.cli import main
print("\\nstatus", main({!r}), sorted({!r} & sys.modules.keys()))"""
    made = outcomes([program.format(words, HEAVY) for words in commands], cwd)
    told = {" ".join(words): said.strip().rpartition("\n")[2] for words, (_, said) in zip(commands, made)}
    assert told == {" ".join(words): f"status {status} []" for words in commands}


@fork
def test_help_needs_no_torch(tmp_path):
    from dualreal.cli import parser
    names = next(a for a in parser()._actions if hasattr(a, "choices") and a.choices).choices
    without_torch([["--help"], ["--version"], *([name, "--help"] for name in names)], 0, tmp_path)


@fork
def test_refused_words_need_no_torch(tmp_path):
    words = ("", "fly", "train --nonsense", "train --steps abc", "generate", "evaluate", "bench fly",
             "inspect", "convert a", "card", "studio --port x", "demo --seed x", "check --stepps 9")
    without_torch([line.split() for line in words], 2, tmp_path)


@fork
def test_refused_values_need_no_torch(tmp_path):
    values = ("steps 0", "lr -1", "scale -1", "clip 0", "motion-ratio 2", "samples -1", "rank 0",
              "precision int3", "fit stretch", "coupling both", "score-previews toy")
    train = "train --identity photos --motion clips --out run"
    without_torch([f"{train} --{value}".split() for value in values], 2, tmp_path)


@fork
def test_what_is_not_there_needs_no_torch(tmp_path):
    "Folders, files and bases are looked for before anything heavy is loaded."
    (tmp_path/"base").mkdir()
    words = ("check --identity no --motion no", "train --identity no --motion no --out run", "inspect no",
             "generate --adapter no --prompt a --out a.mp4", "convert no a.pth", "card no",
             "studio --port 70000", "demo --subject no", "evaluate --videos no --identity no --out o",
             "push no me/cat", "compose --identity no --motion no --out both")
    without_torch([line.split() for line in words], 2, tmp_path)


@pytest.fixture
def case(tmp_path):
    write_case(tmp_path/"case", "teal_cat", "swinging", images=2, clips=2)
    return SimpleNamespace(identity=tmp_path/"case/identity", motion=tmp_path/"case/motion")


@fork
def test_refused_beside_a_case_needs_no_torch(case, tmp_path):
    "Where pictures, clips and an adapter are there, what is wrong with the rest is said as soon."
    write_tensors({"x": np.zeros(1)}, tmp_path/"a.safetensors", {"dualreal": '{"base": "toy"}'})
    write_tensors({"x": np.zeros(1)}, tmp_path/"odd.safetensors", {"dualreal": '{"base": 3}'})
    (tmp_path/"bad.safetensors").write_text("bad")
    (tmp_path/"report.json").write_text("[]")
    (tmp_path/"run/checkpoints/step-1").mkdir(parents=True)
    write_json(tmp_path/"run/config.json", dict(seed=1))
    folders = f"--identity {case.identity} --motion {case.motion}"
    train, check, ask = f"train {folders} --out out", f"check {folders}", "--prompt a --out a.mp4"
    score = f"evaluate --videos {case.motion} --identity {case.identity} --encoders toy --out scores"
    words = (
        f"{train} --base me/none", f"{train} --height 33", f"{train} --memory much", f"{train} --trackers no",
        f"{train} --no-mask --coupling none", f"{train} --log .",
        f"{train} --eight-bit --no-gradient-checkpointing",
        f"train {folders} --out run --resume --seed 2", f"{check} --base base", f"{check} --frames 1",
        f"{check} --height 33", f"{check} --fps 0", f"{check} --sheet a.txt",
        *(f"generate --adapter a.safetensors {ask} --{more}" for more in (
            "lora no", "frames 10", "height 33", "reference no.png", "approximate magic", "base no")),
        *(f"generate --adapter {file} {ask}" for file in ("odd.safetensors", "bad.safetensors", "me/none")),
        f"{score} --prompts no", f"{score} --motion no", f"{score} --weights no",
        f"{score} --midpoint no.pt2", f"{score} --truth cat",
        "inspect bad.safetensors", "convert bad.safetensors b.pth",
        "convert a.safetensors b.txt", "convert a.safetensors b.pth --reference no.png",
        "card a.safetensors --report no", "card a.safetensors --report report.json", "card bad.safetensors",
        "push a.safetensors cat", "push a.safetensors me/cat")
    without_torch([line.split() for line in words], 2, tmp_path)


@fork
def test_a_benchmark_is_refused_without_torch(tmp_path):
    (tmp_path/"bad.json").write_text("bad")
    write_json(tmp_path/"few.json", dict(name="few"))
    toy = json.loads((ROOT/"data/benchmark/toy.json").read_text(encoding="utf-8"))
    write_json(tmp_path/"odd.json", toy | dict(name="odd", scorer="taste"))
    wrong = ("--bench no", "--bench no.json", "--bench bad.json", "--bench few.json", "--bench odd.json",
             "--methods loraa", "--methods lora:rnk=4", "--methods lora:rank=x",
             "--methods lora_together:motion_steps=3", "--cases teal_cat-flying",
             "--seeds a", "--seeds 1,1", "--steps 0", "--data no", "--base no",
             "--base me/none", "--jobs no.json", "--jobs bad.json", "--tries 3", "--lrs 1e-3",
             "--workers 0", "--format pdf", "--bench published")
    words = [f"bench run --out out {one}" for one in wrong]
    words += ["bench fly", "bench data", "bench data --data no", "bench report --methods loraa",
              "bench report --out out", "bench status --cases no", "bench status --bench published",
              "bench search --methods loraa", "bench search --lrs 0",
              "bench search --tries 2 --methods base", "bench search --base no"]
    without_torch([line.split() for line in words], 2, tmp_path)


def test_beside_a_clone(tmp_path):
    "Where a clone's folder, dualreal/, lies in the working folder, the package is still the package."
    (tmp_path/"dualreal").symlink_to(ROOT)
    program = "import dualreal; print(dualreal.__version__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
