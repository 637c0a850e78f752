"""dinokit demo [key=value ...]: pretrain on the built-in scenes, judge, print a table; takes minutes."""

from dinokit import judge
from dinokit.config import load_recipe
from dinokit.verbs import Command
from dinokit.verbs.train import pretrain


def run(command: Command) -> None:
    command.no_words(" The demo has a recipe of its own; another one: dinokit train RECIPE.")
    recipe = load_recipe("scenes_cpu", ["run.out=runs/demo", *command.settings])
    if "knn" not in recipe.evals:
        raise ValueError("dinokit demo needs evals.knn.")
    out = pretrain(recipe)
    import torch
    from rich.console import Console
    from rich.table import Table

    from dinokit.train.student_teacher import build_backbone

    torch.manual_seed(recipe.run.seed)
    trained = judge.load_judged(out, None, recipe.run.device)
    place = next(trained.parameters()).device
    pixels = {"name": "pixels", "size": recipe.crops.globals.size}
    judged = {
        "raw pixels, 16 x 16": judge.load_judged(None, pixels, recipe.run.device),
        "the same ViT, untrained": build_backbone(recipe).to(place).eval(),
        "your DINOv2": trained,
    }
    table = Table(
        "features",
        "k-NN top-1 (k=20)",
        title="Built-in scenes: ten shapes, test images never seen in training",
    )
    values = {key: value for key, value in recipe.evals["knn"].items() if key != "every"}
    values = judge.with_data("knn", values, recipe.data)
    for label, backbone in judged.items():
        table.add_row(label, f"{100 * judge.run_evaluator('knn', values, backbone)['top1@20']:.1f} %")
    Console().print(table)
    print(f"Weights: {out}/teacher.safetensors   curves: {out}/metrics.jsonl   recipe: {out}/recipe.yaml")
    print("Now your own: dinokit train small_photos data.path=PHOTOS run.out=runs/photos")
