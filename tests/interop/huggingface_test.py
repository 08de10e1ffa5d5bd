"""Checkpoints of Hugging Face: in, out, and every way to be wrong."""

import dataclasses
import functools
import gzip
import json
import math
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.interop import export, fp8, hf_config, huggingface, safetensors
from r1jax.interop import mapping as mapping_lib
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import sharding
from r1jax.recipe import convert
from tests import known_answers
from tests.model import tiny
from tests.model.families_test import MODELS

_FOLDER = known_answers.DATA / 'hf_models'


def _leaves(tree):
  """(path, numpy) of each leaf."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(p): np.asarray(x) for p, x in flat}


def _assert_same(a, b):
  a, b = _leaves(a), _leaves(b)
  assert a.keys() == b.keys()
  for name, x in a.items():
    assert x.dtype == b[name].dtype, name
    assert x.tobytes() == b[name].tobytes(), name


def _read_all(folder):
  with safetensors.closing(folder) as reader:
    return {name: reader.read(name) for name in reader.entries}


# ---- Identity -------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', MODELS)
def test_export_and_import_are_the_identity(tmp_path, name, dtype):
  config, variables = huggingface.load(_FOLDER / name, param_dtype=dtype)
  out = tmp_path / 'out'
  export.save(out, config, variables, dtype=dtype, shard_bytes=20_000)
  assert (out / safetensors.INDEX).exists()
  again, same = huggingface.load(out, param_dtype=dtype)
  assert again == config
  _assert_same(same, variables)
  if dtype == 'float32':  # Name for name, as transformers wrote it.
    theirs, ours = _read_all(_FOLDER / name), _read_all(out)
    assert theirs.keys() == ours.keys()
    for tensor, numbers in theirs.items():
      assert numbers.tobytes() == ours[tensor].tobytes(), tensor


def test_mtp_is_written_with_its_copies_and_read_back(tmp_path):
  config = tiny.config(mtp_depth=2)
  variables = tiny.variables(config)
  export.save(tmp_path / 'a', config, variables, dtype='float32')
  tensors = _read_all(tmp_path / 'a')
  for layer in (3, 4):
    for copy, name in (
      ('shared_head.head', 'lm_head'),
      ('embed_tokens', 'model.embed_tokens'),
    ):
      np.testing.assert_array_equal(
        tensors[f'model.layers.{layer}.{copy}.weight'],
        tensors[f'{name}.weight'],
      )
  again, same = huggingface.load(tmp_path / 'a')
  assert again.mtp_depth == 2
  _assert_same(same, variables)
  without, rest = huggingface.load(tmp_path / 'a', mtp_depth=0)
  assert without.mtp_depth == 0 and 'mtp_1' not in rest['params']


def test_files_without_the_promised_mtp_are_loaded_and_it_is_said(tmp_path):
  config = tiny.config()
  export.save(
    tmp_path / 'a',
    config,
    tiny.variables(config),
    extra={'num_nextn_predict_layers': 1},
  )
  said = []
  loaded, _ = huggingface.load(tmp_path / 'a', say=said.append)
  assert loaded.mtp_depth == 0
  assert 'config.json has 1 MTP modules, the files have none' in said[0]


def _has(layer):
  return (
    rf'has the tensor model\.layers\.{layer}\.\S+, which the model does not'
  )


@pytest.mark.parametrize('name', MODELS)
def test_a_layer_that_config_json_does_not_know_is_refused(tmp_path, name):
  folder = tmp_path / 'a'
  shutil.copytree(_FOLDER / name, folder)
  values = json.loads((folder / 'config.json').read_text())
  last = values['num_hidden_layers'] - 1
  changes = {'num_hidden_layers': last}
  for key in ('layer_types', 'mlp_layer_types'):
    if values.get(key):
      changes[key] = values[key][:last]
  _change_config(**changes)(folder)
  with pytest.raises(config_lib.UserError, match=_has(last)):
    huggingface.load(folder)
  if name == 'deepseek_v3':  # Nor is the layer taken for an MTP module.
    _change_config(num_nextn_predict_layers=1)(folder)
    with pytest.raises(config_lib.UserError, match=_has(last)):
      huggingface.load(folder)


@pytest.mark.parametrize(
  ('mtp_depth', 'message'),
  [(1, 'lacks the tensor model.layers.2.eh_proj.weight'), (0, _has(2))],
)
def test_a_layer_before_mtp_is_not_passed_over(tmp_path, mtp_depth, message):
  config, variables = _small()
  export.save(tmp_path / 'a', config, variables)
  _change_config(num_hidden_layers=2)(tmp_path / 'a')
  with pytest.raises(config_lib.UserError, match=message):
    huggingface.load(tmp_path / 'a', mtp_depth=mtp_depth)


@pytest.mark.parametrize('mtp_depth', [0, 1])
def test_a_tensor_far_behind_is_no_mtp(tmp_path, mtp_depth):
  config, variables = _small()
  export.save(tmp_path / 'a', config, variables)
  huggingface.load(tmp_path / 'a', mtp_depth=mtp_depth)
  _set('model.layers.9.junk.weight', np.zeros(3, np.float32))(tmp_path / 'a')
  with pytest.raises(config_lib.UserError, match=_has(9)):
    huggingface.load(tmp_path / 'a', mtp_depth=mtp_depth)


def test_unrolled_layers_are_the_stack_cut_up(tmp_path):
  config, variables = huggingface.load(_FOLDER / 'deepseek_v3')
  flat, unrolled = huggingface.load(_FOLDER / 'deepseek_v3', scan_layers=False)
  assert not flat.scan_layers
  _assert_same(unrolled, transformer.unstack_layers(variables, config))


# ---- FP8 ------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 8 x 8 and 6 x 8, so that a tiny model has many, some ragged."""
  monkeypatch.setattr(fp8, 'DEFAULT_BLOCKS', (6, 8))


def test_fp8_keeps_every_byte_of_numbers_and_scales(tmp_path, small_blocks):
  config = tiny.config(mtp_depth=1)
  variables = tiny.variables(config)
  export.save(tmp_path / 'a', config, variables, dtype='fp8')
  again, kept = huggingface.load(
    tmp_path / 'a', keep_fp8=True, param_dtype='bfloat16'
  )
  is_kept = fp8.is_quantized
  assert any(map(is_kept, jax.tree.leaves(kept, is_leaf=is_kept)))
  export.save(tmp_path / 'b', again, kept, dtype='bfloat16')
  first, second = _read_all(tmp_path / 'a'), _read_all(tmp_path / 'b')
  assert first.keys() == second.keys()
  for name, numbers in first.items():
    assert numbers.dtype == second[name].dtype, name
    assert numbers.tobytes() == second[name].tobytes(), name
  quantised = {n for n in first if first[n].dtype == fp8.E4M3}
  assert {n for n in first if n.endswith('_scale_inv')} == {
    n + '_scale_inv' for n in quantised
  }
  left = {n.split('.')[-2] for n in first if n.endswith('weight')} - {
    n.split('.')[-2] for n in quantised
  }
  assert left == {
    *('embed_tokens', 'lm_head', 'head', 'gate', 'eh_proj', 'norm'),
    *('input_layernorm', 'post_attention_layernorm', 'enorm', 'hnorm'),
    *('q_a_layernorm', 'kv_a_layernorm'),
  }


def test_fp8_is_dequantised_block_by_block(tmp_path, small_blocks):
  config = tiny.config()
  variables = tiny.variables(config)
  export.save(tmp_path / 'a', config, variables, dtype='fp8')
  loaded, dense = huggingface.load(tmp_path / 'a')
  tensors = _read_all(tmp_path / 'a')

  def by_hand(name):
    q, scale = tensors[name], tensors[f'{name}_scale_inv']
    wide = np.repeat(np.repeat(scale, 6, 0), 8, 1)
    return q.astype(np.float32) * wide[: q.shape[0], : q.shape[1]]

  a = loaded.attention
  attention = dense['params']['moe']['attention']
  at = 'model.layers.2.self_attn'
  kv_up = by_hand(f'{at}.kv_b_proj.weight').T.reshape(
    a.kv_lora_rank, a.num_heads, -1
  )
  N = a.nope_head_dim
  np.testing.assert_array_equal(attention['k_up'][1], kv_up[..., :N])
  np.testing.assert_array_equal(attention['v_up'][1], kv_up[..., N:])
  out = by_hand(f'{at}.o_proj.weight').reshape(attention['out'][1].shape)
  np.testing.assert_array_equal(attention['out'][1], out)
  expert = by_hand('model.layers.1.mlp.experts.5.down_proj.weight').T
  np.testing.assert_array_equal(
    dense['params']['moe']['moe']['down'][0, 5], expert
  )


def _fp8_folder(path, change=lambda tensors: None, config=None):
  """A tiny checkpoint in FP8 whose tensors are changed."""
  config = config or tiny.config()
  export.save(path, config, tiny.variables(config), dtype='fp8')
  _change_tensors(change)(path)
  return path


def _there_and_back(folder, tmp_path):
  """All tensors of a folder, and of what is written of it as it is."""
  _convert(folder, tmp_path / 'back')
  return _read_all(folder), _read_all(tmp_path / 'back')


def _convert(source, target):
  convert.to_huggingface(
    str(source),
    str(target),
    mesh=mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1]),
    dtype='fp8',
    shard_gib=1.0,
    say=print,
  )


def _assert_bytes(first, second):
  assert first.keys() == second.keys()
  for name, numbers in first.items():
    assert numbers.dtype == second[name].dtype, name
    assert numbers.tobytes() == second[name].tobytes(), name


def _power_scales(tensors):
  for name in [n for n in tensors if n.endswith(fp8.SCALE)]:
    power = np.exp2(np.round(np.log2(tensors[name])))
    tensors[name] = power.astype(safetensors.DTYPES['F8_E8M0'])


def _other_numbers(tensors):
  """Any FP8 number that is one, and blocks that nothing fills to 448."""
  rng = np.random.default_rng(0)
  for name in [n for n in tensors if tensors[n].dtype == fp8.E4M3]:
    raw = rng.integers(0, 256, tensors[name].shape).astype(np.uint8)
    raw[raw & 0x7F == 0x7F] = 0x80
    tensors[name] = raw.view(fp8.E4M3)


@pytest.mark.parametrize(
  'change', [lambda tensors: None, _power_scales, _other_numbers]
)
def test_blocks_of_128_with_ragged_edges_keep_their_bytes(tmp_path, change):
  base = tiny.config(mtp_depth=1)
  attention = dataclasses.replace(
    base.attention, num_heads=3, q_lora_rank=136, kv_lora_rank=130
  )
  moe = dataclasses.replace(base.moe, expert_dim=136)
  config = dataclasses.replace(
    base, embed_dim=200, dense_dim=270, attention=attention, moe=moe
  )
  first, second = _there_and_back(
    _fp8_folder(tmp_path / 'a', change, config), tmp_path
  )
  _assert_bytes(first, second)
  sizes = {n: x.shape for n, x in first.items() if n.endswith(fp8.SCALE)}
  assert {(2, 2), (3, 2), (2, 3)} <= set(sizes.values())
  assert any(n.startswith('model.layers.3.') for n in sizes)


def test_what_is_not_fp8_keeps_its_dtype(tmp_path, small_blocks):
  def change(tensors):
    rng = np.random.default_rng(0)
    for name, x in tensors.items():
      if x.dtype == ml_dtypes.bfloat16 and 'norm' in name:
        tensors[name] = rng.normal(size=x.shape).astype(np.float32)
      if name.endswith('mlp.gate.weight'):
        tensors[name] = x.astype(np.float16)
      if name.endswith('correction_bias'):
        tensors[name] = x.astype(ml_dtypes.bfloat16)

  config = tiny.config(mtp_depth=1)
  folder = _fp8_folder(tmp_path / 'a', change, config)
  first, second = _there_and_back(folder, tmp_path)
  assert {str(x.dtype) for x in first.values()} == {
    *('float8_e4m3fn', 'bfloat16', 'float16', 'float32')
  }
  _assert_bytes(first, second)


def test_scales_that_are_powers_of_two_stay_so(tmp_path, small_blocks):
  folder = _fp8_folder(tmp_path / 'a', _power_scales)
  quantised = json.loads((folder / 'config.json').read_text())
  quantised = quantised['quantization_config'] | {'scale_fmt': 'ue8m0'}
  _change_config(quantization_config=quantised)(folder)
  first, second = _there_and_back(folder, tmp_path)
  _assert_bytes(first, second)
  values = json.loads((tmp_path / 'back' / 'config.json').read_text())
  assert values['quantization_config'] == quantised
  # Dequantised they are numbers like others.
  _, dense = huggingface.load(folder)
  at = 'model.layers.1.mlp.experts.5.down_proj.weight'
  scale = first[at + fp8.SCALE].astype(np.float32)
  wide = np.repeat(np.repeat(scale, 6, 0), 8, 1)
  by_hand = (
    first[at].astype(np.float32)
    * wide[: first[at].shape[0]][:, : first[at].shape[1]]
  )
  np.testing.assert_array_equal(
    dense['params']['moe']['moe']['down'][0, 5], by_hand.T
  )


def test_what_is_not_fp8_in_one_layer_stays_so(tmp_path, small_blocks):
  def change(tensors):
    for name in (
      'model.layers.2.self_attn.kv_b_proj.weight',
      'model.layers.1.self_attn.o_proj.weight',
    ):
      del tensors[name + fp8.SCALE]
      tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

  first, second = _there_and_back(_fp8_folder(tmp_path / 'a', change), tmp_path)
  _assert_bytes(first, second)


def test_experts_of_two_kinds_are_not_kept(tmp_path, small_blocks):
  name = 'model.layers.1.mlp.experts.3.up_proj.weight'

  def change(tensors):
    del tensors[name + fp8.SCALE]
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

  folder = _fp8_folder(tmp_path / 'a', change)
  with pytest.raises(config_lib.UserError, match=f'{name} is bfloat16: FP8 is'):
    _convert(folder, tmp_path / 'b')
  huggingface.load(folder)  # Dequantised, they are all alike.


# ---- What may be left out -------------------------------------------------


def test_a_tied_head_may_stand_in_the_files(tmp_path):
  config = tiny.config(tie_embeddings=True)
  variables = tiny.variables(config)
  export.save(tmp_path / 'a', config, variables, dtype='float32')
  assert 'lm_head.weight' not in _read_all(tmp_path / 'a')
  embedding = np.asarray(variables['params']['embedding'])
  _set('lm_head.weight', embedding)(tmp_path / 'a')
  _assert_same(huggingface.load(tmp_path / 'a')[1], variables)
  _set('lm_head.weight', embedding + 1)(tmp_path / 'a')
  with pytest.raises(config_lib.UserError, match='lm_head.weight is not equal'):
    huggingface.load(tmp_path / 'a')


def test_no_shared_experts_are_written_as_tensors_without_numbers(tmp_path):
  config = tiny.config()
  config = dataclasses.replace(
    config, moe=dataclasses.replace(config.moe, num_shared=0)
  )
  variables = tiny.variables(config)
  export.save(tmp_path / 'a', config, variables, dtype='float32')
  name = 'model.layers.1.mlp.shared_experts.gate_proj.weight'
  assert _read_all(tmp_path / 'a')[name].shape == (0, config.embed_dim)
  again, loaded = huggingface.load(tmp_path / 'a')
  assert again.moe.num_shared == 0
  _assert_same(loaded, variables)
  _drop(name)(tmp_path / 'a')
  _assert_same(huggingface.load(tmp_path / 'a')[1], variables)


# ---- An indexer for a model without ----------------------------------------

# As DeepSeek-V3.1's weights begin the warm-up of V3.2's sparse attention.
_INDEXER = model_config.IndexerConfig(
  num_heads=4, head_dim=16, top_k=4, dense=True
)


def _with_indexer(config, indexer=_INDEXER):
  attention = dataclasses.replace(config.attention, indexer=indexer)
  return dataclasses.replace(config, attention=attention)


def _drawn(mesh=None, folder=_FOLDER / 'deepseek_v3'):
  """The model with indexers, its variables and what was said."""
  said = []
  config = _with_indexer(huggingface.load_config(folder))
  variables = huggingface.load_variables(
    folder, config, mesh=mesh, say=said.append
  )
  return config, variables, said


def test_an_indexer_that_no_checkpoint_has_is_drawn_and_it_is_said():
  config, variables, said = _drawn()
  folder = _FOLDER / 'deepseek_v3'
  assert said == [
    f'{folder}: config.json has no indexer; it begins with random weights'
  ]
  boxed = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(variables) == shapes(sharding.unbox(boxed))
  _, plain = huggingface.load(folder)
  there, drawn = _leaves(plain), {}
  for name, x in _leaves(variables).items():
    if 'indexer' in name:
      drawn[name] = x
    else:
      assert x.tobytes() == there.pop(name).tobytes(), name
  assert not there and len(drawn) == 2 * 5  # Two stacks.
  for name, x in drawn.items():
    if 'key_norm' in name:
      np.testing.assert_array_equal(x, float('scale' in name))
      continue
    # 128 to 3,072 numbers: the spread of each is known to a fifth.
    assert np.std(x) == pytest.approx(config.init_std, rel=0.2), name
    assert abs(np.mean(x)) < 0.3 * config.init_std, name
  both = drawn["['params']['moe']['attention']['indexer']['q_up']"]
  assert not np.array_equal(both[0], both[1])


def test_a_warm_up_begins_with_the_models_own_logits():
  config, variables, _ = _drawn()
  io = np.load(_FOLDER / 'deepseek_v3' / 'io.npz')

  @jax.jit
  def logits(variables, tokens_BT):
    with jax.default_matmul_precision('highest'):
      return transformer.Transformer(config).apply(
        variables, tokens_BT, method='logits'
      )

  logits_BTV = logits(variables, io['input_ids'].astype(np.int32))
  np.testing.assert_allclose(logits_BTV, io['logits'], rtol=0, atol=2e-5)


def test_a_drawn_indexer_is_the_same_on_any_mesh():
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, fsdp=4))
  _, sharded, _ = _drawn(mesh)
  key = sharded['params']['moe']['attention']['indexer']['key']
  assert not key.is_fully_replicated
  _assert_same(sharded, _drawn()[1])


def test_an_indexer_that_config_json_has_must_be_in_the_files(tmp_path):
  source = _FOLDER / 'deepseek_v32'
  name = 'model.layers.1.self_attn.indexer.wq_b.weight'
  shutil.copytree(source, tmp_path / 'a')
  said = []
  huggingface.load(tmp_path / 'a', say=said.append)
  assert not said
  _drop(name)(tmp_path / 'a')
  with pytest.raises(config_lib.UserError, match=f'lacks the tensor {name}'):
    huggingface.load(tmp_path / 'a')


# ---- Shards ---------------------------------------------------------------


def test_variables_land_sharded_on_the_mesh():
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, fsdp=4))
  _, sharded = huggingface.load(_FOLDER / 'deepseek_v3', mesh=mesh)
  config, plain = huggingface.load(_FOLDER / 'deepseek_v3')
  _assert_same(sharded, plain)
  boxed = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  wanted = sharding.tree_shardings(mesh, boxed)
  jax.tree.map(
    lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or 1 / 0,
    sharded,
    wanted,
  )
  gate = sharded['params']['moe']['moe']['gate']
  assert gate.addressable_shards[0].data.shape[2] == gate.shape[2] // 4


def test_a_shard_costs_its_own_bytes():
  config, plain = huggingface.load(_FOLDER / 'deepseek_v3')
  leaf = next(
    leaf
    for leaf in mapping_lib.make_mapping(config).leaves
    if leaf.path[-2:] == ('moe', 'gate')
  )
  with safetensors.closing(_FOLDER / 'deepseek_v3') as reader:
    loader = huggingface._Loader(
      reader, (128, 128), np.dtype(np.float32), keep_fp8=False
    )
    index = slice(1, 2), slice(2, 4), slice(0, 8), slice(0, 16)
    out = np.empty((1, 2, 8, 16), np.float32)
    loader._read_box(leaf, index, out)
    assert reader.bytes_read == out.nbytes
  np.testing.assert_array_equal(
    out, plain['params']['moe']['moe']['gate'][index]
  )


def test_large_tensors_are_read_in_chunks(monkeypatch):
  _, plain = huggingface.load(_FOLDER / 'qwen2')
  monkeypatch.setattr(huggingface, '_CHUNK', 50)
  _, chunked = huggingface.load(_FOLDER / 'qwen2')
  _assert_same(chunked, plain)


# ---- The real R1 ----------------------------------------------------------


def _r1_entries():
  rows = json.loads(
    (known_answers.DATA / 'deepseek_r1_tensors.json').read_text()
  )
  entries = {}
  for row in rows:
    first, last = row.get('layers', (0, 0))
    least, most = row.get('experts', (0, 0))
    for layer in range(first, last + 1):
      for expert in range(least, most + 1):
        name = row['name'].format(layer=layer, expert=expert)
        entries[name] = safetensors.Entry(
          file=pathlib.Path('model.safetensors'),
          dtype=safetensors.DTYPES[row['dtype']],
          shape=tuple(row['shape']),
          start=0,
        )
  return entries


def test_the_list_of_r1_is_the_released_one(shared_data):
  path = shared_data / 'deepseek_r1_checkpoint' / 'tensors.json.gz'
  if not path.exists():
    pytest.skip(f'no {path}')
  with gzip.open(path, 'rt') as f:
    released = json.load(f)
  ours = {
    name: (entry.dtype, entry.shape) for name, entry in _r1_entries().items()
  }
  assert ours == {
    name: (safetensors.DTYPES[x['dtype']], tuple(x['shape']))
    for name, x in released.items()
  }


def test_the_released_r1_is_the_671b_config_tensor_for_tensor():
  values = json.loads(
    (known_answers.DATA / 'deepseek_r1_config.json').read_text()
  )
  config = hf_config.read(values)
  from configs.model import deepseek_v3_671b

  ours = config_lib.from_dict(
    model_config.ModelConfig, deepseek_v3_671b.get_config().to_dict()
  )
  choices = {f: getattr(ours, f) for f in ('init_std', 'dtype', 'remat')}
  moe = dataclasses.replace(
    config.moe, implementation=ours.moe.implementation, block=ours.moe.block
  )
  assert dataclasses.replace(config, moe=moe, **choices) == ours

  entries = _r1_entries()
  assert len(entries) == 91_991
  mapping = mapping_lib.make_mapping(config)
  huggingface.check(
    mapping, entries, (128, 128), pathlib.Path('r1'), config.num_layers
  )
  used = [s.name for leaf in mapping.leaves for s in leaf.sources.values()]
  # k_up and v_up share a tensor; everything else is used once.
  twice = {name for name in used if 'kv_b_proj' in name}
  assert len(used) == len(set(used)) + len(twice)
  scales = sum(name.endswith('_scale_inv') for name in entries)
  assert len(mapping.names()) + scales == 91_991

  shapes = sharding.unbox(
    jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  )
  flat, _ = jax.tree_util.tree_flatten_with_path(shapes)
  tree = {tuple(k.key for k in path): x.shape for path, x in flat}
  assert {leaf.path: leaf.shape for leaf in mapping.leaves} == tree
  assert sum(map(math.prod, tree.values())) > 671_026_419_200


# ---- Mistakes -------------------------------------------------------------


@functools.cache
def _small():
  config = tiny.config(mtp_depth=1)
  return config, tiny.variables(config)


def _change_config(**changes):
  def change(folder):
    path = folder / 'config.json'
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))

  return change


def _change_tensors(change):
  """Writes the tensors again after `change` of their dict."""

  def rewrite(folder):
    tensors = _read_all(folder)
    change(tensors)
    planned = [
      safetensors.Planned(name, x.dtype, x.shape) for name, x in tensors.items()
    ]
    files = safetensors.plan_files(planned, 1 << 30)
    safetensors.Writer(folder, files).write(tensors.items())

  return rewrite


def _set(name, value):
  return _change_tensors(lambda tensors: tensors.update({name: value}))


def _drop(name):
  return _change_tensors(lambda tensors: tensors.pop(name))


_HEAD_COPY = 'model.layers.3.shared_head.head.weight'
_EMBEDDING_COPY = 'model.layers.3.embed_tokens.weight'


def _nudge(name):
  """Changes the last number of a tensor a little."""

  def change(tensors):
    tensors[name] = tensors[name].copy()
    tensors[name][-1, -1] += 1e-3

  return _change_tensors(change)


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (
      _change_config(model_type='gpt2'),
      "model_type='gpt2' is not supported; supported are deepseek_v3, ",
    ),
    (_change_config(model_type=['qwen3']), r"model_type=\['qwen3'\] is not su"),
    (_change_config(hidden_size=64), r'is \[64, 32\], by config.json it must'),
    (
      _change_config(n_routed_experts=12),
      r'gate.weight of .* is \[8, 32\], by conf',
    ),
    (_change_config(rope_scaling={'type': 'ntk'}), "rope type 'ntk' is not su"),
    (_change_config(attention_bias=True), 'attention_bias=True is not suppor'),
    (_change_config(qk_rope_head_dim=7), 'rope_head_dim=7 must be even'),
    (
      _change_config(quantization_config={'quant_method': 'gptq'}),
      "quant_method='gptq'",
    ),
    (_drop('model.norm.weight'), 'lacks the tensor model.norm.weight'),
    (
      _set('model.extra.weight', np.zeros(3, np.float32)),
      'has the tensor model.extra.weight, which the model does not have',
    ),
    (
      _set('model.norm.weight', np.zeros(3, np.float32)),
      r'tensor model.norm.weight of .* is \[3\], by config.json it must be',
    ),
    (
      _set('lm_head.weight', np.zeros((64, 32), fp8.E4M3)),
      'lacks the tensor lm_head.weight_scale_inv',
    ),
    (_nudge(_HEAD_COPY), f'{_HEAD_COPY} is not equal to lm_head.weight'),
    (
      _nudge(_EMBEDDING_COPY),
      f'{_EMBEDDING_COPY} is not equal to model.embed_tokens.weight',
    ),
    (_drop(_EMBEDDING_COPY), f'lacks the tensor {_EMBEDDING_COPY}'),
    (
      _set('model.norm.weight', np.zeros(32, fp8.E4M3)),
      r'model.norm.weight of .* is F8_E4M3 \[32\], FP8 in blocks must be a mat',
    ),
    (
      _change_config(quantization_config=[1]),
      r'quantization_config=\[1\] must be an object',
    ),
    (
      _change_config(
        quantization_config={'quant_method': 'fp8', 'weight_block_size': [128]}
      ),
      r'weight_block_size=\[128\] of quantization_config must be two sizes',
    ),
    (lambda folder: (folder / 'config.json').unlink(), 'config.json does not'),
    (
      lambda folder: (folder / 'config.json').write_text('{'),
      'config.json is no JSON',
    ),
    (
      lambda folder: (folder / 'config.json').write_text('[' * 100_000),
      'config.json is no JSON: maximum recursion depth',
    ),
  ],
)
def test_what_is_wrong_is_named(tmp_path, damage, message):
  config, variables = _small()
  export.save(tmp_path / 'a', config, variables, dtype='float32')
  damage(tmp_path / 'a')
  with pytest.raises(config_lib.UserError, match=message):
    huggingface.load(tmp_path / 'a')


def test_an_export_that_fails_leaves_nothing(tmp_path):
  config, variables = _small()

  def fail(folder):
    assert (folder / 'config.json').exists()
    raise OSError('disk full')

  with pytest.raises(OSError, match='disk full'):
    export.save(tmp_path / 'a', config, variables, finish=fail)
  assert not list(tmp_path.iterdir())


def test_an_export_does_not_overwrite(tmp_path):
  config, variables = _small()
  (tmp_path / 'mine').write_text('work')
  with pytest.raises(config_lib.UserError, match='exists and is not empty'):
    export.save(tmp_path, config, variables)
  assert (tmp_path / 'mine').read_text() == 'work'


def test_a_shape_of_no_family_is_refused(tmp_path):
  config, variables = _small()
  odd = dataclasses.replace(
    config, moe=dataclasses.replace(config.moe, score='softmax')
  )
  with pytest.raises(config_lib.UserError, match='no Hugging Face family'):
    export.save(tmp_path / 'a', odd, variables)
