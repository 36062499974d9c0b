"""GGUF, the file of llama.cpp and its kin: read as a model, and promoted to F32."""
