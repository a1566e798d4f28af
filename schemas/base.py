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


def channels_of_lambda(train_lambda: float) -> Channels:
    """N = M = 128 up to lambda 0.001, 192 below 0.04, 256 above (arXiv 2401.17789).

    The paper has seven lambdas. The rule covers those between them, and all up to 0.1.

    Args:
        train_lambda: in (0, 0.1).

    Raises:
        ValueError: there is no rule for this lambda.
    """
    if not 0 < train_lambda < 0.1:
        raise ValueError(
            f"train_lambda = {train_lambda:g} has no channel rule: "
            "give a lambda in (0, 0.1), or channels {N, M}"
        )
    width = 128 if train_lambda <= 0.001 else 192 if train_lambda < 0.04 else 256
    return Channels(N=width, M=width)


class ModelOfLambda(Section):
    """The network: its size, and the lambda that it is trained for."""

    train_lambda: float
    """The lambda that the model is trained for; the loss is bpp + lambda * 255^2 * MSE. It must be
    in (0, 0.1) unless `channels` is given. It sets the size of a new network by the published rule:
    N = M = 128 up to 0.001, 192 below 0.04, 256 from there on."""
    channels: Channels | None = None
    """+ The channels {N, M} of the network. null: refinement takes them from the weights, and
    pre-training derives them from `train_lambda`."""
    architecture: str | None = Field(None, min_length=1)
    """+ The model's architecture: `bmshj2018-factorized`, `bmshj2018-factorized-relu`,
    `bmshj2018-hyperprior`, `mbt2018-mean`, `mbt2018`, `cheng2020-anchor`, `cheng2020-attn`,
    `cheng2020-anchor-checkerboard`, `elic2022-official`, `elic2022-chandelier`, or a class of your
    own, `path/to/file.py:Class`. null: the one that the weights fit; for new networks
    `mbt2018-mean`."""

    @model_validator(mode="after")
    def _has_channels(self) -> "ModelOfLambda":
        if self.channels is None:
            channels_of_lambda(self.train_lambda)
        elif self.train_lambda <= 0:
            raise ValueError(f"train_lambda = {self.train_lambda:g} must be greater than 0")
        return self
