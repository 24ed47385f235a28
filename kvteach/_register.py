"""Lets transformers find compressed models after ``import kvteach``, without importing transformers.

``AutoModelForCausalLM`` looks a checkpoint's model type up in a table. The entries of `kvteach.models` are made when
the module that holds the table is imported, by whomever: `watch` puts itself before Python's own finders until then.
"""

import importlib
import importlib.util
import sys

TABLE = "transformers.models.auto.modeling_auto"


class _Watch:
    """A finder that waits for one module, and lets `kvteach.models` follow it."""

    def find_spec(self, name, path=None, target=None):
        if name != TABLE:
            return None
        sys.meta_path.remove(self)  # once, and so that the next line finds the module itself
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_enter(module):
            run(module)
            importlib.import_module("kvteach.models")

        spec.loader.exec_module = run_and_enter
        return spec


def watch() -> None:
    """Enter the classes now if the table is there already, else when it comes."""
    if TABLE in sys.modules:
        importlib.import_module("kvteach.models")
    else:
        sys.meta_path.insert(0, _Watch())
