"""The pictures of docs/how-it-works.md: graph, use, factor, layout.

`python docs/drawings.py` writes them to docs/images; a test sees that they are what this draws.
Colours follow the reader's light or dark setting, on a card of their own.
"""

from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"

STYLE = """
  svg { --card: #ffffff; --line: #c9d1dc; --ink: #16202c; --soft: #566476; --box: #eef2f8;
        --e0: #1f6feb; --e1: #d9480f; --e2: #2b8a3e; --e3: #8a3ffc; --mark: #1f6feb; }
  @media (prefers-color-scheme: dark) {
    svg { --card: #171e28; --line: #3a4757; --ink: #e8edf4; --soft: #9aa8ba; --box: #222c3a;
          --e0: #6ea8ff; --e1: #ffa057; --e2: #69db7c; --e3: #be95ff; --mark: #6ea8ff; } }
  text { font: 15px system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: var(--ink); }
  .code { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; font-size: 14px; }
  .soft { fill: var(--soft); font-size: 13px; }
  .card { fill: var(--card); stroke: var(--line); }
  .box { fill: var(--box); stroke: var(--line); }
  .saved { fill: var(--card); stroke: var(--mark); stroke-width: 2; }
  .area { fill: none; stroke: var(--soft); stroke-dasharray: 5 5; }
  .arrow { fill: none; stroke: var(--ink); stroke-width: 1.6; marker-end: url(#tip); }
  .back { stroke: var(--mark); stroke-width: 2.4; marker-end: url(#mark); }
  .dashed { stroke-dasharray: 4 4; stroke: var(--soft); }
"""


class Drawing:
    """Shapes on a card."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self.title, self.width, self.height = title, width, height
        self.shapes: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> None:
        where = f'x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}"'
        self.shapes.append(f"<text {where}>{escape(words)}</text>")

    def box(self, x: float, y: float, w: float, h: float, kind: str, style: str = "") -> None:
        css = f' style="{style}"' if style else ""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" class="{kind}"{css}/>'
        )

    def node(self, x: float, y: float, w: float, words: str, under: str = "") -> None:
        """An op of the graph, and what it has saved."""
        self.box(x, y, w, 44, "box")
        self.text(x + w / 2, y + 27, words, "code")
        if under:
            self.box(x + w / 2 - 38, y + 56, 76, 30, "saved")
            self.text(x + w / 2, y + 76, under, "code")

    def arrow(self, path: str, kind: str = "") -> None:
        self.shapes.append(f'<path d="{path}" class="arrow {kind}"/>')

    def cell(self, x: float, y: float, size: float, example: int, strength: float = 1.0) -> None:
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{size - 3:g}" height="{size - 3:g}" rx="3" '
            f'style="fill: var(--e{example}); opacity: {strength:g}"/>'
        )

    def svg(self) -> str:
        tips = "".join(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" markerUnits="userSpaceOnUse" orient="auto-start-reverse">'
            f'<path d="M0 0L10 5L0 10z" style="fill: var(--{colour})"/></marker>'
            for name, colour in (("tip", "ink"), ("mark", "mark"))
        ).replace('markerWidth="7" markerHeight="7"', 'markerWidth="11" markerHeight="11"')
        shapes = "\n".join(self.shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n<defs>{tips}</defs>\n"
            f'<rect x="1" y="1" width="{self.width - 2}" height="{self.height - 2}" rx="10" '
            f'class="card"/>\n{shapes}\n</svg>\n'
        )


def graph() -> Drawing:
    """What the forward pass leaves, and what pergrad asks of the backward pass."""
    d = Drawing("The graph behind the losses: each op has saved its input; the backward pass "
                "brings the gradient at its output", 760, 330)  # fmt: skip
    d.text(24, 34, "forward: each op that uses a parameter keeps the rows a that went in",
           "soft", "start")  # fmt: skip
    d.text(40, 91, "x", "code")
    d.node(90, 64, 130, "Linear", "a = x")
    d.node(282, 64, 110, "ReLU")
    d.node(454, 64, 130, "Linear", "a = h")
    d.node(646, 64, 90, "loss")
    for start, end in ((52, 88), (221, 280), (393, 452), (585, 644)):
        d.arrow(f"M{start} 86H{end}")
    d.text(691, 130, "losses", "code")
    d.text(691, 149, "(B,)", "soft")
    d.text(24, 196, "backward: one pass from losses.sum() brings g, the gradient at each op's "
           "output", "soft", "start")  # fmt: skip
    for start, end in ((644, 587), (452, 395), (280, 223)):
        d.arrow(f"M{start} 232H{end}", "back")
    d.text(615, 222, "g", "code")
    d.text(251, 222, "g", "code")
    for x, w, words in ((90, 130, "g, a"), (282, 110, ""), (454, 130, "g, a"), (646, 90, "")):
        d.box(x, 210, w, 44, "saved" if words else "box")
        d.text(x + w / 2, 237, words, "code")
    for x in (155, 519):
        d.arrow(f"M{x} 255V279", "dashed")
    d.text(155, 298, "weight.grad = Σ g aᵀ", "code")
    d.text(155, 316, "skipped: nobody asked for it", "soft")
    d.text(519, 298, "weight.grad = Σ g aᵀ", "code")
    d.text(519, 316, "skipped", "soft")
    return d


def use() -> Drawing:
    """Where a tied parameter first meets the examples, twice."""
    d = Drawing("A tied weight has two uses: where it is looked up, and where it is multiplied",
                760, 300)  # fmt: skip
    d.box(18, 46, 240, 236, "area")
    d.text(138, 34, "depends on parameters alone", "soft")
    d.text(640, 34, "depends on the examples", "soft")
    d.box(40, 142, 96, 44, "saved")
    d.text(88, 169, "W (V, d)", "code")
    d.node(160, 78, 80, "cast")
    d.node(160, 206, 80, "W.T")
    d.arrow("M136 156C150 150 148 102 158 101")
    d.arrow("M136 172C150 178 148 227 158 228")
    d.node(330, 78, 130, "embedding")
    d.node(520, 78, 90, "layers")
    d.node(520, 206, 90, "matmul")
    d.node(650, 206, 86, "loss")
    d.arrow("M241 100H328", "back")
    d.arrow("M241 228H518", "back")
    d.text(285, 90, "use 1", "soft")
    d.text(380, 218, "use 2", "soft")
    d.text(395, 44, "ids (B, T)", "code")
    d.arrow("M395 52V76")
    d.arrow("M461 100H518")
    d.arrow("M565 123V204")
    d.arrow("M611 228H648")
    d.text(395, 146, "a factor: rows of g", "soft")
    d.text(500, 272, "a factor: pairs g, a", "soft")
    d.text(690, 112, "G[b] is the sum", "soft")
    d.text(690, 130, "of both factors", "soft")
    return d


def factor() -> Drawing:
    """The two ways from (g, a) to the squared norm, neither with all gradients at once."""
    d = Drawing("From the factors g and a of one example to the norm of its gradient: directly, "
                "or by two Gram matrices", 760, 400)  # fmt: skip
    size, T, p, n = 20, 4, 6, 5

    def grid(x: float, y: float, rows: int, columns: int, example: int, even: bool = False) -> None:
        """Cells of some strength; `even`: a symmetric matrix, as Gram matrices are."""
        for i in range(rows):
            for j in range(columns):
                low, high = (min(i, j), max(i, j)) if even else (i, j)
                strength = ((low * 5 + high * 3 + example) % 7 + 2) / 8
                d.cell(x + j * size, y + i * size, size, example, strength)

    d.text(24, 34, "one example b: T rows", "soft", "start")
    grid(60, 76, T, p, 0)
    d.text(60 + p * size / 2, 66, "g[b]  (T, p)", "code")
    grid(60, 196, T, n, 1)
    d.text(60 + n * size / 2, 186, "a[b]  (T, d)", "code")
    d.text(24, 318, "a: what the forward pass saved", "soft", "start")
    d.text(24, 338, "g: what the backward pass brings", "soft", "start")

    d.arrow("M210 106C240 106 240 92 268 92")
    d.text(280, 50, "directly: one example at a time in a buffer", "soft", "start")
    grid(300, 66, p, n, 3)
    d.text(415, 122, "G[b] = Σₜ g[b,t] a[b,t]ᵀ", "code", "start")
    d.text(415, 144, "(p, d), squared and summed", "soft", "start")
    d.text(415, 166, "T · d · p multiply-adds", "soft", "start")

    d.arrow("M210 236C240 236 240 276 268 276")
    d.text(280, 220, "by Gram matrices: G[b] is never formed", "soft", "start")
    grid(300, 236, T, T, 0, even=True)
    d.text(396, 280, "∘")
    grid(412, 236, T, T, 1, even=True)
    d.text(520, 280, "→  Σ  =  |G[b]|²", "code", "start")
    d.text(340, 338, "g gᵀ", "code")
    d.text(452, 338, "a aᵀ", "code")
    d.text(300, 364, "T² · (d + p) multiply-adds; with one row it is |g|² · |a|²", "soft", "start")
    return d


def layout() -> Drawing:
    """Whose row is it: three orders, and the measurement that tells them apart."""
    d = Drawing("Rows of the same tensor in three orders, coloured by the example that owns them",
                760, 330)  # fmt: skip
    size, B, T = 26, 3, 4
    orders = {
        "example-major": [b for b in range(B) for _ in range(T)],
        "sequence-major": [b for _ in range(T) for b in range(B)],
        "routed by the data": [1, 0, 2, 2, 1, 0, 0, 2, 1, 1, 0, 2],
    }
    notes = {
        "example-major": "(B, T, d) flattened",
        "sequence-major": "(T, B, d) flattened",
        "routed by the data": "mixture of experts",
    }
    d.text(24, 34, "twelve rows of one tensor; colour: the example that owns the row", "soft",
           "start")  # fmt: skip
    for k, (name, owners) in enumerate(orders.items()):
        y = 56 + 52 * k
        d.text(24, y + 17, name, "", "start")
        d.text(24, y + 34, notes[name], "soft", "start")
        for i, owner in enumerate(owners):
            d.cell(190 + i * size, y, size, owner)
    d.text(24, 234, "measured: twice the loss of", "", "start")
    d.text(24, 254, "example 1; its rows of g", "", "start")
    d.text(24, 274, "double, exactly", "", "start")
    for i, owner in enumerate(orders["routed by the data"]):
        x = 270 + i * size
        d.cell(x, 240, size, owner, 1.0 if owner == 1 else 0.35)
        d.text(x + 11, 284, "×2" if owner == 1 else "×1", "soft")
    d.text(24, 312, "A row that comes out as anything else depends on several examples: batch "
           "norm, say.", "soft", "start")  # fmt: skip
    for i, words in enumerate(("example 0", "example 1", "example 2")):
        d.cell(560, 62 + 30 * i, size, i)
        d.text(594, 80 + 30 * i, words, "soft", "start")
    return d


DRAWINGS = {"graph": graph, "use": use, "factor": factor, "layout": layout}


if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (IMAGES / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
