"""The benchmark: each job once whatever is killed, configurations apart, report by hand."""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from configparser import ConfigParser
from dataclasses import asdict, make_dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import dualreal.toy.truth  # noqa: F401  enters the toy among the worlds
from dualreal import encoders
from dualreal.cli import main
from dualreal.core import InputError, write_json
from dualreal.data import load_case
from dualreal.experiments import benchmark, jobs, results
from dualreal.experiments.benchmark import (
    Job,
    absent,
    completeness,
    data_folder,
    differs,
    fingerprint,
    foreign,
    jobs_of,
    load_bench,
    paper_bench,
    rates_file,
    read_table,
)
from dualreal.experiments.jobs import (
    Metrics,
    networks_of,
    read_jobs,
    run_job,
    run_jobs,
    scorer_of,
    search_lr,
    write_jobs,
)
from dualreal.experiments.results import (
    TRUTH,
    collect,
    counted,
    gap,
    lock_of,
    paired,
    read_results,
    save,
    spent,
    status,
    table_of,
)
from dualreal.metrics import METRICS
from dualreal.report import latex, markdown
from dualreal.toy.bases import tiny_pipeline
from dualreal.toy.world import HELD_OUT_SUBJECTS, render, write_case

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


def mistaken(job): raise InputError("a damaged picture")


def partly(job):
    "One method of three hears of wrong input, late."
    if job.method != "lora": return made(job)
    time.sleep(2)
    raise InputError("a damaged picture")


def filmed(job):
    "A result with a video."
    return made(job) | dict(kept=[np.zeros((9, 32, 32, 3), np.uint8)])


def fragile(job):
    "A result, but the first worker that tries dies half-way."
    mark = Path(os.environ["DUALREAL_MARK"])
    with open(mark / "tries", "a") as f: f.write(f"{job.method} {job.key}\n")
    try: (mark / "died").touch(exist_ok=False)
    except FileExistsError: return made(job)
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(job):
    "One job kills whoever tries it."
    if (job.method, job.case["subject"]) == ("lora", "teal_cat"): os.kill(os.getpid(), signal.SIGKILL)
    return made(job)


def sleepy(job):
    "A job that takes too long."
    (Path(os.environ["DUALREAL_MARK"]) / f"began-{os.getpid()}").touch()
    time.sleep(60)


def worker(work, asked, out, folder):
    "How to start a process that does one of these: this file is the command."
    write_jobs(folder / "jobs.json", asked)
    return [sys.executable, str(Path(__file__)), work.__name__, str(folder / "jobs.json"), str(out)]


def tables(out):
    "Every file of the results, by content."
    return {p: p.read_bytes() for p in out.rglob("*.*") if p.is_file() and ".locks" not in p.parts}


def test_end_to_end(home, bench, capsys):
    "2 cases x 3 methods by the command; again: nothing is done; then the report."
    out = home / "results"
    command = ["bench", "run", "--bench", str(home / "tiny.json"), "--out", str(out)]
    assert main(command) == 0
    asked, files = jobs_of(load_bench(str(home / "tiny.json")), out), tables(out)
    found = read_results(asked, out)
    assert len(found) == 6 == len(list(out.rglob("*.mp4"))) and all(len(r["videos"]) == 1 for r in found)
    assert main(command) == 0
    assert "0 done now" in capsys.readouterr().out
    assert tables(out) == files
    assert sorted(p.name for p in files if p.suffix != ".mp4") == ["all.csv", "jobs.jsonl", "shared.json"]
    one = found[0]
    assert len(one["rows"]) == 2 and 0 <= one["rows"][0]["temporal_flickering"] <= 1
    assert {"settings", "seed", "seen", "environment", "seconds", "config"} <= one.keys()
    assert one["environment"]["packages"]["torch"] and one["environment"]["date"]
    assert len({json.dumps(r["seen"]) for r in found}) == 1  # equal budgets
    for style in ("markdown", "latex", "json"):
        assert main(["bench", "report", *command[2:], "--format", style]) == 0
        assert "LoRA" in (said := capsys.readouterr().out) or "lora" in said
    assert main([*command, "--seeds", "x"]) == 2 and main([*command, "--methods", "unicorn"]) == 2


def test_report_compares_the_same_cases(home, bench, tmp_path, capsys):
    "What one method lacks, or diverged on, no method shows; how many that leaves is said."
    report = ["bench", "report", "--bench", str(home / "tiny.json"), "--out", str(tmp_path)]
    assert main(report) == 2 and "no result" in capsys.readouterr().err
    first, second = jobs_of(bench, tmp_path, ["lora"])
    run_jobs([j for j in jobs_of(bench, tmp_path) if j != second], tmp_path, progress=False, work=made)
    assert main([*report, "--format", "json", "--methods", "all"]) == 0
    told = capsys.readouterr()
    assert {m: row["temporal_flickering"]["n"] for m, row in json.loads(told.out).items()} == dict.fromkeys(
        ("dualreal", "lora", "isolated"), 1)
    assert "5 of 6 results are recorded, 3 are shown" in told.err
    save(first, tmp_path, dict(made(first), rows=[], error="loss nan at step 3"))
    assert main([*report, "--format", "json", "--methods", "dualreal,lora"]) == 2
    assert main([*report, "--methods", "dualreal"]) == 0 and "| DualReal | 2 |" in capsys.readouterr().out
    assert main(report) == 2  # its one table needs LoRA
    (tmp_path / "tiny/jobs.jsonl").write_text("{half")
    assert main([*report, "--methods", "lora"]) == 2 and "jobs.jsonl" in capsys.readouterr().err


def test_changed_configurations_do_not_mix(bench, tmp_path):
    jobs = jobs_of(bench, tmp_path)
    run_jobs(jobs, tmp_path, progress=False, work=made)
    for change in (dict(steps=7), dict(prompts=("{}",)), dict(sampling=3), dict(videos=1), dict(images=3)):
        other = jobs_of(replace(bench, **change), tmp_path)
        assert not {j.key for j in jobs} & {j.key for j in other}, change
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
        save(job, tmp_path, dict(rows=rows))
    cell = table_of(read_results(jobs, tmp_path))["lora"]["clip_t"]
    assert cell["mean"] == (2. + 15.) / 2 and cell["n"] == 2 and (cell["low"], cell["high"]) == (2., 15.)
    shown = counted({"LoRA, merged": {"clip_t": cell}})
    assert "| LoRA, merged | 2 | 8.500 [2.000, 15.000] |" in markdown(shown)
    assert r"LoRA, merged & 2 & 8.500 [2.000, 15.000] \\" in latex(shown)


def claim(job, out):
    "Another process is at it."
    return lock_of(job.bench, out, job.name)


def test_claimed_by_another(home, bench, tmp_path, capsys):
    "It is neither done nor there, and is told so."
    jobs = jobs_of(bench, tmp_path)
    with claim(jobs[0], tmp_path):
        assert run_job(jobs[0], tmp_path, made) == "claimed" and not read_results(jobs, tmp_path)
        ended = run_jobs(jobs, tmp_path, progress=False, work=made)
        assert ended == dict(done=5, claimed=1, failed={})
        assert main(["bench", "run", "--bench", str(home / "tiny.json"), "--out", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert "0 done now, 0 failed, 1 with another process, 5 were there" in said
    assert run_job(jobs[0], tmp_path, made) == "done" and run_job(jobs[0], tmp_path, made) == "there"


def test_interrupted_between_video_and_result(bench, tmp_path, monkeypatch):
    "A video alone is no result; the next run makes both."
    job = jobs_of(bench, tmp_path)[0]
    def interrupted(path, obj): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(results, "write_json", interrupted)
        with pytest.raises(KeyboardInterrupt): run_job(job, tmp_path, filmed)
    video = tmp_path / "tiny/videos" / f"{job.name}.0.mp4"
    assert video.exists() and read_results([job], tmp_path) == []
    assert status([job], tmp_path)["methods"]["dualreal"] == dict(done=0, diverged=0, missing=1)
    video.write_bytes(b"half")
    assert run_jobs([job], tmp_path, progress=False, work=filmed)["done"] == 1
    assert read_results([job], tmp_path)[0]["videos"] == [video] and video.stat().st_size > 100


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


def apart(command):
    "The leader of a process group of its own."
    os.setsid()
    sys.exit(main(command))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: the run starts from a warm parent")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_killed_run_continues(home, bench, tmp_path):
    "The whole process group dies after the first result; the next run finishes, and keeps that result."
    where = ["--bench", str(home / "tiny.json"), "--out", str(tmp_path)]
    command = ["bench", "run", *where, "--methods", "lora"]
    jobs, deadline = jobs_of(bench, tmp_path, ["lora"]), time.time() + 300
    going = multiprocessing.get_context("fork").Process(target=apart, args=(command,))
    going.start()
    while not (before := read_results(jobs, tmp_path)) and going.is_alive() and time.time() < deadline:
        time.sleep(.02)
    os.killpg(going.pid, signal.SIGKILL)
    going.join()
    before = read_results(jobs, tmp_path)
    assert before and not (tmp_path / "tiny/jobs.jsonl").exists()  # it waits in the cache
    assert run_jobs(jobs, tmp_path, progress=False)["done"] == len(jobs) - len(before)
    after = {r["key"]: r for r in read_results(jobs, tmp_path)}
    assert (tmp_path / "tiny/jobs.jsonl").exists() and all(after[r["key"]] == r for r in before)
    assert status(jobs, tmp_path) == dict(methods=dict(lora=dict(done=2, diverged=0, missing=0)), other=0)


@pytest.mark.slow
def test_killed_worker_of_the_pool(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("DUALREAL_MARK", str(tmp_path))
    asked = jobs_of(bench, tmp_path)
    command = worker(fragile, asked, tmp_path, tmp_path)
    ended = run_jobs(asked, tmp_path, workers=2, progress=False, command=command)
    assert ended == dict(done=6, claimed=0, failed={}) and len(read_results(asked, tmp_path)) == 6
    assert tries(tmp_path) == [1, 1, 1, 1, 1, 2]  # only the killed one twice


@pytest.mark.slow
def test_job_that_kills_is_blamed(bench, tmp_path):
    "After three processes; the others' jobs are done."
    asked = jobs_of(bench, tmp_path)
    command = worker(deadly, asked, tmp_path, tmp_path)
    ended = run_jobs(asked, tmp_path, workers=2, progress=False, command=command)
    (name, why), = ended["failed"].items()
    assert ended["done"] == 5 and name.startswith("lora-teal_cat") and "died 3 times" in why


@pytest.mark.slow
def test_worker_that_cannot_start(bench, tmp_path):
    with pytest.raises(RuntimeError, match="a worker cannot start"):
        run_jobs(jobs_of(bench, tmp_path), tmp_path, 2, progress=False, command=[sys.executable, "-c", "1/0"])


def tries(folder):
    "How often each job of `fragile` ran."
    return sorted(Counter((folder / "tries").read_text().splitlines()).values())


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
    there, deadline = lambda: read_results(jobs_of(bench, tmp_path), tmp_path), time.time() + 300
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
    assert ended == dict(done=6, claimed=0, failed={})
    assert len(read_results(jobs_of(bench, tmp_path), tmp_path)) == 6
    assert tries(tmp_path) == [1, 1, 1, 1, 1, 2]  # only the killed one twice


class Wrapped(Exception):
    "As Ray brings a worker's failure: its traceback, and the cause."
    def __init__(self, cause):
        super().__init__("a traceback\nof lines")
        self.cause = cause


def ray_here(cpus=2):
    "Ray's calls, in this process: a job is done when its record is fetched."
    ray, given = types.ModuleType("ray"), []
    ray.given, ray.cancelled, ray.most = given, [], 0
    ray.cluster_resources = lambda: dict(CPU=float(cpus))
    ray.init = lambda **how: None
    ray.cancel = lambda ref, force: ray.cancelled.append(ref)
    def remote(**how): return lambda work: types.SimpleNamespace(remote=partial(give, work))
    def give(work, job):
        given.append((work, job))
        return len(given) - 1
    def wait(refs):
        ray.most = max(ray.most, len(refs))
        return refs[-1:], refs[:-1]
    def get(ref):
        work, job = given[ref]
        try: return work(job)
        except Exception as e: raise Wrapped(e) from e
    ray.remote, ray.wait, ray.get = remote, wait, get
    return ray


@pytest.fixture
def ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", found := ray_here())
    return found


def test_ray_claims_what_it_gives(bench, tmp_path, ray):
    "A job with the cluster is claimed, one that another process has is not given; few are given at once."
    jobs, seen = jobs_of(bench, tmp_path), []
    def work(job):
        seen.append(run_job(job, tmp_path, made))
        return made(job)
    with claim(jobs[0], tmp_path):
        ended = run_jobs(jobs, tmp_path, ray="local", progress=False, work=work)
    assert ended == dict(done=5, claimed=1, failed={}) and seen == ["claimed"] * 5
    assert jobs[0] not in [job for _, job in ray.given] and ray.most == 4
    assert run_jobs(jobs, tmp_path, ray="local", progress=False, work=made)["done"] == 1
    assert status(jobs, tmp_path)["methods"]["lora"]["done"] == 2


def test_ray_says_a_mistake_in_one_line(bench, tmp_path, ray):
    "An input error ends the run, nothing stays claimed; other failures cost their job only."
    def unlucky(job):
        if job.method == "lora": raise OSError("no luck")
        return made(job)
    def mistaken(job): raise InputError("one sentence")
    jobs = jobs_of(bench, tmp_path)
    with pytest.raises(InputError, match="^one sentence$"):
        run_jobs(jobs, tmp_path, ray="local", progress=False, work=mistaken)
    assert len(ray.cancelled) == 3
    ended = run_jobs(jobs, tmp_path, ray="local", progress=False, work=unlucky)
    assert ended["done"] == 4 and set(ended["failed"].values()) == {"OSError: no luck"}
    def unreachable(**how): raise ConnectionError("nobody there")
    ray.init = unreachable
    with pytest.raises(InputError, match="--ray ray://x:1: nobody there"):
        run_jobs(jobs, tmp_path, ray="ray://x:1", progress=False, work=made)


def test_the_extra_knows_ray_addresses():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    assert config["DEFAULT"]["ray_requirements"] == "ray[client]"


PARENT = """
import signal, sys
from dualreal.experiments.jobs import read_jobs, run_jobs

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests run in the background
name, out, *command = sys.argv[1:]
run_jobs(read_jobs(name), out, workers=2, command=command)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_workers(bench, tmp_path, sent):
    "Ctrl-C: what waits is not begun, what runs is killed, and the command ends."
    out = tmp_path / "out"
    command = worker(sleepy, jobs_of(bench, out), out, tmp_path)
    env = dict(os.environ, PYTHONPATH=str(ROOT), DUALREAL_MARK=str(tmp_path))
    with open(tmp_path / "said", "w") as said:
        parent = [sys.executable, "-c", PARENT, str(tmp_path / "jobs.json"), str(out), *command]
        going = subprocess.Popen(parent, env=env, start_new_session=True, stderr=said)
    began, deadline = lambda: list(tmp_path.glob("began-*")), time.time() + 120
    while len(began()) < 2 and going.poll() is None and time.time() < deadline: time.sleep(.1)
    try:
        going.send_signal(sent)
        assert going.wait(timeout=15)
        assert sent == signal.SIGTERM or "KeyboardInterrupt" in (tmp_path / "said").read_text()
        assert len(began()) == 2 and not read_results(jobs_of(bench, out), out)
        alive = lambda: [p for m in began() if (p := Path("/proc", m.name.removeprefix("began-"))).exists()]
        deadline = time.time() + 15  # they hear of a parent that was killed
        while alive() and time.time() < deadline: time.sleep(.1)
        assert not alive()
    finally:
        if going.poll() is None: os.killpg(going.pid, signal.SIGKILL)


def test_lists():
    lists = data_folder() / "benchmark"
    names = ("subjects", "motions", "cases", "ablation_cases")
    subjects, motions, cases, few = (read_table(lists / f"{n}.csv") for n in names)
    assert [len(t) for t in (subjects, motions, cases, few)] == [50, 21, 50, 10]
    for table in (cases, few):
        assert {r["subject"] for r in table} <= {r["subject"] for r in subjects}
        assert {r["motion"] for r in table} <= {r["motion"] for r in motions}
    assert sum(c in cases for c in few) == 8  # two ablation cases are no case of the comparison
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


@pytest.fixture
def folder(tmp_path):
    "A user's pictures of dog6 and clips of playingGuitar, and an empty folder for cat."
    write_case(tmp_path / "parts", images=2, clips=2)
    (tmp_path / "parts/identity").rename(tmp_path / "parts/dog6")
    (tmp_path / "parts/motion").rename(tmp_path / "parts/playingGuitar")
    (tmp_path / "parts/cat").mkdir()
    return tmp_path / "parts"


def test_cases_that_cannot_run_are_left_out(home, tmp_path, folder, capsys):
    "One case of three can run: it does, is counted and reported; the others are named."
    parts = [("dog6", "playingGuitar"), ("cat", "playingGuitar"), ("dog6", "PullUps")]
    mine = json.loads((home / "tiny.json").read_text()) | dict(
        name="mine", data=str(folder), cases=[dict(subject=s, motion=m) for s, m in parts])
    write_json(tmp_path / "mine.json", mine)
    command = lambda action, *more: main(["bench", action, "--bench", str(tmp_path / "mine.json"), "--out",
                                          str(tmp_path / "out"), "--methods", "base", *more])
    for action, said in (("run", "1 done now"), ("status", "1 done"), ("report", "base | 1 |")):
        assert command(action) == 0
        told = capsys.readouterr()
        assert said in told.out and told.err.count("cat-playingGuitar, dog6-PullUps") == 1
    assert command("status", "--cases", "dog6-playingGuitar") == 0
    assert "left out" not in capsys.readouterr().err
    assert command("run", "--cases", "dog6-PullUps") == 2
    assert "lacks pictures or clips of dog6-PullUps: no case" in capsys.readouterr().err
    assert absent(load_bench(str(tmp_path / "mine.json"))) == ["cat-playingGuitar", "dog6-PullUps"]


def test_data_says_what_can_run(folder, capsys):
    "In the words of `--cases`."
    assert main(["bench", "data", "--data", str(folder)]) == 0
    flag, names = capsys.readouterr().out.splitlines()[1].split()
    assert (flag, names) == ("--cases", "dog6-playingGuitar")
    published = load_bench("published", data=str(folder))
    assert [j.case for j in jobs_of(published, folder, ["base"], names.split(","))] == [
        dict(subject="dog6", motion="playingGuitar")]


def test_missing_network_stops_before_training(bench, tmp_path, monkeypatch):
    "A result without a score would count as done for ever; what is said can be done."
    lost = {key: encoders.Missing(name, "nobody answers") for key, (name, *_) in encoders.PUBLISHED.items()}
    monkeypatch.setattr(encoders, "load_encoders", lambda *a, **k: lost)
    networks_of.cache_clear()
    monkeypatch.setattr("dualreal.trainer.prepare", lambda *a, **k: pytest.fail("trained"))
    jobs = jobs_of(replace(bench, scorer="published"), tmp_path, ["lora"])
    with pytest.raises(InputError, match="`hf download facebook/dino-vits16`") as said:
        run_jobs(jobs, tmp_path, progress=False)
    assert "save https://" in str(said.value) and "--weights" not in str(said.value)
    assert not read_results(jobs, tmp_path)
    none = dict(dino_i=encoders.Missing("toy-dino", "a recipe makes it"))
    monkeypatch.setattr(encoders, "load_encoders", lambda *a, **k: none)
    networks_of.cache_clear()
    with pytest.raises(InputError, match="a recipe makes it"):
        run_jobs(jobs_of(replace(bench, scorer="toy"), tmp_path, ["lora"]), tmp_path, progress=False)


def test_rate_of_the_longest_beginning(bench, tmp_path):
    rate = {"isolated": .1, "isolated:scale=1.0": .2, "dualreal": .3}
    write_json(rates_file(bench, tmp_path), {k: dict(lr=v) for k, v in rate.items()})
    own = lambda spec: jobs_of(bench, tmp_path, [spec])[0].lr
    specs = "isolated:scale=1.0:rank=8", "isolated:rank=8", "without_mask:scale=1.0", "lora"
    assert [own(s) for s in specs] == [.2, .1, .3, None]


def test_rates_of_other_conditions_are_said(home, bench, tmp_path, capsys, monkeypatch):
    search_lr(bench, tmp_path, ["lora"], lrs=(1e-3,), progress=False, work=made)
    other = tiny_pipeline(tmp_path / "base", seed=5, tokens=64)
    (other / "dualreal.json").write_text(SMALL)
    def told(**changes):
        changed = replace(bench, **changes)
        jobs = jobs_of(changed, tmp_path, ["lora:rank=2", "lora:lr=0.1", "isolated"])
        return foreign(changed, tmp_path, jobs)
    assert told() == told(steps=3) == {}  # 3 is the base's own
    assert told(steps=7) == {"lora:rank=2": ["steps"]} and told(base=str(other)) == {"lora:rank=2": ["base"]}
    assert told(scorer="toy") == {"lora:rank=2": ["networks"]}
    monkeypatch.setattr(jobs, "run_jobs", lambda *a, **k: dict(done=0, claimed=0, failed={}))
    command = ["bench", "run", "--bench", str(home / "tiny.json"), "--out", str(tmp_path)]
    assert main([*command, "--methods", "lora"]) == 0 and "was searched with" not in capsys.readouterr().out
    assert main([*command, "--methods", "lora", "--base", str(other), "--steps", "9"]) == 0
    said = "the learning rate of lora was searched with another base and other steps"
    assert said in capsys.readouterr().out


def test_a_search_goes_on(bench, tmp_path):
    "What was tried before counts, unless something else was asked."
    def work(job): return dict(rows=[dict(temporal_flickering=job.lr)], settings=job.settings, fps=8)
    search = lambda lrs, b=bench: search_lr(b, tmp_path, ["lora"], lrs=lrs, progress=False, work=work)["lora"]
    search((.1, .2))
    again = search((.1,))
    assert again["lr"] == .2 and again["tried"] == {"0.1": .1, "0.2": .2}
    for change in (dict(steps=7), dict(prompts=("{}",))):
        assert search((.1,), replace(bench, **change))["tried"] == {"0.1": .1}


def test_two_searches_at_once(bench, tmp_path):
    "Neither loses what the other writes; jobs of the other are no result yet, and that is said."
    def work(job):
        write_json(rates_file(bench, tmp_path), dict(isolated=dict(lr=.5)))  # the other ends meanwhile
        return made(job)
    found = search_lr(bench, tmp_path, ["lora"], lrs=(.1,), progress=False, work=work)
    assert {k: v["lr"] for k, v in found.items()} == dict(isolated=.5, lora=.1)
    assert json.loads(rates_file(bench, tmp_path).read_text()) == found
    job = Job(bench, "lora", bench.search[0], 0, .2)
    with claim(job, tmp_path), pytest.raises(InputError, match="another process is at 1 jobs"):
        search_lr(bench, tmp_path, ["lora"], lrs=(.1, .2), progress=False, work=made)


def test_what_differs_from_the_paper():
    "Also on its own base; how much a table of the paper holds may be said."
    base, own = load_bench("published").base, "The published experiment, on its own base."
    assert differs(load_bench("published")) == differs(paper_bench("ablation", base)) == own
    for change, said in ((dict(steps=9), "steps 9 (1000)"), (dict(seeds=[0, 1]), "and 2 seeds (50 cases"),
                         (dict(videos=3), "50 cases of 3 videos (50 cases of 50 videos)")):
        told = differs(paper_bench("comparison", base, **change))
        assert said in told and "not run here" not in told
    some = load_bench("published", cases=read_table(data_folder() / "benchmark/cases.csv")[:3])
    assert "3 cases of 50 videos (50 cases of 50 videos)" in differs(some)
    assert differs(some, cases=3) == own
    toy = differs(load_bench("toy"), cases=10)
    assert "2 seeds (10 cases of 50 videos)" in toy
    assert toy.endswith("The paper's was not run here, on any GPU.")


def test_bad_input(home, tmp_path):
    with pytest.raises(InputError, match="use toy"): load_bench("unicorn")
    write_json(tmp_path / "odd.json", dict(json.loads((home / "tiny.json").read_text()), unicorn=1))
    with pytest.raises(InputError, match="unicorn"): load_bench(str(tmp_path / "odd.json"))
    assert main(["bench", "data"]) == 2
    with pytest.raises(InputError, match="scorer 'mine' is none of toy, published, pixels"):
        run_jobs(jobs_of(load_bench(str(home / "tiny.json"), scorer="mine"), tmp_path), tmp_path)
    for what in ("search", "objective", "lrs"):
        with pytest.raises(InputError, match=what):
            search_lr(load_bench(str(home / "tiny.json"), **{what: ()}), tmp_path)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_bad_case_costs_itself_only(bench, tmp_path, monkeypatch, workers):
    "But where the first to end hears of wrong input, all do."
    if workers == 1: monkeypatch.setattr(time, "sleep", lambda seconds: None)  # one after the other as it is
    asked = jobs_of(bench, tmp_path)
    def run(work):
        how = dict(command=worker(work, asked, tmp_path, tmp_path)) if workers > 1 else dict(work=work)
        return run_jobs(asked, tmp_path, workers, progress=False, **how)
    with pytest.raises(InputError, match="^a damaged picture$"): run(mistaken)
    ended = run(partly)
    assert ended["done"] == 4 and set(ended["failed"].values()) == {"a damaged picture"}


def test_scorers_of_a_users_case(tmp_path, monkeypatch):
    "A subject may be a video, as some of the published; the truth of the toy knows its own only."
    write_case(tmp_path, "teal_cat", "swinging", images=2, clips=2)
    (tmp_path / "dog6/videos").mkdir(parents=True)
    shutil.copy(next((tmp_path / "motion").rglob("*.mp4")), tmp_path / "dog6/videos")
    case = load_case(tmp_path / "dog6", tmp_path / "motion", "dog *")
    job = Job(load_bench("toy"), "base", dict(subject="dog6", motion="swinging"), 0)
    assert Metrics(case, "toy").references.images
    with pytest.raises(InputError, match="knows no subject 'dog6'"): scorer_of(job, case)


def test_toy_scores_of_the_truth(tmp_path):
    "A drawn clip of the case scores high on identity and motion, one of another case low."
    write_case(tmp_path, "teal_cat", "swinging", images=2, clips=2)
    case = load_case(tmp_path / "identity", tmp_path / "motion")
    score = scorer_of(Job(load_bench("toy"), "base", dict(subject="teal_cat", motion="swinging"), 0), case)
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
    (["run", "--seeds", "0,0"], "seeds: give each once"),
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


def published(bench): return replace(bench, cases=({"subject": "dog6", "motion": "playingGuitar"},))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_pictures_of_the_published_benchmark_are_not_here(bench, tmp_path, workers):
    "One sentence, also from a pool."
    with pytest.raises(InputError, match="give their folder with --data"):
        run_jobs(jobs_of(published(bench), tmp_path, ["base"]), tmp_path, workers, progress=False)


def test_pictures_of_the_published_benchmark_are_the_users(home, bench, tmp_path):
    "The same files elsewhere are the same case."
    alien = published(bench)
    write_case(tmp_path / "case", images=2, clips=2)
    (tmp_path / "case/identity").rename(tmp_path / "case/dog6")
    (tmp_path / "case/motion").rename(tmp_path / "case/playingGuitar")
    shutil.copytree(tmp_path / "case", tmp_path / "copy")
    key = lambda folder: jobs_of(replace(alien, data=str(tmp_path / folder)), tmp_path, ["base"])[0].key
    assert key("case") == (before := key("copy"))
    (tmp_path / "copy/dog6/.cache").mkdir()
    (tmp_path / "copy/dog6/.cache/a.metadata").write_text("when it was fetched")
    fingerprint.cache_clear()
    assert key("copy") == before
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


def test_later_settings_rename_nothing(home, bench, tmp_path, monkeypatch):
    "A field that trainings, bases or methods get one day, with its default; another value counts."
    keys = lambda: [j.key for j in jobs_of(bench, tmp_path)]
    before, size = keys(), benchmark.base_size(home / "base")
    given = lambda size: monkeypatch.setattr(benchmark, "base_size", lambda base: size)
    later = make_dataclass("Later", [("colour", str, "red")], bases=(type(size),), frozen=True)
    given(later(**asdict(size)))
    of_methods = next(c for c in type(benchmark.find_method("lora")).__mro__ if "described" in vars(c))
    described = of_methods.described
    monkeypatch.setattr(of_methods, "described", lambda m: described(m) | dict(colour=None))
    assert keys() == before
    asked = lambda **more: dict(training=size.training | more)
    for change in (dict(guidance=9.), asked(warmup=1), dict(steps=size.steps + 1)):
        given(replace(size, **change))
        assert not {*keys()} & {*before}, change
    given(replace(size, **asked(micro_batch=1)))
    assert keys() == before  # it changes no result


def test_what_a_method_ignores_is_in_no_key(home, bench, tmp_path, monkeypatch):
    size = benchmark.base_size(home / "base")
    before = {j.method: j.key for j in jobs_of(bench, tmp_path)}
    changed = replace(size, training=size.training | dict(controller_lr=.5))
    monkeypatch.setattr(benchmark, "base_size", lambda base: changed)
    after = {j.method: j.key for j in jobs_of(bench, tmp_path)}
    assert [m for m in before if after[m] == before[m]] == ["lora"]


def test_collection_that_is_killed_loses_nothing(bench, tmp_path, monkeypatch):
    "Wherever it stops: the next one ends with the same files, each row once."
    asked = jobs_of(bench, tmp_path)
    for job in asked[:3]: save(job, tmp_path, made(job))
    assert collect(bench, tmp_path) == 3
    for job in asked[3:]: save(job, tmp_path, made(job))
    before, atomic = read_results(asked, tmp_path), results.atomic_path
    for stop in range(2):
        left = iter(range(stop))
        def dying(path, left=left):
            if next(left, None) is None: raise KeyboardInterrupt
            return atomic(path)
        with monkeypatch.context() as m:
            m.setattr(results, "atomic_path", dying)
            with pytest.raises(KeyboardInterrupt): collect(bench, tmp_path)
        assert read_results(asked, tmp_path) == before
    assert collect(bench, tmp_path) == 3 and collect(bench, tmp_path) == 0
    scores = lambda r: [row["temporal_flickering"] for row in r["rows"]]
    simple = lambda records: [dict(r, rows=scores(r)) for r in records]
    assert simple(read_results(asked, tmp_path)) == simple(before)
    assert len((tmp_path / "tiny/all.csv").read_text().splitlines()) == 1 + 6 * 2


def test_numbers_survive(bench, tmp_path):
    "Undefined, unasked, tiny, long: what is read is what was saved."
    job, value = jobs_of(bench, tmp_path)[0], 0.1 + 0.2
    rows = [dict(video=0, clip_i=value, clip_t=None, prompt='a "b", c', why=dict(clip_t="no\nprompt")),
            dict(video=1, clip_i=-1e-300, motion=1 / 3, prompt="ü", why={})]
    save(job, tmp_path, dict(made(job), rows=rows, weights=[[value] * 3] * 2))
    before = read_results([job], tmp_path)
    collect(bench, tmp_path)
    assert read_results([job], tmp_path) == before and before[0]["rows"] == rows


def test_recorded_results_of_the_toy():
    "What the repository holds: counts, and numbers to the last digit."
    toy, out = load_bench("toy"), data_folder() / "results"
    assert len((out / "toy/jobs.jsonl").read_text().splitlines()) == 804 and "804 results" in spent(toy, out)
    for table, methods in toy.tables.items():
        counts = status(jobs_of(toy, out, [table]), out)["methods"]
        there = {m: 0 if m in NOT_YET else 20 for m in methods}
        assert counts == {m: dict(done=n, diverged=0, missing=20 - n) for m, n in there.items()}, table
    found = paired(read_results(jobs_of(toy, out, ["comparison"]), out))
    columns = "identity", "motion", "clip_i"
    told = {m: [row[c]["mean"] for c in columns] for m, row in table_of(found).items()}
    assert told == PINNED and gap(found, "identity", "dualreal", "base") == PINNED_GAP


NOT_YET = "one_way_fixed", "none_fixed", "one_way"  # the table of couplings
PINNED = {
    "base": [0.29958269835808815, 0.009813285266256905, 0.06127387533481247],
    "dualreal": [0.2900528865075719, 0.12005780396629033, 0.46531590972043546],
    "full_finetune": [0.490286228735682, 0.15733658626687713, 0.6237158329143708],
    "isolated:scale=1.0:up_lr_ratio=16:strengths=[0.5,1]": [
        0.2570465409716768, 0.12758178574168275, 0.46488868299227964],
    "lora": [0.41284204127879737, 0.22471952890091518, 0.5887646024460037],
    "subject_then_motion": [0.5682233603807407, 0.00978663021166296, 0.586484421013159],
}
PINNED_GAP = dict(mean=-0.009529811850516257, low=-0.09195958749757915, high=0.07411468548441817, n=10)


if __name__ == "__main__":  # a worker of the tests above
    _, work, name, out = sys.argv
    run_jobs(read_jobs(name), out, work=globals()[work])


def test_a_journal_that_a_full_disk_cut_short(tmp_path):
    journal = jobs.Journal(tmp_path / "journal")
    journal.tell("begin", "a")
    with open(journal.path, "a") as file: file.write('{"event": "do')
    journal.tell("failed", "b", why="no")
    journal.tell("done", "c")
    assert [e["job"] for e in journal.events()] == ["a", "c"]
    assert journal.ended("c") and not journal.ended("a")


def test_a_claim_that_fails_is_told(bench, tmp_path, monkeypatch):
    "Else the parent would take the job for another process's."
    def broken(*_): raise OSError("no locks here")
    monkeypatch.setattr(jobs, "claim", broken)
    journal, job = jobs.Journal(tmp_path / "journal"), jobs_of(bench, tmp_path)[0]
    with pytest.raises(OSError, match="no locks here"): run_job(job, tmp_path, journal=journal)
    assert [(e["event"], e["job"]) for e in journal.events()] == [("failed", job.name)]
