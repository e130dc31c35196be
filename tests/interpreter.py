"""Modules run with Triton's interpreter on, in processes of their own: its switch is read on import.

``python -m tests.interpreter MODULE ARGUMENTS`` runs one by hand.
"""

import os
import runpy
import subprocess
import sys


def run_interpreted(module: str, *args: str) -> str:
    """What ``python -m module *args`` prints in the interpreter; a failure is shown with it."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.interpreter", module, *args],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return result.stdout


def shorten_ways() -> None:
    """Cut short what takes the interpreter longest.

    ``tl.sort`` reduces by exclusive or, for which it calls a Python function for every element; and for every call of
    every function it looks for the language's builtins anew.
    """

    import inspect

    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    theirs = interpreter.ReduceOps.apply_impl

    def apply_impl(self, values):
        if self.combine_fn is not tl.standard._xor_combine:
            return theirs(self, values)
        (value,) = values
        combined = np.bitwise_xor.reduce(value.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(combined, value.dtype)

    def patch_builtin(pkg, *rest):
        if pkg not in builtins:
            builtins[pkg] = [name for name, member in inspect.getmembers(pkg) if tl.core.is_builtin(member)]
        for name in builtins[pkg]:
            member = getattr(pkg, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(pkg, name, member, *rest)

    builtins: dict[object, list[str]] = {}
    interpreter.ReduceOps.apply_impl = apply_impl
    interpreter._patch_builtin = patch_builtin


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    shorten_ways()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
