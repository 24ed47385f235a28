"""The command ``kvteach``: the package from a terminal, with the words of its Python interface.

What is for people goes to stdout, bars and warnings to stderr. With ``--json -`` one JSON document is the last line of
stdout and everything for people goes to stderr. An error is one sentence on stderr and exit status 1; a wrong command
line gives 2, Ctrl-C 130. Nothing heavy is imported until a command runs.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from . import __version__, commands
from .commands import CURE, NEEDED

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    asked = _parser().parse_args(arguments)
    people = sys.stderr if asked.json == "-" else sys.stdout
    try:
        if asked.json and not Path(asked.json).parent.is_dir():  # before a long run, not after it
            raise FileNotFoundError(f"--json is {asked.json!r}; its folder does not exist: make it first")
        with contextlib.redirect_stdout(people), _processes(asked) as asked.processes:
            found, status = asked.run(asked)
        if asked.json == "-":
            print(json.dumps(found))
        elif asked.json:
            Path(asked.json).write_text(json.dumps(found) + "\n", "utf-8")
        return status
    except KeyboardInterrupt:
        print("kvteach: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if asked.debug or os.environ.get("KVTEACH_DEBUG", "") not in ("", "0"):
            raise
        print(f"kvteach: {_sentence(error)}", file=sys.stderr)
        return 1


def _sentence(error: Exception) -> str:
    said = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name in NEEDED:
        return f"{error.name} is not installed: {CURE}"
    if isinstance(error, (ValueError, LookupError, OSError, ModuleNotFoundError)) and said:
        return said.strip("'\"") if isinstance(error, KeyError) else said
    return f"{type(error).__name__}: {said} (--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "kvteach", description="Understand and shrink the KV cache of a language model."
    )
    parser.add_argument("--version", action="version", version=f"kvteach {__version__}")
    choices = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, text: str, *parents) -> argparse.ArgumentParser:
        made = choices.add_parser(
            run.__name__.lstrip("_"), help=text, description=text, parents=[*parents, shared]
        )
        made.set_defaults(run=run)
        return made

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", metavar="FILE", help="write the result as JSON; - is stdout")
    shared.add_argument("--debug", action="store_true", help="show where an error arose")
    loading = argparse.ArgumentParser(add_help=False)
    loading.add_argument("model", metavar="MODEL", help="a named model, a folder, or a Hugging Face id")
    loading.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights (default: as stored)"
    )
    loading.add_argument("--device", help="such as cpu or cuda (default: cuda where there is one)")
    loading.add_argument(
        "--offload",
        action="store_true",
        help="leave layers on disk until they run: for models bigger than memory",
    )

    def reading(windows: int) -> argparse.ArgumentParser:
        made = argparse.ArgumentParser(add_help=False)
        made.add_argument(
            "--text", default="pydoc-topics", help="a named text, a file or a folder (%(default)s)"
        )
        made.add_argument(
            "--windows", type=int, default=windows, metavar="N", help="of the text (%(default)s)"
        )
        made.add_argument(
            "--length", type=int, default=512, metavar="N", help="tokens of a window (%(default)s)"
        )
        return made

    command(commands.doctor, "Say what is installed, and what is missing.")
    command(
        commands.spectrum,
        "Count the directions that keys and values need, layer by layer.",
        loading,
        reading(16),
    )
    made = command(commands.compress, "Write a model with a smaller cache.", loading, reading(32))
    dial = made.add_mutually_exclusive_group(required=True)
    dial.add_argument("--kv-heads", type=int, metavar="G", help="key-value heads of each layer afterwards")
    dial.add_argument(
        "--kv-ratio", type=float, metavar="R", help="share of the cache that is kept (one latent a layer)"
    )
    made.add_argument("--out", required=True, metavar="DIR", help="a new or an empty folder")
    made.add_argument("--stock", action="store_true", help="keep the model's own class (form S)")
    made.add_argument(
        "--sequential",
        action=argparse.BooleanOptionalAction,
        help="layer by layer, or all at once: faster, mostly worse (default: the first, if no other option forbids)",
    )
    made.add_argument(
        "--reach",
        type=int,
        metavar="N",
        help="all at once, for keys turned by their positions: how many to serve (default: 2048 with a --basis of "
        "such keys, else turn them within blocks)",
    )
    made.add_argument("--basis", help="a name of kvteach.bases (default: the best that fits)")
    made.add_argument(
        "--eval-windows",
        type=int,
        default=8,
        metavar="N",
        help="windows for the card's numbers, 0: none (%(default)s)",
    )
    made = command(
        commands.evaluate, "Measure a model, a compressed one against its original.", loading, reading(16)
    )
    made.add_argument(
        "--original", metavar="MODEL", help="what to compare with (default: what it was made from)"
    )
    made = command(commands.bench, "Measure how fast a model decodes, beside smaller caches of it.", loading)
    made.add_argument(
        "--kv-heads", type=int, nargs="+", default=[], metavar="G", help="caches to compare with"
    )
    made.add_argument(
        "--context", type=int, nargs="+", default=[1024], metavar="N", help="tokens in the cache (1024)"
    )
    made.add_argument(
        "--batch", type=int, nargs="+", default=[1], metavar="N", help="sequences decoded together (1)"
    )
    made.add_argument("--cache", choices=("static", "dynamic"), default="static", help="(%(default)s)")
    made = command(commands.generate, "Continue a text, the likeliest token each time.", loading)
    made.add_argument("prompt", metavar="TEXT")
    made.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="(%(default)s)")
    return parser


def _processes(asked):
    """Under torchrun the group of its processes, without it None."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return contextlib.nullcontext()
    if asked.run is not commands.compress:
        raise ValueError("only compress runs in several processes: start this without torchrun")
    from . import distributed

    return distributed.command(asked.device)
