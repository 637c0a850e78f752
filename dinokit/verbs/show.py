"""dinokit show RECIPE [key=value ...]: the whole recipe, its size, memory and learning rate; runs nothing.

Every default is filled in; the output is a recipe itself: dinokit show scenes_cpu > mine.yaml
"""

from collections.abc import Sequence

from dinokit import judge, shelves
from dinokit.config import load_recipe, to_yaml
from dinokit.verbs import Command


def run(command: Command) -> None:
    word = command.one_word("recipe", shelves.recipe_names())
    recipe = load_recipe(word, command.settings, judge.architecture)
    from dinokit.train.plan import plan

    print(to_yaml(recipe, template=True))
    for key, value in plan(recipe).items():
        print(f"# {key}: {value}")


def describe(words: Sequence[str]) -> str:
    return f"recipes: {', '.join(shelves.recipe_names())}"
