"""Fail when `nbdev_clean` or `nbdev_export` would change a file. Both run in a copy: no work is touched.

The copy starts without the modules, so one that no notebook exports is found too.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("settings.ini", "pyproject.toml")


def repository_files() -> list[Path]:
    "Files git tracks or would add, relative to the root, as they stand in the working tree."
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                           cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    return [Path(n) for n in names if n and (ROOT/n).is_file()]


def is_notebook(path: Path) -> bool: return path.parts[0] == "nbs" and path.suffix == ".ipynb"


def is_module(path: Path) -> bool: return path.parts[0] == "dualreal" and path.suffix == ".py"


def clean_and_export(folder: Path):
    "What a contributor runs before a commit, in `folder`."
    imports = "from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export"
    code = f"{imports}; nbdev_clean(); nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def content(path: Path) -> str | None: return path.read_text(encoding="utf-8") if path.is_file() else None


def differences(folder: Path, files: list[Path]) -> list[str]:
    "A line for every file that differs between the repository and its cleaned, exported copy in `folder`."
    made = {p.relative_to(folder) for p in folder.rglob("*.py")}
    changed = [p for p in sorted({*files, *made}) if content(ROOT/p) != content(folder/p)]
    return [f"{p}: " + ("run nbdev_export and nbdev_clean, and commit the result" if (folder/p).is_file() else
                        "no notebook exports this module") for p in changed]


def main() -> int:
    tracked = repository_files()
    files = [p for p in tracked if is_notebook(p) or is_module(p) or str(p) in SETTINGS]
    with tempfile.TemporaryDirectory() as tmp:
        for path in files:
            if is_module(path): continue
            (Path(tmp)/path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT/path, Path(tmp)/path)
        clean_and_export(Path(tmp))
        changed = differences(Path(tmp), files)
    for line in changed: print(line, file=sys.stderr)
    if not changed: print(f"notebooks are clean and exported ({sum(map(is_notebook, files))} notebooks)")
    return bool(changed)


if __name__ == "__main__": sys.exit(main())
