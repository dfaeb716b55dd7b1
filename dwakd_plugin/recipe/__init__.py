"""The recipe: its schema, what it may not ask for, and the files it names.

Reads no model, and imports neither torch nor axolotl.
"""

__all__ = ["checks", "places", "schema"]
