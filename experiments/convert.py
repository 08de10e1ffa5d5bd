"""Converts models from and to Hugging Face safetensors.

python -m experiments.convert --from_hf=DIR --workdir=OUT
python -m experiments.convert --workdir=RUN --to_hf=DIR --dtype=bfloat16
python -m experiments.convert --from_hf=DIR --to_hf=DIR2 --dtype=fp8

The last keeps every byte of weights that are FP8 in DIR. A workdir is there to
compute with: FP8 weights are dequantised on the way into it, and --dtype=fp8
quantises those of a workdir anew.
"""

from absl import flags

from experiments import app
from r1jax import config

_FROM_HF = flags.DEFINE_string(
  'from_hf', None, 'Folder with config.json and safetensors files.'
)
_TO_HF = flags.DEFINE_string('to_hf', None, 'Folder to write; a new one.')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'The run to export, or with --from_hf the one to make.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  'bfloat16',
  ['float32', 'bfloat16', 'fp8'],
  'Of what is exported. With fp8, FP8 weights of --from_hf keep their bytes; '
  'a workdir has none, its weights are quantised anew.',
)
_PARAM_DTYPE = flags.DEFINE_enum(
  'param_dtype',
  'float32',
  ['float32', 'bfloat16'],
  'Of what is imported into a workdir; FP8 weights are dequantised.',
)
_MTP = flags.DEFINE_bool(
  'mtp', True, 'Take MTP modules along, if there are any.'
)
_SHARD_GIB = flags.DEFINE_float(
  'shard_gib', 5.0, 'Most GiB of an exported file.', 0.001
)
_FSDP = flags.DEFINE_integer(
  'fsdp', -1, 'Devices that weights are split over; -1 for all.'
)


def main() -> None:
  from_hf, workdir, to_hf = _FROM_HF.value, _WORKDIR.value, _TO_HF.value
  if sum(map(bool, (from_hf, workdir, to_hf))) != 2:
    raise config.UserError(
      'give two of --from_hf, --workdir and --to_hf: where from and where to'
    )
  _refuse_idle(to_hf)
  app.set_up_jax(default_host_devices=1)
  from r1jax.parallel import mesh as mesh_lib
  from r1jax.recipe import convert, stage

  mesh = stage.make_mesh(mesh_lib.MeshConfig(data=1, fsdp=_FSDP.value))
  if not to_hf:
    convert.to_workdir(
      from_hf,
      workdir,
      mesh=mesh,
      param_dtype=_PARAM_DTYPE.value,
      mtp=_MTP.value,
      say=print,
    )
    print(f'{from_hf} is now step 0 of {workdir}')
    return
  source = from_hf or workdir
  convert.to_huggingface(
    source,
    to_hf,
    mesh=mesh,
    dtype=_DTYPE.value,
    shard_gib=_SHARD_GIB.value,
    mtp=_MTP.value,
    say=print,
  )
  print(f'{source} is now in {to_hf}, {_DTYPE.value}')


def _refuse_idle(to_hf: str | None) -> None:
  """What was given must mean something, to the way that is taken."""
  of_exports = {
    'dtype': 'the dtype of a workdir is that of --param_dtype',
    'shard_gib': 'it is of files that --to_hf writes',
  }
  of_imports = {'param_dtype': 'the dtype of an export is that of --dtype'}
  for name, what_counts in (of_imports if to_hf else of_exports).items():
    if flags.FLAGS[name].present:
      raise config.UserError(f'--{name} does nothing here: {what_counts}')


if __name__ == '__main__':
  app.run(main, keeps_checkpoints=False)
