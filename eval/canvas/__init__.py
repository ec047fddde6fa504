"""Canvas VQA: questions about real handwritten digits on real photo crops, and a tiny LLaVA trained to answer them."""
