"""Token selection: which frames, and which window of each frame, the rest of the network sees.

Floor 0: torch only. Start with `topk` (the operator), then `temporal` and `spatial` (what it selects), then `slots`
(where a backbone calls it). `oracle` selects what `truth` says; `baselines` has all siblings. `spec`, which reads the paper's notation, needs not even torch: nothing is imported here.
"""
