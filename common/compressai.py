"""The parts of CompressAI that are used here, imported without other packages' warnings."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressai.entropy_models import (
        EntropyBottleneck,
        EntropyModel,
        GaussianConditional,
    )
    from compressai.latent_codecs import CheckerboardLatentCodec
    from compressai.layers import GDN, CheckerboardMaskedConv2d, MaskedConv2d
    from compressai.models import (
        Cheng2020Anchor,
        Cheng2020AnchorCheckerboard,
        Cheng2020Attention,
        CompressionModel,
        Elic2022Chandelier,
        Elic2022Official,
        FactorizedPriorReLU,
        JointAutoregressiveHierarchicalPriors,
        MeanScaleHyperprior,
        ScaleHyperprior,
    )
    from compressai.models import FactorizedPrior as FactorizedPriorNetwork
    from compressai.zoo import (
        bmshj2018_factorized,
        bmshj2018_hyperprior,
        cheng2020_anchor,
        cheng2020_attn,
        mbt2018,
        mbt2018_mean,
    )
    from compressai.zoo import load_state_dict as rename_old_weights

__all__ = [
    "GDN",
    "CheckerboardLatentCodec",
    "CheckerboardMaskedConv2d",
    "Cheng2020Anchor",
    "Cheng2020AnchorCheckerboard",
    "Cheng2020Attention",
    "CompressionModel",
    "Elic2022Chandelier",
    "Elic2022Official",
    "EntropyBottleneck",
    "EntropyModel",
    "FactorizedPriorNetwork",
    "FactorizedPriorReLU",
    "GaussianConditional",
    "JointAutoregressiveHierarchicalPriors",
    "MaskedConv2d",
    "MeanScaleHyperprior",
    "ScaleHyperprior",
    "bmshj2018_factorized",
    "bmshj2018_hyperprior",
    "cheng2020_anchor",
    "cheng2020_attn",
    "mbt2018",
    "mbt2018_mean",
    "rename_old_weights",
]
