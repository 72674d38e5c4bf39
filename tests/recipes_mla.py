"""Recipes of families with multi-head latent attention."""

from recipes import Recipe

RECIPES: dict[str, Recipe] = {}
