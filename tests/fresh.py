"""Programs that each begin in a fresh process, at the price of one.

As a script: reads from stdin a JSON object `dict(preload=[names], programs=[source, …])`, imports what
`preload` names, none of it ours, and runs each program in a fork of its own; prints a JSON list of the status
and the output of each.
"""
import json
import os
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path

def preload(name: str):
    "Import the module `name`, or the module that holds what is called so."
    try: import_module(name)
    except ModuleNotFoundError: getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2])


def child(program: str, out: int):
    "Run `program` in this process, what it prints going to `out`, and end."
    os.dup2(out, 1), os.dup2(out, 2)
    status = 0
    try: exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as e: status = e.code if isinstance(e.code, int) else 1
    except BaseException: traceback.print_exc(); status = 1
    sys.stdout.flush()
    os._exit(status)


def forked(program: str) -> tuple[int, str]:
    "Exit status and output of `program` in a child of this process."
    read, write = os.pipe()
    if not (pid := os.fork()): os.close(read), child(program, write)
    os.close(write)
    with open(read, encoding="utf-8", errors="replace") as said: text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def outcomes(programs, cwd, preload=(), path=()) -> list:
    "Exit status and output of each program, in the folder `cwd`; `preload`: others' packages, imported once."
    asked = json.dumps(dict(preload=list(preload), programs=list(programs)))
    env = {**os.environ, **({"PYTHONPATH": os.pathsep.join(map(str, path))} if path else {})}
    done = subprocess.run([sys.executable, "-P", Path(__file__).resolve()], input=asked, cwd=cwd, env=env,
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    given = json.load(sys.stdin)
    for name in given["preload"]: preload(name)
    ours = [name for name in sys.modules if name.split(".")[0] == "dualreal"]
    assert not ours, f"imported before any program began: {ours}"
    print(json.dumps([forked(program) for program in given["programs"]]))
