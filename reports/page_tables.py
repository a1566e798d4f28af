"""The tables of a comparison as texts: as Markdown, and as HTML of the page."""

import html
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from common.records import Record
from reports.comparison_tables import REGION_KEYS, half_interval
from reports.equal_rate import LEAD, QUALITY_NAMES

# No line ends before the percent sign at the end of a cell.
PERCENT, NO_BREAK_PERCENT = re.compile(" %$"), "\u00a0%"


class Cells(NamedTuple):
    """A table of texts.

    heads: one for each column. rows: the cells. bold: the indices of rows that stand out. minor:
    the heads of columns that a narrow screen leaves out.
    """

    heads: list[str]
    rows: list[list[str]]
    bold: frozenset[int] = frozenset()
    minor: frozenset[str] = frozenset()

    def without(self, heads: Sequence[str]) -> "Cells":
        """The same table without some columns."""
        kept = [index for index, head in enumerate(self.heads) if head not in heads]
        return self._replace(
            heads=[self.heads[index] for index in kept],
            rows=[[row[index] for index in kept] for row in self.rows],
        )

    def column(self, head: str) -> list[str]:
        """The cells of a column."""
        return [row[self.heads.index(head)] for row in self.rows]


# --- Markdown -------------------------------------------------------------------------------------


def markdown(table: pd.DataFrame) -> str:
    """The table of `method_table` as Markdown; the lowest loss of each model is bold."""
    return markdown_of(method_cells(table, "**{}**"))


def markdown_of(cells: Cells) -> str:
    """A table of texts as Markdown."""
    lines = ["| " + " | ".join(cells.heads) + " |", "|---" * len(cells.heads) + "|"]
    for row in cells.rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


# --- the cells ------------------------------------------------------------------------------------


def method_cells(table: pd.DataFrame, bold: str = "{}") -> Cells:
    """The texts of a `method_table`.

    Args:
        bold: the format of the lowest loss of each model; {} stands for the loss.
    """
    losses = table["true_loss"].notna().any()  # none with a target
    mixed = not losses or table["objective"].nunique() > 1
    regions = [key for key in REGION_KEYS if key in table and table[key].notna().any()]
    groups = [key for key in table if key.startswith("group: ")] if losses else []
    of_loss = ["loss" if mixed else f"loss, {table['objective'].iloc[0]}", "change of mean loss",
               "change per image"]  # fmt: skip
    heads = ["model", "method", *(["objective"] if mixed else []), "images", "bpp", "PSNR (dB)",
             *(key.replace("psnr_", "PSNR ") for key in regions), "MS-SSIM (dB)",
             *(of_loss if losses else []), *(key.removeprefix("group: ") for key in groups),
             "seeds", "steps", "s per image"]  # fmt: skip
    best = _lowest_losses(table)
    rows = []
    for index, row in table.iterrows():
        loss = _digits(row["true_loss"], 4)
        cells_of_loss = [
            bold.format(loss) if index in best else loss, _percent(row["change_of_mean_percent"]),
            _percent(row["change_percent"], row["half_interval"]),
        ]  # fmt: skip
        rows.append([
            row["model"], row["method"], *([row["objective"]] if mixed else []),
            f"{row['images']:.0f}", f"{row['bpp']:.4f}", _digits(row["psnr"], 2),
            *(_digits(row[key], 2) for key in regions), _digits(row["ms_ssim_db"], 2),
            *(cells_of_loss if losses else []), *(_percent(row[key]) for key in groups),
            _seeds(row), _digits(row["steps"]), _digits(row["seconds"]),
        ])  # fmt: skip
    minor = ("images", "MS-SSIM (dB)", "seeds", "steps", "s per image", *of_loss[:2])
    return Cells(heads, rows, frozenset(best), frozenset(minor))


def bd_cells(bd: pd.DataFrame) -> Cells:
    """One row for each curve of a `bd_table`: BD-rates by PSNR and by MS-SSIM; no rows if unknown.

    The rest of what the table knows is in bd.csv.
    """
    heads = ["curve", "BD-rate, PSNR", "BD-PSNR", "per image", "BD-rate, MS-SSIM", "remark"]
    if "bd_rate_akima" not in bd or bd["bd_rate_akima"].isna().all():
        return Cells(heads, [])
    rows = []
    for curve, own in bd.groupby("curve", sort=False):
        mean, each = _bd_of(own[own["quality"] == "psnr"])
        similarity, _ = _bd_of(own[own["quality"] == "ms_ssim_db"])
        db, reason = mean.get("bd_db_akima", math.nan), mean.get("reason", "")
        rows.append([
            str(curve), _percent(mean.get("bd_rate_akima", math.nan)),
            "" if pd.isna(db) else f"{db:+.3f} dB",
            _percent(each.mean(), half_interval(each)) if len(each) else "",
            _percent(similarity.get("bd_rate_akima", math.nan)),
            "" if pd.isna(reason) else str(reason),
        ])  # fmt: skip
    return _without_empty(Cells(heads, rows, minor=frozenset(heads[2:])))


def _bd_of(own: pd.DataFrame) -> tuple[Record, pd.Series]:
    """The row of the mean curve of one quality, empty if unknown, and the images' BD-rates."""
    of_mean = own["image"] == "(mean curve)"
    rows = own[of_mean].to_dict("records")
    return rows[0] if rows else {}, own.loc[~of_mean, "bd_rate_akima"].dropna()


def equal_rate_cells(table: pd.DataFrame) -> Cells:
    """The texts of an `equal_rate_table`, with the leads in brackets."""
    others = [key.removeprefix(LEAD) for key in table if key.startswith(LEAD)]
    heads = ["model", "method", "quality", "images", "bpp", "dB", *others]
    rows = [
        [row["model"], row["curve"], QUALITY_NAMES[row["quality"]], str(row["images"]),
         f"{row['bpp']:.4f}", f"{row['dB']:.2f}", *(_other(row, name) for name in others)]
        for _, row in table.iterrows() if any(row[f"images of {other}"] for other in others)
    ]  # fmt: skip
    return Cells(heads, rows, minor=frozenset({"images", "dB"}))


def _other(row: pd.Series, name: str) -> str:
    """dB and lead; with the number of images if some have none; empty if all have none."""
    images = row[f"images of {name}"]
    if not images:
        return ""
    text = f"{row[f'dB of {name}']:.2f} ({row[LEAD + name]:+.2f})"
    return text if images == row["images"] else f"{text}, {images:.0f} of {row['images']} images"


def _lowest_losses(table: pd.DataFrame) -> set[int]:
    """The index of the row with the lowest loss of each model and objective."""
    known = table.dropna(subset=["true_loss"])
    return set(known.groupby(["model", "objective"])["true_loss"].idxmin())


def _without_empty(cells: Cells) -> Cells:
    return cells.without([head for head in cells.heads if not any(cells.column(head))])


def _percent(value: float, half: float = math.nan) -> str:
    if math.isnan(value):
        return ""
    return f"{value:+.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}") + " %"


def _digits(value: float, digits: int = 0) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _seeds(row: pd.Series) -> str:
    """The number of seeds, and the standard deviation of the loss over them."""
    spread = row["seed_spread_percent"]
    return _digits(row["seeds"]) + ("" if math.isnan(spread) else f" (std {spread:.2f} %)")


# --- HTML -----------------------------------------------------------------------------------------


def html_table(cells: Cells) -> tuple[str, str]:
    """A table as HTML that fits its screen, and a sentence on what all its rows have in common.

    The first column becomes a head over the rows that share it, if it is the model. A column with
    one value is left out and told in the sentence; an empty one is left out.
    """
    constant = {
        head: values.pop()
        for head in cells.heads
        if head in ("images", "seeds", "model", "quality", "objective")
        and len(values := set(cells.column(head)) - {""}) == 1
    }
    shown = _without_empty(cells.without(list(constant)))
    grouped = shown.heads[0] == "model"
    heads = shown.heads[1:] if grouped else shown.heads
    minor = [head in shown.minor for head in heads]
    bodies = []
    for model in dict.fromkeys(shown.column("model")) if grouped else [""]:
        lines = [
            _line(row[grouped:], minor, index in shown.bold)
            for index, row in enumerate(shown.rows)
            if not grouped or row[0] == model
        ]
        over = f'<tr class="group"><th colspan="{len(heads)}">{html.escape(model)}</th></tr>'
        bodies.append(f"<tbody>{over if grouped else ''}{''.join(lines)}</tbody>")
    head = "".join(
        f'<th{_class(is_minor)}><button type="button">{html.escape(one)}</button></th>'
        for one, is_minor in zip(heads, minor, strict=True)
    )
    table = f"<table><thead><tr>{head}</tr></thead>{''.join(bodies)}</table>"
    common = ", ".join(f"{head} {value}" for head, value in constant.items())
    return table, f"Wherever known: {common}." if common else ""


def _line(row: Sequence[str], minor: Sequence[bool], bold: bool) -> str:
    cells = "".join(
        f"<td{_class(is_minor)}>{html.escape(PERCENT.sub(NO_BREAK_PERCENT, cell))}</td>"
        for cell, is_minor in zip(row, minor, strict=True)
    )
    return f'<tr class="best">{cells}</tr>' if bold else f"<tr>{cells}</tr>"


def _class(is_minor: bool) -> str:
    return ' class="minor"' if is_minor else ""
