"""A comparison's report: curves, deltas, pictures, and the page in a real browser."""

import html
import json
import math
import shutil
import time

import numpy as np
import pandas as pd
import pytest
import skimage
import torch
from compressai.utils.plot import __main__ as compressai_plot
from forks import Fork
from PIL import Image

from compare import main, plan_runs
from config import CompareConfig, load_config
from conftest import ROOT, needs, read_jsonl
from datasets import open_images
from metrics import Curve, bd_psnr, bd_rate
from reports.compared_run import ComparedRun
from reports.comparison_plots import plot_details
from reports.comparison_tables import (
    bd_table,
    curve_points,
    image_table,
    mean_points,
)
from reports.details import Detail, details_of
from reports.equal_rate import equal_rate_table, quality_at
from runs import leave_out_plots

WEIGHTS = {
    lmbda: str(ROOT / f"example_files/weights/mean_scale_n64_lambda{lmbda}.pth.tar")
    for lmbda in (0.0025, 0.005, 0.01)
}
PUBLISHED = ROOT / "example_files/compare/published"
PLAIN = "not <i>polished</i> &amp; %{x}"  # a name, not markup


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A finished comparison of two methods with three models: its config, and its folder."""
    folder = tmp_path_factory.mktemp("compared")
    photos = folder / "photos"
    photos.mkdir()
    for name, pixels in (("cat", skimage.data.chelsea()[60:240, 100:281]),
                         ("cup", skimage.data.coffee()[100:276, 200:376])):  # fmt: skip
        Image.fromarray(pixels).save(photos / f"{name}.png")
    short = {"tot_inference_iterations": 12, "polish_passes": 4, "eval_freq": 4}
    method = {"config": str(ROOT / "example_files/fast.json"), "set": short}
    other = {**method, "set": {**short, "polish_passes": 0}}
    values = {
        "save_name": "two", "output_dir": str(folder / "results"), "data_set": "folder",
        "path": str(photos), "methods": {"polished": method, PLAIN: other},
        "models": [{"train_lambda": lmbda, "pretrain": path} for lmbda, path in WEIGHTS.items()],
        "codecs": ["JPEG", "AVIF"], "shown": 1, "set": {"save_bitstreams": True},
        "published": {"SGA, Kodak": str(PUBLISHED / "yang2020_sga_kodak.csv")},
    }  # fmt: skip
    path = folder / "compare.json"
    path.write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patch:
        leave_out_plots(patch)  # of the runs
        assert main(["--config", str(path)]) == 0
    return load_config(path, CompareConfig), folder / "results/two"


def test_everything_is_in_the_folder(compared):
    _, folder = compared
    names = ("rate_distortion", "loss", "trajectories", "detail_1", "bits_1")
    for name in names:
        assert min(Image.open(folder / f"{name}.png").size) > 300
        assert "<svg" in (folder / f"{name}.svg").read_text()[:600]
    assert not (folder / "detail_2.png").exists()
    curves = pd.read_csv(folder / "curves.csv")
    assert set(curves["curve"]) == {
        "base", "polished", PLAIN, "JPEG", "AVIF", "SGA, Kodak",
    }  # fmt: skip
    images = pd.read_csv(folder / "images.csv")
    assert set(images["rate"]) == {"file"}
    run = next((folder / "runs/polished").iterdir())
    for record in read_jsonl(run / "images.jsonl"):
        own = images[(images["method"] == "polished") & (images["image"] == record["name"])]
        assert np.isclose(own["bpp"], record["refined"]["file_bpp"]).any()


def test_rates_are_estimates_where_not_all_are_files(compared):
    config, _ = compared
    runs = [ComparedRun(run.method, run.model.label, run.seed, run.folder)
            for run in plan_runs(config)[:2]]  # fmt: skip
    records = [json.loads(line) for line in (runs[0].folder / "images.jsonl").open()]
    bare = runs[0].folder.parent / "bare"
    bare.mkdir()
    for record in records:
        record["refined"].pop("file_bpp")
    (bare / "images.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    table = image_table([runs[1], runs[0]._replace(folder=bare)], ["cat.png", "cup.png"])
    assert set(table["rate"]) == {"estimate"}
    estimates = table.loc[table["model"] == runs[0].model, "bpp"]
    assert records[0]["refined"]["bpp"] in set(estimates)


def test_deltas_are_those_of_the_images_curves(compared):
    config, folder = compared
    bd, images = pd.read_csv(folder / "bd.csv"), pd.read_csv(folder / "images.csv")
    assert set(bd["image"]) == {"cat.png", "cup.png", "(mean curve)"}

    def curve(method, name, quality):
        own = images[images["method"] == method]
        own = own[own["image"] == name] if name != "(mean curve)" else own
        means = own.groupby("model")[["bpp", quality]].mean()
        return Curve(list(means["bpp"]), list(means[quality]))

    for _, row in bd.iterrows():
        ends = [curve(end, row["image"], row["quality"]) for end in ("base", row["curve"])]
        assert row["bd_rate_akima"] == pytest.approx(bd_rate(*ends))
        assert row["bd_db_akima"] == pytest.approx(bd_psnr(*ends))
        assert row["points"] == "3 and 3"
    of_psnr = bd[bd["quality"] == "psnr"]
    assert len(of_psnr) == len(bd) / 2
    assert (of_psnr["bd_rate_akima"] <= 0).all()
    assert (of_psnr.loc[of_psnr["curve"] == "polished", "bd_rate_akima"] < 0).all()
    # One model is no curve, and is said to be none.
    one = images[images["model"] == "lambda 0.01"]
    reasons = bd_table(curve_points(one, config), config)["reason"]
    assert len(reasons) == 12 and reasons.str.contains("1 points: at least 3").all()


def test_leads_are_those_at_each_image_s_rate(compared):
    """By hand, from the CSV files of the same report."""
    _, folder = compared
    images, codecs = pd.read_csv(folder / "images.csv"), pd.read_csv(folder / "codecs.csv")
    beside = pd.read_csv(folder / "equal_rate.csv").set_index(["model", "curve", "quality"])
    sga = pd.read_csv(PUBLISHED / "yang2020_sga_kodak.csv", comment="#").sort_values("bpp")
    page = (folder / "report.html").read_text()
    assert "Quality of others at equal rates" in page
    assert len(beside) == 18
    for (model, curve, quality), row in beside.iterrows():
        own = images[(images["model"] == model) & (images["method"] == curve)]
        assert (row["images"], row["dB"]) == (len(own), pytest.approx(own[quality].mean()))
        for codec in ("JPEG", "AVIF"):
            files = codecs[codecs["method"] == codec]
            leads = [
                image[quality]
                - quality_at(files[files["image"] == image["image"]], image["bpp"], quality)
                for _, image in own.iterrows()
            ]
            known = [lead for lead in leads if math.isfinite(lead)]
            assert row[f"images of {codec}"] == len(known)
            if known:
                assert row[f"lead over {codec}"] == pytest.approx(np.mean(known))
                assert f"({np.mean(known):+.2f})" in page
        if quality == "psnr":  # the published curve has no other
            at = np.interp(math.log(row["bpp"]), np.log(sga["bpp"]), sga["psnr"])
            assert row["lead over SGA, Kodak"] == pytest.approx(row["dB"] - at, abs=0.1)
        else:
            assert row["images of SGA, Kodak"] == 0 and math.isnan(row["lead over SGA, Kodak"])
    assert (beside["images of AVIF"] == 2).any()


def test_several_inference_lambdas_make_a_curve_for_each_model(compared):
    config, _ = compared
    models = [
        {"train_lambda": 0.01, "pretrain": "a", "inference_lambda": lmbda}
        for lmbda in (0.005, 0.02)
    ] + [{"train_lambda": 0.005, "pretrain": "b"}]
    semi = CompareConfig.model_validate(config.model_dump() | {"models": models})
    rows = [
        {"method": method, "model": model.label, "image": "a.png", "seed": 0, "true_loss": 1.0,
         "bpp": 0.1 * number, "psnr": 30.0 + number, "ms_ssim_db": math.nan}
        for method in ("base", "polished") for number, model in enumerate(semi.models, start=1)
    ]  # fmt: skip
    means = mean_points(curve_points(pd.DataFrame(rows), semi)).set_index("curve")
    assert list(means.index) == ["base", "base", "polished, lambda 0.01", "polished, lambda 0.01",
                                 "polished, lambda 0.005"]  # fmt: skip
    assert list(means.loc["polished, lambda 0.01", "bpp"]) == pytest.approx([0.1, 0.2])
    assert list(means.loc["base", "model"]) == ["lambda 0.01", "lambda 0.005"]


def test_compressais_own_tool_reads_the_points(compared, tmp_path, monkeypatch):
    _, folder = compared
    table = pd.read_csv(folder / "table.csv").set_index(["method", "model"])
    path = folder / "compressai/mean/polished.json"
    read = compressai_plot.parse_json_file(path, "psnr")
    assert read["name"] == "polished"
    losses = [table.loc[("polished", f"lambda {lmbda}")] for lmbda in WEIGHTS]
    assert read["xs"] == pytest.approx([row["bpp"] for row in losses])
    assert list(read["ys"]) == pytest.approx([row["psnr"] for row in losses])
    decibels = compressai_plot.parse_json_file(path, "ms-ssim")["ys"]
    assert list(decibels) == pytest.approx([row["ms_ssim_db"] for row in losses])
    output = tmp_path / "curve.png"
    cat = folder / "compressai/cat.png/base.json"
    compressai_plot.main(["-f", str(path), str(cat), "-o", str(output)])
    assert min(Image.open(output).size) > 300


def test_details_are_what_the_run_decoded(compared):
    config, _ = compared
    run = next(run for run in plan_runs(config) if run.method == PLAIN)
    done = ComparedRun(run.method, run.model.label, run.seed, run.folder)
    original, base, refined = details_of([done], run.config, open_images(run.config), "cat.png")
    record = read_jsonl(run.folder / "images.jsonl")[0]
    pixels = [(detail.x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
              for detail in (original, base, refined)]  # fmt: skip
    for side, picture, detail in (("base", pixels[1], base), ("refined", pixels[2], refined)):
        psnr = skimage.metrics.peak_signal_noise_ratio(pixels[0], picture)
        assert psnr == pytest.approx(record[side]["psnr"], abs=1e-3)
        bpp_y = detail.bits.sum().item() / (180 * 181)
        assert bpp_y == pytest.approx(record[side]["bpp_y"], rel=1e-4)


def test_details_of_another_size_are_not_shown(compared, capsys):
    """The stored symbols are of the whole image; so a crop of it has no pictures."""
    config, _ = compared
    run = plan_runs(config)[0]
    options = run.config.dev_options.model_copy(update={"centre_crop": 64})
    cropped = run.config.model_copy(update={"dev_options": options})
    assert details_of([run.compared], cropped, open_images(cropped), "cat.png") is None
    words = "cat.png: no pictures, for some method refined another size of it"
    assert words in capsys.readouterr().out


@pytest.mark.usefixtures("without_run_plots")
def test_a_comparison_survives_a_kill(config_values, write_config, photos, tmp_path):
    """Killed hard in its second run, then run again: as if nothing had been."""
    method = write_config(config_values | {"tot_inference_iterations": 50}, "method.json")
    values = {
        "save_name": "killed", "output_dir": str(tmp_path / "results"), "data_set": "folder",
        "path": str(photos), "images": 3, "shown": 0,
        "methods": {name: {"config": str(method)} for name in ("a", "b")},
        "models": [{"train_lambda": 0.01, "pretrain": WEIGHTS[0.01]}],
    }  # fmt: skip
    path, folder = write_config(values, "compare.json"), tmp_path / "results/killed"
    process = Fork(f"import compare; compare.main(['--config', {str(path)!r}])")
    second = folder / "runs/b/lambda 0.01/images.jsonl"
    while not second.exists() and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (folder / "report.html").exists()
    kept = (folder / "runs/a/lambda 0.01/images.jsonl").read_bytes()
    assert main(["--config", str(path)]) == 0
    assert (folder / "runs/a/lambda 0.01/images.jsonl").read_bytes() == kept
    sides = [read_jsonl(folder / f"runs/{name}/lambda 0.01/images.jsonl") for name in ("a", "b")]
    assert [r["refined"] for r in sides[0]] == [r["refined"] for r in sides[1]]
    assert len(sides[0]) == 3


def _schedules(runs):
    return {
        (run.method, run.config.tot_inference_iterations, run.config.polish_passes) for run in runs
    }


def test_titles_of_details_have_two_lines():
    x = torch.rand(3, 20, 30)
    side = {"bpp": 0.5, "psnr": 30.0, "ms_ssim_db": None}
    details = [Detail(label, x, side) for label in ("original", "base", "a\nb $c$")]
    figure = plot_details("日\n.png", details)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[1:3] == ["base\n0.5000 bpp, 30.00 dB", "a\\nb \\$c\\$\n0.5000 bpp, 30.00 dB"]


def test_quick_is_short_on_sample_photos(compared):
    config, _ = compared
    # 12 steps; the polish has 4 passes and 16 probes
    for steps, long, passes in ((6, 6, 0), (40, 12, 4)):
        values = config.model_dump() | {"quick": True, "quick_steps": steps, "seeds": [3, 1]}
        runs = plan_runs(CompareConfig.model_validate(values))
        assert _schedules(runs) == {("polished", long, passes), (PLAIN, long, 0)}
        assert {run.seed for run in runs} == {3}
        assert {run.config.dev_options.data_set for run in runs} == {"sample"}
        assert {run.config.image_count for run in runs} == {2}
        assert all("two_quick/runs" in str(run.folder) for run in runs)
    methods = {
        name: {"config": str(ROOT / f"example_files/{name}.json")}
        for name in ("two_class_ssl", "fast")
    }
    published = CompareConfig.model_validate(
        config.model_dump() | {"quick": True, "methods": methods}
    )
    runs = plan_runs(published)
    # of 100 steps 16 are for the probes
    assert _schedules(runs) == {("two_class_ssl", 100, 0), ("fast", 64, 20)}
    run = runs[0].config
    # exp(-rate t) ends as it does after 2,000 steps
    assert run.tot_inference_iterations * run.dev_options.temp_rate == pytest.approx(2000 * 1e-3)
    assert run.optimizer.lr == pytest.approx(0.02)


# --- in a browser ---------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def browser(request, tmp_path):
    if not (CHROMIUM and shutil.which("chromedriver")):
        pytest.skip("no Chromium and chromedriver here: apt install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
                     f"--user-data-dir={tmp_path}/profile"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    width, height = request.param
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield driver
    driver.quit()


def _plot(browser, section):
    """The traces of a section's plot, as the script gave them to plotly."""
    return browser.execute_script(
        "const copy = values => values && JSON.parse(JSON.stringify([...values]));"
        f"return document.querySelector('#{section} .plot').data.map(trace => ({{name: trace.name,"
        "x: copy(trace.x), y: copy(trace.y), points: copy(trace.customdata)}))"
    )


@needs("selenium")
def test_the_page_works_in_a_browser(compared, browser):
    _, folder = compared
    browser.get((folder / "report.html").as_uri())
    width = browser.execute_script("return document.documentElement.clientWidth")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    tables = browser.find_elements("class name", "scroll")
    assert len(tables) == 3
    for table in tables if width > 1000 else ():
        assert int(table.get_property("scrollWidth")) <= int(table.get_property("clientWidth"))
    table = pd.read_csv(folder / "table.csv")
    (dots,) = [trace for trace in _plot(browser, "changes") if trace["name"] == "lambda 0.005"]
    own = table[(table["model"] == "lambda 0.005") & (table["method"] != "base")]
    drawn = sorted(x for x in dots["x"] if x is not None)  # the legend has a point of its own
    assert drawn == pytest.approx(sorted(own["change_percent"]), rel=1e-5)
    curves = {html.unescape(trace["name"]): trace for trace in _plot(browser, "curves")}
    for name, points in pd.read_csv(folder / "curves.csv").groupby("curve"):
        points = points.sort_values("bpp")
        assert curves[name]["x"] == pytest.approx(list(points["bpp"]), rel=1e-5)
        assert curves[name]["y"] == pytest.approx(list(points["psnr"]), rel=1e-5)
    steps = [len(trace["x"]) for trace in _plot(browser, "way")]
    assert len(steps) == 4 and min(steps) >= 4  # true and relaxed, of two methods
    # A click on a point shows its pictures: the original, the base and the method's.
    browser.execute_script("""
        const plot = document.querySelector("#curves .plot");
        const index = plot.data.findIndex(trace => trace.name === "polished");
        plot.emit("plotly_click", {points: [{customdata: plot.data[index].customdata[0]}]});
    """)
    dialog = browser.find_element("id", "point")
    assert dialog.find_element("tag name", "h2").text == "polished, lambda 0.0025"
    labels = [label.text for label in dialog.find_elements("tag name", "strong")]
    assert labels == ["original", "base", "polished"]
    dialog.find_element("tag name", "button").click()
    assert not dialog.is_displayed()
    pictures = browser.find_elements("tag name", "img")
    assert len(pictures) == 4 + 3
    assert all(int(picture.get_property("naturalWidth")) == 160 for picture in pictures)
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


@needs("selenium")
def test_the_printed_page_has_the_whole_tables(compared, browser):
    browser.get((compared[1] / "report.html").as_uri())
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    heads = browser.find_elements("css selector", "th button")
    assert heads and all(head.is_displayed() for head in heads)
    assert not any(one.is_displayed() for one in browser.find_elements("class name", "choices"))


@needs("selenium")
def test_names_are_shown_as_they_are(compared, browser):
    _, folder = compared
    browser.get((folder / "report.html").as_uri())
    for place in (
        "#changes .ytick text",
        "#curves .legendtext",
        "#way .legendtext",
        "td",
        "figure",
    ):
        texts = browser.execute_script(
            f"return [...document.querySelectorAll('{place}')].map(one => one.textContent)"
        )
        assert any(text.startswith(PLAIN) for text in texts), place
    assert browser.find_elements("css selector", "i") == []
    hover = browser.execute_script("""
        const plot = document.querySelector("#curves .plot");
        const curve = plot.data.findIndex(trace => trace.name.startsWith("not"));
        Plotly.Fx.hover(plot, [{curveNumber: curve, pointNumber: 0}]);
        return plot.querySelector(".hoverlayer").textContent;
    """)
    assert hover.startswith(f"{PLAIN}, lambda 0.0025")


@needs("selenium")
def test_the_page_has_choices(compared, browser):
    """Sorting within each model, another quantity, and the dark scheme."""
    _, folder = compared
    browser.get((folder / "report.html").as_uri())
    first = browser.find_element("tag name", "table")
    heads = browser.execute_script(
        "return [...arguments[0].querySelectorAll('thead th')].map(head => head.textContent)", first
    )
    column = heads.index("loss, mse")
    bodies = browser.execute_script(
        "arguments[0].querySelectorAll('thead button')[arguments[1]].click();"
        "return [...arguments[0].tBodies].map(body => [...body.rows].map("
        "row => row.cells[arguments[1]]?.textContent))", first, column
    )  # fmt: skip
    assert len(bodies) == 3
    for group, *losses in bodies:
        assert group is None
        assert losses == sorted(losses) and len(losses) == 3
    quality = browser.find_element("css selector", "#curves select")
    browser.execute_script(
        "arguments[0].value = 'MS-SSIM (dB)'; arguments[0].dispatchEvent(new Event('change'))",
        quality,
    )
    polished = next(trace for trace in _plot(browser, "curves") if trace["name"] == "polished")
    points = pd.read_csv(folder / "curves.csv").query("curve == 'polished'").sort_values("bpp")
    assert polished["y"] == pytest.approx(list(points["ms_ssim_db"]), rel=1e-5)
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(paper)
    browser.find_element("id", "scheme").click()
    assert browser.execute_script(paper) != light
    assert browser.get_log("browser") == []


def test_a_picture_without_ms_ssim_is_in_no_mean_of_it(compared):
    """Rates and qualities of a curve are of the same images, for each quality."""
    config, _ = compared
    rows = [
        {"method": method, "model": model.label, "image": image, "seed": 0, "true_loss": 1.0,
         "bpp": scale * (0.1 * number + (image == "small")), "psnr": 30.0 + number,
         "ms_ssim_db": math.nan if image == "small" else 12.0 + number}
        for method, scale in (("base", 1.0), ("polished", 0.5))
        for number, model in enumerate(config.models, start=1) for image in ("large", "small")
    ]  # fmt: skip
    points = curve_points(pd.DataFrame(rows), config)
    bd = bd_table(points, config).set_index(["quality", "image"])
    assert set(bd.loc["ms_ssim_db"].index) == {"large", "(mean curve)"}
    assert bd.loc["ms_ssim_db", "bd_rate_akima"].tolist() == pytest.approx([-50, -50])
    published = pd.DataFrame({"curve": "others", "bpp": [0.01, 2.0], "psnr": [20.0, 40.0],
                              "ms_ssim_db": [10.0, 20.0]})  # fmt: skip
    beside = equal_rate_table(points, pd.DataFrame(), published)
    own = beside[(beside["quality"] == "ms_ssim_db") & (beside["curve"] == "base")]
    assert list(own["images"]) == [1] * len(own)
    assert list(own["bpp"]) == pytest.approx([0.1 * n for n in range(1, len(own) + 1)])
    assert list(own["dB"]) == pytest.approx([12.0 + n for n in range(1, len(own) + 1)])
