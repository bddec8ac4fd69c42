"""The paper's notebooks: what they say of results made up here, and of none."""
from pathlib import Path

import numpy as np
import pytest
from execnb.nbio import read_nb
from execnb.shell import CaptureShell

import dualreal.toy.truth  # noqa: F401  enters the toy among the worlds
from dualreal.core import environment
from dualreal.experiments.benchmark import differs, jobs_of, load_bench, paper_bench
from dualreal.experiments.results import collect, missing_note, save, verdict

PAPER = Path(__file__).resolve().parent.parent / "nbs/paper"
NAMES = sorted(p.stem for p in PAPER.glob("[0-9]*.ipynb"))
STEPS = sorted({int(spec.split("motion_steps=")[1]) for spec in load_bench("toy").tables["motion_steps"]})


def scores(job, video):
    "DualReal is best; trained apart, motion costs identity, and every subject has a best number of its own."
    noise = np.random.default_rng([job.seed, video]).normal(0, .001)
    told = ("clip_i", "dino_i", "identity", "palette", "kind", "motion")
    row = dict.fromkeys(told, .8 if job.method == "dualreal" else .5)
    if "motion_steps" in job.method:
        done, case = int(job.method.split("motion_steps=")[1]), job.bench.cases.index(job.case)
        best, moved = .3 * (done == STEPS[case % 3]), .4 * done / STEPS[-1]
        row |= dict(identity=.6 - moved + best, motion=.2 + moved + best)
    good = {k: v + noise for k, v in row.items()}
    off = -1 if job.method == "dualreal" else 3
    why = dict(clip_t="no prompt")
    return dict(good, clip_t=None, temporal_flickering=.9, dynamic_degree_deviation=off, why=why)


def result(job):
    late = np.linspace(-.02, .02, 9)[:, None] * [1, .5, 0] + [.1, .1, .07]
    return dict(rows=[scores(job, i) for i in range(2)], seconds=dict(train=60), config=dict(scale=.2),
                environment=environment(), weights=late.tolist() if job.method == "dualreal" else None, fps=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Results of six cases for every table, with a video for the comparison's first."
    out, toy = tmp_path_factory.mktemp("paper"), load_bench("toy")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("DUALREAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        for job in jobs_of(toy, out, cases=[f"{c['subject']}-{c['motion']}" for c in toy.cases[:6]]):
            shown = job.case == toy.cases[0] and job.keeps
            save(job, out, result(job) | dict(kept=[np.full((5, 32, 32, 3), 99, np.uint8)] * shown))
        collect(toy, out)
    return out


@pytest.fixture
def run(monkeypatch, tmp_path):
    "Execute a notebook with other results: the names it leaves behind, and what it printed."
    def executed(name, out):
        import matplotlib.pyplot as plt
        monkeypatch.setenv("DUALREAL_RESULTS", str(out))
        monkeypatch.setenv("DUALREAL_CACHE", str(tmp_path / "cache"))
        page, shell = read_nb(PAPER / f"{name}.ipynb"), CaptureShell()
        try: shell.run_all(page, exc_stop=True)
        finally: plt.close("all")
        outputs = [o for c in page.cells for o in c.get("outputs", ()) if o["output_type"] == "stream"]
        return shell.user_ns, "".join("".join(o["text"]) for o in outputs)
    return executed


@pytest.mark.parametrize("name", NAMES)
def test_claims_are_answered_by_the_numbers(name, made, run):
    space, printed = run(name, made)
    said = {claim: verdict(d) for claim, d in space["claims"].items()}
    assert said and set(said.values()) == {"holds"}, said
    assert f"{'12' if name == '05_figure7' else ''} of" in printed


@pytest.mark.parametrize("name", NAMES)
def test_without_results_nothing_is_claimed(name, tmp_path, run):
    space, printed = run(name, tmp_path)
    assert {verdict(d) for d in space["claims"].values()} == {"cannot be told"}
    assert "0 of" in printed and "dualreal bench run --bench toy --methods" in printed


def test_there_is_a_notebook_for_each_table_and_figure():
    assert [n[3:] for n in NAMES] == "table1 table2 table3 figure2 figure7 qualitative sweeps".split()


def test_one_subject_for_all_is_not_claimed(made, run):
    "Where all subjects agree, their own number is no better than the common one."
    space, _ = run("04_figure2", made)
    for r in space["found"]:
        steps = int(r["method"].split("motion_steps=")[1])
        for row in r["rows"]: row |= dict(identity=.5 - steps / 3000, motion=.5)
    for name in space["families"]: assert space["own_choice"](name)["mean"] == 0


def test_published_experiment_is_asked_for_by_base(tmp_path):
    bench = paper_bench("ablation", "THUDM/CogVideoX-5b", str(tmp_path))
    note = missing_note(bench, "ablation", [], 60)
    assert len(bench.cases) == 10
    assert f"--bench published --methods ablation --data {tmp_path} --cases" in note
    assert "on its own base" in differs(bench) and "steps 300 (1000)" in differs(load_bench("toy"))
