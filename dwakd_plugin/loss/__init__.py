"""The DWA-KD loss: pure functions of tensors and of the recipe's loss settings."""

from dwakd_plugin.loss.objective import (
    Alignment,
    Head,
    LossTerms,
    ResponseStates,
    alignment_of,
    dwakd_loss,
)

__all__ = ["Alignment", "Head", "LossTerms", "ResponseStates", "alignment_of", "dwakd_loss"]
