"""`dualreal card`: what a stranger reads beside an adapter, and what is never overwritten."""
import json
import shlex

import numpy as np
import pytest
import yaml

from dualreal.checkpoint import save_adapter
from dualreal.cli import main
from dualreal.core import write_json
from dualreal.toy.bases import tiny_transformer
from dualreal.tuner import DualRealConfig
from dualreal.video import write_video

EVIL = 'cat * <script>alert(1)</script> ``` | ![x](http://e.vil/x.png) "---'


@pytest.fixture
def run(tmp_path):
    transformer = tiny_transformer()
    transformer.add_adapter(DualRealConfig(rank=2, groups=2, condition_dim=None))
    facts = dict(base="/home/me/secret-place/mine", subject=EVIL, motion="a creature is swinging")
    facts["training"] = dict(reference_encoder="/home/me/secret-place/enc.safetensors")
    save_adapter(transformer, tmp_path / "run", metadata=facts)
    write_video(tmp_path / "run/samples/00.mp4", np.zeros((5, 32, 32, 3), np.uint8), 8)
    write_json(tmp_path / "run/samples/00.json", dict(prompt=EVIL))
    return tmp_path / "run"


def card(run, *more):
    assert main(["card", str(run), *map(str, more)]) == 0
    return (run / "README.md").read_text(encoding="utf-8")


def parsed(text):
    "Front matter and the rest."
    front, rest = text.removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(front), rest


def test_front_matter_and_upload(run, capsys):
    head, body = parsed(card(run, "--license", "cc-by-4.0", "--repo", "me/cat"))
    assert head["license"] == "cc-by-4.0" and "dualreal" in head["tags"] and "base_model" not in head
    assert head["widget"] == [dict(text=EVIL, output=dict(url="card-samples/00.gif"))]
    assert "model-index" not in head and "Not measured" in body
    said = capsys.readouterr().out
    assert f"hf upload me/cat {run} . --include=README.md --include=adapter.safetensors" in said
    assert (run / "card-samples/00.gif").read_bytes()[:3] == b"GIF"
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def test_own_folders_are_nobodys_business(run):
    text = card(run)
    assert "secret-place" not in text and "enc.safetensors" in text


def test_samples_of_an_earlier_card_go(run):
    "The upload takes card-samples/*.gif: only what the card shows may lie there."
    write_video(run / "samples/01.mp4", np.zeros((5, 32, 32, 3), np.uint8), 8)
    card(run)
    (run / "samples/01.mp4").unlink()
    (run / "card-samples/mine.gif").write_bytes(b"GIF")
    card(run)
    assert sorted(p.name for p in (run / "card-samples").iterdir()) == ["00.gif", "mine.gif"]


def test_captions_stay_text(run):
    "Rendered, the card holds no tag, no picture and no link but its own."
    from markdown_it import MarkdownIt
    text = card(run)
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(parsed(text)[1])
    assert "<script" not in html and html.count("<img") == 1 and 'src="card-samples/00.gif"' in html
    links = [part.split('"')[0] for part in html.split('href="')[1:]]
    assert "alert(1)" in html and not [link for link in links if "e.vil" in link]
    assert "secret-place" not in text and "<code>mine</code>" in html


def test_commands_of_the_card_parse(run):
    "The shell gets the prompt back as it was."
    block = card(run).split("sh\n", 1)[1].split("\n`", 1)[0]
    line = next(x for x in block.split("\n") if x.startswith("dualreal "))
    assert shlex.split(line)[5] == EVIL


def test_scores_are_quoted(run):
    rows = dict(clip_i=dict(mean=.71234, low=.7, high=.72, n=4), clip_t=dict(mean=None, n=0))
    write_json(run / "scores/report.json", dict(summary=rows, encoders=dict(clip_i="toy clip")))
    head, body = parsed(card(run))
    metrics = head["model-index"][0]["results"][0]["metrics"]
    assert metrics == [dict(type="clip_i", value=.7123, name="CLIP-I ↑")]
    assert "0.712 [0.700, 0.720]" in body and "drawn creatures only" in body


def test_never_over_somebody_elses(run, capsys):
    card(run)
    card(run)  # its own: again
    for text in ("# my own card\n", card(run).replace("scale", "SCALE")):
        (run / "README.md").write_text(text, encoding="utf-8")
        assert main(["card", str(run)]) == 2
        said = capsys.readouterr().err.strip().split("\n")
        assert len(said) == 1 and "README.md" in said[0] and "rename or remove" in said[0]
        assert (run / "README.md").read_text(encoding="utf-8") == text
        (run / "README.md").unlink()


@pytest.mark.parametrize("path, report, said", [
    ("nowhere", None, "does not exist"), ("samples", None, "no adapter"), (".", "nowhere", "no result"),
    (".", "list.json", "not a report")])
def test_mistakes(run, capsys, path, report, said):
    (run / "list.json").write_text(json.dumps([1]), encoding="utf-8")
    more = ["--report", str(run / report)] if report else []
    assert main(["card", str(run / path), *more]) == 2
    assert said in capsys.readouterr().err and not (run / "README.md").exists()


def test_published_dictionary(run, tmp_path):
    "A file without metadata gets a card that says so little."
    assert main(["convert", str(run), str(tmp_path / "bare/adapter.pth")]) == 0
    text = card(tmp_path / "bare")
    assert "--base FOLDER" in text and "| rank | `2` |" in text
