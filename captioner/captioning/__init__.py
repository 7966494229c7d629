"""One caption job: the plan, the workers that decode and caption, the summary, the estimate.

Each module stands alone; import from the module that has the name. Knows no Ray.
"""
