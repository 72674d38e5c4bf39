"""Recipes of mixture-of-experts families."""

from recipes import Recipe

RECIPES: dict[str, Recipe] = {}
