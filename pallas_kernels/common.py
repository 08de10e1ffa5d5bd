"""What the kernels share: how one is described to those who compile it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
  """A kernel at one shape, to be compiled and to have its schedule read.

  Each op has its cases in `cases.py`: tests compile them for TPUs, and
  `experiments.bench_kernels` reads the schedules.

  Attributes:
    kernel: The op's name.
    name: Of the shape, and of the direction if it has several.
    implementation: Which of the op's, or of a peer's.
    function: Of `args`.
    args: Of jax.ShapeDtypeStruct, without shardings.
    flops: Useful ones of a call.
    hbm_bytes: Least bytes that a call moves: each input and output once.
    dtype: The operands' of the matrix unit: 'bfloat16' or 'float8_e4m3fn'.
    donate: Numbers of the arguments updated in place.
    scalars: Values of the kernel's scalar arguments that control flow reads,
      by their place among the operands of the `pallas_call`, for each regular
      expression of a kernel's name: where time depends on them. A function
      without arguments where it takes time to find them.
    generations: Those it is for; () for all.
  """

  kernel: str
  name: str
  implementation: str
  function: Callable[..., Any]
  args: tuple[Any, ...]
  flops: float
  hbm_bytes: float
  dtype: str = 'bfloat16'
  donate: tuple[int, ...] = ()
  scalars: (
    Mapping[str, Mapping[int, Any]]
    | Callable[[], Mapping[str, Mapping[int, Any]]]
  ) = dataclasses.field(default_factory=dict)
  generations: tuple[str, ...] = ()
