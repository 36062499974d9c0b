"""Serving engines, judged from outside: token ids in, logprobs out."""
