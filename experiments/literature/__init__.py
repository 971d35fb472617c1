"""Experiments of the literature on lottery tickets: controls, and the anchors that ours are checked against."""
