"""What speculation earns, and how far to draft.

acceptance   counts and a window of them, for metrics
estimate     chances of acceptance by position, learned from verifications
step_cost    what a step takes, by load and draft length
controller   the draft length with the most tokens a second
"""
