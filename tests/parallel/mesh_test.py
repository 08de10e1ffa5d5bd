"""Meshes: sizes that fit, and errors that name those that do not."""

import jax
import pytest

from r1jax.parallel import mesh as mesh_lib


@pytest.mark.parametrize(
  ('config', 'sizes'),
  [
    (mesh_lib.MeshConfig(), (8, 1)),
    (mesh_lib.MeshConfig(data=-1, fsdp=4), (2, 4)),
    (mesh_lib.MeshConfig(data=2, fsdp=-1), (2, 4)),
    (mesh_lib.MeshConfig(data=1, fsdp=8), (1, 8)),
  ],
)
def test_sizes(config, sizes):
  mesh = mesh_lib.make_mesh(config)
  assert mesh.axis_names == mesh_lib.AXES
  assert (mesh.shape['data'], mesh.shape['fsdp']) == sizes
  assert mesh.size == 8


def test_any_product_of_axes_that_is_the_number_of_devices():
  config = mesh_lib.MeshConfig(data=-1, context=2, expert=2, tensor=2)
  mesh = mesh_lib.make_mesh(config)
  assert dict(mesh.shape) == {
    'pipe': 1, 'data': 1, 'fsdp': 1, 'context': 2, 'expert': 2, 'tensor': 2,
  }  # fmt: skip


@pytest.mark.parametrize(
  ('sizes', 'slices', 'across'),
  [
    ({'data': 4, 'fsdp': 2}, 2, {'data': 2}),
    ({'data': 2, 'fsdp': 4}, 4, {'data': 2, 'fsdp': 2}),
    ({'data': 2, 'pipe': 4}, 4, {'data': 2, 'pipe': 2}),
    ({'data': 1, 'fsdp': 8}, 4, {'fsdp': 4}),
    ({'data': 3, 'fsdp': 8}, 4, {'fsdp': 4}),
  ],
)
def test_data_crosses_slices_then_pipe_then_fsdp(sizes, slices, across):
  sizes = mesh_lib.MeshConfig(**sizes).sizes
  found = mesh_lib.across_slices(sizes, slices)
  assert {axis: n for axis, n in found.items() if n > 1} == across


def test_slices_that_no_outer_axis_crosses():
  with pytest.raises(
    ValueError,
    match='data=2 x pipe=1 x fsdp=1 must be a multiple of num_slices=4; '
    'data=4 or fsdp=4 would do',
  ):
    mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, expert=4, num_slices=4))
  with pytest.raises(ValueError, match='num_slices=0 must be at least 1'):
    mesh_lib.MeshConfig(num_slices=0)


def test_one_device():
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  assert mesh.size == 1


def test_errors_name_the_sizes():
  with pytest.raises(ValueError, match='data=3 x fsdp=2 needs 6 .* are 8'):
    mesh_lib.make_mesh(mesh_lib.MeshConfig(data=3, fsdp=2))
  with pytest.raises(ValueError, match='data=2 x fsdp=3 needs 6 .* are 8'):
    mesh_lib.make_mesh(mesh_lib.MeshConfig(data=-1, fsdp=3))
  with pytest.raises(ValueError, match='data=0: sizes are >= 1, or -1'):
    mesh_lib.MeshConfig(data=0)
  with pytest.raises(ValueError, match='at most one axis may be -1'):
    mesh_lib.MeshConfig(data=-1, fsdp=-1)
