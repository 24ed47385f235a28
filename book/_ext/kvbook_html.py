"""What the theme's pages need so that they load nothing from elsewhere, raise no error and can be read aloud."""

from sphinx.application import Sphinx


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


def setup(app: Sphinx) -> dict:
    """Run after the extensions that add the files."""
    app.connect("html-page-context", clean_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
