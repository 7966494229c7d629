"""Fitting the projector between a frozen CLIP and a frozen LLaMA: plain torch, with or without a process group.

    batches      captions as token ids, and the order in which they are learned
    projector    one step: loss, gradient over all workers, AdamW, learning rate
    validation   loss and captions of a split that is not learned
    state        everything that a fit needs to go on, as bytes
    loop         all steps, from a saved state or from none
    team         the workers that share them
    output       the folder of a fit: whose it is, and its files by name
    curves       a plot of a fit
    progress     how far it is, on stderr and in TensorBoard

Knows image features, not pixels; a `Team` of workers, not Ray.
"""
