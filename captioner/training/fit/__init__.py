"""Fitting the projector between a frozen CLIP and a frozen LLaMA: plain torch, with or without a process group.

    fit_plan      what a fit will do, checked before anything starts
    rungs         which projector the settings ask for
    fit_worker    one worker: from its task to its last state
    fit_loop      all steps, from a saved state or from none
    schedule      after which steps it evaluates, keeps a checkpoint, logs
    projector     one step: loss, gradient over all workers, AdamW, learning rate
    batches       captions as token ids, and their order
    validation    loss and captions of the validation split
    fit_state     everything that a fit needs to resume, as bytes
    worker_group  the workers that share a fit
    fit_output    the output folder: which fit owns it, and its files by name
    run_folder    checkpoints, metrics and curves of a running fit
    curves        a plot of a fit
    progress      progress on stderr and in TensorBoard
    fit_report    the bundle, the summary, the closing lines

Knows image features, and pixels as they come from a stream; a `WorkerGroup`, not Ray.
"""
