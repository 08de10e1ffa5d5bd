"""Reads the two tiny DeepSeek-V3 models that transformers wrote.

tests/data/hf_models/<name>/: config.json, model.safetensors in float32, and
io.npz with input_ids, logits and decode_logits of transformers 5.23.0.
"""

import json
import pathlib
import struct
from typing import Any

import numpy as np

from r1jax.model import config as model_config
from tests import known_answers

MODELS = known_answers.DATA / 'hf_models'


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Length of the header, the header in JSON, then the bytes it points to."""
  raw = path.read_bytes()
  (length,) = struct.unpack('<Q', raw[:8])
  header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
  header.pop('__metadata__', None)
  out = {}
  for name, entry in header.items():
    assert entry['dtype'] == 'F32', name
    start, end = entry['data_offsets']
    out[name] = np.frombuffer(data[start:end], '<f4').reshape(entry['shape'])
  return out


def load_config(name: str, **changes: Any) -> model_config.ModelConfig:
  hf = json.loads((MODELS / name / 'config.json').read_text())
  rope, yarn = hf['rope_parameters'], None
  if rope['rope_type'] == 'yarn':
    yarn = model_config.YarnConfig(
      factor=rope['factor'],
      original_length=rope['original_max_position_embeddings'],
      beta_fast=rope['beta_fast'],
      beta_slow=rope['beta_slow'],
      mscale=rope['mscale'],
      mscale_all_dim=rope['mscale_all_dim'],
    )
  return model_config.ModelConfig(
    vocab_size=hf['vocab_size'],
    embed_dim=hf['hidden_size'],
    num_layers=hf['num_hidden_layers'],
    num_dense_layers=hf['first_k_dense_replace'],
    dense_dim=hf['intermediate_size'],
    attention=model_config.MlaConfig(
      num_heads=hf['num_attention_heads'],
      q_lora_rank=hf['q_lora_rank'],
      kv_lora_rank=hf['kv_lora_rank'],
      nope_head_dim=hf['qk_nope_head_dim'],
      rope_head_dim=hf['qk_rope_head_dim'],
      v_head_dim=hf['v_head_dim'],
      rope=model_config.RopeConfig(
        theta=rope['rope_theta'], interleaved=hf['rope_interleave'], yarn=yarn
      ),
    ),
    moe=model_config.MoeConfig(
      num_experts=hf['n_routed_experts'],
      top_k=hf['num_experts_per_tok'],
      expert_dim=hf['moe_intermediate_size'],
      num_shared=hf['n_shared_experts'],
      num_groups=hf['n_group'],
      top_groups=hf['topk_group'],
      normalize=hf['norm_topk_prob'],
      scale=hf['routed_scaling_factor'],
      block=8,
    ),
    norm_eps=hf['rms_norm_eps'],
    **changes,
  )


def load_variables(name: str, config: model_config.ModelConfig) -> Any:
  """The weights in the layout of scan_layers=True."""
  hf = read_safetensors(MODELS / name / 'model.safetensors')
  first, count = config.num_dense_layers, config.num_layers
  layers = [_block(hf, f'model.layers.{i}', config) for i in range(count)]
  bias_LE = [
    hf[f'model.layers.{i}.mlp.gate.e_score_correction_bias']
    for i in range(first, count)
  ]
  params = {
    'embedding': hf['model.embed_tokens.weight'],
    'head': hf['lm_head.weight'].T,
    'norm': {'scale': hf['model.norm.weight']},
    'dense': _stack(layers[:first]),
    'moe': _stack(layers[first:]),
  }
  router = {'moe': {'moe': {'bias': np.stack(bias_LE)}}}
  return {'params': params, 'router': router}


def _stack(trees: list[dict[str, Any]]) -> dict[str, Any]:
  if not isinstance(trees[0], dict):
    return np.stack(trees)
  return {k: _stack([t[k] for t in trees]) for k in trees[0]}


def _block(hf, at, config):
  """One layer; linear weights are [out, in] there and [in, out] here."""
  a = config.attention
  H, N, U = a.num_heads, a.nope_head_dim, a.v_head_dim
  weight = lambda name: hf[f'{at}.{name}.weight']
  attention = lambda name: weight(f'self_attn.{name}')
  q_up_AHQ = attention('q_b_proj').T.reshape(a.q_lora_rank, H, -1)
  # Per head: N rows of keys, then U rows of values.
  kv_up_CHX = attention('kv_b_proj').T.reshape(a.kv_lora_rank, H, N + U)
  block = {
    'attention_norm': {'scale': weight('input_layernorm')},
    'ffn_norm': {'scale': weight('post_attention_layernorm')},
    'attention': {
      'q_down': attention('q_a_proj').T,
      'q_norm': {'scale': attention('q_a_layernorm')},
      'q_up': q_up_AHQ,
      'kv_down': attention('kv_a_proj_with_mqa').T,
      'kv_norm': {'scale': attention('kv_a_layernorm')},
      'k_up': kv_up_CHX[..., :N],
      'v_up': kv_up_CHX[..., N:],
      'out': attention('o_proj').T.reshape(H, U, -1),
    },
  }
  swiglu = lambda name: {
    part: weight(f'{name}.{part}_proj').T for part in ('gate', 'up', 'down')
  }
  if f'{at}.mlp.gate.weight' not in hf:
    return block | {'ffn': swiglu('mlp')}
  experts = [swiglu(f'mlp.experts.{e}') for e in range(config.moe.num_experts)]
  moe = _stack(experts) | {
    'router': weight('mlp.gate').T,
    'shared': swiglu('mlp.shared_experts'),
  }
  return block | {'moe': moe}
