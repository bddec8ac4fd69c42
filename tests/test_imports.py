"""Modules stand alone, import only smaller numbers, and keep the walls between the chapters."""
import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def exported_module(notebook: Path) -> str | None:
    "The name after `#| default_exp` in `notebook`, None where it exports nothing."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    match = re.search(r"^#\|\s*default_exp\s+([\w.]+)", code, re.M)
    return match and match[1]


NUMBERS = {exported_module(p): int(p.name[:2]) for p in sorted((ROOT/"nbs").glob("[0-9][0-9]_*.ipynb"))}
NUMBERS.pop(None, None)
MODULES = sorted(NUMBERS, key=NUMBERS.get)


@cache
def imports(module: str) -> frozenset[str]:
    "Full names that `module` imports anywhere, inside its functions too; `from a import b` counts as `a.b`."
    found = set()
    for node in ast.walk(ast.parse((ROOT/"dualreal"/f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "dualreal" + (f".{node.module}" if node.module else "") if node.level else node.module
            found |= {f"{base}.{a.name}" for a in node.names}
    return frozenset(found)


def siblings(module: str) -> set[str]:
    "Modules of this package that `module` imports."
    return {n.split(".")[1] for n in imports(module) if n.startswith("dualreal.")} & set(NUMBERS)


def reached(module: str) -> set[str]:
    "`module` and every sibling it imports, directly or through others."
    found, todo = set(), [module]
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            todo += siblings(name)
    return found


def outside(module: str) -> set[str]:
    "Top-level packages other than this one that `module` or a sibling it reaches imports."
    return {n.split(".")[0] for m in reached(module) for n in imports(m)} - {"dualreal"}


def test_number_is_import_order():
    wrong = [f"{m} ({NUMBERS[m]:02}) imports {s} ({NUMBERS[s]:02})"
             for m in MODULES for s in siblings(m) if NUMBERS[s] >= NUMBERS[m]]
    assert not wrong


@pytest.mark.parametrize("module", [m for m in MODULES if 10 <= NUMBERS[m] <= 14])
def test_method_needs_no_house(module):
    assert not {m for m in reached(module) if 1 <= NUMBERS[m] <= 4}
    assert "accelerate" not in outside(module)


@pytest.mark.parametrize("module", sorted({"metrics", "report"} & set(MODULES)))
def test_figures_need_no_model(module):
    assert not outside(module) & {"diffusers", "transformers", "peft", "open_clip", "timm", "accelerate"}
    assert not {m for m in reached(module) if m not in ("core", "video", module)}


def test_cli_is_the_end():
    assert not [m for m in MODULES if "cli" in siblings(m)]
    assert not [m for m in MODULES if m != "cli" and "studio" in siblings(m)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_in_a_fresh_process(module, tmp_path):
    "Started elsewhere than in the repository: what imports here imports for a user."
    command = [sys.executable, "-c", f"from dualreal.{module} import *"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_beside_a_clone(tmp_path):
    "Where a clone's folder, dualreal/, lies in the working folder, the package is still the package."
    (tmp_path/"dualreal").symlink_to(ROOT)
    program = "import dualreal; print(dualreal.__version__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
