"""Lists that must agree with the files they name, and what every page owes its readers."""
import ast
import json
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from dualreal.core import COLOURS

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/"nbs").rglob("[0-9i]*.ipynb"))


def pages(contents) -> list[str]:
    "Every file named in a sidebar list of `_quarto.yml`, in order."
    found = []
    for entry in contents:
        if isinstance(entry, str): found.append(entry)
        else: found += pages(entry["contents"]) if "contents" in entry else [entry["href"]]
    return found


def test_navigation_lists_every_notebook_once():
    site = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    listed = pages(site["website"]["sidebar"]["contents"])
    notebooks = [p.relative_to(ROOT/"nbs") for p in (ROOT/"nbs").rglob("*.ipynb")]
    there = [p.as_posix() for p in notebooks if not any(part[0] in "._" for part in p.parts)]
    assert sorted(listed) == sorted(there)


def test_exported_lines_fit_the_page():
    "At most 110 characters in a cell; what nbdev writes above the first cell is its own affair."
    wide = []
    for module in sorted((ROOT/"dualreal").rglob("[!_]*.py")):
        lines = module.read_text(encoding="utf-8").split("\n")
        first = next(i for i, line in enumerate(lines) if line.startswith("# %% ../"))
        wide += [f"{module.name}:{i+1}" for i, line in enumerate(lines) if i > first and len(line) > 110]
    assert not wide, f"over 110 characters: {', '.join(wide)}"


def mixed(cell) -> bool:
    "Whether a cell that the site runs for its signatures holds imports and something else."
    text = "".join(cell["source"])
    if cell["cell_type"] != "code" or text.startswith(("#| export", "#| hide")): return False
    try: nodes = [*ast.walk(ast.parse(text))]
    except SyntaxError: return False # a magic
    there = lambda *kinds: any(isinstance(node, kinds) for node in nodes)
    return there(ast.Import, ast.ImportFrom) and there(ast.Expr, ast.Assign)


def test_imports_stand_in_cells_of_their_own():
    "As nbdev asks, which else runs the whole cell while the site is built."
    cells = [(p.name, cell) for p in (ROOT/"nbs").glob("[0-9]*.ipynb")
             for cell in json.loads(p.read_text(encoding="utf-8"))["cells"]]
    assert not (wrong := [(name, cell["source"][:2]) for name, cell in cells if mixed(cell)]), wrong


@pytest.mark.parametrize("page", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_every_picture_says_what_it_shows(page):
    "`fig-alt` above a cell that draws, words in the brackets of a Markdown picture."
    silent = []
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            silent += re.findall(r"!\[\s*\]\([^)]*\)|<img(?![^>]* alt=)[^>]*>", text)
        elif any(kind.startswith("image/") for o in cell.get("outputs", []) for kind in o.get("data", {})):
            if not re.search(r"^#\| fig-alt: \w.*", text, re.M): silent.append(text[-80:])
    assert not silent


@pytest.mark.parametrize("page", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_first_cell_is_title_and_promise(page):
    "The site takes its heading from this cell and drops whatever else it holds."
    first = "".join(json.loads(page.read_text(encoding="utf-8"))["cells"][0]["source"])
    assert re.fullmatch(r"# .+\n+> .+(\n> .+)*\n*", first)


def test_colours_have_one_place():
    "Identity and motion look the same everywhere because no page spells their colours out."
    spelled = re.compile("|".join(COLOURS.values()), re.I)
    assert [p.stem for p in NOTEBOOKS if spelled.search(written(p))] == ["00_core"]


def test_requirements_survive_splitting():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    for key in ("requirements", "dev_requirements", "docs_requirements"):
        for text in config["DEFAULT"].get(key, "").split(): Requirement(text)


def test_version_is_the_same_everywhere():
    import dualreal
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    version = config["DEFAULT"]["version"]
    assert dualreal.__version__ == version
    assert yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert f"\n## {version}" in (ROOT/"CHANGELOG.md").read_text(encoding="utf-8")


def written(page) -> str:
    "What a notebook says in letters: its cells, and the text of their outputs; pictures are not read."
    texts = []
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        outputs = cell.get("outputs", [])
        texts += [cell["source"], *(o.get("text", "") for o in outputs)]
        texts += [v for o in outputs for kind, v in o.get("data", {}).items() if not kind.startswith("image")]
    return "\n".join("".join(text) for text in texts)


def test_nothing_is_left_over():
    "No mark of unfinished work in a notebook."
    marks = re.compile("|".join(("X" * 3, "TO" + "DO", "FIX" + "ME", "HA" + "CK")))
    found = [p.name for p in NOTEBOOKS if marks.search(written(p))]
    assert not found, f"left over: {', '.join(found)}"
