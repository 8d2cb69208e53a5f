"""The guider: its state over steps and runs, its formulas against diffusers' guiders, and real modular pipelines."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN
from diffusers import (
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
)
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.wan import Wan22Blocks, WanBlocks, encoders
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from denoscope.errors import InputError
from denoscope.sampling.guider import CompressGuidance
from denoscope.sampling.schedules import GuidanceSchedule

N = 10
CONDITIONAL, UNCONDITIONAL = torch.randn(2, N, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def begin(guider, j, n=N):
    """What a denoise loop does before the network calls of a step: the batches that it runs."""
    guider.set_state(step=j, num_inference_steps=n, timestep=torch.tensor(float(n - j)))
    return guider.prepare_inputs({"x": (CONDITIONAL[0], UNCONDITIONAL[0])})


def loop(guider, steps=range(N), n=N):
    """Guided predictions and numbers of network calls of a loop whose predictions are fixed."""
    predictions, calls = [], []
    for j in steps:
        batches = begin(guider, j, n)
        for number, batch in enumerate(batches):
            guider.prepare_models(None)
            assert guider.is_conditional == (number == 0)
            batch.noise_pred = (CONDITIONAL, UNCONDITIONAL)[number][j % N]
        predictions.append(guider(batches)[0])
        calls.append(len(batches))
    return torch.stack(predictions), calls


def test_second_prediction_on_guided_steps_only():
    guider = CompressGuidance(rate=5)
    for n in (N, N, 7, N):
        _, calls = loop(guider, range(n), n)
        assert calls == [1 + guided for guided in GuidanceSchedule.power(n, 5).mask]
        assert guider.guided


def test_conditions_before_during_and_after_a_run():
    guider = CompressGuidance(positions=[0, 3])
    assert guider.num_conditions == 2
    loop(guider)
    assert guider.num_conditions == 2
    for j, count in ((0, 2), (1, 1), (3, 2), (4, 1)):
        assert len(begin(guider, j)) == count == guider.num_conditions
    guider.prepare_models(None)  # and the network fails: the next run must encode the negative prompt
    assert guider.num_conditions == 2
    assert "guided: False" in repr(guider)
    assert "positions: (0, 3)" in repr(guider)


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "use_original_formulation": True},
        {"enabled": False, "base": "cfg-zero*"},
        {"positions": []},
    ],
)
def test_without_guidance_one_condition(settings):
    guider = CompressGuidance(**settings)
    assert guider.num_conditions == 1
    told = pytest.warns(UserWarning, match="nothing to skip") if "guidance_scale" in settings else nullcontext()
    with told:
        predictions, calls = loop(guider)
    assert calls == [1] * N
    assert torch.equal(predictions, CONDITIONAL)


def test_guidance_can_be_switched_between_runs():
    guider = CompressGuidance()
    guider.disable()
    assert guider.num_conditions == 1
    assert torch.equal(loop(guider)[0], CONDITIONAL)
    guider.enable()
    guider.guidance_scale = 3.0
    assert torch.equal(loop(guider)[0], loop(CompressGuidance(3.0))[0])


STOCK = [
    ("cfg", ClassifierFreeGuidance, {}),
    ("apg", AdaptiveProjectedGuidance, {"adaptive_projected_guidance_momentum": -0.5, "eta": 0.3}),
    ("cfg-zero*", ClassifierFreeZeroStarGuidance, {"zero_init_steps": 2}),
]


@pytest.mark.parametrize(("base", "stock", "options"), STOCK)
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("rule", ["mask", "gap", "multiplicity", "reuse"])
def test_guiding_every_step_is_the_stock_guider(base, stock, options, original, rule):
    same = {"guidance_scale": 5.3, "use_original_formulation": original}
    ours = CompressGuidance(**same, rate=1, rule=rule, base=base, base_options=options)
    expected, _ = loop(stock(**same, **options))
    for _ in range(2):
        assert torch.equal(loop(ours)[0], expected)


def test_rescaling_is_the_stock_guiders_and_leaves_skipped_steps_alone():
    settings = {"guidance_scale": 5.3, "guidance_rescale": 0.7}
    expected, _ = loop(ClassifierFreeGuidance(**settings))
    got, _ = loop(CompressGuidance(**settings, positions=[0, 4]))
    assert torch.equal(got[[0, 4]], expected[[0, 4]])
    assert torch.equal(got[1:4], CONDITIONAL[1:4])
    zeroed, _ = loop(CompressGuidance(**settings, base="cfg-zero*", rate=1))
    assert torch.equal(zeroed[0], torch.zeros_like(zeroed[0]))


def test_gap_and_multiplicity_strengthen_guided_steps():
    counts = [1, 0, 0, 2, 0, 1, 0, 0, 0, 0]
    schedule, w = GuidanceSchedule(tuple(counts)), 4.0
    difference = CONDITIONAL - UNCONDITIONAL
    for rule, weights in (("gap", [3, 0, 0, 2, 0, 5, 0, 0, 0, 0]), ("multiplicity", counts)):
        weight = torch.tensor(weights).view(-1, 1, 1, 1, 1)
        got, _ = loop(CompressGuidance.from_schedule(schedule, guidance_scale=w, rule=rule))
        torch.testing.assert_close(got, CONDITIONAL + weight * (w - 1) * difference)
        original = {"guidance_scale": w - 1, "use_original_formulation": True}
        got, _ = loop(CompressGuidance.from_schedule(schedule, **original, rule=rule))
        torch.testing.assert_close(got, CONDITIONAL + weight * (w - 1) * difference)


def test_reuse_repeats_the_last_update_within_a_run():
    guider = CompressGuidance(4.0, positions=[2, 5], rule="reuse")
    expected = CONDITIONAL.clone()
    for j in range(2, N):
        source = 2 if j < 5 else 5
        expected[j] += 3 * (CONDITIONAL[source] - UNCONDITIONAL[source])
    for _ in range(2):  # the second run's first steps have nothing to reuse
        torch.testing.assert_close(loop(guider)[0], expected)


def test_reuse_ends_where_guidance_is_switched_off():
    guider = CompressGuidance(4.0, positions=[0], rule="reuse")
    loop(guider, range(2))
    guider.disable()
    assert torch.equal(loop(guider, range(2, N))[0], CONDITIONAL[2:])


def test_reuse_starts_anew_where_a_guider_sees_only_later_steps():
    """Wan 2.2 hands the run over to a second guider in the middle."""
    guider = CompressGuidance(4.0, positions=[7], rule="reuse")
    for _ in range(2):
        got, calls = loop(guider, range(6, N))
        assert torch.equal(got[0], CONDITIONAL[6])
        assert calls == [1, 2, 1, 1]


@pytest.mark.parametrize("first", [0, 1])
def test_momentum_sees_guided_steps_only(first):
    steps, options = [first, 4, 8], {"adaptive_projected_guidance_momentum": -0.5}
    stock = AdaptiveProjectedGuidance(5.0, **options)
    begin(stock, 0)  # an empty momentum buffer
    expected, _ = loop(stock, steps)
    guider = CompressGuidance(5.0, positions=steps, base="apg", base_options=options)
    for _ in range(2):
        got, _ = loop(guider)
        assert torch.equal(got[steps], expected)
        assert torch.equal(got[2:4], CONDITIONAL[2:4])


@pytest.mark.parametrize("rule", ["mask", "reuse"])
def test_zero_star_sets_skipped_first_steps_to_zero(rule):
    options = {"zero_init_steps": 2}
    guider = CompressGuidance(5.0, positions=[1, 4], base="cfg-zero*", base_options=options, rule=rule)
    expected, _ = loop(ClassifierFreeZeroStarGuidance(5.0, **options))
    got, calls = loop(guider)
    assert calls == [1, 1, 1, 1, 2, 1, 1, 1, 1, 1]
    assert torch.equal(got[[0, 1, 4]], expected[[0, 1, 4]])
    assert torch.equal(got[2:4], CONDITIONAL[2:4])
    guider.zero_init_steps = 0  # as Helios' loop does
    assert torch.equal(loop(guider)[0][0], CONDITIONAL[0])


def test_order_2_decides_once_for_both_calls_of_a_step():
    _, calls = loop(CompressGuidance(positions=[0, 2, 9], order=2), range(2 * N - 1))
    assert calls == [2, 2, 1, 1, 2, 2, *[1] * 12, 2]
    _, calls = loop(CompressGuidance(positions=[0, 9]), range(N + 1))  # PNDM
    assert calls == [2, *[1] * 8, 2, 2]
    with pytest.raises(InputError, match="more network calls than the 10 steps times order 1"):
        loop(CompressGuidance(), range(2 * N - 1))


def test_settings_survive_a_round_trip(tmp_path):
    schedule = GuidanceSchedule.power(N, rate=2, k=5)
    options = {"zero_init_steps": 1}
    guider = CompressGuidance.from_schedule(
        schedule, guidance_scale=3, rule="multiplicity", base="cfg-zero*", base_options=options
    )
    guider.save_pretrained(tmp_path)
    expected, _ = loop(guider)
    for copy in (CompressGuidance.from_pretrained(tmp_path), CompressGuidance.from_config(guider.config), guider.new()):
        assert copy.schedule(N).counts == schedule.counts
        assert torch.equal(loop(copy)[0], expected)
    stronger = guider.new(guidance_scale=6.0)
    assert stronger.guidance_scale == 6.0
    assert stronger.config["positions"] == guider.config["positions"]


def test_a_run_of_another_length_is_refused():
    guider = CompressGuidance.from_schedule(GuidanceSchedule.uniform(N))
    for _ in range(2):
        with pytest.raises(InputError, match="for 10 steps and the run has 12"):
            begin(guider, 0, 12)
    assert loop(guider)[1] == [1 + guided for guided in GuidanceSchedule.uniform(N).mask]


def test_a_loop_must_set_the_step():
    with pytest.raises(InputError, match="knows no step"):
        CompressGuidance().forward(CONDITIONAL, UNCONDITIONAL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.5}, "rate is 0.5"),
        ({"k": 0.0}, "k is 0.0"),
        ({"positions": [-1]}, "Position -1"),
        ({"positions": [10], "steps": 10}, "Position 10"),
        ({"steps": 0}, "number of steps is 0"),
        ({"order": 0}, "order is 0"),
        ({"base_options": {"eta": 0.0}}, "Option eta is not one of base 'cfg'"),
        ({"base": "apg", "base_options": {"start": 0.5}}, "Option start .* may hold: adaptive"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(InputError, match=message):
        CompressGuidance(**settings)


class Replaced(ClassifierFreeGuidance):
    """Diffusers' guidance with u replaced by c except on `guided` steps, at full cost."""

    guided = frozenset()

    def forward(self, pred_cond, pred_uncond=None):
        return super().forward(pred_cond, pred_uncond if self._step in self.guided else pred_cond)


@pytest.fixture(scope="module", params=["sdxl", "wan"])
def family(request):
    """A modular pipeline with tiny random networks, from text to latents, and a count of network calls."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(GOLDEN / "dift-sd" / "pipeline" / "tokenizer")
    if request.param == "sdxl":
        text = CLIPTextConfig(
            vocab_size=521, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
            projection_dim=32, bos_token_id=519, eos_token_id=520, pad_token_id=0,
        )  # fmt: skip
        network = UNet2DConditionModel(
            block_out_channels=(16, 32), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), cross_attention_dim=64,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80, norm_num_groups=8,
        )  # fmt: skip
        blocks = StableDiffusionXLAutoBlocks()
        size = {"height": 64, "width": 64, "dtype": torch.float32}
        parts = {
            "text_encoder": CLIPTextModel(text).eval(),
            "text_encoder_2": CLIPTextModelWithProjection(text).eval(),
            "tokenizer_2": tokenizer,
            "unet": network.eval(),
            "scheduler": EulerDiscreteScheduler(),
        }
    else:
        blocks, network, parts = WanBlocks(), wan_network(), wan_parts()
        size = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
        parts["transformer"] = network
    return pipeline(blocks, size, [network], tokenizer=tokenizer, **parts)


def wan_network():
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=1
    ).eval()


def wan_parts():
    text = UMT5Config(vocab_size=521, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return {"text_encoder": UMT5EncoderModel(text).eval(), "scheduler": scheduler}


def pipeline(blocks, size, networks, **parts):
    blocks.sub_blocks.pop("decode")
    pipe = blocks.init_pipeline()
    pipe.update_components(**parts)
    counter = SimpleNamespace(calls=0, fail_at=None)

    def count(*_):
        counter.calls += 1
        if counter.calls == counter.fail_at:
            raise RuntimeError("out of memory")

    for network in networks:
        network.register_forward_pre_hook(count)

    def run(steps=N, fail_at=None, **components):
        """The latents of two prompts and the number of network calls."""
        if components:
            pipe.update_components(**components)
        counter.calls, counter.fail_at = 0, fail_at
        latents = pipe(
            prompt=["a cat", "two dogs"], negative_prompt=["blurred", "blurred"], num_inference_steps=steps, **size,
            generator=torch.Generator().manual_seed(0), output="latents",
        )  # fmt: skip
        return latents, counter.calls

    return SimpleNamespace(run=run, pipe=pipe, scheduler=parts["scheduler"])


@pytest.fixture(autouse=True)
def _no_ftfy(monkeypatch):
    """Wan cleans prompts with the package ftfy, which is not needed for plain ones."""
    monkeypatch.setattr(encoders, "prompt_clean", str.strip)


def test_pipeline_skips_network_calls_and_nothing_else(family):
    stock = Replaced(4.0)
    stock.guided = {0, 5, 8, 9}
    expected, calls = family.run(guider=stock)
    assert calls == 2 * N
    guider = CompressGuidance(4.0, rate=5)
    got, calls = family.run(guider=guider)
    assert calls == N + 4
    assert torch.equal(got, expected)
    for fail_at in (4, None):  # a failure in a skipped step, then again: the negative prompt must still be encoded
        if fail_at:
            with pytest.raises(RuntimeError, match="out of memory"):
                family.run(fail_at=fail_at)
        again, calls = family.run()
        assert calls == N + 4
        assert torch.equal(again, expected)
    assert family.run(steps=6)[1] == 6 + 3


def test_pipeline_with_every_step_guided_is_the_stock_one(family):
    expected, _ = family.run(guider=ClassifierFreeGuidance(4.0))
    unguided, calls = family.run(guider=CompressGuidance(4.0, positions=[N - 1]))
    assert calls == N + 1  # and a schedule that ends guided differs from one that never is
    assert not torch.equal(unguided, expected)
    got, calls = family.run(guider=CompressGuidance(4.0, rate=1))
    assert calls == 2 * N
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("base", "rule"), [("apg", "gap"), ("cfg-zero*", "reuse")])
def test_pipeline_with_other_formulas(family, base, rule):
    guider = CompressGuidance(3.0, rate=5, base=base, rule=rule)
    first, calls = family.run(guider=guider)
    assert calls == N + 4 - (base == "cfg-zero*")
    assert first.isfinite().all()
    assert torch.equal(family.run()[0], first)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
@pytest.mark.parametrize(
    ("scheduler", "order", "calls"),
    [(HeunDiscreteScheduler, 2, 2 * N - 1 + 2 * 4 - 1), (PNDMScheduler, 1, N + 1 + 5)],
)
def test_schedulers_with_more_calls_than_steps(family, scheduler, order, calls):
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    guider = CompressGuidance(4.0, rate=5, order=order)
    assert family.run(guider=guider, scheduler=scheduler(**options))[1] == calls
    family.pipe.update_components(scheduler=family.scheduler)


def test_wan_2_2_with_two_guiders():
    torch.manual_seed(0)
    networks = [wan_network(), wan_network()]
    parts = wan_parts() | {"transformer": networks[0], "transformer_2": networks[1]}
    tokenizer = CLIPTokenizer.from_pretrained(GOLDEN / "dift-sd" / "pipeline" / "tokenizer")
    size = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
    two = pipeline(Wan22Blocks(), size, networks, tokenizer=tokenizer, **parts)
    two.pipe.update_components(boundary_ratio=0.5)
    stock, stock_2 = Replaced(4.0), Replaced(3.0)
    stock.guided = stock_2.guided = {0, 5, 8, 9}
    expected, _ = two.run(guider=stock, guider_2=stock_2)
    assert 0 < stock.get_state()["step"] < stock_2.get_state()["step"] == N - 1
    for guiders in ({"guider": CompressGuidance(4.0), "guider_2": CompressGuidance(3.0)}, {}):
        got, calls = two.run(**guiders)
        assert calls == N + 4
        assert torch.equal(got, expected)
