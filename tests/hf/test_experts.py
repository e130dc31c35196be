"""Experts modules by themselves, against eager ones and dense oracles."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from lightning_swiftmoe.hf import NAME, experts_forward
from lightning_swiftmoe.hf.activations import fused_activation
from lightning_swiftmoe.hf.checks import projections
from tests.hf.modules import EXPERTS, HIDDEN, WIDTH, Anything, decorated_classes, errors, filled, inputs, make, run
from tests.ranks import run_ranks


def clamped(self, gate_up):
    """That of gpt-oss."""
    gate, up = gate_up[..., ::2].clamp(max=0.7), gate_up[..., 1::2].clamp(-0.7, 0.7)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


VARIANTS = {
    "plain": {},
    "gelu": {"act": F.gelu},
    "unknown activation": {"act": torch.tanh},
    "transposed": {"is_transposed": True},
    "bias": {"has_bias": True},
    "transposed with bias": {"is_transposed": True, "has_bias": True},
    "no gate": {"has_gate": False, "act": ACT2FN["relu2"]},
    "no gate, bias": {"has_gate": False, "has_bias": True},
    "no gate, transposed": {"has_gate": False, "is_transposed": True},
    "no gate, unknown activation": {"has_gate": False, "act": torch.tanh},
    "norm": {"has_post_expert_norm": True},
    "all": {"has_post_expert_norm": True, "has_bias": True, "is_transposed": True},
    "own gate": {"gate": clamped, "is_concatenated": False},
    "gpt-oss": {"gate": clamped, "is_concatenated": False, "is_transposed": True, "has_bias": True},
}
FUSED = {"plain": "swiglu", "gelu": "geglu", "no gate": "relu2"}
variants = pytest.mark.parametrize("variant", VARIANTS)


def module(variant: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return filled(make(**VARIANTS[variant]), dtype)


@variants
def test_variants_equal_a_dense_oracle(variant):
    experts = module(variant)
    data = inputs(torch.float64)
    found = errors(run(experts, NAME, *data), run(experts, "eager", *data))
    assert max(found.values()) <= 1e-12, found


@variants
def test_what_is_fused(variant):
    experts = module(variant)
    assert (fused_activation(experts) if projections(experts).are_plain else None) == FUSED.get(variant)


@variants
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_choices_of_no_expert(variant, index_dtype):
    """-1 and E add nothing, whatever their weight, which has no gradient; tokens and experts may be left without."""
    experts = module(variant)
    x, index, weights, grad = inputs(torch.float64)
    index[index == 2] = EXPERTS
    index[::4, 1] = -1
    index[7] = torch.tensor([-1, EXPERTS, -1])
    weights[7] = float("inf")
    got = run(experts, NAME, x, index.to(index_dtype), weights, grad)
    weights[7] = 0
    found = errors(got, run(experts, "eager", x, index, weights, grad))
    assert max(found.values()) <= 1e-12, found
    assert not got["y"][7].any()
    assert not got["hidden_states"][7].any()
    assert not got["top_k_weights"][(index < 0) | (index == EXPERTS)].any()
    assert not got["down_proj"][2].any()


@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tokens(variant, dtype):
    experts = module(variant, dtype)
    got = run(experts, NAME, *inputs(dtype, tokens=0))
    assert got["y"].shape == got["hidden_states"].shape == (0, WIDTH)
    assert got["y"].dtype == dtype
    for name, parameter in experts.named_parameters():
        assert got[name].shape == parameter.shape
        assert not got[name].any()


@variants
def test_no_choice_is_an_expert(variant):
    x, index, weights, grad = inputs(torch.float32)
    got = run(module(variant, torch.float32), NAME, x, index.fill_(EXPERTS), weights, grad)
    assert not any(result.any() for result in got.values())


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(variant, dtype):
    """A module's rounding is as large as its eager path's."""
    experts = module(variant, dtype)
    data = inputs(dtype)
    got = run(experts, NAME, *data)
    assert [got[name].dtype for name in got] == [dtype] * len(got)
    index = data[1]
    wide = [tensor if tensor is index else tensor.double() for tensor in data]
    found = errors(got, run(experts.double(), "eager", *wide))
    assert max(found.values()) <= 4 * torch.finfo(dtype).eps, found


@variants
def test_weights_of_another_dtype(variant):
    """Routers often leave them in fp32: they multiply wide."""
    experts = module(variant, torch.bfloat16)
    x, index, weights, grad = inputs(torch.bfloat16)
    weights = weights.float() + 1e-4
    got = run(experts, NAME, x, index, weights, grad)
    assert got["y"].dtype == torch.bfloat16
    assert got["top_k_weights"].dtype == torch.float32
    want = run(experts.double(), "eager", x.double(), index, weights.double(), grad.double())
    found = errors(got, want)
    assert max(found.values()) <= 4 * torch.finfo(torch.bfloat16).eps, found


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast(variant, dtype):
    """fp32 is cast for products, fp64 is not."""
    experts = module(variant, dtype)
    data = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(experts, NAME, *data)
    assert [got[name].dtype for name in got] == [dtype] * len(got)
    index = data[1]
    wide = [tensor if tensor is index else tensor.double() for tensor in data]
    found = errors(got, run(experts.double(), "eager", *wide))
    assert max(found.values()) <= (1e-12 if dtype == torch.float64 else 4 * torch.finfo(torch.bfloat16).eps), found


def test_autocast_brings_two_dtypes_together():
    experts = module("gpt-oss", torch.bfloat16)
    x, index, weights, grad = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(experts, NAME, x, index, weights, grad)["y"].dtype == torch.float32


@variants
def test_same_bits_twice(variant):
    experts, data = module(variant, torch.bfloat16), inputs(torch.bfloat16)
    first, second = run(experts, NAME, *data), run(experts, NAME, *data)
    assert all(torch.equal(first[name], second[name]) for name in first)


@variants
def test_only_what_is_asked_for(variant):
    """Frozen weights get no gradients and cost none."""
    experts, (x, index, weights, grad) = module(variant), inputs(torch.float64)
    want = run(experts, "eager", x, index, weights, grad)
    experts.config._experts_implementation = NAME
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
        if name == "down_proj":
            parameter.requires_grad_(True)
    experts(x, index, weights).backward(grad)
    torch.testing.assert_close(experts.down_proj.grad, want["down_proj"], rtol=1e-11, atol=1e-12)
    assert all(parameter.grad is None for name, parameter in experts.named_parameters() if name != "down_proj")


@variants
def test_gradients_are_laid_out_as_the_weights(variant):
    """Else every step would copy them."""
    experts, (x, index, weights, grad) = module(variant), inputs(torch.float64)
    y = experts_forward(experts, x, index, weights)
    parameters = list(experts.parameters())
    gradients = torch.autograd.grad(y, parameters, grad)
    assert [gradient.stride() for gradient in gradients] == [parameter.stride() for parameter in parameters]


@pytest.mark.parametrize("variant", ["plain", "gpt-oss", "no gate", "norm"])
def test_compile_without_graph_break(variant):
    experts, data = module(variant, torch.float32), inputs(torch.float32)
    want = run(experts, NAME, *data)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    x, index, weights, grad = data
    experts.zero_grad()
    y = compiled(x, index, weights)
    y.backward(grad)
    torch.testing.assert_close(y, want["y"])
    for name, parameter in experts.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name])


def test_the_ops_keep_their_contract():
    rows, ends = torch.randn(9, 8, requires_grad=True), torch.tensor([2, 2, 6], dtype=torch.int32)
    weight, bias = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    for arguments in ((rows, weight, bias, ends, False), (rows, weight.detach().mT, None, ends, True)):
        torch.library.opcheck(torch.ops.lightning_swiftmoe.grouped_linear.default, arguments)
    torch.library.opcheck(torch.ops.lightning_swiftmoe.grouped_outer.default, (rows.detach(), rows.detach(), ends))


class Doubled(nn.SiLU):
    def forward(self, z):
        return 2 * super().forward(z)


def hooked() -> nn.Module:
    activation = nn.SiLU()
    activation.register_forward_hook(lambda module, args, output: 2 * output)
    return activation


def replaced() -> nn.Module:
    activation = nn.SiLU()
    activation.forward = lambda z: 2 * F.silu(z)
    return activation


@pytest.mark.parametrize("act", [Doubled(), hooked(), replaced(), nn.GELU("tanh"), nn.ReLU(), ACT2FN["gelu_fast"]])
@pytest.mark.parametrize("has_gate", [True, False])
def test_activations_are_never_taken_for_others(act, has_gate):
    """Subclasses, hooks and functions set on a module are seen; those we know by another way too."""
    experts, data = filled(make(act=act, has_gate=has_gate), torch.float64), inputs(torch.float64)
    found = errors(run(experts, NAME, *data), run(experts, "eager", *data))
    assert max(found.values()) <= 1e-12, found


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_python", "gelu_pytorch_tanh", "gelu_new", "relu"])
@pytest.mark.parametrize("has_gate", [True, False])
def test_activations_by_their_names_in_transformers(name, has_gate):
    experts, data = filled(make(act=ACT2FN[name], has_gate=has_gate), torch.float64), inputs(torch.float64)
    assert fused_activation(experts) is not None
    found = errors(run(experts, NAME, *data), run(experts, "eager", *data))
    assert max(found.values()) <= 1e-12, found


def test_a_gate_set_on_the_module_is_seen():
    experts, data = module("plain"), inputs(torch.float64)
    plain = run(experts, "eager", *data)
    experts._apply_gate = lambda pre: 2 * F.silu(pre.chunk(2, -1)[0]) * pre.chunk(2, -1)[1]
    doubled = run(experts, NAME, *data)
    torch.testing.assert_close(doubled["y"], 2 * plain["y"])


# These compute a gate, a norm or, in the last one's eager path, everything in fp32, whatever the model's dtype.
WIDE = ("beam", "inkling2", "inkling2_loop", "muse_spark", "openai_privacy_filter")


def test_every_class_of_transformers_equals_its_eager_path():
    """In fp64, by class: no variant that the installed version has is computed as another."""
    data, wrong, seen = inputs(torch.float64), {}, 0
    for name, kind in decorated_classes().items():
        experts = filled(kind(Anything("relu2" if "nemotron" in name else "silu")), torch.float64)
        found = max(errors(run(experts, NAME, *data), run(experts, "eager", *data)).values())
        seen += 1
        if found > (1e-6 if name.split(".")[0] in WIDE else 1e-12):
            wrong[name] = found
    assert not wrong
    assert seen >= 50


def test_every_class_of_transformers_is_as_exact_in_bf16():
    """As near to fp64 as the eager path is, weight by weight; but for one whose eager path rounds nothing to bf16."""
    data, wrong = inputs(torch.bfloat16), {}
    wide = [tensor if tensor is data[1] else tensor.double() for tensor in data]
    for name, kind in decorated_classes().items():
        experts = filled(kind(Anything("relu2" if "nemotron" in name else "silu")), torch.bfloat16)
        got, eager = run(experts, NAME, *data), run(experts, "eager", *data)
        truth = run(experts.double(), "eager", *wide)
        ours, theirs = errors(got, truth), errors(eager, truth)
        allowed = 4 * torch.finfo(torch.bfloat16).eps if name.startswith("openai_privacy") else 0
        worse = {part: (ours[part], theirs[part]) for part in ours if ours[part] > max(1.2 * theirs[part], allowed)}
        if worse:
            wrong[name] = worse
    assert not wrong


def refuse(experts, x=None, index=None, weights=None):
    data = inputs(torch.float32)
    given = [old if new is None else new for new, old in zip((x, index, weights), data[:3], strict=True)]
    with pytest.raises(ValueError) as refused:
        experts_forward(experts, *given)
    message = str(refused.value)
    assert message.startswith(f"experts_implementation='swiftmoe' cannot run {type(experts).__name__}: got ")
    assert ", expected " in message
    assert "; " in message
    assert "\n" not in message
    return message


def test_what_is_no_experts_module_is_refused():
    assert "no has_gate, has_bias" in refuse(nn.Linear(2, 2))


def test_interleaved_columns_without_a_gate_for_them_are_refused():
    assert "splits in halves" in refuse(make(is_concatenated=False))


@pytest.mark.parametrize("name", ["down_proj", "gate_up_proj_bias", "post_expert_norm"])
def test_what_is_promised_and_missing_is_refused(name):
    experts = make(has_bias=True, has_post_expert_norm="norm" in name)
    delattr(experts, name)
    assert f"no {name}" in refuse(experts)


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_scale"])
def test_tensors_that_nobody_would_use_are_refused(name):
    experts = make()
    experts.register_buffer(name, torch.zeros(1))
    assert f"got {name}" in refuse(experts)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_quantised_weights_are_refused(dtype):
    experts = make()
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(dtype), requires_grad=False)
    assert f"down_proj of {dtype}" in refuse(experts)


def refuse_sharded():
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    experts = make()
    mesh = init_device_mesh("cpu", (1,))
    experts.down_proj = nn.Parameter(distribute_tensor(experts.down_proj.detach(), mesh))
    return refuse(experts)


def test_sharded_weights_are_refused():
    """In a process of its own: ranks that are forked from one that had a device mesh hang."""
    (message,) = run_ranks(1, refuse_sharded)
    assert "down_proj as a DTensor" in message


def test_layouts_that_contradict_the_decorator_are_refused():
    experts = make()
    experts.is_transposed = True
    assert f"gate_up_proj ({EXPERTS}, {2 * HIDDEN}, {WIDTH})" in refuse(experts)


def test_another_number_of_experts_is_refused():
    experts = make()
    experts.num_experts = EXPERTS + 1
    assert f"num_experts={EXPERTS + 1}" in refuse(experts)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"x": torch.zeros(3, 11, WIDTH)}, f"[T, {WIDTH}]"),
        ({"x": torch.zeros(33, WIDTH + 1)}, f"[T, {WIDTH}]"),
        ({"weights": torch.zeros(33, EXPERTS)}, "both [33, k]"),
        ({"x": torch.zeros(32, WIDTH)}, "both [32, k]"),
        ({"index": torch.zeros(33, 3)}, "int32 or int64"),
        ({"weights": torch.zeros(33, 3, dtype=torch.int64)}, "a floating dtype"),
        ({"x": torch.zeros(33, WIDTH, dtype=torch.bfloat16)}, "one dtype"),
        ({"index": torch.full((33, 3), EXPERTS + 1)}, f"0 to {EXPERTS - 1}, or -1 or {EXPERTS}"),
        ({"index": torch.full((33, 3), -2)}, f"0 to {EXPERTS - 1}, or -1 or {EXPERTS}"),
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", ["plain", "gpt-oss"])
def test_calls_that_do_not_fit_are_refused(variant, given, expected):
    assert expected in refuse(module(variant, torch.float32), **given)
