"""Compile, without a GPU, every Triton launch that an implementation makes: run as a script, with no interpreter.

``refresh`` is called on CPU tensors with the launch itself replaced: each new (kernel, types, constexprs) is compiled
for an sm_90 GPU, which is where a kernel that only ever ran interpreted would fail. Prints a line per compilation.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_triton
from triton.runtime.jit import JITFunction

from nsa_verify import Case, CtxLens, Mode, Replay, Request, Setup
from nsa_verify.core.case import IntType
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS
from nsa_verify.core.registry import find
from nsa_verify.device.images import ImageKey, paint
from nsa_verify.device.rig import Rig

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {torch.int32: "*i32", torch.int64: "*i64"}
seen: set[tuple[Any, ...]] = set()


def launch(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    """What replaces a launch: compile what it would have run."""
    bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
    options = {name: bound.pop(name) for name in ("num_warps", "num_stages") if name in bound}
    signature, constants = {}, {}
    for index, parameter in enumerate(self.params):
        value = bound[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[index,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            if parameter.name.startswith("out_"):
                value.zero_()  # what follows in torch must not trip over memory that nobody wrote
        else:
            signature[parameter.name] = "i32"
    key = (self.fn.__name__, *signature.values(), *constants.values())
    if key not in seen:
        seen.add(key)
        compile_triton(ASTSource(fn=self, signature=signature, constexprs=constants), target=TARGET, options=options)
        print(f"compiled {self.fn.__name__} {sorted(constants.values(), key=str)}", flush=True)


def main(name: str) -> None:
    """Refresh once in every mode and every form of setup that chooses another kernel or constexpr."""
    JITFunction.run = launch
    implementation = find(name)
    for mode in Mode:
        forms: tuple[tuple[int, IntType], ...] = ((1, "int32"), (16, "int64"))
        for page_size, wide in forms:
            setup = Setup(
                num_draft_tokens=3,
                page_size=page_size,
                pool_width=40,
                table_width=40,
                buckets=(2,),
                seq_lens_dtype=wide,
                pool_index_dtype=wide,
                ctx_lens=CtxLens.OWN,
                schedule=True,
            )
            case = Case(setup, (Replay(mode, (Request(9, 0, 2), Request(5, 0, 3))),))
            rig = Rig(setup, "cpu")
            values, _ = paint(case, ImageKey.of(implementation, setup))
            rig.load(case, 0, torch.frombuffer(values, dtype=torch.int32))
            implementation.refresh(rig.inputs(mode, 2), rig.steps(mode, 2, OPTIONAL_OUTPUTS), setup)
    assert seen, f"{name} launched nothing"


if __name__ == "__main__":
    main(sys.argv[1])
