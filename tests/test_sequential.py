"""Sequential conversion: exact where nothing is dropped, optimal decoders, streams that are the models' own."""

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvteach import sequential
from kvteach.activations import attention_modules
from kvteach.calibration import calibrate
from kvteach.convert import compress
from kvteach.cost import BLOCK
from kvteach.moments import Source
from kvteach.plan import Plan

WINDOWS = tiny.ids(6, 24, seed=3)
# RMSNorm and BLOOM's softmax are float32 inside, whatever the model's dtype.
ROUNDING = 1e-6


def kv_heads(model) -> int:
    return Source.of(model).kv_heads


@pytest.fixture(params=tiny.MODELS)
def model(request):
    return tiny.MODELS[request.param]()


def test_nothing_dropped_nothing_changed(model):
    x = tiny.ids(2, 9, seed=5)
    with torch.no_grad():
        expected = model(x).logits
        for plan in (Plan(kv_heads=kv_heads(model)), Plan(kv_ratio=1.0)):
            small = sequential.compress(model, WINDOWS, plan, progress=False)
            assert torch.allclose(small(x).logits, expected, rtol=0, atol=1e-9)


def test_the_original_is_left_alone(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    sequential.compress(model, WINDOWS, Plan(kv_ratio=0.5), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_streams_are_the_models_own(model):
    """Layer by layer on single windows gives what the whole model gives."""
    stream = sequential._Stream(model, WINDOWS)
    with torch.no_grad():
        x = stream.begin()
        hidden = model.base_model(WINDOWS, output_hidden_states=True).hidden_states
        for layer in range(len(attention_modules(model))):
            assert torch.allclose(x, hidden[layer], atol=ROUNDING)
            halves = [stream.attend(model, layer, x, row) for row in range(len(x))]
            x = torch.cat([stream.finish(model, layer, base + added) for base, added in halves])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", ["llama-mha", "bloom"])
def test_it_follows_the_original_closer_than_one_shot(name, heads):
    """On the text it was fitted to, the residual stream behind the last attention is nearer to the original's."""
    model, plan = tiny.MODELS[name](), Plan(kv_heads=heads)
    one_shot = compress(
        model, calibrate(model, WINDOWS, attention=True, progress=False), plan, progress=False
    )
    small = sequential.compress(model, WINDOWS, plan, progress=False)

    def drift(other):
        with torch.no_grad():
            last = [m.base_model(WINDOWS).last_hidden_state for m in (model, other)]
        return float((last[0] - last[1]).square().sum())

    assert drift(small) < drift(one_shot)


def test_a_body_without_a_head_is_refused():
    with pytest.raises(ValueError, match="no language-model head"):
        sequential.compress(tiny.MODELS["llama-mha"]().model, WINDOWS, Plan(kv_heads=1))


def test_no_other_output_weights_follow_the_original_closer(monkeypatch):
    """Without a ridge the last layer's W_O is least squares: on its text, every perturbation is worse."""
    monkeypatch.setattr(sequential, "RIDGE", 1e-9)
    model = tiny.MODELS["llama-gqa"]()
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    small = sequential.compress(model, WINDOWS, Plan(kv_heads=1), progress=False)
    weight, generator = small.model.layers[0].self_attn.o_proj.weight, torch.Generator().manual_seed(0)

    def drift():
        outputs = []
        for one, module in ((model, "self_attn"), (small, "self_attn")):
            hook = (
                one.model.layers[0]
                .get_submodule(module)
                .register_forward_hook(lambda m, args, output: outputs.append(output[0]))
            )
            one(WINDOWS)
            hook.remove()
        return float((outputs[0] - outputs[1]).square().sum())

    with torch.no_grad():
        best, kept = drift(), weight.clone()
        for _ in range(5):
            step = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 1e-3
            weight.copy_(kept + step)
            assert drift() > best


def test_the_cache_is_as_small_as_one_shot():
    model = tiny.MODELS["llama-gqa"]()
    small = sequential.compress(model, WINDOWS, Plan(kv_ratio=0.25), progress=False)
    cache = small(tiny.ids(), use_cache=True).past_key_values
    assert all(layer.keys.shape[1::2] == (1, 8) == layer.values.shape[1::2] for layer in cache.layers)
    assert all(module.k_down.dtype == model.dtype for module in attention_modules(small))


@pytest.mark.parametrize(
    "other", [{"basis": "activation-svd"}, {"stock": True}, {"grouping": "similarity"}, {"centred": True}]
)
def test_a_plan_of_another_kind_is_refused(other):
    model = tiny.MODELS["llama-gqa"]()
    plan = Plan(kv_heads=1, **({"basis": "score-weighted"} if "centred" in other else {}) | other)
    with pytest.raises(ValueError, match="makes bases of its own"):
        sequential.compress(model, WINDOWS, plan)
    with pytest.raises(ValueError, match="makes bases of its own"):
        Plan(kv_heads=1, sequential=True, **other)


@pytest.mark.parametrize("name", ["llama-gqa", "bloom"])
def test_a_stopped_run_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    model, plan, path = tiny.MODELS[name](), Plan(kv_ratio=0.5), tmp_path / "half"
    whole = sequential.compress(model, WINDOWS, plan, progress=False)
    refit, calls = sequential._refit, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        refit(*args)

    monkeypatch.setattr(sequential, "_refit", stop)
    with pytest.raises(KeyboardInterrupt):
        sequential.compress(model, WINDOWS, plan, path, progress=False)
    again = sequential.compress(model, WINDOWS, plan, path, progress=False)
    assert len(calls) == 3 + 1  # of three layers two were kept
    assert [file.name for file in tmp_path.iterdir()] == ["half"]
    finished = sequential.compress(model, WINDOWS, plan, path, progress=False)  # nothing is left to do
    assert len(calls) == 4
    for other in (again, finished):
        assert all(
            torch.equal(one, two) for one, two in zip(whole.parameters(), other.parameters(), strict=True)
        )


def test_a_file_of_another_run_is_refused(tmp_path):
    model, path = tiny.MODELS["llama-gqa"](), tmp_path / "half"
    sequential.compress(model, WINDOWS, Plan(kv_heads=1), path, progress=False)
    for other, what in (
        ((model, WINDOWS[:4], Plan(kv_heads=1)), "text"),
        ((model, WINDOWS, Plan(kv_ratio=0.5)), "plan"),
        ((tiny.MODELS["mistral"](), WINDOWS, Plan(kv_heads=1)), "model"),
    ):
        with pytest.raises(ValueError, match=f"holds a conversion of another {what}: name another path"):
            sequential.compress(*other, path, progress=False)
    path.write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        sequential.compress(model, WINDOWS, Plan(kv_heads=1), path, progress=False)


def test_moments_are_not_enough():
    model = tiny.MODELS["llama-gqa"]()
    moments = calibrate(model, WINDOWS, attention=True, progress=False)
    with pytest.raises(ValueError, match="reads the text itself"):
        compress(model, moments, Plan(kv_heads=1, sequential=True))


@pytest.mark.parametrize(("name", "block"), [("llama-gqa", BLOCK), ("bloom", None)])
def test_the_config_says_how_it_was_made(name, block):
    small = sequential.compress(tiny.MODELS[name](), WINDOWS, Plan(kv_heads=1), progress=False)
    assert small.config.kvteach["plan"] == Plan(kv_heads=1, sequential=True).as_dict()
    assert getattr(small.config, "key_block", None) == block and "reach" not in small.config.kvteach


def test_turns_that_change_with_the_text_are_refused():
    model = tiny.MODELS["llama-gqa"]()
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rope_type is 'dynamic'"):
        sequential.compress(model, WINDOWS, Plan(kv_heads=1), progress=False)


def test_a_repeated_token_gives_finite_weights():
    model = tiny.MODELS["llama-gqa"]()
    small = sequential.compress(model, torch.full((2, 8), 5), Plan(kv_ratio=0.5), progress=False)
    assert all(torch.isfinite(weight).all() for weight in small.parameters())


def test_layers_on_several_devices_are_refused():
    """Two GPUs that PyTorch only imagines."""
    model = tiny.MODELS["llama-gqa"]()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(torch.empty(64, 32, device="cuda:1"))
    with pytest.raises(ValueError, match=r"several devices, or are offloaded; .* load it on one"):
        sequential.compress(model, WINDOWS, Plan(kv_heads=1), progress=False)
