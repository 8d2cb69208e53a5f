"""`denoscope track` as a user meets it."""

import json

import numpy as np
import pytest
from PIL import Image

from denoscope.correspondence.labels import read_mask_labels, write_mask
from denoscope.images.video import Frames, video_writer

QUICK = ["--model", "rgb", "--size", "32x24", "--overlay", "none"]


@pytest.fixture
def video(tmp_path):
    """A folder of five frames on which a square moves, and the mask of the first."""
    (tmp_path / "video").mkdir()
    for index in range(5):
        pixels = np.full((48, 64, 3), 60, np.uint8)
        pixels[12:28, 8 + 4 * index : 24 + 4 * index] = (250, 120, 10)
        Image.fromarray(pixels).save(tmp_path / "video" / f"{index:05d}.png")
    labels = np.zeros((48, 64), np.uint8)
    labels[12:28, 8:24] = 3
    write_mask(labels, tmp_path / "first.png")
    return tmp_path / "video"


def test_masks_numbers_and_video_are_written(run, video, tmp_path):
    out = tmp_path / "out"
    status, text, _ = run("track", video, "--mask", tmp_path / "first.png", *QUICK[:-2], "--out", out)
    assert status == 0
    assert sorted(p.name for p in out.iterdir()) == ["masks", "overlay.mp4", "tracks.json"]
    assert sorted(p.name for p in (out / "masks").iterdir()) == [f"{i:05d}.png" for i in range(5)]
    assert np.array_equal(read_mask_labels(out / "masks/00000.png"), read_mask_labels(tmp_path / "first.png"))
    assert len(list(Frames(out / "overlay.mp4"))) == 5
    whole = json.loads((out / "tracks.json").read_text())
    assert (whole["kind"], whole["size"], len(whole["frames"])) == ("mask", [64, 48], 5)
    assert whole["recipe"]["propagation"] == {"context": 28, "radius": 15, "topk": 15, "temperature": 0.2}
    assert whole["frames"][0]["objects"][0] == {
        "object": 3, "score": 1.0, "area": 256, "x": 15.5, "y": 19.5, "box": [8, 12, 23, 27],
    }  # fmt: skip
    assert "frame 5 of 5" in text
    assert "5 of 5" in text


def test_points_of_a_video_file_into_a_gif(run, video, tmp_path):
    with video_writer(tmp_path / "v.avi", 10) as add:
        for picture in Frames(video):
            add(picture.image())
    options = ["--model", "rgb", "--size", "32x24", "--overlay", "gif", "--context", 2, "--topk", 3]
    status, text, _ = run("track", tmp_path / "v.avi", "--points", "10,14;20,25", *options, "--out", tmp_path / "out")
    assert status == 0
    frames = Frames(tmp_path / "out" / "overlay.gif")
    assert (len(frames), frames.rate) == (5, 10)
    whole = json.loads((tmp_path / "out" / "tracks.json").read_text())
    assert whole["frames"][0]["objects"][1] == {"object": 1, "score": 1.0, "x": 20.0, "y": 25.0}
    assert whole["rate"] == 10
    assert whole["recipe"]["propagation"]["context"] == 2
    assert not (tmp_path / "out" / "masks").exists()
    assert "last x, y" in text


def test_a_second_run_leaves_nothing_of_the_first(run, video, tmp_path):
    out, box = tmp_path / "out", ["--boxes", "8,12,23,27"]
    assert run("track", video, *box, *QUICK[:-2], "--out", out)[0] == 0
    (out / "masks" / "mine.png").write_bytes(b"kept")
    for old in sorted(video.iterdir())[3:]:
        old.unlink()
    assert run("track", video, *box, *QUICK, "--out", out)[0] == 0
    assert sorted(p.name for p in (out / "masks").iterdir()) == ["00000.png", "00001.png", "00002.png", "mine.png"]
    assert sorted(p.name for p in out.iterdir()) == ["masks", "tracks.json"]


def test_a_run_that_fails_has_no_numbers(run, video, tmp_path):
    (video / "00003.png").write_bytes((video / "00003.png").read_bytes()[:-40])
    status, _, error = run("track", video, "--boxes", "8,12,23,27", *QUICK[:-2], "--out", tmp_path / "out")
    assert status == 2
    assert "00003.png is truncated" in error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["masks"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["video"], "one of --mask, --points and --boxes"),
        (["video", "--points", "1,1", "--boxes", "1,1,5,5"], "one of --mask, --points and --boxes"),
        (["video", "--points", "64,10"], "Point 0 at (64, 10) lies outside the picture of 64x48 pixels"),
        (["video", "--points", "words"], "not understood"),
        (["video", "--boxes", "1,1,5"], "not understood"),
        (["video", "--boxes", "5,5,1,1"], "no box inside"),
        (["video", "--mask", "other.png"], "The mask is 9x9 but the first frame 64x48"),
        (["video", "--mask", "empty.png"], "every pixel is background"),
        (["video", "--mask", "photo.png"], "one flat colour"),
        (["video", "--mask", "none.png"], "no mask"),
        (["none.mp4", "--points", "1,1"], "no video"),
        (["first.png", "--points", "1,1"], "single picture"),
        (["notes.txt", "--points", "1,1"], "not in a known video format"),
        (["video", "--points", "1,1", "--overlay", "mpg"], "--overlay mpg"),
        (["video", "--points", "1,1", "--topk", "0"], "topk"),
        (["video", "--points", "1,1", "--temperature", "0"], "temperature"),
        (["video", "--points", "1,1", "--out", "notes.txt"], "--out"),
    ],
)
def test_mistakes_are_one_sentence(run, video, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.ones((9, 9), np.uint8)).save("other.png")
    Image.fromarray(np.zeros((48, 64), np.uint8)).save("empty.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save("photo.png")
    (tmp_path / "notes.txt").write_text("words")
    status, _, error = run("track", "--model", "rgb", "--size", "32x24", *arguments)
    assert status == 2
    assert sentence in error
    assert error.count("\n") == 1
