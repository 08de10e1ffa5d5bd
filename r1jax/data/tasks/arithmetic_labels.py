"""The words of worked arithmetic, in English and Chinese."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Labels:
  """The words and punctuation of one language."""

  columns: tuple[str, ...]
  colon: str
  comma: str
  semicolon: str
  so: str
  attempt: str
  too_big: str
  too_small: str
  accept: str


LABELS = {
  'en': Labels(
    columns=(
      'ones',
      'tens',
      'hundreds',
      'thousands',
      'ten thousands',
      'hundred thousands',
      'millions',
    ),
    colon=': ',
    comma=', ',
    semicolon='; ',
    so='so ',
    attempt='try ',
    too_big='too big',
    too_small='too small',
    accept='ok: ',
  ),
  'zh': Labels(
    columns=('个位', '十位', '百位', '千位', '万位', '十万位', '百万位'),
    colon='：',
    comma='，',
    semicolon='；',
    so='得',
    attempt='试',
    too_big='太大',
    too_small='太小',
    accept='可以：',
  ),
}
