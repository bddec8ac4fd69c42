"""Run recipes without Jupyter: `python tools/recipes.py 01 02`.

Under `torchrun --nproc-per-node 2`, too. Each notebook's code cells run in order in nbs/recipes, as a script;
that needs only what the package needs: no Jupyter, no nbdev.
"""
import json
import os
import sys
from pathlib import Path

import matplotlib

RECIPES = Path(__file__).resolve().parent.parent/"nbs/recipes"


def run(notebook: Path):
    "Execute the code cells of `notebook` in a namespace of their own."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "__main__"}
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {i}", "exec"), names)


def main(asked):
    every = sorted(RECIPES.glob("[0-9]*.ipynb"))
    missing = [a for a in asked if not any(p.name.startswith(a) for p in every)]
    known = ", ".join(p.name for p in every)
    if not asked: sys.exit(f"name recipes by how they begin, 01 to 04 make the toy base anew: {known}")
    if missing: sys.exit(f"no recipe begins with {missing[0]!r}: there are {known}")
    matplotlib.use("Agg")
    os.chdir(RECIPES)
    for notebook in every:
        if any(notebook.name.startswith(a) for a in asked):
            print(f"== {notebook.name}", flush=True)
            run(notebook)


if __name__ == "__main__": main(sys.argv[1:])
