"""Exercise checks: plain functions that say what is wrong, not only that something is.

A check takes the reader's answer and returns a `Result`; as the last line of a cell it prints itself.
``strict=True`` (or the environment variable ``KVTEACH_STRICT=1``, for grading) raises `Mistake` instead.

One module per chapter: ``checks.cost``, ``checks.svd``, ``checks.cache``, ``checks.rope``, ``checks.convert``,
``checks.throughput``. A check is written as ::

    @check("Exercise 0.1")
    def kv_bytes(answer):
        value = number(answer(layers=2, kv_heads=1, head_dim=4, bytes_per_number=2), "kv_bytes(...)")
        expect(value != 16, "you counted the keys only: the values are cached too, so there is a factor 2")
        expect(value == 32, f"2 layers × 2 × 1 head × 4 numbers × 2 bytes = 32, yours is {value:g}")
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import numpy as np

_CHAPTERS = ("cache", "convert", "cost", "rope", "svd", "throughput")


class Mistake(AssertionError):
    """What an answer got wrong, in a sentence for the person who wrote it."""


@dataclass(frozen=True)
class Result:
    """The outcome of one check; its repr is the sentence shown under the cell."""

    exercise: str
    passed: bool
    message: str = ""

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"✓ {self.exercise}: passed" if self.passed else f"✗ {self.exercise}: {self.message}"


def check(exercise: str) -> Callable:
    """Turn a function of assertions into a check that returns a `Result` (or raises when strict)."""

    def decorate(body: Callable) -> Callable:
        @functools.wraps(body)
        def run(answer, *, strict: bool | None = None) -> Result:
            try:
                body(answer)
                result = Result(exercise, True)
            except Mistake as mistake:
                result = Result(exercise, False, str(mistake))
            except (
                Exception
            ) as error:  # the reader's own code failed: tell, do not bury the page in a traceback
                result = Result(exercise, False, f"your code stopped with {type(error).__name__}: {error}")
            if strict is None:
                strict = os.environ.get("KVTEACH_STRICT") == "1"
            if strict and not result:
                raise Mistake(repr(result))
            return result

        return run

    return decorate


def expect(condition: bool, mistake: str) -> None:
    """Go on when `condition` holds, else raise `Mistake` with the sentence `mistake`."""
    if not condition:
        raise Mistake(mistake)


def number(value, name: str = "your answer") -> float:
    """`value` as a float; a `Mistake` when nothing, an array, or not a number came back."""
    _expect_something(value, name)
    expect(np.ndim(value) == 0, f"{name} should be one number, it has shape {np.shape(value)}")
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise Mistake(f"{name} should be a number, it is a {type(value).__name__}") from None
    expect(np.isfinite(found), f"{name} is {found}, not a finite number")
    return found


def array(value, shape: tuple[int, ...], name: str = "your answer") -> np.ndarray:
    """`value` as a float64 array of `shape`; a `Mistake` that names the shape or the NaN otherwise."""
    _expect_something(value, name)
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise Mistake(f"{name} should be an array of numbers, it is a {type(value).__name__}") from None
    expect(found.shape == shape, f"{name} should have shape {shape}, it has {found.shape}")
    expect(bool(np.isfinite(found).all()), f"{name} holds NaN or infinity")
    return found


def _expect_something(value, name: str) -> None:
    expect(
        value is not None and value is not Ellipsis,
        f"{name} is empty: replace the ... and return the result (to print it is not enough)",
    )


def __getattr__(name: str):
    if name in _CHAPTERS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"kvteach.checks has no {name!r}; it has {', '.join(_CHAPTERS)}")
