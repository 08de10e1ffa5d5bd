"""Documents from files: what is read, and one clear line for what is not."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from r1jax import config
from r1jax.data import text
from r1jax.data import tokenizer as tokenizer_lib

_QA = '{question}\n{answer}'


def _config(*paths, **changes):
  values = {
    'paths': tuple(map(str, paths)),
    'format': 'auto',
    'template': '{text}',
    'split_blank_lines': False,
    'held_out_fraction': 0.0,
  }
  return text.TextConfig(**(values | changes))


def _write(path, data):
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return path


def test_jsonl_template(tmp_path):
  path = _write(
    tmp_path / 'a.jsonl',
    '\ufeff{"question": "1+1?", "answer": 2, "more": [1]}\r\n\n'
    '{"question": "é等\\n", "answer": "x"}',
  )
  documents = text.read_documents(_config(path, template=_QA))
  assert documents == ['1+1?\n2', 'é等\n\nx']


def test_braces_in_template_and_values(tmp_path):
  path = _write(tmp_path / 'a.jsonl', '{"a-b": "{x}"}\n')
  documents = text.read_documents(_config(path, template='{{{a-b}}}'))
  assert documents == ['{{x}}']


def test_text_whole_and_split(tmp_path):
  path = _write(tmp_path / 'a.txt', 'one\n  two\n \n\n  three\r\n\r\nfour\n')
  assert text.read_documents(_config(path)) == [path.read_bytes().decode()]
  split = text.read_documents(_config(path, split_blank_lines=True))
  assert split == ['one\n  two', '  three', 'four']


def test_parquet(tmp_path):
  path = tmp_path / 'a.parquet'
  table = pa.table({'question': ['p', 'q'], 'answer': ['1', '2'], 'n': [3, 4]})
  parquet.write_table(table, path, row_group_size=1)
  documents = text.read_documents(_config(path, template='{answer}{n}{answer}'))
  assert documents == ['131', '242']


def test_globs_in_order_each_once(tmp_path):
  (tmp_path / 'deep').mkdir()
  _write(tmp_path / 'b.txt', 'b')
  _write(tmp_path / 'a.md', 'a')
  _write(tmp_path / 'deep' / 'c.jsonl', '{"text": "c"}')
  found = text.read_documents(
    _config(tmp_path / 'b.txt', tmp_path / '*.*', tmp_path / '**' / '*.jsonl')
  )
  assert found == ['b', 'a', 'c']


def test_named_format_wins_over_suffix(tmp_path):
  path = _write(tmp_path / 'data', '{"text": "c"}')
  assert text.read_documents(_config(path, format='jsonl')) == ['c']
  with pytest.raises(config.UserError, match='data: cannot tell the format'):
    text.read_documents(_config(path))


_GOOD = '{"question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
  'name,data,expected',
  [
    ('a.jsonl', _GOOD + '{"question": "q", "ans', r'a\.jsonl:2: .*truncated'),
    ('a.jsonl', _GOOD + '{"question": }\n' + _GOOD, r'a\.jsonl:2: .*column 14'),
    (
      'a.jsonl',
      _GOOD + '{"question": "q", "reply": "a"}\n',
      r"a\.jsonl:2: no field 'answer'; present: question, reply",
    ),
    ('a.jsonl', '[1]\n', r'a\.jsonl:1: a JSON list'),
    ('a.jsonl', '[' * 10**5, r'a\.jsonl:1: '),
    (
      'a.jsonl',
      '\n{"question": null, "answer": "a"}',
      r"a\.jsonl:2: field 'question' is a NoneType",
    ),
    (
      'a.jsonl',
      '{"question": "\\ud800", "answer": "a"}',
      r'a\.jsonl:1: a lone surrogate',
    ),
    ('a.jsonl', _GOOD.encode() + b'{"\xff": 1}', r'a\.jsonl:2: .* byte 2 '),
    ('a.jsonl', '', r'a\.jsonl: the file holds no document'),
    (
      'a.jsonl',
      '{"question": " ", "answer": ""}',
      r'a\.jsonl: the file holds no document',
    ),
    ('a.jsonl', '\n \n', r'a\.jsonl: the file holds no document'),
    ('a.txt', 'text', r"a\.txt: no field 'question'; present: text"),
    ('a.parquet', '', r'a\.parquet: not a readable Parquet file'),
    ('a.parquet', 'PAR1 no PAR1', r'a\.parquet: not a readable Parquet file'),
  ],
)
def test_broken_file(tmp_path, name, data, expected):
  path = _write(tmp_path / name, data)
  with pytest.raises(config.UserError, match=expected) as caught:
    text.read_documents(_config(path, template=_QA))
  assert '\n' not in str(caught.value)
  assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize('keep', [0.3, 0.9])
def test_truncated_parquet(tmp_path, keep):
  path = tmp_path / 'a.parquet'
  parquet.write_table(pa.table({'text': ['some text'] * 100}), path)
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * keep)])
  with pytest.raises(config.UserError, match=r'a\.parquet: not a readable'):
    text.read_documents(_config(path))


@pytest.mark.parametrize(
  'column,expected',
  [
    (pa.array(['a', None]), r"row 2: field 'text' is a NoneType"),
    # Past the first batch that the reader hands out.
    (pa.array(['a'] * 70_000 + [None]), r'row 70001: '),
    (pa.array([['a'], []]), r"row 1: field 'text' is a list"),
    (
      pa.array([b'a', b'\xff']).view(pa.string()),
      r'a\.parquet: after row 0: not UTF-8',
    ),
  ],
)
def test_parquet_values(tmp_path, column, expected):
  path = tmp_path / 'a.parquet'
  parquet.write_table(pa.table({'text': column}), path)
  with pytest.raises(config.UserError, match=expected):
    text.read_documents(_config(path))
  with pytest.raises(config.UserError, match="no field 'x'; present: text"):
    text.read_documents(_config(path, template='{x}'))


def test_invalid_utf8_in_text(tmp_path):
  path = _write(tmp_path / 'a.txt', b'one\ntw\xc3(\n')
  with pytest.raises(config.UserError, match=r'a\.txt:2: not UTF-8 at byte 2'):
    text.read_documents(_config(path))


def test_missing_files(tmp_path):
  for path, expected in (
    (tmp_path / 'gone.jsonl', r'gone\.jsonl: no such file'),
    (tmp_path / '*.jsonl', r'\*\.jsonl: no file matches'),
    (tmp_path, 'a folder; name its files'),
  ):
    with pytest.raises(config.UserError, match=expected):
      text.read_documents(_config(path))


@pytest.mark.parametrize(
  'changes,expected',
  [
    ({'format': 'csv'}, "format='csv' must be one of auto, jsonl"),
    ({'held_out_fraction': 1.0}, r'held_out_fraction=1\.0 must be in'),
    ({'paths': ()}, 'must name at least one file'),
    ({'template': 'no field'}, "template='no field'"),
    ({'template': '{a'}, "template='{a'"),
    ({'template': '{}'}, "template='{}'"),
    ({'template': '{a.b}'}, "template='{a.b}'"),
    ({'template': '{a:>9}'}, "template='{a:>9}'"),
  ],
)
def test_wrong_config(changes, expected):
  values = json.loads(json.dumps(config.to_dict(_config('a.txt')))) | changes
  with pytest.raises(config.UserError, match=expected):
    config.from_dict(text.TextConfig, values)


def test_split_depends_on_the_text_alone(tmp_path):
  lines = [json.dumps({'text': f'document {i}'}) for i in range(2000)]
  a = _write(tmp_path / 'a.jsonl', '\n'.join(lines))
  documents = text.read_documents(_config(a))
  held_out = {d for d in documents if text.is_held_out(d, 0.2)}
  assert abs(len(held_out) / 2000 - 0.2) < 0.04  # Over 4 standard deviations.
  more = {d for d in documents if text.is_held_out(d, 0.3)}
  assert held_out < more
  assert not any(text.is_held_out(d, 0.0) for d in documents)


def test_make_rows_of_each_split(tmp_path):
  lines = [json.dumps({'text': f'{i}\n'}) for i in range(100)]
  path = _write(tmp_path / 'a.jsonl', '\n'.join(lines))
  tokenizer = tokenizer_lib.default()
  found = {}
  for split in ('train', 'held_out'):
    rows = text.make_rows(
      _config(path, held_out_fraction=0.3),
      tokenizer,
      row_length=16,
      seed=1,
      split=split,
    )
    tokens = [rows[i]['tokens'] for i in range(len(rows))]
    printed = ''.join(tokenizer.decode(t) for t in tokens)
    found[split] = set(map(int, printed.split()))
  assert 15 < len(found['held_out']) < 45
  assert not found['train'] & found['held_out']
  assert found['train'] | found['held_out'] == set(range(100))
  with pytest.raises(config.UserError, match='the held_out split is empty'):
    text.make_rows(
      _config(path), tokenizer, row_length=16, seed=1, split='held_out'
    )


def test_gsm8k(shared_data):
  path = shared_data / 'gsm8k' / 'train.jsonl'
  if not path.is_file():
    pytest.skip('no gsm8k')
  documents = text.read_documents(_config(path, template=_QA))
  assert len(documents) == len(path.read_bytes().splitlines())
  assert documents[0].startswith('Natalia sold clips to 48 of her friends')
  assert documents[0].endswith('\n#### 72')
