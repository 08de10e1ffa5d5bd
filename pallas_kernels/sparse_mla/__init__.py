"""DeepSeek sparse attention: indexer, selection and attention (DSA)."""
