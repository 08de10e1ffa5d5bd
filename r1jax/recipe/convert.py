"""From Hugging Face folders to workdirs and back, and the check after it."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from r1jax import config as config_lib
from r1jax.data import hf_tokenizer
from r1jax.data import tokenizer as tokenizer_lib
from r1jax.interop import export, fp8, huggingface
from r1jax.interop import folder as folder_lib
from r1jax.model import transformer
from r1jax.parallel import sharding
from r1jax.recipe import origin, tokenizer_files
from r1jax.train import checkpoint
from r1jax.train import state as state_lib
from r1jax.train import workdir as workdir_lib


def to_workdir(
  folder: str,
  workdir: str,
  *,
  mesh: jax.sharding.Mesh,
  param_dtype: str,
  mtp: bool = True,
  say: Callable[[str], None],
) -> None:
  """Makes a workdir with one checkpoint, step 0, of a Hugging Face folder.

  FP8 weights are dequantised, for a workdir is there to compute with.
  Every process of a pod must call this; each reads its own shards.

  Raises:
    UserError: The folder is wrong, or the workdir holds something.
  """
  model = huggingface.load_config(folder, say=say)
  if not mtp:
    model = dataclasses.replace(model, mtp_depth=0)
  folder_lib.refuse_used(workdir)
  variables = huggingface.load_variables(
    folder, model, mesh=mesh, param_dtype=param_dtype, say=say
  )
  is_owner = jax.process_index() == 0
  with folder_lib.finished_under(workdir, is_owner=is_owner) as unfinished:
    multihost_utils.sync_global_devices('The folder is there.')
    step = sharding.replicate(mesh, np.zeros((), np.int32))
    state = state_lib.State(step, variables, None, None)
    with checkpoint.Checkpoints(
      unfinished / 'checkpoints', max_to_keep=1, say=say
    ) as checkpoints:
      checkpoints.save(0, state, {})
    if is_owner:
      tokenizer_files.copy(folder, unfinished / tokenizer_files.FOLDER)
    resolved = {
      'model': config_lib.to_dict(model),
      'tokenizer': tokenizer_files.FOLDER,
      'from_hf': os.path.abspath(folder),
      'token_ids': tokenizer_files.token_ids(folder),
    }
    workdir_lib.prepare(unfinished, resolved)
    multihost_utils.sync_global_devices('No process writes any more.')
  multihost_utils.sync_global_devices('The folder has its name.')


def to_huggingface(
  source: str,
  folder: str,
  *,
  mesh: jax.sharding.Mesh,
  dtype: str,
  shard_gib: float,
  mtp: bool = True,
  say: Callable[[str], None],
) -> None:
  """Writes a workdir's model, or another folder's, for other tools.

  Args:
    source: The workdir or folder.
    folder: Where to; a new one.
    mesh: Where the variables go meanwhile.
    dtype: As `export.save`; where weights of a folder are FP8 and it is 'fp8',
      every tensor stays as it is. A workdir has no FP8: quantised anew, its
      weights are other bytes.
    shard_gib: Most GiB of a file.
    mtp: Whether MTP modules are written, if there are any.
    say: Takes remarks.

  Raises:
    UserError: No model there, none that other tools know, or its tokenizer is
      gone.
  """
  folder_lib.refuse_used(folder)
  model = origin.load_model_config(source)
  tokenizer = origin.load_tokenizer_path(source)
  if tokenizer and not os.path.exists(tokenizer):
    raise config_lib.UserError(
      f'the tokenizer of {source}, {tokenizer}, does not exist'
    )
  extra, dtypes = _token_ids(source, tokenizer), {}
  if huggingface.is_checkpoint(source) and dtype == 'fp8':
    # Layer by layer: what is FP8 in one may not be in another.
    model = dataclasses.replace(model, scan_layers=False)
    variables = huggingface.load_variables(
      source, model, mesh=mesh, keep_fp8=True, say=say
    )
    values = huggingface.read_config(pathlib.Path(source))
    quantised = values.get('quantization_config')
    extra |= {'quantization_config': quantised} if quantised else {}
    there = huggingface.tensor_dtypes(source)
    dtypes = there if fp8.E4M3 in there.values() else {}
  else:
    variables, _ = origin.load_variables(source, model, mesh, say=say)

  if not mtp:
    model = dataclasses.replace(model, mtp_depth=0)

  def finish(unfinished: pathlib.Path) -> None:
    if tokenizer:
      tokenizer_files.copy(tokenizer, unfinished)
      return
    model_file = tokenizer_lib.default_model()
    (unfinished / tokenizer_files.SENTENCEPIECE).write_bytes(model_file)

  export.save(
    folder,
    model,
    variables,
    dtype=dtype,
    dtypes=dtypes,
    shard_bytes=int(shard_gib * 2**30),
    extra=extra,
    finish=finish,
  )


def _token_ids(source: str, tokenizer: str) -> dict[str, Any]:
  """Where documents begin and end, as config.json says it."""
  if huggingface.is_checkpoint(source):
    return tokenizer_files.token_ids(source)
  kept = origin.read_config(source).get('token_ids')
  if kept is not None:
    return kept
  found = hf_tokenizer.load_tokenizer(tokenizer)
  ids = found.bos_id, found.eos_id, found.pad_id
  return dict(zip(tokenizer_files.TOKEN_IDS, ids, strict=True))


@dataclasses.dataclass(frozen=True)
class LogitsCheck:
  """How far logits are from a reference's.

  Attributes:
    largest: Largest absolute difference; nan if there is one.
    mean_kl: KL(reference ‖ ours), mean over all tokens, nats.
    num_tokens: How many tokens were compared.
  """

  largest: float
  mean_kl: float
  num_tokens: int


def check_logits(
  folder: str, reference: str, *, mesh: jax.sharding.Mesh
) -> LogitsCheck:
  """Compares a model's logits with those in an npz, in float32.

  Args:
    folder: Hugging Face folder or workdir.
    reference: Holds `input_ids` [B, T] and `logits` [B, T, V].
    mesh: Where to compute; rows are not split.

  Raises:
    UserError: The file lacks an array, or they do not fit the model.
  """
  model = origin.load_model_config(folder)
  tokens_BT, expected_BTV = _read_reference(reference, model.vocab_size)
  if tokens_BT.shape[1] > model.max_length:
    raise config_lib.UserError(
      f'{reference}: {tokens_BT.shape[1]} tokens a row, the model has a '
      f'context of {model.max_length}'
    )
  model = dataclasses.replace(model, dtype='float32')
  variables, _ = origin.load_variables(folder, model, mesh, say=print)

  @jax.jit
  def logits(variables, tokens_BT):
    with jax.default_matmul_precision('highest'):
      return transformer.Transformer(model).apply(
        variables, tokens_BT, method='logits'
      )

  @jax.jit
  def compare(logits_TV, expected_TV):
    kl_T = _kl(jax.nn.log_softmax(expected_TV), jax.nn.log_softmax(logits_TV))
    return jnp.abs(logits_TV - expected_TV).max(), kl_T.sum()

  largest, kl = 0.0, 0.0
  for tokens_T, expected_TV in zip(tokens_BT, expected_BTV, strict=True):
    row_TV = logits(variables, tokens_T[None])[0]
    row_largest, row_kl = compare(row_TV, expected_TV.astype(np.float32))
    largest = float(np.maximum(largest, row_largest))  # nan stays.
    kl += float(row_kl)
  return LogitsCheck(largest, kl / tokens_BT.size, tokens_BT.size)


def _kl(logp_TV: jax.Array, logq_TV: jax.Array) -> jax.Array:
  """KL(p ‖ q) of each token, nats, in a form without negative terms.

  Σ_v p (log p - log q) = Σ_v p (q/p - 1 + log p - log q), as Σ q = Σ p.
  """
  p_TV, gap_TV = jnp.exp(logp_TV), logp_TV - logq_TV
  near_TV = p_TV * (jnp.expm1(-gap_TV) + gap_TV)
  far_TV = jnp.exp(logq_TV) - p_TV + p_TV * gap_TV  # expm1 might overflow.
  # A rounding error of q/p - 1 would make 1e-14 of a zero, of either sign.
  terms_TV = jnp.where(jnp.abs(gap_TV) < 1, near_TV, far_TV)
  return jnp.maximum(terms_TV, 0).sum(-1)


def _read_reference(
  path: str, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
  try:
    loaded = np.load(path)
    if isinstance(loaded, np.ndarray):
      raise ValueError('it is an array without a name')
    with loaded as file:
      # What is no array in there is bytes.
      tokens_BT = np.asarray(file['input_ids'])
      logits_BTV = np.asarray(file['logits'])
  except KeyError as e:
    raise config_lib.UserError(f'{path} lacks an array: {e.args[0]}') from e
  except Exception as e:  # NumPy's, zipfile's, zlib's, tokenize's, …
    reason = str(e).partition('\n')[0]
    raise config_lib.UserError(f'{path} is no npz file: {reason}') from e
  if (
    tokens_BT.ndim != 2
    or not tokens_BT.size
    or tokens_BT.dtype.kind not in 'iu'
  ):
    raise config_lib.UserError(
      f'{path}: input_ids {list(tokens_BT.shape)} of {tokens_BT.dtype} must be '
      'integers [B, T]'
    )
  if logits_BTV.shape != (*tokens_BT.shape, vocab_size):
    raise config_lib.UserError(
      f'{path}: logits {list(logits_BTV.shape)} must be input_ids '
      f'{list(tokens_BT.shape)} with the {vocab_size} tokens of the model'
    )
  if logits_BTV.dtype.kind not in 'fiu':
    raise config_lib.UserError(
      f'{path}: logits of {logits_BTV.dtype} must be numbers'
    )
  if tokens_BT.min() < 0 or tokens_BT.max() >= vocab_size:
    raise config_lib.UserError(
      f'{path}: input_ids from {tokens_BT.min()} to {tokens_BT.max()} must '
      f'lie between 0 and {vocab_size - 1}'
    )
  return tokens_BT.astype(np.int32), logits_BTV
