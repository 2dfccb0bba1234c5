"""A matrix as a page of HTML, self-contained. Names in models are untrusted: all text is escaped."""

from __future__ import annotations

from html import escape

from onnxq_plugins.edge.matrix import COLUMNS, Matrix

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2329; --soft: #5b6570; --rule: #dde1e5; --mark: #fdf0e4; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e4e7ea; --soft: #a0a9b2; --rule: #343a41; --mark: #33281d; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }
p { color: var(--soft); max-width: 60rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--rule); padding: .3rem .7rem; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.none { background: var(--mark); }
"""
LEGEND = (
    "Run in the runtime that the target is for. integer, fake, float: operators that compute on codes, decode codes and "
    "compute in float, or are float in the file, as the runtime itself tells. dB: the worst output against onnxruntime on "
    "the same QDQ model; dB float, same class (where outputs are classes): against the float model. ms: one thread. Vela "
    "compiles and runs nothing, and times of QNN's simulator mean nothing: no numbers there."
)


def page(matrix: Matrix, title: str) -> str:
    """The page of a matrix."""
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "\n".join(
        f'<tr class="{"" if cell.proof else "none"}">'
        + "".join(f'<td class="{"n" if 3 <= n < 10 else ""}">{escape(text)}</td>' for n, text in enumerate(cell.row()))
        + "</tr>"
        for cell in matrix.cells
    )
    about = f"Each recipe, written for each target. {LEGEND} {matrix.samples} samples; {matrix.machine}."
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)} · onnxq matrix</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n<p>{escape(about)}</p>\n"
        f"<div><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div></body></html>\n"
    )
