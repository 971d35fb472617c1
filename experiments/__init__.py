"""The experiments of the paper, benchmarks, and tests of reliability, each with its command."""
