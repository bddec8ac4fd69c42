"""The wheel a user gets: built through the sdist from the files git knows, used outside the repository."""
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def run(*command, cwd: Path) -> str:
    "Output of `command`, run in `cwd` without this process's import path."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    "The `kind` ('sdist' or 'wheel') of `source`, built with the setuptools already here: no download."
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    return out/run(sys.executable, "-c", code, out, cwd=source).split("\n")[-2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The `bin` folder of a fresh venv that holds our wheel and sees the requirements of this one."
    tmp = tmp_path_factory.mktemp("wheel")
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if not (ROOT/name).is_file(): continue
        (tmp/"clone"/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/name, tmp/"clone"/name)
    with tarfile.open(build("sdist", tmp/"clone", tmp)) as archive:
        safely = dict(filter="data") if hasattr(tarfile, "data_filter") else {} # not before Python 3.11.4
        archive.extractall(tmp/"sdist", **safely)
    wheel = build("wheel", next((tmp/"sdist").iterdir()), tmp)
    venv.create(tmp/"venv", with_pip=False)
    folder = tmp/"venv"/("Scripts" if os.name == "nt" else "bin")
    python = folder/"python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp)
    # Only now, or pip would take the editable installation for ours. Paths in a .pth file come last.
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp).strip()
    (Path(purelib)/"requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_command_runs(installed, tmp_path):
    assert "train" in run(installed/"dualreal", "--help", cwd=tmp_path)


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_every_asset_travels(installed, tmp_path):
    where = run(installed/"python", "-c", "import dualreal; print(dualreal.__file__)", cwd=tmp_path).strip()
    assert Path(where).resolve().is_relative_to(installed.parent.resolve())
    expected = files(ROOT/"dualreal"/"assets")
    assert expected and files(Path(where).parent/"assets") == expected
