"""``swiftmoe COMMAND``: finds the command and runs it."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

COMMANDS = {
    "train": (
        "lightning_swiftmoe.cli.train",
        "train a GPT-MoE, or a model of transformers: swiftmoe train recipes=quickstart trainer.max_steps=50",
    ),
    "recipes": ("lightning_swiftmoe.cli.recipes", "list the recipes"),
    "simulate": (
        "lightning_swiftmoe.cli.simulate",
        "replay a load trace under placement policies on a modelled cluster",
    ),
    "plan": ("lightning_swiftmoe.cli.plan", "memory per rank, the smallest cluster that fits, the modelled step"),
    "report": ("lightning_swiftmoe.cli.report", "one HTML page from the folders of one or more runs"),
    "checkpoint info": ("lightning_swiftmoe.cli.checkpoint_info", "what a checkpoint holds: sizes, steps, experts"),
    "checkpoint verify": ("lightning_swiftmoe.cli.checkpoint_verify", "is a checkpoint whole, and all of it numbers?"),
    "checkpoint consolidate": (
        "lightning_swiftmoe.cli.checkpoint_consolidate",
        "a sharded checkpoint as one file, which every Trainer loads",
    ),
    "bench kernels": ("lightning_swiftmoe.cli.bench_kernels", "time the expert layer against its peers"),
    "bench step": ("lightning_swiftmoe.cli.bench_step", "time training steps against other systems"),
    "bench skew": ("lightning_swiftmoe.cli.bench_skew", "time training steps under skewed loads against other systems"),
    "bench scaling": ("lightning_swiftmoe.cli.bench_scaling", "time training steps on 1, 2, 4 and 8 devices"),
    "bench rows": ("lightning_swiftmoe.cli.bench_rows", "time dispatch and combine between the GPUs of this machine"),
    "bench network": ("lightning_swiftmoe.cli.bench_network", "measured against modelled steps on links of a rate"),
}

HELP = ("-h", "--help")


def main(argv: list[str] | None = None) -> int:
    """Run ``argv`` (default: the command line); returns the exit status, 2 for a mistake of the user's."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "LOCAL_RANK" in os.environ and args and args[0] not in {name.split()[0] for name in COMMANDS}:
        args.insert(0, "train")  # Lightning starts further ranks with Hydra's overrides alone
    if not args or args[0] in (*HELP, "help"):
        print_help(list(COMMANDS))
        return 0
    parts = [name for name in COMMANDS if name.startswith(f"{args[0]} ")]
    if parts and (len(args) == 1 or args[1] in HELP):
        print_help(parts)
        return 0
    if args[0] == "--version":
        from lightning_swiftmoe import __version__

        print(f"swiftmoe {__version__}")
        return 0
    name = next((command for command in COMMANDS if args[: command.count(" ") + 1] == command.split()), None)
    if name is None:
        return fail(unknown(args))
    try:
        module = importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lightning_swiftmoe"):
            raise
        return fail(f"swiftmoe {name} needs the package {error.name!r}, which is not installed")
    return module.main(args[name.count(" ") + 1 :]) or 0


def unknown(args: list[str]) -> str:
    """What to say of a command that does not exist."""
    has_parts = {name.split()[0] for name in COMMANDS if " " in name}
    given = " ".join(args[:2]) if args[0] in has_parts else args[0]
    close = difflib.get_close_matches(given, COMMANDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}"
    return f"unknown command {given!r}; {hint}"


def print_help(names: list[str]) -> None:
    """These commands, a line each."""
    print("usage: swiftmoe COMMAND [OVERRIDE ...]\n")
    for name in names:
        print(f"  {name:22} {COMMANDS[name][1]}")
    print("\n  swiftmoe COMMAND --help shows what can be overridden; --version prints the version.")
    print("  SWIFTMOE_TRACEBACK=1 swiftmoe COMMAND shows where an error came from.")


def fail(message: str) -> int:
    """Print one error line; the exit status of a user's mistake."""
    print(f"error: {message}", file=sys.stderr)
    return 2
