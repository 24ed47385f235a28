"""RoPE: the rotation between a key and the cache, and what it does to second moments.

A head of d_h numbers is d_h / 2 pairs (a_f, b_f) = (x[f], x[f + d_h/2]), as LLaMA pairs them. At position p

    x → x R_p          (a, b) → (a cos pθ − b sin pθ, a sin pθ + b cos pθ)          θ = θ_f, radians a token

or, with z = a + i b, z_f → z_f e^{i p θ_f}. So (q R_p)(k R_p')ᵀ = q R_{p−p'} kᵀ, and R_p R_p' = R_{p+p'}.

Second moments turn with it: E[xᵀx] becomes R_pᵀ G R_p. In complex numbers each entry only gains a phase,

    E[z̄_f z_g] · e^{i p (θ_g − θ_f)}            E[z_f z_g] · e^{i p (θ_g + θ_f)}

and the mean of e^{i p φ} over a range of positions is a geometric sum. So the mean over any number of positions costs
as much as one (`over_positions`), and moments of short windows tell what the same windows hold further on (`placed`).

Su et al., 2021, "RoFormer".
"""

import torch
from torch import Tensor

from .moments import Moments
from .zoo import check_family

FIXED = ("default", "linear", "llama3")  # RoPE types whose angles do not change with the length of the text


def frequencies(head_dim: int, theta: float = 10000.0) -> Tensor:
    """θ_f = theta^(−2f / d_h), radians a token: float64 [d_h / 2], the fastest first.

    >>> frequencies(4, theta=100.0)
    tensor([1.0000, 0.1000], dtype=torch.float64)
    """
    if head_dim < 2 or head_dim % 2 or not theta > 0:
        raise ValueError(
            f"head_dim is {head_dim} and theta {theta}; RoPE needs an even head_dim and a theta above 0"
        )
    return 1 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def from_config(config) -> Tensor:
    """The frequencies of a transformers config of the LLaMA family, as transformers computes them: float64 [d_h / 2].

    ValueError for a model without RoPE, and for RoPE types whose angles change with the length of the text, or that
    also stretch queries and keys (dynamic, longrope, yarn): no one list of frequencies describes them.
    """
    if check_family(config) != "llama":
        raise ValueError(f"a {config.model_type} model has no RoPE, so it has no frequencies")
    if not has_fixed_turns(config):
        raise ValueError(
            f"rope_type is {config.rope_parameters['rope_type']!r}, not one of {', '.join(FIXED)}: no one list of "
            "frequencies describes it, so keys can be neither turned within blocks nor moved to later positions. To "
            "compress it, take Plan(basis='attention-weighted', reach=N) and calibrate on windows of N tokens"
        )
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config).inv_freq.double()


def has_fixed_turns(config) -> bool:
    """Whether `from_config` has frequencies for this model."""
    return check_family(config) == "llama" and config.rope_parameters["rope_type"] in FIXED


def rotate(x: Tensor, positions, frequencies: Tensor) -> Tensor:
    """x R_p for every token. The inverse is ``rotate(x, -positions, frequencies)``.

    Parameters
    ----------
    x : [..., tokens, d_h], queries or keys.
    positions : [tokens], or whatever broadcasts to [..., tokens]. Angles are formed in float64.
    frequencies : [d_h / 2].

    >>> rotate(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), [0, 1], torch.tensor([torch.pi / 2])).round()
    tensor([[1., 0.],
            [-0., 1.]])
    """
    if x.shape[-1] != 2 * len(frequencies):
        raise ValueError(
            f"x has {x.shape[-1]} numbers a head; {len(frequencies)} frequencies turn {2 * len(frequencies)}"
        )
    positions = torch.as_tensor(positions, dtype=torch.float64, device=x.device)
    angles = positions[..., None] * frequencies.to(x.device)  # [..., tokens, d_h / 2]
    return _turn(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def rotation(position: int, frequencies: Tensor, heads: int = 1) -> Tensor:
    """R_p itself, the same for each of `heads` heads side by side: float64 [heads · d_h, heads · d_h], orthogonal."""
    identity = torch.eye(2 * len(frequencies), dtype=torch.float64)
    return torch.block_diag(*[rotate(identity, position, frequencies)] * heads)


def turns(frequencies: Tensor, tokens: int) -> Tensor:
    """How often each pair turns round within `tokens` tokens: [d_h / 2]."""
    return tokens * frequencies / (2 * torch.pi)


def commutator(matrix: Tensor, frequencies: Tensor, position: int = 1) -> float:
    """‖M R_p − R_p M‖ / ‖M‖, Frobenius norms: 0 when it does not matter whether M or the rotation comes first.

    R_p is a power of R_1, so a matrix that commutes at position 1 does so everywhere.

    Parameters
    ----------
    matrix : [n · d_h, n · d_h] for n heads side by side; for a projection, encode @ decode.
    """
    turn = rotation(position, frequencies, _heads(matrix, frequencies)).to(matrix)
    return float((matrix @ turn - turn @ matrix).norm() / matrix.norm())


def mean_turn(phases: Tensor, start: int, stop: int) -> Tensor:
    """The mean of e^{i p φ} over the positions start ≤ p < stop, for every phase φ: complex, by the geometric sum.

    ValueError when there is no position.

    >>> mean_turn(torch.tensor([0.0, torch.pi / 2]), 0, 4).abs().round()
    tensor([1., 0.])
    """
    count = stop - start
    if start < 0 or count < 1:
        raise ValueError(f"positions {start} to {stop}; start must be 0 or more and stop above it")
    # Whole turns change nothing. So φ/2 is within −π/2 … π/2, where its sine is zero at φ = 0 only.
    half = (torch.remainder(phases + torch.pi, 2 * torch.pi) - torch.pi) / 2
    still = half == 0
    size = torch.where(still, 1, (count * half).sin() / (count * half.sin().where(~still, 1)))
    return torch.polar(torch.ones_like(half), (start + stop - 1) * half) * size


def over_positions(gram: Tensor, frequencies: Tensor, start: int, stop: int) -> Tensor:
    """Mean of R_pᵀ G R_p over the positions start ≤ p < stop, for the cost of one of them.

    With G = E[xᵀx] *before* RoPE this is the second moment after it, if what a token says does not depend on where it
    stands. With G after RoPE it is that of the same windows, moved on by p.

    Parameters
    ----------
    gram : [..., n · d_h, n · d_h], for n heads side by side.

    >>> over_positions(torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([torch.pi / 2]), 0, 4).round(decimals=3)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    n = _heads(gram, frequencies)
    # [..., n · d_h, n · d_h] -> [n, 2, f, n, 2, f], any leading axes behind them
    split = gram.unflatten(-1, (n, 2, -1)).unflatten(-4, (n, 2, -1)).movedim((-5, -2), (0, 1))
    (aa, ab), (ba, bb) = split  # [..., n, f, n, f] each
    θ = frequencies.to(gram)
    apart = mean_turn(θ - θ[:, None], start, stop)[:, None]  # [f, 1, f]
    along = mean_turn(θ + θ[:, None], start, stop)[:, None]
    same = torch.complex(aa + bb, ab - ba) * apart  # E[z̄ z]
    twice = torch.complex(aa - bb, ab + ba) * along  # E[z z]
    aa, bb = (same + twice).real / 2, (same - twice).real / 2
    ab, ba = (same + twice).imag / 2, (twice - same).imag / 2
    rows = [torch.stack(pair, -2) for pair in ((aa, ab), (ba, bb))]  # [..., n, f, n, 2, f]
    return torch.stack(rows, -5).flatten(-3).flatten(-4, -2)  # [..., n, 2, f, …] -> [..., n · d_h, n · d_h]


def placed(moments: Moments, frequencies: Tensor, starts: int) -> Moments:
    """The moments that the same windows have when they may begin at any position 0 ≤ p < starts, all equally likely.

    RoPE sees distances only, so a window says and attends to the same wherever it stands: only the cached keys and the
    queries that meet them are turned. Windows of T tokens then reach ``starts + T − 1`` positions, as if they had been
    cut from texts of that length. What a longer text would change in what is said and attended to is not in it; nor is
    that its first tokens stay at position 0. Add the moments as they were (``+``) to count those as well.

    ValueError for a model without RoPE.
    """
    source = moments.source
    if not source.rotates or len(frequencies) * 2 != source.head_dim:
        raise ValueError(
            f"{len(frequencies)} frequencies do not turn the heads of a {source.model_type} model "
            f"with head_dim {source.head_dim}"
        )
    total, gram = dict(moments.total), dict(moments.gram)
    mean = mean_turn(frequencies, 0, starts)
    for kind in {"keys_post", "queries_post"} & total.keys():
        heads = total[kind].unflatten(-1, (-1, source.head_dim))  # [layers, heads, d_h]
        total[kind] = _turn(heads, mean.real, mean.imag).flatten(1)
    for kind in {"keys_post", "queries_post", "keys_attended"} & gram.keys():
        gram[kind] = torch.stack([over_positions(layer, frequencies, 0, starts) for layer in gram[kind]])
    return Moments(source, moments.count, total, gram, moments.weight, moments.reach + starts - 1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (a, b) of x [..., d_h] times the complex number cos + i sin, [..., d_h / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _heads(matrix: Tensor, frequencies: Tensor) -> int:
    """How many heads of 2 · len(frequencies) numbers stand side by side in a square matrix."""
    d = 2 * len(frequencies)
    rows, columns = matrix.shape[-2:]
    if rows != columns or not rows or rows % d:
        raise ValueError(
            f"the matrix is {rows} × {columns}; for {len(frequencies)} frequencies it must be square, "
            f"a multiple of {d}"
        )
    return rows // d
