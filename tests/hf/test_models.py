"""Whole models with our experts beside the same models with transformers' own eager ones: loss and every gradient."""

import pytest
import torch
import transformers
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_swiftmoe.hf import NAME, experts_forward
from tests.hf.families import FAMILIES, config_of, loss_and_gradients, model_of, tokens_of

# Nemotron's eager experts add up in the dtype of the gate weights, which its router leaves in fp32.
TOLERANCES = {"nemotron_h": 1e-5}
families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.skipif(config_of(family) is None, reason="not in this transformers"))
        for family in FAMILIES
    ],
)
Results = dict[str, Tensor]


def assert_close(got: Results, want: Results, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        error = (got[name] - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance}"


def distance(got: Results, want: Results) -> float:
    """Of all numbers at once, relative: a single small gradient in bf16 says nothing."""
    assert got.keys() == want.keys()
    difference = sum((got[name].double() - want[name].double()).square().sum() for name in want)
    return float((difference / sum(tensor.double().square().sum() for tensor in want.values())).sqrt())


def experts_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "is_transposed")}


@families
def test_fp64_equals_eager(family):
    eager, ours = model_of(family, "eager", torch.float64), model_of(family, NAME, torch.float64)
    ids = tokens_of(eager)
    got = loss_and_gradients(ours, ids)
    assert_close(got, loss_and_gradients(eager, ids), TOLERANCES.get(family, 1e-10))
    for name, experts in experts_of(ours).items():  # else the comparison would show nothing
        assert all(got[f"{name}.{weight}"].any() for weight, _ in experts.named_parameters())


@families
def test_it_is_our_function_that_runs(family, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args[0])
        return experts_forward(*args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, NAME, counted)
    model = model_of(family, NAME, torch.float32)
    model(input_ids=tokens_of(model), use_cache=False)
    assert calls == list(experts_of(model).values())
    assert len(calls) >= 1


def assert_as_near_to_fp64_as_eager(family: str, dtype: torch.dtype, autocast: bool) -> None:
    """By three models: where one rounds better by chance, another does not."""
    ratios = []
    for seed in range(3):
        eager, ours = model_of(family, "eager", dtype, seed), model_of(family, NAME, dtype, seed)
        ids = tokens_of(eager)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            of_eager, of_ours = loss_and_gradients(eager, ids), loss_and_gradients(ours, ids)
        assert [tensor.dtype for tensor in of_ours.values()] == [tensor.dtype for tensor in of_eager.values()]
        truth = loss_and_gradients(eager.double(), ids)  # of the rounded weights
        assert distance(of_ours, of_eager) <= 0.1
        ratios.append(distance(of_ours, truth) / distance(of_eager, truth))
    assert sorted(ratios)[1] <= 1.5, ratios


@families
def test_bf16_is_as_near_to_fp64_as_eager_is(family):
    """Not the same bits: what a token's experts give is rounded once here, and at every addition there."""
    assert_as_near_to_fp64_as_eager(family, torch.bfloat16, autocast=False)


@families
def test_autocast_is_as_near_to_fp64_as_eager_is(family):
    assert_as_near_to_fp64_as_eager(family, torch.float32, autocast=True)


@families
def test_saved_and_loaded_with_the_implementation(family, tmp_path):
    model = model_of(family, NAME, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation=NAME, attn_implementation="eager").train()
    assert loaded.get_experts_implementation()[""] == NAME
    ids = tokens_of(model)
    want, got = loss_and_gradients(model, ids), loss_and_gradients(loaded, ids)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert NAME not in (tmp_path / "config.json").read_text()  # whoever loads it need not have us


@families
def test_set_on_a_model_that_is_there(family):
    model = model_of(family, "eager", torch.float64)
    ids = tokens_of(model)
    want = loss_and_gradients(model, ids)
    model.set_experts_implementation(NAME)
    assert model.get_experts_implementation()[""] == NAME
    got = loss_and_gradients(model, ids)
    assert_close(got, want, TOLERANCES.get(family, 1e-10))
    assert any(not torch.equal(got[name], want[name]) for name in want) or family == "gpt_oss"  # other sums
    model.set_experts_implementation("eager")
    again = loss_and_gradients(model, ids)
    assert all(torch.equal(again[name], want[name]) for name in want)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"], ids=["fused", "unfused"])
def test_checkpointed_activations(family):
    model = model_of(family, NAME, torch.float64)
    ids = tokens_of(model)
    want = loss_and_gradients(model, ids)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its newer name first
    assert_close(loss_and_gradients(model, ids), want, 1e-12)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"], ids=["fused", "unfused"])
def test_a_frozen_model_with_trained_routers(family):
    """Gradients of gate weights alone."""
    eager, ours = model_of(family, "eager", torch.float64), model_of(family, NAME, torch.float64)
    for model in (eager, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("gate.weight" in name or "router" in name)
    ids = tokens_of(eager)
    got = loss_and_gradients(ours, ids)
    assert len(got) > 1
    assert_close(got, loss_and_gradients(eager, ids), 1e-10)


def test_generates_what_eager_does():
    eager, ours = model_of("olmoe", "eager", torch.float64), model_of("olmoe", NAME, torch.float64)
    options = {"max_new_tokens": 6, "do_sample": False}
    prompt = tokens_of(eager, (2, 5))
    assert torch.equal(ours.eval().generate(prompt, **options), eager.eval().generate(prompt, **options))


def test_transformers_knows_the_name():
    model = transformers.AutoModelForCausalLM.from_config(config_of("mixtral"), experts_implementation=NAME)
    assert ALL_EXPERTS_FUNCTIONS[model.config._experts_implementation] is experts_forward
