"""Lets transformers find compressed models after ``import kvteach``, without importing transformers.

``AutoModelForCausalLM`` looks a checkpoint's model type up in a table. The entries of `kvteach.models` are made when
the module that holds the table is there and no module of transformers is half imported: some modules need the table,
and `kvteach.models` needs them. `watch` puts itself before Python's own finders until then.
"""

import importlib
import sys
from importlib.machinery import PathFinder

TABLE = "transformers.models.auto.modeling_auto"


class _Watch:
    """A finder that counts how deep an import of transformers' modules is nested, and acts when the outermost ends."""

    depth = 0

    def find_spec(self, name, path=None, target=None):
        if not name.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def counted(module):
            self.depth += 1
            try:
                run(module)
            finally:
                self.depth -= 1
            if not self.depth and TABLE in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module("kvteach.models")

        spec.loader.exec_module = counted
        return spec


def watch() -> None:
    """Enter the classes now if the table is there already, else when it comes."""
    if TABLE in sys.modules:
        importlib.import_module("kvteach.models")
    else:
        sys.meta_path.insert(0, _Watch())
