"""Token selection: which frames, and which window of each frame, the rest of the network sees.

Floor 0: torch only. Start with `topk` (the operator), then `temporal` and `spatial` (what it selects), then `slots` (where a
backbone calls it). `baselines` has all siblings; `oracle` selects what `truth` says. `spec`, which reads the paper's notation,
needs not even torch: nothing is imported here.
"""
