"""The benchmark: each job once whatever is killed, configurations apart, report by hand."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from dualreal.backbone import tiny_pipeline
from dualreal.benchmark import (
    SCORERS,
    TRUTH,
    completeness,
    data_folder,
    fingerprint,
    jobs_of,
    load_bench,
    read_results,
    read_table,
    run_job,
    run_jobs,
    search_lr,
    status,
    table_of,
)
from dualreal.cli import main
from dualreal.core import InputError, write_json
from dualreal.data import load_case
from dualreal.metrics import METRICS
from dualreal.report import counted, latex, markdown
from dualreal.toyworld import HELD_OUT_SUBJECTS, render, write_case

SMALL = ('{"reference_encoder": "none", "rank": 4, "groups": 2, "steps": 2, '
         '"training": {"steps": 3, "batch_motion": 2, "batch_identity": 2, "lr": 0.001}}')
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("benchmark")
    (tiny_pipeline(home / "base", tokens=64) / "dualreal.json").write_text(SMALL)
    toy = json.loads((data_folder() / "benchmark/toy.json").read_text())
    toy |= dict(name="tiny", base=str(home / "base"), scorer="pixels", videos=2, images=2, clips=2, seeds=[0],
                cases=toy["cases"][:2], search=toy["search"][:1], objective=["temporal_flickering"],
                tables=dict(all=["dualreal", "lora", "isolated"]))
    write_json(home / "tiny.json", toy)
    os.environ["DUALREAL_CACHE"] = str(home / "cache")
    yield home
    del os.environ["DUALREAL_CACHE"]


@pytest.fixture
def bench(home): return load_bench(str(home / "tiny.json"))


def made(job):
    "A result without a model."
    value = len(job.method) + job.seed
    return dict(rows=[dict(temporal_flickering=v) for v in (value, value + 1)], settings=job.settings, fps=8)


def fragile(job):
    "A result, but the first worker that tries dies half-way."
    mark = Path(os.environ["DUALREAL_MARK"])
    with open(mark / "tries", "a") as f: f.write(f"{job.method} {job.key}\n")
    try: (mark / "died").touch(exist_ok=False)
    except FileExistsError: return made(job)
    os.kill(os.getpid(), signal.SIGKILL)


def test_end_to_end(home, bench, capsys):
    "2 cases x 3 methods by the command; again: nothing is done; then the report."
    out = home / "results"
    command = ["bench", "run", "--bench", str(home / "tiny.json"), "--out", str(out)]
    assert main(command) == 0
    files = {p: p.stat().st_mtime_ns for p in out.rglob("*.json")}
    assert len(files) == 6 and len(list(out.rglob("*.mp4"))) == 6
    assert main(command) == 0
    assert "0 done now" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.json")} == files
    one = json.loads(next(iter(files)).read_text())
    assert len(one["rows"]) == 2 and 0 <= one["rows"][0]["temporal_flickering"] <= 1
    assert {"settings", "seed", "seen", "environment", "seconds", "config"} <= one.keys()
    assert one["environment"]["packages"]["torch"] and one["environment"]["date"]
    assert len({json.dumps(json.loads(p.read_text())["seen"]) for p in files}) == 1  # equal budgets
    for style in ("markdown", "latex", "json"):
        assert main(["bench", "report", *command[2:], "--format", style]) == 0
        assert "LoRA" in (said := capsys.readouterr().out) or "lora" in said
    assert main([*command, "--seeds", "x"]) == 2 and main([*command, "--methods", "unicorn"]) == 2


def test_report_compares_the_same_cases(home, bench, tmp_path, capsys):
    "What one method lacks, or diverged on, no method shows; how many that leaves is said."
    report = ["bench", "report", "--bench", str(home / "tiny.json"), "--out", str(tmp_path)]
    assert main(report) == 2 and "no result" in capsys.readouterr().err
    run_jobs(jobs_of(bench, tmp_path), tmp_path, progress=False, work=made)
    first, second = jobs_of(bench, tmp_path, ["lora"])
    second.path(tmp_path).unlink()
    assert main([*report, "--format", "json", "--methods", "all"]) == 0
    told = capsys.readouterr()
    assert {m: row["temporal_flickering"]["n"] for m, row in json.loads(told.out).items()} == dict.fromkeys(
        ("dualreal", "lora", "isolated"), 1)
    assert "5 of 6 results are recorded, 3 are shown" in told.err
    write_json(first.path(tmp_path), dict(made(first), rows=[], error="loss nan at step 3"))
    assert main([*report, "--format", "json", "--methods", "dualreal,lora"]) == 2
    assert main([*report, "--methods", "dualreal"]) == 0 and "| DualReal | 2 |" in capsys.readouterr().out
    assert main(report) == 2  # its one table needs LoRA
    first.path(tmp_path).write_text("{half")
    assert main([*report, "--methods", "lora"]) == 2 and first.path(tmp_path).name in capsys.readouterr().err


def test_changed_configurations_do_not_mix(bench, tmp_path):
    jobs = jobs_of(bench, tmp_path)
    run_jobs(jobs, tmp_path, progress=False, work=made)
    for change in (dict(steps=7), dict(prompts=("{}",)), dict(sampling=3), dict(videos=1), dict(images=3)):
        other = jobs_of(replace(bench, **change), tmp_path)
        assert not {j.path(tmp_path) for j in jobs} & {j.path(tmp_path) for j in other}, change
        assert status(other, tmp_path)["other"] == 6 and read_results(other, tmp_path) == []
    assert jobs_of(bench, tmp_path, ["lora:rank=2"])[0].key != jobs_of(bench, tmp_path, ["lora"])[0].key


def test_another_base_is_another_configuration(home, bench, tmp_path):
    other = tiny_pipeline(tmp_path / "base", seed=5, tokens=64)
    (other / "dualreal.json").write_text(SMALL)
    shutil.copytree(home / "base", tmp_path / "copy")
    key = lambda base: jobs_of(replace(bench, base=str(base)), tmp_path)[0].key
    assert key(home / "base") == key(tmp_path / "copy") != key(other)


def test_report_by_hand(bench, tmp_path):
    "Mean over a case's videos and seeds, then over cases."
    two = replace(bench, seeds=(0, 1))
    values = {(0, 0): [1., 2.], (0, 1): [3.], (1, 0): [10.], (1, 1): [None, 20.]}  # case, seed -> videos
    jobs = jobs_of(two, tmp_path, ["lora"])
    for job in jobs:
        rows = [dict(clip_t=v) for v in values[two.cases.index(job.case), job.seed]]
        write_json(job.path(tmp_path), dict(rows=rows))
    cell = table_of(read_results(jobs, tmp_path))["lora"]["clip_t"]
    assert cell["mean"] == (2. + 15.) / 2 and cell["n"] == 2 and (cell["low"], cell["high"]) == (2., 15.)
    shown = counted({"LoRA, merged": {"clip_t": cell}})
    assert "| LoRA, merged | 2 | 8.500 [2.000, 15.000] |" in markdown(shown)
    assert r"LoRA, merged & 2 & 8.500 [2.000, 15.000] \\" in latex(shown)


def test_claimed_by_another(bench, tmp_path):
    job = jobs_of(bench, tmp_path)[0]
    path = job.path(tmp_path)
    (tmp_path / ".locks").mkdir()
    with FileLock(tmp_path / ".locks" / f"{path.parent.name}-{path.stem}.lock"):
        assert run_job(job, tmp_path, made) == "claimed" and not path.exists()
    assert run_job(job, tmp_path, made) == "done" and run_job(job, tmp_path, made) == "there"


def test_failures_do_not_stop_the_others(bench, tmp_path):
    def work(job):
        if job.method == "lora": raise OSError("no luck")
        return made(job)
    jobs = jobs_of(bench, tmp_path)
    ended = run_jobs(jobs, tmp_path, progress=False, work=work)
    assert ended["done"] == 4 and len(ended["failed"]) == 2
    assert all("no luck" in why for why in ended["failed"].values())
    assert run_jobs(jobs, tmp_path, progress=False, work=made)["done"] == 2


def test_divergence_is_a_result(home, bench, tmp_path):
    "A rate that explodes is recorded, is no row of the report, and is not chosen."
    wild = replace(bench, steps=8)
    found = search_lr(wild, tmp_path, ["lora"], lrs=(1e-3, 1e30), progress=False)["lora"]
    assert found["lr"] == 1e-3 and found["tried"]["1e+30"] is None
    assert {j.lr for j in jobs_of(wild, tmp_path, ["lora"])} == {1e-3}


def test_killed_run_continues(home, bench, tmp_path):
    "The whole process group dies after the first result; the next run finishes, and keeps that result."
    command = [sys.executable, "-m", "dualreal.cli", "bench", "run", "--bench", str(home / "tiny.json"),
               "--out", str(tmp_path), "--methods", "lora"]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    going = subprocess.Popen(command, env=env, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    there = lambda: list(tmp_path.rglob("lora/[!.]*.json"))  # not the hidden half of one
    while not there() and going.poll() is None and time.time() < deadline: time.sleep(.02)
    os.killpg(going.pid, signal.SIGKILL)
    going.wait()
    before = {p: p.read_bytes() for p in there()}
    jobs = jobs_of(bench, tmp_path, ["lora"])
    assert before
    assert run_jobs(jobs, tmp_path, progress=False)["done"] == len(jobs) - len(before)
    assert all(p.read_bytes() == text for p, text in before.items())
    assert status(jobs, tmp_path) == dict(methods=dict(lora=dict(done=2, diverged=0, missing=0)), other=0)


@pytest.mark.slow
def test_killed_worker_of_the_pool(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("DUALREAL_MARK", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
    jobs = jobs_of(bench, tmp_path)
    assert run_jobs(jobs, tmp_path, workers=2, progress=False, work=fragile) == dict(done=6, failed={})
    assert len(list(tmp_path.rglob("*/*/*.json"))) == 6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
def test_workers_end_with_their_parent(home, bench, tmp_path):
    "Only the parent is killed; nobody computes on."
    command = [sys.executable, "-m", "dualreal.cli", "bench", "run", "--bench", str(home / "tiny.json"),
               "--out", str(tmp_path), "--workers", "2"]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    going = subprocess.Popen(command, env=env, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    tasks = Path(f"/proc/{going.pid}/task")
    spawned = lambda: [n for p in tasks.glob("*/children") for n in p.read_text().split()]
    there, deadline = lambda: list(tmp_path.rglob("*/*/[!.]*.json")), time.time() + 300
    while not there() and going.poll() is None and time.time() < deadline: time.sleep(.05)
    workers = spawned()
    going.kill()
    going.wait()
    assert len(workers) >= 2
    alive = lambda: [p for p in workers if Path(f"/proc/{p}").exists()]
    deadline = time.time() + 60
    while alive() and time.time() < deadline: time.sleep(.2)
    assert not alive()


@pytest.mark.slow
def test_killed_worker_of_a_ray_cluster(bench, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("DUALREAL_MARK", str(tmp_path))
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try: ended = run_jobs(jobs_of(bench, tmp_path), tmp_path, ray="local", progress=False, work=fragile)
    finally: ray.shutdown()
    assert ended == dict(done=6, failed={}) and len(list(tmp_path.rglob("*/*/*.json"))) == 6
    tries = (tmp_path / "tries").read_text().split("\n")[:-1]
    assert len(tries) >= 7 and len(set(tries)) == 6  # the killed one was tried again


def test_lists():
    lists = data_folder() / "benchmark"
    names = ("subjects", "motions", "cases", "ablation_cases")
    subjects, motions, cases, few = (read_table(lists / f"{n}.csv") for n in names)
    assert [len(t) for t in (subjects, motions, cases, few)] == [50, 21, 50, 10]
    for table in (cases, few):
        assert {r["subject"] for r in table} <= {r["subject"] for r in subjects}
        assert {r["motion"] for r in table} <= {r["motion"] for r in motions}
    published = load_bench("published")
    assert len(set(published.prompts)) == 50 and all(p.count("{}") == 1 for p in published.prompts)
    assert not [c for c in published.search if c in list(published.cases)]
    longest = max(len(p.format("a plushie happysad * is skateBoarding-Front")) for p in published.prompts)
    assert longest < 120  # far below what CLIP reads


def test_completeness(tmp_path):
    write_case(tmp_path / "case", images=2, clips=2)
    (tmp_path / "subjects").mkdir()
    (tmp_path / "case/identity").rename(tmp_path / "subjects/dog6")
    (tmp_path / "case/motion").rename(tmp_path / "playingGuitar")
    told = completeness(tmp_path)
    assert told["ready"] == [dict(subject="dog6", motion="playingGuitar")] and told["cases"] == 50
    assert told["short"]["dog6"]["there"] == 2 and len(told["missing"]) == 69


def test_bad_input(home, tmp_path):
    with pytest.raises(InputError, match="use toy"): load_bench("unicorn")
    write_json(tmp_path / "odd.json", dict(json.loads((home / "tiny.json").read_text()), unicorn=1))
    with pytest.raises(InputError, match="unicorn"): load_bench(str(tmp_path / "odd.json"))
    assert main(["bench", "data"]) == 2
    with pytest.raises(InputError, match="scorer 'mine' is none of toy, published, pixels"):
        run_jobs(jobs_of(load_bench(str(home / "tiny.json"), scorer="mine"), tmp_path), tmp_path)


def test_toy_scores_of_the_truth(tmp_path):
    "A drawn clip of the case scores high on identity and motion, one of another case low."
    write_case(tmp_path, "teal_cat", "swinging", images=2, clips=2)
    case = load_case(tmp_path / "identity", tmp_path / "motion")
    score = SCORERS["toy"](case, dict(subject="teal_cat", motion="swinging"))
    right, wrong = (render(HELD_OUT_SUBJECTS[s], m, "snow", seed=3)[0]
                    for s, m in (("teal_cat", "swinging"), ("coral_fish", "hopping")))
    mine, other = (score(clip, 8, "a cat * is swinging in the snow") for clip in (right, wrong))
    assert mine["identity"] > .7 > .5 > other["identity"]
    assert mine["motion"] > .7 > other["motion"]
    assert {*METRICS, *TRUTH} <= mine.keys() and mine["clip_i"] > other["clip_i"]


@pytest.mark.parametrize("flags, said", [
    (["run", "--videos", "0"], "videos 0: give 1 or more"), (["run", "--sampling", "-1"], "sampling -1"),
    (["run", "--workers", "0"], "workers 0"), (["run", "--lrs", "0.1"], "--lrs is for bench search"),
    (["search", "--lrs", "nan"], "lrs: give positive"),
    (["status", "--data", "nowhere"], "nowhere is not a folder"),
    (["run", "--methods", "isolated:motion_steps=abc"], "motion_steps is int | None, not 'abc'"),
    (["data", "--data", "nowhere"], "nowhere is not a folder")])
def test_flags_that_cannot_be(home, tmp_path, capsys, flags, said):
    assert main(["bench", *flags, "--bench", str(home / "tiny.json"), "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.rglob("*.json"))


def test_damaged_learning_rates(bench, tmp_path):
    for text in ("{half", '{"lora": 0.1}', '[1]'):
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (tmp_path / "tiny/learning_rates.json").write_text(text)
        with pytest.raises(InputError, match="learning_rates.json"): jobs_of(bench, tmp_path)


def test_pictures_of_the_published_benchmark_are_the_users(home, bench, tmp_path):
    "Without a folder: one sentence, also from a pool. With one: the same files elsewhere are the same case."
    alien = replace(bench, cases=({"subject": "dog6", "motion": "playingGuitar"},))
    for workers in (1, 2):
        with pytest.raises(InputError, match="give their folder with --data"):
            run_jobs(jobs_of(alien, tmp_path, ["base"]), tmp_path, workers, progress=False)
    write_case(tmp_path / "case", images=2, clips=2)
    (tmp_path / "case/identity").rename(tmp_path / "case/dog6")
    (tmp_path / "case/motion").rename(tmp_path / "case/playingGuitar")
    shutil.copytree(tmp_path / "case", tmp_path / "copy")
    key = lambda folder: jobs_of(replace(alien, data=str(tmp_path / folder)), tmp_path, ["base"])[0].key
    assert key("case") == (before := key("copy"))
    next((tmp_path / "copy/dog6").rglob("*.png")).unlink()
    fingerprint.cache_clear()
    assert key("copy") != before


def test_best_rate_on_the_edge_is_not_the_end(bench, tmp_path):
    "Ever larger rates win: two more are tried, and written down with what was asked of them."
    def work(job):
        value = {1e-4: .1, 1e-3: .2, 1e-2: .3, .1: .4, 1.: .5}[job.lr]
        return dict(rows=[dict(temporal_flickering=value)] * 2, settings=job.settings, fps=8)
    found = search_lr(bench, tmp_path, ["lora"], lrs=(1e-4, 1e-3, 1e-2), progress=False, work=work)["lora"]
    assert found["lr"] == 1. and len(found["tried"]) == 5 and {"steps", "videos", "base"} <= found.keys()
    null = lambda job: dict(rows=[dict(temporal_flickering=None)], settings=job.settings, fps=8)
    with pytest.raises(InputError, match="lacks a score"):
        search_lr(bench, tmp_path, ["isolated"], lrs=(1e-3,), progress=False, work=null)


@pytest.mark.parametrize("text, said", [
    ("{half", "is no benchmark in JSON"), ("[1]", "is no benchmark in JSON"),
    ('{"name": "mine", "cases": []}', "lacks search, prompts, tables, objective")])
def test_broken_benchmark_files(tmp_path, text, said):
    (tmp_path/"mine.json").write_text(text)
    with pytest.raises(InputError, match=said): load_bench(str(tmp_path/"mine.json"))
