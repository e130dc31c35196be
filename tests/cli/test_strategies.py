"""Naming a system is enough: each strategy brings its policy, its capacity and the place of its optimizer state."""

import pytest
from hydra import compose, initialize_config_module

from lightning_swiftmoe.cli.compose import prepare_hydra
from lightning_swiftmoe.cli.main import main
from lightning_swiftmoe.report.runs import system_of
from tests.processes import swiftmoe

SYSTEMS = {
    "swiftmoe": ("exact", "pooled", "decoupled"),
    "paper": ("proportional", "cluster", "decoupled"),
    "static": ("static", "rank", "bound"),
    "flexmoe": ("flexmoe", "cluster", "bound"),
    "flexmoe_10": ("flexmoe_10", "cluster", "bound"),
    "flexmoe_50": ("flexmoe_50", "cluster", "bound"),
    "flexmoe_100": ("flexmoe_100", "cluster", "bound"),
}
RECIPES = ["quickstart", "gpt_small_a100_16x1", "paper/fig7_table3", "paper/fig11_aux_loss"]


def composed(*overrides):
    prepare_hydra()
    with initialize_config_module("conf", version_base=None):
        return compose("train", [*overrides, "run_dir=."])


@pytest.mark.parametrize("strategy", SYSTEMS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_strategy_brings_its_policy(strategy, recipe):
    config = composed(f"strategy={strategy}", f"recipes={recipe}", "model.capacity_factor=1.0")
    assert (system_of(config), config.strategy.capacity_scope, config.strategy.optimizer_state) == SYSTEMS[strategy]


def test_a_policy_named_on_its_own_wins():
    config = composed("strategy=static", "policy=flexmoe_10")
    assert (system_of(config), config.strategy.optimizer_state) == ("flexmoe_10", "bound")


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.slow
def test_bound_state_from_the_command_line(tmp_path):
    always = ["strategy=flexmoe", "policy.name.threshold=1.0"]
    sizes = ["model.num_experts=6", "strategy.slots_per_rank=5", "data.limit_bytes=100000", "trainer.max_steps=4"]
    quick = ["recipes=quickstart", "trainer.enable_progress_bar=false", "run_dir=run"]
    code, text = swiftmoe("train", *quick, *always, *sizes, cwd=tmp_path)
    assert code == 0, text
    assert "migration phase" in text
    assert "of the experts it hosts" in text


@pytest.mark.parametrize("cluster", ["local_cpu", "virtual_16x1"])
def test_unknown_place_for_the_state(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"cluster={cluster}", "strategy.optimizer_state=hosts"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:")
    assert "optimizer_state must be one of decoupled, bound, got 'hosts'" in line
