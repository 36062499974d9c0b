"""The models, the caches, and what measures them.

Shapes stand after the tensors, in the same letters everywhere: B batch, T new tokens, S key
columns, H query heads, Hkv key-value heads, D width of a head, d width of the model, V vocabulary,
L layers.
"""
