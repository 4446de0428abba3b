"""From video files to batches of clips. Never sees selection or backbones.

`sources` -> `annotations` (which files, which labels) -> `sampling` (which frames) -> `decode` (their pixels) ->
`transforms` (crop, flip) -> `dataset` -> `workers` -> `datamodule`. `demo` makes labelled videos from a seed,
`embed` sets real ones into larger and longer ones; where the action is in them says `truth`.
"""
