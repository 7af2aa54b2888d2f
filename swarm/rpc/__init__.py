"""The wire: generated messages and stubs, their signed form, and the translation of errors."""
