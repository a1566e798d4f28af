"""How curves are drawn, the same in every plot: each differs also in black and white."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any, NamedTuple

from common.files import printable

# On white and on black.
COLORS = (
    ("#1c6fb8", "#6db3f2"), ("#d9720b", "#f5a04a"), ("#2a8f4e", "#63c983"), ("#8a56b0", "#bd93e0"),
    ("#c93a3a", "#f07a7a"), ("#0f8b8d", "#4fc9c9"), ("#8c6238", "#c9a27a"), ("#c7559a", "#ee8fc6"),
    ("#7d8a1a", "#c3cf5a"),
)  # fmt: skip
# What plotly calls them, and what matplotlib does.
SYMBOLS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v",
    "cross": "P", "star": "*", "x": "X",
}  # fmt: skip
DASHES = {
    "solid": "-", "dash": (0, (5, 2)), "dashdot": (0, (5, 1.5, 1, 1.5)), "longdash": (0, (9, 2)),
    "dot": (0, (1, 1.3)),
}  # fmt: skip


class Style(NamedTuple):
    """A curve's colour on white and on black, its symbol and its dash, by plotly's names."""

    color: str
    on_black: str
    symbol: str
    dash: str

    @property
    def of_line(self) -> dict[str, Any]:
        """Colour and dash for matplotlib."""
        return {"color": self.color, "ls": DASHES[self.dash]}

    @property
    def marker(self) -> str:
        """The symbol for matplotlib."""
        return SYMBOLS[self.symbol]


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    """A style for each name, the same in every plot; `base` is grey."""
    others = [name for name in dict.fromkeys(names) if name != "base"]
    # 9 colours, 8 symbols and 5 dashes go round at different paces, so that 360 styles differ.
    parts = zip(others, cycle(COLORS), cycle(SYMBOLS), cycle(DASHES), strict=False)
    return {"base": Style("#777777", "#9a9a9a", "circle", "dot")} | {
        name: Style(*color, symbol, dash) for name, color, symbol, dash in parts
    }


def plot_text(text: str) -> str:
    """A name as a text for matplotlib: printable, and not read as a formula between $."""
    return printable(text).replace("$", r"\$")
