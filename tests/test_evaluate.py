"""Perplexity and divergence against what transformers gives when all logits are held at once."""

import copy
import json
import math

import pytest
import tiny
import torch

from kvteach import evaluate, text
from kvteach.evaluate import Reference, compare, perplexity


def disturbed(model, layer: int = 1, scale: float = 0.5):
    """The same model with noise on one layer's value weights (BLOOM: on queries, keys and values)."""
    model, noise = copy.deepcopy(model), torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if f".{layer}." in name and name.endswith(("v_proj.weight", "query_key_value.weight")):
            weight.data += scale * torch.randn(weight.shape, generator=noise, dtype=weight.dtype)
    return model


def log_probs(model, ids):
    with torch.no_grad():
        return model(ids).logits.double().log_softmax(-1)


@pytest.fixture(params=tiny.MODELS)
def model(request):
    return tiny.MODELS[request.param]()


def test_perplexity_is_the_loss_of_transformers(model):
    ids = tiny.ids(3, 12)
    score = perplexity(model, ids)
    with torch.no_grad():
        losses = torch.stack([model(row, labels=row).loss for row in ids.split(1)]).double()
    assert score.nll.shape == (3, 11) and score.nll.dtype == torch.float64
    # BLOOM and the loss of transformers work in float32 here and there
    assert torch.allclose(score.nll.mean(1), losses, atol=1e-5)
    assert math.isclose(score.perplexity, math.exp(losses.mean()), rel_tol=1e-5)


def test_comparison_is_what_the_logits_say(model):
    other, ids = disturbed(model), tiny.ids(3, 12)
    found = compare(other, model, ids)
    p, q = log_probs(model, ids), log_probs(other, ids)
    following = ids[:, 1:, None]
    assert torch.allclose(found.kl, (p.exp() * (p - q)).sum(-1), atol=1e-9)
    assert torch.allclose(found.score.nll, -q[:, :-1].gather(-1, following)[..., 0])
    assert torch.allclose(found.original.nll, -p[:, :-1].gather(-1, following)[..., 0])
    assert found.agreement == (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert math.isclose(found.ratio, found.score.perplexity / found.original.perplexity)
    assert found.divergence > 1e-6 and (found.kl > -1e-12).all()


def test_a_model_equals_itself(model):
    found = compare(model, model, tiny.ids(2, 9))
    assert (found.kl == 0).all()
    assert (found.ratio, found.ratio_error, found.agreement) == (1, 0, 1)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(model):
    model.get_output_embeddings().weight.data.zero_()
    score = perplexity(model, tiny.ids())
    assert math.isclose(score.perplexity, tiny.VOCABULARY)
    assert math.isclose(score.error, 0, abs_tol=1e-12)


@pytest.mark.parametrize("chunk, batch", [(1, 1), (3, 2), (11, 5), (1000, 1)])
def test_pieces_and_batches_change_nothing(monkeypatch, chunk, batch):
    model, ids = tiny.MODELS["llama-gqa"](), tiny.ids(4, 11)
    whole = compare(disturbed(model), model, ids)
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    pieces = compare(disturbed(model), model, ids, batch=batch)
    assert torch.allclose(pieces.kl, whole.kl, atol=1e-12)
    assert torch.allclose(pieces.score.nll, whole.score.nll)
    assert pieces.agreement == whole.agreement
    assert torch.allclose(perplexity(model, ids, batch=batch).nll, whole.original.nll)


def test_logits_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    model, sizes = tiny.MODELS["llama-gqa"](), []
    model.lm_head.register_forward_hook(lambda m, inputs, out: sizes.append(out.shape[:-1].numel()))
    compare(model, model, tiny.ids(3, 30))
    assert max(sizes) <= 8  # the probe of eight tokens is the largest


def test_a_constant_added_to_all_logits_changes_nothing():
    model, ids = tiny.MODELS["llama-gqa"](), tiny.ids()
    shifted = copy.deepcopy(model)
    head = torch.nn.Linear(64, tiny.VOCABULARY, dtype=torch.float64)
    head.weight, head.bias.data = shifted.lm_head.weight, torch.full((tiny.VOCABULARY,), 7.0).double()
    shifted.lm_head = head
    found = compare(shifted, model, ids)
    assert found.kl.abs().max() < 1e-12 and math.isclose(found.ratio, 1)


def test_a_reference_serves_many_models_with_one_run_of_the_original():
    model, ids, runs = tiny.MODELS["llama-gqa"](), tiny.ids(), []
    direct = [compare(disturbed(model, scale=s), model, ids) for s in (0.1, 1.0)]
    reference = Reference.of(model, ids)
    model.model.register_forward_hook(lambda *_: runs.append(1))
    again = [compare(disturbed(tiny.MODELS["llama-gqa"](), scale=s), reference) for s in (0.1, 1.0)]
    assert not runs
    for one, other in zip(direct, again, strict=True):
        assert torch.equal(one.kl, other.kl) and one.as_dict() == other.as_dict()
    assert again[0].divergence < again[1].divergence


def test_the_standard_error_of_the_ratio_pairs_the_windows():
    """Windows that differ much in difficulty, and a model that is worse by the same on each: no error is left."""
    hard = torch.tensor([[1.0, 1.0], [4.0, 4.0], [9.0, 9.0]]).double()
    kl = torch.zeros(3, 3)
    found = evaluate.Comparison(evaluate.Score(hard + 0.1), evaluate.Score(hard), kl, 1.0)
    assert math.isclose(found.ratio, math.exp(0.1)) and found.ratio_error < 1e-12
    difference = torch.tensor([0.0, 0.1, 0.5]).double()
    found = evaluate.Comparison(evaluate.Score(hard + difference[:, None]), evaluate.Score(hard), kl, 1.0)
    assert math.isclose(found.ratio_error, math.exp(0.2) * difference.std() / 3**0.5)


def test_results_are_plain_numbers():
    model = tiny.MODELS["llama-gqa"]()
    for windows in (3, 1):
        found = compare(disturbed(model), model, tiny.ids(windows, 9)).as_dict()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert len(found["kl"]) == 9 and len(found["score"]["nll"]) == windows
    assert found["ratio_error"] is None  # one window has no spread


def test_windows_of_the_text_module_are_taken():
    model, ids = tiny.MODELS["llama-gqa"](), tiny.ids()
    assert torch.equal(
        perplexity(model, text.Windows(ids, "own", "evaluation")).nll, perplexity(model, ids).nll
    )


def test_modes_and_gradients_come_back():
    model = tiny.MODELS["llama-gqa"]().train()
    score = perplexity(model, tiny.ids())
    assert model.training and model.model.layers[0].training and torch.is_grad_enabled()
    assert not score.nll.requires_grad


@pytest.mark.parametrize(
    "ids, says",
    [
        (torch.zeros(0, 5, dtype=torch.long), r"at least one window of two tokens; got \(0, 5\)"),
        (torch.zeros(2, 1, dtype=torch.long), r"got \(2, 1\)"),
        (torch.zeros(5, dtype=torch.long), r"got \(5,\)"),
        (torch.zeros(1, 5), r"float32"),
        (torch.full((1, 5), tiny.VOCABULARY), "from 97 to 97, the model's vocabulary from 0 to 96"),
        (torch.full((1, 5), -100), "from -100 to -100"),
        (torch.zeros(1, 2049, dtype=torch.long), "2049 tokens, the model 2048 positions"),
    ],
)
def test_windows_that_cannot_be_read_are_refused(ids, says):
    with pytest.raises(ValueError, match=says):
        perplexity(tiny.MODELS["llama-gqa"](), ids)


def test_nan_is_told_with_its_window():
    model, ids = tiny.MODELS["llama-gqa"](), torch.ones(3, 6, dtype=torch.long)
    ids[2, 3] = 50
    model.model.embed_tokens.weight.data[50] = math.nan
    with pytest.raises(ValueError, match="window 2: the logits hold NaN or infinity"):
        perplexity(model, ids)
    with pytest.raises(ValueError, match="window 2: the logits hold NaN or infinity"):
        compare(model, tiny.MODELS["llama-gqa"](), ids)
    model.lm_head.weight.data[3] = math.inf  # everywhere, the first look at the head included
    with pytest.raises(ValueError, match="window 0: the logits hold NaN or infinity"):
        perplexity(model, ids)


def test_a_scale_after_the_head_is_refused():
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=97
    )
    with pytest.raises(ValueError, match="CohereForCausalLM changes its logits after the head"):
        perplexity(CohereForCausalLM(config), tiny.ids())


def test_what_cannot_be_compared_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    model, ids = tiny.MODELS["llama-gqa"](), tiny.ids()
    small = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16)
    with pytest.raises(ValueError, match="the vocabularies differ: 101 tokens and 97 in the original"):
        compare(LlamaForCausalLM(LlamaConfig(**small, vocab_size=101)), model, ids)
    for arguments in ((model,), (Reference.of(model, ids), ids)):
        with pytest.raises(ValueError, match="give compare an original and windows, or a Reference"):
            compare(model, *arguments)
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        perplexity(model.model, ids)
    with pytest.raises(ValueError, match="batch is 0"):
        perplexity(model, ids, batch=0)
