"""Prompts by name, from files and from a captioning model; prompts longer than a text encoder takes."""

import json
import os
import shutil
import warnings
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as tf
from conftest import smooth_picture
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import denoscope as ds
from denoscope.denoisers.text import TextEncoder, long_prompts
from denoscope.features import recipe
from denoscope.features.prompts import PROMPTS, captions, needs_picture, resolve
from denoscope.images import write

LONG = " ".join(["a photo of the cat and the dog"] * 10)  # 80 words


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("cat/1.png", "dog/1.png", "dog/b.c.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        write(smooth_picture(len(name)).image(), folder / name)
    return {name: ds.read(folder / name) for name in ("cat/1.png", "dog/1.png", "dog/b.c.png")}


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """A tiny BLIP with random weights, without and with a chat template."""
    folder = tmp_path_factory.mktemp("captioner")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "cat", "dog", "red", "blue", "the"]
    words_model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    words_model.pre_tokenizer = pre_tokenizers.Whitespace()
    words_model.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=words_model, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    text = {
        "vocab_size": 12,
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    text |= {"num_attention_heads": 2, "max_position_embeddings": 160, "bos_token_id": 2, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.BlipConfig(
        text_config={**text, "eos_token_id": 3, "sep_token_id": 3, "projection_dim": 8},
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        projection_dim=8, image_text_hidden_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.BlipForConditionalGeneration(config).eval()
    with torch.no_grad():  # so that it says something, and not the same of every picture
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder / "plain")
    images = tf.BlipImageProcessorPil(size={"height": 16, "width": 16})
    tf.BlipProcessor(images, tokenizer).save_pretrained(folder / "plain")
    chat_words = Tokenizer(models.WordLevel({**words_model.get_vocab(), "<image>": 12}, unk_token="[UNK]"))
    chat_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chat_tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=chat_words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    chat = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=8),
            text_config=tf.LlamaConfig(
                vocab_size=13, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=256, bos_token_id=2, eos_token_id=3, pad_token_id=0,
            ),
            image_token_index=12, vision_feature_layer=-1,
        )
    ).eval()  # fmt: skip
    chat.save_pretrained(folder / "chat")
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
        "{% else %}the photo {% endif %}{% endfor %}{% endfor %}"
    )
    side = {"height": 16, "width": 16}
    tf.LlavaProcessor(
        tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side), chat_tokenizer, patch_size=8,
        vision_feature_select_strategy="default", chat_template=template, num_additional_image_tokens=1,
    ).save_pretrained(folder / "chat")  # fmt: skip
    return folder


def test_published_prompts(sd):
    assert (
        resolve("preset:horse-21", smooth_picture(0))
        == "a horse, high quality, best quality, highly realistic, masterpiece"
    )
    quality = ", high quality, best quality, highly realistic, masterpiece, high resolution"
    assert PROMPTS["correspondence"] == PROMPTS["correspondence-attention"] + quality
    for text in PROMPTS.values():
        assert text == " ".join(text.split())
        assert sd.text.tokenizer(text)["input_ids"]
    with pytest.raises(ds.InputError, match="no prompt 'horse'; the published ones are correspondence,"):
        resolve("preset:horse", smooth_picture(0))


def test_what_is_said_already_stays_as_it_is():
    for prompt in (None, 3, "", "a cat", "mail@home"):
        assert resolve(prompt, smooth_picture(0)) == prompt
        assert not needs_picture(prompt)
    assert needs_picture("@captions.json")
    assert needs_picture("caption:model")


@pytest.mark.parametrize("layout", ["json", "csv", "toml", "folder"])
def test_captions_by_the_name_of_the_picture(layout, pictures, tmp_path):
    given = {"cat/1.png": "a cat, sitting", "1": "some animal", "b.c": 'a "dog"'}
    path = tmp_path / f"captions.{layout}"
    if layout == "json":
        path.write_text(json.dumps(given))
    elif layout == "csv":
        path.write_text('name,caption\ncat/1.png,"a cat, sitting"\n1, some animal \n\nb.c,"a ""dog"""\n')
    elif layout == "toml":
        path.write_text("".join(f"{json.dumps(name)} = {json.dumps(text)}\n" for name, text in given.items()))
    else:
        path.mkdir()
        for name, text in (("1", "some animal\n"), ("b.c", 'a "dog"')):
            (path / f"{name}.txt").write_text(text)
    asked = f"@{path}"
    assert resolve(asked, pictures["dog/1.png"]) == "some animal"
    assert resolve(asked, pictures["dog/b.c.png"]) == 'a "dog"'
    assert resolve(asked, pictures["cat/1.png"]) == ("some animal" if layout == "folder" else "a cat, sitting")


def test_class_numbers_and_changed_files(pictures, tmp_path):
    path = tmp_path / "classes.json"
    path.write_text('{"1": 7}')
    assert resolve(f"@{path}", pictures["cat/1.png"]) == 7
    path.write_text('{"1": 8}')
    os.utime(path, ns=(10**18, 10**18))
    assert resolve(f"@{path}", pictures["cat/1.png"]) == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"cat.png": ', "cannot be read"),
        ("a.json", b"\xff\xfe\x00", "cannot be read"),
        ("a.json", '["a cat"]', "one table of picture names and captions"),
        ("a.json", '{"cat": {"text": "a cat"}}', "one table of picture names and captions"),
        ("a.json", '{"cat": true}', "one table of picture names and captions"),
        ("a.json", '{"cat": null}', "one table of picture names and captions"),
        ("a.json", "{}", "holds no captions"),
        ("a.csv", "cat.png,a cat, sitting\n", "no line of a name and a caption; put a caption with commas into quotes"),
        ("a.csv", "name,caption\n", "holds no captions"),
        ("a.toml", "cat = ", "cannot be read"),
        ("a.txt", "a cat", "read from .json, .csv or .toml"),
    ],
)
def test_files_that_hold_no_captions(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ds.InputError, match=message):
        captions(path)


def test_captions_that_are_missing(pictures, tmp_path):
    with pytest.raises(ds.MissingError, match="no file of captions"):
        resolve(f"@{tmp_path / 'none.json'}", pictures["cat/1.png"])
    with pytest.raises(ds.InputError, match="holds no captions"):
        resolve(f"@{tmp_path}", pictures["cat/1.png"])
    (tmp_path / "2.txt").write_text("two")
    with pytest.raises(ds.InputError, match="no caption for 1.png; add one under the name '1.png' or '1'"):
        resolve(f"@{tmp_path}", pictures["cat/1.png"])
    with pytest.raises(ds.InputError, match="not read from a file"):
        resolve(f"@{tmp_path}", smooth_picture(0))


@given(st.dictionaries(st.text(min_size=1), st.text() | st.integers(-9, 9), min_size=1))
def test_any_table_of_captions_comes_back(tmp_path_factory, table):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(table), "utf-8")
    assert captions(path) == table


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_captions_written_by_a_model(kind, captioner, capfd):
    picture = smooth_picture(4)
    text = resolve(f"caption:{captioner / kind}", picture)
    assert isinstance(text, str)
    assert text == " ".join(text.split()) != ""
    assert text.startswith("a photo of ") == (kind == "plain")
    assert resolve(f"caption:{captioner / kind}", smooth_picture(4)) == text
    out = capfd.readouterr()
    assert out.out == out.err == ""


def test_the_caption_is_the_models_own(captioner):
    """Greedy decoding step by step, without the pipeline, of two pictures."""
    model = tf.BlipForConditionalGeneration.from_pretrained(captioner / "plain").eval()
    processor = tf.BlipProcessor.from_pretrained(captioner / "plain")
    for seed in (5, 6):
        picture = smooth_picture(seed)
        given = processor(images=picture.image(), text="a photo of", return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**given, max_new_tokens=128, do_sample=False)
        words = processor.decode(ids[0], skip_special_tokens=True)
        assert resolve(f"caption:{captioner / 'plain'}", picture) == " ".join(words.split())


def vision_encoder_decoder(folder):
    """A tiny one with random weights, its files as those of vit-gpt2 on the hub."""
    end, words = "<|endoftext|>", ["a", "photo", "of", "cat", "dog", "red", "blue", "the"]
    words_model = Tokenizer(models.WordLevel({word: i for i, word in enumerate([end, *words])}, unk_token=end))
    words_model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words_model, bos_token=end, eos_token=end, unk_token=end)
    tokenizer.save_pretrained(folder)
    encoder = tf.ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    decoder = tf.GPT2Config(
        vocab_size=9, n_embd=16, n_layer=1, n_head=2, n_positions=160, bos_token_id=0, eos_token_id=0
    )
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=0, pad_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    shaken(tf.VisionEncoderDecoderModel(config), 0.6).save_pretrained(folder)
    tf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    given = json.loads(file.read_text())
    del given["image_processor_type"]
    file.write_text(json.dumps({**given, "feature_extractor_type": "ViTFeatureExtractor"}))


def shaken(model, much=0.3):
    """So that it says something, and not the same of every picture."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(much * torch.randn(parameter.shape))
    return model.eval()


def kosmos(folder):
    """A tiny Kosmos-2 with random weights that likes to mark phrases."""
    names = [
        "[PAD]",
        "[UNK]",
        *(f"image{i}" for i in range(64)),
        "[CLS]",
        "[SEP]",
        "a",
        "cat",
        "red",
        "An",
        "image",
        "of",
    ]
    words_model = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    words_model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=words_model, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]"
    )
    side = {"height": 16, "width": 16}
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side)
    tf.Kosmos2Processor(images, tokenizer, num_patch_index_tokens=4).save_pretrained(folder)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "embed_dim": 16, "layers": 1, "ffn_dim": 16}
    text |= {"attention_heads": 2, "pad_token_id": 0, "bos_token_id": 66, "eos_token_id": 67}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = tf.Kosmos2Config(text_config=text, vision_config=vision, latent_query_num=64)
    shaken(tf.Kosmos2ForConditionalGeneration(config)).save_pretrained(folder)


def test_an_encoder_with_a_decoder_writes_captions(tmp_path, capfd):
    vision_encoder_decoder(tmp_path)
    model: Any = tf.VisionEncoderDecoderModel.from_pretrained(tmp_path).eval()
    capfd.readouterr()
    said = set()
    for seed in range(4):
        picture = smooth_picture(seed)
        text = resolve(f"caption:{tmp_path}", picture)
        pixels = torch.from_numpy(np.array(picture.image().resize((16, 16), 2))).permute(2, 0, 1)[None] / 127.5 - 1
        ids = [0]  # greedy, by hand
        with torch.no_grad():
            while len(ids) <= 128 and (len(ids) == 1 or ids[-1] != 0):
                logits = model(pixel_values=pixels, decoder_input_ids=torch.tensor([ids])).logits
                ids.append(int(logits[0, -1].argmax()))
        words = [["", "a", "photo", "of", "cat", "dog", "red", "blue", "the"][i] for i in ids]
        assert text == " ".join(words).strip()
        said.add(text)
    assert len(said) > 1
    out = capfd.readouterr()
    assert out.out == out.err == ""


def test_kosmos_writes_captions_without_its_marks(tmp_path, capfd):
    kosmos(tmp_path)
    model: Any = tf.Kosmos2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor: Any = tf.AutoProcessor.from_pretrained(tmp_path)
    capfd.readouterr()
    for seed in (5, 6):
        picture = smooth_picture(seed)
        text = str(resolve(f"caption:{tmp_path}", picture))
        given = processor(images=picture.image(), text="<grounding>An image of", return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**given, max_new_tokens=128, do_sample=False)
        assert ids.shape[1] <= given["input_ids"].shape[1] + 128
        whole = processor.batch_decode(ids, skip_special_tokens=True)[0]
        assert "<grounding>" in whole
        assert "<image>" in whole
        assert text == " ".join(processor.post_process_generation(whole)[0].split())
        assert text.startswith("An image of ")
        assert "<" not in text
    out = capfd.readouterr()
    assert out.out == out.err == ""


def test_models_that_write_no_captions(captioner, tmp_path):
    picture = smooth_picture(7)
    with pytest.raises(ds.MissingError, match="no captioning model 'nowhere'"):
        resolve("caption:nowhere", picture)
    with pytest.raises(ds.MissingError, match=r"holds no config\.json"):
        resolve(f"caption:{tmp_path}", picture)
    tiny.clip().save_pretrained(tmp_path / "text")
    with pytest.raises(ds.InputError, match=r"text \(clip_text_model\) writes no captions"):
        resolve(f"caption:{tmp_path / 'text'}", picture)
    shutil.copytree(captioner / "plain", tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").unlink()
    with pytest.raises(ds.DenoscopeError, match="could not be loaded"):
        resolve(f"caption:{tmp_path / 'torn'}", picture)


def test_what_is_wrong_for_every_picture_is_told_before_any(sd, captioner, tmp_path):
    tiny.clip().save_pretrained(tmp_path / "text")
    (tmp_path / "bad.json").write_text("[]")
    for prompt, error, sentence in [
        ("preset:horse", ds.InputError, "no prompt 'horse'"),
        (f"@{tmp_path / 'none.json'}", ds.MissingError, "no file of captions"),
        (f"@{tmp_path / 'bad.json'}", ds.InputError, "must hold one table"),
        ("caption:nowhere", ds.MissingError, "no captioning model 'nowhere'"),
        (f"caption:{tmp_path / 'none'}", ds.MissingError, "no captioning model"),
        (f"caption:{tmp_path / 'text'}", ds.InputError, "writes no captions"),
    ]:
        for site in ("up.1", "up.0+up.1"):
            with pytest.raises(error, match=sentence):
                recipe(sd, site=site, prompt=prompt)
    assert recipe(sd, prompt=f"caption:{captioner / 'plain'}").prompt == f"caption:{captioner / 'plain'}"


@pytest.mark.parametrize("prompt", ["caption:none/of/these", "@none.json", "preset:none"])
def test_a_wrong_prompt_is_one_error_before_any_work(run, pictures, tmp_path, prompt):
    files = [picture.path for picture in pictures.values()]
    for verb in ("features", "segment"):
        out = tmp_path / verb
        extra = ("--examples", tmp_path) if verb == "segment" else ()
        if extra:
            for k in range(2):
                write(smooth_picture(k).image(), tmp_path / f"{k}.png")
                np.save(tmp_path / f"{k}.npy", np.arange(72 * 56).reshape(56, 72) // 2016)
        status, _, wrong = run(verb, *files, *extra, "--prompt", prompt, "--out", out)
        assert status == 2
        assert wrong.startswith("Error: There is no ")
        assert wrong.count("Error") == wrong.count("There is no") == 1
        assert "pictures failed" not in wrong
        assert not [path for path in out.rglob("*") if path.is_file()]


def pieces_by_hand(encoder, ids):
    """The released code's way: the ids of the whole prompt in pieces of 77, each encoded by itself."""
    with torch.no_grad():
        parts = [encoder.encoder(ids[:, i : i + 77]).last_hidden_state for i in range(0, ids.shape[1], 77)]
    return torch.cat(parts, 1)


def test_long_prompts_in_pieces(sd):
    ids = sd.text.tokenizer(LONG, return_tensors="pt", verbose=False).input_ids
    assert 77 < ids.shape[1] < 5 * 77
    found = sd.text.encode([LONG], chunks=True).last
    assert found.shape[1] == ids.shape[1]
    assert torch.allclose(found, pieces_by_hand(sd.text, ids), atol=1e-5)
    with pytest.warns(UserWarning, match="longer than 77 tokens"):
        cut = TextEncoder(sd.text.tokenizer, sd.text.encoder).encode([LONG])
    assert cut.last.shape[1] == 77
    assert torch.allclose(cut.last[:, :76], found[:, :76], atol=1e-5)  # the 77th is where the cut prompt ends


def test_other_prompts_are_padded_to_the_longest(sd):
    short = "a photo of a cat"
    both = sd.text.encode([short, LONG], chunks=True).last
    alone = [sd.text.encode([prompt], chunks=True).last for prompt in (short, LONG)]
    assert alone[0].shape[1] == 77
    assert torch.allclose(both[:1, :77], alone[0], atol=1e-5)
    assert torch.equal(both[1:], alone[1])
    size = both.shape[1]
    padded = sd.text.tokenizer(short, padding="max_length", max_length=size, return_tensors="pt", verbose=False)
    assert torch.allclose(both[:1], pieces_by_hand(sd.text, padded.input_ids), atol=1e-5)


def test_seventy_words_are_not_long(sd):
    assert sd.text.encode([" ".join(["cat"] * 70)], chunks=True).last.shape[1] == 77
    ids = sd.text.tokenizer(" ".join(["cat"] * 71), verbose=False)["input_ids"]
    assert sd.text.encode([" ".join(["cat"] * 71)], chunks=True).last.shape[1] == len(ids)


def test_the_context_leaves_the_encoders_as_they_were(sd):
    def tokens(prompt):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sd.condition([prompt]).tokens.shape[1]

    with long_prompts(sd):
        assert tokens(LONG) > 77
        with long_prompts(sd, chunks=False):
            assert tokens(LONG) == 77
        assert tokens(LONG) > 77
    assert tokens(LONG) == 77
    with pytest.raises(RuntimeError, match="mine"), long_prompts(sd):
        raise RuntimeError("mine")
    assert tokens(LONG) == 77


@pytest.mark.filterwarnings("ignore:This model's vocabulary")
@pytest.mark.parametrize("name", ["xl", "pixart", "sd3", "flux"])
def test_long_prompts_of_other_families(name, tmp_path):
    tiny.saved(tmp_path, name)
    denoiser = ds.load(tmp_path, device="cpu")
    words = "a photo of the cat " * 130
    with long_prompts(denoiser):
        condition = denoiser.condition([words.strip(), "a cat"])
        noisy = torch.randn(2, *denoiser.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert denoiser.predict(noisy, 100, condition).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cut = denoiser.condition([words.strip(), "a cat"])
    assert condition.tokens.shape[1] > cut.tokens.shape[1]
    if name == "pixart":  # T5 is told which tokens are padding
        mask = condition.extra["encoder_attention_mask"]
        assert mask.shape == condition.tokens.shape[:2]
        assert mask[0].sum() > cut.extra["encoder_attention_mask"][0].sum()
    for key, value in cut.extra.items():  # pooled embeddings are those of the prompt cut off
        if "pooled" in key or key == "text_embeds":
            assert torch.equal(condition.extra[key], value)
