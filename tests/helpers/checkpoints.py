"""Changes to checkpoints on disk."""

import json

from imp_jax.workdir.checksums import digest_tree


def forget_definition(folder):
    """Rewrite the version of a checkpoint as it was when distances and J_r counted biases too."""
    path = folder / "version" / "metadata"
    version = json.loads(path.read_text())
    del version["digest"], version["similarity"]
    path.write_text(json.dumps({**version, "digest": digest_tree(version)}))
