"""Models that code y in two passes over a checkerboard, group of channels by group of channels.

The checkerboard of He, Zheng, Sun, Wang, Qin 2021 (arXiv 2103.15306) in the anchor model of Cheng
et al. 2020 (arXiv 2001.01568), and ELIC of He et al. 2022 (arXiv 2203.10886).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from architectures.base import architecture
from architectures.distributions import Gaussians
from architectures.hyperpriors import Hyperprior
from architectures.walk import Group, Part, ValueOf, checkerboard, merged
from common.compressai import (
    CheckerboardLatentCodec,
    Cheng2020AnchorCheckerboard,
    Elic2022Chandelier,
    Elic2022Official,
)
from common.errors import InputError


class Checkerboard(Hyperprior):
    """A model with latents y and z, whose y has groups of channels with two parts each.

        x -> g_a -> y -> h_a -> z
        z_hat on the integers + medians; params = h_s(z_hat)
        for each group of channels, with params and the groups before:
            the anchors on the integers + means
            the others on the integers + means, which also depend on the anchors around them
        x_hat = g_s(y_hat)

    y is [B, M, ceil(H/16), ceil(W/16)], z is [B, N, ceil(H/64), ceil(W/64)].
    """

    exact_parts = ("h_s", "context_prediction", "entropy_parameters", "channel_context")

    @property
    def groups(self) -> list[int]:
        """The number of channels of each group, in coding order."""
        return [self.M]

    @property
    def hyper(self) -> Any:
        """See `Hyperprior`."""
        return self.network.latent_codec.hyper

    def walk(self, size: tuple[int, int], value_of: ValueOf) -> Tensor:
        """See `Architecture`."""
        params = self.hyper_params(size, value_of)
        known: list[Tensor] = []  # the groups of channels decoded so far, [B, c, h, w] each
        start = 0
        for channels, (codec, group_params) in zip(
            self.groups, self.codecs(params, known), strict=True
        ):
            part = slice(start, start + channels)
            known.append(two_passes(codec, group_params, part, value_of, self.lattice))
            start += channels
        return torch.cat(known, dim=1)

    def codecs(self, params: Tensor, known: list[Tensor]) -> Iterator[tuple[Any, Tensor]]:
        """The codec of each group of channels, and the parameters that it gets.

        Args:
            params: what h_s predicts, [B, C, h, w].
            known: the groups of channels before; the caller adds to it.
        """
        yield self.network.latent_codec.y, params


def two_passes(
    codec: CheckerboardLatentCodec,
    params: Tensor,
    channels: slice,
    value_of: ValueOf,
    step: float = 1.0,
) -> Tensor:
    """The values [B, c, h, w] of a group of channels: first the anchors, then the others.

    `entropy_parameters` works on each position alone, so it only sees the positions of a pass.
    `step` is that of the lattice.
    """
    height, width = params.shape[2:]
    positions = checkerboard(height, width, params.device)
    shape = (len(params), channels.stop - channels.start, height, width)
    values: list[Tensor] = []
    for index, chosen in enumerate(positions):
        if not len(chosen):  # a y of one position has anchors only
            continue
        here = Part(positions=chosen).of(params)  # [B, C, 1, n]
        if index == 0:
            context = here.new_zeros(1).expand(len(here), 2 * shape[1], *here.shape[2:])
        else:
            blank = values[0].new_zeros(*values[0].shape[:3], len(chosen))
            anchors = merged((values[0], blank), positions, shape)
            context = Part(positions=chosen).of(codec.context_prediction(anchors))
        scales, means = codec.y._chunk(codec.entropy_parameters(codec.merge(context, here)))
        gaussians = Gaussians(codec.y.gaussian_conditional, scales, means, step)
        values.append(value_of(Group("y", means, gaussians, Part(channels, chosen), step)))
    return merged(tuple(values), positions[: len(values)], shape)


@architecture("cheng2020-anchor-checkerboard")
class AnchorCheckerboard(Checkerboard):
    """The anchor model of Cheng et al. 2020 with a checkerboard; y has one group of channels."""

    network_class = Cheng2020AnchorCheckerboard
    halo = 7
    one_width = True

    @property
    def N(self) -> int:  # noqa: N802
        """The number of channels inside the networks, and of z."""
        return self.network.g_a[0].conv1.out_channels

    @property
    def M(self) -> int:  # noqa: N802
        """The number of channels of y, which is N."""
        return self.N


@architecture("elic2022-official")
class Elic(Checkerboard):
    """ELIC: uneven groups of channels, which all groups before help to predict."""

    network_class = Elic2022Official
    halo = 9

    @classmethod
    def build(cls, N: int, M: int, groups: Sequence[int] | None = None) -> Self:
        """See `Architecture`; by default the groups are 16, 16, 32, 64 and M - 128."""
        groups = [16, 16, 32, 64, M - 128] if groups is None else [*groups]
        if sum(groups) != M or min(groups) < 1:
            raise InputError(
                f"channels: the groups {groups} of {cls.name} must be positive and add up to "
                f"M = {M}; without channels.groups M must be above 128"
            )
        return cls(cls.network_class(N=N, M=M, groups=groups))

    @classmethod
    def example(cls, groups: int) -> Self:
        """See `Architecture`."""
        return cls.build(4, 2 * max(groups, 1), [2] * max(groups, 1))

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor]) -> Self:
        """See `Architecture`."""
        contexts = [f"latent_codec.y.latent_codec.y{k}.context_prediction.weight"
                    for k in range(len(weights))]  # fmt: skip
        groups = [weights[key].size(1) for key in contexts if key in weights]
        model = cls.build(weights["g_a.0.weight"].size(0), sum(groups), groups)
        model.network.load_state_dict(weights)
        model.network.eval()
        return model

    @classmethod
    def mismatch(cls, weights: Mapping[str, Tensor]) -> str:
        """See `Architecture`; the two variants differ in the last layer of h_s."""
        if problem := super().mismatch(weights):
            return problem
        last = weights["latent_codec.hyper.h_s.4.weight"]  # convolution: [2 M, 3/2 N, 3, 3]
        convolves = last.size(1) == weights["latent_codec.hyper.h_s.2.weight"].size(1)
        if convolves == (cls is ElicChandelier):
            return ""
        return f"h_s ends with a {'' if convolves else 'transposed '}convolution"

    @property
    def N(self) -> int:  # noqa: N802
        """The number of channels inside the networks, and of z."""
        return self.network.g_a[0].out_channels

    @property
    def M(self) -> int:  # noqa: N802
        """The number of channels of y."""
        return sum(self.groups)

    @property
    def groups(self) -> list[int]:
        """See `Checkerboard`."""
        return self.network.latent_codec.y.groups

    def codecs(self, params: Tensor, known: list[Tensor]) -> Iterator[tuple[Any, Tensor]]:
        """See `Checkerboard`."""
        codec = self.network.latent_codec.y
        for k in range(len(codec.groups)):
            yield codec.latent_codec[f"y{k}"], codec._get_ctx_params(k, params, known)


@architecture("elic2022-chandelier")
class ElicChandelier(Elic):
    """ELIC as V. Chandelier wrote it: only the first group and the last one help to predict."""

    network_class = Elic2022Chandelier
