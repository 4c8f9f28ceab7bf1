"""scripts/recipes: settings that train.py takes, and figures that were measured."""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gpucnn import optim, schedules
from gpucnn.models import MODELS
from scripts import train

RECIPES = sorted((Path(train.__file__).parent / "recipes").glob("*.toml"))
SHAPES = {"fashion-mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


def test_there_is_one_for_each_network_of_its_kind():
    assert [path.stem for path in RECIPES] == ["airbench94", "article", "lenet5", "resnet18"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_says_its_command_and_what_was_measured(path):
    comments = re.sub(r"\n# ?", " ", path.read_text(encoding="utf-8").split("\ndata =")[0])
    assert f"python scripts/train.py scripts/recipes/{path.name}" in comments
    assert re.search(r"accuracy 0\.\d{4}", comments), "the accuracy"
    assert re.search(r"\d seconds", comments), "the time"
    assert re.search(r"NVIDIA|AMD", comments), "the machine"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_is_what_train_py_takes(path):
    settings = train.parser().parse_args([str(path)])
    train.check_arguments(settings)
    assert settings.seed == 0
    model = MODELS[settings.model](10)
    model.build(SHAPES[settings.data])
    optimizer = optim.BY_NAME[settings.optimizer](model, learning_rate=settings.learning_rate)
    schedule = schedules.BY_NAME[settings.schedule](optimizer.learning_rate, 100)
    assert max(schedule(step) for step in range(100)) == pytest.approx(settings.learning_rate,
                                                                       rel=0.01)
    y = model.forward(np.zeros((2, *SHAPES[settings.data]), np.float32))
    assert y.shape == (2, 10)
