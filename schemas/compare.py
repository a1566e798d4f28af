"""The schema of the config of `compare.py`."""

import re
from itertools import product
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from schemas.base import (
    SAVE_NAME,
    Count,
    Index,
    Positive,
    ScriptConfig,
    Section,
    TorchSeed,
    UserPath,
)
from schemas.refine import DATA_SETS

ShortName = Annotated[str, Field(pattern=r"^\S(.{0,60}\S)?$")]


def _refuse_keys_of_the_comparison(changes: dict[str, Any]) -> dict[str, Any]:
    places = {
        "train_lambda": "models", "pretrain": "models", "dev_options.inference_lambda": "models",
        "seed": "seeds", "device": "device", "save_name": "save_name", "output_dir": "output_dir",
        "tot_batches": "images", "images": "images", "batch_size": "batch_size",
        "dev_options.centre_crop": "centre_crop",
        **{f"dev_options.{name}": "data_set" for name in DATA_SETS},
    }  # fmt: skip
    for key in changes.keys() & places.keys():
        raise ValueError(f"{key} is for the comparison to say: {places[key]}")
    return changes


Changes = Annotated[dict[str, Any], AfterValidator(_refuse_keys_of_the_comparison)]


class ComparedMethod(Section):
    """A refinement config, and changes to it."""

    config: UserPath
    """A config of `train_flexible_inference.py`."""
    set: Changes = Field({})
    """Changes to that config, by dotted key: {"optimizer.lr": 0.01}."""
    roi: UserPath | None = None
    """Maps that weight the distortion: a folder, a file or `auto`; see `dev_options.path_weights`
    of a refinement. With `quick` it is `auto`."""


class ComparedModel(Section):
    """A checkpoint, and the lambda that images are refined with."""

    pretrain: UserPath = Field(min_length=1)
    """The trained model; see the key `pretrain` of a refinement."""
    train_lambda: Positive
    """The lambda that it is trained for."""
    inference_lambda: Positive | None = None
    """The lambda of the refinement's loss. null: `train_lambda`."""
    ms_ssim_lambda: Positive | None = None
    """The lambda of the methods whose `objective` is `ms-ssim`. null: `inference_lambda`."""
    architecture: str | None = Field(None, min_length=1)
    """The model's architecture; see the key `architecture` of a refinement."""
    name: ShortName | None = None
    """The name in tables and plots, at most 62 letters. null: `lambda` and the value of
    `train_lambda`."""

    def lambda_for(self, objective: str) -> float | None:
        """The inference lambda of a method with this objective; None: `train_lambda`."""
        of_ms_ssim = self.ms_ssim_lambda if objective == "ms-ssim" else None
        return of_ms_ssim or self.inference_lambda

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint, e.g. `lambda 0.01`."""
        return self.name or f"lambda {self.train_lambda:g}"

    @property
    def label(self) -> str:
        """`checkpoint`, and the inference lambda if it is set: `lambda 0.01 at 0.005`."""
        at = "" if self.inference_lambda is None else f" at {self.inference_lambda:g}"
        return f"{self.checkpoint}{at}"


Codec = Literal["JPEG", "JPEG 2000", "WebP", "AVIF"]


class CompareConfig(ScriptConfig):
    """The config of `compare.py`: each method refines one image set with each model and seed."""

    save_name: str = Field(pattern=SAVE_NAME)
    """The comparison's folder below `output_dir`: a name, or names joined by /. Names have letters,
    digits, blanks, `.`, `_` and `-`. With `quick` the folder's name ends in `_quick`."""
    output_dir: UserPath = Field("results", min_length=1)
    """The folder of all runs."""
    data_set: Literal["kodak", "tecnick", "pathology", "clic", "folder", "sample"] = "sample"
    """The image set; see the keys of the same names in `dev_options` of a refinement."""
    path: UserPath | None = None
    """The path of the image set. `sample` has no path, and `clic` does not need one. `--images
    PATH` on the command line sets this key, and sets `data_set` to `folder`."""
    images: Index = 24
    """The largest number of images to refine; the first ones by name are taken. 0: all. `--images
    PATH` on the command line also means all, unless the file or a `--set` has this key."""
    centre_crop: Count | None = None
    """The side of the square in the centre of each image that is refined, in pixels. null: whole
    images."""
    batch_size: Count = 1
    """The number of consecutive images of equal size that are refined together, whatever the
    methods' configs say."""
    methods: dict[ShortName, ComparedMethod] = Field(min_length=1)
    """The methods, by their names in tables and plots."""
    models: list[ComparedModel] = Field(min_length=1)
    """The trained models, each with the lambda that images are refined with."""
    set: Changes = Field({})
    """Changes to the config of every method, by dotted key. A method's own changes win."""
    seeds: list[TorchSeed] = Field([0], min_length=1)
    """The seeds of the noise. Each method runs with each model once for each seed."""
    anchor: str = "base"
    """The method that all others are compared with: its name, or `base` for no refinement."""
    groups: dict[ShortName, list[str]] = Field({})
    """Groups of images: a name, and a list of image names. The table has a column for each."""
    codecs: list[Codec] = Field([])
    """Classical codecs to compare with."""
    published: dict[ShortName, UserPath] = Field({})
    """Published curves by name: CSV files with the columns bpp, psnr and, optionally,
    ms_ssim_db."""
    shown: Index = 2
    """The number of images that the report shows details of."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes a GPU if there is one."""
    only: list[ShortName] = Field([])
    """Refine by these methods alone. The report has what is done by all. []: all methods. `--only
    METHOD` on the command line, perhaps several times, replaces the list."""
    report: bool = False
    """Refine nothing; report what is done so far, also while another process goes on. `--report` on
    the command line switches it on."""
    quick: bool = False
    """Use a few sample photos, one seed and short schedules. The results are to look at, not to
    cite. `--quick` on the command line switches it on."""
    quick_images: Count = 2
    """The number of sample photos that `quick` uses."""
    quick_steps: Count = 100
    """The number of steps that `quick` takes. Schedules are shortened to it."""

    @staticmethod
    def keys_for_images(path: str) -> dict[str, Any]:
        """The keys that `--images PATH` sets: this folder or file is the image set."""
        return {"data_set": "folder", "path": path}

    @property
    def name(self) -> str:
        """The comparison's folder below `output_dir`."""
        return f"{self.save_name}_quick" if self.quick else self.save_name

    @property
    def image_set(self) -> str:
        """The data set to refine, after `quick`."""
        return "sample" if self.quick else self.data_set

    @property
    def used_seeds(self) -> list[int]:
        """The seeds, after `quick`."""
        return self.seeds[:1] if self.quick else self.seeds

    @property
    def combinations(self) -> list[tuple[str, ComparedModel, int]]:
        """Each run's method, model and seed."""
        return list(product(self.methods, self.models, self.used_seeds))

    def save_name_of(self, method: str, model: ComparedModel, seed: int) -> str:
        """The folder of a run below `output_dir`."""
        label = folder_name(model.label) + (f" seed {seed}" if seed else "")
        return f"{self.name}/runs/{folder_name(method)}/{label}"

    @model_validator(mode="after")
    def _is_consistent(self) -> "CompareConfig":
        known = ["base", *self.methods]
        if self.anchor not in known:
            raise ValueError(f"anchor = {self.anchor!r}: must be one of {', '.join(known)}")
        for name in self.methods.keys() & {"base", *get_args(Codec)}:
            raise ValueError(f"methods.{name}: is in every comparison or a codec; another name")
        for name in self.published.keys() & {*known, *get_args(Codec)}:
            raise ValueError(f"published.{name}: is a method's or a codec's name; another one")
        for name in self.only:
            if name not in self.methods:
                raise ValueError(f"only: no method {name!r}; there is {', '.join(self.methods)}")
        if self.data_set not in ("sample", "clic") and self.path is None:
            raise ValueError(f"path is missing: the folder of {self.data_set}")
        if self.data_set == "sample" and self.path is not None:
            raise ValueError("path is set, but data_set sample has none: set data_set, to folder?")
        labels = [folder_name(model.label) for model in self.models]
        if len({*labels}) < len(labels):
            raise ValueError("models: two have the same lambdas: give each a name of its own")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError("seeds: one stands twice")
        if len({folder_name(method) for method in self.methods}) < len(self.methods):
            raise ValueError("methods: names must differ in more than punctuation")
        return self


def folder_name(name: str) -> str:
    """A short name as part of a path: letters, digits, blanks, `.`, `_` and `-`."""
    return re.sub(r"[^\w.-]+", " ", name).strip(" .") or "_"
