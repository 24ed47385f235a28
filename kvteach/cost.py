"""What attention and its cache cost: bytes, parameters and floating-point operations.

Everything is exact arithmetic on a `Shape`, which is a dozen numbers of a LLaMA-, Mistral-, Qwen2- or
BLOOM-family decoder. One multiplication and its addition are 2 FLOPs; GB is 10⁹ bytes, GiB is 2³⁰;
`bytes_per_number` is 4 for fp32, 2 for fp16 and bf16, 1 for 8 bits. A sliding window, where a model has one,
is not modelled: pass the tokens that are kept.

h query heads share g key-value heads: g = h is multi-head attention (MHA), 1 < g < h grouped-query attention
(GQA), g = 1 multi-query attention (MQA). A model compressed to g heads of the same width d_h caches the same
bytes in every form. The forms differ in where the basis Ψ lives:

- "S", stock: Ψ is absorbed into the weights (no RoPE, or a basis that commutes with it). A plain GQA model.
- "G", grouped, for RoPE: keys are made at the source width, rotated, then multiplied by Ψ, which is
  t·d_h × d_h for each group of t source heads; every query head has a d_h × d_h map. Values are absorbed.
- "R", research: as G, but a head caches `key_rank` and `value_rank` numbers instead of d_h. One latent for the whole
  layer is kv_heads = 1, and with whole heads it is G. Without RoPE ranks go into the weights: form "S" with ranks.
- "L", one Ψ for the layer's keys (g·d_h × source width), which the queries are multiplied by too, so that
  each is g·d_h long. Values are absorbed. The paper treats RoPE so (arXiv 2406.07056, section 3.4).
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

# Tokens of a block, as a rule; 256 lose more: 1.29 instead of 1.25 at a third of the cache of SmolLM2.
BLOCK = 64
FORMS = ("S", "G", "R", "L")
_FAMILIES = ("llama", "mistral", "qwen2", "bloom")
_SIZES = ("layers", "hidden", "query_heads", "kv_heads", "head_dim", "intermediate", "vocab")


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that its costs depend on.

    >>> llama2_7b = Shape(layers=32, hidden=4096, query_heads=32, kv_heads=32, head_dim=128,
    ...                   intermediate=11008, vocab=32000, tied=False)
    >>> parameters(llama2_7b), cache_bytes(llama2_7b, tokens=1) / 2**20
    (6738415616, 0.5)
    """

    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated: bool = True  # three MLP matrices (SwiGLU) instead of two
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False  # LayerNorm instead of RMSNorm
    embedding_norm: bool = False  # BLOOM normalises its embeddings
    tied: bool = True  # the LM head is the embedding table
    form: str = "S"
    source_kv_heads: int | None = None  # before compression; None when the model is as it was trained
    key_rank: int | None = None  # numbers cached for a head's keys; None for head_dim
    value_rank: int | None = None
    key_block: int | None = None  # keys are turned within blocks of so many tokens (forms G and R)

    def __post_init__(self):
        """Refuse numbers that no model has."""
        for name in _SIZES:
            # as Python's own integers: NumPy's would overflow silently
            object.__setattr__(self, name, _whole(getattr(self, name), name, 1))
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"kv_heads is {self.kv_heads}; it should divide query_heads ({self.query_heads}): "
                f"{_divisors(self.query_heads)}"
            )
        if self.form not in FORMS:
            raise ValueError(f"form is {self.form!r}; it should be one of {', '.join(FORMS)}")
        for name in ("key_rank", "value_rank"):
            if (rank := getattr(self, name)) is None:
                continue
            rank = _whole(rank, name, 1)
            object.__setattr__(self, name, None if rank == self.head_dim else rank)
            if rank != self.head_dim and self.form not in ("S", "R"):
                raise ValueError(f"{name} is {rank}; form {self.form} caches whole heads: leave it out")
        if self.form == "R" and self.key_rank is None and self.value_rank is None:
            object.__setattr__(self, "form", "G")  # whole heads: one shape has one name
        source = self.source
        if source % self.kv_heads or self.query_heads % source:
            raise ValueError(
                f"source_kv_heads is {source}; it should be a multiple of kv_heads ({self.kv_heads}) "
                f"that divides query_heads ({self.query_heads})"
            )

    @property
    def source(self) -> int:
        """Key-value heads before compression."""
        return (
            self.kv_heads
            if self.source_kv_heads is None
            else _whole(self.source_kv_heads, "source_kv_heads", 1)
        )

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers that one cached head holds for a token: keys, values."""
        return self.key_rank or self.head_dim, self.value_rank or self.head_dim

    @classmethod
    def from_config(cls, config) -> "Shape":
        """The shape of a transformers config of the LLaMA, Mistral, Qwen2 or BLOOM family, compressed or not."""
        found = getattr(config, "model_type", None)
        family = str(found).removeprefix("kvteach_")
        if family not in _FAMILIES:
            raise ValueError(f"model_type is {found!r}; it should be one of {', '.join(_FAMILIES)}")
        heads, hidden, bloom = config.num_attention_heads, config.hidden_size, family == "bloom"
        biased = bloom or bool(getattr(config, "attention_bias", False))
        kv_heads = heads if bloom else config.num_key_value_heads or heads
        small = {}
        if family != found:  # one of kvteach.models
            kv_heads = config.num_key_value_heads
            small = {
                "form": "S" if bloom else "R",
                "source_kv_heads": config.source_key_value_heads,
                "key_rank": config.key_rank,
                "value_rank": config.value_rank,
                "key_block": getattr(config, "key_block", None),
            }
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            query_heads=heads,
            kv_heads=kv_heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            intermediate=4 * hidden if bloom else config.intermediate_size,
            vocab=config.vocab_size,
            gated=not bloom,
            qkv_bias=biased or family == "qwen2",
            out_bias=biased or bool(getattr(config, "output_bias", False)),
            mlp_bias=bloom or bool(getattr(config, "mlp_bias", False)),
            norm_bias=bloom,
            embedding_norm=bloom,
            tied=bool(config.tie_word_embeddings),
            **small,
        )

    def compress(
        self, kv_heads: int, form: str = "S", key_rank: int | None = None, value_rank: int | None = None
    ) -> "Shape":
        """The same model with `kv_heads` key-value heads, of the same width unless ranks say otherwise."""
        if self.form != "S" or self.key_rank or self.value_rank:
            raise ValueError(f'form is "{self.form}" already; compress the shape it came from')
        ranks = {"key_rank": key_rank, "value_rank": value_rank}
        return replace(self, kv_heads=kv_heads, form=form, source_kv_heads=self.kv_heads, **ranks)


def cache_bytes(
    shape: Shape, tokens: int, batch: int = 1, bytes_per_number: float = 2, ranks=None
) -> int | float:
    """Bytes of the key-value cache of `batch` sequences of `tokens` tokens.

    2 · layers · kv_heads · head_dim numbers a token, where heads are whole: the 2 is keys and values.

    Parameters
    ----------
    ranks : numbers cached per token and layer instead of what the shape says: a pair (keys, values) for all
        layers, or one pair for each layer. All heads of the layer share them.
    """
    tokens, batch = _whole(tokens, "tokens", 0), _whole(batch, "batch", 1)
    pairs = [_cached(shape)] if ranks is None else _pairs(ranks, shape)
    numbers = sum(key + value for key, value in pairs) * (shape.layers // len(pairs))
    return batch * tokens * numbers * _width(bytes_per_number)


def attention_parameters(shape: Shape) -> int:
    """Weights and biases of the attention of all layers, with what form G, R or L adds."""
    query, key, value, output = _widths(shape)
    weights = shape.hidden * (query + key + value + output)
    biases = shape.qkv_bias * (query + key + value) + shape.out_bias * shape.hidden
    return shape.layers * (weights + biases + _basis_numbers(shape))


def parameters(shape: Shape) -> int:
    """All parameters, as ``model.num_parameters()`` counts them (a tied head once)."""
    d, i = shape.hidden, shape.intermediate
    mlp = (2 + shape.gated) * d * i + shape.mlp_bias * ((1 + shape.gated) * i + d)
    norms = (2 * shape.layers + 1 + shape.embedding_norm) * d * (1 + shape.norm_bias)
    tables = shape.vocab * d * (1 if shape.tied else 2)
    return attention_parameters(shape) + shape.layers * mlp + norms + tables


def flops(
    shape: Shape, new: int = 1, cached: int = 0, logits: int = 1, causal: bool = False
) -> dict[str, int]:
    """FLOPs of one forward pass of one sequence, by part.

    ``new=1, cached=c`` is one step of decoding with a cache; ``new=l`` is the prefill of l tokens.
    Matrix products only: norms, activations, softmax, rotations and biases are left out.

    Parameters
    ----------
    new : tokens that go through the model.
    cached : tokens whose keys and values are read from the cache.
    logits : positions whose next-token logits are computed; generation needs the last one only.
    causal : count only the pairs that the causal mask keeps. False counts the full new × (cached + new)
        rectangle, as plain attention computes it.

    Returns
    -------
    "projections" (queries, keys, values, output), "basis" (form G, R or L), "attention" (scores and weighted
    values), "mlp" and "head". Their sum is the whole. With `key_block` one new token maps its queries once for each
    block; more of them rebuild the keys instead, so that a score has head_dim products.
    """
    new, cached = _whole(new, "new", 1), _whole(cached, "cached", 0)
    logits = _whole(logits, "logits", 0)
    if logits > new:
        raise ValueError(f"logits is {logits}; it should be 0 to new ({new})")
    query, key, value, output = _widths(shape)
    pairs = new * cached + (new * (new + 1) // 2 if causal else new * new)
    long, _ = shape.widths  # numbers of a score's query
    basis = _basis_numbers(shape)
    if shape.form == "L":
        long, _ = _cached(shape)
        basis += query * long  # each query head meets its d_h rows of Ψ
    basis *= new
    if shape.key_block:
        read, one_map = cached + new, shape.query_heads * shape.head_dim * long
        met = -(-read // shape.key_block) if new == 1 else read
        basis += (met - new) * one_map  # for blocks or for cached tokens, instead of once a query
        long = long if new == 1 else shape.head_dim
    return {
        "projections": 2 * new * shape.layers * shape.hidden * (query + key + value + output),
        "basis": 2 * shape.layers * basis,
        "attention": 2 * pairs * shape.layers * (shape.query_heads * long + output),
        "mlp": 2 * new * shape.layers * shape.hidden * shape.intermediate * (2 + shape.gated),
        "head": 2 * logits * shape.hidden * shape.vocab,
    }


def decode_bytes(
    shape: Shape, cached: int, batch: int = 1, weight_bytes: float = 2, bytes_per_number: float = 2
) -> dict[str, float]:
    """Bytes read for one decoding step of a batch: every weight once, the cache of every sequence.

    The input embedding is looked up, not read, unless it is the LM head too. Activations, the new token's own
    keys and values, and what a kernel reads twice are left out: it is a lower bound.

    Returns
    -------
    "weights" and "cache", in bytes.
    """
    table = 0 if shape.tied else shape.vocab * shape.hidden
    return {
        "weights": (parameters(shape) - table) * _width(weight_bytes, "weight_bytes"),
        "cache": cache_bytes(shape, cached, batch, bytes_per_number),
    }


def intensity(shape: Shape, cached: int, batch: int = 1, **widths: float) -> float:
    """FLOPs of one decoding step for every byte it reads; `widths` as in `decode_bytes`."""
    work = _whole(batch, "batch", 1) * sum(flops(shape, new=1, cached=cached).values())
    return work / sum(decode_bytes(shape, cached, batch, **widths).values())


def moments_bytes(shape: Shape, kinds: Sequence[str]) -> dict[str, int]:
    """Bytes of `kvteach.moments.Moments`, float64, of all layers: they do not depend on the number of tokens.

    Gram matrices are [d, d] with d = kv_heads · head_dim, those of queries [query_heads, head_dim, head_dim].

    Parameters
    ----------
    kinds : what is summed, as `kvteach.bases.reads` names it for a basis.

    Returns
    -------
    "sums", which grow while calibration runs and are there twice until a batch is finished, and "weights", the products
    of the model's own weights.
    """
    kv, apart = shape.kv_heads * shape.head_dim, shape.query_heads * shape.head_dim**2
    width, numbers = shape.query_heads * shape.head_dim, {"sums": 0, "weights": 0}
    for kind in kinds:
        gram, total = (apart, width) if kind.startswith(("queries", "outputs")) else (kv**2, kv)
        alone = kind.endswith(("attended", "in_blocks", "weight"))  # without a mean
        numbers["weights" if kind.endswith("weight") else "sums"] += gram if alone else gram + total
    return {part: 8 * shape.layers * count for part, count in numbers.items()}


def calibration_flops(shape: Shape, tokens: int, kinds: Sequence[str]) -> dict[str, int]:
    """FLOPs of calibrating on one window of `tokens` tokens, by the width of number they are done in.

    Parameters
    ----------
    kinds : what is summed, as for `moments_bytes`.

    Returns
    -------
    "forward" in the dtype of the model, "attended" (what each query head reads) in float32 or wider, and "grams" in
    float64. The products of the weights, once for each model, are left out.
    """
    heads, kv = shape.query_heads, shape.kv_heads * shape.head_dim
    apart = heads * shape.head_dim**2
    tokens = _whole(tokens, "tokens", 1)
    parts = [(tokens - start, min(BLOCK, tokens - start)) for start in range(0, tokens, BLOCK)]
    each = dict.fromkeys(("keys_pre", "keys_post", "values"), tokens * kv**2)
    each |= dict.fromkeys(("queries_pre", "queries_post"), tokens * apart)
    each |= {  # for each query head what it reads, [tokens, kv], and its gram; and one gram of all keys
        "keys_attended": tokens * (heads + 1) * kv**2,
        "values_attended": tokens * heads * kv**2,
        # from later tokens to a block: grams of softmax weights [block, block], then K_iᵀ (…) K_i
        "keys_in_blocks": sum(heads * later * m**2 + m**2 * kv + m * kv**2 for later, m in parts),
        # grams of later queries, and two turns of their sum
        "queries_in_blocks": sum(later * apart + 2 * apart * shape.head_dim for later, _ in parts),
    }
    reading = len({"keys_attended", "values_attended"} & set(kinds))
    return {
        "forward": sum(flops(shape, new=tokens, logits=0).values()),
        "attended": shape.layers * heads * reading * 2 * tokens**2 * kv,
        "grams": shape.layers * 2 * sum(each[kind] for kind in kinds if not kind.endswith("weight")),
    }


def _cached(shape: Shape) -> tuple[int, int]:
    """Numbers that a layer caches for a token: of keys, of values."""
    key, value = shape.widths
    return shape.kv_heads * key, shape.kv_heads * value


def _widths(shape: Shape) -> tuple[int, int, int, int]:
    """Numbers per token and layer: that W_Q, W_K and W_V make, and that W_O reads."""
    h, d_h = shape.query_heads, shape.head_dim
    key, value = shape.widths
    if shape.form == "S":
        query, made = h * key, shape.kv_heads * key
    else:  # keys are made at the source width, and projected after the rotation
        query, made = h * d_h, shape.source * d_h
    return query, made, shape.kv_heads * value, h * value


def _basis_numbers(shape: Shape) -> int:
    """Parameters that form G, R or L adds to a layer."""
    d_h, key = shape.head_dim, shape.widths[0]
    grouped = (shape.source + shape.query_heads) * d_h * key
    return {"S": 0, "G": grouped, "R": grouped, "L": shape.kv_heads * d_h * shape.source * d_h}[shape.form]


def _pairs(ranks, shape: Shape) -> list[tuple[int, int]]:
    one = not any(hasattr(rank, "__len__") for rank in ranks)
    pairs = [tuple(ranks)] if one else [tuple(pair) for pair in ranks]
    if len(pairs) not in (1, shape.layers) or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"ranks should be one pair (keys, values) or {shape.layers} pairs, one a layer")
    return [(_whole(key, "rank of keys", 0), _whole(value, "rank of values", 0)) for key, value in pairs]


def _whole(value, name: str, low: int) -> int:
    try:
        found = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it should be a whole number, {low} or more") from None
    if found < low:
        raise ValueError(f"{name} is {found}; it should be {low} or more")
    return found


def _width(value, name: str = "bytes_per_number"):
    if not (isinstance(value, Real) and 0 < value < float("inf")):
        raise ValueError(
            f"{name} is {value!r}; it should be above 0, as 4 for fp32, 2 for fp16, 0.5 for 4 bits"
        )
    return value


def _divisors(n: int) -> str:
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
