"""The shape of a model, as frozen dataclasses; every rule checked here."""

import dataclasses
import math

from pallas_kernels.routed_swiglu import ops as routed_swiglu_ops


@dataclasses.dataclass(frozen=True)
class YarnConfig:
  """YaRN context extension, arXiv:2309.00071, as DeepSeek uses it.

  Attributes:
    factor: s, how many times the original length.
    original_length: L, in tokens.
    beta_fast: Rotations over L above which a frequency is kept.
    beta_slow: Rotations over L below which a frequency is divided by s.
    mscale: Numerator of the cos/sin factor.
    mscale_all_dim: Its denominator; squared into the softmax scale.
  """

  factor: float
  original_length: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0

  def __post_init__(self):
    if self.factor < 1 or self.original_length < 1:
      raise ValueError(
        f'factor={self.factor}, original_length={self.original_length}: '
        'both must be at least 1'
      )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary embedding: pairs (0, 1), (2, 3), … or halves (i, i + dim/2)."""

  theta: float
  interleaved: bool
  yarn: YarnConfig | None = None


@dataclasses.dataclass(frozen=True)
class MlaConfig:
  """Multi-head latent attention.

  Attributes:
    num_heads: H.
    q_lora_rank: A, width of the query latent; None projects directly.
    kv_lora_rank: C, width of the key-value latent.
    nope_head_dim: N, key width without rotation.
    rope_head_dim: R, rotated key width, shared by all heads.
    v_head_dim: U.
    rope: The rotary embedding.
  """

  num_heads: int
  q_lora_rank: int | None
  kv_lora_rank: int
  nope_head_dim: int
  rope_head_dim: int
  v_head_dim: int
  rope: RopeConfig

  def __post_init__(self):
    if self.rope_head_dim % 2:
      raise ValueError(f'rope_head_dim={self.rope_head_dim} must be even')

  @property
  def softmax_scale(self) -> float:
    scale = (self.nope_head_dim + self.rope_head_dim) ** -0.5
    yarn = self.rope.yarn
    if yarn is None:
      return scale
    return scale * yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
  """0.1 · m · ln s + 1. Source: DeepSeek-V3, arXiv:2412.19437, §4.3."""
  return 0.1 * mscale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class MoeConfig:
  """DeepSeekMoE.

  Attributes:
    num_experts: E, routed.
    top_k: K, experts per token.
    expert_dim: F, width of one expert.
    num_shared: Shared experts; they are one SwiGLU of num_shared * F.
    num_groups: J, expert groups (1: no group limit).
    top_groups: Groups a token may reach.
    score: 'sigmoid' (V3) or 'softmax' (V2).
    group_score: 'top2' (V3: sum of the two best) or 'max' (V2).
    normalize: Divide the chosen scores by their sum.
    scale: Routed scaling factor.
    block: Rows of one expert that are worked off together.
    implementation: Of pallas_kernels.routed_swiglu: 'xla' on a CPU, 'grouped'
      on an accelerator.
  """

  num_experts: int
  top_k: int
  expert_dim: int
  num_shared: int
  num_groups: int = 1
  top_groups: int = 1
  score: str = 'sigmoid'
  group_score: str = 'top2'
  normalize: bool = True
  scale: float = 1.0
  block: int = 32
  implementation: str = 'xla'

  def __post_init__(self):
    if not 1 <= self.top_k <= self.num_experts:
      raise ValueError(
        f'top_k={self.top_k} of num_experts={self.num_experts}: top_k must '
        'lie between 1 and the number of experts'
      )
    if self.num_groups < 1 or self.num_experts % self.num_groups:
      raise ValueError(
        f'num_groups={self.num_groups} must divide '
        f'num_experts={self.num_experts}'
      )
    if not 1 <= self.top_groups <= self.num_groups:
      raise ValueError(
        f'top_groups={self.top_groups} must lie between 1 and '
        f'num_groups={self.num_groups}'
      )
    group_size = self.num_experts // self.num_groups
    if self.top_k > self.top_groups * group_size:
      raise ValueError(
        f'top_k={self.top_k} exceeds the {self.top_groups * group_size} '
        f'experts of top_groups={self.top_groups} groups'
      )
    if self.num_groups > 1 and self.group_score == 'top2' and group_size < 2:
      raise ValueError(
        f'group_score=top2 needs groups of 2 experts, num_groups='
        f'{self.num_groups} of num_experts={self.num_experts} leaves 1'
      )
    for name, value, valid in (
      ('score', self.score, ('sigmoid', 'softmax')),
      ('group_score', self.group_score, ('top2', 'max')),
      (
        'implementation',
        self.implementation,
        routed_swiglu_ops.IMPLEMENTATIONS,
      ),
    ):
      if value not in valid:
        raise ValueError(f'{name}={value!r}, it must be one of {valid}')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A DeepSeek-V3-shaped transformer.

  Attributes:
    vocab_size: V.
    embed_dim: D.
    num_layers: Blocks of the main model, the dense ones first.
    num_dense_layers: How many of them have a dense SwiGLU.
    dense_dim: Width of that SwiGLU.
    attention: Attention of every block.
    moe: Feed-forward of the other blocks; None only if all are dense.
    mtp_depth: M, multi-token-prediction modules.
    mtp_after_norm: Feed them the hidden state after the final norm.
    norm_eps: Of every RMSNorm.
    init_std: Of every matrix.
    tie_embeddings: The head is the embedding.
    max_length: Longest sequence, in tokens.
    dtype: Compute type: 'float32' or 'bfloat16'. Parameters are float32.
    remat: Recompute each block in the backward pass.
    scan_layers: Compile one block per stack and loop, or unroll the loop.
  """

  vocab_size: int
  embed_dim: int
  num_layers: int
  num_dense_layers: int
  dense_dim: int
  attention: MlaConfig
  moe: MoeConfig | None
  mtp_depth: int = 0
  mtp_after_norm: bool = False
  norm_eps: float = 1e-6
  init_std: float = 0.006
  tie_embeddings: bool = False
  max_length: int = 4096
  dtype: str = 'float32'
  remat: bool = False
  scan_layers: bool = True

  def __post_init__(self):
    if not 0 <= self.num_dense_layers <= self.num_layers:
      raise ValueError(
        f'num_dense_layers={self.num_dense_layers} must lie between 0 and '
        f'num_layers={self.num_layers}'
      )
    if self.moe is None and self.num_dense_layers < self.num_layers:
      raise ValueError(
        f'moe=None needs num_dense_layers={self.num_layers}, it is '
        f'{self.num_dense_layers}'
      )
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(
        f"dtype={self.dtype!r}, it must be 'float32' or 'bfloat16'"
      )
    if self.mtp_depth < 0:
      raise ValueError(f'mtp_depth={self.mtp_depth} must not be negative')
