"""A page of HTML that needs no server and no network: its style, tables, boxes of facts."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { --back:#fff; --ink:#1c2024; --dim:#68707a; --line:#e3e6ea; --card:#f7f8fa;
  --c0:#2563eb; --c1:#d9480f; --c2:#2b8a3e; --c3:#862e9c; --c4:#b08800; --c5:#0b7285; }
@media (prefers-color-scheme: dark) { :root { --back:#14171a; --ink:#e6e8ea; --dim:#98a1ab;
  --line:#2c3238; --card:#1b1f23; --c0:#74a5ff; --c1:#ff922b; --c2:#69db7c; --c3:#da77f2;
  --c4:#ffd43b; --c5:#3bc9db; } }
body { background:var(--back); color:var(--ink); margin:0 auto; max-width:1120px; padding:24px;
  font:15px/1.5 system-ui, sans-serif; }
h1 { font-size:24px; margin:0; } h2 { font-size:17px; margin:28px 0 8px; }
.dim { color:var(--dim); }
.facts { display:grid; grid-template-columns:repeat(auto-fill,minmax(190px,1fr)); gap:8px; }
.facts div, figure { background:var(--card); border:1px solid var(--line); border-radius:8px; }
.facts div { padding:8px 12px; } .facts b { display:block; font-size:17px; }
.facts b { overflow-wrap:anywhere; }
.charts { display:grid; gap:12px;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr)); }
figure { margin:0; padding:10px; } figcaption { font-weight:600; padding:0 4px; }
svg { display:block; width:100%; height:auto; } svg text { fill:var(--dim); font-size:12px; }
.mark { stroke:var(--c1); stroke-width:1.2; stroke-dasharray:2 3; }
.key i.marked { height:0; border-top:2px dotted var(--c1); }
.grid { stroke:var(--line); } .curve { fill:none; stroke-width:1.8; }
.faint { opacity:.3; stroke-width:1.2; } .dot { stroke:none; }
.texts td { text-align:left; vertical-align:top; white-space:pre-wrap; max-width:34em;
  overflow-wrap:anywhere; } .texts th { text-align:left; } details { margin:8px 0; }
.bar { opacity:.75; } summary { cursor:pointer; }
.key { margin:2px 4px; font-size:13px; color:var(--dim); }
.key span { margin-right:14px; display:inline-block; }
.key i { display:inline-block; width:14px; height:3px; margin-right:5px; vertical-align:middle; }
table { border-collapse:collapse; width:100%; } th, td { padding:5px 10px; text-align:right;
  border-bottom:1px solid var(--line); } th:first-child, td:first-child { text-align:left; }
pre { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:12px;
  overflow:auto; } .scroll { overflow-x:auto; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page; `parts` are pieces of HTML, `title` is text."""
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def facts_boxes(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values, each pair in a box."""
    boxes = "".join(
        f"<div><span class=dim>{html.escape(name)}</span><b>{html.escape(value)}</b></div>"
        for name, value in facts
    )
    return f"<div class=facts>{boxes}</div>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, the first column to the left, the others to the right."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"
