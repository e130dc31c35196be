"""The decoder and its LightningModule."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_swiftmoe import MoE
from lightning_swiftmoe.functional import activation_names
from lightning_swiftmoe.layers.experts import Experts
from lightning_swiftmoe.models import GPT, GPTConfig, GPTModule
from lightning_swiftmoe.models.gpt import Attention, DenseMLP, rotate
from lightning_swiftmoe.models.language_module import decay_groups, warmup_cosine
from tests.jobs import Job, full, our_trainer
from tests.ranks import run_ranks

SMALL = {
    "vocab_size": 11,
    "max_seq_len": 8,
    "num_layers": 2,
    "hidden_size": 8,
    "num_heads": 2,
    "ffn_size": 12,
    "num_experts": 4,
}
MODERN = {**SMALL, "rotary": True, "norm": "rms", "activation": "swiglu", "num_kv_heads": 1, "tie_embeddings": False}


def gpt(config):
    model = GPT(GPTConfig(**config)).double()
    with torch.no_grad():  # larger than the initial values, so that differences show
        for param in model.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return model


def tokens(batch=3, length=8):
    return torch.randint(11, (batch, length))


@pytest.mark.parametrize("config", [SMALL, MODERN, {**SMALL, "top_k": 2, "moe_every": 2}])
def test_a_future_token_changes_no_earlier_logit(config):
    model, seen = gpt(config), tokens()
    for position in range(1, 8):
        changed = seen.clone()
        changed[:, position] = (changed[:, position] + 1) % 11
        before, after = model(seen), model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-13)
        assert (after[:, position] - before[:, position]).abs().min() > 1e-6


def test_loss_is_the_mean_negative_log_likelihood():
    model, batch = gpt(SMALL), tokens(length=9)
    prob = model(batch[:, :-1]).softmax(dim=-1)
    by_hand = [-math.log(prob[b, t, batch[b, t + 1]].item()) for b in range(3) for t in range(8)]
    assert model.loss(batch).item() == pytest.approx(sum(by_hand) / 24, rel=1e-6)


def test_attention_against_its_definition():
    config = GPTConfig(**{**MODERN, "num_heads": 4, "num_kv_heads": 2})
    attention, x = Attention(config).double(), torch.randn(2, 6, 8, dtype=torch.float64)
    q, k, v = (attention.qkv(x)).split([8, 4, 4], dim=-1)
    heads = []
    for head in range(4):
        cut, shared = slice(2 * head, 2 * head + 2), slice(2 * (head // 2), 2 * (head // 2) + 2)
        score = rotate(q[..., cut]) @ rotate(k[..., shared]).transpose(1, 2) / math.sqrt(2)
        score = score.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        heads.append(score.softmax(dim=-1) @ v[..., shared])
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, dim=-1)))


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64).expand(2, 1, 1, 9, 6)
    score = (rotate(q) @ rotate(k).transpose(2, 3))[0, 0]
    for distance in range(-8, 9):
        diagonal = score.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert (score.diagonal(1)[0] - score.diagonal(2)[0]).abs() > 1e-3


@pytest.mark.parametrize("extra", [{}, {"capacity_factor": 1.0, "top_k": 2}, {"bias_update_rate": 0.1}])
def test_activation_checkpointing_changes_nothing(extra):
    batch, results = tokens(length=9), []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = gpt({**SMALL, **extra, "checkpoint_activations": checkpointing})
        for _ in range(2):
            model.zero_grad()
            loss = model.loss(batch)
            loss.backward()
        loads = [block.ffn.pop_load() for block in model.blocks]
        results.append(
            (loss, [p.grad for p in model.parameters()], [x.counts for x in loads], dict(model.named_buffers()))
        )
        assert {int(load.num_forwards) for load in loads} == {1 if "bias_update_rate" in extra else 2}
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("activation", activation_names())
def test_dense_blocks_compute_what_an_expert_does(activation):
    config = GPTConfig(**{**SMALL, "activation": activation})
    dense, expert, x = DenseMLP(config).double(), Experts(8, 12, 1, activation).double(), torch.randn(5, 8).double()
    with torch.no_grad():
        getattr(expert, expert.up_name)[0] = dense.up.weight
        expert.down_proj[0] = dense.down.weight
    torch.testing.assert_close(dense(x), expert(x, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)))


def test_which_blocks_are_moe():
    def moe_blocks(**changes):
        model = GPT(GPTConfig(**{**SMALL, "num_layers": 6, **changes}))
        return [index for index, block in enumerate(model.blocks) if isinstance(block.ffn, MoE)]

    assert moe_blocks() == [0, 1, 2, 3, 4, 5]
    assert moe_blocks(moe_every=2) == [1, 3, 5]
    assert moe_blocks(moe_every=3, first_dense=3) == [5]
    assert moe_blocks(moe_every=0) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads = 3 must divide hidden_size = 8"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads = 3 must divide num_heads = 4"),
        ({"activation": "tanh"}, "activation must be one of swiglu, .*, got 'tanh'"),
        ({"top_k": 5}, "top_k must be 1 .. num_experts = 4, got 5"),
        ({"norm": "batch"}, "norm must be one of layer, rms, got 'batch'"),
        ({"rotary": True, "head_size": 3}, "even head size, got 3"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **changes})


def test_too_long_a_sequence():
    with pytest.raises(ValueError, match="a sequence of 9 tokens is longer than max_seq_len = 8"):
        gpt(SMALL)(tokens(length=9))


def test_first_weights_follow_from_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = GPTModule(SMALL, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    torch.testing.assert_close(GPTModule(GPTConfig(**SMALL), seed=3).state_dict(), a, rtol=0, atol=0)
    assert not torch.equal(GPTModule(SMALL, seed=4).state_dict()["gpt.embed.weight"], a["gpt.embed.weight"])


def test_every_parameter_in_one_group():
    module = GPTModule(SMALL)
    decayed, plain = (group["params"] for group in decay_groups(module))
    ids = [id(param) for param in [*decayed, *plain]]
    assert sorted(ids) == sorted(map(id, module.parameters()))
    assert {param.ndim for param in plain} == {1}
    assert any(param is module.gpt.blocks[0].ffn.experts.down_proj for param in decayed)


def test_learning_rate_by_hand():
    factors = [warmup_cosine(step, 4, 12, 0.1) for step in (0, 1, 3, 4, 8, 12, 50)]
    assert factors == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
    assert warmup_cosine(0, 0, 10, 0.1) == 1.0


class WithModes(torch.optim.SGD):
    """Notes in which mode it is asked to be, and when it steps."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.notes = []

    def train(self):
        self.notes.append("train")

    def eval(self):
        self.notes.append("eval")

    def step(self, closure=None):
        self.notes.append("step")
        return super().step(closure)


def test_an_optimizer_with_modes_is_told_of_them():
    module = GPTModule(SMALL, optimizer=WithModes)
    loader = DataLoader(tokens(2), batch_size=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        val_check_interval=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)
    (optimizer,) = trainer.optimizers
    assert optimizer.notes == ["train", *2 * ["step", "eval", "train"], "eval"]


def test_predictions_are_the_likeliest_tokens():
    module, batch = GPTModule(SMALL), tokens()
    assert torch.equal(module.predict_step(batch, 0), F.softmax(module(batch), dim=-1).argmax(dim=-1))


@pytest.mark.parametrize("capacity_factor", [None, pytest.param(1.0, marks=pytest.mark.exhaustive)])
def test_compiles_as_one_graph_with_the_same_numbers(capacity_factor):
    model, batch = gpt({**SMALL, "capacity_factor": capacity_factor}), tokens()
    want = model.loss(batch)
    grads = torch.autograd.grad(want, list(model.parameters()))
    load = model.blocks[0].ffn.pop_load()
    got = torch.compile(model.loss, backend="aot_eager", fullgraph=True)(batch)
    assert torch.equal(got, want)
    assert all(map(torch.equal, torch.autograd.grad(got, list(model.parameters())), grads))
    again = model.blocks[0].ffn.pop_load()
    assert torch.equal(again.counts, load.counts)
    assert again.num_forwards == 1


@pytest.mark.parametrize("extra", [{}, {"bias_update_rate": 0.1}])
def test_no_number_of_forwards_compiles_anew(extra):
    model, graphs = gpt({**SMALL, **extra}), []
    compiled = torch.compile(model.loss, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for _ in range(12):
        compiled(tokens()).backward()
    assert len(graphs) == 2  # the first forward, and those that add to it
    if not extra:
        assert [int(block.ffn.pop_load().num_forwards) for block in model.blocks] == [12] * len(model.blocks)


def train_compiled(backend):
    """Losses of a few steps under the strategy, whose replicas move after every one."""
    module = GPTModule({**SMALL, "capacity_factor": 1.0}, compile=backend is not None)
    if backend is not None:
        module._loss = torch.compile(module.gpt.loss, backend=backend)
    losses = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    job = Job(slots=5, policy="random")
    trainer = our_trainer(job, max_steps=4, precision="64-true")
    trainer.callbacks.append(Keep())
    generator = torch.Generator().manual_seed(dist.get_rank())
    trainer.fit(module, DataLoader(torch.randint(11, (16, 9), generator=generator), batch_size=4))
    return losses


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_compiled_training_under_the_strategy(num_ranks):
    eager, compiled = (run_ranks(num_ranks, train_compiled, backend) for backend in (None, "aot_eager"))
    assert len(eager[0]) == 4
    # On two ranks the graph is cut around the exchange, and gradients add up in another order.
    for got, want in zip(compiled, eager, strict=True):
        assert got == pytest.approx(want, rel=1e-13)


@pytest.mark.distributed
@pytest.mark.parametrize("extra", [{}, {"bias_update_rate": 1e-3, "shared_ffn_size": 8, "tie_embeddings": True}])
def test_on_the_meta_device_it_is_drawn_alike(extra):
    model = {**SMALL, "num_layers": 4, **extra}
    real = GPTModule(model)
    with_memory, without = (run_ranks(2, first_weights, model, on_meta) for on_meta in (False, True))
    assert all(map(torch.equal, without[0].values(), without[1].values()))
    for name, value in real.state_dict().items():
        drawn = without[0][name]
        assert drawn.shape == value.shape, name
        assert torch.equal(with_memory[0][name], value)
        if value.numel() > 100:
            assert float(drawn.std()) == pytest.approx(float(value.std()), rel=0.3), name
        elif value.ndim < 2:
            assert torch.equal(drawn, value), name


def first_weights(model, on_meta):
    """Whole, as training starts with them."""
    found = {}

    class Take(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            found.update({name: full(value).clone() for name, value in pl_module.state_dict().items()})

    trainer = our_trainer(Job(slots=5), max_steps=1, precision="32-true")
    trainer.callbacks.append(Take())
    trainer.fit(GPTModule(model, on_meta=on_meta), DataLoader(torch.randint(11, (4, 9)), batch_size=2))
    return found
