"""Recipes of the dense families beyond the core ones."""

from recipes import Recipe

RECIPES: dict[str, Recipe] = {}
