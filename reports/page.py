"""Write a comparison's page: one HTML file with plotly in it, which opens without a network.

page.html is its frame, page.css its looks, page.js draws its plots and pictures from the values of
`page_data`.
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

import pandas as pd
from plotly.offline import get_plotlyjs

from common.files import printable, write_whole
from common.records import Record
from config import CompareConfig
from reports.compared_run import ComparedRun
from reports.comparison_tables import REGION_KEYS, Tables
from reports.page_data import (
    change_data,
    curve_data,
    short,
    style_data,
    trajectory_data,
)
from reports.page_tables import Cells, bd_cells, equal_rate_cells, html_table, method_cells
from reports.styles import Style

FRAME = Path(__file__).parent


class Shown(NamedTuple):
    """What a page shows.

    answer: see `answer.answer`. trajectories: the mean trajectory of each run. styles: of all
    curves. pictures: of `picture_data`. remarks: such as what is not done yet.
    """

    answer: str
    tables: Tables
    trajectories: dict[ComparedRun, pd.DataFrame]
    styles: dict[str, Style]
    pictures: Sequence[Record]
    remarks: Sequence[str] = ()


def write_page(path: Path, config: CompareConfig, shown: Shown) -> Path:
    """Write the page.

    Raises:
        OSError: it cannot be written.
    """
    remarks = [f"{printable(remark[:1].upper() + remark[1:])}." for remark in shown.remarks]
    data = short({
        "anchor": printable(config.anchor),
        "styles": style_data(shown.styles),
        "changes": change_data(shown.tables.methods, shown.tables.shared, config.anchor),
        "curves": curve_data(shown.tables.curves),
        "trajectories": trajectory_data(shown.trajectories),
        "pictures": shown.pictures,
    })  # fmt: skip
    text = Template((FRAME / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"Comparison {config.name}"),
        answer=html.escape(printable(shown.answer)),
        summary=html.escape(" ".join([_summary(config, shown.tables.shared), *remarks])),
        tables="\n".join(_sections(config, shown.tables)),
        style=(FRAME / "page.css").read_text(encoding="utf-8"),
        script=(FRAME / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        # "<" could end the element that holds it.
        data=json.dumps(data).replace("<", "\\u003c"),
    )
    return write_whole(path, lambda file: file.write_text(text, "utf-8", "backslashreplace"))


def _summary(config: CompareConfig, images: pd.DataFrame) -> str:
    """What is compared, in a line."""
    rates = {"estimate": "the model's estimates", "file": "those of the files"}
    parts = [
        f"{_number(images['image'].nunique(), 'image')} of {config.image_set}" + (
            f" ({config.centre_crop}x{config.centre_crop} pixels in the centre)"
            if config.centre_crop else ""
        ),
        _number(len({*images["method"]} - {"base"}), "method"),
        _number(images["model"].nunique(), "model"), _number(images["seed"].nunique(), "seed"),
        f"rates are {' and '.join(rates[kind] for kind in sorted(images['rate'].unique()))}",
    ]  # fmt: skip
    text = ", ".join(parts) + "."
    if config.quick:
        text += " A quick run: few images, short schedules, to be looked at, not to be cited."
    return text


def _number(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _sections(config: CompareConfig, tables: Tables) -> list[str]:
    """The sections with tables; those without rows are left out."""
    anchor = printable(config.anchor)
    sections = [
        ("Methods", method_cells(tables.methods), _note_on_methods(tables.methods, anchor)),
        (f"Bjøntegaard deltas to {anchor}", bd_cells(tables.bd),
         "Akima interpolation; per image: the mean of the images' BD-rates with its 95 % interval. "
         "bd.csv has PCHIP, overlaps and every image. "),
        ("Quality of others at equal rates", equal_rate_cells(tables.equal_rate),
         "Our lead is in brackets. Codecs are compared at the rate of each image, on the images "
         "that they reach; published curves at the mean rate, perhaps of other images. "),
    ]  # fmt: skip
    return [_section(*section) for section in sections if section[1].rows]


def _note_on_methods(table: pd.DataFrame, anchor: str) -> str:
    """How to read the table of `method_table`."""
    notes = ["A click on a head sorts. "]
    if table["true_loss"].notna().any():
        notes.insert(0, (
            f"Changes of the true loss are to {anchor}: of the mean loss, and the mean of the "
            "images' changes with its 95 % confidence interval. The lowest loss of each model and "
            "objective is bold. "
        ))  # fmt: skip
        if table["objective"].nunique() > 1:
            notes.append("Losses of different objectives are not compared. ")
    else:
        notes.append("Each file has a lambda of its own, so losses are not compared. ")
    if REGION_KEYS[0] in table:
        notes.append("Inside is where a map is above its mean. ")
    return "".join(notes)


def _section(title: str, cells: Cells, note: str) -> str:
    table, common = html_table(cells)
    return (
        f'<section><h2>{html.escape(title)}</h2><div class="scroll">{table}</div>'
        f'<p class="note">{html.escape(note + common)}</p></section>'
    )
