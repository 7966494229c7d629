"""Ray, which nothing else imports: the session, pools of workers, sources and sinks, the three pipelines, interrupts.

Knows what each stage reserves and how rows move between stages; it does not know what a stage does to a row, which is
in `captioning` and `training`. Each pipeline exports its job.
"""
