"""What a model is worth: perplexity, divergence from the original, any task of lm-eval.

All of it takes any causal language model of transformers, compressed or not. With p the original's prediction and q
the model's at one position,

    perplexity = exp(mean of −log q(next token))        KL(p ‖ q) = Σ_v p(v) (log p(v) − log q(v)),  in nats

Hidden states are small and logits are large: 16 windows of 512 tokens are 19 MB of one and 1.6 GB of the other for a
vocabulary of 49152. So the body of a model runs once per window, and its head on `CHUNK` positions at a time. A
`Reference` keeps the original's hidden states, so that many models are compared with it for one run of each.

Where in the model the errors arise is in `kvteach.layers`; retrieval, which generates, in `kvteach.passkey`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .activations import quiet
from .env import bars_off
from .offload import device

CHUNK = 64  # positions whose logits are held at once: 25 MB in float64 for a vocabulary of 49152


@dataclass(frozen=True)
class Score:
    """How well one model predicts some windows.

    Attributes
    ----------
    nll : −log of the probability of each next token, float64 [windows, tokens − 1], in nats.
    """

    nll: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean over all predicted tokens."""
        return math.exp(self.nll.mean())

    @property
    def error(self) -> float:
        """Standard error of the perplexity, the windows taken as independent draws; nan for one window."""
        return self.perplexity * _standard_error(self.nll.mean(1))

    def as_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return {
            "perplexity": self.perplexity,
            "error": _or_none(self.error),
            "nll": self.nll.mean(1).tolist(),  # one a window: two runs over the same windows can be paired
        }


@dataclass(frozen=True)
class Comparison:
    """One model against the original, on the same windows.

    Attributes
    ----------
    score, original : how well each predicts.
    kl : KL(original ‖ model), float64 [windows, tokens], in nats. ``kl.mean(0)`` is its course over the positions.
    agreement : share of positions where both find the same token most likely.
    """

    score: Score
    original: Score
    kl: Tensor
    agreement: float

    @property
    def ratio(self) -> float:
        """Perplexity of the model over that of the original."""
        return math.exp((self.score.nll - self.original.nll).mean())

    @property
    def ratio_error(self) -> float:
        """Standard error of the ratio. Windows are paired, so that their own difficulty drops out; nan for one."""
        return self.ratio * _standard_error((self.score.nll - self.original.nll).mean(1))

    @property
    def divergence(self) -> float:
        """Mean KL over all positions, in nats."""
        return self.kl.mean().item()

    def as_dict(self) -> dict:
        """Plain numbers, for JSON; ``kl`` is the mean over the windows, one number a position."""
        return {
            "score": self.score.as_dict(),
            "original": self.original.as_dict(),
            "ratio": self.ratio,
            "ratio_error": _or_none(self.ratio_error),
            "divergence": self.divergence,
            "kl": self.kl.mean(0).tolist(),
            "agreement": self.agreement,
        }


@dataclass(frozen=True)
class Reference:
    """The original's side of a comparison, run once: `compare` takes it in place of the original and the windows.

    Attributes
    ----------
    ids : token ids [windows, tokens].
    hidden : what the head reads, [windows, tokens, hidden], on the CPU in the model's dtype.
    head : hidden -> logits, the original's own module.
    score : its `Score`.
    """

    ids: Tensor
    hidden: Tensor
    head: nn.Module
    score: Score

    @classmethod
    def of(cls, original, windows, batch: int = 1, progress: bool = True) -> "Reference":
        """Run `original`; parameters and errors as for `perplexity`."""
        ids, head = checked_ids(original, windows), _head(original)
        states = [state.cpu() for state in _hidden(original, ids, "original", batch, progress)]
        nll = [_nll(head, state, row, n) for n, (state, row) in enumerate(zip(states, ids, strict=True))]
        return cls(ids, torch.stack(states), head, Score(torch.stack(nll)))


def perplexity(model, windows, batch: int = 1, progress: bool = True) -> Score:
    """Run `model` over `windows` and score each next token.

    Parameters
    ----------
    windows : `kvteach.text.Windows`, or token ids [windows, tokens] without padding. The first token of each is
        given, the others are predicted from all before it in its window.
    batch : windows per forward pass.
    progress : show a bar.

    Raises
    ------
    ValueError : windows of a wrong shape, shorter than two tokens, longer than the model's positions or with ids
        outside its vocabulary; NaN or infinity in the logits (the window is named); a model whose logits are more
        than its head's output.
    """
    ids, head = checked_ids(model, windows), _head(model)
    states = _hidden(model, ids, "perplexity", batch, progress)
    return Score(
        torch.stack(
            [_nll(head, state, row, n) for n, (state, row) in enumerate(zip(states, ids, strict=True))]
        )
    )


def compare(model, original, windows=None, batch: int = 1, progress: bool = True) -> Comparison:
    """Perplexity of both, their ratio, and how far the model's predictions moved.

    Parameters
    ----------
    original : the model to compare with, or a `Reference` that was made of it; then without `windows`.
    windows, batch, progress : as for `perplexity`.

    Raises
    ------
    ValueError : as for `perplexity`, for either; vocabularies of different sizes; windows missing or given twice.
    """
    if isinstance(original, Reference) != (windows is None):
        raise ValueError("give compare an original and windows, or a Reference, which has its windows, alone")
    known = original if windows is None else Reference.of(original, windows, batch, progress)
    ids, head = checked_ids(model, known.ids), _head(model)
    if head.weight.shape[0] != known.head.weight.shape[0]:
        raise ValueError(
            f"the vocabularies differ: {head.weight.shape[0]} tokens and {known.head.weight.shape[0]} in the "
            "original; only models with one tokenizer can be compared"
        )
    count, tokens = ids.shape
    nll = torch.empty(count, tokens - 1, dtype=torch.float64)
    kl = torch.empty(count, tokens, dtype=torch.float64)
    same = 0
    for n, state in enumerate(_hidden(model, ids, "comparing", batch, progress)):
        mine, theirs = _log_probs(head, state, n), _log_probs(known.head, known.hidden[n], n)
        for (piece, q), (_, p) in zip(mine, theirs, strict=True):  # [chunk, vocabulary] both
            p = p.to(q.device)
            kl[n, piece] = (p.exp() * (p - q)).sum(-1).cpu()
            nll[n, piece] = _next(q, ids[n], piece)
            same += (p.argmax(-1) == q.argmax(-1)).sum().item()
    return Comparison(Score(nll), known.score, kl, same / ids.numel())


def cached_bytes(model) -> int:
    """Bytes of cache of one token, counted in the tensors that a run of one token leaves."""
    token = torch.zeros(1, 1, dtype=torch.long, device=device(model))
    with quiet(model):
        layers = model(input_ids=token, use_cache=True).past_key_values.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def lm_eval(model, tokenizer, tasks, batch_size: int = 1, max_length: int | None = None, **options) -> dict:
    """Hand a model in memory to EleutherAI's harness, for any of its tasks.

    Parameters
    ----------
    tasks : names, such as ``["arc_easy", "piqa"]``, or configurations, as ``lm_eval.simple_evaluate`` takes them.
    batch_size : requests per forward pass.
    max_length : tokens that a request is cut to, from the left; by default the model's positions, or 2048 for a
        model that names none (BLOOM).
    options : of ``simple_evaluate``, for instance ``limit=100`` or ``num_fewshot=5``.

    Returns
    -------
    What ``simple_evaluate`` returns; the numbers are under ``["results"][task]``.

    Raises
    ------
    ModuleNotFoundError : the harness is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the harness is not whole ({error}): pip install lm-eval") from error
    # The batch size goes in here: simple_evaluate passes its own on only when it loads the model itself.
    with quiet(model):
        harness = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length or positions(model) or 2048,
        )
        return simple_evaluate(model=harness, tasks=tasks, **options)


# ---------------------------------------------------------------------------------------------------------
# One window, one piece of positions


def checked_ids(model, windows) -> Tensor:
    """Token ids [windows, tokens]; ValueError when `model` cannot read them."""
    ids = torch.as_tensor(getattr(windows, "ids", windows))
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not len(ids) or ids.shape[1] < 2:
        raise ValueError(
            "windows must be token ids [windows, tokens], at least one window of two tokens; "
            f"got {tuple(ids.shape)} {ids.dtype}"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"token ids run from {ids.min()} to {ids.max()}, the model's vocabulary from 0 to {vocabulary - 1}: "
            "make the windows with its own tokenizer"
        )
    if (limit := positions(model)) and ids.shape[1] > limit:
        raise ValueError(
            f"windows have {ids.shape[1]} tokens, the model {limit} positions: make them shorter"
        )
    return ids.long()


def positions(model) -> int | None:
    """How many positions the model was made for; None for ALiBi, which sets no bound."""
    return getattr(model.config, "max_position_embeddings", None)


@torch.no_grad()
def _head(model) -> nn.Module:
    """The module hidden -> logits, after a look that the logits are its output and nothing more."""
    head, body = model.get_output_embeddings(), model.base_model
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head: load it as a causal language model"
        )
    probe = torch.arange(min(8, model.get_input_embeddings().weight.shape[0])).unsqueeze(0).to(device(body))
    with quiet(model):
        ours = head(body(input_ids=probe, use_cache=False).last_hidden_state).nan_to_num()
        theirs = model(input_ids=probe, use_cache=False).logits
    # layers may lie apart; NaN is told of later, with its window
    theirs = theirs.to(ours.device).nan_to_num()
    if (ours - theirs).abs().max() > 1e-3 * theirs.abs().max():
        raise ValueError(
            f"{type(model).__name__} changes its logits after the head (by a scale or a cap), which is not supported"
        )
    return head


def _hidden(model, ids: Tensor, name: str, batch: int, progress: bool) -> Iterator[Tensor]:
    """What the head reads, window by window: [tokens, hidden]."""
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    body = model.base_model
    for rows in tqdm(ids.split(batch), name, disable=not progress or bars_off()):
        with quiet(model):  # not around the yield: gradients would be off for the caller too
            states = body(input_ids=rows.to(device(body)), use_cache=False).last_hidden_state
        yield from states


@torch.no_grad()
def _piece(head: nn.Module, states: Tensor, window: int) -> Tensor:
    """log p(token) at some positions: [chunk, hidden] -> float64 [chunk, vocabulary]."""
    logits = head(states.to(device(head))).double()
    # One NaN or infinity shows in the sum; to look at each logit would take as long as the softmax.
    if not logits.sum().isfinite():
        raise ValueError(
            f"window {window}: the logits hold NaN or infinity; a model in float16 may overflow: load it with "
            "dtype='float32' or 'bfloat16', and check its weights"
        )
    return logits.log_softmax(-1)


def _log_probs(head: nn.Module, states: Tensor, window: int) -> Iterator[tuple[slice, Tensor]]:
    """The positions of one window in pieces, each with its log-probabilities."""
    for at in range(0, len(states), CHUNK):
        piece = slice(at, at + CHUNK)
        yield piece, _piece(head, states[piece], window)


def _next(log_probs: Tensor, row: Tensor, piece: slice) -> Tensor:
    """−log p of the tokens that follow the positions of `piece`; the last of a window has none."""
    following = row[piece.start + 1 : piece.stop + 1].to(log_probs.device)
    return -log_probs[: len(following)].gather(-1, following[:, None]).squeeze(-1).cpu()


def _nll(head: nn.Module, states: Tensor, row: Tensor, window: int) -> Tensor:
    """[tokens − 1] of one window."""
    return torch.cat([_next(q, row, piece) for piece, q in _log_probs(head, states, window)])


def _standard_error(values: Tensor) -> float:
    return values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no nan
