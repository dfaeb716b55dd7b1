"""The one kind of error that a user can put right; it is shown as its message alone."""


class UserError(Exception):
    """A mistake in the recipe or its surroundings: what is wrong, and what to do about it."""
