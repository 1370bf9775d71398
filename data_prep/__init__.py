"""Raw text to token shards: sources, cleaning, tokenizers, rows, shards and the commands that build them."""
