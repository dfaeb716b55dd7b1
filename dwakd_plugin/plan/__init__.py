"""What a run will take, in memory and time, before it is tried; no weights are loaded."""

from dwakd_plugin.plan.cards import Card, card
from dwakd_plugin.plan.parts import Lengths
from dwakd_plugin.plan.peak import Plan, largest_micro_batch, plan
from dwakd_plugin.plan.remedies import Suggestion, suggestions

__all__ = [
    "Card",
    "Lengths",
    "Plan",
    "Suggestion",
    "card",
    "largest_micro_batch",
    "plan",
    "suggestions",
]
