"""config.json of Hugging Face checkpoints, to a ModelConfig and back."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from r1jax import config as config_lib
from r1jax.model import config as model_config

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Family:
  """One model_type.

  Attributes:
    architecture: Name of transformers' class.
    read: Builds attention, feed-forward and depth out of config.json.
    write: The other way round.
    fits: Says whether a model can be written as this family.
  """

  architecture: str
  read: Callable[[Values], dict[str, Any]]
  write: Callable[[model_config.ModelConfig], dict[str, Any]]
  fits: Callable[[model_config.ModelConfig], bool]


def read(values: Values, **changes: Any) -> model_config.ModelConfig:
  """The model of a config.json.

  Args:
    values: Its contents.
    **changes: Fields of the ModelConfig that are ours to choose: dtype, remat,
      scan_layers, mtp_depth, max_length.

  Raises:
    UserError: A model_type that is not supported, a key that is missing, or a
      value that has no counterpart here.
  """
  kind = values.get('model_type')
  if kind not in _FAMILIES:
    raise config_lib.UserError(
      f'model_type={kind!r} is not supported; supported are '
      f'{", ".join(_FAMILIES)}'
    )
  try:
    _refuse(values, 'hidden_act', 'silu')
    _refuse(values, 'attention_bias', False)
    _refuse(values, 'mlp_bias', False)
    fields = {
      'vocab_size': values['vocab_size'],
      'embed_dim': values['hidden_size'],
      'num_layers': values['num_hidden_layers'],
      'num_dense_layers': values['num_hidden_layers'],
      'moe': None,
      'norm_eps': values['rms_norm_eps'],
      'init_std': values.get('initializer_range', 0.02),
      'tie_embeddings': bool(values.get('tie_word_embeddings', False)),
      'max_length': values['max_position_embeddings'],
    }
    fields |= _FAMILIES[kind].read(values)
    # As from a config file, so that every value's type is checked.
    plain = config_lib.to_dict(fields | changes)
    return config_lib.from_dict(model_config.ModelConfig, plain, 'config.json')
  except config_lib.UserError:
    raise
  except KeyError as e:
    raise config_lib.UserError(
      f'config.json of model_type={kind} lacks {e.args[0]!r}'
    ) from e
  except (TypeError, ValueError) as e:
    raise config_lib.UserError(f'config.json: {e}') from e


def write(config: model_config.ModelConfig) -> dict[str, Any]:
  """A config.json that transformers reads as this model.

  Raises:
    UserError: No supported family has this shape.
  """
  for kind, family in _FAMILIES.items():
    if kind not in _READ_ONLY and family.fits(config):
      break
  else:
    raise config_lib.UserError(
      'no Hugging Face family has this shape: '
      f'{config_lib.to_dict(config.attention)} with moe='
      f'{config.moe and config_lib.to_dict(config.moe)}'
    )
  attention = config.attention
  return (
    {
      'architectures': [family.architecture],
      'model_type': kind,
      'vocab_size': config.vocab_size,
      'hidden_size': config.embed_dim,
      'num_hidden_layers': config.num_layers,
      'num_attention_heads': attention.num_heads,
      'hidden_act': 'silu',
      'rms_norm_eps': config.norm_eps,
      'initializer_range': config.init_std,
      'max_position_embeddings': config.max_length,
      'tie_word_embeddings': config.tie_embeddings,
      'attention_dropout': 0.0,
      'use_cache': True,
    }
    | family.write(config)
    | _write_rope(attention.rope)
  )


# ---- DeepSeek -------------------------------------------------------------


def _read_deepseek_v3(values: Values) -> dict[str, Any]:
  _refuse(values, 'moe_layer_freq', 1)
  _refuse(values, 'scoring_func', 'sigmoid')
  _refuse(values, 'topk_method', 'noaux_tc')
  num_dense = _num_dense(values)
  return {
    'num_dense_layers': num_dense,
    'dense_dim': values['intermediate_size'],
    'attention': _read_mla(values),
    'mtp_depth': values.get('num_nextn_predict_layers') or 0,
    'moe': model_config.MoeConfig(
      num_experts=values['n_routed_experts'],
      top_k=values['num_experts_per_tok'],
      expert_dim=values['moe_intermediate_size'],
      num_shared=values.get('n_shared_experts') or 0,
      num_groups=values['n_group'],
      top_groups=values['topk_group'],
      score='sigmoid',
      group_score='top2',
      normalize=values['norm_topk_prob'],
      scale=float(values['routed_scaling_factor']),
    ),
  }


def _read_deepseek_v32(values: Values) -> dict[str, Any]:
  fields = _read_deepseek_v3(values)
  indexer = model_config.IndexerConfig(
    num_heads=values['index_n_heads'],
    head_dim=values['index_head_dim'],
    top_k=values['index_topk'],
  )
  attention = dataclasses.replace(fields['attention'], indexer=indexer)
  return fields | {'attention': attention}


def _read_deepseek_v2(values: Values) -> dict[str, Any]:
  _refuse(values, 'moe_layer_freq', 1)
  _refuse(values, 'scoring_func', 'softmax')
  # transformers never normalises V2's weights; released configs say false.
  _refuse(values, 'norm_topk_prob', False)
  method = values.get('topk_method', 'greedy')
  if method not in ('greedy', 'group_limited_greedy'):
    raise config_lib.UserError(
      f'topk_method={method!r} is not supported, it must be greedy or '
      'group_limited_greedy'
    )
  is_limited = method == 'group_limited_greedy'
  return {
    'num_dense_layers': _num_dense(values),
    'dense_dim': values['intermediate_size'],
    'attention': _read_mla(values),
    'moe': model_config.MoeConfig(
      num_experts=values['n_routed_experts'],
      top_k=values['num_experts_per_tok'],
      expert_dim=values['moe_intermediate_size'],
      num_shared=values.get('n_shared_experts') or 0,
      num_groups=values['n_group'] if is_limited else 1,
      top_groups=values['topk_group'] if is_limited else 1,
      score='softmax',
      group_score='max',
      normalize=False,
      scale=float(values['routed_scaling_factor']),
      has_bias=False,
    ),
  }


def _read_mla(values: Values) -> model_config.MlaConfig:
  heads = values['num_attention_heads']
  _refuse(values, 'num_key_value_heads', heads)
  return model_config.MlaConfig(
    num_heads=heads,
    q_lora_rank=values.get('q_lora_rank'),
    kv_lora_rank=values['kv_lora_rank'],
    nope_head_dim=values['qk_nope_head_dim'],
    rope_head_dim=values['qk_rope_head_dim'],
    v_head_dim=values['v_head_dim'],
    rope=_read_rope(values, interleaved=values.get('rope_interleave', True)),
  )


def _num_dense(values: Values) -> int:
  layers = values['num_hidden_layers']
  num_dense = min(values.get('first_k_dense_replace', 0), layers)
  kinds = ['dense'] * num_dense + ['sparse'] * (layers - num_dense)
  _refuse(values, 'mlp_layer_types', kinds)
  return num_dense


def _write_deepseek_v3(config: model_config.ModelConfig) -> dict[str, Any]:
  a, moe = config.attention, config.moe
  values = _write_mla(config) | {
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'norm_topk_prob': moe.normalize,
    'num_nextn_predict_layers': config.mtp_depth,
    'rope_interleave': a.rope.interleaved,
  }
  return values


def _write_deepseek_v32(config: model_config.ModelConfig) -> dict[str, Any]:
  indexer = config.attention.indexer
  values = _write_deepseek_v3(config) | {
    'index_n_heads': indexer.num_heads,
    'index_head_dim': indexer.head_dim,
    'index_topk': indexer.top_k,
  }
  values.pop('rope_interleave')
  return values


def _write_deepseek_v2(config: model_config.ModelConfig) -> dict[str, Any]:
  is_limited = config.moe.num_groups > 1
  return _write_mla(config) | {
    'scoring_func': 'softmax',
    'topk_method': 'group_limited_greedy' if is_limited else 'greedy',
    'norm_topk_prob': False,
  }


def _write_mla(config: model_config.ModelConfig) -> dict[str, Any]:
  a, moe = config.attention, config.moe
  return {
    'num_key_value_heads': a.num_heads,
    'q_lora_rank': a.q_lora_rank,
    'kv_lora_rank': a.kv_lora_rank,
    'qk_nope_head_dim': a.nope_head_dim,
    'qk_rope_head_dim': a.rope_head_dim,
    'v_head_dim': a.v_head_dim,
    'intermediate_size': config.dense_dim,
    'first_k_dense_replace': config.num_dense_layers,
    'moe_layer_freq': 1,
    'n_routed_experts': moe.num_experts,
    'num_experts_per_tok': moe.top_k,
    'moe_intermediate_size': moe.expert_dim,
    'n_shared_experts': moe.num_shared,
    'n_group': moe.num_groups,
    'topk_group': moe.top_groups,
    'routed_scaling_factor': moe.scale,
    'attention_bias': False,
  }


# ---- Qwen and Llama -------------------------------------------------------


def _read_dense(**options: bool) -> Callable[[Values], dict[str, Any]]:
  def read_values(values: Values) -> dict[str, Any]:
    return {
      'dense_dim': values['intermediate_size'],
      'attention': _read_gqa(values, **options),
    }

  return read_values


def _read_qwen3_moe(values: Values) -> dict[str, Any]:
  _refuse(values, 'decoder_sparse_step', 1)
  layers = values['num_hidden_layers']
  dense = sorted(values.get('mlp_only_layers') or [])
  if dense != list(range(len(dense))) or len(dense) > layers:
    raise config_lib.UserError(
      f'mlp_only_layers={dense} is not supported: dense layers must come first'
    )
  return {
    'num_dense_layers': len(dense),
    'dense_dim': values['intermediate_size'],
    'attention': _read_gqa(values, qk_norm=True),
    'moe': model_config.MoeConfig(
      num_experts=values.get('num_experts', values.get('num_local_experts')),
      top_k=values['num_experts_per_tok'],
      expert_dim=values['moe_intermediate_size'],
      num_shared=0,
      score='softmax',
      normalize=values['norm_topk_prob'],
      has_bias=False,
    ),
  }


def _read_gqa(values: Values, **options: bool) -> model_config.GqaConfig:
  heads = values['num_attention_heads']
  if values.get('use_sliding_window'):
    raise config_lib.UserError(
      'use_sliding_window=true is not supported, attention is full here'
    )
  return model_config.GqaConfig(
    num_heads=heads,
    num_kv_heads=values.get('num_key_value_heads') or heads,
    head_dim=values.get('head_dim') or values['hidden_size'] // heads,
    rope=_read_rope(values, interleaved=False),
    **options,
  )


def _write_dense(config: model_config.ModelConfig) -> dict[str, Any]:
  a = config.attention
  return {
    'num_key_value_heads': a.num_kv_heads,
    'head_dim': a.head_dim,
    'intermediate_size': config.dense_dim,
  }


def _write_qwen2(config: model_config.ModelConfig) -> dict[str, Any]:
  return _write_dense(config) | {'use_sliding_window': False}


def _write_qwen3(config: model_config.ModelConfig) -> dict[str, Any]:
  return _write_qwen2(config) | {'attention_bias': False}


def _write_llama(config: model_config.ModelConfig) -> dict[str, Any]:
  return _write_dense(config) | {'attention_bias': False, 'mlp_bias': False}


def _write_qwen3_moe(config: model_config.ModelConfig) -> dict[str, Any]:
  moe = config.moe
  return _write_qwen3(config) | {
    'num_experts': moe.num_experts,
    'num_experts_per_tok': moe.top_k,
    'moe_intermediate_size': moe.expert_dim,
    'norm_topk_prob': moe.normalize,
    'decoder_sparse_step': 1,
    'mlp_only_layers': list(range(config.num_dense_layers)),
  }


# ---- Rotary embedding -----------------------------------------------------


def _read_rope(values: Values, *, interleaved: bool) -> model_config.RopeConfig:
  """Both forms: rope_parameters, or rope_theta beside rope_scaling."""
  rope = dict(values.get('rope_parameters') or values.get('rope_scaling') or {})
  theta = rope.get('rope_theta', values.get('rope_theta'))
  if theta is None:
    raise KeyError('rope_theta')
  kind = rope.get('rope_type', rope.get('type', 'default'))
  original = rope.get(
    'original_max_position_embeddings', values['max_position_embeddings']
  )
  match kind:
    case 'default':
      scaling = None
    case 'yarn':
      if rope.get('attention_factor') is not None:
        raise config_lib.UserError(
          f'attention_factor={rope["attention_factor"]} of rope is not '
          'supported, mscale and mscale_all_dim are'
        )
      _refuse(rope, 'truncate', True)
      scaling = model_config.YarnConfig(
        factor=float(rope['factor']),
        original_length=original,
        beta_fast=float(rope.get('beta_fast') or 32),
        beta_slow=float(rope.get('beta_slow') or 1),
        mscale=float(rope.get('mscale') or 0),
        mscale_all_dim=float(rope.get('mscale_all_dim') or 0),
      )
    case 'llama3':
      scaling = model_config.Llama3RopeConfig(
        factor=float(rope['factor']),
        low_freq_factor=float(rope['low_freq_factor']),
        high_freq_factor=float(rope['high_freq_factor']),
        original_length=original,
      )
    case _:
      raise config_lib.UserError(
        f'rope type {kind!r} is not supported; supported are default, yarn, '
        'llama3'
      )
  return model_config.RopeConfig(float(theta), interleaved, scaling)


def _write_rope(rope: model_config.RopeConfig) -> dict[str, Any]:
  """rope_theta and rope_scaling: every reader knows them."""
  scaling = rope.scaling
  match scaling:
    case None:
      written = None
    case model_config.YarnConfig():
      written = {
        'rope_type': 'yarn',
        'factor': scaling.factor,
        'original_max_position_embeddings': scaling.original_length,
        'beta_fast': scaling.beta_fast,
        'beta_slow': scaling.beta_slow,
        'mscale': scaling.mscale,
        'mscale_all_dim': scaling.mscale_all_dim,
      }
    case model_config.Llama3RopeConfig():
      written = {
        'rope_type': 'llama3',
        'factor': scaling.factor,
        'low_freq_factor': scaling.low_freq_factor,
        'high_freq_factor': scaling.high_freq_factor,
        'original_max_position_embeddings': scaling.original_length,
      }
  return {'rope_theta': rope.theta, 'rope_scaling': written}


def _refuse(values: Values, name: str, supported: Any) -> None:
  """A key that is there must have the one value that is supported."""
  value = values.get(name)
  if value is not None and value != supported:
    raise config_lib.UserError(
      f'{name}={value!r} is not supported, only {supported!r} is'
    )


def _is_mla(config: model_config.ModelConfig, *, score: str) -> bool:
  a, moe = config.attention, config.moe
  return (
    isinstance(a, model_config.MlaConfig)
    and moe is not None
    and moe.score == score
    and moe.has_bias == (score == 'sigmoid')
    and a.norm_eps == 1e-6
  )


def _is_gqa(config: model_config.ModelConfig, **wanted: bool) -> bool:
  a = config.attention
  return (
    isinstance(a, model_config.GqaConfig)
    and not config.mtp_depth
    and not a.rope.interleaved
    and (a.qkv_bias, a.qk_norm, config.moe is not None)
    == (wanted['bias'], wanted['norm'], wanted['moe'])
  )


_V3 = _Family(
  'DeepseekV3ForCausalLM',
  _read_deepseek_v3,
  _write_deepseek_v3,
  lambda c: (
    _is_mla(c, score='sigmoid')
    and c.moe.group_score == 'top2'
    and c.attention.indexer is None
  ),
)
_FAMILIES = {
  'deepseek_v3': _V3,  # And Moonlight.
  'deepseek_v32': _Family(
    'DeepseekV32ForCausalLM',
    _read_deepseek_v32,
    _write_deepseek_v32,
    lambda c: (
      _is_mla(c, score='sigmoid')
      and c.moe.group_score == 'top2'
      and c.attention.rope.interleaved
      and c.attention.indexer is not None
    ),
  ),
  'deepseek_v2': _Family(
    'DeepseekV2ForCausalLM',
    _read_deepseek_v2,
    _write_deepseek_v2,
    lambda c: (
      _is_mla(c, score='softmax')
      and not c.moe.normalize
      and (c.moe.num_groups == 1 or c.moe.group_score == 'max')
      and not c.mtp_depth
      and c.attention.rope.interleaved
      and c.attention.indexer is None
    ),
  ),
  'kimi_k2': _V3,
  'qwen2': _Family(
    'Qwen2ForCausalLM',
    _read_dense(qkv_bias=True),
    _write_qwen2,
    lambda c: _is_gqa(c, bias=True, norm=False, moe=False),
  ),
  'qwen3': _Family(
    'Qwen3ForCausalLM',
    _read_dense(qk_norm=True),
    _write_qwen3,
    lambda c: _is_gqa(c, bias=False, norm=True, moe=False),
  ),
  'qwen3_moe': _Family(
    'Qwen3MoeForCausalLM',
    _read_qwen3_moe,
    _write_qwen3_moe,
    lambda c: (
      _is_gqa(c, bias=False, norm=True, moe=True)
      and c.moe.score == 'softmax'
      and not c.moe.has_bias
      and not c.moe.num_shared
      and c.moe.num_groups == 1
      and c.moe.scale == 1
    ),
  ),
  'llama': _Family(
    'LlamaForCausalLM',
    _read_dense(),
    _write_llama,
    lambda c: _is_gqa(c, bias=False, norm=False, moe=False),
  ),
}
# Known under another name as well, which is the one that is written.
_READ_ONLY = ('kimi_k2',)
