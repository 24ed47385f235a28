"""One look for every plot of the book.

A figure's title carries its claim, its axes carry units, and the colours stay apart for colour-blind readers
and on paper. The background is white in light and dark mode alike, so that no line vanishes.

    figure, axes = new("The cache outgrows the weights", x="tokens", y="GB")
    axes.plot(tokens, gigabytes)

Alt text belongs to the notebook cell (metadata ``mystnb.image.alt``) or to the frame (`kvteach.widgets`).
"""

import io

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

# Okabe–Ito: eight colours that remain distinct with any common colour-vision deficiency; yellow left out, too
# pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
KEYS, VALUES = COLOURS[0], COLOURS[1]  # the same thing has the same colour on every page
MAP = "cividis"  # for heat maps: perceptually even, readable in grey

STYLE = {
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.size": 11,
    "grid.alpha": 0.25,
    "image.cmap": MAP,
    "legend.frameon": False,
    "lines.linewidth": 2,
}


def new(claim: str, x: str = "", y: str = "", panels: int = 1, size: tuple[float, float] | None = None):
    """A figure in the book's look, which plots made after it share.

    Parameters
    ----------
    claim : the sentence the figure proves, set as its title.
    x, y : axis labels with their units, the same on every panel.
    panels : number of panels side by side, sharing the y axis.
    size : width and height in inches; 7 × 3.6 by default.

    Returns
    -------
    (figure, axes) for one panel, (figure, array of axes) for more.
    """
    plt.rcParams.update(STYLE)  # to stay: Matplotlib reads a default when an artist is made, which is later
    figure, axes = plt.subplots(1, panels, figsize=size or (7, 3.6), sharey=True, squeeze=False)
    for axis in axes[0]:
        axis.set_xlabel(x)
    axes[0, 0].set_ylabel(y)
    if panels == 1:
        axes[0, 0].set_title(claim)
        return figure, axes[0, 0]
    figure.suptitle(claim, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"], fontweight="bold")
    return figure, axes[0]


def shares(claim: str, names, parts: dict, unit: str):
    """One bar of length 1 for each name, cut into parts, with the amounts of its parts written behind it.

    Parameters
    ----------
    names : what the bars stand for, top to bottom.
    parts : label -> one amount for each name, in `unit`; three parts at most.
    """
    amounts = np.array(list(parts.values()), dtype=float)
    widths = amounts / amounts.sum(0)
    figure, axes = new(claim, x="share of the sum")
    for row, label in enumerate(parts):
        axes.barh(list(names), widths[row], left=widths[:row].sum(0), color=COLOURS[4 + row], label=label)
    for bar, column in enumerate(amounts.T):
        sums = " + ".join(f"{amount:6.2f}" for amount in column)
        axes.text(1.01, bar, sums, va="center", family="monospace", fontsize=10)
    axes.text(1.06, -0.05, unit, va="top", transform=axes.transAxes)
    axes.set(xlim=(0, 1))
    axes.grid(False)
    axes.invert_yaxis()
    figure.legend(loc="outside lower right", ncols=len(parts))
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a small PNG (`shrink`), and closed."""
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=STYLE["figure.dpi"])
    plt.close(figure)
    return shrink(raw.getvalue())


def shrink(png: bytes) -> bytes:
    """The same picture in 64 colours: a third of the bytes, and a flat plot loses nothing visible.

    Keeps a page with a dozen frames under 500 kB.
    """
    from PIL import Image

    small = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(64).save(small, format="PNG", optimize=True)
    return small.getvalue()
