"""Every `dualreal …` command of README.md and the site's pages, read from the text: run, or not for a reason.

The texts are for a reader with time; here a command is shortened by `SHORTER` (flags added at its end, where
the last one counts) and `INSTEAD` (what is replaced), and runs in a folder of drawn files. Commands with a
key of `NOT_RUN` are only parsed. Inline code may be cut short with `…`: its command and flags must exist.
"""
import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from dualreal.cli import main, parser
from dualreal.core import write_json
from dualreal.generate import generate
from dualreal.toy.world import write_case
from dualreal.trainer import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
SHORTER = dict(train="--steps 2 --samples 0", generate="--steps 2", evaluate="--encoders toy")
INSTEAD = {"--base THUDM/CogVideoX-5b": "--base toy",   # 21 GB of weights, and a GPU
           "--workers 4": "--workers 1"}
NOT_RUN = {"--ray": "needs Ray, and a cluster"}
MINE = dict(name="mine", base="toy", scorer="pixels", prompts=["{}"], videos=1, seeds=[0], images=2, clips=2,
            steps=1, sampling=2, search=[], objective=["temporal_flickering"],
            tables=dict(comparison=["dualreal"]), cases=[dict(subject="teal_cat", motion="swinging")])


def text_of(path: Path) -> str:
    "Markdown of a file; of a notebook its Markdown cells."
    if path.suffix == ".md": return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def commands(text: str) -> list[str]:
    "Whole lines of code blocks, indented or fenced, that start with `dualreal`."
    text, found, fenced = re.sub(r"\\\n\s*", " ", text), [], False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"): fenced = not fenced
        elif (fenced or line.startswith("    ")) and re.match(r"\s*(\$ )?dualreal ", line):
            found.append(line.strip().removeprefix("$ "))
    return found


def inline(text: str) -> list[str]:
    return re.findall(r"`(dualreal [a-z][^`]*)`", text)


DOCUMENTS = [*ROOT.glob("*.md"), *sorted((ROOT / "nbs").rglob("*.ipynb"))]
RUN = [p for p in DOCUMENTS if commands(text_of(p)) and p.name != "index.ipynb"]  # README.md is index.ipynb
named = {"argvalues": RUN, "ids": [p.stem for p in RUN]}


def why_not(line: str) -> str | None: return next((why for key, why in NOT_RUN.items() if key in line), None)


def shortened(line: str) -> list[str]:
    for long, short in INSTEAD.items(): line = line.replace(long, short)
    words = shlex.split(line, comments=True)[1:]
    return words + shlex.split(SHORTER.get(words[0], ""))


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A reader's folder: photos, clips, a benchmark."
    write_case(tmp_path / "case", "mint_cat", "hopping", images=2, clips=2)
    (tmp_path / "case/identity").rename(tmp_path / "photos")
    (tmp_path / "case/motion").rename(tmp_path / "clips")
    write_json(tmp_path / "mine.json", MINE)
    two = [f"- {{name: {name}, identity: photos, motion: clips, seed: {i}}}\n" for i, name in enumerate("ab")]
    (tmp_path / "cases.yaml").write_text("".join(two))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALREAL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("path", **named)
def test_commands_run(path, home, capsys):
    "In the order of the text: what one makes the next one takes."
    for line in commands(text_of(path)):
        if why_not(line): continue
        status = main(shortened(line))
        assert status == 0, f"{line}: status {status}: {capsys.readouterr().err}"


@pytest.mark.parametrize("path", **named)
def test_commands_parse_as_they_stand(path):
    for line in commands(text_of(path)): assert parser().parse_args(shlex.split(line, comments=True)[1:]).run


def known_flags(command: str) -> set[str]:
    subparsers = next(a for a in parser()._actions if hasattr(a, "choices") and a.choices)
    assert command in subparsers.choices, f"dualreal {command}: there is no such command"
    return set(subparsers.choices[command]._option_string_actions)


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(p.relative_to(ROOT)) for p in DOCUMENTS])
def test_inline_commands_exist(path):
    for line in inline(text_of(path)):
        flags = {w.split("=")[0] for w in line.split() if re.match(r"--[a-z]", w)}
        assert flags <= known_flags(line.split()[1]), line


def test_reasons_are_used():
    "No reason outlives its command, and nothing is found where nothing is read."
    lines = [line for p in DOCUMENTS for line in commands(text_of(p))]
    assert len(lines) > 8 and {key for key in NOT_RUN for line in lines if key in line} == set(NOT_RUN)
    assert all(any(long in line for line in lines) for long in INSTEAD)


def test_python_of_the_readme_runs(home, monkeypatch):
    "The block under 'In Python' as it stands, with two of all: pictures, clips, steps, denoising steps."
    monkeypatch.setattr("dualreal.trainer.TrainConfig", partial(TrainConfig, steps=2, samples=0))
    monkeypatch.setattr("dualreal.generate.generate", partial(generate, steps=2))
    monkeypatch.setattr("dualreal.toy.world.write_case", partial(write_case, images=2, clips=2))
    block = re.search(r"```python\n(.*?)```", text_of(ROOT / "README.md"), re.S)[1]
    exec(block, {})
    assert (home / "cat.mp4").is_file()
    assert json.loads((home / "case/run/config.json").read_text())["steps"] == 2


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^(?: {4}|.*`)make ([\w-]+)", text_of(ROOT / "README.md"), re.M)
    assert targets and all(re.search(rf"^[\w\s-]*\b{t}\b[\w\s-]*:", makefile, re.M) for t in targets)
