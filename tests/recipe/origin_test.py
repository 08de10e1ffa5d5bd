"""Where a model comes from, and how it is asked."""

import dataclasses
import json
from unittest import mock

import pytest

from r1jax import config as config_lib
from r1jax.data import hf_tokenizer, tokenizer
from r1jax.interop import export
from r1jax.model import config as model_config
from r1jax.recipe import grpo, origin, sft
from r1jax.recipe import stage as stage_lib
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


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
  """A Hugging Face folder whose tokenizer is Qwen3's, and some questions."""
  place = tmp_path_factory.mktemp('models')
  model = micro.model(mtp_depth=0, vocab_size=320, max_length=128)
  export.save(place / 'hf', model, micro.variables(model), dtype='float32')
  tiny_tokenizer.write_qwen(place / 'hf')
  rows = [{'question': f'{i}?', 'answer': str(i)} for i in range(16)]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (place / 'questions.jsonl').write_text(text)
  return place


def _run(run, config, workdir):
  """What the stage is given that a run ends in."""
  with (
    micro.on(micro.one_device()),
    mock.patch.object(stage_lib, 'run') as stage_run,
  ):
    run(config, str(workdir))
  return stage_run.call_args.args


def _grpo_config(place, **rollout):
  return config_lib.from_dict(
    grpo.GrpoConfig,
    micro.grpo_dict(
      str(place / 'hf'),
      template='auto',
      task={
        'paths': (str(place / 'questions.jsonl'),),
        'held_out_fraction': 0.2,
      },
      rollout=dataclasses.asdict(
        micro.rollout(
          **{'rule': 'boxed', 'max_prompt_tokens': 40, 'row_length': 64}
          | rollout
        )
      ),
    ),
  )


def test_grpo_asks_as_its_model_was_trained(foreign, tmp_path):
  stage, resolved = _run(grpo.run, _grpo_config(foreign), tmp_path / 'run')
  assert resolved['template'] == 'qwen3'
  assert stage.tokenizer == str(foreign / 'hf')
  assert stage.untrained == grpo.UNTRAINED


def test_questions_that_are_all_too_long_stop_grpo_at_once(foreign, tmp_path):
  config = _grpo_config(foreign, max_prompt_tokens=5)
  with pytest.raises(config_lib.UserError, match='max_prompt_tokens=5 must be'):
    _run(grpo.run, config, tmp_path / 'run')


def test_finetuning_asks_as_its_model_was_trained(foreign, tmp_path):
  config = config_lib.from_dict(
    sft.SftConfig,
    {
      **{'seed': 0, 'model': None, 'tokenizer': ''},
      'init_from': str(foreign / 'hf'),
      'data': {
        'paths': (str(foreign / 'questions.jsonl'),),
        'template': 'auto',
        'held_out_fraction': 0.0,
      },
      **{'row_length': 64, 'batch_size': 2},
      'optim': micro.pretrain_dict()['optim'],
      'train': micro.pretrain_dict()['train'],
      'mesh': {'data': -1, 'fsdp': 1},
    },
  )
  stage, resolved = _run(sft.run, config, tmp_path / 'run')
  assert resolved['data']['template'] == 'qwen3'
  assert stage.untrained == ('mtp_',)


def test_a_run_that_began_needs_its_source_no_more(tmp_path):
  run = _workdir(tmp_path / 'run', init_from='hf', tokenizer='tokenizer')
  assert origin.find_source('hf', str(tmp_path / 'new')) == 'hf'
  assert origin.find_source('hf', run) == 'hf'  # Killed before it had one.
  (tmp_path / 'run' / 'tokenizer').mkdir()
  assert origin.find_source('hf', run) == run
  assert origin.find_source('another', run) == 'another'
