"""The denoiser trainer: learns, resumes exactly, stores an ordinary diffusers folder, names mistakes."""

import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import smooth_picture
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel

import denoscope as ds
from denoscope.training import DenoiserConfig, read_denoiser_config, train_denoiser
from denoscope.training.config import Source
from denoscope.training.data import Draws, read_source
from denoscope.training.denoiser import alignment, rate, word_tokenizer

TINY = DenoiserConfig(
    sources=[Source("birds.parquet", "{label} bird", 2.0), Source("folder", labels={"old_cars": "old car"})],
    size=16, channels=(8, 16), attention_levels=(1,), head_dim=8, text_dim=16, tokens=8, steps=4, batch=4, warmup=1,
    lr=1e-3, checkpoint_every=2, sample_every=4, sample_prompts=("bird",), decay=0.0,
)  # fmt: skip


@pytest.fixture
def data(tmp_path):
    def png(seed):
        buffer = io.BytesIO()
        smooth_picture(seed, 30, 24).image().save(buffer, "png")
        return {"bytes": buffer.getvalue(), "path": None}

    table = pa.table({"img": [png(i) for i in range(3)], "label": [0, 1, 1]})
    names = {"info": {"features": {"label": {"names": ["Grey_Heron", "Owl"]}}}}
    root = tmp_path / "data"
    (root / "folder" / "old_cars").mkdir(parents=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), root / "birds.parquet")
    smooth_picture(7, 40, 20).image().save(root / "folder" / "old_cars" / "a.png")
    return root


def losses(out):
    return [row.split(",")[:3] for row in (out / "loss.csv").read_text().split()]


def test_phrases_come_from_labels(data):
    phrases = [[example.phrase for example in read_source(source, data)] for source in TINY.sources]
    assert phrases == [["grey heron bird", "owl bird", "owl bird"], ["old car"]]


def test_draws_are_a_function_of_their_number(data):
    one, two = Draws(TINY, data), Draws(TINY, data)
    for n in (0, 5, 11):
        for a, b in zip(one[n], two[n], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert not torch.equal(one[0].noise, one[1].noise)
    assert one[3].pixels.shape == (3, 16, 16)
    assert one[3].pixels.abs().max() <= 1.2  # bicubic resampling overshoots a little at most
    prompts = [one[n].prompt for n in range(16)]
    assert len(set(prompts)) > 2
    assert {"a", "photo", "of", "bird", "old", "car"} <= set(one.words())


def test_resuming_repeats_and_loses_nothing(data, tmp_path):
    straight = train_denoiser(TINY, tmp_path / "straight", data, device="cpu")
    half = dataclasses.replace(TINY, steps=2)
    train_denoiser(half, tmp_path / "halves", data, device="cpu")
    with (tmp_path / "halves" / "loss.csv").open("a") as log:
        log.write("3,9.9,0,0\n")  # a step after the checkpoint, as a killed run leaves it
    stopped = train_denoiser(TINY, tmp_path / "halves", data, device="cpu")
    assert losses(tmp_path / "straight") == losses(tmp_path / "halves")
    one, two = (UNet2DConditionModel.from_pretrained(p, subfolder="unet").state_dict() for p in (straight, stopped))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert [p.name for p in (tmp_path / "halves").glob("checkpoint*")] == ["checkpoint-0000004"]
    assert (tmp_path / "halves" / "samples-0000004.png").stat().st_size > 0
    with pytest.raises(ds.InputError, match="another 'size'"):
        train_denoiser(dataclasses.replace(TINY, size=32), tmp_path / "halves", data, device="cpu")


def test_the_model_is_an_ordinary_diffusers_folder(data, tmp_path):
    folder = train_denoiser(dataclasses.replace(TINY, steps=1), tmp_path / "run", data, device="cpu")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    ids = tokenizer("A photo of an OLD car!", padding="max_length", return_tensors="pt").input_ids
    noisy = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = unet(noisy, 300, text(ids).last_hidden_state).sample
        denoiser = ds.load(folder, device="cpu")
        with pytest.warns(UserWarning, match="does not hold: an"):
            eps = denoiser.predict(noisy, 300, denoiser.condition(["A photo of an OLD car!"]))
    alpha = scheduler.alphas_cumprod[300]
    assert torch.allclose(eps, (1 - alpha).sqrt() * noisy + alpha.sqrt() * v, atol=1e-5)
    assert denoiser.family == "pixel"


def test_training_lowers_the_loss(data, tmp_path):
    config = dataclasses.replace(TINY, steps=60, batch=8, lr=3e-3, checkpoint_every=100, sample_every=100, drop=0.5)
    train_denoiser(config, tmp_path / "run", data, device="cpu")
    values = np.array([float(row[1]) for row in losses(tmp_path / "run")])
    assert values[-15:].mean() < 0.8 * values[:15].mean()


def test_words_ends_padding_and_case():
    tokenizer = word_tokenizer(["bird", "grey"], 6)
    ids = tokenizer("Grey  BIRD, zebra", padding="max_length").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<start>", "grey", "bird", "<unk>", "<end>", "<pad>"]
    assert tokenizer("", padding="max_length").input_ids == [1, 2, 0, 0, 0, 0]


def test_learning_rate_rises_stays_and_falls():
    at = rate(dataclasses.replace(TINY, steps=100, warmup=10, decay=0.2))
    assert [round(at(step), 3) for step in (0, 9, 50, 79, 90, 99, 100)] == [0.1, 1, 1, 1, 0.5, 0.05, 0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("size = 16", "names no images"),
        ("size = = 3", "not valid TOML"),
        ("sizes = 3\n[[sources]]\npath='a'", "unknown key 'sizes'.*size"),
        ("[[sources]]\nwhere='a'", r"\[\[sources\]\].*unknown key 'where'"),
        ("[[sources]]\nprompt='a'", "path"),
        ("size = 30\n[[sources]]\npath='a'", "multiple of 8"),
        ("steps = 'many'\n[[sources]]\npath='a'", "steps"),
        ("channels = [8, -16]\n[[sources]]\npath='a'", "channels must be"),
        ("attention_levels = [7]\n[[sources]]\npath='a'", "attention_levels"),
        ("beta_schedule = 'zzz'\n[[sources]]\npath='a'", "squaredcos_cap_v2"),
        ("prediction = 'score'\n[[sources]]\npath='a'", "v_prediction"),
    ],
)
def test_configuration_mistakes_are_named(tmp_path, text, sentence):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ds.InputError, match=sentence):
        read_denoiser_config(tmp_path / "c.toml")


def test_missing_data_is_named(tmp_path, data):
    with pytest.raises(ds.MissingError, match="configuration"):
        read_denoiser_config(tmp_path / "none.toml")
    with pytest.raises(ds.MissingError, match=r"birds.parquet.*--data"):
        train_denoiser(TINY, tmp_path / "run", tmp_path, device="cpu")
    with pytest.raises(ds.InputError, match="Device 'gpu'"):
        train_denoiser(TINY, tmp_path / "run", data, device="gpu")
    assert not (tmp_path / "run").exists()  # a run that could not start claims nothing
    (data / "folder" / "old_cars" / "b.png").write_bytes(b"nothing")
    with pytest.raises(ds.InputError, match=r"b.png is not an image"):
        read_source(TINY.sources[1], data)
    pq.write_table(pa.table({"picture": [1]}), data / "birds.parquet")
    with pytest.raises(ds.InputError, match="no column 'img'"):
        read_source(TINY.sources[0], data)


ALIGNED = dataclasses.replace(TINY, align=0.5, align_after=2, align_share=0.5, align_points=16)


def test_two_views_show_the_same_points(data):
    """Where both views look at a ramp, the same point has the same value in both."""
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 64, 3))
    draws = Draws(dataclasses.replace(ALIGNED, align_share=1.0, align_after=0), data)
    draws.shares = np.ones(1)
    draws.sources = [[type(draws.sources[0][0])(ds.read(np.ascontiguousarray(ramp)).image(), "grey ramp")]]
    moved = 0
    for pair in range(20):
        one, two = draws[2 * pair], draws[2 * pair + 1]
        assert one.kind == two.kind == "ramp"
        assert len(one.points) == 16
        assert one.points.abs().max() <= 1
        assert max(one.timestep, two.timestep) < ALIGNED.align_t
        boxes = []
        for view in (
            one,
            two,
        ):  # recover the affine map from x in the view to position on the ramp, up to colour changes
            grey = view.pixels.mean(0).mean(0)
            boxes.append(
                torch.nn.functional.grid_sample(
                    grey[None, None, None], view.points[None, None] * torch.tensor([1, 0]), align_corners=False
                )
            )
        values = torch.cat(boxes).squeeze()
        order = [torch.corrcoef(torch.stack([v, values[0].flatten()]))[0, 1].item() for v in values.flatten(1)]
        assert order[1] > 0.9  # colours are clipped
        moved += int(not torch.equal(one.points, two.points))
    assert moved > 10


def test_alignment_loss_prefers_features_that_correspond():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(4, 32, 2, generator=generator) * 1.6 - 0.8
    points[1], points[3] = points[0], points[2]
    noise = torch.randn(2, 8, 16, 16, generator=generator)
    same = noise.repeat_interleave(2, 0)  # both views of a pair look alike
    shuffled = torch.stack([noise[0], noise[1], noise[1], noise[0]])
    assert alignment(same, points, ["a"] * 2 + ["b"] * 2) < 0.7 * alignment(shuffled, points, ["a"] * 2 + ["b"] * 2)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    code = torch.cat([torch.stack([torch.sin(k * v), torch.cos(k * v)]) for v in (x, y) for k in (1.5, 3)])
    shared = alignment(code.expand(4, -1, -1, -1), points, ["a"] * 4)  # the same code in all pictures survives exchange
    own = torch.stack([code, code, code.flip(0), code.flip(0)])
    assert shared < alignment(own, points, ["a"] * 4) - 0.2


def test_aligned_training_resumes_exactly(data, tmp_path):
    train_denoiser(ALIGNED, tmp_path / "straight", data, device="cpu")
    train_denoiser(dataclasses.replace(ALIGNED, steps=2), tmp_path / "halves", data, device="cpu")
    train_denoiser(ALIGNED, tmp_path / "halves", data, device="cpu")
    assert losses(tmp_path / "straight") == losses(tmp_path / "halves")
    plain = dataclasses.replace(ALIGNED, align=0.0)
    train_denoiser(plain, tmp_path / "plain", data, device="cpu")
    assert losses(tmp_path / "plain")[:2] == losses(tmp_path / "straight")[:2]
    assert losses(tmp_path / "plain")[2:] != losses(tmp_path / "straight")[2:]
