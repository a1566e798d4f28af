"""What a comparison leaves behind: tables, plots, and the page that shows them.

results/<save_name>/
    report.html              all of it in one file that needs no network
    table.csv, table.md      means, and paired differences to the anchor with confidence intervals
    bd.csv                   Bjontegaard deltas to the anchor, per image and of the mean curve
    images.csv, codecs.csv   every image of every run; the classical codecs
    curves.csv               the points of the rate-distortion curves
    compressai/              the same points in the layout that CompressAI's plot tool reads
    *.png, *.svg             the plots
"""

import base64
import html
import math
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from architectures import Architecture, Latents
from common.files import fitting, printable, write_whole
from config import CompareConfig, RefineConfig, folder_name
from datasets import open_images
from figures import (
    ComparedRun,
    Detail,
    colors_of,
    first_seeds,
    plot_bits,
    plot_curves,
    plot_details,
    plot_loss,
    plot_probabilities,
    plot_trajectories,
)
from models import freeze, load_checkpoint
from reporting import read_records, result_file, write_json
from tables import (
    bd_table,
    codec_curves,
    codec_table,
    comparable,
    curve_points,
    half_interval,
    image_table,
    mean_points,
    method_table,
    published_curves,
)

LARGEST_SHOWN = 4_000_000  # pixels; larger images are in the tables alone


# --- pictures -------------------------------------------------------------------------------------


@torch.no_grad()
def details_of(runs: Sequence[ComparedRun], config: RefineConfig, name: str) -> list[Detail] | None:
    """An image as it was, coded without refinement, and as each run of one model coded it.

    None where a run lacks it, or where it is too large to be shown, which is said.
    """
    records = [read_records(run.folder / "images.jsonl").get(name) for run in runs]
    (image,) = open_images(config).load([name], 0)
    if image.x is None or not all(records) or image.x[0].numel() > LARGEST_SHOWN:
        print(f"{printable(name)}: no pictures, for it is too large or some method lacks it")
        return None
    model = freeze(load_checkpoint(config.pretrain), config.coder_scales)
    x = image.x[None]  # [1, 3, H, W]
    details = [Detail("original", image.x, None, None, None)]
    base = model.symbols(model.analyze(x), (x.size(2), x.size(3)))
    details.append(_detail(model, "base", base, records[0]["base"], x))
    for run, record in zip(runs, records, strict=True):
        with np.load(result_file(run.folder, "latents", name, ".npz")) as arrays:
            symbols = {latent: torch.from_numpy(v)[None] for latent, v in arrays.items()}
        details.append(_detail(model, run.method, symbols, record["refined"], x))
    return details


def _detail(
    model: Architecture, label: str, symbols: Latents, values: dict, x: torch.Tensor
) -> Detail:
    size = x.size(2), x.size(3)
    walk = model.place(symbols, size)
    x_hat = model.synthesize(walk.y_hat, size).clamp(0, 1)[0]
    likelihoods = walk.likelihoods[walk.groups[-1].name]
    bits = -likelihoods.log2().sum(1)[0]  # [h, w]
    return Detail(label, x_hat, values.get("file_bpp", values["bpp"]), values["psnr"], bits)


# --- writing --------------------------------------------------------------------------------------


def write_report(
    config: CompareConfig, runs: Sequence[ComparedRun], refine_config: RefineConfig
) -> Path | None:
    """Every table, plot and the page; prints the main table.

    Args:
        refine_config: of any run with the first model, which opens the images.

    Returns:
        The page's path, or None where no image was refined by every method.

    Raises:
        InputError: a published curve cannot be read. OSError: a file cannot be written.
    """
    folder = Path(config.output_dir) / config.name
    images = image_table(runs, open_images(refine_config).names[: refine_config.image_count])
    shared = comparable(images)
    if shared.empty:
        print(f"error: {folder}: no image was refined by every method", file=sys.stderr)
        return None
    dropped = sorted({*images["image"]} - {*shared["image"]})
    if dropped:
        lost = printable(", ".join(dropped))
        print(f"not compared, for some method lacks them: {lost}")
    table, points = method_table(shared, config), curve_points(shared, config)
    counts = shared.groupby("image")["model"].nunique()
    everywhere = [name for name in counts.index if counts[name] == shared["model"].nunique()]
    codecs = codec_table(refine_config, everywhere, config.codecs, folder / "codecs.csv")
    curves = pd.concat([
        mean_points(points), codec_curves(codecs), published_curves(config.published)
    ])  # fmt: skip
    bd = bd_table(points, config)
    tables = {"images": images, "table": table, "bd": bd, "curves": curves}
    if len(codecs):
        tables["codecs"] = codecs
    for key, values in tables.items():
        if "image" in values:
            values = values.assign(image=values["image"].map(printable))
        write_whole(folder / f"{key}.csv", partial(values.to_csv, index=False))
    text = markdown(table)
    write_whole(folder / "table.md", lambda file: file.write_text(text, "utf-8"))
    write_for_compressai(folder, points)
    names = {model: list(own["image"].unique()) for model, own in shared.groupby("model")}
    figures = all_figures(config, runs, refine_config, curves, names)
    for plot in [*folder.glob("detail_*"), *folder.glob("bits_*")]:
        plot.unlink()  # of a run before that showed more
    pictures = {key: _saved(folder / key, figure) for key, figure in figures.items()}
    page = write_page(folder / "report.html", config, shared, table, bd, pictures)
    print(f"\n{text}\ntables:   {folder}\nreport:   {page}")
    return page


def write_for_compressai(folder: Path, points: pd.DataFrame) -> None:
    """The curves as files that CompressAI's plot tool reads, of each image and of the means.

    Raises:
        OSError: a file cannot be written.
    """
    # What a comparison before left, of methods that are none any more.
    shutil.rmtree(folder / "compressai", ignore_errors=True)
    every = pd.concat([points, mean_points(points).assign(image="mean")])
    for (image, curve), own in every.groupby(["image", "curve"], sort=False):
        own = own.sort_values("bpp")
        results = {"bpp": list(own["bpp"]), "psnr-rgb": list(own["psnr"])}
        if own["ms_ssim_db"].notna().all():
            # The tool turns similarities into dB itself.
            results["ms-ssim-rgb"] = list(1 - 10 ** (-own["ms_ssim_db"] / 10))
        path = folder / "compressai" / fitting(str(image)) / f"{folder_name(curve)}.json"
        write_json(path, {"name": curve, "description": str(image), "results": results})


def all_figures(
    config: CompareConfig,
    runs: Sequence[ComparedRun],
    refine_config: RefineConfig,
    curves: pd.DataFrame,
    names: dict[str, Sequence[str]],
) -> dict[str, Figure]:
    """Every plot of a report by its file's name; `names` are the images that count, by model."""
    model = runs[0].model
    own = names.get(model, [])
    colors = colors_of([*config.methods, *curves.loc[~curves["dashed"].astype(bool), "curve"]])
    of_model = first_seeds(runs, model)
    figures = {
        "rate_distortion": plot_curves(curves, colors),
        "loss": plot_loss(runs, names, colors),
        "trajectories": plot_trajectories(runs, model, own, colors),
    }
    for number, name in enumerate(own[: config.shown], start=1):
        details = details_of(of_model, refine_config, name)
        if details is not None:
            figures[f"detail_{number}"] = plot_details(name, details)
            figures[f"bits_{number}"] = plot_bits(name, details)
    return figures | {"probabilities": plot_probabilities()}


def _saved(path: Path, figure: Figure) -> bytes:
    """Writes a figure as PNG and SVG; the PNG's bytes."""
    for suffix in ("png", "svg"):
        write_whole(path.with_suffix(f".{suffix}"), figure.savefig)
    return path.with_suffix(".png").read_bytes()


def markdown(table: pd.DataFrame) -> str:
    """The table for people, the lowest loss of each model in bold; changes are to the anchor."""
    heads, rows = table_cells(table)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for cells in rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def table_cells(table: pd.DataFrame, bold: str = "**{}**") -> tuple[list[str], list[list[str]]]:
    """Heads and cells of `method_table` as they are shown."""
    groups = [key for key in table if key.startswith("group: ")]
    heads = ["model", "method", "images", "bpp", "PSNR (dB)", "MS-SSIM (dB)", "loss",
             "change of mean loss", "change per image",
             *(key.removeprefix("group: ") for key in groups), "seeds", "steps",
             "s per image"]  # fmt: skip
    best = set(table.groupby("model")["true_loss"].idxmin())
    rows = []
    for index, row in table.iterrows():
        loss = f"{row['true_loss']:.4f}"
        rows.append([
            row["model"], row["method"], f"{row['images']:.0f}", f"{row['bpp']:.4f}",
            f"{row['psnr']:.2f}", _digits(row["ms_ssim_db"], 2),
            bold.format(loss) if index in best else loss, _percent(row["change_of_mean_percent"]),
            _percent(row["change_percent"], row["half_interval"]),
            *(_percent(row[key]) for key in groups), _seeds(row), _digits(row["steps"]),
            _digits(row["seconds"]),
        ])  # fmt: skip
    return heads, rows


def _percent(value: float, half: float = math.nan) -> str:
    if math.isnan(value):
        return ""
    return f"{value:+.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}") + " %"


def _digits(value: float, digits: int = 0) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _seeds(row: pd.Series) -> str:
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
    table: pd.DataFrame,
    bd: pd.DataFrame,
    pictures: dict[str, bytes],
) -> Path:
    """The report as one HTML file that opens without a network.

    Raises:
        OSError: it cannot be written.
    """
    heads, rows = table_cells(table, "{}")
    best = set(table.groupby("model")["true_loss"].idxmin())
    sections = [
        "<h2>Methods</h2>", _html_table(heads, rows, best),
        '<p class="note">Changes of the true R-D loss are to ' + html.escape(config.anchor)
        + ": of the mean loss, and the mean over images of each image's change with its 95 % "
        "confidence interval over images. The lowest loss of each model is bold. A click on a "
        "head sorts.</p>",
    ]  # fmt: skip
    for key, png in pictures.items():
        title = TITLES[key.partition("_")[0] if key not in TITLES else key]
        picture = base64.b64encode(png).decode()
        sections.append(
            f'<h2>{title}</h2><div class="scroll">'
            f'<img alt="{title}" src="data:image/png;base64,{picture}"></div>'
        )
        if key == "rate_distortion":
            sections.append(_bd_section(bd, config.anchor))
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


def _bd_section(bd: pd.DataFrame, anchor: str) -> str:
    heads = ["curve", "anchor", "images", "BD-rate, mean curve (Akima)", "(PCHIP)",
             "BD-PSNR, mean curve (Akima)", "points", "overlap", "BD-rate, mean over images",
             "no number, for"]  # fmt: skip
    rows = []
    for curve, own in bd.groupby("curve", sort=False) if len(bd) else ():
        bd_of = own.reindex(columns=["bd_rate_akima", "bd_rate_pchip", "bd_psnr_akima", "reason",
                                     "points", "overlap", "image", "anchor"])  # fmt: skip
        mean = bd_of[bd_of["image"] == "(mean curve)"].iloc[0]
        each = bd_of.loc[bd_of["image"] != "(mean curve)", "bd_rate_akima"].dropna()
        rows.append([
            curve, mean["anchor"], str(len(each)), _percent(mean["bd_rate_akima"]),
            _percent(mean["bd_rate_pchip"]),
            "" if pd.isna(mean["bd_psnr_akima"]) else f"{mean['bd_psnr_akima']:+.3f} dB",
            mean["points"], "" if pd.isna(mean["overlap"]) else f"{100 * mean['overlap']:.0f} %",
            _percent(each.mean(), half_interval(each)) if len(each) else "",
            "" if pd.isna(mean["reason"]) else mean["reason"],
        ])  # fmt: skip
    if not rows:
        return ""
    return ("<h2>Bjontegaard deltas to " + html.escape(anchor) + "</h2>"
            + _html_table(heads, rows, set()))  # fmt: skip


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], best: set[int]) -> str:
    head = "".join(f'<th><button type="button">{html.escape(one)}</button></th>' for one in heads)
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="best">{cells}</tr>' if index in best else f"<tr>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
