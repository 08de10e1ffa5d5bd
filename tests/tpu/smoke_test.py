"""A small compile for a v5p: the part of the TPU tests that .ci/run runs."""

import math

import jax
import pytest

from r1jax.model import transformer
from r1jax.parallel import sharding
from r1jax.train import optimizer
from tests.tpu import programs

pytestmark = pytest.mark.tpu_smoke

_TOPOLOGY = 'v5p:2x2x1'


def test_matmul_compiles(compile_for_tpu):
  name = 'programs:matmul'
  report = compile_for_tpu(_TOPOLOGY, [name])[name]
  assert report['device_kind'] == 'TPU v5'
  assert report['num_devices'] == 4
  # A quarter of x [1024, 256] and all of w [256, 256], 2 bytes each.
  assert report['argument_bytes'] == 1024 * 256 * 2 // 4 + 256 * 256 * 2
  assert sum(report['collectives'].values()) >= 1


def test_megablox_compiles_with_its_gradient_and_copies_nothing(
  compile_for_tpu,
):
  name = 'programs:megablox'
  report = compile_for_tpu(_TOPOLOGY, [name])[name]
  m, k, n, _ = programs.MEGABLOX
  # The product and both of its gradients, as the kernels estimate them.
  assert report['flops'] == pytest.approx(3 * 2 * m * k * n, rel=0.02)
  assert report['temp_bytes'] < 2 * m * n / 4


def test_splash_compiles_with_its_gradient_and_without_scores(compile_for_tpu):
  name = 'programs:splash'
  report = compile_for_tpu(_TOPOLOGY, [name])[name]
  T, S, H, _, U = programs.SPLASH
  # Queries, keys and their gradients padded to 256, values and theirs.
  assert report['temp_bytes'] < 1.2 * 2 * H * (2 * 256 + 2 * U) * (T + S)
  assert report['temp_bytes'] < 4 * H * T * S


@pytest.mark.parametrize(
  ('kernel', 'most_bytes'),
  [
    ('grouped_matmul', 1000 * 4 * 512 * 4),  # All rows by all weights.
    ('linear_cross_entropy', 600 * 4100 * 4),  # Logits.
    ('linear_fp8', 8 << 20),  # Some copies of what comes and leaves.
    ('grouped_fp8', 8 << 20),
    ('sparse_mla', 128 * 256 * 1280),  # The tokens of each query.
    ('mla_attention', 4 * 1024 * 1024 * 4),  # Scores.
    ('mla_decode', 8 * 2048 * 576 * 2),  # The cache.
  ],
)
def test_our_kernels_compile(compile_for_tpu, kernel, most_bytes):
  name = f'kernels:{kernel}'
  report = compile_for_tpu(_TOPOLOGY, [name], timeout=300)[name]
  assert report['temp_bytes'] < most_bytes
  assert report['flops'] > 0


def test_the_exchange_of_tokens_compiles(compile_for_tpu):
  name = 'kernels:expert_all_to_all'
  report = compile_for_tpu(_TOPOLOGY, [name])[name]
  # Single rows are copied before and behind, FP8 and its scales are not.
  assert report['temp_bytes'] < 3 * 2 * 1024 * 1024


def _bytes() -> tuple[int, int]:
  """Of the demo's parameters, and of what its optimizer keeps of them."""
  run = programs.demo_run()
  shapes = sharding.unbox(
    jax.eval_shape(lambda: transformer.init(run.model, jax.random.key(0)))
  )
  transform = optimizer.make_optimizer(run.optim, run.train.num_steps)
  moments = jax.eval_shape(transform.init, shapes['params'])
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  return 4 * count(shapes), 4 * count(moments)


def test_the_tiny_train_step_compiles_sharded(compile_for_tpu):
  name = 'programs:tiny_train_step'
  report = compile_for_tpu(_TOPOLOGY, [name], timeout=550)[name]
  assert report['num_devices'] == 4
  # Parameters and moments, nearly all of them halved over fsdp; lanes of 128
  # pad the narrow ones, to less than twice their size.
  state = sum(_bytes())
  assert state / 2 < report['argument_bytes'] < state
  assert report['output_bytes'] < state
  assert report['temp_bytes'] < 2**30
  collectives = report['collectives']
  assert collectives['all-gather'] and collectives['all-reduce']


def test_the_tiny_sampler_compiles_without_communication(compile_for_tpu):
  name = 'programs:tiny_decode_step'
  report = compile_for_tpu(_TOPOLOGY, [name], timeout=550)[name]
  # Each device has all parameters (but MTP's) and decodes its own rows.
  assert report['argument_bytes'] < 2 * _bytes()[0]
  assert report['temp_bytes'] < 2**28
  assert report['collectives'] == {}


def test_a_compile_error_names_its_program(compile_for_tpu):
  names = ['programs:matmul', 'programs:too_large']
  with pytest.raises(pytest.fail.Exception) as error:
    compile_for_tpu(_TOPOLOGY, names)
  assert 'programs:too_large failed, return code 1' in str(error.value)
  assert 'RESOURCE_EXHAUSTED' in str(error.value)


def test_an_abort_is_reported_with_its_return_code(compile_for_tpu):
  with pytest.raises(pytest.fail.Exception, match='return code -6'):
    compile_for_tpu(_TOPOLOGY, ['programs:abort'])
