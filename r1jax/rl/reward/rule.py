"""Rule rewards read off token arrays, vectorised; `strings` is the twin.

The package's docstring defines format and accuracy.
"""

import dataclasses
import re
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# What a gold answer is written in; an answer array holds indices into it.
SYMBOLS = '0123456789-'
WHITESPACE = b' \n\t\r'

_THINK, _END_THINK, _ANSWER, _END_ANSWER, _EOS = 1, 2, 3, 4, 5


class Tokenizer(Protocol):
  """What the rewards need of a tokenizer."""

  vocab_size: int
  eos_id: int
  think_id: int
  end_think_id: int
  answer_id: int
  end_answer_id: int

  def bytes_of(self, token: int) -> bytes:
    """Returns what `token` prints."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """What each id means to a reward; the last entry is every other id.

  Attributes:
    mark_V: int32, 0 or which tag or <eos> the id is.
    blank_V: bool, prints whitespace only.
    solid_V: bool, prints something besides whitespace; no mark is solid.
    symbol_V: int32, index into SYMBOLS of the one solid character, else -1.
    blank_before_V: bool, whitespace stands before that character.
    blank_after_V: bool, whitespace stands after that character.
  """

  mark_V: jax.Array
  blank_V: jax.Array
  solid_V: jax.Array
  symbol_V: jax.Array
  blank_before_V: jax.Array
  blank_after_V: jax.Array


def make_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
  """Builds the tables from what each id prints.

  Raises:
    ValueError: A piece holds several characters of an integer, which the
      tables cannot express: the tokenizer must split digits.
  """
  V = tokenizer.vocab_size
  mark_V = np.zeros(V + 1, np.int32)
  mark_V[tokenizer.think_id] = _THINK
  mark_V[tokenizer.end_think_id] = _END_THINK
  mark_V[tokenizer.answer_id] = _ANSWER
  mark_V[tokenizer.end_answer_id] = _END_ANSWER
  mark_V[tokenizer.eos_id] = _EOS
  blank_V, solid_V = np.zeros(V + 1, bool), np.zeros(V + 1, bool)
  before_V, after_V = np.zeros(V + 1, bool), np.zeros(V + 1, bool)
  symbol_V = np.full(V + 1, -1, np.int32)
  for token in range(V):
    printed = b'' if mark_V[token] else tokenizer.bytes_of(token)
    core = printed.strip(WHITESPACE)
    if re.fullmatch(rb'-?[0-9]+', core) and len(core) > 1:
      raise ValueError(
        f'token {token} prints {printed!r}: device rewards need a tokenizer '
        'that splits digits'
      )
    blank_V[token] = bool(printed) and not core
    solid_V[token] = bool(core)
    if len(core) == 1 and core in SYMBOLS.encode():
      symbol_V[token] = SYMBOLS.encode().index(core)
      before_V[token] = printed[:1] != core
      after_V[token] = printed[-1:] != core
  tables = (mark_V, blank_V, solid_V, symbol_V, before_V, after_V)
  return Vocabulary(*(jnp.asarray(table) for table in tables))


def format_reward(
  tokens_BT: jax.Array, mask_BT: jax.Array, vocabulary: Vocabulary
) -> jax.Array:
  """Returns 1 where the completion has the format, else 0.

  Args:
    tokens_BT: int32 [..., T] ids; any leading axes.
    mask_BT: [..., T], above 0 on sampled tokens; the rest is not read.
    vocabulary: From `make_vocabulary`.

  Returns:
    float32 [...].
  """
  ids_BT, live_BT = _live(tokens_BT, mask_BT, vocabulary)
  mark_BT = jnp.where(live_BT, vocabulary.mark_V[ids_BT], 0)
  solid_BT = live_BT & vocabulary.solid_V[ids_BT]
  prints_BT = solid_BT | (live_BT & vocabulary.blank_V[ids_BT])
  index_T = jnp.arange(tokens_BT.shape[-1])
  think_B1, end_think_B1, answer_B1, end_answer_B1, eos_B1 = (
    jnp.argmax(mark_BT == mark, axis=-1, keepdims=True)
    for mark in (_THINK, _END_THINK, _ANSWER, _END_ANSWER, _EOS)
  )
  once_B = jnp.all(
    jnp.stack(
      [
        (mark_BT == mark).sum(-1) == 1
        for mark in (_THINK, _END_THINK, _ANSWER, _END_ANSWER, _EOS)
      ]
    ),
    axis=0,
  )
  order_B1 = (think_B1 < end_think_B1) & (end_think_B1 < answer_B1)
  order_B1 &= (answer_B1 < end_answer_B1) & (end_answer_B1 < eos_B1)
  between_BT = (index_T > end_think_B1) & (index_T < answer_B1)
  inside_BT = (index_T > answer_B1) & (index_T < end_answer_B1)
  stray_BT = prints_BT & (index_T < think_B1)
  stray_BT |= solid_BT & (between_BT | (index_T > end_answer_B1))
  answered_B = (solid_BT & inside_BT).any(-1)
  reward_B = once_B & order_B1[..., 0] & answered_B & ~stray_BT.any(-1)
  return reward_B.astype(jnp.float32)


def accuracy_reward(
  tokens_BT: jax.Array,
  mask_BT: jax.Array,
  answer_BA: jax.Array,
  vocabulary: Vocabulary,
) -> jax.Array:
  """Returns 1 where the last complete answer is the gold integer, else 0.

  Args:
    tokens_BT: int32 [..., T] ids; any leading axes.
    mask_BT: [..., T], above 0 on sampled tokens; the rest is not read.
    answer_BA: int32 [..., A] from `strings.answer_ids`, leading axes that
      broadcast to those of tokens_BT; a row of -1 is never met.
    vocabulary: From `make_vocabulary`.

  Returns:
    float32 [...].
  """
  ids_BT, live_BT = _live(tokens_BT, mask_BT, vocabulary)
  inside_BT = _last_answer(jnp.where(live_BT, vocabulary.mark_V[ids_BT], 0))
  solid_BT = inside_BT & vocabulary.solid_V[ids_BT]
  count_BT = jnp.cumsum(solid_BT, axis=-1, dtype=jnp.int32)
  count_B1 = count_BT[..., -1:]
  A = answer_BA.shape[-1]
  answer_BA = jnp.broadcast_to(answer_BA, (*tokens_BT.shape[:-1], A))
  gold_BT = jnp.take_along_axis(
    answer_BA, jnp.clip(count_BT - 1, 0, A - 1), axis=-1
  )
  wrong_BT = solid_BT & (vocabulary.symbol_V[ids_BT] != gold_BT)
  # Whitespace may stand around the number, never inside it.
  blank_BT = inside_BT & vocabulary.blank_V[ids_BT]
  wrong_BT |= blank_BT & (count_BT > 0) & (count_BT < count_B1)
  before_BT = solid_BT & vocabulary.blank_before_V[ids_BT]
  wrong_BT |= before_BT & (count_BT > 1)
  after_BT = solid_BT & vocabulary.blank_after_V[ids_BT]
  wrong_BT |= after_BT & (count_BT < count_B1)
  length_B = (answer_BA >= 0).sum(-1)
  reward_B = (count_B1[..., 0] == length_B) & (length_B > 0)
  return (reward_B & ~wrong_BT.any(-1)).astype(jnp.float32)


def _live(
  tokens_BT: jax.Array, mask_BT: jax.Array, vocabulary: Vocabulary
) -> tuple[jax.Array, jax.Array]:
  """Returns ids inside the tables, and which are sampled up to <eos>."""
  other = vocabulary.mark_V.shape[0] - 1
  known_BT = (tokens_BT >= 0) & (tokens_BT < other)
  ids_BT = jnp.where(known_BT, tokens_BT, other)
  live_BT = mask_BT > 0
  eos_BT = live_BT & (vocabulary.mark_V[ids_BT] == _EOS)
  earlier_BT = jnp.cumsum(eos_BT, axis=-1, dtype=jnp.int32) - eos_BT
  return ids_BT, live_BT & (earlier_BT == 0)


def _last_answer(mark_BT: jax.Array) -> jax.Array:
  """Returns where the content of the last tag-free <answer> pair stands."""
  axis, T = mark_BT.ndim - 1, mark_BT.shape[-1]
  index_T = jnp.arange(T)
  # The last tag at or before t, as index * 8 + mark: one scan carries both.
  tag_BT = lax.cummax(
    jnp.where(mark_BT > 0, index_T * 8 + mark_BT, -1), axis=axis
  )
  previous_BT = jnp.concatenate(
    [jnp.full_like(tag_BT[..., :1], -1), tag_BT[..., :-1]], axis=-1
  )
  # Without a tag before, -1 % 8 is 7, which is no mark.
  pair_BT = (mark_BT == _END_ANSWER) & (previous_BT % 8 == _ANSWER)
  end_B1 = jnp.where(pair_BT, index_T, -1).max(-1, keepdims=True)
  start_B1 = (
    jnp.take_along_axis(previous_BT, jnp.maximum(end_B1, 0), axis=-1) // 8
  )
  return (end_B1 >= 0) & (index_T > start_B1) & (index_T < end_B1)
