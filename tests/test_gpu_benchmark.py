"""`benchmark.py gpu` on a CPU: all checks at toy size, each with a fault, and all timings."""

import json
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch

import benchmarks.gpu as gpu
from adaptation import least_squares
from benchmark import main
from benchmarks.gpu_bench import TOY, Bench
from benchmarks.gpu_checks import CHECKS
from benchmarks.gpu_setting import TF32, backend, photos
from benchmarks.gpu_speed import (
    FEWEST_STEPS,
    FLOOR,
    FREE,
    GRAPHS,
    OURS,
    PLAIN,
    WARM_UP,
    Place,
    Recipe,
    RefinementStep,
    StepTimer,
    TrainingStep,
    settings,
)
from conftest import WEIGHTS
from fast.upsampling import UpsamplingKernel
from pretraining.step import TrainingState
from refinement.batch import ImageNoise, Recorder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    """No test here reads the plot of a training."""
    plot = SimpleNamespace(savefig=lambda path: path.touch())
    monkeypatch.setattr("pretraining.run.plot_training", lambda rows, objective: plot)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs `benchmark.py gpu`; gives the exit code, the JSON, stdout and stderr."""

    def run(*arguments):
        path = tmp_path / "figures" / "gpu.json"
        code = main(["gpu", "--checkpoint", str(WEIGHTS), "--json", str(path), *arguments])
        figures = json.loads(path.read_text()) if path.is_file() else None
        return code, figures, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def bench():
    """With the CPU's results that a check would compare to."""
    bench = Bench(CPU, str(WEIGHTS), TOY)
    assert bench.losses_on_cpu.isfinite().all()
    return bench


def test_a_wrong_checkpoint_is_one_line_and_no_figures_are_lost(run, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "gpu.json").write_text("{}")
    code, figures, out, err = run("--device", "cpu", "--checkpoint", "absent.pth.tar")
    assert (code, figures, out) == (2, {}, "")
    assert err.startswith("error: ") and "absent.pth.tar" in err and err.count("\n") == 1


def test_all_checks_pass_at_toy_size(run):
    code, figures, out, _ = run("--device", "cpu")
    checks = figures["gpu"]["checks"]
    skipped = {row["name"] for row in checks if row["status"] == "skipped"}
    assert skipped == {"CUDA graphs, beside no graphs"}
    assert {row["status"] for row in checks} == {"passed", "skipped"}, out
    assert code == 0
    assert [row["name"] for row in checks] == list(CHECKS)
    assert figures["machine"]["device"] == "cpu"
    assert figures["gpu"]["speed"] == []
    lines = out.splitlines()
    assert sum(line.startswith("passed ") for line in lines) == len(CHECKS) - 1


@pytest.mark.parametrize("device", ["cuda", "cuda:99"])
def test_without_that_gpu_there_is_one_line(run, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, figures, out, err = run("--device", device)
    assert code == 2
    assert err.startswith("error: device = 'cuda:")
    assert err.endswith("--device cpu runs the checks at toy size\n")
    assert err.count("\n") == 1
    assert (figures, out) == (None, "")


# --- every check can fail -------------------------------------------------------------------------


def _louder(function, factor=1.05):
    return lambda *arguments: function(*arguments) * factor


def _wrong_gradient(monkeypatch):
    monkeypatch.setattr(UpsamplingKernel, "gradient", _louder(UpsamplingKernel.gradient))


def _wrong_upsampling(monkeypatch):
    monkeypatch.setattr(UpsamplingKernel, "forward", _louder(UpsamplingKernel.forward))


def _wrong_gdn(monkeypatch):
    backward = "fast.gdn.normalise_backward"
    monkeypatch.setattr(backward, lambda kept, grad, grad_x, *_: grad_x.copy_(grad))


def _wrong_bfloat16(monkeypatch):
    right = UpsamplingKernel.forward

    def forward(kernel, x):
        return right(kernel, x) * (1.5 if x.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(UpsamplingKernel, "forward", forward)


def _wider_windows(monkeypatch):
    monkeypatch.setattr("fast.structural.SIGMA", 1.6)


def _tiles_that_see_too_little(monkeypatch):
    monkeypatch.setattr("architectures.MeanScale.halo", 1)


def _wrong_rate(monkeypatch):
    from metrics import bits_per_pixel

    monkeypatch.setattr("objectives.bits_per_pixel", _louder(bits_per_pixel, 1.001))


def _noise_by_place(monkeypatch):
    monkeypatch.setattr(ImageNoise, "of_images", classmethod(
        lambda cls, seed, names, device, trial=0: cls(range(len(names)), device)))  # fmt: skip


def _no_polish(monkeypatch):
    monkeypatch.setattr("train_flexible_inference.polish_batch", lambda *_: None)


def _other_symbols(monkeypatch):
    from coding.coder import encode_latents

    def encode(coder, symbols, size, told):
        return encode_latents(coder, {**symbols, "y": symbols["y"] + 1}, size, told)

    monkeypatch.setattr("refinement.result.encode_latents", encode)


def _no_update(monkeypatch):
    monkeypatch.setattr("pretraining.step.torch.optim.Adam.step", lambda *_: None)


def _other_noise_after_resuming(monkeypatch):
    right = TrainingState.restore

    def restore(state, checkpoint, ranks):
        right(state, checkpoint, ranks)
        torch.manual_seed(17)

    monkeypatch.setattr(TrainingState, "restore", restore)


def _a_value_is_read(monkeypatch):
    right = Recorder.progress_of

    def progress_of(recorder, losses):
        mean, lowest = right(recorder, losses)
        return torch.tensor(mean.item()), lowest

    monkeypatch.setattr(Recorder, "progress_of", progress_of)


def _inputs_of_each_call_differ(monkeypatch):
    right, calls = least_squares.input_of_last_layer, count()
    monkeypatch.setattr(
        least_squares, "input_of_last_layer", lambda *v: right(*v) * (1 + 0.01 * next(calls))
    )


FAULTS = {
    "refinement of two photos, beside the CPU, TF32 off": _wrong_gdn,
    "gradients of the frozen layers, TF32 off": _wrong_gradient,
    "a fit's quadratic function of the last layer, TF32 off": _inputs_of_each_call_differ,
    "gradients of the frozen layers for MS-SSIM": _wider_windows,
    "gradients of the frozen layers, in tiles": _tiles_that_see_too_little,
    "gradients of the frozen layers, in bfloat16": _wrong_bfloat16,
    "gradients of the training layers": _wrong_gdn,
    "true loss, beside CompressAI's layers in float64": _wrong_rate,
    "a batch of 4, beside one by one": _noise_by_place,
    "polish, by CompressAI's layers in float64": _no_polish,
    "a file made beside the device, decoded on the CPU": _other_symbols,
    "the same file, decoded by CompressAI": _wrong_upsampling,
    "training of 30 steps, its loss": _no_update,
    "training of 30 steps, stopped and resumed": _other_noise_after_resuming,
    "bfloat16 beside float32": _wrong_bfloat16,
    "steps without host synchronisation": _a_value_is_read,
}


def test_there_is_a_fault_for_each_check():
    """TF32 is the same check on a CPU, and CUDA graphs are none there."""
    others = {name for name in CHECKS if name.endswith("TF32 on") or name.startswith("CUDA graphs")}
    assert FAULTS.keys() == CHECKS.keys() - others


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(bench, monkeypatch, name):
    for result in ("coded", "trained"):
        bench.__dict__.pop(result, None)
    FAULTS[name](monkeypatch)
    row = gpu.attempt(lambda: gpu.finding_of(CHECKS[name], bench))
    assert row["status"] == "failed"
    assert gpu.line_of_check({"name": name, **row}).startswith("FAILED ")


def test_a_failed_check_does_not_stop_the_rest(run, monkeypatch):
    names = ["gradients of the frozen layers, TF32 off", "true loss, beside CompressAI's layers in "
             "float64", "gradients of the frozen layers, in tiles"]  # fmt: skip
    monkeypatch.setattr(gpu, "CHECKS", {name: CHECKS[name] for name in names})
    monkeypatch.setattr("benchmarks.gpu_checks.refine_all", lambda *_: 1 // 0)
    code, figures, out, _ = run("--device", "cpu")
    rows = figures["gpu"]["checks"]
    assert [row["status"] for row in rows] == ["passed", "failed", "passed"]
    assert rows[1]["reason"] == "ZeroDivisionError: integer division or modulo by zero"
    assert rows[1]["reason"] in out
    assert code == 1


# --- timings --------------------------------------------------------------------------------------


def test_a_timer_counts_whole_steps_after_the_warm_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("benchmarks.gpu_speed.time.perf_counter", lambda: clock[0])
    timer = StepTimer(CPU, seconds=4.0)

    def step():  # the first steps are slower, and the last one is seen apart
        clock[0] += 10.0 if timer.steps < WARM_UP else 0.5

    timer.run(step)
    assert timer.step_seconds == 0.5
    assert timer.steps == WARM_UP + 1 + 8
    slow = StepTimer(CPU, seconds=0.0)
    slow.run(lambda: clock.__setitem__(0, clock[0] + 3))
    assert (slow.step_seconds, slow.timed) == (3.0, FEWEST_STEPS)


@pytest.fixture
def place():
    return Place(CPU, str(WEIGHTS), size=(64, 64), crop=64, seconds=0.0)


def _toy(setting):
    """The same at a size for tests; recipes of few steps."""
    if not isinstance(setting, Recipe):
        return replace(setting, width=8, batch=2, tf32="off")
    few = (("tot_inference_iterations", 2), ("polish_passes", 1), ("eval_freq", 2))
    return replace(setting, precision="auto", batch=2, images=2, changed=few)


def test_every_kind_of_setting_runs_and_has_figures(place, tmp_path, capsys):
    """Each loop, precision and recipe of the real list once; a CPU has no graphs."""
    kinds = dict.fromkeys(_toy(one) for one in settings() if one.loop != GRAPHS)
    report = gpu.Report(tmp_path / "gpu.json", CPU)
    gpu.run_timings(list(kinds), place, report)
    rows = json.loads((tmp_path / "gpu.json").read_text())["gpu"]["speed"]
    out = capsys.readouterr().out
    assert [row["status"] for row in rows] == ["measured"] * len(kinds), out
    assert {row["loop"] for row in rows} == {PLAIN, OURS, FREE, FLOOR, "fast", "best"}
    for row in rows:
        assert row["peak_mb"] > 0
        assert (row.get("seconds") or row["images_per_minute"]) > 0
        assert row["N"] == (8 if row["width"] else 64)
    assert len(out.strip().splitlines()) == 2 + len(rows)


def test_what_cannot_be_measured_is_a_line_and_the_rest_goes_on(
    place, tmp_path, monkeypatch, capsys
):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")
    wanted = [SimpleSetting(error) for error in (full, ValueError("odd"), None)]
    late = SimpleSetting(None, expected=gpu.LIMIT + 1)
    report = gpu.Report(tmp_path / "gpu.json", CPU)
    gpu.run_timings([*wanted, late], place, report)
    rows = json.loads((tmp_path / "gpu.json").read_text())["gpu"]["speed"]
    assert [row["status"] for row in rows] == ["out of memory", "failed", "measured", "left out"]
    assert rows[0]["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert rows[3]["reason"] == "takes about 331 s"
    out = capsys.readouterr().out
    assert "FAILED: ValueError: odd" in out
    assert "left out: takes about 331 s" in out


class SimpleSetting(RefinementStep):
    """A setting that measures 2 seconds, or raises an error."""

    def __init__(self, error, expected=0.0):
        super().__init__(OURS, 1, 192)
        self.__dict__.update(error=error, expected=expected)

    def measure(self, place):
        if self.error:
            raise self.error
        return {"seconds": 2.0, "N": 192, "peak_mb": 1.0}

    def expected_seconds(self, rows):
        return self.expected


def test_the_time_of_a_recipe_is_expected_by_its_steps():
    measured = [
        {**RefinementStep(OURS, batch).row(), "seconds": seconds, "N": 64}
        for batch, seconds in ((1, 0.01), (16, 0.04))
    ]
    other = {**RefinementStep(PLAIN, 16).row(), "seconds": 9.0, "N": 64}
    left_out = RefinementStep(OURS, 16).row()
    recipe = Recipe("fast", 16, images=32)
    expected = 5 + 1.5 * 32 * (140 * 0.04 / 16 + (16 + 44) * 0.01)
    assert recipe.expected_seconds([*measured, other, left_out]) == pytest.approx(expected)
    assert recipe.expected_seconds([]) > 0


def test_the_settings_cover_what_is_asked_and_the_most_telling_come_first():
    steps = [one for one in settings() if isinstance(one, RefinementStep)]
    for width in (192, None):
        for batch in (1, 4, 16, 24):
            formats = {
                (one.loop, one.precision, one.tf32)
                for one in steps
                if (one.width, one.batch) == (width, batch)
            }
            assert formats > {(PLAIN, "float32", tf32) for tf32 in ("off", "convolutions")}
            assert formats > {(OURS, "float32", tf32) for tf32 in ("off", "on")}
            assert (OURS, "bfloat16", "off") in formats
    assert (steps[0].width, steps[0].batch) == (192, 1)
    training = {one.loop for one in settings() if isinstance(one, TrainingStep) and one.batch == 32}
    assert training == {PLAIN, OURS}
    assert {one.loop for one in settings() if isinstance(one, Recipe)} == {"fast", "best"}
    assert len(set(settings())) == len(settings())


# --- what both share ------------------------------------------------------------------------------


def test_the_backend_returns_to_its_settings():
    def now():
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark

    before = now()
    for tf32, both in TF32.items():
        with backend(tf32, deterministic=False, fastest=True):
            assert now() == (*both, False, True)
        assert now() == before
    with pytest.raises(ValueError), backend("on"):
        raise ValueError
    assert now() == before


def test_photos_have_their_size_and_differ():
    x = photos(9, 48, 80)
    assert x.shape == (9, 3, 48, 80)
    assert 0 <= x.min() < x.max() <= 1
    for index in range(8):
        assert (x[index] - x[8]).abs().mean() > 0.005
