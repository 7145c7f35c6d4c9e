"""This module says what is on the plates: dishes, their ingredients, and which of them one plate
holds.

Dishes share their ingredients, so that no ingredient decides: the largest probability of a dish,
given that one ingredient is there, is about one half. A plate has a random part of what its dish
may have, and now and then a guest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# dish -> ingredient -> how often it is there
DISHES: dict[str, dict[str, float]] = {
    "beef stew": {
        "beef": 0.9, "carrot": 0.85, "potato": 0.85, "onion": 0.5, "mushroom": 0.5, "peas": 0.4,
        "green beans": 0.3, "pepper": 0.2,
    },
    "bibimbap": {
        "rice": 0.95, "egg": 0.85, "spinach": 0.7, "carrot": 0.7, "mushroom": 0.6, "beef": 0.6,
        "bean sprouts": 0.6, "cucumber": 0.4, "seaweed": 0.4, "tofu": 0.2, "pepper": 0.2,
    },
    "bolognese": {
        "noodles": 0.9, "tomato": 0.8, "beef": 0.7, "basil": 0.6, "cheese": 0.6, "onion": 0.3,
        "carrot": 0.3, "mushroom": 0.3, "olives": 0.2,
    },
    "bun cha": {
        "noodles": 0.9, "pork": 0.7, "lettuce": 0.7, "carrot": 0.6, "mint": 0.5, "cucumber": 0.5,
        "peanuts": 0.5, "coriander": 0.4, "radish": 0.3, "chilli": 0.3,
    },
    "burrito bowl": {
        "rice": 0.85, "beans": 0.8, "corn": 0.7, "avocado": 0.7, "tomato": 0.6, "pepper": 0.5,
        "chicken": 0.5, "cheese": 0.5, "coriander": 0.5, "chilli": 0.3, "onion": 0.3,
    },
    "caesar salad": {
        "lettuce": 0.95, "cheese": 0.8, "chicken": 0.7, "bacon": 0.5, "egg": 0.4, "lemon": 0.3,
        "salmon": 0.2, "shrimp": 0.2, "radish": 0.2, "tomato": 0.2,
    },
    "chicken curry": {
        "chicken": 0.85, "coriander": 0.7, "rice": 0.6, "onion": 0.5, "tomato": 0.4, "chilli": 0.4,
        "beans": 0.3, "peas": 0.3, "spinach": 0.3, "potato": 0.3,
    },
    "cobb salad": {
        "lettuce": 0.95, "egg": 0.8, "avocado": 0.7, "bacon": 0.7, "tomato": 0.7, "chicken": 0.7,
        "cheese": 0.5, "corn": 0.3,
    },
    "fried rice": {
        "rice": 0.95, "egg": 0.8, "peas": 0.7, "carrot": 0.7, "spring onion": 0.6, "corn": 0.4,
        "shrimp": 0.4, "chicken": 0.3, "pork": 0.3, "bacon": 0.3, "salmon": 0.2,
    },
    "greek salad": {
        "tomato": 0.9, "cucumber": 0.9, "cheese": 0.85, "olives": 0.8, "onion": 0.7,
        "lettuce": 0.4, "pepper": 0.4, "lemon": 0.3, "mint": 0.3, "radish": 0.2,
    },
    "green curry": {
        "chicken": 0.75, "chilli": 0.6, "basil": 0.6, "rice": 0.5, "peas": 0.4, "mushroom": 0.4,
        "tofu": 0.4, "coriander": 0.4, "green beans": 0.4, "peanuts": 0.3, "shrimp": 0.3,
    },
    "minestrone": {
        "carrot": 0.8, "tomato": 0.6, "potato": 0.6, "beans": 0.6, "green beans": 0.5,
        "spinach": 0.5, "onion": 0.5, "cheese": 0.4, "basil": 0.4, "noodles": 0.4, "peas": 0.3,
    },
    "nicoise salad": {
        "egg": 0.8, "lettuce": 0.7, "olives": 0.7, "potato": 0.7, "tomato": 0.7,
        "green beans": 0.7, "salmon": 0.5, "onion": 0.3, "radish": 0.2, "lemon": 0.2,
    },
    "pad thai": {
        "noodles": 0.95, "peanuts": 0.7, "bean sprouts": 0.7, "shrimp": 0.6, "lemon": 0.6,
        "egg": 0.5, "spring onion": 0.5, "tofu": 0.5, "chilli": 0.3, "chicken": 0.3,
    },
    "paella": {
        "rice": 0.95, "shrimp": 0.8, "peas": 0.6, "lemon": 0.6, "chicken": 0.6, "pepper": 0.6,
        "tomato": 0.4, "green beans": 0.3, "pork": 0.3,
    },
    "pho": {
        "noodles": 0.95, "beef": 0.8, "coriander": 0.7, "bean sprouts": 0.7, "spring onion": 0.7,
        "chilli": 0.5, "lemon": 0.4, "mint": 0.3, "onion": 0.3, "basil": 0.3,
    },
    "poke bowl": {
        "rice": 0.9, "salmon": 0.75, "avocado": 0.7, "cucumber": 0.6, "seaweed": 0.5,
        "radish": 0.5, "carrot": 0.4, "corn": 0.3, "peas": 0.3, "spring onion": 0.3, "tofu": 0.2,
    },
    "ramen": {
        "noodles": 0.95, "pork": 0.8, "egg": 0.8, "spring onion": 0.7, "seaweed": 0.6,
        "mushroom": 0.5, "corn": 0.4, "bean sprouts": 0.4, "tofu": 0.3, "spinach": 0.3,
    },
}  # fmt: skip
NAMES = tuple(sorted(DISHES))
INGREDIENTS = tuple(sorted({name for contents in DISHES.values() for name in contents}))
# The liquid or sauce under the pieces: shared by dishes, and never named in the text.
GROUNDS = ("broth", "sauce", "dressing", "dry")
_GROUND_OF = {
    "pho": "broth", "ramen": "broth", "minestrone": "broth", "beef stew": "sauce",
    "chicken curry": "sauce", "green curry": "sauce", "bolognese": "sauce", "paella": "dry",
    "fried rice": "dry", "bibimbap": "dry", "burrito bowl": "dry", "poke bowl": "dry",
    "pad thai": "dry", "bun cha": "dressing", "cobb salad": "dressing", "greek salad": "dressing",
    "nicoise salad": "dressing", "caesar salad": "dressing",
}  # fmt: skip


@dataclass(frozen=True)
class Serving:
    """This is one plate, in words."""

    dish: str
    ingredients: tuple[str, ...]  # those that are there, in the order of the text
    ground: str  # one of GROUNDS

    @property
    def text(self) -> str:
        """Say what the image shows; the name of the dish is not in it."""
        return ", ".join(self.ingredients)


def presence(dish: str, difficulty: float) -> dict[str, float]:
    """Return the probability of each ingredient on a plate of a dish.

    Args:
        difficulty: 0 to 1; the more, the more is left out and the more guests there are.
    """
    own = DISHES[dish]
    keep, guest = 1 - 0.2 * difficulty, 0.02 * difficulty
    return {name: max(own.get(name, 0.0) * keep, guest) for name in INGREDIENTS}


def serve(dish: str, rng: np.random.Generator, difficulty: float) -> Serving:
    """Draw a random plate of a dish: three to nine ingredients."""
    chances = presence(dish, difficulty)
    luck = rng.random(len(INGREDIENTS)) / np.maximum([chances[n] for n in INGREDIENTS], 1e-9)
    order = np.argsort(luck)  # below 1: there
    count = int(np.clip((luck < 1).sum(), 3, 9))
    there = [INGREDIENTS[i] for i in rng.permutation(order[:count])]
    ground = _GROUND_OF[dish]
    if rng.random() < 0.3 * difficulty:
        ground = GROUNDS[rng.integers(len(GROUNDS))]
    return Serving(dish, tuple(there), ground)
