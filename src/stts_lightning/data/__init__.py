"""From video files to batches of clips. Never sees selection or backbones.

File -> `annotations` (which files, which labels) -> `sampling` (which frames) -> `decode` (their pixels) ->
`transforms` (crop, flip) -> `dataset` -> `datamodule`. `demo` makes labelled videos from a seed,
`embed` sets real ones into larger and longer ones; where the action is in them says `truth`.
"""
