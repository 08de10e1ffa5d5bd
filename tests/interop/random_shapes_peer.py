"""Run by another Python, one that has transformers: makes random models.

  python random_shapes_peer.py FOLDER COUNT SEED < /dev/null

Writes FOLDER/FAMILY-INDEX, COUNT of each family: the model, and io.npz with
input_ids, float32 logits and those of the same model in float64. Prints the
largest difference of the two of each, a JSON object a line.
"""

import json
import pathlib
import random
import sys

import numpy as np
import torch
import transformers

_LENGTH = 12  # tokens


def common(draw: random.Random, i: int) -> dict[str, object]:
  """Of any family; the i-th of four in a row has other switches."""
  layers = draw.randint(1, 4)
  return {
    'vocab_size': draw.randint(40, 130),
    'hidden_size': draw.choice((24, 32, 40, 56)),
    'intermediate_size': draw.randint(5, 70),
    'num_hidden_layers': layers,
    'rms_norm_eps': draw.choice((1e-6, 1e-5)),
    'initializer_range': draw.choice((0.1, 0.2)),
    'tie_word_embeddings': i % 4 in (1, 2),
    'max_position_embeddings': 128,
    'pad_token_id': None,
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': draw.choice((50.0, 1e4, 5e4, 1e6)),
    },
  }


def yarn(draw: random.Random, values: dict[str, object]) -> None:
  """Extends the context."""
  original = draw.choice((8, 16, 32))
  values['rope_parameters'] |= {
    'rope_type': 'yarn',
    'factor': 128 / original,
    'original_max_position_embeddings': original,
    'beta_fast': draw.choice((32.0, 4.0)),
    'beta_slow': 1.0,
  }
  if draw.random() < 0.7:
    values['rope_parameters'] |= {
      'mscale': draw.choice((0.707, 1.0, 1.3)),
      'mscale_all_dim': draw.choice((0.707, 1.0, 1.3)),
    }


def mla(draw: random.Random, i: int, *, has_latent: bool) -> dict[str, object]:
  values = common(draw, i)
  if i % 4:
    yarn(draw, values)
  heads = draw.randint(1, 5)
  sizes, groups = draw.randint(2, 5), draw.choice((1, 2, 3, 4))
  kept = draw.randint(1, groups)
  return values | {
    'num_attention_heads': heads,
    'num_key_value_heads': heads,
    'q_lora_rank': draw.randint(6, 24) if has_latent else None,
    'kv_lora_rank': draw.randint(6, 24),
    'qk_nope_head_dim': draw.randint(4, 16),
    'qk_rope_head_dim': draw.choice((4, 8, 12)),
    'v_head_dim': draw.randint(4, 16),
    'first_k_dense_replace': draw.randint(0, values['num_hidden_layers'] - 1),
    'n_routed_experts': groups * sizes,
    'n_group': groups,
    'topk_group': kept,
    'num_experts_per_tok': draw.randint(1, kept * sizes),
    'n_shared_experts': draw.randint(1, 3),
    'moe_intermediate_size': draw.randint(4, 20),
    'routed_scaling_factor': draw.choice((1.0, 2.446, 2.5)),
  }


def gqa(draw: random.Random, i: int) -> dict[str, object]:
  values, kv_heads = common(draw, i), draw.randint(1, 3)
  return values | {
    'num_key_value_heads': kv_heads,
    'num_attention_heads': kv_heads * draw.choice((1, 2, 4)),
    'head_dim': draw.choice((8, 10, 12)),
  }


def deepseek_v2(draw: random.Random, i: int) -> transformers.PreTrainedConfig:
  values = mla(draw, i, has_latent=i % 2 == 0)
  for name in ('qk_nope_head_dim', 'kv_lora_rank'):
    values[name] += values[name] % 2  # Its rotation needs even strides.
  # Its heads must divide its width.
  values['hidden_size'] = 12 * values['num_attention_heads']
  limited = values['n_group'] > 1
  values['topk_method'] = 'group_limited_greedy' if limited else 'greedy'
  values['norm_topk_prob'] = False
  return transformers.DeepseekV2Config(**values)


def deepseek_v3(draw: random.Random, i: int) -> transformers.PreTrainedConfig:
  values = mla(draw, i, has_latent=i % 2 == 0)
  values['norm_topk_prob'] = i % 4 < 2
  values['rope_interleave'] = i % 4 != 2
  return transformers.DeepseekV3Config(**values)


def deepseek_v32(draw: random.Random, i: int) -> transformers.PreTrainedConfig:
  values = mla(draw, i, has_latent=True)
  # Many heads: scores of few tie at exactly 0, and the choice is arbitrary.
  values |= {'index_n_heads': 16, 'index_head_dim': draw.choice((12, 16, 20))}
  values['index_topk'] = draw.choice((3, 5, 20))
  return transformers.DeepseekV32Config(**values)


def qwen2(draw: random.Random, i: int) -> transformers.PreTrainedConfig:
  values = gqa(draw, i)
  # Its width is that of all heads.
  width = values['num_attention_heads'] * values['head_dim']
  return transformers.Qwen2Config(**values | {'hidden_size': width})


def qwen3(draw: random.Random, i: int) -> transformers.PreTrainedConfig:
  return transformers.Qwen3Config(**gqa(draw, i))


def qwen3_moe(draw: random.Random, i: int) -> transformers.PreTrainedConfig:
  values, experts = gqa(draw, i), draw.randint(3, 9)
  layers = values['num_hidden_layers']
  return transformers.Qwen3MoeConfig(
    **values,
    num_experts=experts,
    num_experts_per_tok=draw.randint(1, experts),
    moe_intermediate_size=draw.randint(4, 20),
    norm_topk_prob=i % 2 == 0,
    mlp_only_layers=list(range(draw.randint(0, layers - 1))),
  )


def llama(draw: random.Random, i: int) -> transformers.PreTrainedConfig:
  values = gqa(draw, i)
  # Its heads must divide its width.
  values['hidden_size'] = 8 * values['num_attention_heads']
  if i % 2:
    values['rope_parameters'] |= {
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': draw.choice((8, 16)),
    }
  return transformers.LlamaConfig(**values)


_FAMILIES = {
  f.__name__: f
  for f in (
    *(deepseek_v2, deepseek_v3, deepseek_v32, qwen2, qwen3, qwen3_moe, llama),
  )
}


def randomise(model: torch.nn.Module) -> None:
  """Norms and biases too, which are 1 and 0 else."""
  for name, x in (*model.named_parameters(), *model.named_buffers()):
    noise = torch.randn(x.shape)
    if 'norm' in name and name.endswith('weight'):
      x.data = 1 + 0.2 * noise
    elif name.endswith('bias'):  # The router's also.
      x.data = 0.1 * noise


def make(folder: pathlib.Path, config: transformers.PreTrainedConfig) -> float:
  model = transformers.AutoModelForCausalLM.from_config(
    config, attn_implementation='eager', experts_implementation='eager'
  ).eval()
  randomise(model)
  model.save_pretrained(folder)
  tokens = torch.randint(0, config.vocab_size, (2, _LENGTH))
  with torch.no_grad():
    logits = model(tokens).logits.numpy()
    exact = model.double()(tokens).logits.numpy()
  np.savez(
    folder / 'io.npz', input_ids=tokens.numpy(), logits=logits, exact=exact
  )
  return float(np.abs(logits - exact).max())


if __name__ == '__main__':
  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  root, count, seed = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
  for family, draw_config in _FAMILIES.items():
    for i in range(count):
      name = f'{family}-{i}'
      draw = random.Random(f'{name} {seed}')
      torch.manual_seed(draw.randrange(2**31))
      noise = make(root / name, draw_config(draw, i))
      print(json.dumps({'folder': name, 'noise': noise}), flush=True)
