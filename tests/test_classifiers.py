"""Classifiers: the published noisy one key for key and number for number, any other behind the same noun, and the trainer."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import GOLDEN, relative, smooth_picture
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

import denoscope as ds
from denoscope.cli.main import main
from denoscope.denoisers.classifiers import (
    ADMClassifier,
    ADMClassifierConfig,
    AttentionPool,
    Classifier,
    load_classifier,
    save_classifier,
)
from denoscope.training.checkpoint import Checkpoint
from denoscope.training.classifier import accuracy, read_labelled, small_classifier, train_classifier

TINY = ADMClassifierConfig(
    model_channels=32, classes=5, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(2,), num_head_channels=32,
    image_size=8,
)  # fmt: skip
OFFICIAL = GOLDEN / "adm-classifier"


def tiny(config=TINY, seed=0):
    torch.manual_seed(seed)
    return ADMClassifier(config).requires_grad_(False).eval()


def residual(at, channels, out, embedding=128):
    """Names and shapes of a residual block as in the published files."""
    shapes = {
        "in_layers.0.weight": (channels,), "in_layers.0.bias": (channels,),
        "in_layers.2.weight": (out, channels, 3, 3), "in_layers.2.bias": (out,),
        "emb_layers.1.weight": (2 * out, embedding), "emb_layers.1.bias": (2 * out,),
        "out_layers.0.weight": (out,), "out_layers.0.bias": (out,),
        "out_layers.3.weight": (out, out, 3, 3), "out_layers.3.bias": (out,),
    }  # fmt: skip
    if channels != out:
        shapes |= {"skip_connection.weight": (out, channels, 1, 1), "skip_connection.bias": (out,)}
    return {f"{at}.{name}": shape for name, shape in shapes.items()}


def attention(at, channels):
    shapes = {
        "norm.weight": (channels,), "norm.bias": (channels,),
        "qkv.weight": (3 * channels, channels, 1), "qkv.bias": (3 * channels,),
        "proj_out.weight": (channels, channels, 1), "proj_out.bias": (channels,),
    }  # fmt: skip
    return {f"{at}.{name}": shape for name, shape in shapes.items()}


def test_the_state_dict_has_the_published_names():
    expected = {
        "time_embed.0.weight": (128, 32), "time_embed.0.bias": (128,),
        "time_embed.2.weight": (128, 128), "time_embed.2.bias": (128,),
        "input_blocks.0.0.weight": (32, 3, 3, 3), "input_blocks.0.0.bias": (32,),
        **residual("input_blocks.1.0", 32, 32),
        **residual("input_blocks.2.0", 32, 32),
        **residual("input_blocks.3.0", 32, 64), **attention("input_blocks.3.1", 64),
        **residual("middle_block.0", 64, 64), **attention("middle_block.1", 64), **residual("middle_block.2", 64, 64),
        "out.0.weight": (64,), "out.0.bias": (64,),
        "out.2.positional_embedding": (64, 17),
        "out.2.qkv_proj.weight": (192, 64, 1), "out.2.qkv_proj.bias": (192,),
        "out.2.c_proj.weight": (5, 64, 1), "out.2.c_proj.bias": (5,),
    }  # fmt: skip
    assert {name: tuple(value.shape) for name, value in tiny().state_dict().items()} == expected


@pytest.mark.parametrize(
    ("options", "tensors", "parameters"),
    [
        ({}, 307, 65_438_568),
        ({"image_size": 128, "channel_mult": (1, 1, 2, 3, 4), "attention_resolutions": (4, 8, 16)}, 221, 42_568_040),
        (
            {"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "attention_resolutions": (8, 16, 32)},
            249,
            54_096_360,
        ),
        (
            {"image_size": 512, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "attention_resolutions": (16, 32, 64)},
            281,
            54_448_360,
        ),
    ],
)
def test_the_published_architectures(options, tensors, parameters):
    """Counts from `create_classifier` of openai/guided-diffusion at the flags of its README."""
    with torch.device("meta"):
        state = ADMClassifier(ADMClassifierConfig(num_res_blocks=2 if options else 4, **options)).state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (tensors, parameters)


def test_logits_and_gradients_of_the_official_code():
    classifier = load_classifier(OFFICIAL / "classifier.safetensors", device="cpu")
    case = load_file(OFFICIAL / "case.safetensors")
    x = case["x"].requires_grad_()
    logits = classifier.logits(x, case["t"])
    assert torch.allclose(logits, case["logits"], atol=1e-5)
    chosen = logits.log_softmax(1)[torch.arange(len(x)), case["labels"]].sum()
    assert relative(torch.autograd.grad(chosen, x)[0], case["gradient"]) < 1e-5
    assert classifier.noise_aware
    assert (classifier.classes, classifier.size, classifier.name) == (7, 8, "classifier")


def test_the_attention_pool_is_its_formula():
    torch.manual_seed(0)
    pool, x = AttentionPool(6, 8, 4, 3).double(), torch.randn(2, 8, 2, 3, dtype=torch.float64)
    for one, found in zip(x, pool(x), strict=True):
        places = one.reshape(8, 6)
        z = torch.cat([places.mean(1, keepdim=True), places], 1) + pool.positional_embedding
        q, k, v = (pool.qkv_proj.weight[..., 0] @ z + pool.qkv_proj.bias[:, None]).split(8)
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            scores = (q[h, 0] @ k[h]) / 2  # sqrt of 4 channels
            heads.append(v[h] @ (scores.exp() / scores.exp().sum()))
        expected = pool.c_proj.weight[..., 0] @ torch.cat(heads) + pool.c_proj.bias
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model_channels": 48}, "multiple of 32"),
        ({"num_head_channels": 24}, "Heads of 24"),
        ({"image_size": 12}, "multiple of 8"),
        ({"channel_mult": ()}, "multiple of 32"),
    ],
)
def test_shapes_that_do_not_divide_are_named(options, sentence):
    with pytest.raises(ds.InputError, match=sentence):
        ADMClassifierConfig(**options)


def test_logits_are_differentiable_and_know_the_noise():
    classifier = Classifier.of(tiny())
    assert (classifier.noise_aware, classifier.classes, classifier.size) == (True, 5, 8)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = classifier.logits(x, torch.tensor([0, 900]))
    assert logits.dtype == torch.float32
    gradient = torch.autograd.grad(logits.log_softmax(1)[:, 1].sum(), x)[0]
    step = 1e-3 * gradient / gradient.norm()
    rise = (
        classifier.logits(x + step, torch.tensor([0, 900])).log_softmax(1)[:, 1].sum()
        - logits.log_softmax(1)[:, 1].sum()
    )
    assert torch.allclose(rise / 1e-3, gradient.norm(), rtol=2e-2)
    clean = classifier.logits(x)
    assert torch.equal(clean, classifier.logits(x, torch.zeros(2, dtype=torch.long)))
    assert not torch.allclose(clean[1], logits[1])
    half = Classifier.of(tiny().bfloat16())
    assert half.logits(x).dtype == torch.float32
    assert torch.allclose(half.logits(x), clean, atol=0.05)
    with pytest.raises(ds.InputError, match="takes 8x8 pixels, not 16x8"):
        classifier.logits(torch.zeros(1, 3, 8, 16))
    with pytest.raises(ds.InputError, match="3 channels, not 4"):
        classifier.logits(torch.zeros(1, 4, 8, 8))


class Means(nn.Module):
    """Logits that show what the module was given."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, pixels):
        return self.scale * pixels.mean((2, 3))


def test_clean_classifiers_see_normalised_colours_at_their_size():
    x = torch.rand(2, 3, 20, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    shown = Classifier.of(Means(), 3, size=5, mean=mean, std=std).logits(x, torch.tensor([3, 4]))
    small = nn.functional.interpolate(x, (5, 5), mode="bilinear", antialias=True).mean((2, 3))
    assert torch.allclose(shown, ((small + 1) / 2 - torch.tensor(mean)) / torch.tensor(std), atol=1e-5)
    assert torch.allclose(Classifier.of(Means(), 3).logits(x), x.mean((2, 3)), atol=1e-6)
    grey = Classifier.of(Means(), 3, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).logits(x[:, :1])
    assert torch.allclose(grey, (x[:, :1].mean((2, 3)) + 1) / 2 * torch.ones(3), atol=1e-6)


def test_what_is_noise_aware_is_seen_from_the_signature():
    class Two(Means):
        def forward(self, x, sigma):  # pyright: ignore
            return super().forward(x)

    class Optional(Means):
        def forward(self, pixel_values, labels=None):  # pyright: ignore
            return super().forward(pixel_values)

    aware = [Classifier.of(module, 3).noise_aware for module in (Two(), Optional(), nn.Sequential(Means()), tiny())]
    assert aware == [True, False, False, True]
    assert Classifier.of(nn.Sequential(nn.Flatten(), nn.Linear(12, 4))).classes == 4
    with pytest.raises(ds.InputError, match="give classes="):
        Classifier.of(Means())


def test_classifier_mistakes_are_named():
    named = Classifier.of(Means(), 3, names=("cat", "dog", "bird"), name="pets")
    for labels, expected in [(1, [1, 1]), ("bird", [2, 2]), (["dog", 0], [1, 0]), (torch.tensor([2, 1]), [2, 1])]:
        assert named.check_labels(labels, 2).tolist() == expected
    for labels, sentence in [
        (3, "pets has no class 3; choose 0 to 2 or one of cat, dog, bird"),
        ([-1, 0], "no class -1"),
        ("cow", "no class 'cow'"),
        ([0, 1, 2], "3 labels were given for 2 pictures"),
    ]:
        with pytest.raises(ds.InputError, match=sentence):
            named.check_labels(labels, 2)
    with pytest.raises(ds.InputError, match="3 classes but 1 names"):
        Classifier.of(Means(), 3, names=("cat",))
    with pytest.raises(ds.InputError, match="give both or neither"):
        Classifier.of(Means(), 3, mean=(0.0, 0.0, 0.0))
    with pytest.raises(ds.InputError, match=r"returned \[1, 3\] where \[1, 4\]"):
        Classifier.of(Means(), 4).logits(torch.zeros(1, 3, 4, 4))
    for part in (nn.Dropout(), nn.BatchNorm2d(3)):
        moving = Classifier.of(nn.Sequential(part, Means()), 3)
        with pytest.raises(ds.InputError, match=r"training mode.*call \.eval\(\)"):
            moving.logits(torch.zeros(1, 3, 4, 4))
        moving.module.eval()
        assert moving.logits(torch.zeros(1, 3, 4, 4)).shape == (1, 3)


@pytest.mark.parametrize("noise_aware", [True, False])
def test_saved_and_loaded(tmp_path, noise_aware):
    names = ("a", "b", "c", "d", "e")
    one = Classifier(tiny(), noise_aware, 5, names, 8)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 700])
    two = load_classifier(save_classifier(one, tmp_path / "one.safetensors"), device="cpu")
    assert torch.allclose(one.logits(x, t), two.logits(x, t), atol=1e-6)
    assert (two.noise_aware, two.classes, two.names, two.size, two.name) == (noise_aware, 5, names, 8, "one")
    assert not any(weights.requires_grad for weights in two.module.parameters())
    save_classifier(one, tmp_path / "half.safetensors", "float16")
    half = load_classifier(tmp_path / "half.safetensors", device="cpu")
    assert (half.dtype, load_file(tmp_path / "half.safetensors")["out.0.weight"].dtype) == (
        torch.float32,
        torch.float16,
    )
    assert torch.allclose(half.logits(x, t), one.logits(x, t), atol=1e-2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{n}.{s}" for n in ("half", "one") for s in ("json", "safetensors")
    ]
    with pytest.raises(ds.InputError, match="saved as .safetensors, not .pt"):
        save_classifier(one, tmp_path / "a.pt")
    with pytest.raises(ds.InputError, match="no ADM classifier"):
        save_classifier(Classifier.of(Means(), 3), tmp_path / "a.safetensors")


def test_files_that_are_no_classifiers_are_named(tmp_path):
    save_classifier(Classifier.of(tiny()), tmp_path / "a.safetensors")
    about = json.loads((tmp_path / "a.json").read_text())
    torch.save(load_file(tmp_path / "a.safetensors"), tmp_path / "a.pt")
    assert load_classifier(tmp_path / "a.pt", device="cpu").classes == 5
    for text, sentence in [
        ("{", "not valid JSON"),
        (json.dumps({**about, "width": 3}), "unknown key 'width'"),
        (json.dumps({**about, "model_channels": 40}), r"a\.json: .*multiple of 32"),
        (json.dumps({**about, "model_channels": "wide"}), "does not describe an ADM classifier"),
        (json.dumps({**about, "names": ["a"]}), "5 classes but 1 names"),
        ("{}", "a.pt is not an ADM classifier of the expected architecture.*time_embed"),
    ]:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ds.InputError, match=sentence):
            load_classifier(tmp_path / "a.pt", device="cpu")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ds.InputError, match="damaged"):
        load_classifier(tmp_path / "a.safetensors", device="cpu")
    (tmp_path / "b.pt").write_bytes(b"nothing")
    with pytest.raises(ds.InputError, match="not a checkpoint of plain tensors"):
        load_classifier(tmp_path / "b.pt", device="cpu")
    save_file({"weight": torch.zeros(3)}, tmp_path / "c.safetensors")
    with pytest.raises(ds.InputError, match="not an ADM classifier"):
        load_classifier(tmp_path / "c.safetensors", device="cpu")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ds.InputError, match="not a checkpoint"):
        load_classifier(tmp_path / "notes.txt", device="cpu")
    with pytest.raises(ds.MissingError, match="no classifier"):
        load_classifier(tmp_path / "gone.pt", device="cpu")


@pytest.fixture
def resnet(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=12)
    config.id2label = {i: f"kind {i}" for i in range(12)}
    ResNetForImageClassification(config).eval().save_pretrained(tmp_path / "resnet")
    pictures = {
        "do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3], "size": {"shortest_edge": 24},
    }  # fmt: skip
    (tmp_path / "resnet" / "preprocessor_config.json").write_text(json.dumps(pictures))
    return tmp_path / "resnet"


def test_a_transformers_folder(resnet):
    classifier = load_classifier(resnet, device="cpu")
    assert (classifier.classes, classifier.size, classifier.noise_aware, classifier.name) == (12, 24, False, "resnet")
    assert classifier.names == tuple(f"kind {i}" for i in range(12))
    x = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = classifier.logits(2 * x - 1)
    module = ResNetForImageClassification.from_pretrained(resnet).eval()
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.2, 0.3])[:, None, None]
    assert torch.allclose(logits, module((x - mean) / std).logits, atol=1e-5)
    assert torch.autograd.grad(logits[:, 3].sum(), x)[0].abs().max() > 0
    assert classifier.logits(torch.zeros(1, 1, 50, 40)).shape == (1, 12)
    assert Classifier.of(module).classes == 12
    assert not Classifier.of(module).noise_aware


def test_transformers_folders_that_cannot_be_used_are_named(resnet, tmp_path):
    pictures = resnet / "preprocessor_config.json"
    given = json.loads(pictures.read_text())
    pictures.write_text(
        json.dumps({**given, "size": 256, "crop_size": 16, "do_center_crop": True, "do_normalize": False})
    )
    plain = load_classifier(resnet, device="cpu")
    assert (plain.size, plain.mean, plain.std) == (16, (0, 0, 0), (1, 1, 1))
    pictures.write_text(json.dumps({**given, "size": {"height": 24, "width": 32}}))
    with pytest.raises(ds.InputError, match="no square size"):
        load_classifier(resnet, device="cpu")
    pictures.unlink()
    with pytest.raises(ds.MissingError, match=r"no preprocessor_config\.json"):
        load_classifier(resnet, device="cpu")
    pictures.write_text(json.dumps(given))
    (resnet / "model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(ds.InputError, match="damaged"):
        load_classifier(resnet, device="cpu")
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path / "headless")
    with pytest.raises(ds.InputError, match=r"no image-classification head \(ResNetModel\)"):
        load_classifier(tmp_path / "headless", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ds.MissingError, match=r"no config\.json"):
        load_classifier(tmp_path / "empty", device="cpu")


def stripes(count, seed, size=8):
    """Pictures of lying (0) and standing (1) stripes in random colours."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=count)
    waves = np.where(np.arange(size) // 2 % 2, 1.0, -1.0)[None].repeat(size, 0)
    images = [wave * rng.uniform(0.4, 1, (3, 1, 1)) for wave in (waves if label else waves.T for label in labels)]
    return torch.tensor(np.stack(images), dtype=torch.float32), torch.from_numpy(labels)


TWO = small_classifier(8, 2)
QUICK = {"steps": 60, "batch": 32, "lr": 2e-3, "crop": (1.0, 1.0), "device": "cpu"}


@pytest.fixture(scope="module")
def schedule():
    return ds.NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})


def test_a_noisy_classifier_learns_and_noise_makes_it_harder(schedule):
    reports = []
    trained = train_classifier(
        *stripes(64, 0), schedule, TWO, names=("lying", "standing"), report=lambda *said: reports.append(said), **QUICK
    )
    shares = [accuracy(trained, *stripes(100, 1), schedule, t) for t in (0, 300, 990)]
    assert shares[0] > 0.95
    assert shares[1] > 0.9
    assert shares[2] < 0.75
    assert trained.noise_aware
    assert (trained.names, trained.classes, trained.size) == (("lying", "standing"), 2, 8)
    assert [step for step, _, _ in reports] == list(range(1, 61))
    assert not trained.module.training
    images, labels = stripes(100, 1)
    assert accuracy(trained, images, labels, schedule, 600) == accuracy(trained, images, labels, schedule, 600, batch=7)


def test_a_clean_classifier_learns_from_larger_pictures():
    images, labels = stripes(64, 0)
    trained = train_classifier(images.repeat_interleave(2, 2).repeat_interleave(2, 3), labels, None, TWO, **QUICK)
    assert not trained.noise_aware
    assert accuracy(trained, *stripes(100, 1)) > 0.95
    x = stripes(2, 2)[0]
    assert torch.equal(trained.logits(x), trained.logits(x, torch.tensor([500, 900])))


def test_the_same_seed_makes_the_same_weights(schedule):
    options = {**QUICK, "steps": 3, "crop": (0.3, 1.0)}
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, two, other = (train_classifier(*stripes(9, 0), schedule, TWO, seed=seed, **options) for seed in (4, 4, 5))
    assert torch.equal(before, torch.random.get_rng_state())
    a, b, c = (classifier.module.state_dict() for classifier in (one, two, other))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("noisy", [False, True])
def test_a_stopped_training_ends_in_the_same_weights(schedule, tmp_path, noisy):
    data, told, options = stripes(9, 0), [], {**QUICK, "steps": 7}
    levels = schedule if noisy else None

    def stop(step, loss, seconds):
        if step == 5:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "c.safetensors", told.append, seconds=0)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(*data, levels, TWO, report=stop, checkpoint=checkpoint, **options)
    before = checkpoint.path.read_bytes()
    pictures, labels = data
    others = [{"lr": 3e-3}, {"steps": 8}, {"seed": 1}]
    for other in others:
        with pytest.raises(ds.InputError, match="c.checkpoint.pt is of a training with other settings"):
            train_classifier(*data, levels, TWO, checkpoint=checkpoint, **{**options, **other})
    for given in ((-pictures, labels, levels), (pictures, 1 - labels, levels), (*data, None if noisy else schedule)):
        with pytest.raises(ds.InputError, match="other settings"):
            train_classifier(*given, TWO, checkpoint=checkpoint, **options)
    assert checkpoint.path.read_bytes() == before
    assert told == []
    cut = train_classifier(*data, levels, TWO, checkpoint=checkpoint, **options)
    whole = train_classifier(*data, levels, TWO, **options)
    assert told == [5]
    one, other = cut.module.state_dict(), whole.module.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in other)
    checkpoint.remove()
    assert not list(tmp_path.iterdir())


def test_training_mistakes_are_named():
    images, labels = stripes(8, 0)
    for given, sentence in [
        ((images, torch.zeros_like(labels)), "each of the 2 classes"),
        ((images, labels + 1), "each of the 2 classes"),
        ((images[:, :1], labels), "1 channels where the network takes 3"),
    ]:
        with pytest.raises(ds.InputError, match=sentence):
            train_classifier(*given, None, TWO, **QUICK)
    with pytest.raises(ds.InputError, match="crop two shares"):
        train_classifier(images, labels, None, TWO, **{**QUICK, "crop": (0.0, 1.0)})
    with pytest.raises(ds.InputError, match=r"The loss is .* lower lr"):
        train_classifier(images, labels, None, TWO, **{**QUICK, "lr": 1e30, "steps": 5})


@pytest.mark.parametrize(("size", "levels", "strides"), [(32, 4, (4, 8)), (28, 3, (4,)), (8, 2, (1, 2)), (7, 1, (1,))])
def test_small_networks_fit_their_pictures(size, levels, strides):
    config = small_classifier(size, 10)
    assert (len(config.channel_mult), config.attention_resolutions) == (levels, strides)
    with torch.device("meta"):
        assert sum(weights.numel() for weights in ADMClassifier(config).parameters()) < 500_000


@pytest.fixture
def folder(tmp_path):
    images, labels = stripes(40, 0, 12)
    for name in ("standing", "lying", "other"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "data" / ("lying", "standing")[label] / f"{i:02}.png")
    smooth_picture(0, 30, 20).image().save(tmp_path / "data" / "other" / "a.png")
    return tmp_path / "data"


def test_labelled_pictures_are_read(folder, tmp_path):
    images, labels, names = read_labelled(folder, 10)
    assert (images.shape, names) == ((41, 3, 10, 10), ("lying", "other", "standing"))
    assert (images.min() >= -1, images.max() <= 1, labels.bincount()[1]) == (True, True, 1)
    images, labels, names = read_labelled(folder, 12, ["standing", "lying"])
    assert (len(images), names) == (40, ("standing", "lying"))
    same = stripes(40, 0, 12)
    assert torch.allclose(images[labels == 1][0], same[0][same[1] == 0][0], atol=1 / 127)

    def png(path):
        return {"bytes": path.read_bytes(), "path": None}

    cells = [png(folder / "other" / "a.png") for _ in range(3)]
    pq.write_table(pa.table({"img": cells, "label": [2, 10, 2]}), tmp_path / "a.parquet")
    assert read_labelled(tmp_path / "a.parquet", 8)[1:][1] == ("10", "2")
    pq.write_table(pa.table({"img": cells}), tmp_path / "b.parquet")
    for path, classes, error, sentence in [
        (tmp_path / "b.parquet", (), ds.InputError, "no column 'label'"),
        (tmp_path / "none", (), ds.MissingError, "no labelled images"),
        (folder, ("lying", "cow"), ds.InputError, "no images of class 'cow'; it has lying, other, standing"),
        (folder, ("lying",), ds.InputError, "one class only"),
        (folder, ("lying", "lying"), ds.InputError, "'lying' is asked for twice"),
        (folder / "other", (), ds.InputError, "one class only"),
    ]:
        with pytest.raises(error, match=sentence):
            read_labelled(path, 8, classes)


def test_the_command_line(folder, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["denoscope", "train", "classifier", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stopped:
            status = stopped.code or 0
        said = capsys.readouterr()
        return status, said.out + said.err

    out = tmp_path / "new" / "c.safetensors"
    options = [
        "--size",
        8,
        "--classes",
        "standing, lying",
        "--steps",
        50,
        "--batch",
        16,
        "--lr",
        3e-3,
        "--device",
        "cpu",
    ]
    status, said = run(folder, "--out", out, "--clean", *options)
    assert (status, "step 50/50" in said, "Accuracy on 4 held-out pictures: 1.000" in said) == (0, True, True)
    assert sorted(path.name for path in out.parent.iterdir()) == ["c.json", "c.safetensors"]
    trained = load_classifier(out, device="cpu")
    assert (trained.names, trained.noise_aware) == (("standing", "lying"), False)
    assert accuracy(trained, *stripes(50, 3)[:1], 1 - stripes(50, 3)[1]) > 0.9
    before, noisy, fresh = out.read_bytes(), tmp_path / "noisy.safetensors", tmp_path / "fresh.safetensors"
    status, said = run(folder, "--out", noisy, *options, "--steps", 2)
    assert (status, "at t = 750" in said, load_classifier(noisy, device="cpu").noise_aware) == (0, True, True)
    (tmp_path / "a-file").write_text("")
    for wrong, sentence in [
        ([folder, "--out", tmp_path / "c.pt"], "must end in .safetensors"),
        ([folder, "--out", fresh, "--width", 40, *options], "multiple of 32"),
        ([tmp_path / "none", "--out", fresh], "no labelled images"),
        ([folder, "--out", fresh, "--model", GOLDEN / "dift-sd" / "pipeline"], "latents, not on pixels"),
        ([folder, "--out", out, *options], "is already there; choose another --out or delete it"),
        ([folder, "--out", tmp_path / "a-file" / "t.safetensors", *options], "lies in a file, not in a folder"),
        ([folder, "--out", fresh, *options, "--lr", "nan"], "--lr is nan"),
        ([folder, "--out", fresh, *options, "--lr", -1], "--lr is -1"),
        ([folder, "--out", fresh, *options, "--width", 0], "--width is 0"),
        ([folder, "--out", fresh, *options, "--steps", 0], "--steps is 0; it must be at least 1"),
        ([folder, "--out", fresh, *options, "--batch", 0], "--batch is 0"),
    ]:
        status, said = run(*wrong)
        assert (status, sentence in " ".join(said.split())) == (2, True), said
    assert (out.read_bytes() == before, fresh.exists()) == (True, False)
