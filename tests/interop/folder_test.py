"""Folders that are made whole, and what none can be made of."""

import pytest

from r1jax import config as config_lib
from r1jax.interop import folder as folder_lib


def test_below_a_file_there_is_no_folder(tmp_path):
  (tmp_path / 'file').write_text('')
  for name in ('file', 'file/x', 'file/x/y'):
    with pytest.raises(config_lib.UserError) as e:
      folder_lib.refuse_used(tmp_path / name)
    if name != 'file':
      assert str(e.value) == (
        f'{tmp_path / name} cannot be made: {tmp_path / "file"} is a file, it '
        'must be a folder'
      )
  folder_lib.refuse_used(tmp_path / 'new' / 'x')


def test_what_cannot_be_made_is_the_users_mistake(tmp_path, monkeypatch):
  def refuse(self, **options):
    raise FileNotFoundError(2, 'No such file or directory')

  monkeypatch.setattr(folder_lib.pathlib.Path, 'mkdir', refuse)
  with pytest.raises(config_lib.UserError, match='x cannot be made: No such'):
    with folder_lib.finished_under(tmp_path / 'x', is_owner=True):
      pass


def test_a_folder_has_its_name_when_all_is_done(tmp_path):
  with pytest.raises(ZeroDivisionError):
    with folder_lib.finished_under(tmp_path / 'x', is_owner=True) as folder:
      (folder / 'part').write_text('')
      raise ZeroDivisionError
  assert not list(tmp_path.iterdir())
  with folder_lib.finished_under(tmp_path / 'x', is_owner=True) as folder:
    (folder / 'whole').write_text('')
  assert [p.name for p in tmp_path.iterdir()] == ['x']
