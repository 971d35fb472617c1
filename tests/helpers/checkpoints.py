"""Checkpoints of earlier versions."""

import json

from imp_jax.workdir.checksums import digest_tree


def forget_definition(folder):
    """Write the version of a checkpoint as it was when distances and J_r still counted biases."""
    path = folder / "version" / "metadata"
    version = json.loads(path.read_text())
    del version["digest"], version["similarity"]
    path.write_text(json.dumps({**version, "digest": digest_tree(version)}))
