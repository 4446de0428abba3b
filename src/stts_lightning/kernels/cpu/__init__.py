"""Blocks on a CPU, in float32. Their products are oneDNN's, which fuse what follows them and know every processor."""
