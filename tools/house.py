"""What the modules of the package hold and take from each other, read from their source: nothing is imported.

    python tools/house.py

prints a row for each module: its number, its lines, its public names. A name is public when `__all__` lists
it or another module of the package uses it, whatever it begins with.
"""
import ast
import json
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def code(notebook: Path) -> str:
    "The code cells of `notebook`, without Jupyter's own commands."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code").split("\n")
    return "\n".join("" if line.startswith(("%", "!")) else line for line in lines)


def exported_module(notebook: Path) -> str | None:
    "The name after `#| default_exp` in `notebook`: `experiments.speed`; None where it exports nothing."
    match = re.search(r"^#\|\s*default_exp\s+([\w.]+)", code(notebook), re.M)
    return match and match[1]


NOTEBOOKS = {exported_module(p): p for p in sorted((ROOT/"nbs").glob("[0-9]*_*.ipynb"))}
NOTEBOOKS.pop(None, None)
NUMBERS = {module: int(re.match(r"\d+", p.name)[0]) for module, p in NOTEBOOKS.items()}
MODULES = sorted(NUMBERS, key=NUMBERS.get)


def path_of(module: str) -> Path: return (ROOT/"dualreal"/module.replace(".", "/")).with_suffix(".py")


@cache
def tree(source: Path | str) -> ast.Module:
    "The syntax of a file, or of a module given by name."
    path = source if isinstance(source, Path) else path_of(source)
    text = code(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    return ast.parse(text, str(path))


def package(source: Path | str) -> list[str]:
    "What a relative import in `source` begins with."
    return [] if isinstance(source, Path) else ["dualreal", *source.split(".")[:-1]]


@cache
def imports(source: Path | str, functions=True) -> dict[str, str]:
    "Full name of all that `source` imports and what it is called there; `from a import b` is `a.b`."
    found, todo = {}, [tree(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import): found |= {a.name: a.asname or a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            where = package(source)[:len(package(source)) + 1 - node.level] if node.level else []
            base = ".".join([*where, *filter(None, [node.module])])
            found |= {f"{base}.{a.name}": a.asname or a.name for a in node.names}
        elif functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += ast.iter_child_nodes(node)
    return found


def module_of(name: str) -> tuple[str | None, str]:
    "A full name as module of this package and name in it: `dualreal.core.COLOURS` as (`core`, `COLOURS`)."
    words = name.split(".")[1:] if name.startswith("dualreal.") else []
    for n in range(len(words), 0, -1):
        if (module := ".".join(words[:n])) in NUMBERS: return module, ".".join(words[n:])
    return None, name


def siblings(module: str) -> set[str]:
    "Modules of this package that `module` imports, inside its functions too."
    return {module_of(name)[0] for name in imports(module)} - {None}


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


@cache
def defined(module: str) -> frozenset[str]:
    "Names that `module` itself defines at its top level."
    found = set()
    for node in tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef): found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return frozenset(found - {"__all__"})


def missing(source: Path | str) -> list[str]:
    "What `source` imports from a module of this package, inside its functions too, and does not find there."
    pairs = map(module_of, imports(source))
    return [f"{m}.{name}" for m, name in pairs if m and name and name not in defined(m)
            and name not in imports(m, functions=False).values()]


@cache
def taken(source: Path | str) -> frozenset[tuple[str, str]]:
    "Pairs of a module of this package and a name of it that `source` uses: imported, or as `module.name`."
    known = {called: module_of(name) for name, called in imports(source).items()}
    pairs = {(module, name) for module, name in known.values() if module and name}
    modules = {called: module for called, (module, name) in known.items() if module and not name}
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Attribute) and (module := modules.get(ast.unparse(node.value))):
            pairs.add((module, node.attr))
    return frozenset((module, name) for module, name in pairs if name in defined(module))


def private(name: str) -> bool: return name.startswith("_") and not name.startswith("__")


def public(module: str) -> set[str]:
    "Names of `module` that are for others: listed in `__all__`, or used by another module."
    listed = next((ast.literal_eval(n.value) for n in tree(module).body if isinstance(n, ast.Assign)
                   and ast.unparse(n.targets[0]) == "__all__"), [])
    used = (pair for other in MODULES if other != module for pair in taken(other))
    return {*listed, *(name for m, name in used if m == module)}


def main():
    size = {m: (len(path_of(m).read_text(encoding="utf-8").splitlines()), len(public(m))) for m in MODULES}
    rows = [(f"{NUMBERS[m]:02} {m}", *size[m]) for m in MODULES]
    top = [m for m in MODULES if "." not in m]
    packages = {f"   in {p}": [m for m in MODULES if m.startswith(f"{p}.")] for p in ("toy", "experiments")}
    for name, part in {"   at the top level": top, **packages, "   in all": MODULES}.items():
        rows.append((name, *map(sum, zip(*(size[m] for m in part)))))
    for row in [("   module", "lines", "public"), *rows]: print("{:<28} {:>6} {:>6}".format(*row))


if __name__ == "__main__": main()
