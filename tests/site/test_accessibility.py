"""axe-core finds nothing on any page, in light or dark, but what the theme itself brings (ALLOWED)."""

import pytest
from conftest import ROOT

AXE = ROOT / ".venv" / "share" / "axe-core" / "axe.min.js"
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}

# Rule and selector, and why it is let through. Only what the theme brings.
ALLOWED = [
    # The theme's two buttons show more than their label says: the keys Ctrl K; the icon of each mode.
    ("label-content-name-mismatch", ".search-button-field"),
    ("label-content-name-mismatch", ".theme-switch-button"),
]

FIND = """async ([rules, allowed]) => {
  const { violations } = await axe.run(document, rules);
  const known = (rule, node) =>
    allowed.some(([r, selector]) => r === rule && document.querySelector(node.target[0])?.matches(selector));
  return violations.flatMap((violation) => violation.nodes
    .filter((node) => !known(violation.id, node))
    .map((node) => `${violation.id} at ${node.target.join(" ")}: ${node.html.slice(0, 200)}`));
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(desk, theme):
    page = desk.page
    page.emulate_media(color_scheme=theme)
    page.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme)
    page.wait_for_timeout(300)  # colours fade over
    if not page.evaluate("'axe' in window"):
        page.add_script_tag(path=str(AXE))
    found = page.evaluate(FIND, [RULES, ALLOWED])
    page.emulate_media(color_scheme="light")
    assert found == []
