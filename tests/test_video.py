"""Frames of every kind of video, one at a time, whole or damaged; and writing them."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

import denoscope as ds
from denoscope.images.video import Frames, video_writer


def image(index, size=(64, 48)):
    """A white square that moves to the right on blue."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[..., 2] = 120
    pixels[16:32, 8 + 2 * index : 24 + 2 * index] = 255
    return Image.fromarray(pixels)


def difference(picture, index):
    truth = np.asarray(image(index, picture.size)) / 255
    return np.abs(picture.pixels.permute(1, 2, 0).numpy() - truth).mean()


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".gif"])
def test_what_is_written_is_read_again(tmp_path, suffix):
    path = tmp_path / f"v{suffix}"
    with video_writer(path, 10) as add:
        assert not path.exists()
        for index in range(8):
            add(image(index))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    frames = Frames(path)
    assert (frames.size, frames.rate, len(frames), frames.name(3)) == ((64, 48), 10, 8, "00003")
    for _ in range(2):  # from the start, every time
        pictures = list(frames)
        assert len(pictures) == 8
        assert max(difference(picture, index) for index, picture in enumerate(pictures)) < 0.03


def test_animations_keep_their_frames_apart(tmp_path):
    with video_writer(tmp_path / "v.gif", 20) as add:
        for index in range(5):
            add(image(index, (61, 47)))
    assert all(difference(picture, index) < 1e-6 for index, picture in enumerate(Frames(tmp_path / "v.gif")))


def test_nothing_is_left_of_a_video_that_was_not_finished(tmp_path):
    def interrupted():
        with video_writer(tmp_path / "v.avi", 10) as add:
            add(image(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ds.InputError, match="cannot be written"), video_writer(tmp_path / "v.txt"):
        pass


def test_folders_are_in_natural_order_and_skip_what_is_hidden(tmp_path):
    for index, name in enumerate(["1.png", "2.png", "10.png"]):
        image(index).save(tmp_path / name)
    (tmp_path / ".3.png").write_text("hidden")
    (tmp_path / "notes.txt").write_text("no frame")
    frames = Frames(tmp_path)
    assert [frames.name(i) for i in range(3)] == ["1", "2", "10"]
    assert all(difference(picture, i) < 1e-6 for i, picture in enumerate(frames))


def test_turned_photos_count_as_they_are_seen(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    image(0, (48, 64)).save(tmp_path / "a.png")
    image(0, (64, 48)).save(tmp_path / "b.jpg", exif=turned)
    assert Frames(tmp_path).size == (48, 64)


def test_lists_and_clips_are_frames_too():
    pictures = [ds.read(image(index)) for index in range(3)]
    assert [one is two for one, two in zip(Frames(pictures), pictures, strict=True)] == [True] * 3
    assert Frames(Frames(pictures)).size == (64, 48)
    import torch

    clip = ds.Clip(torch.stack([picture.pixels for picture in pictures]), 12.5)
    assert Frames(clip).rate == 12.5
    assert len(list(Frames(clip))) == 3


def test_frames_of_different_sizes_are_told_before_any_work(tmp_path):
    image(0).save(tmp_path / "a.png")
    image(0, (32, 32)).save(tmp_path / "b.png")
    with pytest.raises(ds.InputError, match=r"a\.png is 64x48 but b\.png 32x32"):
        Frames(tmp_path)
    with pytest.raises(ds.InputError, match="Frame 00001 of the list is 32x32"):
        list(Frames([image(0), image(0, (32, 32))]))


@pytest.mark.parametrize("suffix", [".avi", ".gif"])
def test_a_video_that_breaks_off_gives_the_frames_before(tmp_path, suffix):
    rng = np.random.default_rng(0)
    with video_writer(tmp_path / f"whole{suffix}", 10) as add:
        for _ in range(12):
            add(Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)))
    content = (tmp_path / f"whole{suffix}").read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="breaks off after"):
        count = len(list(Frames(path)))
    assert 3 <= count <= 8


def test_what_is_no_video_is_told(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"not a video at all")
    (tmp_path / "bad.gif").write_bytes(b"GIF89a")
    (tmp_path / "notes.txt").write_text("words")
    image(0).save(tmp_path / "one.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "0.png").write_bytes(b"PNG")
    cases = {
        "bad.mp4": "cannot be read as a video",
        "bad.gif": "cannot be read",
        "notes.txt": "not in a known video format",
        "one.png": "a single picture",
        "empty": "holds no pictures",
        "damaged": "damaged or no image",
    }
    for name, sentence in cases.items():
        with pytest.raises(ds.InputError, match=sentence):
            Frames(tmp_path / name)
    with pytest.raises(ds.MissingError, match="no video"):
        Frames(tmp_path / "none.mp4")
    with pytest.raises(ds.InputError, match="no readable frames"):
        Frames([])


def test_reading_and_writing_hold_few_frames(tmp_path):
    with video_writer(tmp_path / "v.avi", 10) as add:
        for index in range(60):
            add(image(index % 16, (256, 192)))
    one = 256 * 192 * 3 * 4
    tracemalloc.start()
    for _ in Frames(tmp_path / "v.avi"):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * one
