"""Errors stand in the layer that was disturbed and after it, and nowhere else."""

import copy

import pytest
import tiny
import torch
from test_evaluate import disturbed

from kvteach.activations import record
from kvteach.layers import layer_errors


@pytest.fixture(params=tiny.MODELS)
def model(request):
    return tiny.MODELS[request.param]()


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_model_has_no_errors_against_itself(model):
    found = layer_errors(model, model, tiny.ids())
    assert found.attention.shape == found.output.shape == (3,)
    assert not found.attention.any() and not found.output.any()


def test_errors_begin_in_the_disturbed_layer(model):
    found = layer_errors(disturbed(model, layer=1), model, tiny.ids())
    assert found.output[0] == 0 and (found.output[1:] > 1e-6).all()
    # noise on the values moves no attention in its own layer; BLOOM's noise is on queries and keys as well
    moved = [False, model.config.model_type == "bloom", True]
    assert (found.attention > 1e-9).tolist() == moved
    assert (found.attention <= 1).all()


def test_attention_that_moved_is_the_total_variation(model):
    other, ids = disturbed(model, layer=0), tiny.ids()
    found = layer_errors(other, model, ids)
    pairs = zip(record(other, ids, attention=True), record(model, ids, attention=True), strict=True)
    for layer, (after, before) in enumerate(pairs):
        # the share that is left where it was: Σ_m min(a_m, ã_m)
        stayed = torch.minimum(after.attention.double(), before.attention.double()).sum(-1).mean()
        assert torch.allclose(found.attention[layer], 1 - stayed, atol=1e-6)


def test_the_output_error_is_relative_and_before_the_residual(model):
    """Half of every attention output gone, in the last layer: a quarter of its square."""
    halved = copy.deepcopy(model)
    last = [m for n, m in halved.named_modules() if n.endswith((".o_proj", ".self_attention.dense"))][-1]
    last.weight.data /= 2
    if last.bias is not None:
        last.bias.data /= 2
    found = layer_errors(halved, model, tiny.ids())
    assert found.output[:2].tolist() == [0, 0]
    assert torch.isclose(found.output[2], torch.tensor(0.25).double())
    assert not found.attention.any()


def test_no_hook_stays_and_the_attention_path_comes_back(model):
    before, other = model.config._attn_implementation, copy.deepcopy(model)
    layer_errors(other, model, tiny.ids())
    other.base_model.get_input_embeddings().weight.data = torch.zeros(97, 3)  # the forward itself fails
    with pytest.raises(RuntimeError):
        layer_errors(other, model, tiny.ids())
    for each in (model, other):
        assert hooks(each) == 0
        assert each.config._attn_implementation == before


def test_bad_input_is_refused():
    model, other = tiny.MODELS["llama-gqa"](), tiny.MODELS["llama-gqa"]()
    del other.model.layers[2]
    with pytest.raises(ValueError, match="the model has 2 layers, the original 3"):
        layer_errors(other, model, tiny.ids())
    with pytest.raises(ValueError, match="at least one window"):
        layer_errors(model, model, torch.zeros(0, 4, dtype=torch.long))
