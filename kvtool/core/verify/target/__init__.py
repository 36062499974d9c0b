"""A user's own decoder, judged as it is. It is an object that has

    full(ids) -> logits                  whole sequences (B,T) -> (B,T,V), no cache takes part
    step(ids, state) -> logits, state    the next tokens (B,n) -> (B,n,V), at first of state None

and whichever of these it can do:

    start(batch, capacity) -> state      the empty state, in place of None
    crop(state, length) -> state         forget all but the first `length` tokens
    select(state, rows) -> state         go on from the histories of rows (n,), in that order
    reset(state) -> state                forget everything and begin again on the same object
    to(dtype) -> decoder                 the same mathematics in another format
    vocab_size, context                  how many ids there are, and the longest sequence

A state may be changed in place: a method that returns None has done so. A method that raises
NotImplementedError cannot do what it is asked. Logits of the last token alone will do. Where `to`
is lacking, the modules and tensors in the object's attributes are converted. An nn.Module without
`full` and `step` is adapted: `adapter` finds out how its forward is called.
"""
