"""kvtool beside its peers: the same weights decoded by transformers and by llama.cpp."""
