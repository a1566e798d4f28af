"""What `compare.py` reads."""

import re
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


def _refuse_what_a_comparison_sets(changes: dict[str, Any]) -> dict[str, Any]:
    places = {
        "train_lambda": "models", "pretrain": "models", "dev_options.inference_lambda": "models",
        "seed": "seeds", "device": "device", "save_name": "save_name", "output_dir": "output_dir",
        "tot_batches": "images", "images": "images",
        **{f"dev_options.{name}": "data_set" for name in DATA_SETS},
    }  # fmt: skip
    for key in changes.keys() & places.keys():
        raise ValueError(f"{key} is for the comparison to say: {places[key]}")
    return changes


Changes = Annotated[dict[str, Any], AfterValidator(_refuse_what_a_comparison_sets)]


class ComparedMethod(Section):
    """A refinement config, and what to change in it."""

    config: UserPath
    """A config of `train_flexible_inference.py`."""
    set: Changes = Field({})
    """Changes to it by dotted key, e.g. {"optimizer.lr": 0.01}."""


class ComparedModel(Section):
    """A checkpoint, and the lambda of the refinement where it is not the checkpoint's own."""

    pretrain: UserPath = Field(min_length=1)
    """The trained model, as `pretrain` of a refinement."""
    train_lambda: Positive
    """The lambda that it is trained for."""
    inference_lambda: Positive | None = None
    """The lambda of the refinement's loss. null: `train_lambda`."""
    name: ShortName | None = None
    """The name in tables and plots, at most 62 letters. null: `lambda` and `train_lambda`."""

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint, e.g. `lambda 0.01`."""
        return self.name or f"lambda {self.train_lambda:g}"

    @property
    def label(self) -> str:
        """The name of checkpoint and refinement, e.g. `lambda 0.01` or `lambda 0.01 at 0.005`."""
        at = "" if self.inference_lambda is None else f" at {self.inference_lambda:g}"
        return f"{self.checkpoint}{at}"


Codec = Literal["JPEG", "JPEG 2000", "WebP", "AVIF"]


class CompareConfig(ScriptConfig):
    """What `compare.py` reads: every method with every model and seed over one image set."""

    save_name: str = Field(pattern=SAVE_NAME)
    """The comparison's folder below `output_dir`: a name, or names joined by /, of letters, digits,
    blank, `.`, `_` and `-`. With `quick` the folder's name ends in `_quick`."""
    output_dir: UserPath = Field("results", min_length=1)
    """The folder of all runs."""
    data_set: Literal["kodak", "tecnick", "pathology", "clic", "folder", "sample"] = "sample"
    """The image set, as in `dev_options` of a refinement."""
    path: UserPath | None = None
    """Where the image set lies; `sample` has none, and `clic` may do without. `--images PATH` on
    the command line sets it, and `data_set` to `folder`."""
    images: Index = 24
    """How many images are refined at most, the first ones by name. 0: all that there are, which
    `--images PATH` on the command line implies unless the file or a `--set` has this key."""
    methods: dict[ShortName, ComparedMethod] = Field(min_length=1)
    """The methods by the names that tables and plots give them."""
    models: list[ComparedModel] = Field(min_length=1)
    """The trained models, each with a lambda of the refinement."""
    set: Changes = Field({})
    """Changes to every method's config by dotted key; a method's own changes win."""
    seeds: list[TorchSeed] = Field([0], min_length=1)
    """The seeds of the noise: every method meets every model once with each."""
    anchor: str = "base"
    """What everything is compared with: the name of a method, or `base`, which is no refinement."""
    groups: dict[ShortName, list[str]] = Field({})
    """Groups of images by name, each a list of image names. The table has a column for each."""
    codecs: list[Codec] = Field([])
    """Classical codecs to compare with."""
    published: dict[ShortName, UserPath] = Field({})
    """Published curves by name: CSV files with columns bpp, psnr and perhaps ms_ssim_db."""
    shown: Index = 2
    """How many images the report shows pictures of."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes a GPU if there is one."""
    quick: bool = False
    """A few sample photos, one seed and short schedules: to look at, not to cite. `--quick` on the
    command line switches it on."""
    quick_images: Count = 2
    """How many sample photos `quick` takes."""
    quick_steps: Count = 100
    """How many steps `quick` takes; schedules are shrunk to them."""

    @staticmethod
    def keys_for_images(path: str) -> dict[str, Any]:
        """What `--images PATH` sets, by dotted key: this folder or file is the image set."""
        return {"data_set": "folder", "path": path}

    @property
    def name(self) -> str:
        """The comparison's folder below `output_dir`."""
        return f"{self.save_name}_quick" if self.quick else self.save_name

    @property
    def image_set(self) -> str:
        """The data set that is refined."""
        return "sample" if self.quick else self.data_set

    @property
    def used_seeds(self) -> list[int]:
        """Seeds, after `quick`."""
        return self.seeds[:1] if self.quick else self.seeds

    @model_validator(mode="after")
    def _is_consistent(self) -> "CompareConfig":
        known = ["base", *self.methods]
        if self.anchor not in known:
            raise ValueError(f"anchor = {self.anchor!r}: must be one of {', '.join(known)}")
        for name in self.methods.keys() & {"base", *get_args(Codec)}:
            raise ValueError(f"methods.{name}: is in every comparison or a codec; another name")
        for name in self.published.keys() & {*known, *get_args(Codec)}:
            raise ValueError(f"published.{name}: is a method's or a codec's name; another one")
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
    """A short name as part of a path: letters, digits, blanks, . and -."""
    return re.sub(r"[^\w.-]+", " ", name).strip(" .") or "_"
