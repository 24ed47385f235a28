"""What importing costs, what the environment says, and the sliders on both ipywidgets."""

import subprocess
import sys

import ipywidgets
import numpy
import pytest
import torch

import kvteach
from kvteach import env, figures, widgets


def imported_by(code: str) -> set[str]:
    script = f"import sys; {code}; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return {name.split(".")[0] for name in out.split()}


def test_importing_needs_numpy_at_most():
    heavy = {"torch", "transformers", "matplotlib", "ipywidgets", "safetensors", "tqdm", "pandas"}
    assert not imported_by("import kvteach") & (heavy | {"numpy"})
    assert (
        not imported_by("import kvteach.svd, kvteach.cost, kvteach.checks.svd, kvteach.checks.cost") & heavy
    )


def test_importing_changes_nothing_in_transformers():
    code = """
import transformers, torch
from transformers.models.llama import modeling_llama as m
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as f
before = (dict(vars(m.LlamaAttention)), sorted(f), m.apply_rotary_pos_emb)
import kvteach
for name in dir(kvteach): getattr(kvteach, name)
assert before == (dict(vars(m.LlamaAttention)), sorted(f), m.apply_rotary_pos_emb)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_modules_are_named():
    assert set(kvteach._MODULES) <= set(dir(kvteach))
    with pytest.raises(AttributeError, match="kvteach has no 'nothing'; it has activations"):
        kvteach.nothing  # noqa: B018


@pytest.mark.parametrize(
    "available, capability, has, half",
    [
        (False, None, False, torch.float32),
        (True, (7, 5), False, torch.float16),  # a T4, which claims bfloat16 and emulates it
        (True, (8, 0), True, torch.bfloat16),
    ],
)
def test_bfloat16_goes_by_compute_capability(monkeypatch, available, capability, has, half):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    assert env.has_bf16() is has
    assert env.half_dtype() is half


def test_a_module_that_was_replaced_under_us_is_told(monkeypatch):
    assert env.stale_modules() == []
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert "torch 1.0 is loaded" in env.stale_modules()[0]
    assert "restart the kernel" in env.report()


@pytest.mark.parametrize("value, off", [(None, False), ("", False), ("0", False), ("1", True)])
def test_bars_are_off_when_asked(monkeypatch, value, off):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("TQDM_DISABLE", value)
    assert env.bars_off() is off


def test_colab_is_known_by_its_module(monkeypatch):
    assert not env.in_colab()
    monkeypatch.setitem(sys.modules, "google.colab", object())
    assert env.in_colab()


def draw(value):
    figure, axes = figures.new(f"value {value}", x="x", y="y")
    axes.plot([0, value])
    return figure


def slide(**kwargs):
    return widgets.slider("value", [1, 2, 3], draw, lambda value: f'a line to "{value}"', **kwargs)


def test_slider_shows_the_frame_it_points_at():
    control, pictures = slide(start=0).children
    assert control.options == ("1", "2", "3")
    assert control.value == "1"
    assert pictures.selected_index == 0
    assert all(f"a line to &quot;{n}&quot;" in frame.value for n, frame in enumerate(pictures.children, 1))
    assert len({frame.value for frame in pictures.children}) == 3


def test_slider_without_a_stack_lets_the_kernel_swap_the_frame(monkeypatch):
    """ipywidgets 7.7 has no Stack."""
    monkeypatch.delattr(ipywidgets, "Stack")
    control, picture = slide().children
    first = picture.value
    control.index = 2
    assert picture.value != first
    assert "a line to &quot;3&quot;" in picture.value


def test_slider_refuses_nonsense():
    with pytest.raises(ValueError, match="at least one value"):
        widgets.slider("value", [], draw, str)
    with pytest.raises(ValueError, match="at least one value"):
        widgets.slider("value", numpy.array([]), draw, str)
    with pytest.raises(ValueError, match="start is 3, but there are 3 values"):
        slide(start=3)


def test_figures_are_closed_and_small():
    import matplotlib.pyplot as plt

    data = figures.png(draw(3))
    assert plt.get_fignums() == []
    assert data.startswith(b"\x89PNG")
    assert len(data) < 20_000


def test_the_look_reaches_what_is_drawn_later():
    from matplotlib.colors import to_hex

    _, axes = figures.new("claim")
    (line,) = axes.plot([0, 1], label="x")
    assert (line.get_linewidth(), to_hex(line.get_color()).upper()) == (2, figures.COLOURS[0])
    assert axes.imshow([[0, 1]]).get_cmap().name == figures.MAP
    assert not axes.legend().get_frame_on()
    assert axes.title.get_text() == "" and axes.get_title(loc="left") == "claim"


def test_new_figure_carries_its_claim():
    figure, axes = figures.new("the claim", x="tokens", y="GB", panels=3)
    assert figure.get_suptitle() == "the claim"
    assert [axis.get_xlabel() for axis in axes] == ["tokens"] * 3
    assert axes[0].get_ylabel() == "GB"
