"""``swiftmoe plan hf=FOLDER``: counts from a configuration alone."""

import pytest
import torch
import transformers

from lightning_swiftmoe.cli.main import main
from lightning_swiftmoe.hf.sizes import read_sizes
from tests.hf.families import config_of, model_of

QWEN3_30B_A3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("family", "layers", "experts", "top_k", "gated"),
    [
        ("mixtral", 2, 6, 2, True),
        ("olmoe", 2, 6, 3, True),
        ("qwen3_moe", 2, 6, 2, True),
        ("granitemoe", 2, 6, 2, True),
        ("qwen3_5_moe", 2, 6, 2, True),
        ("deepseek_v3", 2, 8, 3, True),  # and a dense first layer
        ("nemotron_h", None, None, None, False),
        ("gpt_oss", 2, 6, 2, True),
    ],
)
def test_counts_are_those_of_the_model(tmp_path, family, layers, experts, top_k, gated):
    if config_of(family) is None:
        pytest.skip("not in this transformers")
    model = model_of(family, "eager", torch.float32)
    model.config.save_pretrained(tmp_path)
    sizes = read_sizes(tmp_path)
    assert sizes == read_sizes(tmp_path / "config.json")
    assert sizes.num_params == model.num_parameters()
    in_experts = [param for name, param in model.named_parameters() if ".experts." in name]
    assert sizes.num_expert_params == sum(param.numel() for param in in_experts)
    matrices = 3 if sizes.gated else 2
    of_one = matrices * sizes.width * sizes.expert_width
    if family == "gpt_oss":  # biases, of gate, up and down projection
        of_one += 2 * sizes.expert_width + sizes.width
    assert sizes.num_expert_params == sizes.num_moe_layers * sizes.num_experts * of_one
    assert sizes.gated == gated
    if layers is not None:
        assert (sizes.num_moe_layers, sizes.num_experts, sizes.top_k) == (layers, experts, top_k)


def plan(capsys, *args):
    assert main(["plan", "cluster=h100_8x8", *args]) == 0
    return capsys.readouterr().out


def test_the_plan_is_that_of_our_model_of_the_same_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    transformers.Qwen3MoeConfig(**QWEN3_30B_A3B).save_pretrained("qwen3")
    ours, theirs = plan(capsys, "model=qwen3_30b_a3b"), plan(capsys, "hf=qwen3")
    assert theirs.startswith("30.53 B parameters on 64 x NVIDIA H100 SXM")
    memory, steps = theirs.split("modelled step")
    # Blocks of transformers keep more activations.
    rows, expected = (
        [line for line in text.splitlines() if "activations" not in line and "needed" not in line]
        for text in (memory, ours.split("modelled step")[0])
    )
    assert rows == expected
    assert len(steps.splitlines()) > 10


def test_what_cannot_be_planned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    transformers.LlamaConfig(num_hidden_layers=2).save_pretrained("llama")
    for folder, message in {
        "nowhere": "there is no nowhere/config.json: give the folder of a model of transformers",
        "llama": "LlamaForCausalLM has no experts, so there is nothing to place",
    }.items():
        assert main(["plan", "cluster=h100_8x8", f"hf={folder}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert main(["plan", "cluster=h100_8x8", "model=hf", "model.path=llama"]) == 2
    wanted = "error: model=hf is for swiftmoe train; swiftmoe plan takes the folder of a model by hf=FOLDER\n"
    assert capsys.readouterr().err == wanted
