"""Pieces of a web page that needs no other file: tables, bars, plots. What is not `Markup` is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import StringIO
from typing import Any

#: Colours of series, which can be told apart on white and on black.
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#d946ef")
#: What matplotlib draws axes with; it becomes the colour of the page's text.
INK = "#0a0b0c"

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f5f6f8; --line: #d9dce1; --ink: #1b1f24; --soft: #606873;
  --main: #2563eb; --right: #15803d; --wrong: #b91c1c; --wrong-card: #fdecec; --right-card: #e7f6ec; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1e2228; --line: #363c45; --ink: #e6e8eb;
  --soft: #9aa3af; --main: #7aa7ff; --right: #57c785; --wrong: #ff8080; --wrong-card: #3a1f21;
  --right-card: #16301f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .7rem; padding-top: .8rem;
  border-top: 1px solid var(--line); } h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { margin: .3rem 0 .6rem; } .soft, caption, figcaption { color: var(--soft); } .wide { overflow-x: auto; }
.cards, .plots, .pair { display: grid; gap: 1rem; align-items: start; }
.cards { grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); margin: .6rem 0; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 0 2rem; }
.pair > * { min-width: 0; } .all { grid-column: 1 / -1; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; } .card.main b { color: var(--main); }
.card small { color: var(--soft); display: block; } figure { margin: 0; max-width: 34rem; }
figure svg { width: 100%; height: auto; }
figcaption { font-weight: 600; color: var(--ink); } svg text { font-family: inherit !important; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.full { width: 100%; } caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap; }
td { overflow-wrap: break-word; } table.full td { overflow-wrap: anywhere; }
table.matrix td.number { min-width: 3.2rem; border: 1px solid var(--line); }
.bar { display: inline-block; height: .7em; border-radius: .2em; background: var(--main); vertical-align: baseline; }
.bar.other { background: #f97316; } .right { color: var(--right); } .wrong { color: var(--wrong); }
.word { display: inline-block; margin: 0 .25em .35em 0; } .word small { display: block; line-height: 1.1; }
.word.bad { background: var(--wrong-card); border-radius: .2em; padding: 0 .25em; }
.word.good { background: var(--right-card); border-radius: .2em; padding: 0 .25em; }
mark { background: var(--right-card); color: inherit; border-radius: .2em; padding: 0 .1em; }
@media print { body { max-width: none; } figure, table { break-inside: avoid; } }
"""


class Markup(str):
    """HTML that is written as it is."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """Escaped, unless it is `Markup`."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def element(name: str, *children: Any, **attributes: str) -> Markup:
    """`<name class="...">children</name>`; `class_` stands for `class`."""
    pairs = "".join(f' {key.strip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{pairs}>{''.join(map(text, children))}</{name}>")


def joined(parts: Iterable[Any]) -> Markup:
    """One after another."""
    return Markup("\n".join(map(text, parts)))


def page(title: str, *body: Any) -> str:
    """The whole file."""
    head = Markup(
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{element('title', title)}<style>{CSS}</style>"
    )
    whole = element("html", element("head", head), "\n", element("body", joined(body)), lang="en")
    return f"<!doctype html>\n{whole}\n"


def number(value: Any) -> str:
    """As people read it: 0.8312, 1,234, 2e-05."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and value == value and abs(value) != float("inf")):
        return f"{value:,.0f}"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2g}"


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], *, caption: str = "", class_: str = "") -> Markup:
    """Numbers to the right; without a header, if that is empty. Wide ones scroll on their own."""
    body = [list(row) for row in rows]
    width = len(body[0]) if body else len(header)
    numeric = [bool(body) and all(_is_numeric(row[i]) for row in body) for i in range(width)]

    def cell(name: str, value: Any, right: bool) -> Markup:
        shown = value if isinstance(value, str) else number(value)
        return element(name, shown, class_="number") if right else element(name, shown)

    lines = [element("tr", *(cell("th", v, right) for v, right in zip(header, numeric, strict=True)))] if header else []
    lines += [element("tr", *(cell("td", v, right) for v, right in zip(row, numeric, strict=True))) for row in body]
    titled = [element("caption", caption)] if caption else []
    return element("div", element("table", *titled, *lines, class_=class_), class_="wide")


def _is_numeric(value: Any) -> bool:
    return isinstance(value, int | float) or value == ""


def card(name: str, value: Any, note: str = "", *, main: bool = False) -> Markup:
    """A figure in large letters."""
    small = [element("small", note)] if note else []
    return element("div", name, element("b", number(value)), *small, class_="card main" if main else "card")


def matrix(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Markup:
    """A confusion matrix: a row for each label that was expected, a column for each predicted one."""
    lines = [element("tr", element("th", "expected"), *(element("th", label, class_="number") for label in labels))]
    for index, (label, row) in enumerate(zip(labels, counts, strict=True)):
        total = max(sum(row), 1)
        cells = [
            element(
                "td",
                number(count),
                class_="number",
                style=f"background: color-mix(in srgb, var({'--right' if column == index else '--wrong'}) "
                f"{70 * count / total:.0f}%, transparent)",
            )
            for column, count in enumerate(row)
        ]
        lines.append(element("tr", element("th", label), *cells))
    caption = element(
        "caption", "A row for each expected label, a column for each predicted one; coloured by the share of the row."
    )
    return element("div", element("table", caption, *lines, class_="matrix"), class_="wide")


def bars(groups: Mapping[str, Mapping[str, int]]) -> Markup:
    """Label -> count of each group, as bars below each other; at most two groups."""
    names = list(dict.fromkeys(name for counts in groups.values() for name in counts))
    most = max((count for counts in groups.values() for count in counts.values()), default=1) or 1
    rows = []
    for name in names:
        values = [counts.get(name, 0) for counts in groups.values()]
        drawn = [element("div", _bar(i, 7 * value / most)) for i, value in enumerate(values)]
        rows.append([name, *values, joined(drawn)])
    return table(["", *(joined([_bar(i, 0.7), name]) for i, name in enumerate(groups)), ""], rows)


def _bar(group: int, width: float) -> Markup:
    return element("span", class_="bar other" if group else "bar", style=f"width: {width:.2f}rem")


def figure(title: str, draw: Callable[[Any], None], *, size: tuple[float, float] = (4.0, 2.4)) -> Markup:
    """A plot of matplotlib, as SVG in the page. `draw` is given the axes."""
    import matplotlib
    from matplotlib.figure import Figure

    keys = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color", "grid.color")
    style: Any = {**dict.fromkeys(keys, INK), "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    drawn = StringIO()
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=size, layout="constrained")
        axes = canvas.subplots()
        axes.patch.set_visible(False)
        axes.grid(alpha=0.15)
        axes.set_prop_cycle(color=COLOURS)
        draw(axes)
        canvas.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()[drawn.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", svg)
    svg = svg.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    return element("figure", element("figcaption", title), Markup(svg))
