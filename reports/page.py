"""Write a comparison's table as Markdown, and its page as one HTML file without links."""

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

import pandas as pd

from common.files import write_whole
from config import CompareConfig
from reports.comparison_tables import REGION_KEYS, half_interval
from reports.equal_rate import QUALITY_NAMES, equal_rate_cells


def markdown(table: pd.DataFrame) -> str:
    """The table of `method_table` as Markdown; the lowest loss of each model is bold."""
    return markdown_of(*table_cells(table))


def markdown_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts as Markdown."""
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for cells in rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def table_cells(table: pd.DataFrame, bold: str = "**{}**") -> tuple[list[str], list[list[str]]]:
    """The heads and the rows of a `method_table` as texts.

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
            f"{row['images']:.0f}", f"{row['bpp']:.4f}", f"{row['psnr']:.2f}",
            *(_digits(row[key], 2) for key in regions), _digits(row["ms_ssim_db"], 2),
            *(cells_of_loss if losses else []), *(_percent(row[key]) for key in groups),
            _seeds(row), _digits(row["steps"]), _digits(row["seconds"]),
        ])  # fmt: skip
    return heads, rows


def _lowest_losses(table: pd.DataFrame) -> set[int]:
    """The index of the row with the lowest loss of each model and objective."""
    known = table.dropna(subset=["true_loss"])
    return set(known.groupby(["model", "objective"])["true_loss"].idxmin())


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


# --- the page -------------------------------------------------------------------------------------

TITLES = {
    "rate_distortion": "Rate and distortion",
    "loss": "True loss over steps and over seconds",
    "trajectories": "On the way",
    "detail": "Pictures",
    "bits": "Where the bits are",
    "probabilities": "Probability of each candidate, temperature 1, default hyper-parameters",
}
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1200px }
body { padding: 0 1rem 3rem; background: #fff; color: #222 }
h1 { font-size: 1.5rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin-top: 2.2rem }
.scroll { overflow-x: auto }
img { width: 100%; min-width: 680px; max-width: 1200px; height: auto }
table { border-collapse: collapse; font-size: .86rem; white-space: nowrap }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
th { border-bottom: 2px solid #888 }
th button { font: inherit; color: inherit; border: 0; background: none; padding: 0 }
th button { cursor: pointer; font-weight: 600 }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
.best { font-weight: 600 }
.note { color: #555; font-size: .9rem }
</style></head><body>
<h1>$title</h1><p class="note">$summary</p>
$sections
<script>
const value = cell => {
  const number = parseFloat(cell.textContent);
  return isNaN(number) ? cell.textContent : number;
};
const compare = (x, y) =>
  typeof x === typeof y ? (x > y) - (x < y) : typeof x === "number" ? -1 : 1;
const sortBy = button => {
  const head = button.parentNode, heads = [...head.parentNode.children];
  const column = heads.indexOf(head), body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...body.rows].sort((a, b) => {
    const order = compare(value(a.cells[column]), value(b.cells[column]));
    return up ? order : -order;
  });
  body.append(...rows);
};
for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => sortBy(button));
</script></body></html>
""")


def write_page(
    path: Path,
    config: CompareConfig,
    images: pd.DataFrame,
    tables: dict[str, pd.DataFrame],
    pictures: dict[str, bytes],
) -> Path:
    """Write the report as one HTML file that opens without a network.

    Args:
        images: the table of `rows_of_shared_images`.
        tables: `table`, `bd` and `equal_rate`, of `method_table`, `bd_table` and
            `equal_rate_table`.
        pictures: the bytes of PNG files by their plot's name, in the order of the page.

    Raises:
        OSError: it cannot be written.
    """
    heads, rows = table_cells(tables["table"], "{}")
    sections = [
        "<h2>Methods</h2>", _html_table(heads, rows, _lowest_losses(tables["table"])),
        '<p class="note">Changes of the true R-D loss are to ' + html.escape(config.anchor)
        + ": of the mean loss, and the mean over images of each image's change with its 95 % "
        "confidence interval over images. The lowest loss of each model and objective is bold. "
        "Losses of different objectives, or of files of a wanted size, are not compared. Inside "
        "is where a map is above its mean. A click on a head sorts.</p>",
    ]  # fmt: skip
    for key, png in pictures.items():
        title = TITLES[key.partition("_")[0] if key not in TITLES else key]
        picture = base64.b64encode(png).decode()
        sections.append(
            f'<h2>{title}</h2><div class="scroll">'
            f'<img alt="{title}" src="data:image/png;base64,{picture}"></div>'
        )
        if key == "rate_distortion":
            sections.append(_equal_rate_section(tables["equal_rate"]))
            sections.append(_bd_section(tables["bd"], config.anchor))
    kinds = " and ".join(sorted(images["rate"].unique()))
    summary = (
        f"{images['image'].nunique()} images of {config.image_set}; {len(config.methods)} methods, "
        f"{len(config.models)} models; seeds: {len(config.used_seeds)}; rates: {kinds}."
    )
    if config.quick:
        summary += " A quick run: few images, short schedules, to be looked at, not to be cited."
    text = PAGE.substitute(title=html.escape(f"Comparison {config.name}"),
                           summary=html.escape(summary), sections="\n".join(sections))  # fmt: skip
    return write_whole(path, lambda file: file.write_text(text, "utf-8", "backslashreplace"))


def _equal_rate_section(table: pd.DataFrame) -> str:
    """The table of `equal_rate_table`; "" if it is empty."""
    if table.empty:
        return ""
    return (
        "<h2>Quality of others at equal rates</h2>" + _html_table(*equal_rate_cells(table), set())
        + '<p class="note">Our lead is in brackets. Codecs are compared at the rate of each image, '
        "on the images that they reach; published curves at the mean rate, perhaps of other "
        "images.</p>"
    )  # fmt: skip


def _bd_section(bd: pd.DataFrame, anchor: str) -> str:
    """The table of Bjontegaard deltas, one row for each curve and quality; "" if none is known."""
    if "bd_rate_akima" not in bd or bd["bd_rate_akima"].isna().all():
        return ""
    heads = ["curve", "quality", "anchor", "images", "BD-rate, mean curve (Akima)", "(PCHIP)",
             "BD-dB, mean curve (Akima)", "points", "overlap", "BD-rate, mean over images",
             "no number, for"]  # fmt: skip
    rows = []
    curves = bd.groupby(["curve", "quality"], sort=False)
    for (curve, quality), own in curves:
        bd_of = own.reindex(columns=["bd_rate_akima", "bd_rate_pchip", "bd_db_akima", "reason",
                                     "points", "overlap", "image", "anchor"])  # fmt: skip
        mean = bd_of[bd_of["image"] == "(mean curve)"].iloc[0]
        each = bd_of.loc[bd_of["image"] != "(mean curve)", "bd_rate_akima"].dropna()
        rows.append([
            curve, QUALITY_NAMES[quality], mean["anchor"], str(len(each)),
            _percent(mean["bd_rate_akima"]), _percent(mean["bd_rate_pchip"]),
            "" if pd.isna(mean["bd_db_akima"]) else f"{mean['bd_db_akima']:+.3f} dB",
            mean["points"], "" if pd.isna(mean["overlap"]) else f"{100 * mean['overlap']:.0f} %",
            _percent(each.mean(), half_interval(each)) if len(each) else "",
            "" if pd.isna(mean["reason"]) else mean["reason"],
        ])  # fmt: skip
    if not rows:
        return ""
    return ("<h2>Bjontegaard deltas to " + html.escape(anchor) + "</h2>"
            + _html_table(heads, rows, set()))  # fmt: skip


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], best: set[int]) -> str:
    """An HTML table of unescaped cells; the rows of the indices `best` are bold."""
    head = "".join(f'<th><button type="button">{html.escape(one)}</button></th>' for one in heads)
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="best">{cells}</tr>' if index in best else f"<tr>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
