"""What the schemas share: types of values, and the keys of the network."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from common.files import user_path


class Section(BaseModel):
    """A JSON object with fixed keys and types.

    The string below a key describes it; docs/config.md is made of these strings. "+ " at its start
    marks a key that the published repository does not have. Ranges and defaults are left out, for
    docs/config.md takes them from the types.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ScriptConfig(Section):
    """What a script reads with `--config`."""

    @staticmethod
    def keys_for_images(path: str) -> dict[str, Any]:
        """What `--images PATH` sets, by dotted key; each script's config says it."""
        raise NotImplementedError

    def keys_for_regions(self, path: str) -> dict[str, Any] | None:
        """What `--roi PATH` sets, by dotted key; None: the script does not know `--roi`."""
        return None


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
TorchSeed = Annotated[int, Field(ge=0, lt=2**31)]
Tracker = Literal["tensorboard", "wandb"]
Precision = Literal["auto", "float32", "bfloat16"]


def _switch(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f'should be true, false or "auto", not {json.dumps(value)}')
    return value


Switch = Annotated[bool | Literal["auto"], BeforeValidator(_switch)]
UserPath = Annotated[str, AfterValidator(user_path), Field(json_schema_extra={"format": "path"})]
SAVE_NAME = r"^[\w-][\w. -]*(/[\w-][\w. -]*)*$"


class Channels(Section):
    """Channels of the networks."""

    N: Count
    """+ The channels inside the networks and of z."""
    M: Count
    """+ The channels of y."""
    groups: list[Count] | None = None
    """+ ELIC's groups of channels of y, in coding order; they add up to M. null: refinement takes
    them from the weights, and new networks have 16, 16, 32, 64 and M - 128."""


# MS-SSIM halves the image four times; a window of 11 pixels must still fit into it.
MS_SSIM_MIN_SIDE = 161
MS_SSIM_LAMBDAS = 1.0, 1000.0  # wide about CompressAI's, 2.4 to 220; a lambda for MSE is below 1


def channels_of_lambda(
    train_lambda: float, objective: str = "mse", architecture: str | None = None
) -> Channels:
    """The channels of a new network, by the lambda that it is trained for.

    For MSE: N = M = 128 up to lambda 0.001, 192 below 0.04, 256 above (arXiv 2401.17789). The paper
    has seven lambdas. The rule covers those between them, and all up to 0.1. For MS-SSIM: those of
    CompressAI's models, from the first lambda of the wider ones on (`compressai.zoo`).

    Args:
        train_lambda: in (0, 0.1) for MSE, in [1, 1000] for MS-SSIM.
        architecture: its name; None: mbt2018-mean.

    Raises:
        ValueError: there is no rule for this lambda.
    """
    if objective == "ms-ssim":
        return _channels_for_ms_ssim(train_lambda, architecture or "mbt2018-mean")
    if objective != "mse":
        raise ValueError(
            f"objective = {objective!r} has no channel rule, only mse and ms-ssim have one: "
            "give channels {N, M}"
        )
    if not 0 < train_lambda < 0.1:
        raise ValueError(
            f"train_lambda = {train_lambda:g} has no channel rule: "
            "give a lambda in (0, 0.1), or channels {N, M}"
        )
    width = 128 if train_lambda <= 0.001 else 192 if train_lambda < 0.04 else 256
    return Channels(N=width, M=width)


# By architecture: the channels (N, M) of lower rates, the first lambda of the others, theirs.
NARROW, WIDE = (128, 192), (192, 320)
MS_SSIM_CHANNELS = {
    "bmshj2018-factorized": (NARROW, 60.5, WIDE),
    "bmshj2018-factorized-relu": (NARROW, 60.5, WIDE),
    "bmshj2018-hyperprior": (NARROW, 60.5, WIDE),
    "mbt2018-mean": (NARROW, 31.73, WIDE),
    "mbt2018": ((192, 192), 31.73, WIDE),
    "cheng2020-anchor": ((128, 128), 16.64, (192, 192)),
    "cheng2020-attn": ((128, 128), 16.64, (192, 192)),
}


def _channels_for_ms_ssim(train_lambda: float, architecture: str) -> Channels:
    """See `channels_of_lambda`."""
    lowest, highest = MS_SSIM_LAMBDAS
    if not lowest <= train_lambda <= highest or architecture not in MS_SSIM_CHANNELS:
        raise ValueError(
            f"train_lambda = {train_lambda:g} has no channel rule for MS-SSIM and {architecture}: "
            f"give a lambda in [{lowest:g}, {highest:g}] (CompressAI has 2.4 to 220) and one of "
            f"{', '.join(MS_SSIM_CHANNELS)}, or channels {{N, M}}"
        )
    narrow, first_wide, wide = MS_SSIM_CHANNELS[architecture]
    N, M = narrow if train_lambda < first_wide else wide
    return Channels(N=N, M=M)


def check_lambda(objective: str, lmbda: float, key: str) -> None:
    """Check that a lambda is one for this objective.

    Args:
        key: what sets it.

    Raises:
        ValueError: it is not in [1, 1000] for MS-SSIM, or is 1 or more for MSE.
    """
    lowest, highest = MS_SSIM_LAMBDAS
    if objective == "ms-ssim" and not lowest <= lmbda <= highest:
        raise ValueError(
            f"lambda {lmbda:g} is none for MS-SSIM: set {key} to one in [{lowest:g}, {highest:g}]; "
            "CompressAI's models have 2.4 to 220"
        )
    if objective == "mse" and lmbda >= lowest:
        raise ValueError(
            f"lambda {lmbda:g} is none for MSE: set {key} to one in (0, 0.1), or objective to "
            '"ms-ssim"'
        )


class ModelOfLambda(Section):
    """The network: its size, and the lambda that it is trained for."""

    train_lambda: float
    """The lambda that the model is trained for; the loss is bpp + lambda * 255^2 * MSE. It must be
    in (0, 0.1) unless `channels` is given. It sets the size of a new network by the published rule:
    N = M = 128 up to 0.001, 192 below 0.04, 256 from there on. A model for MS-SSIM has a lambda in
    [1, 1000], and CompressAI's channels: N = 128 and M = 192 below 31.73 for `mbt2018-mean`, 192
    and 320 from there on."""
    channels: Channels | None = None
    """+ The channels {N, M} of the network. null: refinement takes them from the weights, and
    pre-training derives them from `train_lambda`."""
    architecture: str | None = Field(None, min_length=1)
    """+ The model's architecture: `bmshj2018-factorized`, `bmshj2018-factorized-relu`,
    `bmshj2018-hyperprior`, `mbt2018-mean`, `mbt2018`, `cheng2020-anchor`, `cheng2020-attn`,
    `cheng2020-anchor-checkerboard`, `elic2022-official`, `elic2022-chandelier`, or a class of your
    own, `path/to/file.py:Class`. null: the one that the weights fit; for new networks
    `mbt2018-mean`."""
    objective: str = Field("mse", min_length=1)
    """+ The distortion of the loss. `mse`: bpp + lambda * 255^2 * MSE. `ms-ssim`: bpp + lambda *
    (1 - MS-SSIM), with a lambda in [1, 1000]; CompressAI's models for it have 2.4 to 220. Images
    need 161 pixels a side for it. Or one of your own in objectives.py. Only `mse` has a polish."""

    @model_validator(mode="after")
    def _has_channels(self) -> "ModelOfLambda":
        if self.channels is None:
            self._check_channel_rule()
        elif self.train_lambda <= 0:
            raise ValueError(f"train_lambda = {self.train_lambda:g} must be greater than 0")
        return self

    def _check_channel_rule(self) -> None:
        """Check that `train_lambda` tells the channels of a new network."""
        channels_of_lambda(self.train_lambda, self.objective, self.architecture)
