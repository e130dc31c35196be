"""`swiftmoe bench kernels`: our expert MLP beside its peers, correctness first, then time and memory.

Also `python -m lightning_swiftmoe.cli.bench_kernels shapes=[a,b] rounds=1`, without Hydra.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.cli._kernel_peers import PEERS, ExpertMLP, ours
from lightning_swiftmoe.functional import is_gated
from lightning_swiftmoe.kernels.expert_mlp import reference
from lightning_swiftmoe.kernels.token_permute.routing import route_reference

DEFAULTS: dict[str, Any] = {
    "shapes": ["a", "b", "c", "d"],
    "dtype": "bfloat16",
    "skew": "balanced",
    "peers": ["eager", "compiled", "transformers"],
    "rounds": 3,
    "rep_ms": 100,
    "device": "auto",
    "peak_tflops": 788.0,
    "peak_tb_per_s": 4.3,
    "output": None,
}
_CHECK_TOKENS = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of one benchmark case."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    activation: str

    @property
    def up_rows(self) -> int:
        return self.hidden * (2 if is_gated(self.activation) else 1)

    @property
    def forward_flops(self) -> float:
        return 2.0 * self.tokens * self.top_k * self.width * (self.up_rows + self.hidden)

    def roofline_ms(self, tflops: float, tb_per_s: float, backward: bool, element_bytes: int = 2) -> float:
        """Products at the peak rate, and for k > 1 the gather-sums, which no product can hold, at the copy rate."""
        sum_bytes = element_bytes * self.width * self.tokens * (self.top_k + 1) if self.top_k > 1 else 0
        times = (3, 2) if backward else (1, 1)
        return times[0] * self.forward_flops / tflops / 1e9 + times[1] * sum_bytes / tb_per_s / 1e9


SHAPES = {
    "a": Shape(32768, 768, 3072, 16, 1, "gelu"),
    "b": Shape(8192, 4096, 14336, 8, 2, "swiglu"),
    "c": Shape(32768, 2048, 768, 128, 8, "swiglu"),
    "d": Shape(8192, 7168, 2048, 32, 8, "swiglu"),
    "olmoe": Shape(16384, 2048, 1024, 64, 8, "swiglu"),
    "dbrx": Shape(8192, 6144, 10752, 16, 4, "swiglu"),
    "granite": Shape(16384, 1536, 512, 40, 8, "swiglu"),
    "switch64": Shape(32768, 768, 3072, 64, 1, "relu"),
    "odd": Shape(5003, 1000, 1336, 7, 3, "geglu"),
    "tiny": Shape(64, 2048, 768, 128, 8, "swiglu"),
    "cpu": Shape(64, 64, 128, 4, 2, "swiglu"),
}


def parse_shape(text: str) -> Shape:
    """A name from `SHAPES`, or "tokens,width,hidden,experts,top_k,activation"."""
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) != 6:
        raise ValueError(f"unknown shape {text!r}: name one of {', '.join(SHAPES)}, or T,d,h,E,k,activation")
    tokens, width, hidden, experts, top_k = (int(part) for part in parts[:5])
    return Shape(tokens, width, hidden, experts, top_k, parts[5])


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, skew: str) -> tuple[Tensor, ...]:
    """Random inputs; `topk_idx` has k different experts per token, drawn evenly or by Zipf's law."""
    rng = torch.Generator(device=device).manual_seed(0)
    scores = -torch.log(-torch.log(torch.rand(shape.tokens, shape.experts, device=device, generator=rng)))
    if skew == "zipf":
        scores -= torch.arange(1, shape.experts + 1, device=device).log()
    elif skew != "balanced":
        raise ValueError(f"skew must be balanced or zipf, got {skew!r}")

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device, generator=rng) * scale).to(dtype)

    return (
        normal(shape.tokens, shape.width),
        scores.topk(shape.top_k, dim=-1).indices,
        torch.rand(shape.tokens, shape.top_k, device=device, generator=rng),
        normal(shape.experts, shape.up_rows, shape.width, scale=shape.width**-0.5),
        normal(shape.experts, shape.width, shape.hidden, scale=shape.hidden**-0.5),
    )


def step(function: ExpertMLP, inputs: tuple[Tensor, ...], grad_y: Tensor) -> list[Tensor]:
    """Forward and backward: y and the gradients of x, weights, up_proj and down_proj."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], grad_y)]


def worst_error(function: ExpertMLP, shape: Shape, inputs: tuple[Tensor, ...]) -> float:
    """Largest relative error, over y and all gradients, against fp64 on the first tokens."""
    x, idx, weights, up, down = inputs
    x, idx, weights = x[:_CHECK_TOKENS], idx[:_CHECK_TOKENS], weights[:_CHECK_TOKENS]
    grad_y = torch.randn_like(x)
    got = step(function, (x, idx, weights, up, down), grad_y)
    routing = route_reference(idx, shape.experts)
    wide = [t.double() for t in (x, weights, up, down)]
    y, pre = reference.expert_mlp_forward(*wide, routing, shape.activation)
    want = [y, *reference.expert_mlp_backward(grad_y.double(), *wide, pre, routing, shape.activation)]
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)


def time_ms(function: Callable[[], Any], device: torch.device, rep_ms: int) -> float:
    """Median milliseconds of one call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(function, warmup=25, rep=rep_ms, return_mode="median")
    samples: list[float] = []
    function()
    while sum(samples) < rep_ms:
        start = time.perf_counter()
        function()
        samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples)


def peaks_mib(
    function: ExpertMLP, inputs: tuple[Tensor, ...], grad_y: Tensor, device: torch.device
) -> tuple[float, float] | None:
    """Most memory held during a step above its inputs: with the gradients, and with their own memory taken off.

    The second figure is what a step needs where the gradients have a place already.
    """
    if device.type != "cuda":
        return None
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    y = function(*leaves)
    forward = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.reset_peak_memory_stats(device)
    grads = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], grad_y)
    backward = torch.cuda.max_memory_allocated(device) - before
    return max(forward, backward) / 2**20, max(forward, backward - sum(g.nbytes for g in grads)) / 2**20


@dataclass
class Row:
    """One line of the table."""

    shape: str
    name: str
    error: float
    first_call_s: float
    forward_ms: float
    step_ms: float
    step_tflops: float
    roofline_share: float
    peak_mib: float | None
    working_mib: float | None


def bench_shape(name: str, cfg: Mapping[str, Any], device: torch.device) -> list[Row]:
    """Every implementation on one shape; those that fail their check are reported and not timed."""
    shape = parse_shape(name)
    inputs = make_inputs(shape, getattr(torch, cfg["dtype"]), device, cfg["skew"])
    grad_y = torch.randn_like(inputs[0])
    errors, first_calls, functions = {}, {}, {}
    for label in ("ours", *cfg["peers"]):
        try:
            function = ours(shape.activation) if label == "ours" else PEERS[label](shape.activation)
            start = time.perf_counter()
            step(function, inputs, grad_y)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            first_calls[label] = time.perf_counter() - start
            errors[label] = worst_error(function, shape, inputs)
            functions[label] = function
        except Exception as error:  # a peer may be absent, or not take this shape
            if label == "ours":
                raise
            print(f"{name} {label}: skipped, {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    limit = 2 * errors.get("eager", 5e-3)
    if not errors["ours"] <= limit:
        raise RuntimeError(f"shape {name}: our relative error {errors['ours']:.3g} is above {limit:.3g}; no time shown")
    forward: dict[str, list[float]] = {label: [] for label in functions}
    both: dict[str, list[float]] = {label: [] for label in functions}
    for _ in range(cfg["rounds"]):
        for label, function in functions.items():
            with torch.no_grad():
                forward[label].append(time_ms(partial(function, *inputs), device, cfg["rep_ms"]))
            both[label].append(time_ms(partial(step, function, inputs, grad_y), device, cfg["rep_ms"]))
    rows = []
    for label, function in functions.items():
        step_ms = statistics.median(both[label])
        peak, working = peaks_mib(function, inputs, grad_y, device) or (None, None)
        rows.append(
            Row(
                name,
                label,
                errors[label],
                first_calls[label],
                statistics.median(forward[label]),
                step_ms,
                3 * shape.forward_flops / step_ms / 1e9,
                shape.roofline_ms(cfg["peak_tflops"], cfg["peak_tb_per_s"], backward=True) / step_ms,
                peak,
                working,
            )
        )
    return rows


def print_rows(rows: list[Row]) -> None:
    """The table, as plain text that can be pasted into Markdown."""
    print("first s: compiling and tuning; peak: above the inputs, with the gradients and without their own memory")
    print("| shape | implementation | rel. error | first s | fwd ms | fwd+bwd ms | TFLOP/s | of roofline | peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        memory = "-" if row.peak_mib is None else f"{row.peak_mib:.0f} / {row.working_mib:.0f}"
        print(
            f"| {row.shape} | {row.name} | {row.error:.1e} | {row.first_call_s:.1f} | {row.forward_ms:.3f} | "
            f"{row.step_ms:.3f} | {row.step_tflops:.1f} | {row.roofline_share:.1%} | {memory} |"
        )


def run(cfg: Mapping[str, Any]) -> list[Row]:
    """Bench every shape of the configuration, print the table and return its rows."""
    cfg = {**DEFAULTS, **dict(cfg)}
    device = torch.device(cfg["device"]) if cfg["device"] != "auto" else _default_device()
    rows: list[Row] = []
    for name in cfg["shapes"]:
        rows += bench_shape(name, cfg, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {cfg['dtype']}, {cfg['skew']} routing, {cfg['rounds']} rounds, medians")
    print_rows(rows)
    if cfg["output"]:
        Path(cfg["output"]).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


def main(argv: Sequence[str]) -> int:
    """Overrides of ``DEFAULTS`` as ``key=value``; a user's mistake is one line and status 2."""
    if {"-h", "--help"} & set(argv):
        print("usage: swiftmoe bench kernels [KEY=VALUE ...]")
        print("\n".join(f"  {key}={value}" for key, value in DEFAULTS.items()))
        return 0
    try:
        run(dict(_parse_override(argument) for argument in argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _parse_override(argument: str) -> tuple[str, Any]:
    key, _, text = argument.partition("=")
    if key not in DEFAULTS:
        raise ValueError(f"unknown setting {key!r}; valid names: {', '.join(DEFAULTS)}")
    default = DEFAULTS[key]
    if isinstance(default, list):
        inner = text.strip("[]")
        return key, inner.split(",") if inner else []
    return key, type(default)(text) if default is not None else text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
