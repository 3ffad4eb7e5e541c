"""From raw instruction/response pairs to packed batches; every stage is a folder on disk.

Sources -> clean -> tokenizer -> tokenize -> sample -> pack -> loader. Only `pack`'s consumers
(`collate`, `loader`) need torch; import the module you use.
"""
