"""The mathematics of distillation as pure functions on tensors; the only import is torch, and Triton where it is installed."""

from lit_distill.functional.calibration import (
    CalibrationBins,
    brier_score,
    equal_mass_bins,
    equal_width_bins,
    expected_calibration_error,
)
from lit_distill.functional.distributions import entropy
from lit_distill.functional.divergences import (
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    total_variation,
)
from lit_distill.functional.exposure_bias import ExposureBias, exposure_bias
from lit_distill.functional.extrapolated import extrapolated_reverse_kl
from lit_distill.functional.importance import (
    DecisionWeights,
    WeightKind,
    decision_weights,
    effective_sample_size,
    importance_weights,
)
from lit_distill.functional.packing import PackedRows, assign_rows, pack_rows
from lit_distill.functional.policy_gradient import (
    clipped_surrogate,
    is_clipped,
    reverse_kl_k1,
    reverse_kl_k3,
    reward_to_go,
    scale_and_clip_rewards,
    standardize,
)
from lit_distill.functional.preference import (
    PreferenceVariant,
    TokenPreferenceVariant,
    direct_preference_loss,
    implicit_reward,
    token_preference_loss,
    unrepeated_length,
)
from lit_distill.functional.sampled import sampled_reverse_kl
from lit_distill.functional.schedules import cosine_schedule, linear_schedule, stepwise_schedule
from lit_distill.functional.sparse import Draws, bits_for, draw, pack_bits, top_k, unpack_bits
from lit_distill.functional.top_k_kl import (
    TopKOverlap,
    TopKSupport,
    common_share,
    top_k_forward_kl,
    top_k_overlap,
    top_k_reverse_kl,
)
from lit_distill.functional.weighted_kl import adaptive_kl, entropy_gate, entropy_gated_kl

__all__ = [
    "CalibrationBins",
    "DecisionWeights",
    "Draws",
    "ExposureBias",
    "PackedRows",
    "PreferenceVariant",
    "TokenPreferenceVariant",
    "TopKOverlap",
    "TopKSupport",
    "WeightKind",
    "adaptive_kl",
    "assign_rows",
    "bits_for",
    "brier_score",
    "clipped_surrogate",
    "common_share",
    "cosine_schedule",
    "decision_weights",
    "direct_preference_loss",
    "draw",
    "effective_sample_size",
    "entropy",
    "entropy_gate",
    "entropy_gated_kl",
    "equal_mass_bins",
    "equal_width_bins",
    "expected_calibration_error",
    "exposure_bias",
    "extrapolated_reverse_kl",
    "forward_kl",
    "implicit_reward",
    "importance_weights",
    "is_clipped",
    "jensen_shannon",
    "linear_schedule",
    "pack_bits",
    "pack_rows",
    "reverse_kl",
    "reverse_kl_k1",
    "reverse_kl_k3",
    "reward_to_go",
    "sampled_reverse_kl",
    "scale_and_clip_rewards",
    "skew_forward_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "standardize",
    "stepwise_schedule",
    "token_preference_loss",
    "top_k",
    "top_k_forward_kl",
    "top_k_overlap",
    "top_k_reverse_kl",
    "total_variation",
    "unpack_bits",
    "unrepeated_length",
]
