"""One of two processes that import or export a model together.

python -m tests.recipe.two_processes RANK PORT import FOLDER WORKDIR
python -m tests.recipe.two_processes RANK PORT float32|fp8 FOLDER FOLDER2

Prints what it read of the files, bytes; of an import, which it saves and
restores, also what it holds of the model.
"""

import json
import sys

import jax

from r1jax.interop import safetensors
from r1jax.parallel import mesh as mesh_lib
from r1jax.recipe import convert, origin


def main(rank: str, port: str, what: str, source: str, target: str) -> None:
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{port}', 2, int(rank))
  num_read = []
  close = safetensors.Reader.close

  def noted_close(self: safetensors.Reader) -> None:
    num_read.append(self.bytes_read)
    close(self)

  safetensors.Reader.close = noted_close
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, fsdp=2))
  if what == 'import':
    report = _import(source, target, mesh)
  else:
    convert.to_huggingface(
      source, target, mesh=mesh, dtype=what, shard_gib=1.0, say=print
    )
    report = {}
  print(json.dumps(report | {'read_bytes': sum(num_read)}), flush=True)


def _import(
  folder: str, workdir: str, mesh: jax.sharding.Mesh
) -> dict[str, float]:
  convert.to_workdir(
    folder, workdir, mesh=mesh, param_dtype='float32', say=print
  )
  model = origin.load_model_config(workdir)
  variables, step = origin.load_variables(workdir, model, mesh, say=print)
  shards = [
    shard.data
    for leaf in jax.tree.leaves(variables)
    for shard in leaf.addressable_shards
  ]
  return {
    'step': step,
    'held_bytes': sum(shard.nbytes for shard in shards),
    'sum': sum(float(abs(shard).sum()) for shard in shards),
  }


if __name__ == '__main__':
  main(*sys.argv[1:])
