"""Labels of the bibliography that say what the text says: "Eckart and Young, 1936" in place of "EY36"."""

from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style
from pybtex.style.labels import BaseLabelStyle
from pybtex.style.sorting import BaseSortingStyle
from sphinx.application import Sphinx


def label(entry) -> str:
    """As the reference style `author_year` writes it."""
    people = entry.persons["author"]
    names = [" ".join(map(str, one.rich_prelast_names + one.rich_last_names)) for one in people]
    if len(names) > 2:
        names = [f"{names[0]} et al."]
    return f"{' and '.join(names)}, {entry.fields['year']}"


class Labels(BaseLabelStyle):
    """One label for each entry."""

    def format_labels(self, entries):
        return map(label, entries)


class ByLabel(BaseSortingStyle):
    """In the order of the alphabet."""

    def sorting_key(self, entry):
        return label(entry).lower()


class AuthorYear(Style):
    """The plain style with these labels, in their order."""

    default_label_style = Labels
    default_sorting_style = ByLabel


def setup(app: Sphinx) -> dict:
    """Known to sphinxcontrib-bibtex as the style "kvbook"."""
    register_plugin("pybtex.style.formatting", "kvbook", AuthorYear)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
