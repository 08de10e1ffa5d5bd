"""Where a model comes from, and how it is asked."""

import dataclasses
import json

import pytest

from r1jax import config as config_lib
from r1jax.data import hf_tokenizer, tokenizer
from r1jax.model import config as model_config
from r1jax.recipe import origin
from tests.data import tiny_tokenizer
from tests.recipe import micro


def _workdir(path, **values) -> str:
  model = config_lib.to_dict(micro.model())
  path.mkdir()
  (path / 'config.json').write_text(json.dumps({'model': model} | values))
  return str(path)


def _load(folder):
  return hf_tokenizer.HfTokenizer.load(folder)


@pytest.mark.parametrize(
  ('values', 'expected'),
  [
    ({'template': 'r1_zero'}, 'r1_zero'),  # GRPO's.
    ({'data': {'template': 'llama3'}}, 'llama3'),  # SFT's.
    # Of pretraining on text, it is another thing of that name.
    ({'data': {'template': '{question}\n{answer}'}}, 'qwen3'),
    ({}, 'qwen3'),
  ],
)
def test_a_run_is_asked_as_it_was_trained(tmp_path, values, expected):
  folder = _workdir(tmp_path / 'run', **values)
  tok = _load(tiny_tokenizer.write_qwen(tmp_path / 'qwen'))
  assert origin.find_template(folder, micro.model(), tok) == expected


def test_our_tokenizer_asks_plainly(tmp_path):
  folder = _workdir(tmp_path / 'run')
  tok = tokenizer.default()
  assert origin.find_template(folder, micro.model(), tok) == 'plain'


def test_v3_2_has_the_tokens_of_r1_and_a_template_of_its_own(tmp_path):
  folder = _workdir(tmp_path / 'run')
  tok = _load(tiny_tokenizer.write_deepseek(tmp_path / 'deepseek'))
  dense = micro.model()
  assert origin.find_template(folder, dense, tok) == 'deepseek'
  indexer = model_config.IndexerConfig(num_heads=2, head_dim=16, top_k=4)
  attention = dataclasses.replace(
    dense.attention, q_lora_rank=16, indexer=indexer
  )
  sparse = dataclasses.replace(dense, attention=attention)
  assert origin.find_template(folder, sparse, tok) == 'deepseek_v3_1'


def test_a_tokenizer_of_no_template_is_refused(tmp_path):
  folder = _workdir(tmp_path / 'run')
  tok = hf_tokenizer.HfTokenizer(
    tiny_tokenizer.byte_level(['</s>']).to_str(), {'eos_token': '</s>'}
  )
  with pytest.raises(config_lib.UserError, match='name the template, one of'):
    origin.find_template(folder, micro.model(), tok)
