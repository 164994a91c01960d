"""The quickstart's small world: a model, a tokenizer and four topics, made on the spot."""
