"""AR-RAG in JAX: retrieval inside autoregressive image generation (arXiv 2506.06962)."""
