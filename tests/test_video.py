"""Clips and images as people have them: containers, cameras, damage; both decoders say the same."""
import importlib.util
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualreal import video
from dualreal.core import InputError

av = pytest.importorskip("av")
SHARED = Path(__file__).resolve().parents[2] / "shared/real"
REAL = sorted(SHARED.glob("*/videos/*"))
HAS_DECORD = importlib.util.find_spec("decord") is not None
needs_decord = pytest.mark.skipif(not HAS_DECORD, reason="decord has no wheel here")


def pattern(count=9, height=64, width=96):
    "Frames full of gradients, each different."
    y, x = np.mgrid[:height, :width]
    shades = [np.stack([2 * x + 5 * i, 3 * y + 7 * i, x + y + i], -1) % 256 for i in range(count)]
    return np.stack(shades).astype(np.uint8)


def encode(path, frames, codec="libx264", pixels="yuv420p", rate=8, sound=0., faststart=True, **attributes):
    "Write a clip with settings that `write_video` does not offer."
    options = dict(movflags="faststart") if path.suffix == ".mp4" and faststart else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for name, value in attributes.items(): setattr(stream.codec_context, name, value)
        audio = container.add_stream("aac", rate=8000, layout="mono") if sound else None
        for frame in frames: container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
        for i in range(int(sound * 8000 / 1024)):
            hush = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            hush.sample_rate, hush.pts = 8000, i * 1024
            container.mux(audio.encode(hush))
        if audio: container.mux(audio.encode())
    return path


def turned(source, target, matrix):
    "Copy an mp4 and set the rotation a phone would store, in the `tkhd` box."
    data = bytearray(source.read_bytes())
    start = data.find(b"tkhd") + 4 + 40
    data[start:start + 36] = np.array(matrix, ">i4").tobytes()
    target.write_bytes(data)
    return target


def cut(source, target, share):
    "Copy the first part of a file."
    data = source.read_bytes()
    target.write_bytes(data[:int(len(data) * share)])
    return target


def both(path):
    "The same clip through both decoders."
    return video.read_video(path, backend="decord")[0], video.read_video(path, backend="pyav")[0]


# Decoders

@needs_decord
@pytest.mark.skipif(not REAL, reason="the real clips (../shared/real) are not here")
@pytest.mark.parametrize("path", REAL, ids=lambda p: p.name)
def test_backends_agree_on_real_clips(path):
    one, other = both(path)
    with av.open(str(path)) as container: codec = container.streams.video[0].codec.name
    # FFmpeg 8.1 (PyAV 17.1) rounds some Xvid blocks by 1 or 2 grey levels; PyAV 12 to 17.0 agree to the bit.
    changed = codec == "mpeg4" and av.library_versions["libavcodec"] >= (62, 28, 0)
    assert one.shape == other.shape
    different = one != other
    if not changed: assert not different.any()
    assert different.mean() < 1e-4  # 3 of the 15 Xvid clips, at most 2 in 100,000 values
    assert np.abs(one[different].astype(int) - other[different]).max(initial=0) <= 2

WRITE = """
import hashlib, numpy as np
from dualreal.video import write_video
for height, width in ((32, 48), (48, 80), (64, 96), (47, 71), (240, 320)):
    size = 9, height // 8 + 1, width // 8 + 1, 3
    blocks = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    frames = blocks.repeat(8, 1).repeat(8, 2)[:, :height, :width]
    for _ in range(3): print(width, hashlib.sha256(write_video("a.mp4", frames).read_bytes()).hexdigest())
"""


def test_same_frames_make_the_same_file(tmp_path):
    "In one process and in others, whatever is in memory that nobody wrote (glibc fills it on request)."
    command, runs = [sys.executable, "-c", WRITE], []
    for fill in ("85", "170"):
        given = dict(cwd=tmp_path, env=os.environ | dict(MALLOC_PERTURB_=fill))
        runs.append(subprocess.run(command, capture_output=True, text=True, check=True, **given).stdout)
    assert runs[0] == runs[1] and len(set(runs[0].splitlines())) == 5


@needs_decord
@pytest.mark.parametrize("width", [16, 24, 48, 64, 72, 94, 96])
def test_backends_agree_at_every_width(tmp_path, width):
    one, other = both(video.write_video(tmp_path / "a.mp4", pattern(5, 48, width)))
    assert one.shape == (5, 48, width, 3)
    assert (one == other).all()


@needs_decord
@pytest.mark.parametrize("name, settings", {
    "a.webm": dict(codec="libvpx-vp9"), "a.avi": dict(codec="mpeg4"), "a.mkv": {}, "a.mov": {},
    "hd.mp4": dict(colorspace=1, color_range=1), "full.mp4": dict(colorspace=5, color_range=2),
    "fine.mp4": dict(pixels="yuv444p"), "film.mp4": dict(rate=Fraction(24000, 1001))}.items())
def test_backends_agree_on_containers_and_colours(tmp_path, name, settings):
    path = encode(tmp_path / name, pattern(), **settings)
    one, other = both(path)
    assert one.shape == (9, 64, 96, 3) and (one == other).all()
    assert video.read_video(path)[1] == pytest.approx(float(settings.get("rate", 8)), rel=1e-3)
    assert video.clip_facts(path).frames == 9


@needs_decord
@pytest.mark.parametrize("quarters, matrix", {
    3: (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30), 2: (-65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30),
    1: (0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30)}.items())
def test_phone_clips_stand_upright(tmp_path, quarters, matrix):
    plain = video.write_video(tmp_path / "plain.mp4", pattern())
    one, other = both(turned(plain, tmp_path / "turned.mp4", matrix))
    assert (one == other).all()
    assert (one == np.rot90(video.read_video(plain)[0], quarters, (1, 2))).all()


def test_without_decord_pyav_reads(tmp_path, monkeypatch):
    path = video.write_video(tmp_path / "a.mp4", pattern())
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "decord", None)
    assert video.read_video(path)[0].shape == (9, 64, 96, 3)
    with pytest.raises(InputError, match="not installed"): video.read_video(path, backend="decord")
    with pytest.raises(InputError, match="'opencv' is unknown"): video.read_video(path, backend="opencv")


def test_import_loads_no_decoder_and_no_torch(tmp_path):
    heavy = ("torch", "av", "decord", "IPython")
    code = f"import sys, dualreal.video; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_names_with_blanks_and_accents(tmp_path):
    path = video.write_video(tmp_path / "un été à la mer 犬.mp4", pattern())
    assert video.read_video(path)[0].shape == (9, 64, 96, 3)


def test_max_frames_stops_early(tmp_path):
    path = encode(tmp_path / "a.mp4", pattern(30))
    whole = video.read_video(path)[0]
    for backend in ("pyav", None):
        assert (video.read_video(path, 7, backend)[0] == whole[:7]).all()
    assert len(video.read_video(path, 99)[0]) == 30


def test_one_frame_is_a_clip(tmp_path):
    for name in ("a.mp4", "a.gif"):
        assert len(video.read_video(video.write_video(tmp_path / name, pattern(1)))[0]) == 1


# Damage: one sentence, the path in it, nothing else on stderr

@pytest.mark.parametrize("backend", ["pyav", pytest.param("decord", marks=needs_decord)])
@pytest.mark.parametrize("name, settings", {
    "fast.mp4": {}, "slow.mp4": dict(faststart=False), "a.mov": {}, "a.mkv": {}, "a.avi": dict(codec="mpeg4"),
    "a.webm": dict(codec="libvpx-vp9")}.items())
@pytest.mark.parametrize("share", [0.02, 0.5, 0.8])
def test_cut_off_clip(tmp_path, capfd, backend, name, settings, share):
    whole = encode(tmp_path / name, pattern(40), **settings)
    path = cut(whole, tmp_path / f"part{whole.suffix}", share)
    with pytest.raises(InputError, match=r"part\.\w+") as caught: video.read_video(path, 5, backend)
    assert "\n" not in str(caught.value)
    assert not any(capfd.readouterr())


@pytest.mark.skipif(not REAL, reason="the real clips (../shared/real) are not here")
def test_cut_off_real_clip(tmp_path):
    path = cut(REAL[-1], tmp_path / "guitar.avi", 0.5)
    with pytest.raises(InputError, match=r"guitar\.avi is cut off: .* of the promised 250 frames"):
        video.read_video(path, 9)


@pytest.mark.parametrize("name, data", {"a.mp4": b"", "b.mp4": b"no video at all" * 99, "c.gif": b"GIF89a",
                                        "d.gif": b"", "e.webm": b"\x1a\x45\xdf\xa3"}.items())
def test_unreadable_clip(tmp_path, name, data, capfd):
    (tmp_path / name).write_bytes(data)
    for read in (video.read_video, video.clip_facts):
        with pytest.raises(InputError, match=name): read(tmp_path / name)
    assert not any(capfd.readouterr())


def test_damaged_inside(tmp_path):
    data = bytearray(encode(tmp_path / "a.mp4", pattern(30)).read_bytes())
    data[len(data) // 3:len(data) * 2 // 3] = bytes(len(data) * 2 // 3 - len(data) // 3)
    (tmp_path / "holes.mp4").write_bytes(data)
    with pytest.raises(InputError, match="holes.mp4"): video.read_video(tmp_path / "holes.mp4")


def test_cut_off_gif(tmp_path):
    path = cut(video.write_video(tmp_path / "a.gif", pattern()), tmp_path / "part.gif", 0.6)
    with pytest.raises(InputError, match="part.gif"): video.read_video(path, 1)


def test_sound_is_no_video_and_outlasts_it(tmp_path):
    path = encode(tmp_path / "long.mkv", pattern(), sound=5.)
    assert video.read_video(path)[0].shape == (9, 64, 96, 3)
    assert video.clip_facts(path).frames == 9
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        hush = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        hush.sample_rate = 8000
        container.mux(stream.encode(hush))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="song.mp4 holds no video"): video.read_video(tmp_path / "song.mp4")


def test_wrong_paths(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    wrong = {"a.txt": "is not a video", "none.mp4": "does not exist", "empty": "holds no frames"}
    for name, says in wrong.items():
        for read in (video.read_video, video.clip_facts):
            if (read, name) == (video.clip_facts, "empty"): continue
            with pytest.raises(InputError, match=f"{name} {says}"): read(tmp_path / name)
    assert video.clip_facts(tmp_path / "empty").frames == 0


# Folders of frames and GIFs

def test_folder_of_frames(tmp_path):
    frames = pattern(11, 8, 10)
    for i, frame in enumerate(frames): Image.fromarray(frame).save(tmp_path / f"f{i}.png")
    (tmp_path / "._f0.png").write_bytes(b"what macOS leaves behind")
    (tmp_path / "notes.txt").write_text("no frame")
    read, fps = video.read_video(tmp_path)
    assert (read == frames).all() and fps == 8 and video.clip_facts(tmp_path).frames == 11
    Image.new("RGB", (11, 8)).save(tmp_path / "f10.png")
    assert len(video.read_video(tmp_path, 10)[0]) == 10
    with pytest.raises(InputError, match=r"f10\.png is 11x8, f0\.png is 10x8"): video.read_video(tmp_path)
    (tmp_path / "f3.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"f3\.png cannot be read"): video.read_video(tmp_path)


def test_gif_keeps_resting_frames(tmp_path):
    frames = pattern(3, 16, 16)[[0, 0, 0, 1, 2, 2]]
    path = video.write_video(tmp_path / "a.gif", frames, fps=10)
    read, fps = video.read_video(path)
    assert len(read) == 6 and fps == 10 and video.clip_facts(path).frames == 6
    assert (read[0] == read[2]).all() and (read[2] != read[3]).any()
    assert len(video.read_video(path, 2)[0]) == 2


def test_gif_transparency_is_white(tmp_path):
    picture = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    picture.putpixel((0, 0), (200, 0, 0, 255))
    both = dict(save_all=True, append_images=[picture.rotate(180)])
    picture.save(tmp_path / "a.gif", **both, duration=100, disposal=2)
    read, _ = video.read_video(tmp_path / "a.gif")
    assert read[0, 2, 3].tolist() == [255] * 3 and read[0, 0, 0].tolist() == [200, 0, 0]


# Images

@pytest.mark.parametrize("mode", "1 L LA P PA RGB RGBA CMYK YCbCr I;16 I F HSV".split())
def test_image_modes(tmp_path, monkeypatch, mode):
    "White in every mode; not every mode has a format that stores it."
    grey = Image.fromarray(np.full((4, 6), 255, np.uint8))
    image = {"I;16": lambda: Image.fromarray(np.full((4, 6), 65535, np.uint16)),
             "I": lambda: Image.fromarray(np.full((4, 6), 65535, np.int32)),
             "F": lambda: Image.fromarray(np.ones((4, 6), np.float32)),
             "PA": lambda: grey.convert("P").convert("PA"),
             "HSV": lambda: grey.convert("RGB").convert("HSV")}.get(mode, lambda: grey.convert(mode))()
    assert image.mode == mode
    (tmp_path / "a.png").touch()
    monkeypatch.setattr(Image, "open", lambda path: image)
    assert (video.read_image(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.webp", "a.bmp", "a.tif", "a.gif"])
def test_image_files(tmp_path, name):
    Image.new("RGB", (6, 4), (250, 120, 20)).save(tmp_path / name)
    read = video.read_image(tmp_path / name)
    assert read.dtype == np.uint8 and read.shape == (4, 6, 3)
    assert np.abs(read - np.array([250, 120, 20])).max() < 12


@pytest.mark.parametrize("flag, turn", {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 6: lambda a: np.rot90(a, -1),
    8: np.rot90}.items())
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_orientation_flag(tmp_path, flag, turn, suffix):
    pixels, exif = pattern(1, 4, 6)[0], Image.Exif()
    exif[0x0112] = flag
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}", exif=exif)
    assert (video.read_image(tmp_path / f"a{suffix}") == turn(pixels)).all()


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=0)
    assert video.read_image(tmp_path / "a.png").tolist() == [[[255] * 3, [40, 50, 60]]]


def test_unreadable_images(tmp_path):
    Image.fromarray(pattern(1, 200, 200)[0]).save(tmp_path / "whole.jpg")
    cut(tmp_path / "whole.jpg", tmp_path / "part.jpg", 0.5)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.webp").touch()
    (tmp_path / "folder.png").mkdir()
    for name in ("part.jpg", "text.png", "empty.webp", "none.png", "folder.png"):
        with pytest.raises(InputError, match=name) as caught: video.read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


# Writing

@pytest.mark.parametrize("height, width", [(64, 96), (63, 95), (1, 1), (17, 16)])
def test_mp4_round_trip(tmp_path, height, width):
    frames = np.full((5, height, width, 3), (200, 90, 40), np.uint8)
    read, fps = video.read_video(video.write_video(tmp_path / "new/a.mp4", frames, 12.5))
    assert read.shape == (5, height + height % 2, width + width % 2, 3) and fps == 12.5
    assert np.abs(read - np.array([200, 90, 40])).max() < 8  # padded rows and columns too


def test_mp4_is_what_browsers_play(tmp_path):
    path = video.write_video(tmp_path / "a.mp4", pattern())
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        assert (stream.codec.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert frame.colorspace == 2  # unspecified: BT.601 by convention
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")  # starts playing before it is loaded


def test_failed_write_loses_nothing(tmp_path, monkeypatch):
    path = video.write_video(tmp_path / "a.mp4", pattern())
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("av.open", full)
    with pytest.raises(OSError): video.write_video(path, pattern())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_refused_writes(tmp_path):
    clip = pattern()
    wrong = [("a.avi", clip, 8), ("a.mp4", clip[0], 8), ("a.mp4", clip[:0], 8), ("a.mp4", clip, 0),
             ("a.gif", clip.astype(float), 8), ("a.mp4", clip[..., :1], 8)]
    for name, frames, fps in wrong:
        with pytest.raises(InputError): video.write_video(tmp_path / name, frames, fps)
    assert not any(tmp_path.iterdir())


# Size, length, pictures

def test_resize_crop_keeps_proportions():
    frames = np.zeros((1, 100, 300, 3), np.uint8)
    y, x = np.mgrid[:100, :300]
    frames[0, np.hypot(y - 50, x - 150) < 40] = 255
    small = video.resize_crop(frames, 50, 75)[0, ..., 0] > 127
    assert abs(small.any(0).sum() - small.any(1).sum()) <= 1 and abs(small.any(0).sum() - 40) <= 1
    lines = np.zeros((1, 64, 64, 3), np.uint8)
    lines[:, :, ::2] = 255
    assert video.resize_crop(lines, 16, 16).std() < 20  # antialiased: grey, no moiré


def test_usable_and_sampled_frames():
    assert [video.usable_frames(n, 49) for n in (1, 3, 5, 8, 9, 50)] == [1, 1, 5, 5, 9, 49]
    with pytest.raises(InputError): video.usable_frames(0, 49)
    assert video.sample_frames(np.arange(30), 30, 99, 10).tolist() == list(range(0, 30, 3))
    assert video.sample_frames(np.arange(30), 29.97, 4, 29.97).tolist() == [0, 1, 2, 3]


def test_natural_order():
    names = ["b1.png", "a10.png", "a9.png", "A1.png", "10.png", "9.png"]
    assert " ".join(sorted(names, key=video.natural_key)) == "9.png 10.png A1.png a9.png a10.png b1.png"


def test_contact_sheet(tmp_path):
    one, clip = pattern(1, 40, 60)[0], pattern(17, 40, 60)
    rows = [("images", [one, one]), ("a very long label " * 4, [clip, clip])]
    sheet = video.contact_sheet(rows, tmp_path / "s.png")
    assert sheet.mode == "RGB" and sheet.height == 2 * 96 + 3 + 20
    assert (np.array(Image.open(tmp_path / "s.png")) == np.array(sheet)).all()
    wide = video.contact_sheet([("x", [one] * 12)], cell=32)
    assert wide.width > 12 * 48
    assert video.contact_sheet([("none", []), ("tall", [np.zeros((90, 10, 3), np.uint8)])]).height == 215
    with pytest.raises(InputError): video.contact_sheet([("none", [])])


def test_film():
    shown = video.film(pattern(3, 8, 10), scale=2)
    assert shown.data[:6] == b"GIF89a" and shown.width == 20
