"""FP8 models: which products are FP8's, and what they change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.routed_swiglu import ops as routed_swiglu_ops
from r1jax import fp8
from r1jax.losses import token
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import mesh as mesh_lib
from tests.model import tiny


@functools.cache
def _config(precision='block_fp8', **changes):
  base = tiny.config()
  moe = dataclasses.replace(base.moe, implementation='grouped', block=128)
  return dataclasses.replace(
    base, num_layers=2, moe=moe, precision=precision, **changes
  )


def _tokens(rows=2, length=64):
  rng = np.random.default_rng(0)
  return rng.integers(0, tiny.V, (rows, length)).astype(np.int32)


def _dense(precision):
  """Without a router, which a rounding may turn to other experts."""
  return dataclasses.replace(
    _config(precision), num_layers=1, num_dense_layers=1, moe=None
  )


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_grads(config, params, router, tokens_BT):
  def loss(params):
    variables = {'params': params, 'router': router}
    out = transformer.Transformer(config).apply(variables, tokens_BT)
    head = transformer.head(params, config)
    logp_BT, _ = token.next_token_logp(out.hidden_BTD, head, tokens_BT)
    return -logp_BT[:, 1:].mean()

  return jax.value_and_grad(loss)(params)


@functools.cache
def _result(precision):
  config = _dense(precision)
  variables = tiny.variables(config)
  return jax.device_get(
    _loss_and_grads(config, variables['params'], variables['router'], _tokens())
  )


@pytest.mark.parametrize('precision', ['block_fp8', 'tensor_fp8'])
def test_losses_and_gradients_are_near_and_not_equal(precision):
  loss, grads = _result(precision)
  wanted, wanted_grads = _result('dtype')
  assert loss != wanted
  assert abs(loss - wanted) < 0.05 * abs(wanted)
  # A gradient of FP8 points where the other does, each matrix's own.
  paths = jax.tree_util.tree_flatten_with_path(wanted_grads)[0]
  seen = 0
  for (path, a), b in zip(paths, jax.tree.leaves(grads), strict=True):
    name = jax.tree_util.keystr(path)
    if 'mtp' in name or not np.abs(a).max():
      continue
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert cosine > 0.9, name
    seen += 1
  assert seen > 12


def test_the_default_has_no_fp8_at_all():
  text = _loss_and_grads.lower(
    _config('dtype'),
    *(tiny.variables(_config('dtype'))[k] for k in ('params', 'router')),
    _tokens(),
  ).as_text()
  assert 'f8E4M3' not in text


def test_einsum_is_the_linear_of_flattened_axes():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 3, 64)).astype(np.float32)
  w = rng.normal(size=(40, 3, 64)).astype(np.float32)
  run = functools.partial(fp8.einsum, 'BTHU,DHU->BTD', recipe=fp8.Recipe())
  flat = fp8.einsum(
    'mk,kn->mn',
    x.reshape(10, -1),
    np.ascontiguousarray(w.reshape(40, -1).T),
    recipe=fp8.Recipe(),
  )
  np.testing.assert_allclose(run(x, w).reshape(10, -1), flat, rtol=1e-5)
  rounded = fp8.rounded('BTHU,DHU->BTD', w, jnp.float32, fp8.Recipe())
  assert rounded.shape == w.shape
  np.testing.assert_allclose(rounded, w, rtol=0.07, atol=1e-2)
  with pytest.raises(ValueError, match='is no linear'):
    fp8.einsum('TD,DF->FT', x[0, 0], w[0].T, recipe=fp8.Recipe())


def test_a_sampler_is_near_its_trainer():
  """Absorbed weights are those of training, to the last bit of FP8."""
  config = _dense('block_fp8')
  variables, tokens_BT = tiny.variables(config), _tokens()
  run = functools.partial(tiny.apply, config, variables)
  segment_BT = np.ones((2, 64), np.int32)
  position_BT = np.tile(np.arange(64, dtype=np.int32), (2, 1))
  whole_BTD = run(tokens_BT, segment_BT, position_BT).hidden_BTD
  part = lambda p: (x[:, p] for x in (tokens_BT, segment_BT, position_BT))
  first = run(*part(slice(-1)), cache=transformer.make_cache(config, 2, 64))
  last = run(*part(slice(-1, None)), cache=first.cache, decode=True)
  gap = np.abs(last.hidden_BTD[:, 0] - whole_BTD[:, -1]).mean()
  assert 0 < gap < 0.08 * np.abs(whole_BTD[:, -1]).mean()


def test_experts_are_near_and_so_are_their_gradients():
  rng = np.random.default_rng(0)
  draw = lambda *s: rng.normal(size=s).astype(np.float32)
  T, D, E, F, K = 96, 64, 4, 32, 2
  args = jax.tree.map(
    jnp.asarray,
    (
      draw(T, D),
      np.argsort(draw(T, E), axis=-1)[:, :K].astype(np.int32),
      rng.uniform(0.2, 1, (T, K)).astype(np.float32),
      *(
        s**-0.5 * draw(*shape)
        for s, shape in ((D, (E, D, F)), (D, (E, D, F)), (F, (E, F, D)))
      ),
    ),
  )

  @functools.partial(jax.jit, static_argnames='recipe')
  def run(recipe):
    def out(x_TD, weight_TK, *weights):
      return routed_swiglu_ops.routed_swiglu(
        x_TD,
        args[1],
        weight_TK,
        *weights,
        block=128,
        implementation='grouped',
        recipe=recipe,
      )

    y_TD, vjp = jax.vjp(out, args[0], *args[2:])
    return y_TD, *vjp(args[0])

  for got, wanted in zip(run(fp8.Recipe()), run(None), strict=True):
    error = jnp.linalg.norm((got - wanted).ravel())
    error /= jnp.linalg.norm(wanted.ravel())
    assert 0.005 < error < 0.1
  with pytest.raises(ValueError, match="implementation='xla', block=32: FP8"):
    routed_swiglu_ops.routed_swiglu(
      *args, block=32, implementation='xla', recipe=fp8.Recipe()
    )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'precision': 'fp4'}, "precision='fp4', it must be one of"),
    ({'moe': tiny.config().moe}, 'needs moe.implementation=grouped and a '),
  ],
)
def test_what_cannot_be_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(_config(), **changes)


def test_devices_of_tensor_have_whole_blocks():
  config = dataclasses.replace(
    _config(),
    embed_dim=256,
    dense_dim=1024,
    attention=model_config.MlaConfig(
      num_heads=8,
      q_lora_rank=128,
      kv_lora_rank=128,
      nope_head_dim=128,
      rope_head_dim=64,
      v_head_dim=128,
      rope=model_config.RopeConfig(theta=1e4, interleaved=True),
    ),
    moe=dataclasses.replace(_config().moe, expert_dim=256),
  )
  make = lambda n: mesh_lib.make_mesh(mesh_lib.MeshConfig(data=-1, tensor=n))
  assert transformer.shardings(config, make(2))
  with pytest.raises(
    ValueError,
    match=r'mesh.tensor=4 cuts model.moe.expert_dim=256 into parts of 64; '
    r"precision='block_fp8' needs a multiple of its blocks of 128: tensor=2 ",
  ):
    transformer.shardings(config, make(4))
  # Scales of whole tensors know no blocks.
  tensor = dataclasses.replace(config, precision='tensor_fp8')
  assert transformer.shardings(tensor, make(4))
