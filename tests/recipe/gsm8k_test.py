"""A tiny random Qwen3 is finetuned on GSM8K: configs/sft_gsm8k.py, shorter."""

import shutil

import jax
import numpy as np
import pytest

from configs import sft_gsm8k
from r1jax import config as config_lib
from r1jax.interop import huggingface
from r1jax.model import transformer
from r1jax.recipe import convert, sft
from r1jax.train import metrics
from tests.recipe import micro


def _config(shared_data, num_steps: int) -> sft.SftConfig:
  values = sft_gsm8k.get_config()
  values.data.paths = (str(shared_data / 'gsm8k' / 'train.jsonl'),)
  values.data.held_out_fraction = 0.003  # Some 20 of 7,473.
  values.model.update({'embed_dim': 64, 'num_layers': 2, 'dense_dim': 192})
  values.model.num_dense_layers = 2
  values.row_length = 384  # tokens
  values.optim.schedule = 'constant'  # So that num_steps changes nothing.
  values.optim.warmup_steps = 0
  values.optim.peak_lr = 1e-2
  values.train.num_steps = num_steps
  values.train.eval_every = 5
  return config_lib.from_dict(sft.SftConfig, values.to_dict())


@pytest.mark.slow
def test_the_loss_falls_it_resumes_and_is_exported(shared_data, tmp_path):
  run, half, out = (str(tmp_path / name) for name in ('run', 'half', 'out'))
  with micro.on(micro.one_device()):
    sft.run(_config(shared_data, 5), run)
    shutil.copytree(run, half)
    state = sft.run(_config(shared_data, 20), run)
    again = sft.run(_config(shared_data, 20), half)
  rows = list(metrics.read(tmp_path / 'run'))
  losses = [row['train/loss'] for row in rows if 'train/loss' in row]
  held_out = [row['eval/loss'] for row in rows if 'eval/loss' in row]
  # Random weights give each of 512 tokens its share.
  assert len(losses) == 20 and losses[0] == pytest.approx(np.log(512), abs=0.3)
  assert len(held_out) == 4 and held_out == sorted(held_out, reverse=True)
  assert held_out[-1] < 3.5
  flat = jax.tree_util.tree_flatten_with_path
  for (path, a), (_, b) in zip(
    flat(state.variables)[0], flat(again.variables)[0], strict=True
  ):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))

  convert.to_huggingface(
    run,
    out,
    mesh=micro.one_device(),
    dtype='float32',
    shard_gib=1.0,
    say=print,
  )
  config, variables = huggingface.load(out)
  assert huggingface.read_config(tmp_path / 'out')['model_type'] == 'qwen3'

  @jax.jit
  def logits(variables, tokens_BT):
    return transformer.Transformer(config).apply(
      variables, tokens_BT, method='logits'
    )

  tokens_BT = np.arange(64, dtype=np.int32).reshape(2, 32)
  np.testing.assert_array_equal(
    logits(variables, tokens_BT), logits(state.variables, tokens_BT)
  )
