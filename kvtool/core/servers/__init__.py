"""The KV caches of serving engines, judged from outside: token ids in, logprobs out."""
