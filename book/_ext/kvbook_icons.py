"""Ships the icons that the pages show instead of all two thousand: 0.1 MB of script in place of 1.5 MB.

The theme draws its icons with Font Awesome's script, which carries every icon as an entry
`name: [width, height, [other names], "code point", "path"]`. After the build, the entries that no page and no
script of the site names are taken out of the site's copy.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

ENTRY = re.compile(
    r'(?:"(?P<quoted>[a-z0-9-]+)"|(?P<plain>[a-z0-9]+)):'
    r'\[\d+,\d+,\[(?P<others>[^\]]*)\],"[0-9a-f]+",(?:"[^"]*"|\["[^"]*","[^"]*"\])\],?'
)
NAME = re.compile(r"\bfa-([a-z0-9-]+)")
WIDGET_ICONS = {"play", "pause", "stop", "repeat"}  # named only by ipywidgets' Play, at run time


def prune(script: str, used: set[str]) -> str:
    """The script with the used icons only."""

    def keep(entry: re.Match) -> str:
        names = {entry["quoted"] or entry["plain"], *re.findall(r'"([a-z0-9-]+)"', entry["others"])}
        return entry[0] if names & used else ""

    # A list that lost its last entry is left with a comma, which JavaScript allows.
    return ENTRY.sub(keep, script)


def prune_site(app: Sphinx, error: Exception | None) -> None:
    """Read the names from all pages, those of earlier builds included, and from the theme's own scripts."""
    script = Path(app.outdir, "_static/scripts/fontawesome.js")
    if error or not script.exists():
        return
    static = Path(app.outdir, "_static")
    sources = [*Path(app.outdir).rglob("*.html"), *static.glob("*.[jc]s*"), *static.glob("scripts/*theme.js")]
    used = set(WIDGET_ICONS)
    for source in sources:
        used |= set(NAME.findall(source.read_text(encoding="utf-8")))
    script.write_text(prune(script.read_text(encoding="utf-8"), used), encoding="utf-8")
    script.with_suffix(".js.map").unlink(missing_ok=True)


def setup(app: Sphinx) -> dict:
    """At the very end."""
    app.connect("build-finished", prune_site)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
