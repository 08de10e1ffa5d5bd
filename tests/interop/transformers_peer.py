"""Run by another Python, one that has transformers: loads exported models.

  python transformers_peer.py FOLDER… < /dev/null

Prints a JSON object a line: the folder, the dtype it was loaded in, the largest
difference of its logits, in float32, from FOLDER/io.npz, and whatever
transformers had to say while loading.
"""

import contextlib
import io
import json
import logging
import pathlib
import sys
import warnings

import numpy as np
import torch
import transformers


def check(folder: pathlib.Path) -> dict[str, object]:
  said = io.StringIO()
  handler = logging.StreamHandler(said)
  logging.getLogger('transformers').addHandler(handler)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    with contextlib.redirect_stderr(io.StringIO()):
      model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation='eager'
      )
  logging.getLogger('transformers').removeHandler(handler)
  dtype = str(model.dtype)
  file = np.load(folder / 'io.npz')
  tokens = torch.tensor(file['input_ids'].astype(np.int64))
  with torch.no_grad():
    logits = model.float()(tokens).logits.numpy()
  warned = [str(w.message) for w in caught]
  return {
    'folder': folder.name,
    'dtype': dtype,
    'largest': float(np.abs(logits - file['logits']).max()),
    'said': said.getvalue() + ''.join(warned),
  }


if __name__ == '__main__':
  torch.set_num_threads(1)
  for name in sys.argv[1:]:
    print(json.dumps(check(pathlib.Path(name))), flush=True)
