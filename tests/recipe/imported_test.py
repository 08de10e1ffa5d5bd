"""Models of other tools go through every stage with their own tokenizers."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from configs import sparse_attention
from r1jax import config as config_lib
from r1jax.data import tokenizer
from r1jax.interop import export, huggingface
from r1jax.model import config as model_config
from r1jax.recipe import convert, evaluation, grpo, origin, pretrain, sft
from r1jax.train import metrics
from tests.model import tiny
from tests.recipe import foreign, micro


def _questions(path) -> str:
  rows = [
    {'question': f'What is {i}+{i}?', 'answer': f'{i}+{i}\n#### {2 * i}'}
    for i in range(40)
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def _task(tmp_path):
  return {
    'paths': (_questions(tmp_path / 'questions.jsonl'),),
    'gold': '#### (.+)',
    'held_out_fraction': 0.3,
  }


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['deepseek', 'qwen3'])
def test_grpo_runs_on_an_imported_model_and_it_is_exported(tmp_path, kind):
  folder = foreign.write(tmp_path / 'hf', kind)
  rollout = dataclasses.asdict(
    micro.rollout(rule='boxed', max_prompt_tokens=40, row_length=64)
  )
  values = micro.grpo_dict(
    folder,
    task=_task(tmp_path),
    template=kind,
    rollout=rollout,
    eval_problems=8,
  )
  config = config_lib.from_dict(grpo.GrpoConfig, values)
  run = tmp_path / 'run'
  with micro.on(micro.one_device()):
    state = grpo.run(config, str(run))
  assert int(state.step) == 3
  rows = list(metrics.read(run))
  assert all(np.isfinite(row.get('train/loss', 0.0)) for row in rows)
  # Sampler and trainer are one model, whatever the family.
  gaps = [row['rl/gap_max'] for row in rows if 'rl/gap_max' in row]
  assert gaps and max(gaps) < 1e-4
  assert any('eval/greedy' in row for row in rows)
  sample = json.loads((run / 'samples.jsonl').read_text().splitlines()[0])
  assert 'What is' in sample['prompt']

  out = tmp_path / 'out'
  convert.to_huggingface(
    str(run),
    str(out),
    mesh=micro.one_device(),
    dtype='float32',
    shard_gib=1.0,
    say=print,
  )
  loaded, variables = huggingface.load(out)
  assert loaded == huggingface.load_config(folder)
  final = np.asarray(state.variables['params']['norm']['scale'])
  np.testing.assert_array_equal(variables['params']['norm']['scale'], final)
  assert (out / 'tokenizer.json').exists()


@pytest.mark.slow
def test_an_imported_model_is_evaluated_with_its_template(tmp_path):
  folder = foreign.write(tmp_path / 'hf', 'qwen3')
  workdir = tmp_path / 'evaluated'
  before = sorted(os.listdir(folder))
  config = config_lib.from_dict(
    evaluation.EvaluateConfig,
    {
      'init_from': folder,
      'seed': 0,
      'tokenizer': '',
      'task': _task(tmp_path),
      'template': 'auto',
      'rule': 'boxed',
      'num_problems': 8,
      'num_samples': 2,
      'max_prompt_tokens': 40,
      'max_new_tokens': 8,
      'sampling': {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0},
      'batch_size': 8,
      'mesh': {'data': -1, 'fsdp': 1},
    },
  )
  with micro.on(micro.one_device()):
    summary = evaluation.run(config, str(workdir), print)
  assert summary['num_problems'] == 8 and summary['greedy'] == 0.0
  assert sorted(os.listdir(folder)) == before
  line = (workdir / 'completions.jsonl').read_text().splitlines()[0]
  assert json.loads(line)['prompt'].startswith('<|im_start|>user\nWhat is')


def _sparse_config(stage, init_from, num_steps) -> pretrain.PretrainConfig:
  """configs/sparse_attention.py's, but for model, data and duration."""
  values = sparse_attention.get_config(stage).to_dict()
  optim = values['optim']
  is_dense = values['model']['attention']['indexer']['dense']
  model = _sparse_model()
  model = dataclasses.replace(
    model,
    attention=dataclasses.replace(
      model.attention,
      indexer=model_config.IndexerConfig(8, 16, top_k=8, dense=is_dense),
    ),
  )
  changed = micro.pretrain_dict(
    model=config_lib.to_dict(model),
    optim=optim,
    init_from=init_from,
    mtp_coef=values['mtp_coef'],
    train=values['train'] | {'num_steps': num_steps, 'eval_every': 0},
  )
  return config_lib.from_dict(pretrain.PretrainConfig, changed)


def _sparse_model() -> model_config.ModelConfig:
  attention = dataclasses.replace(micro.model().attention, q_lora_rank=16)
  return micro.model(attention=attention)


@pytest.mark.slow
def test_sparse_attention_is_taught_to_a_v3_without(tmp_path, capfd):
  folder, model = str(tmp_path / 'hf'), _sparse_model()
  export.save(folder, model, micro.variables(model), dtype='float32')
  warm, sparse = str(tmp_path / 'warm_up'), str(tmp_path / 'sparse')
  config = _sparse_config('warm_up', folder, 30)
  with micro.on(micro.one_device()):
    first = pretrain.run(config, warm)
    said = ''.join(capfd.readouterr())
    assert said.count('config.json has no indexer; it begins with random') == 1
    second = pretrain.run(_sparse_config('sparse', warm, 2), sparse)
  # The warm-up learns what attention does, and touches nothing but indexers.
  rows = list(metrics.read(tmp_path / 'warm_up'))
  gaps = [r['indexer/divergence'] for r in rows if 'indexer/divergence' in r]
  assert len(gaps) == 30 and gaps[-1] < 0.9 * gaps[0]
  _, before = huggingface.load(folder)
  flat = lambda tree: {
    jax.tree_util.keystr(path): np.asarray(x)
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
  }
  before, after = flat(before), flat(first.variables)
  last = flat(second.variables)
  learnt = {name for name in after if 'indexer' in name}
  assert len(learnt) == 3 * 5  # Two stacks and the MTP module.
  assert before.keys() == after.keys() - learnt
  for name in before:
    np.testing.assert_array_equal(after[name], before[name], err_msg=name)
  # Then everything learns that has a gradient.
  changed = {n for n in after if not np.array_equal(after[n], last[n])}
  assert changed == {n for n in after if n.startswith("['params']")}
  # And it goes out as a V3.2.
  convert.to_huggingface(
    sparse,
    str(tmp_path / 'out'),
    mesh=micro.one_device(),
    dtype='bfloat16',
    shard_gib=1.0,
    say=print,
  )
  loaded = huggingface.load_config(tmp_path / 'out')
  assert loaded.attention.indexer.top_k == 8


def _sft_config(tmp_path, num_steps, **changes) -> sft.SftConfig:
  values = {
    'seed': 0,
    'init_from': '',
    'model': config_lib.to_dict(
      dataclasses.replace(
        foreign.model('qwen3'), vocab_size=tokenizer.default().vocab_size
      )
    ),
    'data': {
      'paths': (_questions(tmp_path / 'questions.jsonl'),),
      'template': 'plain',
      'held_out_fraction': 0.2,
    },
    'tokenizer': '',
    'row_length': 64,
    'batch_size': 8,
    'optim': micro.pretrain_dict()['optim'],
    'train': micro.pretrain_dict()['train'] | {'num_steps': num_steps},
    'mesh': {'data': -1, 'fsdp': 1},
  }
  for name, value in changes.items():
    place, _, key = name.rpartition('__')
    (values[place] if place else values)[key] = value
  return config_lib.from_dict(sft.SftConfig, values)


@pytest.mark.slow
def test_sft_learns_resumes_and_is_exported(tmp_path):
  run = tmp_path / 'run'
  with micro.on(micro.one_device()):
    sft.run(_sft_config(tmp_path, 10), str(run))
    shutil.copytree(run, tmp_path / 'half')
    state = sft.run(_sft_config(tmp_path, 30), str(run))
    again = sft.run(_sft_config(tmp_path, 30), str(tmp_path / 'half'))
  losses = [r['train/loss'] for r in metrics.read(run) if 'train/loss' in r]
  assert len(losses) == 30 and np.mean(losses[-5:]) < 0.7 * losses[0]
  assert any('eval/loss' in row for row in metrics.read(run))
  same = np.testing.assert_array_equal
  same(
    state.variables['params']['embedding'],
    again.variables['params']['embedding'],
  )
  convert.to_huggingface(
    str(run),
    str(tmp_path / 'out'),
    mesh=micro.one_device(),
    dtype='bfloat16',
    shard_gib=1.0,
    say=print,
  )
  loaded, _ = huggingface.load(tmp_path / 'out')
  assert loaded.attention == foreign.model('qwen3').attention
  # It can be trained on: the tokenizer that ships went with it.
  config = _sft_config(tmp_path, 3, init_from=str(tmp_path / 'out'), model=None)
  with micro.on(micro.one_device()):
    sizes = sft.run(config, str(tmp_path / 'more'), dry_run=True)
  assert sizes['rows x tokens'] == '8x64'


def test_sft_without_held_out_conversations_evaluates_nothing(tmp_path):
  config = _sft_config(tmp_path, 2, data__held_out_fraction=0.0)
  with micro.on(micro.one_device()):
    state = sft.run(config, str(tmp_path / 'run'))
  assert int(state.step) == 2
  rows = list(metrics.read(tmp_path / 'run'))
  assert rows and not any(key.startswith('eval/') for r in rows for key in r)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'init_from': 'x'}, "init_from='x' with model=….*give one of them"),
    ({'model': None}, "init_from='' with model=None"),
    ({'row_length': 256}, 'row_length = 256 tokens exceeds model.max_length'),
    ({'batch_size': 12}, 'batch_size=12'),
    ({'data__system': 'Be brief.'}, "data: system='Be brief.' must be empty"),
    (
      {'data__held_out_fraction': 1e-6},
      'the held_out split is empty: held_out_fraction=1e-06 holds out none of '
      r'the 40 conversations of .*, it must be at least 0\.\d+, or 0 for no',
    ),
  ],
)
def test_what_sft_cannot_do_is_said(tmp_path, changes, message):
  with pytest.raises(config_lib.UserError, match=message):
    config = _sft_config(tmp_path, 3, **changes)
    sft.run(config, str(tmp_path / 'none'))
  assert not (tmp_path / 'none').exists()


def test_a_conversation_that_the_template_cannot_hold_is_named(tmp_path):
  path = tmp_path / 'chats.jsonl'
  turns = [{'role': role, 'content': 'x'} for role in ('user', 'assistant')]
  records = [{'messages': turns}, {'messages': turns * 2}]
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  config = _sft_config(
    tmp_path, 3, data__paths=(str(path),), data__messages='messages'
  )
  with pytest.raises(
    config_lib.UserError,
    match=f"{path}:2: template='plain' holds one question, the roles user, as",
  ):
    sft.run(config, str(tmp_path / 'none'))
  assert not (tmp_path / 'none').exists()


def test_logits_of_a_folder_are_checked(tmp_path):
  folder = str(tiny_folder(tmp_path))
  reference = tmp_path / 'io.npz'
  tokens_BT = np.zeros((1, 4), np.int64)
  logits_BTV = np.zeros((1, 4, tiny.V), np.float32)
  np.savez(reference, input_ids=tokens_BT, logits=logits_BTV)
  mesh = micro.one_device()
  check = convert.check_logits(folder, str(reference), mesh=mesh)
  assert check.largest > 1e-3 and check.num_tokens == 4 and check.mean_kl > 0

  for arrays, message in (
    ({'input_ids': tokens_BT}, 'io.npz lacks an array: .*logits'),
    (
      {'input_ids': tokens_BT, 'logits': logits_BTV[..., :3]},
      r'logits \[1, 4, 3\] must be input_ids \[1, 4\] with the 64 tokens',
    ),
    (
      {'input_ids': tokens_BT - 1, 'logits': logits_BTV},
      'input_ids from -1 to -1 must lie between 0 and 63',
    ),
  ):
    np.savez(reference, **arrays)
    with pytest.raises(config_lib.UserError, match=message):
      convert.check_logits(folder, str(reference), mesh=mesh)


def tiny_folder(tmp_path):
  config = tiny.config(num_layers=1, num_dense_layers=1, moe=None)
  folder = tmp_path / 'tiny'
  attention = model_config.GqaConfig(
    num_heads=2, num_kv_heads=1, head_dim=8, rope=config.attention.rope
  )
  rope = dataclasses.replace(config.attention.rope, interleaved=False)
  attention = dataclasses.replace(attention, rope=rope)
  config = dataclasses.replace(config, attention=attention)
  export.save(folder, config, tiny.variables(config), dtype='float32')
  return folder


def test_a_workdir_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
  folder = str(tiny_folder(tmp_path))
  mesh = micro.one_device()
  make = lambda workdir: convert.to_workdir(
    folder, str(workdir), mesh=mesh, param_dtype='float32', say=print
  )

  def fail(*args):
    raise OSError('disk full')

  with monkeypatch.context() as patch:
    patch.setattr(convert.tokenizer_files, 'copy', fail)
    with pytest.raises(OSError, match='disk full'):
      make(tmp_path / 'run')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['tiny']
  make(tmp_path / 'run')
  model = origin.load_model_config(str(tmp_path / 'run'))
  assert model == origin.load_model_config(folder)
  with pytest.raises(config_lib.UserError, match='exists and is not empty'):
    make(tmp_path / 'run')
