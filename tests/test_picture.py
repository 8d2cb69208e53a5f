"""Reading pictures as people have them, and refusing what cannot be read in one sentence."""

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image

import denoscope as ds
from denoscope.images import atomically, read_mask
from denoscope.images import picture as module


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_plain_files_and_arrays_agree(tmp_path, rgb):
    path = saved(tmp_path, Image.fromarray(rgb), "a.png")
    wanted = torch.from_numpy(rgb).permute(2, 0, 1) / 255
    for source in (path, str(path), rgb, Image.fromarray(rgb), wanted, rgb / 255):
        picture = ds.read(source)
        assert torch.allclose(picture.pixels, wanted.float(), atol=1e-6)
        assert picture.digest == ds.read(rgb).digest
    assert ds.read(path).path == path
    assert ds.read(path).size == (30, 20)
    assert np.array_equal(np.asarray(ds.read(path).image()), rgb)


def test_grey_palette_alpha_and_cmyk(tmp_path, rgb):
    grey = Image.fromarray(rgb[..., 0])
    assert torch.equal(ds.read(saved(tmp_path, grey, "g.png")).pixels, ds.read(np.stack([rgb[..., 0]] * 3, -1)).pixels)
    palette = Image.fromarray(rgb).quantize(16)
    assert torch.equal(ds.read(saved(tmp_path, palette, "p.png")).pixels, ds.read(palette.convert("RGB")).pixels)
    clear = Image.fromarray(np.dstack([rgb, np.zeros((20, 30), np.uint8)]))
    assert (ds.read(saved(tmp_path, clear, "clear.png")).pixels == 1).all()  # on white
    half = np.dstack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4), 51, np.uint8)])
    assert torch.allclose(ds.read(Image.fromarray(half)).pixels, torch.tensor(0.8), atol=1e-6)
    binary = Image.fromarray(rgb[..., 0] > 127)
    assert set(ds.read(saved(tmp_path, binary, "b.png")).pixels.unique().tolist()) == {0.0, 1.0}
    cmyk = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    assert ds.read(saved(tmp_path, cmyk, "c.jpg")).pixels[:, 0, 0].tolist() == pytest.approx([0, 1, 1], abs=0.02)
    transparent = Image.fromarray(rgb).quantize(4)
    transparent.info["transparency"] = 0
    assert ds.read(saved(tmp_path, transparent, "t.gif")).size == (30, 20)


def test_sixteen_bits_are_not_cut_to_eight(tmp_path):
    values = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    Image.fromarray(values).save(tmp_path / "deep.png")
    picture = ds.read(tmp_path / "deep.png")
    assert picture.pixels.max() == 1
    assert torch.allclose(picture.pixels[0], torch.from_numpy(values / 65535).float(), atol=1e-6)
    assert len(picture.pixels.unique()) > 300


def test_exif_orientation_is_applied(tmp_path, rgb):
    exif = Image.Exif()
    exif[274] = 6  # "rotate by 90 degrees to show"
    path = saved(tmp_path, Image.fromarray(rgb), "turned.png", exif=exif)
    assert ds.read(path).size == (20, 30)
    assert np.array_equal(np.asarray(ds.read(path).image()), np.rot90(rgb, -1))


def test_animations(tmp_path, rgb):
    frames = [Image.fromarray(np.full((8, 10, 3), value, np.uint8)) for value in (0, 120, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=50)
    with pytest.warns(UserWarning, match="first frame"):
        assert ds.read(tmp_path / "a.gif").pixels.max() == 0
    clip = ds.read_clip(tmp_path / "a.gif")
    assert (len(clip), clip.rate) == (3, 20)
    assert [round(p.pixels.mean().item(), 2) for p in clip] == [0, 0.47, 1]
    assert len(ds.read_clip(tmp_path / "a.gif", limit=2)) == 2
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, frame in enumerate(frames):
        frame.save(folder / f"{i}.png")
    assert torch.equal(ds.read_clip(folder).pixels, clip.pixels)
    Image.new("RGB", (3, 3)).save(folder / "3.png")
    with pytest.raises(ds.InputError, match="differ in size"):
        ds.read_clip(folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(ds.InputError, match="no readable frames"):
        ds.read_clip(tmp_path / "none")


def test_video_files(tmp_path):
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (32, 16))
    for red in (0, 255):
        writer.write(np.dstack([np.zeros((16, 32, 2), np.uint8), np.full((16, 32), red, np.uint8)]))  # BGR
    writer.release()
    clip = ds.read_clip(tmp_path / "v.avi")
    assert (len(clip), clip.rate) == (2, 10)
    assert clip[1].pixels[0].mean() > 0.9
    assert clip[1].pixels[2].mean() < 0.1


def test_what_cannot_be_read_is_named(tmp_path, rgb, monkeypatch):
    whole = saved(tmp_path, Image.fromarray(rgb), "a.jpg")
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:300])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, error, sentence in [
        ("cut.jpg", ds.InputError, "truncated or damaged"),
        ("text.png", ds.InputError, "not an image"),
        ("empty.png", ds.InputError, "not an image"),
        ("missing.png", ds.MissingError, "no file"),
        (".", ds.InputError, "is a folder"),
    ]:
        with pytest.raises(error, match=sentence):
            ds.read(tmp_path / name)
    monkeypatch.setattr(module, "MAX_PIXELS", 500)
    with pytest.raises(ds.InputError, match="megapixels"):
        ds.read(whole)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((4, 4, 2), np.uint8), "height, width"),
        (np.zeros((0, 4, 3), np.uint8), "height, width"),
        (np.full((4, 4), np.nan), "finite"),
        (np.full((4, 4), 200.0), r"\[0, 1\]"),
        (np.zeros((4, 4), np.int64), "uint8, uint16 or float"),
    ],
)
def test_bad_arrays_are_named(array, sentence):
    with pytest.raises(ds.InputError, match=sentence):
        ds.read(array)


def test_masks(tmp_path):
    inside = np.zeros((56, 72), np.uint8)
    inside[10:20, 30:40] = 255
    assert read_mask(inside, (72, 56)).sum() == 100
    clear = np.dstack([np.full((56, 72, 3), 255, np.uint8), inside])  # white, and transparent outside
    Image.fromarray(clear).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", (72, 56)).sum() == 100
    with pytest.raises(ds.InputError, match="72x56 but its picture 56x72"):
        read_mask(inside, (56, 72))
    with pytest.raises(ds.InputError, match="black everywhere"):
        read_mask(inside * 0, (72, 56))


def test_resizing_is_pillows():
    picture = smooth_picture(0)
    wanted = np.asarray(picture.image().resize((33, 21))).astype(np.float32) / 127.5 - 1
    assert np.allclose(picture.resized((33, 21)).permute(1, 2, 0).numpy(), wanted, atol=1e-6)


def test_what_is_written_reads_back(tmp_path, rgb):
    picture = ds.read(rgb)
    assert torch.equal(ds.read(ds.write(picture, tmp_path / "deep" / "a.png")).pixels, picture.pixels)
    clip = ds.Clip(torch.stack([picture.pixels * 0, picture.pixels * 0 + 1]), 10.0)
    for name in ("a.gif", "a.avi", "a.mp4"):
        again = ds.read_clip(ds.write(clip, tmp_path / name))
        assert (again.rate, again.pixels.shape) == (10, clip.pixels.shape)
        assert (again.pixels - clip.pixels).abs().max() < 0.05
    for what, name in ((picture, "a.txt"), (clip, "a.png"), (picture, "a")):
        with pytest.raises(ds.InputError, match="cannot be written"):
            ds.write(what, tmp_path / name)
    (tmp_path / "a.png").write_bytes(b"before")
    with pytest.raises(ZeroDivisionError):
        atomically(tmp_path / "a.png", lambda path: path.write_bytes(b"half") / 0)
    assert (tmp_path / "a.png").read_bytes() == b"before"  # nothing lost, nothing left
    assert not list(tmp_path.glob("*.part*"))
    assert not list(tmp_path.glob(".*"))
