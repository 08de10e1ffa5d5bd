"""Rule rewards, on device and on strings.

What a completion says, for both twins:
  * It ends at its first <eos>; sampled tokens after that do not exist.
  * A tag is the tag's own token. A tag spelled out of other pieces ('<',
    'think', '>', or their byte pieces) is ordinary text. The string twin
    renders tokens as markup in which '<' and '&' of the text are escaped, so
    that '<think>' there can only come from the token.
  * Everything else is the bytes that the piece prints. Tokens that print
    nothing (padding, <bos>, ids past the vocabulary) are as if not sampled.
  * Whitespace is ASCII: space, newline, tab, carriage return.

Format: <think>, text, </think>, whitespace or nothing, <answer>, text that is
not all whitespace, </answer>, whitespace or nothing, <eos>; no other tag. The
text of <think> may be empty. A completion cut before <eos> has no format.

Accuracy: the content of the last <answer>…</answer> without a tag inside,
stripped, is the gold integer as ASCII text, sign and digits exactly
(`007`, `+7`, `7.0` are not 7). It needs neither <think> nor <eos>.
"""
