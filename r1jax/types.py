"""The pytrees that pass between parts, each field with its shape.

Dimension key (a suffix on every array of rank >= 1; see README for the rest):
  B batch (rows), T query tokens, S key tokens, P prompts, G completions per
  prompt (B = P * G), D model width, V vocabulary, F feed-forward width,
  E routed experts, K experts per token, L layers, M MTP depth.
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Packed or padded rows of tokens with a weight per predicted token.

  Attributes:
    tokens_BT: int32 token ids; padding may hold any id.
    mask_BT: float32 weight of predicting tokens_BT[b, t] from what stands
      before it; 0 for the first token of a document, prompts and padding.
    segment_BT: int32 document number inside the row, from 1; 0 is padding.
    position_BT: int32 position inside the document, from 0.
    num_tokens: float32 scalar, sum of mask_BT over the WHOLE global batch.
    num_sequences: float32 scalar, documents (or completions) of the WHOLE
      global batch. Losses divide by these, so that microbatches add up.
  """

  tokens_BT: jax.Array
  mask_BT: jax.Array
  segment_BT: jax.Array
  position_BT: jax.Array
  num_tokens: jax.Array
  num_sequences: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch(Batch):
  """Packed completions with what a policy loss needs at each token.

  mask_BT is 1 on sampled tokens only; each segment is one prompt with its
  completion; num_sequences counts completions.

  Attributes:
    old_logp_BT: float32 log-probability (nats) of each token when sampled.
    ref_logp_BT: float32 the same under the reference policy (0 if unused).
    adv_BT: float32 advantage of the token's completion.
    length_BT: float32 sampled tokens of the token's completion, at least 1.
  """

  old_logp_BT: jax.Array
  ref_logp_BT: jax.Array
  adv_BT: jax.Array
  length_BT: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
  """Prompts and sampled completions, right-padded.

  `logp_BT[b, t]` = log p(tokens[b, t] | tokens[b, :t]) under the distribution
  sampled from, temperature and truncation included; 0 outside the mask.

  Attributes:
    tokens_BT: int32 prompt, then completion, then pad_id.
    mask_BT: float32, 1 on sampled tokens, the stop token included.
    logp_BT: float32, nats.
    prompt_length_B: int32, tokens.
    length_B: int32, prompt and completion, tokens.
    finished_B: bool, a stop token was sampled.
  """

  tokens_BT: jax.Array
  mask_BT: jax.Array
  logp_BT: jax.Array
  prompt_length_B: jax.Array
  length_B: jax.Array
  finished_B: jax.Array
