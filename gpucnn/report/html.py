"""HTML and SVG as nested calls that escape all text, and the page around them."""
from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from gpucnn.files import one_line

_VOID = {"br", "img", "link", "meta"}


class Markup(str):
    """Text that is HTML already. Every other text is escaped where it becomes part of some."""


def tag(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """An element of HTML or SVG.

    content: markup, other values as escaped text, None for nothing, or iterables of them.
    attributes: class_ stands for class, aria_label for aria-label, and None for none at all.
    """
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
                    for key, value in attributes.items() if value is not None)
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(content)}</{name}>")


def join(content: Any) -> Markup:
    """Content as tag() takes it, as markup."""
    if content is None:
        return Markup()
    if isinstance(content, Markup):
        return content
    if isinstance(content, Iterable) and not isinstance(content, str):
        return Markup("".join(map(join, content)))
    return escape(content)


def escape(value: Any) -> Markup:
    """A value as text, on one line, with nothing in it that a browser takes for markup."""
    return Markup(html.escape(one_line(value)))


def table(caption: str, header: Sequence[Any], rows: Iterable[Sequence[Any]], *, names: int = 1,
          footer: Iterable[Sequence[Any]] = (), class_: str = "") -> Markup:
    """A table that scrolls inside its own box where it is wider than the page, or very long.

    names: the first columns, which hold text; the first is the header of its row. All others hold
        numbers, set to the right.
    """
    def row(cells: Sequence[Any]) -> Markup:
        first, *others = cells
        return tag("tr", tag("th", first, scope="row"), (
            tag("td", cell, class_="text" if i < names else None)
            for i, cell in enumerate(others, 1)))

    head = tag("tr", (tag("th", cell, scope="col", class_="text" if i < names else None)
                      for i, cell in enumerate(header)))
    foot = [row(cells) for cells in footer]
    return scroll(caption, tag(
        "table", tag("caption", caption, class_="unseen"), tag("thead", head),
        tag("tbody", map(row, rows)), tag("tfoot", foot) if foot else None, class_=class_ or None))


def scroll(label: str, *content: Any) -> Markup:
    """A box that scrolls by itself, by the keyboard too."""
    return tag("div", content, class_="scroll", role="region", tabindex="0", aria_label=label)


def section(name: str, title: str, explanation: Any, *content: Any) -> Markup:
    """A part of the page under a heading. name: of its anchor."""
    return tag("section", tag("h2", title, id=f"{name}-title"),
               tag("p", explanation, class_="explanation") if explanation else None,
               content, id=name, aria_labelledby=f"{name}-title")


def page(title: str, *body: Any) -> bytes:
    """The whole file. Its policy lets the browser load nothing but what is in it, and run nothing.
    """
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
              "form-action 'none'")
    head = tag(
        "head", tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title), tag("link", rel="icon", href="data:,"), tag("style", Markup(style)))
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n".encode()
