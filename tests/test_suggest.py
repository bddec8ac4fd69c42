"""Captions that files suggest: words that somebody wrote, never more, and no file is written over."""
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dualreal.cli import main
from dualreal.core import InputError
from dualreal.data import load_case
from dualreal.suggest import suggest, write_suggestions
from dualreal.video import write_video

PICTURE, CLIP = Image.fromarray(np.full((24, 32, 3), 90, np.uint8)), np.zeros((5, 24, 32, 3), np.uint8)
XMP = ('<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description><dc:description><rdf:Alt>'
       '<rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></dc:description></rdf:Description></x:xmpmeta>')


def exif(**tags):
    found = Image.Exif()
    for tag, value in tags.items(): found[int(tag[1:], 16)] = value
    return found


def picture(path, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.save(path, **how)


def clip(path, **metadata):
    "A clip whose container says something."
    path.parent.mkdir(parents=True, exist_ok=True)
    if not metadata: return write_video(path, CLIP)
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata)
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for frame in CLIP: container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


@pytest.fixture
def folders(tmp_path):
    "Where pictures and clips go; one of each, which say nothing."
    picture(tmp_path / "photos/IMG_1234.jpg")
    clip(tmp_path / "clips/MVI_0007.mp4")
    return dict(identity=tmp_path / "photos", motion=tmp_path / "clips")


def captions(folders, role, **prompts):
    return {Path(row["path"]).name: row["caption"] for row in suggest(**folders, **prompts)[role]}


# Nothing is invented

def test_nothing_to_say(folders, capsys):
    found = suggest(**folders)
    assert [row["caption"] for rows in found.values() for row in rows] == [None, None]
    assert "give --identity-prompt" in found["identity"][0]["why"]
    with pytest.raises(InputError, match="nothing can be said of the files in .*photos"):
        write_suggestions(found, folders)
    assert main(["check", "--suggest", *words(folders)]) == 0
    out = capsys.readouterr().out
    assert "IMG_1234.jpg  ?  (nothing says what the subject is" in out and "not checked: " in out


@pytest.mark.parametrize("name", ["IMG_1234", "DSC00012", "PXL_20230714_101112", "P1010012", "0001",
                                  "dQw4w9WgXcQ", "3f2a9c1e-77b0-4d1a", "kFhZqWmN",
                                  "WhatsApp Image 2023-07-14 at 10.11.12", "image (3)",
                                  "Screenshot 2024-01-01"])
def test_a_machines_name_says_nothing(folders, name):
    picture(folders["identity"] / f"{name}.png")
    clip(folders["motion"] / f"{name}.mp4")
    assert captions(folders, "identity", identity_prompt="dog *")[f"{name}.png"] == "dog *"
    assert captions(folders, "identity")[f"{name}.png"] is captions(folders, "motion")[f"{name}.mp4"] is None


def test_every_word_is_the_users(folders):
    "Of each caption, all but the paper's form stands in the name, the metadata or the prompt."
    for name in ("dog_on_grass", "my Dog beach", "two kids"): picture(folders["identity"] / f"{name}.jpg")
    for name in ("man juggling", "rock_climbing"): clip(folders["motion"] / f"{name}.mp4")
    for role, form in (("identity", {"dog", "*"}), ("motion", {"a", "person", "is"})):
        for name, caption in captions(folders, role, identity_prompt="dog *").items():
            own = {*Path(name).stem.lower().replace("_", " ").split()}
            assert caption is None or {*caption.replace(",", "").split()} <= own | form, (name, caption)


# The class word, and what is beside the subject

@pytest.mark.parametrize("name, caption", [
    ("dog_on_grass", "dog * on grass"), ("my-brown-dog-03", "dog *"), ("dog sitting", "dog * sitting"),
    ("dog beach", "dog *, beach"), ("DogInSnow", "dog * in snow"), ("dog on 2", "dog *"), ("sofa", "dog *")])
def test_names_of_images(folders, name, caption):
    picture(folders["identity"] / f"{name}.jpg")
    assert captions(folders, "identity", identity_prompt="a photo of a dog *")[f"{name}.jpg"] == caption


@pytest.mark.parametrize("folder, names, kind", [
    ("corgi", ["IMG_1", "IMG_2"], "corgi"), ("my_dog6", ["IMG_1"], "dog"),
    ("corgi/images", ["IMG_1"], "corgi"), ("photos", ["dog_1", "dog_2"], "dog"),
    ("photos", ["beach", "sofa"], None), ("identity", ["IMG_1"], None),
    ("a b/train", ["toy_robot_1", "toy_robot_2"], "toy robot")])
def test_where_the_class_comes_from(tmp_path, folder, names, kind):
    for name in names: picture(tmp_path / folder / f"{name}.png")
    clip(tmp_path / "clips/a.mp4")
    found = captions(dict(identity=tmp_path / folder, motion=tmp_path / "clips"), "identity")
    assert {*found.values()} == {kind and f"{kind} *"}


def metadata(text):
    "The same words in each place that a picture has for them."
    png, iptc = PngInfo(), b"8BIM\x04\x04\x00\x00"
    png.add_text("Description", text)
    record = b"\x1c\x02\x78" + len(text).to_bytes(2, "big") + text.encode()
    block = b"Photoshop 3.0\x00" + iptc + len(record).to_bytes(4, "big") + record + b"\0" * (len(record) % 2)
    segment = b"\xff\xed" + (len(block) + 2).to_bytes(2, "big") + block
    return {"EXIF description": dict(format="jpeg", exif=exif(x010E=text)),
            "EXIF title": dict(format="jpeg", exif=exif(x9C9B=text.encode("utf-16-le") + b"\0\0")),
            "XMP description": dict(format="jpeg", xmp=XMP.format(text).encode()),
            "PNG description": dict(format="png", pnginfo=png),
            "JPEG comment": dict(format="jpeg", comment=text),
            "IPTC caption": dict(format="jpeg", extra=segment)}


@pytest.mark.parametrize("where", [*metadata("")])
def test_words_in_an_image(folders, where):
    "A description that names the class is the caption; one that does not is not used."
    for name, text in (("IMG_1", "My dog at the lake. Lovely day"), ("IMG_2", "Rex at the lake"),
                       ("IMG_3", "OLYMPUS DIGITAL CAMERA")):
        picture(folders["identity"] / f"{name}.img", **metadata(text)[where])
        (folders["identity"] / f"{name}.img").rename(path := folders["identity"] / f"{name}.png")
        assert path.is_file()
    found = {Path(row["path"]).stem: row for row in suggest(**folders, identity_prompt="dog *")["identity"]}
    assert (found["IMG_1"]["caption"], found["IMG_1"]["why"]) == ("dog * at the lake", f"its {where}")
    assert found["IMG_2"]["caption"] == found["IMG_3"]["caption"] == "dog *"


# What is done

@pytest.mark.parametrize("name, caption", [
    ("playing_guitar_03", "a person is playing guitar"), ("old woman dancing", "an old woman is dancing"),
    ("v_PlayingGuitar_g01_c02", "a person is playing guitar"),
    ("man playing guitar on a stage", "a man is playing guitar on a stage"),
    ("two kids jumping", "two kids are jumping"), ("RockClimbing", "a person is rock climbing"),
    ("a woman is dancing", "a woman is dancing"), ("guitar", None), ("good morning", None), ("wedding", None),
    ("the thing moving", None), ("video of a boy running", "a boy is running"), ("me dancing", None)])
def test_names_of_clips(folders, name, caption):
    clip(folders["motion"] / f"{name}.mp4")
    assert captions(folders, "motion")[f"{name}.mp4"] == caption


def test_words_of_a_container(folders):
    clip(folders["motion"] / "VID_1.mp4", title="A man doing a handstand", comment="https://example.org/playing")
    clip(folders["motion"] / "VID_2.mkv", comment="juggling in the park")
    clip(folders["motion"] / "VID_3.mp4", title="Created with an editing program")
    rows = {Path(row["path"]).stem: (row["caption"], row["why"]) for row in suggest(**folders)["motion"]}
    assert rows["VID_1"] == ("a man is doing a handstand", "its container's title")
    assert rows["VID_2"] == ("a person is juggling in the park", "its container's comment")
    assert rows["VID_3"][0] is None


def test_a_folder_of_one_motion(tmp_path, folders):
    folders["motion"].rename(tmp_path / "playing_guitar")
    assert captions(dict(folders, motion=tmp_path / "playing_guitar"), "motion") == \
        {"MVI_0007.mp4": "a person is playing guitar"}
    said = captions(dict(folders, motion=tmp_path / "playing_guitar"), "motion", motion_prompt="it moves")
    assert said == {"MVI_0007.mp4": "it moves"}


# Into a file

def words(folders): return [word for role, folder in folders.items() for word in (f"--{role}", f"{folder}")]


def test_written_and_trained_on(folders, capsys):
    "What was proposed is what the case then says; the check follows at once."
    for name in ("dog_1", "dog_on_grass"): picture(folders["identity"] / f"{name}.jpg")
    for name in ("man juggling", "juggling"): clip(folders["motion"] / f"{name}.mp4")
    (folders["identity"] / "IMG_1234.jpg").unlink()
    (folders["motion"] / "MVI_0007.mp4").unlink()
    assert main(["check", "--suggest", "--write", *words(folders), "--frames", "5"]) == 0
    out = capsys.readouterr().out
    assert out.count("Written: ") == 2 and "This case can be trained" in out
    case = load_case(**folders)
    assert {i.path.stem: i.prompt for i in case.identity + case.motion} == {
        "dog_1": "dog *", "dog_on_grass": "dog * on grass", "juggling": "a person is juggling",
        "man juggling": "a man is juggling"}
    assert main(["check", "--suggest", "--json", *words(folders), "--frames", "5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["suggestions"]["identity"][1]["caption"] == "dog * on grass"


def test_a_line_is_left_to_the_user(folders, capsys):
    "It is written without a caption, named, and refused until it has one."
    clip(folders["motion"] / "juggling.mp4")
    assert main(["check", "--suggest", "--write", *words(folders), "--identity-prompt", "dog *"]) == 0
    out = capsys.readouterr().out
    assert "add a caption for MVI_0007.mp4." in out and "prompts.txt has no caption for MVI_0007.mp4" in out
    path = folders["motion"] / "prompts.txt"
    assert path.read_text().splitlines() == ["juggling.mp4\ta person is juggling", "MVI_0007.mp4\t"]
    path.write_text(path.read_text().replace("0007.mp4\t", "0007.mp4\ta cat is juggling"))
    case = load_case(folders["identity"], folders["motion"])
    assert [item.prompt for item in case.motion] == ["a person is juggling", "a cat is juggling"]


@pytest.mark.parametrize("name", ["prompts.txt", "prompt.txt", "metadata.jsonl", "IMG_1234.txt",
                                  "IMG_1234.jpg.caption"])
def test_captions_stay(folders, capsys, name):
    "No file is written over or beside others, whatever the layout; the other folder still gets its own."
    path = folders["identity"] / name
    path.write_text('{"file_name": "IMG_1234.jpg", "text": "a cat *"}' if "json" in name else "a cat *")
    before = path.read_bytes()
    found = suggest(**folders, identity_prompt="dog *", motion_prompt="it is moving")
    said = write_suggestions(found, folders)
    assert said[0] == f"Not written: {path} holds captions already, and stays as it is."
    assert said[1].startswith("Written: ") and path.read_bytes() == before
    assert [p for p in folders["identity"].iterdir() if p.suffix != ".jpg"] == [path]
    with pytest.raises(InputError, match="Nothing is written: .*already.*; .*already"):
        write_suggestions(found, folders)


def test_what_a_list_cannot_say(tmp_path, folders):
    "Frames of one clip have no list; two files of one name cannot be told apart in it."
    for i in range(5): picture(tmp_path / f"frames/{i}.png")
    frames = dict(folders, motion=tmp_path / "frames")
    with pytest.raises(InputError, match="nothing can be said.*; .*frames is one clip, .*--motion-prompt"):
        write_suggestions(suggest(**frames, motion_prompt="it is moving"), frames)
    for i in (1, 2): picture(tmp_path / f"kohya/{i}_dog/a.png")
    kohya = dict(folders, identity=tmp_path / "kohya")
    said = write_suggestions(suggest(**kohya, identity_prompt="dog *", motion_prompt="it is moving"), kohya)
    assert "holds two files a.png" in said[0]


def test_bad_input(folders, capsys):
    assert main(["check", "--write", *words(folders)]) == 2
    assert "--write: give --suggest, too" in capsys.readouterr().err
    (folders["identity"] / "broken.jpg").write_bytes(b"no picture")
    assert main(["check", "--suggest", *words(folders)]) == 2
    assert "broken.jpg cannot be read as an image" in capsys.readouterr().err
    assert main(["check", "--suggest", *words(dict(folders, identity="nowhere"))]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_json_without_captions(folders, capsys):
    assert main(["check", "--suggest", "--json", *words(folders), "--motion-prompt", "it is moving"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"] and "no identity caption" in report["missing"]
    assert report["suggestions"]["motion"][0]["caption"] == "it is moving"
