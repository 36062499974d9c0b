"""GGUF, the file format of llama.cpp: read as a model, and promoted to F32."""
