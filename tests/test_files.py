"""What a viewer shows is what is read: clips, photos and captions as people have them, made here by code."""
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import unicodedata
import zlib
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dualreal import data, doctor, video
from dualreal.core import InputError

av = pytest.importorskip("av")
SHARED = Path(__file__).resolve().parents[2] / "shared"
PIXELS = json.loads((Path(__file__).parent / "goldens/pixels.json").read_text())
COLOURS = np.array([(40, 40, 40), (230, 230, 230), (200, 60, 50), (60, 170, 80), (60, 80, 200),
                    (210, 190, 60)])
PERSON = "a person is waving"
TURNS_ARE_WRITTEN = hasattr(av.video.stream.VideoStream, "set_display_rotation")


def patches(count=9, high=64, wide=96):
    "Six plain colours; the first counts frames in greys."
    frames = COLOURS.reshape(2, 3, 3).repeat(high // 2, 0).repeat(wide // 3, 1)[None].repeat(count, 0)
    frames[:, :high // 2, :wide // 3] = 20 + 200 * np.arange(count)[:, None, None, None] // max(count, 9)
    return frames.astype(np.uint8)


def middles(frames):
    "Mean colours of the six patches, (F, 6, 3)."
    count, high, wide = frames.shape[:3]
    inner = frames.reshape(count, 2, high // 2, 3, wide // 3, 3)[:, :, high // 8:-high // 8, :,
                                                                 wide // 12:-wide // 12]
    return inner.mean((2, 4)).reshape(count, 6, 3)


def write(path, frames, codec="libx264", pixels="yuv420p", rate=24, times=None, form=None, turn=None,
          aspect=None,
          options=None, muxer=None, given="rgb24", **tags):
    "A clip with everything that a camera may write."
    same = dict(threads="1", mbtree="0") if codec == "libx264" else {}  # the same bytes every time
    with av.open(str(path), "w", format=form, options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options=same | (options or {}))
        height, width = (frames.shape[1:3] if given == "rgb24" else frames[0][1])
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        if aspect: stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if turn: stream.set_display_rotation(*turn)
        if times is not None: stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for name, value in tags.items(): setattr(stream.codec_context, name, value)
        for i, frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(frame if given == "rgb24" else frame[0], format=given)
            if times is not None: frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def trimmed(source, target, first):
    "Copied without re-encoding: packets before `first` stay, and an edit list hides them."
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        step = None
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is None: continue
            step = step or packet.duration
            packet.pts, packet.dts = packet.pts - first * step, packet.dts - first * step
            packet.stream = stream
            new.mux(packet)
    return target


# Clips: name -> (how it is made, frames that a player shows)

def av1(path): return write(path, patches(), "libsvtav1", options=dict(preset="12", crf="10"))
def live(path): return write(path, patches(), "libvpx-vp9", form="webm", muxer=dict(live="1"))
def vp8(path): return write(path, patches(30), "libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16"})
def ts(path): return write(path, patches(), form="mpegts")
def fragmented(path): return write(path, patches(), muxer=dict(movflags="frag_keyframe+empty_moov"))
def lying_gif(path): video.write_video(path.with_suffix(".gif"), patches()).rename(path); return path
def lying_mp4(path): video.write_video(path.with_suffix(".mp4"), patches()).rename(path); return path


def trim(path):
    whole = write(path.with_name("whole.mp4"), patches(20))
    return trimmed(whole, path, 8)


CLIPS = {"av1.mp4": (av1, patches()), "live.webm": (live, patches()), "alt.webm": (vp8, patches(30)),
         "a.ts": (ts, patches()),
         "frag.mp4": (fragmented, patches()), "really_gif.mp4": (lying_gif, patches()),
         "really_mp4.gif": (lying_mp4, patches()),
         "trim.mp4": (trim, patches(20)[8:])}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_read_as_a_player_shows_it(tmp_path, name):
    "In facts, frames, a case and a stream alike."
    make, frames = CLIPS[name]
    path = make(tmp_path / name)
    read, fps = video.read_video(path)
    assert len(read) == len(frames) == video.clip_facts(path).frames == sum(map(len,
                                                                                video.stream_video(path, 4)))
    assert np.abs(middles(read) - middles(frames)).mean() < 4
    assert fps == pytest.approx(24, rel=.02) or "gif" in name
    assert (data.read_item(data.Item(path, "video", PERSON), 64, 96, 9) == read[:9]).all()
    assert data.source_frames(data.Item(path, "video", PERSON), 9)[0].shape[0] == 9


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".apng", ".avif"])
def test_pictures_that_move_are_clips(tmp_path, suffix):
    stills = [Image.fromarray(frame) for frame in patches()]
    how = dict(save_all=True, append_images=stills[1:], duration=[80] * 9)
    stills[0].save(tmp_path / f"a{suffix}", format="PNG" if suffix == ".apng" else None, **how)
    stills[0].save(tmp_path / "b.webp", **how)
    assert [p.name for p in data.motion_files(tmp_path)[0]] == [f"a{suffix}", "b.webp"]
    frames, fps = video.read_video(tmp_path / f"a{suffix}")
    assert len(frames) == 9 and fps == pytest.approx(12.5)
    assert np.abs(middles(frames) - middles(patches())).mean() < 6
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    assert "still.png" in data.motion_files(tmp_path)[1][0]


def test_a_varying_rate_is_thinned_by_times(tmp_path):
    "For each wanted instant, the nearest picture; a pause lasts."
    times = [0, 33, 66, 100, 133, 166, 200, 500, 800, 1100, 1133, 1166, 1200]
    path = write(tmp_path / "a.mp4", patches(13), times=times)
    facts = video.clip_facts(path)
    assert facts.variable and facts.frames == 13 and facts.fps == pytest.approx(12 / 1.2, rel=.01)
    for fps in (2, 8, 12):
        wanted = np.arange(int(1.2 * fps + 1e-6) + 1) / fps
        nearest = [int(np.argmin(np.abs(np.array(times) / 1000 - instant))) for instant in wanted]
        assert video.pick_frames(facts, 99, fps) == nearest
    assert video.pick_frames(facts, 99) == list(range(13))
    item = data.Item(path, "video", PERSON)
    assert (data.source_frames(item, 9, 8)[0] == video.read_video(path)[0][video.pick_frames(facts, 9,
                                                                                             8)]).all()
    assert any("frame rate varies" in note for note in facts.notes)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("degrees, flips", [(90, ()), (180, ()), (-90, ()), (0, (True, False)),
                                            (90, (True, False))])
def test_turned_clips_stand_upright(tmp_path, suffix, degrees, flips):
    if not TURNS_ARE_WRITTEN: pytest.skip("this PyAV writes no display matrix")
    read = video.read_video(write(tmp_path / f"a{suffix}", patches(3), turn=(degrees, *flips)))[0]
    plain = video.read_video(write(tmp_path / f"plain{suffix}", patches(3)))[0]
    upright = np.rot90(plain, degrees // 90, (1, 2))
    if flips: upright = upright[:, :, ::-1]
    assert read.shape == upright.shape and (read == upright).all()
    assert video.clip_facts(tmp_path / f"a{suffix}")[8:10] == read.shape[1:3]


@pytest.mark.parametrize("aspect, size", [("4/3", (64, 128)), ("2", (64, 192)), ("1/2", (128, 96)),
                                          ("1", (64, 96))])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_pixels_become_square(tmp_path, aspect, size, suffix):
    path = write(tmp_path / f"a{suffix}", patches(), aspect=aspect)
    read, facts = video.read_video(path)[0], video.clip_facts(path)
    assert read.shape[1:3] == size == (facts.height, facts.width)
    if size[1] % 3 == 0: assert np.abs(middles(read) - middles(patches())).mean() < 4


def moments(count=20):
    "A bar that moves between any two of them."
    bars = np.full((count, 64, 96, 3), 60, np.uint8)
    for i, bar in enumerate(bars): bar[:, 3 * i:3 * i + 24] = 200
    return bars


def combs(frames):
    grey = frames[..., 1].astype(int)
    return np.abs(2 * grey[:, 1:-1] - grey[:, :-2] - grey[:, 2:]).mean()


@pytest.mark.parametrize("name, codec, how", [
    ("a.mp4", "libx264", {"x264-params": "interlaced=1", "crf": "4"}),
    ("a.mkv", "libx264", {"x264-params": "interlaced=1", "crf": "4"}),
    ("a.mpg", "mpeg2video", {"flags": "+ildct+ilme", "b": "8M"})])
def test_interlaced_clips_have_no_combs(tmp_path, name, codec, how):
    "One moment of each frame's two, as a player shows; progressive ones are left as they are."
    woven = moments()[::2].copy()
    woven[:, 1::2] = moments()[1::2, 1::2]
    path = write(tmp_path / name, woven, codec, options=how)
    read = video.read_video(path)[0]
    assert len(read) == 10 == video.clip_facts(path).frames and combs(woven) > 100 * combs(read)
    assert min(np.abs(read - moments()[i::2].astype(int)).mean() for i in (0, 1)) < 1
    assert (video.read_frames(path, [3, 5]) == read[[3, 5]]).all()
    assert [len(some) for some in video.stream_video(path, 4)] == [4, 4, 2]
    assert len(video.read_video(write(tmp_path / f"one_{name}", woven[:1], codec, options=how))[0]) == 1
    assert combs(video.read_video(write(tmp_path / "plain.mp4", woven, options=dict(crf="4")))[0]) > 10


@pytest.mark.parametrize("name, codec, pixels", [
    ("a.webm", "libvpx-vp9", "yuva420p"), ("a.mov", "prores_ks", "yuva444p10le"), ("b.mov", "png", "rgba"),
    ("a.mkv", "ffv1", "bgra")])
def test_transparent_clips_lie_on_white(tmp_path, name, codec, pixels):
    "As stills do."
    alpha = np.full((64, 96), 255, np.uint8)
    alpha[:, 48:], alpha[:, 40:48] = 0, 128
    frames = [np.dstack([frame, alpha]) for frame in patches()]
    path = write(tmp_path / name, [(frame, (64, 96)) for frame in frames], codec, pixels, given="rgba")
    still = Image.fromarray(frames[4])
    still.save(tmp_path / "a.png")
    read, wanted = video.read_video(path)[0], video.read_image(tmp_path / "a.png").astype(int)
    away = np.abs(read[4] - wanted)
    assert read.shape == (9, 64, 96, 3) and away.mean() < 3 and away[:, 52:].max() <= 2
    said = "what is transparent in it becomes white"
    assert said in video.clip_facts(path).notes and said in video.image_facts(tmp_path / "a.png").notes


def test_filling_is_not_transparent(tmp_path):
    "The fourth byte of raw pixels."
    frames = [(np.dstack([f[..., ::-1], np.zeros((64, 96), np.uint8)]), (64, 96)) for f in patches()]
    path = write(tmp_path / "a.avi", frames, "rawvideo", "bgra", given="bgra")
    assert (video.read_video(path)[0] == patches()).all()


def several(path, shown):
    "A file of two videos, of which one is marked as the default."
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=24) for _ in range(2)]
        for i, stream in enumerate(streams):
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
            stream.disposition = type(stream.disposition)(int(i == shown))
        for frame in patches():
            for i, stream in enumerate(streams):
                picture = frame if i == shown else 255 - frame
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams: container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
@pytest.mark.parametrize("shown", [0, 1])
def test_the_marked_video_is_read(tmp_path, suffix, shown):
    path = several(tmp_path / f"a{suffix}", shown)
    assert np.abs(middles(video.read_video(path)[0]) - middles(patches())).mean() < 4
    assert video.clip_facts(path).videos == 2 and "it holds 2 videos" in video.clip_facts(path).notes[0]


@pytest.mark.parametrize("suffix, first", [(".mkv", 120), (".mp4", 120), (".ts", 120), (".mkv", -1)])
def test_a_clip_may_begin_late(tmp_path, suffix, first):
    "Its first picture is shown after five seconds, or before zero."
    whole = write(tmp_path / "whole.mp4", patches(20), options=dict(bf="3"))
    path = trimmed(whole, tmp_path / f"a{suffix}", -first)
    read, facts = video.read_video(path)[0], video.clip_facts(path)
    assert len(read) == facts.frames == 20 and facts.fps == pytest.approx(24)
    assert np.abs(middles(read) - middles(patches(20))).mean() < 4


@pytest.mark.parametrize("high, wide", [(65, 97), (65, 96), (64, 97)])
@pytest.mark.parametrize("name, codec, pixels", [
    ("a.webm", "libvpx-vp9", "yuv420p"), ("a.avi", "mpeg4", "yuv420p"), ("a.mp4", "libx264", "yuv444p"),
    ("b.avi", "mjpeg", "yuvj420p")])
def test_odd_sides(tmp_path, high, wide, name, codec, pixels):
    frames = np.pad(patches(), ((0, 0), (0, high - 64), (0, wide - 96), (0, 0)), mode="edge")
    path = write(tmp_path / name, frames, codec, pixels)
    read = video.read_video(path)[0]
    assert read.shape == frames.shape and video.clip_facts(path)[8:10] == frames.shape[1:3]
    assert np.abs(middles(read[:, :64, :96]) - middles(patches())).mean() < 4
    assert np.abs(read[:, -1] - frames[:, -1].astype(int)).mean() < 5


def test_sentences_about_files_are_true(tmp_path):
    for name in ("a.mp4", "a.gif", "a.jpg"):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match=f"{name} cannot be read as a.*it is empty"):
            (video.read_image if name == "a.jpg" else video.read_video)(tmp_path / name)
    (tmp_path / "x.mp4").mkdir()
    with pytest.raises(InputError, match="x.mp4 holds no frames"): video.read_video(tmp_path / "x.mp4")
    (tmp_path / "text.jpg").write_text("hello" * 99)
    with pytest.raises(InputError, match="no known format"): video.read_image(tmp_path / "text.jpg")
    os.rename(write(tmp_path / "b.mp4", patches()), tmp_path / "b.jpg")
    with pytest.raises(InputError, match="b.jpg .*: it is a video"): video.read_image(tmp_path / "b.jpg")
    assert video.is_clip(tmp_path / "b.jpg") and len(video.read_video(tmp_path / "b.jpg")[0]) == 9
    Image.fromarray(patches(1)[0]).save(tmp_path / "whole.avif")
    (tmp_path / "c.avif").write_bytes((tmp_path / "whole.avif").read_bytes()[:200])
    with pytest.raises(InputError, match="c.avif .*damaged or cut off"): video.read_image(tmp_path / "c.avif")


def dolby(path, tags):
    "HEVC under the name that Dolby Vision has where nothing else can show it."
    quiet = {"x265-params": "log-level=none"}
    write(path, patches(), "libx265", "yuv420p10le", options=quiet, **tags)
    path.write_bytes(path.read_bytes().replace(b"hev1", b"dvh1"))
    return path


def test_colours_that_cannot_be_shown(tmp_path):
    says = r"Dolby Vision without colours for other screens \(profile 5\): export it as HDR10"
    with pytest.raises(InputError, match=says): video.read_video(dolby(tmp_path / "five.mp4", {}))
    eight = dolby(tmp_path / "eight.mp4", dict(colorspace=9, color_primaries=9, color_trc=18))
    assert video.clip_facts(eight).colours == "HLG" and len(video.read_video(eight)[0]) == 9
    path = write(tmp_path / "a.mp4", patches(), pixels="yuv444p", colorspace=8)
    with pytest.raises(InputError, match="cannot be converted .*matrix 8"): video.read_video(path)


@pytest.mark.parametrize("flag", [1, 3, 6, 8])
def test_pictures_of_a_clip_may_be_turned(tmp_path, flag):
    "Motion JPEG with EXIF, as a photo with it."
    exif = Image.Exif()
    exif[0x0112] = flag
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p"
        for i, frame in enumerate(patches()):
            Image.fromarray(frame).save(tmp_path / "a.jpg", quality=95, exif=exif)
            packet = av.Packet((tmp_path / "a.jpg").read_bytes())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 24)
            container.mux(packet)
    read, wanted = video.read_video(tmp_path / "a.mov")[0][-1], video.read_image(tmp_path / "a.jpg")
    assert read.shape == wanted.shape and np.abs(read - wanted.astype(int)).mean() < 2


# Colour: signals written by the standards' formulas, and what a screen of BT.709 shows of them, computed here

KR_KB = {1: (.2126, .0722), 9: (.2627, .0593)}


def ycc(rgb, matrix):
    "10-bit limited-range Y'CbCr (F', 3) of R'G'B' 0..1."
    kr, kb = KR_KB[matrix]
    y = rgb @ np.array([kr, 1 - kr - kb, kb])
    cb, cr = (rgb[..., 2] - y) / (2 - 2 * kb), (rgb[..., 0] - y) / (2 - 2 * kr)
    return np.stack([64 + 876 * y, 512 + 896 * cb, 512 + 896 * cr], -1).round().astype(np.uint16)


def signal(path, rgb, matrix, **tags):
    "A lossless 10-bit clip of plain patches, one beside the other."
    codes = ycc(np.asarray(rgb, float), matrix).T  # (3, patches)
    y, cb, cr = (plane.repeat(side).reshape(1, -1).repeat(side, 0) for plane, side in zip(codes, (16, 8, 8)))
    frame = np.concatenate([y.ravel(), cb.ravel(), cr.ravel()]).reshape(-1, y.shape[1])
    write(path, [(frame, y.shape)] * 5, pixels="yuv420p10le", options=dict(qp="0"), given="yuv420p10le",
          colorspace=matrix, **tags)
    shown = video.read_video(path)[0]
    return shown[2, 8, 8::16].astype(float)


def to_709(linear, primaries):
    "Linear light of other primaries, with numbers of ITU-R BT.2087 and of SMPTE EG 432-1."
    known = {9: [[1.6605, -.5876, -.0728], [-.1246, 1.1329, -.0083], [-.0182, -.1006, 1.1187]],
             12: [[1.2249, -.2247, 0], [-.0420, 1.0419, 0], [-.0197, -.0786, 1.0979]]}
    return linear @ np.array(known[primaries]).T


WIDE = np.array([(.2, .2, .2), (.8, .8, .8), (.6, .3, .25), (.3, .6, .35), (.3, .35, .6), (.7, .6, .3),
                 (0, 0, 0), (1, 1, 1)])


@pytest.mark.parametrize("primaries, matrix, transfer", [(9, 9, 1), (9, 9, 14), (12, 1, 1), (12, 1, 13)])
def test_wide_gamut_becomes_bt709(tmp_path, primaries, matrix, transfer):
    shown = signal(tmp_path / "a.mp4", WIDE, matrix, color_primaries=primaries, color_trc=transfer)
    srgb = transfer == 13
    light = np.where(WIDE <= .04045, WIDE / 12.92, ((WIDE + .055) / 1.055) ** 2.4) if srgb else WIDE ** 2.4
    light = np.clip(to_709(light, primaries), 0, 1)
    back = np.where(light <= .0031308, 12.92 * light,
                    1.055 * light ** (1 / 2.4) - .055) if srgb else light ** (1 / 2.4)
    assert np.abs(shown - 255 * back).mean() < 2
    assert video.clip_facts(tmp_path / "a.mp4").colours == {9: "BT.2020", 12: "P3"}[primaries]


def numbered(path, primaries, transfer):
    "A PNG that names its colours."
    data_, body = path.read_bytes(), b"cICP" + bytes([primaries, transfer, 0, 1])
    chunk = (4).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)
    path.write_bytes(data_[:33] + chunk + data_[33:])  # after IHDR


@pytest.mark.parametrize("transfer, primaries", [(16, 9), (18, 9), (13, 12)])
def test_stills_in_such_colours_are_read_as_clips_are(tmp_path, transfer, primaries):
    "AVIF by its numbers, PNG by `cICP`; a still has 8 bits, so it is a few levels off."
    codes = ycc(WIDE, 9).T
    planes = [plane.repeat(side).reshape(1, -1).repeat(4 * side, 0) for plane, side in zip(codes, (16, 8, 8))]
    frame = np.concatenate([plane.ravel() for plane in planes]).reshape(-1, 128)
    tags = dict(colorspace=9, color_trc=transfer, color_primaries=primaries, given="yuv420p10le")
    fine = dict(preset="8", crf="1")
    write(tmp_path / "a.avif", [(frame, (64, 128))], "libsvtav1", "yuv420p10le", form="avif", options=fine,
          **tags)
    wanted = video.read_video(write(tmp_path / "a.mkv", [(frame, (64, 128))], "ffv1", "yuv420p10le",
                                    **tags))[0][0]
    Image.fromarray((255 * WIDE).round().astype(np.uint8)[None]).save(tmp_path / "b.png")
    numbered(tmp_path / "b.png", primaries, transfer)
    for path, found in ((tmp_path / "a.avif", video.read_image(tmp_path / "a.avif")[32, 8::16]),
                        (tmp_path / "b.png", video.read_image(tmp_path / "b.png")[0])):
        assert np.abs(found - wanted[32, 8::16].astype(int)).mean() < 2.5
        how = "converted" if transfer == 13 else "tone-mapped"
        assert f"colours are {how} to BT.709" in video.image_facts(path).notes[0]


def hlg_light(signal):
    "Display light in cd/m2 of an HLG signal on a screen of 1000 (ITU-R BT.2100)."
    scene = np.where(signal <= .5, signal**2 / 3, (np.exp((signal - .55991073) / .17883277) + .28466892) / 12)
    return 1000 * scene * (scene @ np.array([.2627, .6780, .0593]))[:, None] ** .2


def pq_light(signal):
    power = signal ** (1 / 78.84375)
    return 10000 * (np.maximum(power - .8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / .1593017578125)


@pytest.mark.parametrize("transfer, light, white", [(18, hlg_light, .75), (16, pq_light, .5806)])
def test_hdr_is_tone_mapped(tmp_path, transfer, light, white):
    "White lands near white, greys stay grey and in order, colours below the knee are exact."
    ramp = np.linspace(0, 1, 33)[:, None].repeat(3, 1)
    dim = WIDE[2:6] * (.8 if transfer == 18 else .7)
    tags = dict(color_primaries=9, color_trc=transfer)
    shown = signal(tmp_path / "a.mp4", np.concatenate([ramp, [[white] * 3], dim]), 9, **tags)
    greys, colours = shown[:33], shown[34:]
    assert np.ptp(shown[:34], axis=1).max() <= 2 and (np.diff(greys[:, 1]) >= -1).all()
    assert greys[0].max() <= 1 and greys[-1].min() > 250
    assert 235 <= shown[33].min() <= shown[33].max() <= 255
    linear = np.clip(to_709(light(dim) / 203, 9), 0, None)
    assert linear.max() < .75
    assert np.abs(colours - 255 * linear ** (1 / 2.4)).mean() < 2
    facts = video.clip_facts(tmp_path / "a.mp4")
    assert (facts.colours, facts.reader) == ({18: "HLG", 16: "PQ"}[transfer], "PyAV")
    assert "tone-mapped" in facts.notes[0]


ORDINARY = {"a.mp4": {}, "hd.mp4": dict(colorspace=1, color_primaries=1, color_trc=1),
            "sd.mp4": dict(colorspace=6, color_primaries=6, color_trc=6),
            "full.mp4": dict(color_range=2, pixels="yuvj420p"), "a.avi": dict(codec="mpeg4"),
            "a.webm": dict(codec="libvpx-vp9"),
            "b.webm": dict(codec="libvpx"), "fine.mkv": dict(pixels="yuv444p"),
            "c.avi": dict(codec="mjpeg", pixels="yuvj422p")}


def rows(frame):
    "decord's bytes without the padding that it takes for channels."
    return frame.reshape(len(frame), -1)[:, :3 * frame.shape[1]].reshape(*frame.shape[:2], 3)


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_clips_keep_their_pixels(tmp_path, name):
    "Those of decord, read from the first frame to the last, and PyAV gives the same."
    decord = pytest.importorskip("decord")
    path = write(tmp_path / name, patches(12), **ORDINARY[name])
    assert video.clip_facts(path).reader == "decord" and not video.clip_facts(path).notes
    reader = decord.VideoReader(str(path))
    before = np.stack([rows(reader[i].asnumpy()) for i in range(len(reader))])
    assert (video.read_video(path)[0] == before).all()
    assert (video.read_video(path, backend="pyav")[0] == before).all()
    assert (video.read_frames(path, [0, 3, 3, 7]) == before[[0, 3, 3, 7]]).all()


REAL = [name if i < 4 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(PIXELS)]


@pytest.mark.skipif(not video.decoder().startswith("decord"), reason="decord has no wheel here")
@pytest.mark.parametrize("name", REAL)
def test_real_clips_keep_their_pixels(name):
    "As they were read before files had facts (recorded in goldens/pixels.json)."
    if not (SHARED / name).is_file(): pytest.skip("the real clips (../shared/real) are not here")
    frames, fps = video.read_video(SHARED / name)
    assert [hashlib.sha256(frames.tobytes()).hexdigest()[:16], list(frames.shape), fps] == PIXELS[name]


# What `check` says

def case_of(tmp_path, clip):
    for i in range(3): Image.fromarray(np.roll(patches(1)[0], 9 * i, 1)).save(tmp_path / f"{i}.png")
    (tmp_path / "clips").mkdir(exist_ok=True)
    os.rename(clip, tmp_path / "clips" / clip.name)
    return data.load_case(tmp_path, tmp_path / "clips", "dog *", PERSON)


def test_check_tells_cuts_combs_and_rates(tmp_path):
    scenes = np.concatenate([patches(9), 255 - patches(8)])
    report = doctor.check_case(case_of(tmp_path, write(tmp_path / "cut.mp4", scenes, rate=10)), 64, 96, 17)
    assert "A hard cut at 0.90 s" in doctor.format_report(report)
    early = doctor.check_case(case_of(tmp_path, tmp_path / "clips/cut.mp4"), 64, 96, 9)
    assert "hard cut" not in doctor.format_report(early)  # after the frames that are used
    path = write(tmp_path / "combs.mkv", patches(9), options={"x264-params": "interlaced=1"})
    (tmp_path / "clips/cut.mp4").unlink()
    said = doctor.format_report(doctor.check_case(case_of(tmp_path, path), 64, 96, 9))
    assert "interlaced" in said
    facts = doctor.check_case(data.load_case(tmp_path, tmp_path / "clips", "dog *", PERSON), 64, 96,
                              9)["motion"][0]["facts"]
    assert facts["interlaced"] and facts["reader"] == "PyAV" and json.loads(json.dumps(facts)) == facts


# VmHWM: a process inherits the peak that `getrusage` tells from the one that started it
MEMORY = """
import re, sys, numpy as np
from dualreal import data
item = data.Item(data.Path(sys.argv[1]), "video", "a person is waving")
frames = data.read_item(item, 48, 72, 49, float(sys.argv[2]) or None)
assert frames.shape == (49, 48, 72, 3), frames.shape
with open("/proc/self/status") as f: print(int(re.search(r"VmHWM:\\s+(\\d+)", f.read())[1]) / 2**20)
"""


def large(path, count):
    plane = np.full((3240, 3840), 128, np.uint8)
    frames = []
    for i in range(count):
        plane[:2160] = 40 + i % 150
        frames.append((plane.copy() if i < 2 else frames[i % 2][0], (2160, 3840)))
    return write(path, frames, "mpeg4", rate=60, given="yuv420p", options=dict(qscale="8"))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
@pytest.mark.parametrize("count, fps", [(49, 0), pytest.param(600, 8, marks=pytest.mark.slow)])
def test_4k_takes_little_memory(tmp_path, count, fps):
    path = large(tmp_path / "large.mp4", count)
    done = subprocess.run([sys.executable, "-c", MEMORY, path, str(fps)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1, f"{float(done.stdout):.2f} GiB"


def test_damaged_is_said_by_all_readers(tmp_path):
    "decord gives up, PyAV goes on; where it gives up, too, the sentence has both."
    path = write(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (30, 64, 96, 3), np.uint8))
    data_ = bytearray(path.read_bytes())
    data_[len(data_) // 2:len(data_) * 2 // 3] = bytes(len(data_) * 2 // 3 - len(data_) // 2)
    (tmp_path / "holes.mp4").write_bytes(data_)
    says = "holes.mp4 cannot be decoded, it is damaged or cut off: .*PyAV says"
    with pytest.raises(InputError, match=says) as caught:
        video.read_video(tmp_path / "holes.mp4")
    assert "\n" not in str(caught.value)


# Photos

def profiled(image, profile, path, **how):
    image.save(path, icc_profile=profile, **how)
    return path


def p3_profile():
    "A matrix profile with the primaries of Display P3 and sRGB's curve: sRGB's own, its colours exchanged."
    data_ = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    d50 = dict(rXYZ=(.51512, .24120, -.00105), gXYZ=(.29198, .69225, .04189), bXYZ=(.15710, .06657, .78407))
    for i in range(int.from_bytes(data_[128:132])):
        entry = bytes(data_[132 + 12 * i:144 + 12 * i])
        name, at = entry[:4].decode(), int.from_bytes(entry[4:8])
        if name in d50: data_[at + 8:at + 20] = np.round(np.array(d50[name]) * 65536).astype(">i4").tobytes()
    return bytes(data_)


@pytest.mark.parametrize("suffix, how", [(".png", {}), (".jpg", dict(quality=100, subsampling=0)),
                                         (".webp", dict(lossless=True)), (".tif", {})])
def test_profiles_are_converted(tmp_path, suffix, how):
    pixels = (255 * WIDE).round().astype(np.uint8).repeat(8, 0)[None].repeat(16, 0)
    path = profiled(Image.fromarray(pixels), p3_profile(), tmp_path / f"a{suffix}", **how)
    signal = (255 * WIDE).round() / 255
    light = np.clip(to_709(np.where(signal <= .04045, signal / 12.92, ((signal + .055) / 1.055) ** 2.4), 12),
                    0, 1)
    wanted = 255 * np.where(light <= .0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - .055)
    assert np.abs(video.read_image(path)[8, 4::8] - wanted).mean() < 2
    assert video.image_facts(path).notes == ()


def test_profiles_that_change_nothing_or_are_broken(tmp_path):
    image = Image.fromarray(patches(1)[0])
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (video.read_image(profiled(image, srgb, tmp_path / "s.png")) == patches(1)[0]).all()
    broken = profiled(image, b"no profile at all", tmp_path / "b.png")
    assert (video.read_image(broken) == patches(1)[0]).all()
    assert video.image_facts(broken).notes == ("its colour profile is broken: left aside",)
    write(tmp_path / "a.mp4", patches(9))
    case_of(tmp_path, tmp_path / "a.mp4")
    said = doctor.format_report(doctor.check_case(data.load_case(tmp_path, tmp_path / "clips", "dog *",
                                                                 PERSON), 64, 96, 9))
    assert "Its colour profile is broken" in said
    glass = Image.fromarray(patches(1)[0]).convert("RGBA")
    glass.putalpha(Image.new("L", glass.size, 0))
    assert (video.read_image(profiled(glass, p3_profile(), tmp_path / "g.png")) == 255).all()


def other(mode):
    "The same six colours, stored in another way."
    image = Image.fromarray(patches(1)[0])
    return image.quantize(16) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("name, mode, how", [
    ("a.jpg", "CMYK", {}), ("a.tif", "CMYK", {}), ("a.png", "P", {}), ("a.png", "RGBA", {}),
    ("a.jfif", "RGB", dict(format="JPEG")),
    ("a.avif", "RGB", dict(quality=95)), ("lies.heic", "RGB", dict(format="PNG")),
    ("lies.jpg", "RGB", dict(format="PNG")),
    ("a.mpo", "RGB", dict(format="MPO", save_all=True, append_images=[Image.new("RGB", (96, 64))])),
    ("a.png", "1;16", {})])
def test_photos_as_people_have_them(tmp_path, name, mode, how):
    frame = patches(1)[0]
    if mode == "1;16":
        Image.fromarray(frame[..., 0].astype(np.uint16) * 257).save(tmp_path / name)
        assert (video.read_image(tmp_path / name) == frame[..., :1]).all()
        return
    other(mode).save(tmp_path / name, **how)
    read = video.read_image(tmp_path / name)
    assert read.shape == frame.shape and np.abs(middles(read[None]) - middles(frame[None])).mean() < 6
    assert [p.name for p in data.identity_files(tmp_path)[0]] == [name]
    assert (video.image_facts(tmp_path / name).height, video.image_facts(tmp_path / name).frames) == (64, 1)


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="pillow-heif reads it")
def test_heic_without_its_library(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    says = r"IMG_1.HEIC .*pillow-heif: pip install 'dualreal\[heif\]'"
    with pytest.raises(InputError, match=says): video.read_image(tmp_path / "IMG_1.HEIC")


@pytest.mark.parametrize("kind", ["plain", *range(2, 9), "profile", "ten", "PQ", "P3", "clear", "burst"])
def test_heic(tmp_path, kind):
    "Turned, with a profile, of 10 bits, in HDR: as the same picture in PNG."
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    picture, how, path = Image.fromarray(patches(1)[0]), {}, tmp_path / "a.heic"
    if isinstance(kind, int):
        exif = Image.Exif()
        exif[0x0112] = kind
        how["exif"] = exif.tobytes()
    if kind == "profile": how["icc_profile"] = p3_profile()
    if kind == "clear": picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(tmp_path / "a.png", **how)
    if kind == "burst": how = dict(save_all=True, append_images=[Image.new("RGB", (96, 64))])
    if kind in ("ten", "PQ", "P3"):
        primaries, transfer = {"ten": (1, 13), "PQ": (9, 16), "P3": (12, 13)}[kind]
        numbered(tmp_path / "a.png", primaries, transfer)
        how = dict(color_primaries=primaries, transfer_characteristics=transfer, matrix_coefficients=9)
        deep = heif.from_bytes("RGB;16", picture.size, (patches(1)[0].astype(np.uint16) * 257).tobytes())
        deep.save(path, quality=100, chroma=444, **how)
    else: picture.save(path, quality=100, chroma=444, **how)
    read, facts = video.read_image(path), video.image_facts(path)
    wanted = video.read_image(tmp_path / "a.png")
    assert read.shape == wanted.shape == (facts.height, facts.width, 3) and facts.frames == 1
    assert np.abs(read.astype(int) - wanted).mean() < 3
    assert facts.notes == video.image_facts(tmp_path / "a.png").notes
    if kind in ("PQ", "P3"): assert facts.notes[0].startswith(f"its {kind} colours")


def header(path, width, height):
    "A PNG that promises more than it holds."
    def chunk(name, body): return len(body).to_bytes(4) + name + body + zlib.crc32(name + body).to_bytes(4)
    ihdr = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    body = chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"nothing", bytes.fromhex(
    "4578696600004d4d002a00000008000101120003000000010063000000000000")], ids=["broken", "none", "turn 99"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_turns_nothing(tmp_path, exif):
    Image.fromarray(patches(1)[0]).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert video.read_image(tmp_path / "a.jpg").shape == (64, 96, 3)
    assert video.image_facts(tmp_path / "a.jpg")[:2] == (64, 96)


def test_what_takes_too_much_memory(tmp_path):
    with pytest.raises(InputError, match=r"40000x30000 pixels: .*4.5 GiB.*decompression bomb.*smaller copy"):
        video.read_image(header(tmp_path / "a.png", 40000, 30000))
    before = Image.MAX_IMAGE_PIXELS
    cut_off = header(tmp_path / "b.png", 16000, 12500)  # large, but no bomb
    with pytest.raises(InputError, match="cannot be read"): video.read_image(cut_off)
    assert Image.MAX_IMAGE_PIXELS == before


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("a.jpg", (16320, 12240)), ("b.png", (12000, 9000)),
                                        ("c.jpg", (12000, 9000))])
def test_very_large_photos(tmp_path, name, size):
    image = Image.fromarray(patches(1)[0]).resize(size, Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / name, exif=exif)
    read = video.read_image(tmp_path / name)
    assert read.shape == (size[0] // 2, size[1] // 2, 3)
    assert np.abs(middles(np.rot90(read)[None, :, :size[0] // 2 // 12 * 12]) - middles(patches(1))).mean() < 6
    facts = video.image_facts(tmp_path / name)
    assert facts[:2] == size and "read at 1/2" in facts.notes[0]


# Captions

def photos(folder, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count): Image.fromarray(np.roll(patches(1)[0], 9 * i, 1)).save(folder / f"IMG {i}.jpg")
    return folder


def each(folder, suffix, text="a dog *"):
    for i in range(3): (folder / f"IMG {i}{suffix}").write_text(text)


def captions(folder, clips, role="identity"):
    "What `load_case` gives the files of one half."
    one, other = (folder, clips) if role == "identity" else (clips, folder)
    words = dict(motion_prompt=PERSON) if role == "identity" else dict(identity_prompt="dog *")
    return [item.prompt for item in getattr(data.load_case(one, other, **words), role)]


def one_clip(tmp_path):
    (tmp_path / "one").mkdir()
    return write(tmp_path / "one/a.mp4", patches(9)).parent


def table(path, row, head=None):
    lines = ([head] if head else []) + [row.format(i) for i in range(3)]
    path.write_text("\n".join(lines))


LAYOUTS = {
    ".caption beside": (lambda f: each(f, ".caption"), ".caption beside each file"),
    ".TXT beside": (lambda f: each(f, ".TXT"), ".TXT beside each file"),
    ".jpg.txt beside": (lambda f: each(f, ".jpg.txt"), ".jpg.txt beside each file"),
    "json caption": (lambda f: each(f, ".json", '{"caption": "a dog *"}'), ".json beside each file"),
    "json prompt": (lambda f: each(f, ".json", '{"prompt": "a dog *", "seed": 3}'), ".json beside each file"),
    "jsonl": (lambda f: table(f / "metadata.jsonl", '{{"file_name": "IMG {}.jpg", "text": "a dog *"}}'),
              "metadata.jsonl"),
    "csv": (lambda f: table(f / "metadata.csv", "IMG {}.jpg,a dog *", "file_name,text"), "metadata.csv"),
    "csv of others": (lambda f: table(f / "metadata.csv", ".\\IMG {}.jpg,a dog *", "image,prompt"),
                      "metadata.csv"),
    "prompt.txt": (lambda f: (f / "prompt.txt").write_text("a dog *\n" * 3), "prompt.txt"),
    "two that agree": (lambda f: (each(f, ".txt"), each(f, ".json", '{"text": "a dog *"}')),
                       ".json beside each file, .txt beside each file"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_captions(tmp_path, name):
    make, said = LAYOUTS[name]
    make(photos(tmp_path / "photos"))
    write(tmp_path / "a.mp4", patches(9))
    (tmp_path / "clips").mkdir()
    os.rename(tmp_path / "a.mp4", tmp_path / "clips/a.mp4")
    case = data.load_case(tmp_path / "photos", tmp_path / "clips", None, PERSON)
    assert {item.prompt for item in case.identity} == {"a dog *"} and case.notes == []
    assert sorted(case.layouts["identity"].split(", ")) == sorted(said.split(", "))
    assert case.layouts["motion"] == "--motion-prompt"
    if name == "csv": assert "captions: metadata.csv" in doctor.format_report(doctor.check_case(case, 64, 96,
                                                                                                9))


@pytest.mark.parametrize("name, text", {
    "IMG {}.txt": "a dog *\r\n", "IMG {}.json": '{"caption": "a dog *"}'}.items())
@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_as_windows_writes_them(tmp_path, name, text, code):
    folder, clip = photos(tmp_path / "photos"), one_clip(tmp_path)
    for i in range(3): (folder / name.format(i)).write_bytes(text.encode(code))
    assert captions(folder, clip) == ["a dog *"] * 3


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "prompts.txt", "beside", "videos.txt"])
def test_accents_are_one_letter_or_two(tmp_path, form, other, name):
    "A Mac writes them as two."
    here, there = unicodedata.normalize(form, "café"), unicodedata.normalize(other, "café")
    folder, clip = photos(tmp_path / "photos", 1), one_clip(tmp_path)
    os.rename(folder / "IMG 0.jpg", folder / f"{here}.jpg")
    if name == "metadata.jsonl":
        (folder / name).write_text(f'{{"file_name": "{there}.jpg", "text": "a dog *"}}')
    if name == "metadata.csv": (folder / name).write_text(f"file_name;text\n{there}.jpg;a dog *\n")
    if name == "prompts.txt": (folder / name).write_text(f"{there}\ta dog *\n")
    if name == "beside": (folder / f"{there}.txt").write_text("a dog *")
    if name == "videos.txt":
        os.rename(clip / "a.mp4", clip / f"{here}.mp4")
        (clip / name).write_text(f".\\{there}.mp4\n")
        assert [path.name for path in data.motion_files(clip)[0]] == [f"{here}.mp4"]
    else: assert captions(folder, clip) == ["a dog *"]


def test_captions_that_say_nothing(tmp_path):
    folder, clip = photos(tmp_path / "photos"), one_clip(tmp_path)
    each(folder, ".txt")
    (folder / "IMG 1.txt").write_text("  \n ")
    with pytest.raises(InputError, match="IMG 1.txt holds no caption: write one"): captions(folder, clip)
    (folder / "IMG 1.txt").write_bytes("a dog *".encode("utf-16-le"))  # without a mark: zeros between letters
    with pytest.raises(InputError, match="IMG 1.txt is not UTF-8 text"): captions(folder, clip)


def test_kohya_and_finetrainers(tmp_path):
    photos(tmp_path / "kohya/10_ohwx dog")
    each(photos(tmp_path / "kohya/2_dog", 3), ".txt")
    files, notes = data.identity_files(tmp_path / "kohya")
    assert len(files) == 6 and sum("repeats are ignored" in note for note in notes) == 2
    shutil.rmtree(tmp_path / "kohya/2_dog")
    clip = one_clip(tmp_path)
    assert captions(tmp_path / "kohya", clip) == ["ohwx dog"] * 3
    root = tmp_path / "fine"
    (root / "videos").mkdir(parents=True)
    for i in range(3): write(root / f"videos/clip {i}.mp4", patches(5))
    (root / "videos.txt").write_text("".join(f"videos\\clip {i}.mp4\n" for i in range(3)))
    (root / "prompt.txt").write_text("".join(f"{word} is waving\n" for word in ("one", "two", "three")))
    found = data.motion_files(root)[0]
    assert [p.name for p in found] == [f"clip {i}.mp4" for i in range(3)]
    said = captions(root, photos(tmp_path / "photos"), "motion")
    assert said == ["one is waving", "two is waving", "three is waving"]


def test_captions_that_contradict_or_are_unknown(tmp_path):
    folder, clip = photos(tmp_path / "photos"), one_clip(tmp_path)
    each(folder, ".caption")
    (folder / "IMG 1.txt").write_text("a cat *")
    says = r"IMG 1.jpg is .*a .* in .*IMG 1\.(caption|txt), but .* in .*IMG 1\.(caption|txt)"
    with pytest.raises(InputError, match=says): captions(folder, clip)
    (folder / "IMG 1.txt").unlink()
    table(folder / "metadata.jsonl", '{{"file_name": "IMG {}.jpg", "text": "cat *"}}')
    says = r"in .*metadata.jsonl, but 'a dog \*' in .*IMG 0.caption"
    with pytest.raises(InputError, match=says): captions(folder, clip)
    (folder / "metadata.jsonl").write_text('{"file_name": "IMG 0.jpg", "text": "cat *"}')
    says = "metadata.jsonl has no caption for IMG 1"
    with pytest.raises(InputError, match=says): captions(folder, clip)
    for file in [*folder.glob("*.caption"), *folder.glob("*.jsonl")]: file.unlink()
    (folder / "captions.yaml").write_text("IMG 0: dog")
    (folder / "IMG 0.json").write_text('{"tags": ["dog"]}')
    notes = data.identity_files(folder)[1]
    assert "IMG 0.json, captions.yaml" in notes[0]
    with pytest.raises(InputError, match=r"captions.yaml: no layout"): captions(folder, clip)


# Any combination that PyAV can write here

CODECS = """alias_pix amv apng asv1 asv2 avrp bitpacked bmp cfhd cinepak cljr dpx dvvideo dxv exr ffv1 ffvhuff
flashsv flv gif h263p huffyuv jpeg2000 jpegls libsvtav1 libvpx libvpx-vp9 libx264 libx264rgb libx265 ljpeg
magicyuv mjpeg mpeg1video mpeg2video mpeg4 msmpeg4 msmpeg4v2 png prores prores_ks qtrle r10k r210 rawvideo
sgi snow svq1 targa tiff utvideo v210 v308 v408 v410 vc2 wmv1 wmv2 y41p zlib zmbv""".split()
SUFFIXES = (".mp4 .mov .mkv .webm .avi .ts .mpg .wmv .flv .3gp .3g2 .m4v .mts .ogv .mxf .vob .gif "
            ".apng").split()
FEW = ("mono", "pal8", "rgb4", "bgr4", "rgb8", "bgr8", "f16", "f32", "444le", "555", "565")  # no true colours
RAW = ("yuv420p", "yuyv422", "gray", "bgr24")
TURNS = (None, (90,), (180,), (-90,), (0, True), (90, True))
RATES = (8, 24, 25, Fraction(30000, 1001), 60)
QUICK = {"mpeg4": dict(qscale="2"), "libsvtav1": dict(preset="12", crf="10"),
         "libx265": {"x265-params": "log-level=none"}}
LOSSY = ("wmv", "flv", "mpeg", "msmpeg", "h263", "svq1", "asv", "amv", "cinepak", "snow")
# Where FFmpeg writes times that are not the pictures'
UNTIMED = {(suffix, codec) for suffix in (".mpg", ".vob") for codec in ("mpeg4", "h263p")}
UNTIMED |= {(".wmv", "mpeg1video"), (".avi", "mpeg1video")}
REFUSED: set = set()  # of (suffix, codec, pixels): what is written here and cannot be read


def layouts(codec):
    "Pixel formats that a codec takes; none if this PyAV lacks it."
    try: known = av.codec.Codec(codec, "w").video_formats
    except ValueError: return []
    names = [one.name for one in known] if known else RAW if codec == "rawvideo" else []
    return [name for name in names if not any(few in name for few in FEW)]


def combinations(seed):
    "All of them, in random order; each codec comes as often as any other."
    draw, every = random.Random(seed), {codec: layouts(codec) for codec in CODECS}
    every = {codec: names for codec, names in every.items() if names}
    while True:
        codec = draw.choice([*every])
        kind = draw.choice(SUFFIXES), codec, draw.choice(every[codec])
        turn, rate = draw.choice(TURNS), draw.choice(RATES)
        if codec == "tiff" and turn and len(turn) > 1: continue  # its EXIF hides the mirror from PyAV
        if kind[:2] not in UNTIMED: yield kind, turn, rate


def written(path, frames, kind, turn, rate):
    "Whether such a file can be made, and FFmpeg itself finds its pictures again."
    suffix, codec, pixels = kind
    try:
        write(path, frames, codec, pixels, rate, turn=turn, options=QUICK.get(codec))
        with av.open(str(path)) as container: return sum(1 for _ in container.decode(video=0)) > 0
    except (av.FFmpegError, ValueError, IndexError): return False


def combination(path, kind, turn, rate):
    "Whether there was something to read; it is read as it was written."
    suffix, codec, pixels = kind
    turn = turn if suffix in (".mp4", ".mov", ".mkv") and TURNS_ARE_WRITTEN else None
    frames = patches(9, 96, 144)
    if pixels.startswith(("gray", "ya")): frames = frames.mean(-1).astype(np.uint8)[..., None].repeat(3, -1)
    if not written(path, frames, kind, turn, rate): return False
    if kind in REFUSED:
        with pytest.raises(InputError): video.read_video(path)
        return True
    read, fps = video.read_video(path)
    if turn:
        if len(turn) > 1: read = read[:, :, ::-1]
        read = np.rot90(read, -turn[0] // 90, (1, 2))
    assert read.shape == frames.shape and len(read) == video.clip_facts(path).frames
    assert fps == pytest.approx(float(rate), rel=.05 if suffix == ".gif" else .015)
    assert np.abs(middles(read) - middles(frames)).mean() < (12 if codec.startswith(LOSSY) else 8)
    if video.clip_facts(path).reader == "decord":
        one, other = (video.read_video(path, backend=name)[0].astype(int) for name in ("decord", "pyav"))
        assert np.abs(one - other).max() <= (2 if codec == "mpeg4" else 0)  # newer FFmpeg rounds
    assert (np.diff(middles(read)[:, 0].mean(1)) > 0).all()  # in order
    return True


def as_written(tmp_path, seed, count):
    "So many combinations are read; those that are not are told all together."
    read, faults, tries = 0, [], combinations(seed)
    while read < count:
        kind, turn, rate = next(tries)
        path = tmp_path / f"{read}{kind[0]}"
        try: read += combination(path, kind, turn, rate)
        except (AssertionError, InputError) as error:
            faults.append(f"{kind}, turn {turn}, rate {rate}: {str(error).splitlines()[0][:150]}")
            read += 1
        path.unlink(missing_ok=True)
    assert not faults, "\n".join(faults)


def test_combinations(tmp_path): as_written(tmp_path, 1, 25)


@pytest.mark.slow
def test_many_combinations(tmp_path): as_written(tmp_path, 2, 800)
