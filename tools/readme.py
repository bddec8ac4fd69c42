"""Write README.md from nbs/index.ipynb. With `--check`: write nothing, fail when README.md is out of date."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTICE = "<!-- Made by tools/readme.py from nbs/index.ipynb: edit the notebook. -->"
HERE = "](https://github.com/dualreal/dualreal/blob/main/"  # a file of the root: no page of the site
LINK = re.compile(r"(\]\(|src=\")(?!https?:|mailto:|#|/)([^)\"]+)")


def from_root(markdown: str) -> str:
    "Links of a notebook in nbs/ as links of a file in the root."
    def move(match): return match[1] + (Path("nbs")/match[2]).as_posix().replace("nbs/../", "")
    return LINK.sub(move, markdown).replace(HERE, "](")


def cell_text(cell: dict) -> str:
    "One cell as Markdown; nbdev's directives dropped, of hidden cells only the Markdown they show."
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown": return from_root(source)
    lines = source.split("\n")
    directives = [line for line in lines if line.startswith("#|")]
    if any(re.match(r"#\|\s*(hide|include:\s*false|echo:\s*false)\s*$", d) for d in directives):
        shown = (o.get("data", {}).get("text/markdown", "") for o in cell["outputs"])
        return "\n".join("".join(text) for text in shown).strip()
    return "\n".join(["```python", *(line for line in lines if line not in directives), "```"])


def readme(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join(filter(None, [NOTICE, *map(cell_text, cells)])) + "\n"
    return text.replace("\n```\n\n```python\n", "\n\n")  # the imports have a cell, but no block, of their own


def main() -> int:
    target, text = ROOT/"README.md", readme(ROOT/"nbs"/"index.ipynb")
    if "--check" not in sys.argv: target.write_text(text, encoding="utf-8")
    elif not target.exists() or target.read_text(encoding="utf-8") != text:
        print("README.md is out of date: run python tools/readme.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__": sys.exit(main())
