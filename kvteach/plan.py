"""Plan: what a compressed model is to look like. The same object is written into its config.

One of two dials is turned:

- ``Plan(kv_heads=g)``: each layer's n key-value heads become g heads of the same width, so the cache shrinks to g / n.
  Form G (keys are projected after RoPE), or with ``stock=True`` form S (the basis commutes with RoPE and goes into the
  weights, so that an unchanged model class runs it).
- ``Plan(kv_ratio=0.5)``: form R. All heads of a layer share one latent of keys and one of values, each of this share
  of their width.
"""

from dataclasses import asdict, dataclass
from numbers import Integral, Real

from .bases import method
from .cost import BLOCK
from .moments import Source

GROUPINGS = ("order", "similarity")
REACH = 2048  # positions served by default; each octave more costs quality at all lengths
# What ordinary heads can hold: their keys pass through RoPE one direction a frequency.
STOCK = ("commuting-stock", "mean-pool", "procrustes")


@dataclass(frozen=True)
class Plan:
    """How to compress: `kv_heads` or `kv_ratio`, the rest has defaults.

    Attributes
    ----------
    kv_heads : key-value heads of every layer afterwards; it divides those of the model.
    kv_ratio : share of the cache bytes that is kept, above 0 and at most 1. Ranks are rounded to even numbers.
    basis : a name of `kvteach.bases.METHODS`. By default ``blockwise``; ``commuting-stock`` with `stock`, and
        ``attention-weighted`` with `reach`. With ``blockwise`` and RoPE, keys are turned within blocks of
        `kvteach.cost.BLOCK` tokens only, so their basis holds at every position.
    stock : absorb the keys' basis into the weights too. Only for `STOCK` where the model has RoPE.
    grouping : which heads become one: neighbours (``order``), or those that share most directions (``similarity``).
    centred : let the basis describe deviations from the mean. The mean of keys is dropped, softmax does not see it;
        that of values becomes a constant of the layer's output.
    sequential : layer by layer on the compressed model's own activations, by `kvteach.sequential.compress`.
    reach : positions that are to be served, for bases of keys that are turned by their positions. RoPE turns keys at
        positions that no calibration window has reached into directions that its moments have not seen, so these are
        moved there. By default `REACH`, or as many as the model was made for when these are fewer; never fewer than a
        calibration window has.
    """

    kv_heads: int | None = None
    kv_ratio: float | None = None
    basis: str | None = None
    stock: bool = False
    grouping: str = "order"
    centred: bool = False
    sequential: bool = False
    reach: int | None = None

    def __post_init__(self):
        """Refuse what no model could follow, and name the basis that was left open."""
        if (self.kv_heads is None) == (self.kv_ratio is None):
            raise ValueError("a plan needs kv_heads or kv_ratio, one of the two")
        heads, ratio = self.kv_heads, self.kv_ratio
        if ratio is not None:
            if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < ratio <= 1:
                raise ValueError(f"kv_ratio is {ratio!r}; it must be above 0 and at most 1")
            object.__setattr__(self, "kv_ratio", float(ratio))  # Python's own numbers: a config is JSON
        elif isinstance(heads, Integral) and not isinstance(heads, bool):
            object.__setattr__(self, "kv_heads", int(heads))
        if self.reach is not None:
            if isinstance(self.reach, bool) or not isinstance(self.reach, Integral) or self.reach < 1:
                raise ValueError(
                    f"reach is {self.reach!r}; it must be a whole number of positions, 1 or more"
                )
            object.__setattr__(self, "reach", int(self.reach))
        if self.grouping not in GROUPINGS:
            raise ValueError(f"grouping is {self.grouping!r}; it must be one of {', '.join(GROUPINGS)}")
        if self.stock and self.kv_heads is None:
            raise ValueError("stock=True makes ordinary heads, so it needs kv_heads, not kv_ratio")
        if self.basis is None:
            turned = "blockwise" if self.reach is None else "attention-weighted"
            object.__setattr__(self, "basis", "commuting-stock" if self.stock else turned)
        method(self.basis)
        if self.basis == "blockwise" and self.reach is not None:
            raise ValueError(
                f"reach is {self.reach} and basis 'blockwise'; its keys hold at every position: leave one of the two "
                "out"
            )
        own = self.basis == "blockwise" and self.grouping == "order"
        if self.sequential and (not own or self.stock or self.centred):
            raise ValueError(
                "sequential is True; it makes bases of its own, whose keys hold at every position: leave basis, "
                "grouping, centred, stock and reach out"
            )

    @property
    def form(self) -> str:
        """``"S"``, ``"G"`` or ``"R"``, as in `kvteach.cost`."""
        return "S" if self.stock else "G" if self.kv_ratio is None else "R"

    def block(self, source: Source) -> int | None:
        """Tokens of a block that keys are turned within; None where they are turned by their positions, or not."""
        return BLOCK if self.basis == "blockwise" and source.rotates else None

    def layout(self, source: Source) -> tuple[int, int, int]:
        """Groups, rank of a group's keys and rank of its values, in every layer of that model.

        Raises
        ------
        ValueError : kv_heads that do not divide the model's, a basis that the form cannot hold, or a ratio that
            leaves no number.
        """
        n, width = source.kv_heads, source.kv_heads * source.head_dim
        if self.stock and not source.rotates:
            raise ValueError(
                f"stock is True; a {source.model_type} model has no RoPE, so every basis goes into its weights: "
                "leave stock out"
            )
        if self.stock and self.basis not in STOCK:
            raise ValueError(
                f"basis {self.basis!r} does not pass through RoPE as an ordinary head: with stock=True take one of "
                f"{', '.join(STOCK)}"
            )
        if self.kv_ratio is not None:
            rank = round(self.kv_ratio * width / 2) * 2
            if not rank:
                raise ValueError(
                    f"kv_ratio is {self.kv_ratio}; it must keep at least 2 of {width} numbers: {2 / width:.4f} or more"
                )
            return 1, rank, rank
        if type(self.kv_heads) is not int or self.kv_heads < 1 or n % self.kv_heads:  # True is no number
            legal = ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
            raise ValueError(
                f"kv_heads is {self.kv_heads!r}; for {n} key-value heads it must be one of {legal}"
            )
        return self.kv_heads, source.head_dim, source.head_dim

    def positions(self, source: Source, limit: int | None, calibrated: int) -> int | None:
        """How many positions the bases are made for; None where positions turn no keys, or within blocks only.

        Parameters
        ----------
        limit : positions that the model was made for, `kvteach.evaluate.positions`.
        calibrated : tokens of the longest calibration window.

        Raises
        ------
        ValueError : a reach beyond the model's positions, or where there is no RoPE.
        """
        if not source.rotates:
            if self.reach is not None:
                raise ValueError(
                    f"reach is {self.reach}; a {source.model_type} model has no RoPE, so it reads every position "
                    "alike: leave reach out"
                )
            return None
        if self.block(source):
            return None
        if self.reach is not None and self.reach > limit:
            raise ValueError(
                f"reach is {self.reach}; the model was made for {limit} positions, so at most that"
            )
        return max(calibrated, min(limit, REACH) if self.reach is None else self.reach)

    def as_dict(self) -> dict:
        """Plain values, for a config or JSON."""
        return asdict(self)
