"""Figures that move: a slider over pictures drawn beforehand.

On the built page there is no kernel, so every frame is drawn when the notebook runs and the browser only
swaps them. ipywidgets 8 can link slider and frames in the browser (``jslink`` to a ``Stack``); 7.7, which Colab
has, knows no ``Stack``, so there the kernel swaps the frame.
"""

import base64
from collections.abc import Callable, Sequence
from html import escape

import ipywidgets
from matplotlib.figure import Figure

from . import figures


def slider(
    label: str, values: Sequence, draw: Callable[..., Figure], alt: Callable[..., str], start: int = 0
):
    """A slider that shows one picture per value.

    Parameters
    ----------
    label : what the slider changes, as in "rank".
    values : the positions of the slider, each shown by its `str`.
    draw : value -> matplotlib figure (closed here).
    alt : value -> one sentence that tells what the picture shows, for readers who cannot see it.
    start : index of the value shown first.

    Returns
    -------
    An ipywidgets box: works live, and without a kernel on the built page.
    """
    values = list(values)
    if not values:
        raise ValueError("slider needs at least one value")
    if not 0 <= start < len(values):
        raise ValueError(f"start is {start}, but there are {len(values)} values")
    frames = [_frame(figures.png(draw(value)), alt(value)) for value in values]
    control = ipywidgets.SelectionSlider(
        options=[str(value) for value in values],
        index=start,
        description=label,
        continuous_update=True,
        layout=ipywidgets.Layout(width="100%"),
        style={"description_width": "initial"},
    )
    if hasattr(ipywidgets, "Stack"):
        pictures = ipywidgets.Stack([ipywidgets.HTML(frame) for frame in frames], selected_index=start)
        ipywidgets.jslink((control, "index"), (pictures, "selected_index"))
    else:
        pictures = ipywidgets.HTML(frames[start])
        control.observe(lambda change: setattr(pictures, "value", frames[change["new"]]), names="index")
    return ipywidgets.VBox([control, pictures])


def _frame(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}" style="width:100%;background:white">'
