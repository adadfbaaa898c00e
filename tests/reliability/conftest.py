"""What the tests of reliability share."""

from tests.checkpoint.conftest import llama_arrays

__all__ = ["llama_arrays"]
