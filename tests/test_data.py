"""Folders as people make them, right and wrong: every mistake is one sentence that names the culprit."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualreal import data, doctor
from dualreal.core import InputError
from dualreal.video import write_video

REAL = Path(__file__).resolve().parents[2] / "shared/real"
PERSON = "a person is waving"


def texture(path, width, height):
    "A picture that only this name has."
    blocks = np.random.default_rng(list(path.name.encode())).integers(0, 200, (4, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))


def photo(path, width=24, height=16, tone=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = Image.new("RGB", (width, height), (tone or 0, 90, 60))
    (Image.fromarray(texture(path, width, height)) if tone is None else plain).save(path)


def clip(path, count=9, width=24, height=16, **how):
    shade = np.arange(count, dtype=np.uint8)[:, None, None, None] * 20
    write_video(path, texture(path, width, height) + shade, **how)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def one(tmp_path):
    "A good identity folder: three photos, numbered as people number them."
    for name in ("2.png", "10.jpg", "1.webp"): photo(tmp_path / "one" / name)
    text(tmp_path / "one/prompts.txt", "dog *")
    return tmp_path / "one"


@pytest.fixture
def wave(tmp_path):
    "A good motion folder: three clips, of 17, 9 and 6 frames."
    for name, count in {"b.mp4": 9, "a.x.mp4": 17, "c.gif": 6}.items(): clip(tmp_path / "wave" / name, count)
    text(tmp_path / "wave/prompts.txt", PERSON)
    return tmp_path / "wave"


def prompts(items):
    return [item.prompt for item in items]


def names(items):
    return [item.path.name for item in items]


def fails(match, identity, motion, *prompts):
    "The sentence with which a case is refused, whether loading or reading finds out."
    with pytest.raises(InputError, match=match) as caught:
        case = data.load_case(identity, motion, *prompts)
        for item in case.identity + case.motion: data.read_item(item, 16, 16, 9)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Layouts that are accepted

def test_plain_folders(one, wave):
    case = data.load_case(one, wave)
    assert names(case.identity) == ["1.webp", "2.png", "10.jpg"]
    assert names(case.motion) == ["a.x.mp4", "b.mp4", "c.gif"]
    assert {item.kind for item in case.identity} == {"image"}
    assert {item.kind for item in case.motion} == {"video"}
    assert (case.class_word, case.identity_prompt, case.motion_prompt) == ("dog", "dog *", PERSON)
    assert (case.motion_words, case.notes) == ("waving", [])


def test_images_win_over_videos(tmp_path, wave):
    root = tmp_path / "both"
    photo(root / "images/0.png")
    clip(root / "videos/0.mp4", 1)
    text(root / "videos.txt", "videos/0.mp4")
    assert names(data.load_case(root, wave, "dog *").identity) == ["0.png"]
    photo(root / "9.png")
    assert names(data.load_case(root, wave, "dog *").identity) == ["0.png"]


def test_published_layout(tmp_path, wave):
    root = tmp_path / "published"
    for i in range(3): clip(root / f"videos/{i}.mp4", 1)
    text(root / "videos.txt", "videos/2.mp4", "videos/0.mp4")
    text(root / "prompts.txt", "red dog *", "blue dog *")
    case = data.load_case(root, wave)
    assert names(case.identity) == ["2.mp4", "0.mp4"]
    assert prompts(case.identity) == ["red dog *", "blue dog *"]
    assert case.identity[0].kind == "image"
    assert data.read_item(case.identity[0], 16, 16, 9).shape == (1, 16, 16, 3)
    assert case.notes == [f"{root / 'videos'}: not used: 1.mp4."]


def test_published_motion(tmp_path, one):
    root = tmp_path / "published"
    for i in range(3): clip(root / f"videos/{i}.mp4")
    text(root / "prompts.txt", *[PERSON] * 3)
    assert names(data.load_case(one, root).motion) == ["0.mp4", "1.mp4", "2.mp4"]


def test_folders_of_frames(tmp_path, one):
    for i in range(12): photo(tmp_path / f"frames/v1.2/{i}.png", tone=i)
    clip(tmp_path / "frames/z.mp4")
    text(tmp_path / "frames/v1.2.txt", "a cat is running")
    text(tmp_path / "frames/z.txt", "a cat is jumping")
    case = data.load_case(one, tmp_path / "frames")
    assert names(case.motion) == ["v1.2", "z.mp4"]
    assert prompts(case.motion) == ["a cat is running", "a cat is jumping"]
    frames = data.read_item(case.motion[0], 16, 24, 49)
    assert frames[:, 0, 0, 0].tolist() == list(range(9))  # 12 frames, cut to 4k + 1, in natural order
    alone = data.load_case(one, tmp_path / "frames/v1.2", motion_prompt=PERSON)
    assert names(alone.motion) == ["v1.2"] and "frames of one clip" in alone.notes[0]


def test_hidden_files_are_passed_over_and_others_named(one, wave):
    (one / "._1.webp").write_bytes(b"macOS")
    (one / ".DS_Store").touch()
    text(one / "2.txt", "dog *")
    (one / "receipt.pdf").touch()
    (one / "old").mkdir()
    assert data.load_case(one, wave).notes == [f"{one}: not used: old, receipt.pdf."]


# Captions

def test_caption_sources_in_order(one, wave):
    for stem in ("1", "2", "10"): text(one / f"{stem}.txt", f"cat {stem} *")
    assert data.load_case(one, wave, "fox *").class_word == "fox"
    said = fails("1.webp is 'dog \\*' in .*, but 'cat 1 \\*' in", one, wave)
    assert str(one / "prompts.txt") in said and str(one / "1.txt") in said
    (one / "prompts.txt").unlink()
    assert prompts(data.load_case(one, wave).identity) == ["cat 1 *", "cat 2 *", "cat 10 *"]


def test_captions_by_line_and_by_name(one, wave):
    text(one / "prompts.txt", "red dog *", "", "blue dog *", "green dog *")
    assert prompts(data.load_case(one, wave).identity) == ["red dog *", "blue dog *", "green dog *"]
    windows = "\ufeff10.jpg\tred dog *\r\n1\tblue dog *\r\n2.png\tHündin *\r\n"
    (one / "prompts.txt").write_bytes(windows.encode())
    assert prompts(data.load_case(one, wave).identity) == ["blue dog *", "Hündin *", "red dog *"]


@pytest.mark.parametrize("lines, says", [
    (["dog *"] * 2, "2 captions for 3 files"),
    (["dog *"] * 4, "4 captions for 3 files"),
    ([" "], "0 captions for 3 files"),
    (["1\tdog *", "2\tdog *"], "no caption for 10.jpg"),
    (["1\tdog *", "2\tdog *", "3\tdog *", "10\tdog *"], "caption for 3, which is not among"),
    (["1\tdog *", "2 dog *", "10\tdog *"], "'2 dog \\*' has no tab"),
    (["1\tdog *", "2\t", "10\tdog *"], "no caption for 2.png"),
    (["1\tdog *", "1.webp\tcat *", "2\tdog *", "10\tdog *"], "two captions for 1.webp"),
])
def test_captions_that_do_not_match(one, wave, lines, says):
    text(one / "prompts.txt", *lines)
    assert "prompts.txt" in fails(says, one, wave)


@pytest.mark.parametrize("lines", [["1.png\tcat *", "1\tdog *"], ["1\tdog *", "1.png\tcat *"]])
def test_one_name_for_two_files(one, wave, lines):
    "Whichever line comes first."
    shutil.copy(one / "2.png", one / "1.png")
    text(one / "prompts.txt", *lines, "2\tdog *", "10\tdog *")
    assert "prompts.txt" in fails("two captions for 1.png", one, wave)


def test_missing_captions(one, wave):
    (one / "prompts.txt").unlink()
    assert '--identity-prompt "dog *"' in fails("one has no identity caption", one, wave)
    text(one / "1.txt", "dog *")
    fails("10.jpg has no caption|2.png has no caption", one, wave)
    (wave / "prompts.txt").unlink()
    assert "--motion-prompt" in fails("wave has no motion caption", one, wave, "dog *")
    fails("--motion-prompt is empty", one, wave, "dog *", " ")
    (one / "prompts.txt").write_bytes("Hündin *".encode("latin-1"))
    fails("prompts.txt is not UTF-8", one, wave)


def test_missing_class_word(one, wave):
    for prompt in ("*", "a photo of *", "the *", "  * "):
        fails("no class word", one, wave, prompt)
    text(one / "prompts.txt", "dog *", "*", "dog *")
    fails("no class word", one, wave)


def test_class_and_motion_words(one, wave):
    words = {"dog *": "dog", "plushie happysad *": "plushie happysad", "my * cat": "cat", "* cat": "cat",
             "a dog, * , in snow": "dog", "a stuffed toy-bear* on a bed": "stuffed toy-bear",
             "a cat": "cat", "R2D2 *": "R2D2", "犬 *": "犬"}
    assert {prompt: data.load_case(one, wave, prompt).class_word for prompt in words} == words
    def told(prompt): return data.load_case(one, wave, None, prompt).motion_words
    assert told("a person is kicking-Front") == "kicking-Front"
    assert told("two people are dancing.") == "dancing"
    assert told("backflip") == "backflip"


# Folders and files that are refused

def test_wrong_folders(tmp_path, one, wave):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare/images").mkdir(parents=True)
    text(tmp_path / "words/a.txt", "only text")
    fails("identity folder .*none does not exist", tmp_path / "none", wave)
    fails("motion folder .*none does not exist", one, tmp_path / "none")
    fails("1.webp is a file: --identity", one / "1.webp", wave)
    fails("b.mp4 is a file: --motion", one, wave / "b.mp4")
    for name in ("empty", "words"):
        fails(f"{name} holds no image", tmp_path / name, wave, "dog *")
        fails(f"{name} holds no clip", one, tmp_path / name, None, PERSON)
    fails("images holds no image", tmp_path / "bare", wave, "dog *")


def test_listing_that_leads_nowhere(one, wave):
    text(wave / "videos.txt", "b.mp4", "d.mp4")
    fails("videos.txt lists d.mp4, but .*d.mp4 does not exist", one, wave)
    text(wave / "videos.txt", "b.mp4", "prompts.txt")
    fails("videos.txt lists prompts.txt, which is not a video", one, wave)
    text(wave / "videos.txt", "")
    fails("videos.txt is empty", one, wave)
    text(wave / "videos.txt", str(wave / "b.mp4"))
    assert names(data.load_case(one, wave).motion) == ["b.mp4"]


def test_unreadable_among_good_ones(one, wave):
    (one / "2.png").write_bytes(b"not a picture")
    fails("2.png cannot be read", one, wave)
    photo(one / "2.png")
    (wave / "c.gif").write_bytes((wave / "c.gif").read_bytes()[:60])
    fails("c.gif cannot be read", one, wave)


def test_cut_off_and_short_clips(one, wave):
    whole = (wave / "b.mp4").read_bytes()
    (wave / "b.mp4").write_bytes(whole[:len(whole) - 60])
    fails("b.mp4", one, wave)
    for count, has in {1: "1 frame:", 4: "4 frames:"}.items():
        clip(wave / "b.mp4", count)
        fails(f"b.mp4 has {has} a motion clip needs at least 5", one, wave)
    clip(wave / "b.mp4", 5)
    assert len(data.read_item(data.load_case(one, wave).motion[1], 16, 16, 49)) == 5


def test_frames_of_two_sizes(tmp_path, one):
    for i in range(6): photo(tmp_path / f"m/v/{i}.png", width=24 + (i == 3))
    fails("3.png is 25x16, 0.png is 24x16", one, tmp_path / "m", None, PERSON)


# Reading and checking

def test_loading_decodes_nothing(one, wave, monkeypatch):
    for name in ("read_image", "read_video"): monkeypatch.delattr(data.video, name)
    assert len(data.load_case(one, wave).motion) == 3


def test_read_item(one, wave):
    case = data.load_case(one, wave)
    assert [data.read_item(item, 16, 16, 49).shape[0] for item in case.motion] == [17, 9, 5]
    shapes = [data.read_item(item, 8, 12, 9).shape for item in case.motion + case.identity]
    assert shapes == [(count, 8, 12, 3) for count in (9, 9, 5, 1, 1, 1)]
    long, short = (data.read_item(case.motion[0], 16, 24, most) for most in (49, 9))
    assert (long[:9] == short).all()
    assert len(data.read_item(case.motion[0], 16, 16, 1)) == 1


def test_check_of_a_good_case(one, wave):
    report = doctor.check_case(data.load_case(one, wave), 16, 24, 5, lambda prompt: (len(prompt.split()), 16))
    assert json.loads(json.dumps(report)) == report
    assert report["ok"] and (report["errors"], report["warnings"], report["findings"]) == (0, 0, [])
    assert report["counts"] == dict(identity=3, motion=3)
    assert report["base"] == dict(height=16, width=24, frames=5, fps=None, fit="crop", clip_step=4)
    row = report["motion"][0]
    assert (row["width"], row["height"], row["frames"], row["used"], row["fps"]) == (24, 16, 17, 5, 8.0)
    assert "5 of 17 frames at 8 fps" in doctor.format_report(report)


def test_check_gathers_everything(one, wave):
    (one / "2.png").write_bytes(b"")
    photo(one / "1.webp", width=200, height=20)
    photo(one / "10.jpg", width=8, height=5)
    clip(wave / "b.mp4", 1)
    (wave / "c.gif").unlink()
    (wave / "thumbs.db").touch()
    case = data.load_case(one, wave, "dog", "a dog * is waving")
    report = doctor.check_case(case, 16, 24, 9, lambda prompt: (len(prompt), 10))
    said = doctor.format_report(report)
    levels = [finding["level"] for finding in report["findings"]]
    assert levels == sorted(levels, key=("error", "warning", "note").index) and not report["ok"]
    assert report["errors"] == 3 and len(report["identity"]) == 2 and len(report["motion"]) == 1
    for words in ("2.png cannot be read", "b.mp4 has 1 frame", "17 tokens, the base takes 10",
                  "Few motion clips: 2", "'dog' has no \"*\"", "holds \"*\"", "200x20 is cropped",
                  "8x5 is enlarged 3.2 times", "thumbs.db", "cannot be trained (errors: 3"):
        assert words in said, (words, said)
    where = {Path(finding["where"]).name for finding in report["findings"] if finding["where"]}
    assert where == {"2.png", "b.mp4", "1.webp", "10.jpg"}


def test_check_says_alike_things_once(one, wave):
    report = doctor.check_case(data.load_case(one, wave), 64, 96, 49)
    said = doctor.format_report(report)
    assert said.count("enlarged 4.0 times") == 2  # images and clips
    assert "and 2 more: 24x16 is enlarged" in said
    assert said.count("Short clip") == 3  # three lengths
    assert report["ok"] and len([f for f in report["findings"] if "enlarged" in f["text"]]) == 6


def found(one, wave, *prompts, size=(16, 24, 9)):
    "Sentences of a report, after each of its findings has said what to do and both forms have shown it."
    report = doctor.check_case(data.load_case(one, wave, *prompts), *size)
    said = doctor.format_report(report)
    for finding in report["findings"]: assert finding["fix"] and finding["fix"] in said
    assert json.loads(json.dumps(report)) == report
    return [finding["text"] for finding in report["findings"]]


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_check_shows_what_is_trained_on(one, wave, tmp_path, fit):
    "The same frames, at the same rate, in the same frame; what that costs is said with a way out."
    clip(wave / "b.mp4", 60, fps=30)
    photo(one / "2.png", width=16, height=64)
    case, how = data.load_case(one, wave), dict(fps=10, fit=fit)
    frames = data.read_item(case.motion[1], 16, 24, 9, **how)
    assert len(frames) == 9 and (frames == data.video.read_video(wave / "b.mp4")[0][:25:3]).all()
    report = doctor.check_case(case, 16, 24, 9, **how)
    said = doctor.format_report(report)
    assert report["motion"][1]["used"] == 9 and f"{fit}ped to"[-6:] in said.replace("padded", "padped")
    assert "9 frames at 10 fps" in said
    shown = [f for f in report["findings"] if f["where"] == f"{one / '2.png'}"]
    assert len(shown) == 1 and f"--fit {dict(crop='pad', pad='crop')[fit]}" in shown[0]["fix"]
    assert doctor.case_sheet(case, 16, 24, 9, cell=16, **how).size[0] > 24
    slow = doctor.check_case(case, 16, 24, 9, fps=2)
    assert "use a clip of 4.5 seconds or more, or a higher --fps" in doctor.format_report(slow)


def test_doctor_tells_seconds(one, wave):
    "Of a camera's clip, nine frames are a moment."
    clip(wave / "b.mp4", 50, fps=25)
    assert "Only the first 0.36 of 2 seconds are used." in found(one, wave)
    slow = doctor.check_case(data.load_case(one, wave), 16, 24, 9, fps=5)
    assert "Only the first" not in doctor.format_report(slow)


def test_doctor_sees_a_swap(tmp_path, one, wave):
    for i in range(5): photo(tmp_path / "frames" / f"{i}.png")
    swapped = found(wave, tmp_path / "frames", "dog *", PERSON)
    assert "The subject's folder holds clips, the motion's holds pictures." in swapped
    assert not any("holds pictures" in text for text in found(one, wave))


def test_doctor_sees_copies(one, wave):
    "Also where a copy has another size and format; a mirrored one is another picture."
    photo(one / "2.png", 192, 128)
    picture = Image.open(one / "2.png")
    picture.resize((120, 80)).save(one / "3.jpg", quality=80)
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(one / "4.png")
    (wave / "d.mp4").write_bytes((wave / "b.mp4").read_bytes())
    assert [text for text in found(one, wave) if "the same" in text] == [
        f"{one / '3.jpg'} shows the same as 2.png.", f"{wave / 'd.mp4'} shows the same as b.mp4."]


def test_doctor_sees_what_stands_still(one, wave):
    still = np.broadcast_to(texture(wave / "s", 64, 48), (9, 48, 64, 3)).copy()
    write_video(wave / "still.mp4", still)
    still[4:, 10:20, 10:20] = 255
    write_video(wave / "moving.mp4", still)
    moves = [text for text in found(one, wave) if "moves" in text]
    assert moves == ["Nothing moves: 0.0% of the picture changes."]


@pytest.mark.parametrize("subject, motion, says", [
    ("a dog", PERSON, 'has no "*"'), ("dog *", "a dog is waving", "'dog', the class of the subject"),
    ("dog *", "a * is waving", 'holds "*"'), ("dog *", "the Dog is waving", "it leaks"),
    ("grey dog *", "a grey dog is waving", "'grey dog'"),
])
def test_doctor_reads_captions(one, wave, subject, motion, says):
    assert [text for text in found(one, wave, subject, motion) if says in text]
    assert not [text for text in found(one, wave, "dog *", "a hotdog is waving") if "leaks" in text]


def test_doctor_misses_the_subject(one, wave):
    text(one / "prompts.txt", "dog *", "dog *", "cat *")
    assert [t for t in found(one, wave) if "does not name the dog" in t and "'cat *'" in t]


def test_doctor_sees_shapes_rates_and_lengths(one, wave):
    photo(one / "tall.png", width=20, height=90)
    clip(wave / "fast.mp4", 12, fps=30)
    said = " ".join(found(one, wave, size=(16, 24, 13)))
    for words in ("20x90 is cropped to 24x16", "Clips of 8 to 30 frames a second", "12 frames, of which 9",
                  "Short clip: 5 of 13"): assert words in said, words
    tall = " ".join(found(one, wave, size=(90, 20, 9)))
    assert "20x90 is cropped" not in tall and "24x16 is cropped to 20x90" in tall


def test_sheet(one, wave, tmp_path):
    "Of a tall training size; what cannot be read is left out."
    (one / "2.png").write_bytes(b"")
    case = data.load_case(one, wave)
    sheet = doctor.case_sheet(case, 96, 48, 9, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == sheet.size
    for folder in (one, wave):
        for file in folder.glob("*.*"):
            if file.suffix != ".txt": file.write_bytes(b"")
    with pytest.raises(InputError, match="nothing to show"): doctor.case_sheet(case, 96, 48, 9)


def test_check_of_an_identity_clip(tmp_path, wave):
    clip(tmp_path / "one/a.mp4", 7)
    report = doctor.check_case(data.load_case(tmp_path / "one", wave, "dog *"), 16, 24, 5)
    assert "Only the first of 7 frames is used." in doctor.format_report(report)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real folders (../shared/real) are not here")
def test_real_folders():
    case = data.load_case(REAL / "dog", REAL / "playingGuitar")
    assert (len(case.identity), len(case.motion)) == (5, 15)
    assert {item.path.suffix for item in case.identity} == {".png"}
    assert (case.class_word, case.motion_words, case.notes) == ("dog", "playing guitar", [])
    report = doctor.check_case(case, 480, 720, 49)
    assert report["ok"] and not report["warnings"]
    assert {(row["frames"], row["used"], row["fps"]) for row in report["motion"]} == {(250, 49, 25.0)}
    assert data.read_item(case.motion[0], 64, 64, 9).shape == (9, 64, 64, 3)
    with pytest.raises(InputError, match="00.mp4 has 1 frame"):
        data.read_item(data.load_case(REAL / "dog", REAL / "dog").motion[0], 64, 64, 9)
