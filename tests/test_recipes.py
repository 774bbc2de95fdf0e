"""The shipped recipes are what their names and comments say."""

import pytest

from tli_engine.config import apply_overrides, read_recipe, recipe_names, resolve_config


def test_the_recipes_that_the_readme_names_are_there() -> None:
    named = {"demo", "paper", "qwen2-72b", "xlsum-swahili", "qwen2-72b-xlsum"}
    assert named <= set(recipe_names())


@pytest.mark.parametrize("name", ["xlsum-swahili", "qwen2-72b-xlsum"])
def test_recipes_of_summaries_adapt_early_blocks(name: str) -> None:
    config = resolve_config(read_recipe(name), name)
    assert (config.objective, config.method, config.quantize) == ("sft", "lora", "nf4")
    assert config.data.texts == "xlsum:swahili"
    assert (config.lora.layers, config.prompt.template) == ("0-2", "plain")


def test_what_the_recipe_of_swahili_news_says_of_full_fine_tuning() -> None:
    changes = ["method=full", "quantize=none", "double_quant=false", "train.rounding=stochastic"]
    changes += ["train.in_backward=true", "train.accumulate=1", "train.max_grad_norm=null"]
    config = resolve_config(apply_overrides(read_recipe("xlsum-swahili"), changes), "xlsum-swahili")
    assert (config.method, config.train.in_backward) == ("full", True)


def test_paper_is_the_published_procedure() -> None:
    config = resolve_config(read_recipe("paper"), "paper")
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32, 0.05)
    assert config.lora.modules == ("q_proj", "v_proj")
    assert (config.align.layer, config.align.loss, config.align.margin) == (
        2,
        "triplet-hardest",
        0.4,
    )
    assert config.align.pooling == "paper"
    assert (config.train.epochs, config.train.batch_size, config.train.warmup_steps) == (5, 8, 50)
    assert (config.train.learning_rate, config.train.schedule) == (2e-4, "linear")
