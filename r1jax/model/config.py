"""The shape of a model, as frozen dataclasses; every rule checked here."""

import dataclasses
import functools
import math
from typing import Literal

from pallas_kernels.mla_decode import ops as mla_decode_ops
from pallas_kernels.routed_swiglu import ops as routed_swiglu_ops
from r1jax import config as config_lib
from r1jax import fp8


@dataclasses.dataclass(frozen=True)
class YarnConfig:
  """YaRN context extension, arXiv:2309.00071, as DeepSeek uses it.

  Attributes:
    factor: s, how many times the original length.
    original_length: L, in tokens.
    beta_fast: Rotations over L above which a frequency is kept.
    beta_slow: Rotations over L below which a frequency is divided by s.
    mscale: Numerator of the factor of cos and sin.
    mscale_all_dim: Its denominator, squared into the softmax scale; without
      both (0) the factor is YaRN's own, that of mscale = 1, and the scale is
      left alone.
    attention_factor: The factor of cos and sin itself, whatever the mscales
      make of it; the softmax scale still follows mscale_all_dim.
    truncate: Round the ramp's ends outwards to whole pairs.
  """

  factor: float
  original_length: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True

  def __post_init__(self):
    config_lib.check_at_least(self, 1, 'factor', 'original_length')
    config_lib.check_positive(self, 'beta_fast', 'beta_slow')
    if self.attention_factor is not None:
      config_lib.check_positive(self, 'attention_factor')

  @property
  def rotation_factor(self) -> float:
    """What cos and sin are multiplied by."""
    if self.attention_factor is not None:
      return self.attention_factor
    if not (self.mscale and self.mscale_all_dim):
      return yarn_mscale(self.factor, 1.0)
    return yarn_mscale(self.factor, self.mscale) / yarn_mscale(
      self.factor, self.mscale_all_dim
    )

  @property
  def softmax_factor(self) -> float:
    """What MLA's softmax scale is multiplied by."""
    return yarn_mscale(self.factor, self.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
  """0.1 · m · ln s + 1. Source: DeepSeek-V3, arXiv:2412.19437, §4.3."""
  return 0.1 * mscale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class Llama3RopeConfig:
  """Llama 3.1's context extension.

  Attributes:
    factor: What low frequencies are divided by.
    low_freq_factor: Rotations over the original length up to which a frequency
      is divided.
    high_freq_factor: Rotations from which on it is kept.
    original_length: L, in tokens.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_length: int

  def __post_init__(self):
    config_lib.check_at_least(self, 1, 'factor', 'original_length')
    if not 0 < self.low_freq_factor < self.high_freq_factor:
      raise ValueError(
        f'low_freq_factor={self.low_freq_factor} must be positive and less '
        f'than high_freq_factor={self.high_freq_factor}'
      )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary embedding.

  Attributes:
    theta: Base of the frequencies.
    interleaved: Pairs (0, 1), (2, 3), … or halves (i, i + dim/2).
    scaling: How the context was extended.
  """

  theta: float
  interleaved: bool
  scaling: YarnConfig | Llama3RopeConfig | None = None

  def __post_init__(self):
    config_lib.check_positive(self, 'theta')


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
  """V3.2's lightning indexer: which tokens attention may see.

  Attributes:
    num_heads: J.
    head_dim: I, of which the first rope_head_dim are rotated, in halves.
    top_k: Tokens that each query attends to.
    dense: The warm-up: attention sees all tokens while the indexer learns.
  """

  num_heads: int
  head_dim: int
  top_k: int
  dense: bool = False

  def __post_init__(self):
    config_lib.check_at_least(self, 1, 'num_heads', 'head_dim', 'top_k')


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
    norm_eps: Of the norms of the latents, whatever the other norms have.
    indexer: Sparse attention (V3.2); it reads the query latent.
  """

  num_heads: int
  q_lora_rank: int | None
  kv_lora_rank: int
  nope_head_dim: int
  rope_head_dim: int
  v_head_dim: int
  rope: RopeConfig
  norm_eps: float = 1e-6
  indexer: IndexerConfig | None = None

  def __post_init__(self):
    config_lib.check_at_least(
      self, 1, 'num_heads', 'q_lora_rank', 'kv_lora_rank', 'nope_head_dim'
    )
    config_lib.check_at_least(self, 1, 'v_head_dim', 'rope_head_dim')
    if self.rope_head_dim % 2:
      raise ValueError(f'rope_head_dim={self.rope_head_dim} must be even')
    if self.indexer is None:
      return
    if self.q_lora_rank is None:
      raise ValueError(
        'q_lora_rank=None: the indexer needs the query latent, give its rank'
      )
    if self.indexer.head_dim < self.rope_head_dim:
      raise ValueError(
        f'indexer.head_dim={self.indexer.head_dim} must be at least '
        f'rope_head_dim={self.rope_head_dim}'
      )

  @property
  def head_widths(self) -> dict[str, int]:
    """Of all heads' columns, or rows, in the matrices that heads divide."""
    return {
      'q_up': self.num_heads * (self.nope_head_dim + self.rope_head_dim),
      'k_up': self.num_heads * self.nope_head_dim,
      'v_up': self.num_heads * self.v_head_dim,
    }

  @property
  def rotated_dim(self) -> int:
    """Width of what is rotated."""
    return self.rope_head_dim

  @property
  def softmax_scale(self) -> float:
    scale = (self.nope_head_dim + self.rope_head_dim) ** -0.5
    scaling = self.rope.scaling
    if isinstance(scaling, YarnConfig):
      scale *= scaling.softmax_factor
    return scale


@dataclasses.dataclass(frozen=True)
class GqaConfig:
  """Grouped-query attention, as Qwen and Llama have it.

  Attributes:
    num_heads: H.
    num_kv_heads: G, divides H.
    head_dim: Q, of queries, keys and values.
    rope: The rotary embedding.
    qkv_bias: Queries, keys and values have biases (Qwen2).
    qk_norm: RMSNorm over each head's queries and keys before the rotation
      (Qwen3).
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: RopeConfig
  qkv_bias: bool = False
  qk_norm: bool = False

  def __post_init__(self):
    config_lib.check_at_least(self, 1, 'num_heads', 'head_dim')
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} must be even')
    if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_kv_heads={self.num_kv_heads} must divide '
        f'num_heads={self.num_heads}'
      )

  @property
  def head_widths(self) -> dict[str, int]:
    """Of all heads' columns, or rows, in the matrices that heads divide."""
    return {
      'q_proj': self.num_heads * self.head_dim,
      'k_proj': self.num_kv_heads * self.head_dim,
    }

  @property
  def rotated_dim(self) -> int:
    """Width of what is rotated."""
    return self.head_dim

  @property
  def softmax_scale(self) -> float:
    return self.head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class ExchangeConfig:
  """How tokens travel between devices that hold different experts.

  Attributes:
    kind: 'padded' (everywhere), 'ragged' (TPU: XLA's own) or 'dma' (TPU: a
      kernel, beside which no products run).
    receive_factor: What a device has room for: 'worst' for any skew, or so
      many times what arrives when all get the same.
    on_overflow: What happens beyond it: 'stop' the run, or 'drop' tokens.
    fp8: Tokens travel in FP8, one scale for 128 values; sums come back in the
      compute dtype, as does the gradient.
    tokens_at_once: Tokens of a device that travel together, at most; 0 for
      all. Of fewer, fewer rows are held, see `moe._in_parts`.
  """

  kind: Literal['padded', 'ragged', 'dma'] = 'padded'
  receive_factor: str | float = 'worst'
  on_overflow: Literal['stop', 'drop'] = 'stop'
  fp8: bool = False
  tokens_at_once: int = 0

  def __post_init__(self):
    config_lib.check_at_least(self, 0, 'tokens_at_once')
    if self.receive_factor != 'worst':
      try:  # A flag gives a number as text.
        factor = float(self.receive_factor)
      except ValueError as e:
        raise ValueError(
          f"receive_factor={self.receive_factor!r} must be 'worst' or a number"
        ) from e
      object.__setattr__(self, 'receive_factor', factor)
      config_lib.check_positive(self, 'receive_factor')
    for name, valid in (
      ('kind', ('padded', 'ragged', 'dma')),
      ('on_overflow', ('stop', 'drop')),
    ):
      value = getattr(self, name)
      if value not in valid:
        raise ValueError(f'{name}={value!r}, it must be one of {valid}')

  @property
  def multiple(self) -> int:
    """Of the rows that one device sends another: whole tiles, for 'dma'."""
    return 8 if self.kind == 'dma' else 1

  def num_parts(self, num_tokens: int) -> int:
    """Equal parts that so many tokens of a device go in."""
    parts = -(-num_tokens // (self.tokens_at_once or num_tokens))
    while num_tokens % parts:
      parts += 1
    return parts


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
    has_bias: The choice has a bias that evens out the load (V3).
    block: Rows of one expert that are worked off together.
    implementation: Of pallas_kernels.routed_swiglu: 'xla' on a CPU, 'grouped'
      on an accelerator; for large models on TPUs 'pallas', our kernel, or
      'megablox', JAX's.
    exchange: With experts on several devices.
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
  has_bias: bool = True
  block: int = 32
  implementation: str = 'xla'
  exchange: ExchangeConfig = ExchangeConfig()

  def __post_init__(self):
    config_lib.check_at_least(self, 1, 'expert_dim', 'block')
    config_lib.check_at_least(self, 0, 'num_shared')
    config_lib.check_positive(self, 'scale')
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
  """A transformer: DeepSeek V2, V3 and V3.2, Moonlight, Kimi, Qwen, Llama.

  Attributes:
    vocab_size: V.
    embed_dim: D.
    num_layers: Blocks of the main model, the dense ones first.
    num_dense_layers: How many of them have a dense SwiGLU.
    dense_dim: Width of that SwiGLU; anything where there is none.
    attention: Attention of every block.
    attention_implementation: In training and prefill: 'naive' holds all scores,
      'chunked' some at a time, for any device; 'splash' is JAX's kernel for
      TPUs, for rows of whole 128 tokens, 'pallas' ours for MLA.
    decode_implementation: Of attention to a cache: 'xla', for any device, or
      'pallas', MLA's kernel for TPUs, whose cache has pages.
    head_implementation: Of log-probabilities: 'chunked' holds some tokens'
      logits, for any device, 'pallas' none, a kernel for TPUs.
    moe: Feed-forward of the other blocks; None only if all are dense.
    mtp_depth: M, multi-token-prediction modules.
    mtp_after_norm: Feed them the hidden state after the final norm.
    norm_eps: Of every RMSNorm.
    init_std: Of every matrix.
    tie_embeddings: The head is the embedding.
    max_length: Longest sequence, in tokens.
    dtype: Compute type: 'float32' or 'bfloat16'. Parameters are float32.
    precision: Of the products of linears and experts: that of 'dtype', or FP8's
      with scales of tiles ('block_fp8', V3's recipe) or of whole tensors
      ('tensor_fp8'). Embedding, head, router, norms, attention itself, the
      projection of MTP and indexers have the compute type.
    fp8_implementation: Of products of FP8: 'xla' emulates them exactly, on any
      device, 'pallas' has kernels for TPUs.
    remat: Recompute each block in the backward pass.
    scan_layers: Compile one block per stack and loop, or unroll the loop.
  """

  vocab_size: int
  embed_dim: int
  num_layers: int
  num_dense_layers: int
  dense_dim: int
  attention: MlaConfig | GqaConfig
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
  attention_implementation: Literal['naive', 'chunked', 'splash', 'pallas'] = (
    'naive'
  )
  decode_implementation: Literal['xla', 'pallas'] = 'xla'
  head_implementation: Literal['chunked', 'pallas'] = 'chunked'
  precision: Literal['dtype', 'block_fp8', 'tensor_fp8'] = 'dtype'
  fp8_implementation: Literal['xla', 'pallas'] = 'xla'

  def __post_init__(self):
    check = functools.partial(config_lib.check_at_least, self)
    check(1, 'vocab_size', 'embed_dim', 'num_layers', 'max_length')
    check(0, 'mtp_depth', 'norm_eps', 'init_std')
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
    if self.num_dense_layers:
      check(1, 'dense_dim')
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(
        f"dtype={self.dtype!r}, it must be 'float32' or 'bfloat16'"
      )
    self._check_precision()
    for name, valid in (
      ('attention_implementation', ('naive', 'chunked', 'splash', 'pallas')),
      ('decode_implementation', ('xla', 'pallas')),
      ('head_implementation', ('chunked', 'pallas')),
      ('fp8_implementation', fp8.IMPLEMENTATIONS),
    ):
      if getattr(self, name) not in valid:
        raise ValueError(
          f'{name}={getattr(self, name)!r}, it must be one of {valid}'
        )
    self._check_kernels()

  @property
  def recipe(self) -> fp8.Recipe | None:
    """How products are FP8's; None where they are not."""
    return fp8.recipe(self.precision, self.fp8_implementation)

  def _check_kernels(self):
    """Whether attention is one that the implementations are for."""
    attention = self.attention
    is_mla = isinstance(attention, MlaConfig)
    how = self.attention_implementation
    if is_mla and attention.indexer and how != 'naive':
      raise ValueError(
        f"attention_implementation={how!r}: with an indexer it must be 'naive'"
      )
    if not is_mla and how == 'pallas':
      raise ValueError(
        "attention_implementation='pallas' is for MLA; 'splash' is for "
        'grouped-query attention, too'
      )
    if self.decode_implementation == 'pallas':
      if not is_mla or attention.indexer:
        raise ValueError(
          "decode_implementation='pallas' is for MLA without an indexer, "
          "'xla' for all"
        )
      if attention.kv_lora_rank % mla_decode_ops.SCALE_CHANNELS:
        raise ValueError(
          "decode_implementation='pallas' needs attention.kv_lora_rank to be "
          f'a multiple of {mla_decode_ops.SCALE_CHANNELS}, it is '
          f'{attention.kv_lora_rank}'
        )

  def _check_precision(self):
    if self.precision not in fp8.PRECISIONS:
      raise ValueError(
        f'precision={self.precision!r}, it must be one of {fp8.PRECISIONS}'
      )
    moe = self.moe
    if self.precision == 'dtype' or moe is None:
      return
    if moe.implementation != 'grouped' or moe.block % fp8.TILE:
      raise ValueError(
        f'precision={self.precision!r} needs moe.implementation=grouped and a '
        f'moe.block of whole {fp8.TILE} rows, they are {moe.implementation} '
        f'and {moe.block}'
      )
