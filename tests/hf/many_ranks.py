"""``python -m tests.hf.many_ranks RANK``: one of 64 ranks starts on DeepSeek-V3, 671 B parameters, on the meta device.

The set-up is a real rank's. Nothing has memory, and nobody else is there: what ranks say to each other is made up.
"""

import json
import resource
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, DeepseekV3Config

import lightning_swiftmoe.hf
from lightning_swiftmoe import ExpertRebalancer
from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.mesh import Groups
from lightning_swiftmoe.parallel.setup import Parallelism, build_layers
from lightning_swiftmoe.parallel.traffic import TrafficMeter
from lightning_swiftmoe.placement.token_rule import token_rule

RANKS, SLOTS = 64, 8
META = torch.device("meta")


class Saved:
    """Stands for the safetensors of a folder, whose numbers are not there."""

    def __init__(self, model):
        self.shapes = {name: param.shape for name, param in model.named_parameters()}

    def whole(self, name):
        return torch.empty(self.shapes[name], device=META)

    def chunks(self, name, rows):
        num_experts, num_rows, *rest = self.shapes[name]
        yield torch.empty(num_experts, len(range(num_rows)[rows]), *rest, device=META)


def start(rank):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    groups, meter = Groups.of(RANKS, timedelta(seconds=30)), TrafficMeter()
    ranks = Communicator(groups.experts, META, meter)
    parallelism = Parallelism(RANKS, META, ranks, ranks, ranks, ranks, meter, (groups, groups, groups))
    with META:
        model = AutoModelForCausalLM.from_config(DeepseekV3Config(), experts_implementation=lightning_swiftmoe.hf.NAME)
    model.swiftmoe_weights = Saved(model)
    layers = build_layers(
        model,
        parallelism,
        lambda name, moe: ClusterShape(RANKS, SLOTS, moe.num_experts),
        ExpertRebalancer("balanced").state,
        compute_dtype="bf16-mixed",
        accumulates=False,
        gradient_dtype=None,
        offload=False,
        rule=token_rule("pooled", "exact", 0),
        state_place="decoupled",
        masters={},
        seed=0,
    )
    hosted = [layer.hosted for layer in layers]
    for experts in hosted:
        experts.install()
    return {
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "parameters": sum(param.numel() for param in model.parameters()),
        "experts": sum(param.numel() for experts in hosted for param in experts.parameters.values()),
        "shards": sum(experts.local(key).numel() for experts in hosted for key in experts.parameters),
        "residents": sum(resident.numel() for experts in hosted for resident in experts.residents().values()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(start(int(sys.argv[1]))))
