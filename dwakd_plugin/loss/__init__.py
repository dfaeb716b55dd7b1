"""The DWA-KD loss: pure functions of tensors and of the recipe's loss settings."""

from dwakd_plugin.loss.objective import Head, LossTerms, ResponseStates, dwakd_loss

__all__ = ["Head", "LossTerms", "ResponseStates", "dwakd_loss"]
