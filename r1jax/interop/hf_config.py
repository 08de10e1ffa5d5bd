"""config.json of Hugging Face checkpoints, to a ModelConfig and back."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from r1jax import config as config_lib
from r1jax.interop import hf_rope
from r1jax.model import config as model_config

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Family:
  """One model_type.

  Attributes:
    architecture: Name of transformers' class.
    defaults: What config.json may leave out.
    read: Builds attention, feed-forward and depth out of config.json.
    write: The other way round.
    fits: Says whether a model can be written as this family.
  """

  architecture: str
  defaults: Values
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
  _check_names(changes)
  kind = values.get('model_type')
  if not isinstance(kind, str) or kind not in _FAMILIES:
    raise config_lib.UserError(
      f'model_type={kind!r} is not supported; supported are '
      f'{", ".join(_FAMILIES)}'
    )
  values = _FAMILIES[kind].defaults | values
  try:
    _refuse(values, 'hidden_act', 'silu', 'swish')  # The same.
    _refuse(values, 'mlp_bias', False)
    fields = {
      'vocab_size': values['vocab_size'],
      'embed_dim': _count(values, 'hidden_size'),
      'num_layers': _count(values, 'num_hidden_layers'),
      'num_dense_layers': values['num_hidden_layers'],
      'moe': None,
      'norm_eps': values['rms_norm_eps'],
      'init_std': values['initializer_range'],
      'tie_embeddings': values['tie_word_embeddings'],
      'max_length': _count(values, 'max_position_embeddings'),
    }
    fields |= _FAMILIES[kind].read(values)
    # Plain values, as from a config file, so that their types are checked.
    fields |= config_lib.to_dict(changes)
    return config_lib.from_dict(model_config.ModelConfig, fields, 'config.json')
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
    | hf_rope.write(attention.rope)
  )


def _check_names(changes: Mapping[str, Any]) -> None:
  """What is changed must be a field of the model."""
  fields = [
    field.name for field in dataclasses.fields(model_config.ModelConfig)
  ]
  for name in changes:
    if name not in fields:
      near = difflib.get_close_matches(name, fields, n=1)
      hint = f' (did you mean {near[0]!r}?)' if near else ''
      raise config_lib.UserError(
        f'{name}={changes[name]!r} is no field of ModelConfig{hint}; they are '
        f'{", ".join(fields)}'
      )


# ---- DeepSeek -------------------------------------------------------------


def _read_deepseek_v3(values: Values) -> dict[str, Any]:
  _refuse(values, 'moe_layer_freq', 1)
  _refuse(values, 'scoring_func', 'sigmoid')
  _refuse(values, 'topk_method', 'noaux_tc')
  return {
    'num_dense_layers': _first_k_dense(values),
    'dense_dim': values['intermediate_size'],
    'attention': _read_mla(values, interleaved=values['rope_interleave']),
    'mtp_depth': values.get('num_nextn_predict_layers') or 0,
    'moe': {
      'num_experts': values['n_routed_experts'],
      'top_k': values['num_experts_per_tok'],
      'expert_dim': values['moe_intermediate_size'],
      'num_shared': values['n_shared_experts'] or 0,
      'num_groups': values['n_group'],
      'top_groups': values['topk_group'],
      'score': 'sigmoid',
      'group_score': 'top2',
      'normalize': values['norm_topk_prob'],
      'scale': values['routed_scaling_factor'],
    },
  }


def _read_deepseek_v32(values: Values) -> dict[str, Any]:
  # transformers rotates its pairs whatever the file says.
  fields = _read_deepseek_v3(values | {'rope_interleave': True})
  indexer = {
    'num_heads': values['index_n_heads'],
    'head_dim': values['index_head_dim'],
    'top_k': values['index_topk'],
  }
  fields['attention']['indexer'] = indexer
  kinds = values['mlp_layer_types']
  if kinds is not None:
    is_sparse = [kind == 'sparse' for kind in kinds]
    said = f'mlp_layer_types={kinds}'
    fields['num_dense_layers'] = _num_dense(values, is_sparse, said)
  return fields


def _read_deepseek_v2(values: Values) -> dict[str, Any]:
  _refuse(values, 'moe_layer_freq', 1)
  _refuse(values, 'scoring_func', 'softmax')
  # transformers never normalises V2's weights; released configs say false.
  _refuse(values, 'norm_topk_prob', False)
  method = values['topk_method']
  if method not in ('greedy', 'group_limited_greedy'):
    raise config_lib.UserError(
      f'topk_method={method!r} is not supported, it must be greedy or '
      'group_limited_greedy'
    )
  is_limited = method == 'group_limited_greedy'
  return {
    'num_dense_layers': _first_k_dense(values),
    'dense_dim': values['intermediate_size'],
    'attention': _read_mla(values, interleaved=True),
    'moe': {
      'num_experts': values['n_routed_experts'],
      'top_k': values['num_experts_per_tok'],
      'expert_dim': values['moe_intermediate_size'],
      'num_shared': values['n_shared_experts'] or 0,
      'num_groups': values['n_group'] if is_limited else 1,
      'top_groups': values['topk_group'] if is_limited else 1,
      'score': 'softmax',
      'group_score': 'max',
      'normalize': False,
      'scale': values['routed_scaling_factor'],
      'has_bias': False,
    },
  }


def _read_mla(values: Values, *, interleaved: bool) -> dict[str, Any]:
  _refuse(values, 'attention_bias', False)
  heads = values['num_attention_heads']
  _refuse(values, 'num_key_value_heads', heads)
  return {
    'num_heads': heads,
    'q_lora_rank': values['q_lora_rank'],
    'kv_lora_rank': values['kv_lora_rank'],
    'nope_head_dim': values['qk_nope_head_dim'],
    'rope_head_dim': values['qk_rope_head_dim'],
    'v_head_dim': values['v_head_dim'],
    'rope': hf_rope.read(values, interleaved=interleaved),
  }


def _first_k_dense(values: Values) -> int:
  first = _count(values, 'first_k_dense_replace', least=0)
  return min(first, values['num_hidden_layers'])


def _num_dense(values: Values, is_sparse: list[bool], said: str) -> int:
  """How many layers are dense, which must be the first ones."""
  num_layers = values['num_hidden_layers']
  num_dense = is_sparse.count(False)
  if is_sparse != [i >= num_dense for i in range(num_layers)]:
    raise config_lib.UserError(
      f'{said} of {num_layers} layers is not supported: some dense layers must '
      'come first, then only sparse ones'
    )
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


def _read_dense(values: Values, **options: bool) -> dict[str, Any]:
  return {
    'dense_dim': values['intermediate_size'],
    'attention': _read_gqa(values, **options),
  }


def _read_qwen2(values: Values) -> dict[str, Any]:
  _refuse_windows(values)
  # Its biases are those of queries, keys and values, whatever the file says.
  return _read_dense(values | {'attention_bias': False}, qkv_bias=True)


def _read_qwen3(values: Values) -> dict[str, Any]:
  _refuse_windows(values)
  return _read_dense(values, qk_norm=True)


def _read_qwen3_moe(values: Values) -> dict[str, Any]:
  # Here a window is every layer's.
  _refuse_windows(values | {'layer_types': None, 'max_window_layers': 0})
  step = _count(values, 'decoder_sparse_step')
  dense = values['mlp_only_layers'] or []
  is_sparse = [
    (i + 1) % step == 0 and i not in dense
    for i in range(values['num_hidden_layers'])
  ]
  said = f'decoder_sparse_step={step} with mlp_only_layers={dense}'
  name = 'num_local_experts' if 'num_local_experts' in values else 'num_experts'
  return {
    'num_dense_layers': _num_dense(values, is_sparse, said),
    'dense_dim': values['intermediate_size'],
    'attention': _read_gqa(values, qk_norm=True),
    'moe': {
      'num_experts': values[name],
      'top_k': values['num_experts_per_tok'],
      'expert_dim': values['moe_intermediate_size'],
      'num_shared': 0,
      'score': 'softmax',
      'normalize': values['norm_topk_prob'],
      'has_bias': False,
    },
  }


def _read_gqa(values: Values, **options: bool) -> dict[str, Any]:
  _refuse(values, 'attention_bias', False)
  heads = _count(values, 'num_attention_heads')
  return {
    'num_heads': heads,
    'num_kv_heads': values['num_key_value_heads'] or heads,
    'head_dim': values['head_dim'] or values['hidden_size'] // heads,
    'rope': hf_rope.read(values, interleaved=False),
    **options,
  }


def _refuse_windows(values: Values) -> None:
  """Attention must see all tokens in every layer."""
  kinds = values['layer_types']
  if kinds is not None:  # Then nothing else counts.
    kinds = sorted(set(kinds) - {'full_attention', 'attention'})
    if kinds:
      raise config_lib.UserError(
        f'layer_types with {", ".join(kinds)} are not supported, only '
        'full_attention is'
      )
    return
  first, window = values['max_window_layers'], values['sliding_window']
  has_window = values['use_sliding_window'] and window is not None
  if has_window and first < values['num_hidden_layers']:
    raise config_lib.UserError(
      f'use_sliding_window=true with sliding_window={window} from layer '
      f'{first} on is not supported, attention is full here'
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


# ---- What the families share ----------------------------------------------


def _count(values: Values, name: str, least: int = 1) -> int:
  """A value that is calculated with."""
  value = values[name]
  if not isinstance(value, int) or value < least:
    raise config_lib.UserError(
      f'{name}={value!r} must be an integer, at least {least}'
    )
  return value


def _refuse(values: Values, name: str, *supported: Any) -> None:
  """A key that is there must have a value that is supported."""
  value = values.get(name)
  if value is not None and value not in supported:
    raise config_lib.UserError(
      f'{name}={value!r} is not supported, only '
      f'{" or ".join(map(repr, supported))} is'
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


# ---- The families ---------------------------------------------------------

# The defaults of transformers 5.23, configuration_*.py of each family. A file
# without vocab_size, hidden_size, intermediate_size or the numbers of layers,
# heads and experts is broken; one without num_nextn_predict_layers has no MTP.
_DEFAULTS = {
  'initializer_range': 0.02,
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0,
  'tie_word_embeddings': False,
  'num_key_value_heads': None,  # As many as heads; MLA has no other number.
}
_DEEPSEEK_V2_DEFAULTS = _DEFAULTS | {
  'max_position_embeddings': 2048,
  'first_k_dense_replace': 0,
  'kv_lora_rank': 512,
  'q_lora_rank': 1536,
  'qk_nope_head_dim': 128,
  'qk_rope_head_dim': 64,
  'v_head_dim': 128,
  'moe_intermediate_size': 1407,
  'n_shared_experts': 2,
  'topk_method': 'greedy',
  'routed_scaling_factor': 1.0,
}
_DEEPSEEK_V3_DEFAULTS = _DEEPSEEK_V2_DEFAULTS | {
  'max_position_embeddings': 4096,
  'first_k_dense_replace': 3,
  'num_experts_per_tok': 8,
  'moe_intermediate_size': 2048,
  'n_shared_experts': 1,
  'n_group': 8,
  'topk_group': 4,
  'topk_method': 'noaux_tc',
  'norm_topk_prob': True,
  'routed_scaling_factor': 2.5,
  'rope_interleave': True,
}
_DEEPSEEK_V32_DEFAULTS = _DEEPSEEK_V3_DEFAULTS | {
  'max_position_embeddings': 163840,
  'mlp_layer_types': None,
  'index_n_heads': 64,
  'index_head_dim': 128,
  'index_topk': 2048,
}
_LLAMA_DEFAULTS = _DEFAULTS | {
  'max_position_embeddings': 2048,
  'head_dim': None,
}
_QWEN2_DEFAULTS = _DEFAULTS | {
  'max_position_embeddings': 32768,
  'num_key_value_heads': 32,
  'head_dim': None,
  'layer_types': None,
  'use_sliding_window': False,
  'sliding_window': 4096,
  'max_window_layers': 28,
}
_QWEN3_DEFAULTS = _QWEN2_DEFAULTS | {'head_dim': 128}
_QWEN3_MOE_DEFAULTS = _QWEN2_DEFAULTS | {
  'num_key_value_heads': 4,
  'decoder_sparse_step': 1,
  'mlp_only_layers': None,
  'num_experts_per_tok': 8,
  'moe_intermediate_size': 768,
  'norm_topk_prob': False,
}
_V3 = _Family(
  'DeepseekV3ForCausalLM',
  _DEEPSEEK_V3_DEFAULTS,
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
    _DEEPSEEK_V32_DEFAULTS,
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
    _DEEPSEEK_V2_DEFAULTS,
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
    _QWEN2_DEFAULTS,
    _read_qwen2,
    _write_qwen2,
    lambda c: _is_gqa(c, bias=True, norm=False, moe=False),
  ),
  'qwen3': _Family(
    'Qwen3ForCausalLM',
    _QWEN3_DEFAULTS,
    _read_qwen3,
    _write_qwen3,
    lambda c: _is_gqa(c, bias=False, norm=True, moe=False),
  ),
  'qwen3_moe': _Family(
    'Qwen3MoeForCausalLM',
    _QWEN3_MOE_DEFAULTS,
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
    _LLAMA_DEFAULTS,
    _read_dense,
    _write_llama,
    lambda c: _is_gqa(c, bias=False, norm=False, moe=False),
  ),
}
# Known under another name as well, which is the one that is written.
_READ_ONLY = ('kimi_k2',)
