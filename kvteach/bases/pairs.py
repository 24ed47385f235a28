"""RoPE turns pairs, so a head of d_h real numbers is d_h / 2 complex ones.

    z_f = x_f + i x_{f + d_h/2}            RoPE at position m:  z_f → z_f e^{i m θ_f}

Everything complex-linear that stays within one frequency f commutes with that turn, and nothing else does. With the
heads of a group side by side, z_f is a row [n], and its second moment [n, n] does not change when RoPE is applied:

    C_f = E[z̄_fᵀ z_f],       C_f[i, j] = E[a_i a_j + b_i b_j] + i E[a_i b_j − b_i a_j]       for z = a + i b
"""

import torch
from torch import Tensor


def complex_gram(gram: Tensor, n: int) -> Tensor:
    """C_f of every frequency: [n · d_h, n · d_h] real -> [d_h / 2, n, n] complex, Hermitian.

    >>> complex_gram(torch.tensor([[1.0, 0.5], [0.5, 2.0]]), n=1)
    tensor([[[3.+0.j]]])
    """
    split = gram.unflatten(1, (n, 2, -1)).unflatten(0, (n, 2, -1))  # [n, 2, f, n, 2, f]
    same = split.diagonal(dim1=2, dim2=5).permute(4, 1, 3, 0, 2)  # one frequency: [f, 2, 2, n, n]
    return torch.complex(same[:, 0, 0] + same[:, 1, 1], same[:, 0, 1] - same[:, 1, 0])


def real_encoder(columns: Tensor, frequencies: Tensor, pairs: int) -> Tensor:
    """The real matrix of c = z u for each pair of latents.

    Parameters
    ----------
    columns : complex [p, n], u of each latent.
    frequencies : [p], the one frequency that each latent reads.
    pairs : d_h / 2.

    Returns
    -------
    float [n · d_h, 2 p]: first all real parts, then all imaginary parts, as RoPE pairs them. Its transpose is the real
    matrix of ẑ = c ūᵀ.
    """
    p, n = columns.shape
    real = torch.zeros(n, 2, pairs, 2, p, dtype=columns.real.dtype)
    u, latent = columns.T, torch.arange(p)
    real[:, 0, frequencies, 0, latent] = u.real  # (a + i b)(α + i β) = (a α − b β) + i (a β + b α)
    real[:, 1, frequencies, 0, latent] = -u.imag
    real[:, 0, frequencies, 1, latent] = u.imag
    real[:, 1, frequencies, 1, latent] = u.real
    return real.flatten(3).flatten(0, 2)
