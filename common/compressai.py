"""The parts of CompressAI that are used here, imported without other packages' warnings."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressai.entropy_models import (
        EntropyBottleneck,
        EntropyModel,
        GaussianConditional,
    )
    from compressai.layers import GDN
    from compressai.models import CompressionModel, MeanScaleHyperprior
    from compressai.zoo import load_state_dict as rename_old_weights
    from compressai.zoo import mbt2018_mean

__all__ = [
    "GDN",
    "CompressionModel",
    "EntropyBottleneck",
    "EntropyModel",
    "GaussianConditional",
    "MeanScaleHyperprior",
    "mbt2018_mean",
    "rename_old_weights",
]
