"""What only a GPU can show, with the 5B's shapes and random weights: nothing is downloaded.

The table of nbs/44_speed.ipynb; a base of 12 GB (small: a tiny one, to try this on a CPU); training and a
benchmark on that base, end to end:

    python tools/gpu.py speed data/results/speed/gpu.json [ROUNDS [ROW ...]]
    python tools/gpu.py speed-wan data/results/speed/gpu-wan.json [ROUNDS [ROW ...]]
    python tools/gpu.py base FOLDER [small]
    python tools/gpu.py paths FOLDER DATA OUT

speed-wan has the shapes of Wan 2.1-1.3B, 81 frames of 480x832.
ROW is a name in that file, "ours, 16" for one; none: all. DATA holds a folder of pictures (dog) and one of
clips (playingGuitar), a prompts.txt in each. What videos show is noise: that every step runs, how long it
takes and how much memory it needs is what these tell.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from dualreal.core import pick_device, write_json
from dualreal.experiments.speed import FIVE_B, WAN_1_3B, record_gpu
from dualreal.toy.bases import tiny_pipeline, wide_pipeline

CASE = dict(subject="dog", motion="playingGuitar")
METHODS = "dualreal", "lora", "isolated", "without_stageblender"


def make_base(folder, small=False):
    "All 42 blocks and the whole VAE; one layer of the text encoder."
    with torch.device(pick_device()):
        if small: tiny_pipeline(folder, tokens=64)
        else: wide_pipeline(folder, layers=42, wide_vae=True)
    note = dict(reference_encoder="toy", **(dict(rank=4, groups=2) if small else {}))
    (Path(folder)/"dualreal.json").write_text(json.dumps(note))


def told(*command):
    "Run a command, let it speak, and say how long it took."
    start = time.time()
    print("$", *command, flush=True)
    status = subprocess.run([sys.executable, "-m", "dualreal.cli", *map(str, command)]).returncode
    print(f"status {status}, {time.time() - start:.0f} s", flush=True)
    return status


def paths(base, data, out, methods=METHODS):
    "`dualreal train` in 24 GB, then a case of a benchmark with several methods."
    data, work = Path(data), Path(base).parent
    bench = dict(name="gpu-paths", base=str(base), scorer="pixels", data=str(data), cases=[CASE], search=[],
                 prompts=["{} in a garden"], tables=dict(paths=methods), objective=["temporal_flickering"],
                 seeds=[0], steps=3, sampling=3)
    (work/"gpu-paths.json").write_text(json.dumps(bench))
    folders = "--identity", data/CASE["subject"], "--motion", data/CASE["motion"]
    limit = ("--memory", 24) if torch.cuda.is_available() else ()
    failed = told("train", "--base", base, *folders, "--out", work/"run", "--steps", 4, "--samples", 0,
                  "--trackers", "none", *limit)
    for method in methods:
        failed += told("bench", "run", "--bench", work/"gpu-paths.json", "--methods", method, "--out", out)
    write_json(Path(out)/"paths.json", noted(work/"run", Path(out)))
    return failed


def noted(run, out):
    "Times and memory of such runs, from their own records."
    read = lambda path: json.loads(path.read_text(encoding="utf-8"))
    train, results = read(run/"run.json"), map(read, sorted((out/"gpu-paths").glob("*/*.json")))
    steps = [{k: row[k] for k in ("dimension", "seconds")} for row in train["log"]]
    whole = {k: train[k] for k in ("plan", "peak_memory_bytes", "seconds", "environment")}
    return dict(train=dict(whole, steps=steps),
                methods={r["method"]: {k: r[k] for k in ("seconds", "seen", "environment")} for r in results})


def main(what="", *where):
    pick_device()  # also settles how the device's memory is shared out
    shapes = {"speed": FIVE_B, "speed-wan": WAN_1_3B}
    if what in shapes and where:
        record_gpu(where[0], shapes[what], rounds=int(where[1]) if where[1:] else 3, only=where[2:])
    elif what == "base" and where: make_base(where[0], where[1:] == ("small",))
    elif what == "paths" and len(where) == 3: sys.exit(paths(*where))
    else: sys.exit(__doc__)


if __name__ == "__main__": main(*sys.argv[1:])
