"""Triton kernels without a GPU: scripts of cases, each run in a process of its own, and kernels compiled for
one that need not be there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_cases(script: Path, part: str, **environment: str) -> str:
    """What a part of a script prints; it must end well. `environment` is what `import triton` finds."""
    here = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    here["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), here.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(script), part], env=here | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiled(
    kernel: Any,
    constants: Mapping[str, object],
    *,
    kinds: Mapping[str, str],
    whole: tuple[str, ...],
    **options: int,
) -> Any:
    """Machine code for compute capability 9.0, without a register spilled; `kinds` are the types of the other
    arguments, and pointers and the integers in `whole` are multiples of 16.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in whole]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants},
    )
    code = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "st.local" not in code.asm["ptx"] and len(code.asm["cubin"]) > 1000
    print(f"compiled {kernel.__name__}")
    return code
