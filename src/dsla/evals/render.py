"""A report as Markdown, and as one HTML file that needs nothing from outside."""

from __future__ import annotations

import html
import re

from dsla.evals.plots import plots
from dsla.evals.tables import Report, Table, tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { max-width: 75ch; } .about { color: #555; font-size: 0.9rem; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.82rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #e4e4e4; text-align: left; white-space: nowrap; vertical-align: top; }
th { border-bottom: 2px solid #bbb; } td:first-child { font-weight: 600; } td.long { white-space: normal; }
"""


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = [f"# {_title(report)}", _about(report)]
    for table in tables(report):
        parts += [f"## {table.title}", table.text, _markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def to_html(report: Report) -> str:
    """The report as a web page, its pictures in it."""
    drawn, title = plots(report), html.escape(_title(report))
    parts = [f"<h1>{title}</h1>", f'<p class="about">{html.escape(_about(report))}</p>']
    for table in tables(report):
        parts += [f"<h2>{html.escape(table.title)}</h2>", f"<p>{html.escape(table.text)}</p>"]
        if table.plot in drawn:
            parts.append(f'<div class="wide">{drawn[table.plot]}</div>')
        parts.append(_html_table(table))
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(parts) + "\n</body>\n</html>\n"


def _title(report: Report) -> str:
    return f"What is left of {report['about']['model']} at each level"


def _about(report: Report) -> str:
    about = report["about"]
    adapter = about["adapter"]
    return (
        f"Suite {about['suite']}, {about['dtype']} on {about['device']}; weights {about['model_sha256'][:12]}, "
        f"{'adapter ' + adapter[:12] if adapter else 'no adapter'}; dsla {about['dsla']}, torch {about['torch']}; "
        f"{report['made']}."
    )


def _markdown_table(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = ["".join(_cell(cell) for cell in row) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _cell(text: str) -> str:
    kind = ' class="long"' if len(text) > 60 else ""
    return f"<td{kind}>{re.sub(r'[*]{2}(.+?)[*]{2}', r'<b>' + chr(92) + '1</b>', html.escape(text))}</td>"
