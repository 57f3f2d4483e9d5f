"""Pieces of the pages that are written for people: style, pictures, tables."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; color: #222; background: #fff; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption, .note { color: #555; font-size: 0.9rem; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
:target { background: #fff3c4; }
nav a { margin-right: 1rem; }
"""


def png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as PNG, without metadata that changes from call to call."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def image(data: bytes, heading: str, caption: str = "") -> str:
    """A PNG inside the page itself."""
    return (
        f'<figure><img alt="{html.escape(heading)}" src="data:image/png;base64,'
        f'{base64.b64encode(data).decode()}">\n'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are text; what is HTML in them is shown as written."""
    titles = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{titles}</tr>\n{body}</table></div>'
