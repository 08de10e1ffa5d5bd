"""Trains a sentencepiece tokenizer, by default on the arithmetic corpus.

  python -m experiments.train_tokenizer --output=arithmetic.model

gives, on any machine, the file that ships with the package.
"""

import io
import os
from collections.abc import Iterator

import sentencepiece
from absl import flags

from experiments import app
from r1jax import config as config_lib
from r1jax.data import corpus, tokenizer
from r1jax.data.tasks import arithmetic

_OUTPUT = flags.DEFINE_string('output', None, 'Model file to write.')
_VOCAB_SIZE = flags.DEFINE_integer('vocab_size', 384, 'Number of ids.')
_INPUT = flags.DEFINE_multi_string(
  'input', [], 'Text files to train on instead of arithmetic documents.'
)

_NUM_DOCUMENTS = 20_000
_LETTERS = 'abcdefghijklmnopqrstuvwxyz'
_SYMBOLS = '0123456789+-×÷=<>.,:;?▁\n：，；？。'


def train(texts: Iterator[str], vocab_size: int) -> bytes:
  """Trains a unigram model and returns its bytes; the same for the same texts.

  Raises:
    UserError: The vocabulary is too small or too large for the texts.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=texts,
      model_writer=model,
      model_type='unigram',
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      split_digits=True,
      split_by_whitespace=False,
      treat_whitespace_as_suffix=True,
      split_by_unicode_script=False,
      user_defined_symbols=list(tokenizer.TAGS),
      required_chars=_LETTERS + _SYMBOLS,
      max_sentencepiece_length=24,
      pad_id=0,
      eos_id=1,
      bos_id=2,
      unk_id=3,
      num_threads=1,
      minloglevel=2,
    )
  except RuntimeError as e:
    raise config_lib.UserError(f'vocab_size={vocab_size}: {e}') from e
  return model.getvalue()


def arithmetic_texts() -> Iterator[str]:
  """Yields documents of every kind, within 100 and within 1000."""
  for maximum in (100, 1000):
    config = corpus.CorpusConfig(
      arithmetic.ArithmeticConfig(maximum=maximum, good_guess=0.5)
    )
    for index in range(_NUM_DOCUMENTS // 2):
      prompt, completion, _ = corpus.document(config, 0, index)
      # Apart, so that no piece spans the two: a prompt is encoded alone too.
      yield prompt
      # Without newlines, which stay tokens of their own.
      yield completion.replace('\n', '')


def _file_texts(paths: list[str]) -> Iterator[str]:
  for path in paths:
    try:
      with open(path, encoding='utf-8') as f:
        yield from f
    except (OSError, UnicodeDecodeError) as e:
      raise config_lib.UserError(f'cannot read input {path!r}: {e}') from e


def main() -> None:
  texts = _file_texts(_INPUT.value) if _INPUT.value else arithmetic_texts()
  model = train(texts, _VOCAB_SIZE.value)
  os.makedirs(os.path.dirname(_OUTPUT.value) or '.', exist_ok=True)
  with open(_OUTPUT.value, 'wb') as f:
    f.write(model)
  size = tokenizer.Tokenizer(model).vocab_size
  print(f'{_OUTPUT.value}: {size} ids, {len(model):,} bytes')


if __name__ == '__main__':
  flags.mark_flag_as_required('output')
  app.run(main)
