"""Run recipes without Jupyter.

    python tools/recipes.py            # all that make the toy's weights: VAE, transformer, CLIP, DINO
    python tools/recipes.py 02 03      # some of them, by how their names begin

Each notebook's code cells run in order in nbs/recipes, as a script, up to "What was recorded": the rest only
shows. That needs what the package needs: no Jupyter, no nbdev. Without a GPU two processes of one thread each
share a recipe that trains: they bear a busy machine better than one process with two threads. Stopped, a
recipe goes on where it was.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parent.parent/"nbs/recipes"
WEIGHTS = "01", "02", "03", "04"


def run(notebook: Path):
    "Execute the code cells of `notebook`, up to what only shows, in a namespace of their own."
    import matplotlib
    matplotlib.use("Agg")
    os.chdir(RECIPES)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "__main__"}
    for i, cell in enumerate(cells):
        if "".join(cell["source"]).startswith("## What was recorded"): break
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {i}", "exec"), names)


def start(notebook: Path):
    "Run `notebook` in a process of its own, or in two if it trains on cores."
    import torch
    alone = torch.cuda.is_available() or not notebook.name.startswith(WEIGHTS)
    cores = 1 if alone else min(2, os.cpu_count())
    threads = {} if alone else dict(OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cores}"]
    subprocess.run([*(command if cores > 1 else [sys.executable]), __file__, "--here", notebook],
                   env=os.environ | threads, check=True)


def main(asked):
    here, asked = asked[:1] == ["--here"], [a for a in asked if a != "--here"]
    if here: return run(Path(asked[0]))
    every = sorted(RECIPES.glob("[0-9]*.ipynb"))
    missing = [a for a in asked if not any(p.name.startswith(a) for p in every)]
    known = ", ".join(p.name for p in every)
    if missing: sys.exit(f"no recipe begins with {missing[0]!r}: there are {known}")
    for notebook in every:
        if notebook.name.startswith(tuple(asked or WEIGHTS)):
            print(f"== {notebook.name}", flush=True)
            start(notebook)


if __name__ == "__main__": main(sys.argv[1:])
