"""From composed configs to the simulator's values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_swiftmoe.arguments import check, check_count, check_number
from lightning_swiftmoe.cluster import resolve_group_size, resolve_slots
from lightning_swiftmoe.layers.model_sizes import ModelSizes
from lightning_swiftmoe.models import GPTConfig
from lightning_swiftmoe.simulate import Efficiency, Hardware, LoadTrace, ModelShape, Scenario

_FLAGS = ("adapt_model", "hf_recompute", "offload", "published_baselines", "report", "spread")


def check_values(config: DictConfig) -> None:
    """Look at options of ``simulate`` and ``plan`` under the names that their users know.

    Raises:
        ValueError: a value of the wrong type, or one that means nothing.
    """
    for name in _FLAGS:
        if name in config:
            check(isinstance(config[name], bool), name, config[name], "true or false")
    if config.num_ranks is not None:
        check_count("num_ranks", config.num_ranks, "null (the whole cluster) or a positive integer")
    if config.capacity_factor is not None:
        said = "null (no token is dropped) or a number above zero"
        check_number("capacity_factor", config.capacity_factor, said, above=0)
    check_mapping("efficiency", config.efficiency, "{compute: 0.4}")
    for name, value in config.efficiency.items():
        if value is not None:
            check_number(f"efficiency.{name}", value, "null or a number above zero", above=0)


def check_mapping(name: str, value: Any, example: str) -> None:
    """Raise a ValueError for what has no keys."""
    check(isinstance(value, DictConfig), name, value, f"a mapping such as {example}")


def hardware_of(config: DictConfig) -> Hardware:
    """The cluster's hardware, cut to ``num_ranks`` when that is given.

    Raises:
        ValueError: no cluster, or one without (valid) hardware.
    """
    cluster = _plain(config.get("cluster"))
    values = cluster.get("hardware") if isinstance(cluster, Mapping) else None
    if not isinstance(values, Mapping):
        raise ValueError(
            f"a cluster with a 'hardware:' section is needed, such as cluster=a100_16x1; {_why_none(cluster)}"
        )
    for own, name in (("num_nodes", "num_nodes"), ("gpus_per_node", "devices")):
        if name in cluster and values.get(own) == cluster[name]:  # taken from there, and known by that name
            check_count(f"cluster.{name}", cluster[name])
    hardware = Hardware.from_mapping(values)
    return hardware if config.num_ranks is None else hardware.with_ranks(config.num_ranks)


def _why_none(cluster: Any) -> str:
    if not isinstance(cluster, Mapping):
        return "got none"
    if cluster.get("virtual_ranks"):
        return (
            f"this one is a single process that drops tokens as {cluster['virtual_ranks']} ranks would and sends "
            "nothing, so its steps are not those of a cluster"
        )
    return "this one does not say what its machines can do; describe them as conf/cluster/h100_8x8.yaml does"


def model_of(config: DictConfig, trace: LoadTrace | None = None) -> ModelShape:
    """The model's sizes.

    Args:
        config: holds ``model``, the fields of ``GPTConfig``; or ``hf``, a folder of a transformers model.
        trace: when given and ``adapt_model`` is set, its experts and top_k replace the model's, and its layers the
            number of MoE layers.

    Raises:
        ImportError: ``hf`` without transformers.
        ValueError: no model that ranks can share, or one without experts.
    """
    if config.get("hf") is not None:
        from lightning_swiftmoe.hf.sizes import read_sizes

        sizes = read_sizes(config.hf)
        return shape_of(dataclasses.replace(sizes, max_seq_len=config.hf_seq_len, recompute=config.hf_recompute))
    shape = shape_of(GPTConfig(**_plain(config.model)).sizes())
    if trace is None or not config.adapt_model:
        return shape
    num_layers = max(shape.num_layers, trace.num_layers)
    return dataclasses.replace(
        shape,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        num_layers=num_layers,
        num_moe_layers=trace.num_layers,
    )


def shape_of(sizes: ModelSizes) -> ModelShape:
    """Of a model under sequences as long as it reads, with the exact number of parameters outside the experts.

    Raises:
        ValueError: a model without MoE layers, or one that does not say how much it reads.
    """
    if sizes.max_seq_len is None:
        raise ValueError("the model does not say how long its sequences are")
    if sizes.num_moe_layers == 0:
        raise ValueError("the model has no MoE layers, so there is nothing to place; set moe_every to 1 or more")
    return ModelShape(
        dim=sizes.width,
        ffn_dim=sizes.expert_width,
        num_layers=sizes.num_layers,
        num_moe_layers=sizes.num_moe_layers,
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        vocab_size=sizes.vocab_size,
        seq_len=sizes.max_seq_len,
        gated=sizes.gated,
        recompute=sizes.recompute,
        num_other_params=sizes.num_dense_params,
        block_bytes=sizes.block_bytes,
    )


def scenario_of(config: DictConfig, model: ModelShape, hardware: Hardware) -> Scenario:
    """Model, cluster and options together.

    Raises:
        ValueError: what ``Scenario`` refuses.
    """
    expert_parallel_size = config.get("expert_parallel_size")
    group_size = resolve_group_size(expert_parallel_size, hardware.num_ranks)
    return Scenario(
        model=model,
        hardware=hardware,
        slots_per_rank=resolve_slots(config.slots_per_rank, model.num_experts, group_size),
        capacity_factor=None if config.get("hf") is not None else config.capacity_factor,
        offload=config.offload,
        published_baselines=config.get("published_baselines", False),
        efficiency=Efficiency.from_mapping({k: v for k, v in _plain(config.efficiency).items() if v is not None}),
        expert_parallel_size=expert_parallel_size,
    )


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
