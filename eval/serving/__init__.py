"""What pruned visual tokens gain where vLLM serves a model: time, prompts, KV cache, accuracy."""
