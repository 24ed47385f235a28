"""What the theme's pages need so that they load nothing from elsewhere, raise no error and can be read aloud."""

from docutils import nodes
from myst_nb import sphinx_ as myst_nb
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def clean_page(app: Sphinx, pagename, templatename, context, doctree) -> None:
    """Drop sphinx-thebe, which Jupyter Book always loads: it names another host and declares a constant twice.

    The theme also needs a default mode: an empty one is an error on the console.
    """

    def wanted(script) -> bool:
        body = getattr(script, "attributes", {}).get("body") or ""
        return "thebe" not in str(getattr(script, "filename", script)) and "THEBE_JS_URL" not in body

    context["script_files"] = [script for script in context.get("script_files", []) if wanted(script)]
    context["css_files"] = [style for style in context.get("css_files", []) if wanted(style)]
    context["default_mode"] = context.get("default_mode") or "auto"


def visit_citation(self: HTML5Translator, node: nodes.citation) -> None:
    """An entry of the bibliography: its own role is deprecated, and a list wants list items."""
    HTML5Translator.visit_citation(self, node)
    self.body[-1] = self.body[-1].replace('role="doc-biblioentry"', 'role="listitem"')


def visit_hidden_cell(self: HTML5Translator, node: myst_nb.HideCodeCellNode) -> None:
    """A folded cell is called what it says ("Show code cell content"), not "Toggle hidden content"."""
    start = len(self.body)
    myst_nb.visit_HideCellInput(self, node)
    self.body[start:] = [
        text.replace(' aria-label="Toggle hidden content"', "") for text in self.body[start:]
    ]


def setup(app: Sphinx) -> dict:
    """Run after the extensions that add the files."""
    app.connect("html-page-context", clean_page, priority=900)
    app.add_node(nodes.citation, override=True, html=(visit_citation, HTML5Translator.depart_citation))
    app.add_node(
        myst_nb.HideCodeCellNode, override=True, html=(visit_hidden_cell, myst_nb.depart_HideCellInput)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
