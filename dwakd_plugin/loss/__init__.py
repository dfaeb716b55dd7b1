"""The DWA-KD loss: pure functions of tensors and of the recipe's loss settings."""

from dwakd_plugin.loss.objective import Alignment, LossTerms, alignment_of, dwakd_loss
from dwakd_plugin.loss.states import Head, ResponseStates

__all__ = ["Alignment", "Head", "LossTerms", "ResponseStates", "alignment_of", "dwakd_loss"]
