"""kvteach: understand and shrink the KV cache of a language model.

Importing the package loads nothing but the standard library. A module is imported when it is first named,
so ``kvteach.svd`` costs NumPy, and only the modules that touch a model cost torch and transformers.

Data flows one way: text → moments → basis → model → numbers → page.

===============  ====================================================================  ===========
module           what it holds                                                         chapter
===============  ====================================================================  ===========
``cost``         bytes, parameters and FLOPs of attention and its cache                0
``svd``          truncated SVD, energy, exact error                                    1
``activations``  keys, values and queries of a forward pass                            2
``moments``      their sums over a text: count, mean, second moments                   2
``calibration``  the run that streams those sums through a model                       2
``attended``     sums in which tokens count as often as they are read                  4
``distributed``  the same by several processes, each with its share of the text
``rope``         the rotation, and what it does to second moments                      3
``bases``        what to keep of a group of heads, one method a file                   4
``plan``         what a compressed model is to look like                               4
``grouping``     which heads are cached together                                       4
``convert``      model + moments + plan → a model with a small cache                   4
``sequential``   the same, layer by layer on the compressed model itself               4
``models``       the classes of compressed models                                      4
``zoo``          models by name, folder or hub id
``offload``      models bigger than memory: weights that lie on disk until they are needed
``sizes``        parameters and cache of a model from its config, before it is loaded
``folder``       a compressed model on disk, with a card that says how it was made
``evaluate``     perplexity, divergence from the original, lm-eval
``layers``       attention and output errors, layer by layer
``passkey``      a number hidden in a long text, asked for at the end
``text``         calibration and evaluation windows
``throughput``   how fast models decode, side by side                                  5
``roofline``     how fast they could be: the prediction, the fit, the paper's columns  5
``machine``      the rates that it predicts with, from data sheets or measured here    5
``memory``       what a forward pass holds and makes
``results``      numbers that took long to measure, as stored
``figures``      one look for every plot
``widgets``      figures that move
``checks``       exercise checks that name the mistake
``env``          device, Colab, versions
``cli``          the command ``kvteach``, its options and errors
``commands``     what each of its commands does
===============  ====================================================================  ===========
"""

from importlib import import_module

from . import _register

__version__ = "0.1.0"

_MODULES = (
    "activations",
    "bases",
    "attended",
    "calibration",
    "checks",
    "cli",
    "commands",
    "convert",
    "cost",
    "distributed",
    "env",
    "evaluate",
    "figures",
    "folder",
    "grouping",
    "layers",
    "machine",
    "memory",
    "models",
    "moments",
    "offload",
    "passkey",
    "plan",
    "results",
    "roofline",
    "rope",
    "sequential",
    "sizes",
    "svd",
    "text",
    "throughput",
    "widgets",
    "zoo",
)


_NAMES = {"compress": "convert", "Plan": "plan"}  # the two that a reader types most


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"kvteach has no {name!r}; it has {', '.join(_MODULES)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, *_NAMES])


_register.watch()  # for AutoModelForCausalLM.from_pretrained of a compressed folder
