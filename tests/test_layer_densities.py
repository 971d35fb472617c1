"""Numbers of survivors per layer, compared with the iterative algorithm of Evci et al. (2020)."""

import jax
import numpy as np
import pytest

from imp_jax.layer_densities import erdos_renyi_kernel_counts, uniform_counts

NETWORKS = {
    "lenet": [(784, 300), (300, 100), (100, 10)],
    "conv": [(3, 3, 3, 16), (3, 3, 16, 32), (1, 1, 16, 32), (512, 10)],
    "two_of_one_size": [(10, 10), (10, 10), (1, 7)],
}


def reference_densities(shapes, total):
    """Make layers dense one by one until no density exceeds 1, as in the code of Evci et al."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    raw = [sum(shape) / np.prod(shape) for shape in shapes]
    dense = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        if not free:
            return np.ones(len(shapes))
        rest = total - sum(sizes[i] for i in dense)
        epsilon = rest / sum(raw[i] * sizes[i] for i in free)
        densities = np.array([1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))])
        if densities.max() <= 1 + 1e-12:
            return densities
        dense.add(int(np.argmax([0 if i in dense else densities[i] for i in range(len(shapes))])))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("density", [0.0047, 0.02, 0.1, 0.33, 0.8, 0.99, 1.0])
def test_counts_are_exact_and_follow_the_reference(name, density):
    shapes = NETWORKS[name]
    sizes = np.array([np.prod(shape) for shape in shapes])
    total = round(density * sizes.sum())
    for counts, densities in (
        (erdos_renyi_kernel_counts, reference_densities(shapes, total)),
        (uniform_counts, np.full(len(shapes), total / sizes.sum())),
    ):
        found = np.asarray(jax.jit(lambda n, counts=counts: counts(shapes, n))(total))
        assert found.dtype == np.int32
        assert found.sum() == total
        assert (found <= sizes).all()
        assert (found >= 0).all()
        np.testing.assert_allclose(found, densities * sizes, atol=1.0)


def test_counts_of_many_weights_are_exact():
    shapes = [(4096, 4096), (4096, 2048), (2048, 1000)]
    for total in (20_000_003, 1_234_567):
        assert int(erdos_renyi_kernel_counts(shapes, total).sum()) == total
        assert int(uniform_counts(shapes, total).sum()) == total
