"""The recipe: its schema, what it may not ask for, and the files it names.

Reads no model, and imports neither torch nor axolotl.
"""

from dwakd_plugin.recipe.recipe import ENGINE_KEYS, Recipe

__all__ = ["ENGINE_KEYS", "Recipe", "blocks", "checks", "places", "reading", "schema"]
