"""Learns the directions in which the last layers of a model change from photo to photo.

Each photo's squared error is a quadratic function of the last layer (see
`adaptation.least_squares`). If all photos had the mean curvature, the best change for a photo would
be a Newton step. Its principal components, in the metric of that curvature, are the directions that
save most squared error for a given number of them.
"""

import torch
from torch import Tensor

from adaptation.least_squares import Quadratic

NO_SHARE = 1e-9  # of the first direction's singular value: directions below are noise
RIDGE = 1e-3  # of each weight's own curvature: what photos do not tell is left alone


class Photos:
    """The quadratic functions of many photos, summed up as far as directions need them."""

    def __init__(self) -> None:
        self.slopes: list[Tensor] = []
        self.gram: Tensor | None = None

    def add(self, error: Quadratic, pixels: int) -> None:
        """Add a photo of so many pixels."""
        gram = error.gram / pixels
        self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.slopes.append(error.slope / pixels)

    def directions(self, count: int) -> Tensor:
        """The `count` best directions [K, P, 3], the most useful first, or as many as photos have.

        A factor of 1 of any of them changes the mean squared error, summed over the colours, by 1,
        if a photo has the mean curvature, but for `RIDGE`.

        Raises:
            ValueError: no photo was added, or the photos give no direction; the message says why.
        """
        if self.gram is None:
            raise ValueError("no photo was added")
        slopes = torch.stack(self.slopes, 1)  # [P, photos, 3]
        if not (self.gram.isfinite().all() and slopes.isfinite().all()):
            raise ValueError("their errors are not finite")
        if not slopes.any():
            raise ValueError("no change of the last layer lowers their errors")
        gram = self.gram / len(self.slopes)
        gram = gram + torch.diag(RIDGE * gram.diagonal().clamp_min(1e-12))
        root, failed = torch.linalg.cholesky_ex(gram)
        if failed.item():
            raise ValueError("their mean curvature is not positive")
        whitened = torch.linalg.solve_triangular(root, slopes.flatten(1), upper=False)
        photos = whitened.view(slopes.shape).transpose(0, 1).flatten(1)
        # Photos of large errors would decide alone.
        photos = photos / photos.norm(dim=1, keepdim=True).clamp_min(1e-300).sqrt()
        _, shares, main = torch.linalg.svd(photos, full_matrices=False)
        main = main[shares > NO_SHARE * shares[0]][:count].unflatten(1, (-1, 3))
        changes = torch.linalg.solve_triangular(
            root.t(), main.transpose(0, 1).flatten(1), upper=True
        )
        return changes.view(-1, *main.shape[::2]).transpose(0, 1)
