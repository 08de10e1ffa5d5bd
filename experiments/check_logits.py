"""Compares a model's logits with a reference's; exits 1 beyond the tolerance.

python -m experiments.check_logits --from_hf=DIR --reference=FILE.npz

FILE.npz holds `input_ids` [B, T] and `logits` [B, T, V]. Everything runs in
float32 at the highest precision of products.
"""

import sys

from absl import flags

from experiments import app

_FROM_HF = flags.DEFINE_string(
  'from_hf', None, 'Hugging Face folder, or a workdir.', required=True
)
_REFERENCE = flags.DEFINE_string(
  'reference', None, 'The npz file.', required=True
)
_ATOL = flags.DEFINE_float('atol', 2e-5, 'Largest difference allowed.', 0.0)


def main() -> None:
  app.set_up_jax(default_host_devices=1)
  from r1jax.parallel import mesh as mesh_lib
  from r1jax.recipe import convert, stage

  mesh = stage.make_mesh(mesh_lib.MeshConfig(data=1, fsdp=-1))
  check = convert.check_logits(_FROM_HF.value, _REFERENCE.value, mesh=mesh)
  is_good = check.largest <= _ATOL.value
  print(
    f'{check.num_tokens} tokens: largest difference {check.largest:.3g} '
    f'({"within" if is_good else "BEYOND"} {_ATOL.value:g}), mean KL '
    f'{check.mean_kl:.3g} nats'
  )
  if not is_good:
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
